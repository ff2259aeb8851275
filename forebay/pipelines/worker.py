"""What a Ray Data actor does with a block: asks whether it may, sends it, says what came of it."""

from __future__ import annotations

import time
import uuid
from typing import Any, Protocol

import pyarrow as pa

from forebay.errors import GatewayError
from forebay.gateway import LiteLLMGateway
from forebay.pipelines.account import Done
from forebay.pipelines.system import warm

WAIT_S = 0.1
WRITTEN_S = 60.0
"""How long a block waits for others to be written before it is sent all the same."""


class Work(Protocol):
    """What is done to each block: `embedding.EmbedWork` or `generating.GenerateWork`.

    It travels to the workers, so it is picklable and holds no secret.
    """

    @property
    def error_column(self) -> str: ...

    @property
    def raises(self) -> bool: ...

    def again(self) -> Work:
        """The same for rows that failed: they are asked for whatever is known of them."""
        ...

    def texts(self, table: pa.Table) -> list[str | None]:
        """What is sent for each row; None for rows that are not."""
        ...

    def most_nano(self, gateway: LiteLLMGateway, table: pa.Table) -> int:
        """What the block costs at most."""
        ...

    async def run(
        self, gateway: LiteLLMGateway, table: pa.Table, doubtful: bool
    ) -> tuple[pa.Table, Done, GatewayError | None]:
        """The block's rows with their new columns, what came of them, and what ends the job.

        Rows that were not sent are not among them. `doubtful`: no row has been done yet.
        """
        ...

    def nothing(self, table: pa.Table) -> pa.Table:
        """No rows, with the new columns."""
        ...


class Worker:
    """Owns one gateway, for all blocks of this process. Bounded by the blocks that it is given.

    Failure behaviour: what would meet every row ends the job: raised here where the worker is
    `loud`, else told the account, so that blocks under way are not lost. Blocks that are not sent,
    since the job stops, come back without rows: they are neither written nor remembered, and the
    next run has them again.
    """

    def __init__(
        self,
        work: Work,
        account: Any,
        namespace: str,
        limited: bool,
        loud: bool,
        doubtful: bool,
        done: tuple[Any, ...] | None = None,
    ) -> None:
        import ray

        # An actor that Ray starts again has the name that it had.
        self._name = ray.get_runtime_context().get_actor_id() or uuid.uuid4().hex
        ray.get(account.began.remote(self._name))
        self._work = work
        self._loud = loud
        self._account = account
        self._limited = limited
        self._doubtful = doubtful
        self._finished: Any = None
        if done is not None:
            from forebay.pipelines.resume import Finished

            self._finished = Finished(*done)
        self._gateway = LiteLLMGateway(runtime="ray", namespace=namespace)
        if limited:
            warm(self._gateway)

    def __call__(self, table: pa.Table) -> pa.Table:
        import ray

        if self._finished is not None:
            table = self._finished.left_of(table)
        if not table.num_rows:
            return self._work.nothing(table)
        block = f"{self._name}-{uuid.uuid4().hex}"
        most_nano = self._work.most_nano(self._gateway, table) if self._limited else 0
        waited_s = 0.0
        while True:
            patient = waited_s < WRITTEN_S
            begin = self._account.begin.remote(block, most_nano, table.num_rows, patient)
            if (answer := ray.get(begin)) in ("go", "stop"):
                break
            time.sleep(WAIT_S)
            waited_s += WAIT_S
        if answer == "stop":
            return self._work.nothing(table)
        try:
            made, done, error = self._gateway.run(
                self._work.run(self._gateway, table, self._doubtful)
            )
        except Exception as failure:  # noqa: BLE001 (told the account, or raised)
            # What others have under way is paid for and is to be written, so the job ends well.
            made, done = self._work.nothing(table), Done()
            error = GatewayError(f"a worker failed: {type(failure).__name__}: {failure}")
        if error is None and self._work.raises and done.failed:
            first = next(words for words in made[self._work.error_column].to_pylist() if words)
            error = GatewayError(f"a row failed: {first}", status=400)
        if done.rows > done.failed:
            self._doubtful = False
        if error is None and (error := ray.get(self._account.end.remote(block, done))) is not None:
            made = self._work.nothing(table)
        if error is None:
            return made
        if self._loud:
            raise error
        ray.get(self._account.fail.remote(block, error, done))
        return made
