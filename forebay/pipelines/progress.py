"""How a job goes, on one line."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TextIO

from forebay.pipelines.account import Figures
from forebay.pipelines.estimate import Plan

BAR_CHARS = 24
LINE_EVERY_S = 10.0
"""Between lines where there is no terminal to draw a bar on."""
NANO = 10**9


def line(figures: Figures, plan: Plan, took_s: float) -> str:
    """Rows, rows/s, tokens/s, money, shares of cache and repeated texts, errors, time left."""
    there = plan.done + figures.rows
    share = there / plan.rows if plan.rows else 1.0
    rate = figures.rows / took_s if took_s > 0 else 0.0
    parts = [
        f"{there:,}/{plan.rows:,} rows",
        f"{rate:,.0f} rows/s",
        f"{figures.tokens / took_s if took_s > 0 else 0:,.0f} tokens/s",
        "$ ?" if figures.unpriced else f"${figures.cost_nano / NANO:.4f}",
    ]
    if figures.rows:
        for name, count in (("cached", figures.cached), ("repeated", figures.repeated)):
            parts.append(f"{count / figures.rows:.0%} {name}")
    parts.append(f"{figures.failed:,} failed")
    if rate > 0 and there < plan.rows:
        parts.append(f"{clock((plan.rows - there) / rate)} left")
    full = min(BAR_CHARS, int(share * BAR_CHARS))
    return f"[{'#' * full}{'.' * (BAR_CHARS - full)}] " + "  ".join(parts)


def clock(seconds: float) -> str:
    """1:05, or 2:00:05 from an hour on."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


@dataclass(slots=True)
class Progress:
    """Draws a bar on a terminal; elsewhere writes a line every LINE_EVERY_S."""

    stream: TextIO
    _said_s: float = 0.0
    _width: int = field(default=0)

    def __call__(self, figures: Figures, plan: Plan, took_s: float) -> None:
        if self.stream.isatty():
            text = line(figures, plan, took_s)
            self.stream.write("\r" + text.ljust(self._width))
            self._width = len(text)
        elif took_s - self._said_s >= LINE_EVERY_S:
            self._said_s = took_s
            self.stream.write(line(figures, plan, took_s) + "\n")
        self.stream.flush()

    def end(self) -> None:
        """Leave the bar's line."""
        if self._width:
            self.stream.write("\n")
