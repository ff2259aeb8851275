"""A job over files: what it will take, then Read → work → Write, remembered by Ray's checkpoints.

Rule 1: nothing is sent before the source, the destination, the ids and the model are known good.
Rule 2: one plan with one sink. Ray remembers a block's ids when its files are whole, and forgets
        files that are not; failed rows go to the dead letter by the same sink.
Rule 3: a destination belongs to one job. What else would be mixed into it is refused.
"""

from __future__ import annotations

import json
import pickle
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from actors.file_lock import FileLock, FileLocked
from forebay.errors import ConfigurationError, GatewayError
from forebay.gateway import LiteLLMGateway
from forebay.pipelines import places
from forebay.pipelines.account import Account, Figures
from forebay.pipelines.census import Census, Counted, count, total
from forebay.pipelines.estimate import Plan
from forebay.pipelines.places import DEAD_LETTER, TASK_CPUS, Place, tasks_at_once
from forebay.pipelines.system import Route, rates_of
from forebay.pipelines.worker import Work, Worker

NANO = 10**9
SETTLE_S = 2.0
"""How long tasks of a driver that was killed are given to be gone, before a job is taken up."""
RUNNING = "running"
"""A file that is there while a job runs, and after it was killed."""
POLL_S = 0.5
IDS_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Setting:
    """What a job does, to which rows, and how much of it at once.

    `needs` are the columns that rows must have, `adds` those that they get, `only_good` those of
    them that failed rows lack. `of` says in JSON what the job is: another one is another job's.
    A block of `block_rows` is sent at once, and `blocks_at_once` of them by each of `workers`.
    """

    work: Work
    needs: tuple[str, ...]
    adds: tuple[str, ...]
    only_good: tuple[str, ...]
    of: Mapping[str, Any]
    plan: Callable[[LiteLLMGateway, Census, int], Plan]
    id_column: str | None
    block_rows: int
    blocks_at_once: int
    route: Route
    workers: int = 1
    string_column: str | None = None
    max_cost_usd: float | None = None
    namespace: str = "forebay"

    @property
    def unwritten_max(self) -> int:
        """Most rows that are sent and not yet written: as many are read ahead as are under way."""
        return 2 * self.workers * self.blocks_at_once * self.block_rows

    def check_columns(self, found: Mapping[str, Any], where: str, adds: bool = True) -> None:
        """
        Raises:
            ConfigurationError: a column is missing, is no text, or (`adds`) is there already.
        """
        import pyarrow as pa

        for name in [*self.needs, *([self.id_column] if self.id_column else [])]:
            if name not in found:
                raise ConfigurationError(
                    f"there is no column {name!r} in {where}; there are {', '.join(found)}",
                    param="id_column" if name == self.id_column else "text_column",
                )
        for name in self.adds if adds else ():
            if name in found:
                raise ConfigurationError(
                    f"{where} has a column {name!r} already; rename it first", param="src"
                )
        if self.string_column is None:
            return
        kind = found[self.string_column]
        if not isinstance(kind, pa.DataType):
            return  # a pandas column of objects: what they are is seen when they are read
        value = kind.value_type if pa.types.is_dictionary(kind) else kind
        tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_null)
        if not any(test(value) for test in tests):
            raise ConfigurationError(
                f"column {self.string_column!r} holds {kind}, no texts", param="text_column"
            )

    def most_nano(self, gateway: LiteLLMGateway) -> int | None:
        """What the job may cost in nano-USD, if that is limited.

        Raises:
            ConfigurationError: what the model costs is not known.
        """
        if self.max_cost_usd is None:
            return None
        if rates_of(gateway, self.of["model"], self.route).prompt_nano is None:
            raise ConfigurationError(
                "max_cost_usd: what the model costs is not known; give its deployment "
                "input_cost_per_token",
                param="max_cost_usd",
            )
        return round(self.max_cost_usd * NANO)


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
            if found:
                self.setting.check_columns(found, self.src.path, adds=not self.retries)
            census, done = self._census(found)
            if census.twice is not None:
                self._say_twice(census.twice)
        return self.setting.plan(gateway, census, done)

    def _census(self, found: Mapping[str, Any]) -> tuple[Census, int]:
        """What the source holds, and how many of its rows earlier runs have finished."""
        from pandas.util import hash_array
        from ray.data import TaskPoolStrategy

        if not found:
            return total([]), 0
        setting, id_column = self.setting, self.setting.id_column
        needs = list(dict.fromkeys([*setting.needs, *([id_column] if id_column else [])]))
        dataset = places.read(self.src).select_columns(needs)
        dataset = dataset.map_batches(
            _counted,
            batch_format="pyarrow",
            batch_size=None,
            num_cpus=TASK_CPUS,
            compute=TaskPoolStrategy(size=tasks_at_once()),
            fn_kwargs={"work": setting.work, "id_column": id_column},
        )
        ids = self._finished()
        known = hash_array(ids, categorize=False) if len(ids) else ids
        nulls = done = 0

        def parts() -> Iterator[Counted]:
            nonlocal nulls, done
            for row in dataset.iter_rows():
                nulls += row["nulls"]
                part: Counted = pickle.loads(row["part"])  # noqa: S301 (our own task made it)
                done += int(np.isin(part.ids, known).sum()) if len(known) else 0
                yield part

        census = total(parts())
        if nulls:
            raise ConfigurationError(
                f"column {id_column!r} is null in {nulls} rows; every row needs an id",
                param="id_column",
            )
        return census, done

    def _say_twice(self, hashed: int) -> None:
        """Name the ids that are there twice; two ids of one hash are no fault."""
        from pandas.util import hash_array
        from ray.data import TaskPoolStrategy

        name = self.setting.id_column

        def same(table: Any) -> Any:
            ids = table[name].to_pandas().to_numpy()
            return table.filter(hash_array(ids, categorize=False) == hashed)

        dataset = places.read(self.src).select_columns([name])
        dataset = dataset.map_batches(
            same,
            batch_format="pyarrow",
            batch_size=None,
            num_cpus=TASK_CPUS,
            compute=TaskPoolStrategy(size=tasks_at_once()),
        )
        found = Counter(row[name] for row in dataset.iter_rows()).most_common(IDS_SHOWN)
        twice = [f"{value!r} ({times} times)" for value, times in found if times > 1]
        if twice:
            raise ConfigurationError(
                f"ids in column {name!r} are not unique: {', '.join(twice)}; resuming needs an id "
                "of its own for every row",
                param="id_column",
            )

    # -------------------------------------------------------------------------------------- run

    def run(self, gateway: LiteLLMGateway, watch: Watch | None = None) -> Report:
        """Do what is left.

        Raises:
            ConfigurationError: something is wrong with source, destination, ids or model.
            GatewayError: the job met an error that every row would meet; run it again to go on.
        """
        with self._alone() as dst:
            return self._run(dst, gateway, watch)

    def retry(self, gateway: LiteLLMGateway, watch: Watch | None = None) -> Report | None:
        """Send the dead letter's rows again; None if there are none.

        They are moved aside first, so that rows that fail again are the next dead letter. Killed
        at any time, the next retry goes on with what was moved aside. Raises as `run`.
        """
        from pyarrow.fs import FileSelector, FileType

        with self._alone() as dst:
            files, aside = dst.filesystem, dst.beside_inner("retrying")
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
            report = replace(self, src=source, retries=True)._run(dst, gateway, watch)
            if not report.left:
                _delete(files, aside)
            return report

    def _run(self, dst: Place, gateway: LiteLLMGateway, watch: Watch | None) -> Report:
        running = dst.beside_inner(RUNNING)
        if dst.filesystem.get_file_info(running).is_file:
            time.sleep(SETTLE_S)
        plan = self.plan(gateway)
        most = self.setting.most_nano(gateway)
        self._claim(dst)
        begun_s = time.monotonic()
        figures = Figures()
        if plan.rows > plan.done:
            with own_context():
                figures = self._execute(dst, plan, most, watch, begun_s)
        dst.filesystem.delete_file(running)
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

        account: Any = ray.remote(num_cpus=0)(Account).remote(most, self.setting.unwritten_max)
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
            dataset = apply(dataset, self.setting, account, loud=False, done=done)
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
                raise _failure(error) from None
        told: Any = ray.get(account.figures.remote())
        ray.kill(account)
        figures: Figures = told
        return figures

    # ----------------------------------------------------------------- what is remembered, where

    def _name(self) -> str:
        return "retry.done" if self.retries else "job.done"

    def _finished(self) -> NDArray[Any]:
        """The ids of the rows that earlier runs have finished."""
        from forebay.pipelines import resume

        if self.dst is None or not self.resume or self.setting.id_column is None:
            return np.empty(0)
        return resume.finished(self.dst, self._name(), self.setting.id_column)

    @contextmanager
    def _alone(self) -> Iterator[Place]:
        """The destination, for the only run on it as far as this machine can tell."""
        dst = self.dst
        assert dst is not None, "a job that runs writes somewhere"
        if not dst.is_local:
            yield dst
            return
        lock = FileLock(dst.beside_inner("job"))
        try:
            lock.acquire(SETTLE_S)
        except FileLocked as error:
            raise ConfigurationError(
                f"dst: another run writes to {dst.path} (process {error.pid})", param="dst"
            ) from None
        try:
            yield dst
        finally:
            lock.release()

    def _claim(self, dst: Place) -> None:
        """Make the destination this job's, or see that it is; and say that it runs."""
        path = dst.beside_inner("job.json")
        ours = json.loads(json.dumps(dict(self.setting.of)))
        theirs = _read_json(dst.filesystem, path)
        if theirs is None or not self.resume:
            if places.has_files(dst.filesystem, dst.inner):
                raise ConfigurationError(
                    f"dst: {dst.path} holds files that are not this job's; name an empty folder",
                    param="dst",
                )
            with dst.filesystem.open_output_stream(path) as stream:
                stream.write(json.dumps(ours, indent=1).encode())
        else:
            for name in ours:
                if ours[name] != theirs.get(name):
                    raise ConfigurationError(
                        f"dst: {dst.path} is of a job with {name} {theirs.get(name)!r}, not "
                        f"{ours[name]!r}; name another folder",
                        param="dst",
                    )
        with dst.filesystem.open_output_stream(dst.beside_inner(RUNNING)) as stream:
            stream.write(b"")


