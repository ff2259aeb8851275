"""A job over files: what it will take, then Read → work → Write, remembered by Ray's checkpoints.

Rule 1: nothing is sent before the source, the destination, the ids and the model are known good.
Rule 2: one plan with one sink. Ray remembers a block's ids when its files are whole, and forgets
        files that are not; failed rows go to the dead letter by the same sink.
Rule 3: a destination belongs to one job. What else would be mixed into it is refused.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from forebay.gateway import LiteLLMGateway
from forebay.pipelines import claim, places
from forebay.pipelines.account import HOPELESS_ROWS, Account, Figures
from forebay.pipelines.census import total
from forebay.pipelines.counting import census_of
from forebay.pipelines.estimate import Plan
from forebay.pipelines.flow import apply, failure_of, own_context
from forebay.pipelines.places import DEAD_LETTER, TASK_CPUS, Place, tasks_at_once
from forebay.pipelines.setting import NANO, Setting

POLL_S = 0.5


@dataclass(frozen=True, slots=True)
class Report:
    """What a run did. `rows` are those of this run, `done_before` those of earlier ones.

    `left` rows are not done; `stopped` says why ("money": `max_cost_usd` is used up). `failed` rows
    are in `dead_letter`. `cost_usd` None: no price is known.
    """

    rows: int
    done_before: int
    failed: int
    left: int
    tokens: int
    cost_usd: float | None
    cached: int
    repeated: int
    took_s: float
    stopped: Literal["", "money"]
    dead_letter: str | None
    plan: Plan

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


Watch = Callable[[Figures, Plan, float], None]
"""Told every POLL_S: figures so far, the plan, and seconds since the first block could be sent."""


@dataclass(slots=True)
class Job:
    """Owns one run of a job: its lock on the destination, and its account.

    Failure behaviour: killed at any time, the next run goes on where whole blocks ended. Blocks
    under way are sent again; what of them is in the gateway's cache costs nothing.
    """

    setting: Setting
    src: Place
    dst: Place | None
    resume: bool = True
    retries: bool = False  # of the dead letter, whose rows have columns of their first try

    # ------------------------------------------------------------------------------------- plan

    def plan(self, gateway: LiteLLMGateway) -> Plan:
        """What is left to do, and what it takes. Sends nothing and writes nothing.

        Raises:
            ConfigurationError: a column is missing, or ids are there twice.
        """
        with own_context():
            found = places.columns(places.read(self.src), self.src.path)
            census, done = total([]), 0
            if found:
                self.setting.check_columns(found, self.src.path, adds=not self.retries)
                census, done = census_of(self.src, self.setting, self._finished())
        return self.setting.plan(gateway, census, done)

    # -------------------------------------------------------------------------------------- run

    def run(self, gateway: LiteLLMGateway, watch: Watch | None = None) -> Report:
        """Do what is left.

        Raises:
            ConfigurationError: something is wrong with source, destination, ids or model.
            GatewayError: the job met an error that every row would meet; run it again to go on.
        """
        dst = self._dst
        with claim.alone(dst):
            return self._run(dst, gateway, watch)

    def retry(self, gateway: LiteLLMGateway, watch: Watch | None = None) -> Report | None:
        """Send the dead letter's rows again; None if there are none.

        They are moved aside first, so that rows that fail again are the next dead letter. Killed
        at any time, the next retry goes on with what was moved aside. Raises as `run`.
        """
        from pyarrow.fs import FileSelector, FileType

        dst = self._dst
        files, aside = dst.filesystem, dst.beside_inner("retrying")
        with claim.alone(dst):
            if not places.has_files(files, aside):
                _delete(files, dst.beside_inner("retry.done"))  # of rows that failed once more
                selector = FileSelector(f"{dst.inner}/{DEAD_LETTER}", allow_not_found=True)
                found = files.get_file_info(selector)
                names = [entry.path for entry in found if entry.type == FileType.File]
                if not names:
                    return None
                files.create_dir(aside, recursive=True)
                for name in names:
                    files.move(name, f"{aside}/{name.rpartition('/')[2]}")
            source = Place(dst.beside("retrying"), "parquet", files, aside)
            setting = replace(self.setting, work=self.setting.work.again())
            again = replace(self, setting=setting, src=source, retries=True)
            report = again._run(dst, gateway, watch)
            if not report.left:
                _delete(files, aside)
            return report

    def _run(self, dst: Place, gateway: LiteLLMGateway, watch: Watch | None) -> Report:
        claim.settle(dst)
        plan = self.plan(gateway)
        most = self.setting.most_nano(gateway)
        claim.take(dst, self.setting.of, self.resume)
        begun_s = time.monotonic()
        figures = Figures()
        if plan.rows > plan.done:
            with own_context():
                figures = self._execute(dst, plan, most, watch, begun_s)
        claim.ended(dst)
        if figures.error is not None:
            raise figures.error
        has_dead = places.has_files(dst.filesystem, f"{dst.inner}/{DEAD_LETTER}")
        return Report(
            figures.rows,
            plan.done,
            figures.failed,
            max(0, plan.rows - plan.done - figures.rows),
            figures.tokens,
            None if figures.unpriced else figures.cost_nano / NANO,
            figures.cached,
            figures.repeated,
            time.monotonic() - begun_s,
            "money" if figures.stopped == "money" else "",
            f"{dst.path}/{DEAD_LETTER}" if has_dead else None,
            plan,
        )

    def _execute(
        self, dst: Place, plan: Plan, most: int | None, watch: Watch | None, begun_s: float
    ) -> Figures:
        import ray
        from ray.data import DataContext

        from forebay.pipelines import resume
        from forebay.pipelines.sink import Sink

        # Rows that were refused once are asked for to their last, however many are refused again.
        hopeless = None if self.retries else HOPELESS_ROWS
        books = most, self.setting.unwritten_max, hopeless
        account: Any = ray.remote(num_cpus=0)(Account).remote(*books)
        name, id_column = self._name(), self.setting.id_column
        checkpoints = None
        if self.resume and id_column is not None:
            checkpoints = resume.config(dst, name, id_column)
        DataContext.get_current().checkpoint_config = checkpoints
        over = threading.Event()
        with ExitStack() as watching:
            dataset = places.read(self.src)
            if self.retries:
                there = places.columns(dataset, self.src.path)
                dataset = dataset.drop_columns([n for n in self.setting.adds if n in there])
            done = None if checkpoints is None else (dst, name, id_column)
            dataset = apply(
                dataset, self.setting, account, loud=False, doubtful=not self.retries, done=done
            )
            if watch is not None:
                thread = threading.Thread(
                    target=_watch, args=(account, watch, plan, begun_s, over), daemon=True
                )
                thread.start()
                watching.callback(thread.join)
                watching.callback(over.set)
            sink = Sink(dst, self.setting.work.error_column, self.setting.only_good, account)
            try:
                dataset.write_datasink(
                    sink, ray_remote_args={"num_cpus": TASK_CPUS}, concurrency=tasks_at_once()
                )
            except Exception as error:  # noqa: BLE001 (Ray wraps whatever was raised)
                raise failure_of(error) from None
        told: Any = ray.get(account.figures.remote())
        ray.kill(account)
        figures: Figures = told
        return figures

    # ----------------------------------------------------------------- what is remembered, where

    @property
    def _dst(self) -> Place:
        assert self.dst is not None, "a job that runs writes somewhere"
        return self.dst

    def _name(self) -> str:
        return "retry.done" if self.retries else "job.done"

    def _finished(self) -> NDArray[Any]:
        """The ids of the rows that earlier runs have finished."""
        from forebay.pipelines import resume

        if self.dst is None or not self.resume or self.setting.id_column is None:
            return np.empty(0)
        return resume.finished(self.dst, self._name(), self.setting.id_column)


def _watch(account: Any, watch: Watch, plan: Plan, begun_s: float, over: threading.Event) -> None:
    import ray

    while True:
        last = over.wait(POLL_S)
        watch(ray.get(account.figures.remote()), plan, time.monotonic() - begun_s)
        if last:
            return


def _delete(filesystem: Any, folder: str) -> None:
    if places.has_files(filesystem, folder):
        filesystem.delete_dir(folder)
