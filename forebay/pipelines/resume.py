"""What earlier runs have finished, by Ray's checkpoints.

Ray writes them and, after a kill, removes the files that were not whole. Its own filter of rows
takes a whole core for as long as a job reads, which a laptop does not have; here it has a tenth.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import parquet
from pyarrow.fs import FileSelector
from ray.data.checkpoint import CheckpointConfig
from ray.data.checkpoint.checkpoint_filter import (
    IdColumnCheckpointManager,
    NumpyArrayBasedCheckpointFilter,
)

from forebay.pipelines.places import Place

PENDING = ".pending.parquet"
"""How Ray ends the names of checkpoints whose rows may not be whole."""
FILTER_CPUS = 0.1


class Recovery(IdColumnCheckpointManager):
    """Removes what was not whole, as Ray does, and leaves the filtering to `left_of`."""

    def load_checkpoint(
        self, data_file_dir: str | None = None, data_file_filesystem: Any = None
    ) -> tuple[None, int]:
        self._clean_pending_checkpoints(data_file_dir, data_file_filesystem)
        return None, 0


class _Left:
    """Owns the finished ids of a job, in one process: as many as the job has rows."""

    def __init__(self, config: CheckpointConfig, ids: Any) -> None:
        self._filter = NumpyArrayBasedCheckpointFilter(config, ids)

    def __call__(self, table: pa.Table) -> pa.Table:
        return self._filter.filter_rows_for_block(table)


def config(place: Place, name: str, id_column: str) -> CheckpointConfig:
    """Checkpoints of one kind of job, beside its destination."""
    return CheckpointConfig(
        id_column,
        place.beside(name),
        delete_checkpoint_on_success=False,
        override_filesystem=place.filesystem,
        checkpoint_manager_cls=Recovery,
    )


def finished(place: Place, name: str, id_column: str) -> NDArray[Any]:
    """The ids of all rows that are done, sorted."""
    files, parts = place.filesystem, []
    selector = FileSelector(place.beside_inner(name), allow_not_found=True)
    for entry in files.get_file_info(selector):
        if entry.path.endswith(".parquet") and not entry.path.endswith(PENDING):
            with files.open_input_file(entry.path) as file:
                parts.append(parquet.read_table(file)[id_column].to_pandas().to_numpy())
    return np.sort(np.concatenate(parts)) if parts else np.empty(0)


def left_of(dataset: Any, config: CheckpointConfig, ids: NDArray[Any]) -> Any:
    """The dataset without the rows of these ids."""
    import ray
    from ray.data import ActorPoolStrategy

    if not len(ids):
        return dataset
    return dataset.map_batches(
        _Left,
        batch_format="pyarrow",
        batch_size=None,
        zero_copy_batch=True,
        num_cpus=FILTER_CPUS,
        compute=ActorPoolStrategy(size=1),
        fn_constructor_kwargs={"config": config, "ids": ray.put(ids)},
    )