def apply(
    dataset: Any, setting: Setting, account: Any, *, loud: bool, done: tuple[Any, ...] | None = None
) -> Any:
    """The dataset with the work's columns, lazy, without rows that are `done` (see `Finished`).

    `loud`: what ends the job is raised there.
    """
    from ray.data import ActorPoolStrategy

    dataset = dataset.repartition(target_num_rows_per_block=setting.block_rows)
    # It would ask for a whole core; there is no other way to tell it.
    dataset._logical_plan.dag.ray_remote_args["num_cpus"] = TASK_CPUS
    return dataset.map_batches(
        Worker,
        batch_format="pyarrow",
        batch_size=None,
        num_cpus=TASK_CPUS,
        compute=ActorPoolStrategy(
            size=setting.workers,
            max_tasks_in_flight_per_actor=setting.blocks_at_once,
            max_concurrent_calls_per_actor=setting.blocks_at_once,
            enable_true_multi_threading=True,
        ),
        fn_constructor_kwargs={
            "work": setting.work,
            "account": account,
            "namespace": setting.namespace,
            "limited": setting.max_cost_usd is not None,
            "loud": loud,
            "done": done,
        },
    )


def _delete(filesystem: Any, folder: str) -> None:
    if places.has_files(filesystem, folder):
        filesystem.delete_dir(folder)


