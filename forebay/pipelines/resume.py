"""What earlier runs have finished, by Ray's checkpoints.

Ray writes them and, after a kill, removes the files that were not whole. Its own filter of rows
takes a whole core for as long as a job reads, which a laptop does not have; so workers filter.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import parquet
from pyarrow.fs import FileSelector
from ray.data.checkpoint import CheckpointConfig
from ray.data.checkpoint.checkpoint_filter import IdColumnCheckpointManager

from forebay.pipelines.places import Place

PENDING = ".pending.parquet"
"""How Ray ends the names of checkpoints whose rows may not be whole."""


class Recovery(IdColumnCheckpointManager):
    """Removes what was not whole, as Ray does, and leaves the filtering to workers."""

    def load_checkpoint(
        self, data_file_dir: str | None = None, data_file_filesystem: Any = None
    ) -> tuple[None, int]:
        self._clean_pending_checkpoints(data_file_dir, data_file_filesystem)
        return None, 0


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


class Finished:
    """Owns the finished ids of a job, in one process: as many as the job has rows."""

    def __init__(self, place: Place, name: str, id_column: str) -> None:
        self._column = id_column
        self._ids = finished(place, name, id_column)

    def left_of(self, table: pa.Table) -> pa.Table:
        """The rows that are not done."""
        return table.filter(pa.array(left(self._ids, table[self._column].to_pandas().to_numpy())))


def left(done: NDArray[Any], ids: NDArray[Any]) -> NDArray[np.bool_]:
    """Which of `ids` are not among `done`, which is sorted."""
    if not len(done):
        return np.ones(len(ids), bool)
    places = np.minimum(np.searchsorted(done, ids), len(done) - 1)
    return np.asarray(done[places] != ids, bool)
