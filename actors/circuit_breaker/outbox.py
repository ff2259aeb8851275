"""What a desk has to report and the owner has not acknowledged yet. No loop, no line."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace

from actors.circuit_breaker.policy import Outcome, Verdict

RUNS_MAX = 10_000  # buffered runs of equal outcomes; at one message a tick hardly more than ten
RUNS_SENT_MAX = 1_000  # runs in one message
RUN_S_MAX = 1.0  # a run is no longer than this, so that one age holds for all of it
AGE_S_MAX = 10.0  # an outcome says nothing about now when it is older


@dataclass(slots=True)
class _Run:
    """Outcomes in a row that differ in nothing, and when the first of them came."""

    outcome: Outcome
    at: float
    count: int = 1

    def told(self, now: float) -> Outcome:
        """As it is sent now: a Retry-After counts from the answer that named it."""
        wait_s = self.outcome.retry_after_s
        if wait_s is not None:
            wait_s = max(0.0, wait_s - (now - self.at))
        return replace(self.outcome, count=self.count, retry_after_s=wait_s)


class Outbox:
    """Outcomes in order, cut into numbered messages, each kept until it is acknowledged.

    Bounds: `RUNS_MAX` runs; when full, the oldest that is not on its way is dropped, and counted
    in `dropped`. What gets older than `AGE_S_MAX` before it is acknowledged is dropped, too.
    """

    def __init__(self) -> None:
        self.dropped = 0
        self._runs: deque[_Run] = deque()
        self._newest: dict[str, _Run] = {}  # by deployment, those of `_runs` that may still grow
        self._sent: list[_Run] = []
        self._seq = 0

    def __len__(self) -> int:
        return len(self._runs) + len(self._sent)

    def again(
        self, deployment: str, generation: int, verdict: Verdict, earns: bool, now: float
    ) -> bool:
        """As `add` of a plain outcome that just prolongs its deployment's newest run; False, and
        nothing is kept, where it does not.

        None of them is a probe's, and of none was a pause asked for: those are runs of their own.
        """
        run = self._newest.get(deployment)
        if run is None or now - run.at >= RUN_S_MAX:
            return False
        said = run.outcome
        if said.generation != generation or said.verdict is not verdict or said.earns != earns:
            return False
        if said.probe is not None or said.retry_after_s is not None:
            return False
        run.count += 1
        return True

    def add(self, outcome: Outcome, now: float) -> None:
        """Keep one outcome; `outcome.count` is 1."""
        plain = outcome.probe is None and outcome.retry_after_s is None
        said = outcome.deployment, outcome.generation, outcome.verdict, outcome.earns
        if plain and self.again(*said, now):
            return
        if len(self._runs) >= RUNS_MAX:
            oldest = self._runs.popleft()
            self.dropped += oldest.count
            if self._newest.get(oldest.outcome.deployment) is oldest:
                del self._newest[oldest.outcome.deployment]
        run = self._newest[outcome.deployment] = _Run(outcome, now)
        self._runs.append(run)

    def message(self, now: float) -> tuple[int, list[Outcome]] | None:
        """The message to send: the last one again while it is not acknowledged, else the next."""
        while self._sent or self._runs:
            if not self._sent:
                self._cut()
            fresh = [run for run in self._sent if now - run.at <= AGE_S_MAX]
            self.dropped += sum(run.count for run in self._sent if now - run.at > AGE_S_MAX)
            self._sent = fresh
            if fresh:
                return self._seq, [run.told(now) for run in fresh]
        return None

    def acknowledge(self) -> None:
        """The owner has the last message."""
        self._sent = []

    def discard(self) -> None:
        """The owner will never take the last message."""
        self.dropped += sum(run.count for run in self._sent)
        self._sent = []

    def _cut(self) -> None:
        self._seq += 1
        while self._runs and len(self._sent) < RUNS_SENT_MAX:
            self._sent.append(self._runs.popleft())
        self._newest.clear()