@contextmanager
def own_context() -> Iterator[None]:
    """Ray Data's settings for a job: the caller's own, without bars beside ours."""
    from ray.data import DataContext

    # Ray warns of every task pool that is larger than its input; ours are, for small files.
    warnings.filterwarnings("ignore", "The maximum number of concurrent tasks", UserWarning)
    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.checkpoint_config = None
    with DataContext.current(context):
        yield


def _counted(table: Any, work: Work, id_column: str | None) -> dict[str, list[Any]]:
    """A block's part of the census, as a row."""
    if id_column is None:
        return {"part": [pickle.dumps(count(work.texts(table), None))], "nulls": [0]}
    ids = table[id_column]
    part = count(work.texts(table), ids.to_pandas().to_numpy())
    return {"part": [pickle.dumps(part)], "nulls": [ids.null_count]}


def _watch(account: Any, watch: Watch, plan: Plan, begun_s: float, over: threading.Event) -> None:
    import ray

    while True:
        last = over.wait(POLL_S)
        watch(ray.get(account.figures.remote()), plan, time.monotonic() - begun_s)
        if last:
            return


def _failure(error: Exception) -> GatewayError:
    """What made Ray Data give up."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, GatewayError):
            return cause
        cause = getattr(cause, "cause", None) or cause.__cause__
    # Ray tells the first exception at the top, and ends with advice.
    told, _, _ = str(error).partition("The above exception was the direct cause")
    lines = [line.strip() for line in told.splitlines() if line.strip()]
    return GatewayError(f"the job failed: {lines[-1] if lines else type(error).__name__}")


def _read_json(filesystem: Any, path: str) -> dict[str, Any] | None:
    try:
        with filesystem.open_input_stream(path) as stream:
            found = json.loads(stream.read())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
