"""What a job has done and spent, over all its workers: it lets blocks be sent, or ends the job.

Rule 1: a block's messages carry its id, and saying something twice changes nothing.
Rule 2: money is set aside before a block is sent, at its highest estimate; so what is spent never
        exceeds the most that was allowed.
Rule 3: a job that stops gives no further block away. What is under way ends and is written.
Rule 4: what is sent and not yet written is bounded: it is what a killed run pays for twice.
Rule 5: where the first rows all fail, and alike, all would: the job ends before more are tried.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from forebay.errors import GatewayError

Answer = Literal["go", "wait", "full", "stop"]
"""`wait`: for money that was set aside; `full`: for rows to be written."""
HOPELESS_ROWS = 16
"""Rows that are refused alike, before any was done, from which on the job is taken to be wrong."""
BLOCKS_REMEMBERED_MAX = 100_000
"""Most finished blocks whose ids are kept, so that what is said twice is not counted twice."""


@dataclass(frozen=True, slots=True)
class Done:
    """What came of one block. `cost_nano` None: the price is not known.

    `cached` rows came from the cache, `repeated` are texts that an earlier row of the block has.
    `refused` of the `failed` rows were asked for; `refusal` is what the first of them met, empty
    where they did not fail alike.
    """

    rows: int = 0
    failed: int = 0
    tokens: int = 0
    cost_nano: int | None = 0
    cached: int = 0
    repeated: int = 0
    refused: int = 0
    refusal: str = ""


@dataclass(frozen=True, slots=True)
class Figures:
    """A job's sums so far. `stopped` says why no more blocks are sent: money, or an error."""

    rows: int = 0
    failed: int = 0
    tokens: int = 0
    cost_nano: int = 0
    unpriced: bool = False
    cached: int = 0
    repeated: int = 0
    blocks: int = 0
    blocks_under_way: int = 0
    stopped: Literal["", "money", "error"] = ""
    error: GatewayError | None = None


@dataclass(slots=True)
class Account:
    """Owns a job's sums, and the money that blocks under way may cost at most (nano-USD).

    Bounded by the workers' blocks at once, and by BLOCKS_REMEMBERED_MAX. `unwritten_max` rows may
    be sent and not yet written; None where nobody says what is written. `hopeless_rows` that were
    refused alike, before any was done, end the job; None: no refusals do.

    Failure behaviour: it lives as long as the job's driver and remembers nothing for the next run,
    which has its own allowance. What a worker that died had under way counts as spent, at its most,
    as soon as the worker is there again.
    """

    most_nano: int | None = None
    unwritten_max: int | None = None
    hopeless_rows: int | None = None
    _sums: Done = field(default_factory=Done)
    _blocks: int = 0
    _unpriced: bool = False
    _aside: dict[str, tuple[int, int]] = field(default_factory=dict)  # block → nano-USD, rows
    _lost: dict[str, int] = field(default_factory=dict)  # block → nano-USD
    _finished: dict[str, None] = field(default_factory=dict)
    _files: dict[str, None] = field(default_factory=dict)
    _written: int = 0
    _error: GatewayError | None = None
    _out_of_money: bool = False
    _unlike: bool = False

    def began(self, worker: str) -> None:
        """A worker is there, perhaps again: nobody tells what came of its blocks under way.

        The ids of a worker's blocks begin with its name.
        """
        for block in [name for name in self._aside if name.startswith(worker)]:
            self._lost[block], _ = self._aside.pop(block)

    def begin(self, block: str, cost_nano: int, rows: int, patient: bool = True) -> Answer:
        """Whether a block that costs `cost_nano` at most may be sent.

        With `patient` off also where rows wait to be written: somebody may have forgotten to say.
        """
        if self._error is not None or self._out_of_money:
            return "stop"
        if block in self._aside:
            return "go"
        if patient and self.unwritten_max is not None:
            under_way = sum(rows for _, rows in self._aside.values())
            unwritten = under_way + self._sums.rows - self._written
            if unwritten and unwritten + rows > self.unwritten_max:
                return "full"
        spent = (self._sums.cost_nano or 0) + sum(self._lost.values())
        spent += sum(cost for cost, _ in self._aside.values())
        if self.most_nano is not None and spent + cost_nano > self.most_nano:
            if self._aside:
                return "wait"  # those under way may turn out cheaper than they could be
            self._out_of_money = True
            return "stop"
        self._aside[block] = (cost_nano, rows)
        return "go"

    def written(self, file: str, rows: int) -> None:
        """The rows of a file are there."""
        if file not in self._files:
            self._written += rows
            _remember(self._files, file)

    def end(self, block: str, done: Done) -> GatewayError | None:
        """A block is through. What ends the job with it, if it is the one that shows it."""
        self._aside.pop(block, None)
        self._lost.pop(block, None)  # said before the worker died, and heard after
        if block in self._finished:
            return None
        _remember(self._finished, block)
        old = self._sums
        self._unpriced |= done.cost_nano is None
        self._blocks += 1
        self._sums = Done(
            old.rows + done.rows,
            old.failed + done.failed,
            old.tokens + done.tokens,
            (old.cost_nano or 0) + (done.cost_nano or 0),
            old.cached + done.cached,
            old.repeated + done.repeated,
            old.refused + done.refused,
            old.refusal or done.refusal,
        )
        if not self._is_hopeless(done):
            return None
        self._error = self._error or hopeless(self._sums.refused, self._sums.refusal)
        return self._error

    def fail(self, block: str, error: GatewayError, done: Done) -> None:
        """A block met an error that all others would meet. The first one is told."""
        self.end(block, done)
        if self._error is None:
            self._error = error

    def _is_hopeless(self, last: Done) -> bool:
        sums = self._sums
        self._unlike |= bool(last.refused) and not alike((sums.refusal, last.refusal))
        if self.hopeless_rows is None or self._unlike or sums.rows > sums.failed:
            return False
        return bool(last.refused) and sums.refused >= self.hopeless_rows

    def figures(self) -> Figures:
        sums = self._sums
        stopped: Literal["", "money", "error"] = "money" if self._out_of_money else ""
        return Figures(
            sums.rows,
            sums.failed,
            sums.tokens,
            sums.cost_nano or 0,
            self._unpriced,
            sums.cached,
            sums.repeated,
            self._blocks,
            len(self._aside),
            "error" if self._error is not None else stopped,
            self._error,
        )


def alike(refusals: Iterable[str]) -> str:
    """The first of what rows met, empty where they did not all meet the same: an error column
    begins with its kind."""
    told = list(refusals)
    kinds = {words.partition(":")[0] for words in told}
    return told[0] if len(kinds) == 1 else ""


def hopeless(rows: int, refusal: str) -> GatewayError:
    """The first rows have all failed, and alike."""
    return GatewayError(
        f"the first {rows} rows that were tried all failed alike, so the job has stopped: "
        f"{refusal}; mend the model, its parameters or the rows, and run it again",
        status=400,
        code="all_rows_fail",
    )


def _remember(names: dict[str, None], name: str) -> None:
    names[name] = None
    if len(names) > BLOCKS_REMEMBERED_MAX:
        del names[next(iter(names))]
