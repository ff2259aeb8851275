"""Ray Data's part of a job: blocks to workers, with its settings and its errors made ours."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from forebay.errors import GatewayError
from forebay.pipelines.places import TASK_CPUS
from forebay.pipelines.setting import Setting
from forebay.pipelines.worker import Worker


def apply(
    dataset: Any,
    setting: Setting,
    account: Any,
    *,
    loud: bool,
    doubtful: bool,
    done: tuple[Any, ...] | None = None,
) -> Any:
    """The dataset with the work's columns, lazy, without rows that are `done` (see `Finished`).

    `loud`: what ends the job is raised there. `doubtful`: where the first rows all fail alike, that
    ends it.
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
            "doubtful": doubtful,
            "done": done,
        },
    )


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


def failure_of(error: Exception) -> GatewayError:
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
