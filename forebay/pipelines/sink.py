"""The one sink of a job: good rows to files of its format, failed ones to the dead letter.

Ray's checkpoints know one write operation, which names its files before it writes them. Both files
of a task begin with that name, so that what a killed task left behind is found and removed.
"""

from __future__ import annotations

import base64
import posixpath
from collections.abc import Callable, Sequence
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.compute as pc
import ray
from pyarrow import csv, parquet
from ray.data.block import BlockAccessor
from ray.data.datasource import BlockBasedFileDatasink

from forebay.pipelines.places import DEAD_LETTER, Format, Place

WRITE_UUID = "write_uuid"


class Sink(BlockBasedFileDatasink):
    """Writes one file for a block, and one more where rows of it failed.

    Failure behaviour: a task that is run again writes the same files again.
    """

    def __init__(
        self, place: Place, error_column: str, only_good: tuple[str, ...], account: Any
    ) -> None:
        """`only_good` are columns that failed rows do not have; `account` hears what is written."""
        super().__init__(place.inner, filesystem=place.filesystem, file_format=place.format)
        self._kind: Format = place.format
        self._error_column = error_column
        self._only_good = only_good
        self._account = account

    def write_block(self, block: BlockAccessor, block_index: int, ctx: Any) -> None:
        table = block.to_arrow()
        name = self.filename_provider.get_filename_for_task(ctx.kwargs[WRITE_UUID], ctx.task_idx)
        failed = pc.is_valid(table[self._error_column])
        good, bad = table.filter(pc.invert(failed)), table.filter(failed)
        if bad.num_rows:
            folder = posixpath.join(self.path, DEAD_LETTER)
            self.filesystem.create_dir(folder, recursive=True)
            base = name.rpartition(".")[0]
            with self.open_output_stream(posixpath.join(folder, f"{base}.parquet")) as file:
                parquet.write_table(bad.drop_columns(list(self._only_good)), file)
        if good.num_rows:
            with self.open_output_stream(posixpath.join(self.path, name)) as file:
                write_table(good, file, self._kind)
        # Waited for: blocks that may not be sent yet wait for this word.
        ray.get(self._account.written.remote(name, table.num_rows))


def write_table(table: pa.Table, file: Any, kind: Format) -> None:
    """A table in a format. CSV has lists and structures as JSON; vectors are stored as they are.

    Bytes are base64 in CSV and JSONL.
    """
    if kind == "parquet":
        parquet.write_table(table, file)
    elif kind == "jsonl":
        names = table.column_names
        for batch in table.to_batches(max_chunksize=1000):
            rows = zip(*map(_values, batch.columns), strict=True)
            file.write(b"".join(_json(dict(zip(names, r, strict=True))) + b"\n" for r in rows))
    else:
        csv.write_csv(flat(table), file)


def flat(table: pa.Table) -> pa.Table:
    """The table with nested columns as JSON text, and bytes as base64."""
    for place, field in enumerate(table.schema):
        if pa.types.is_nested(field.type):
            convert: Callable[[Any], str] = _json_text
        elif any(test(field.type) for test in _OF_BYTES):
            convert = _without_type
        else:
            continue
        values = [
            None if value is None else convert(value)
            for value in _values(table[field.name].combine_chunks())
        ]
        table = table.set_column(place, field.name, pa.array(values, pa.string()))
    return table


def _values(column: pa.Array) -> Sequence[Any]:
    """A column's values; vectors as arrays, whose numbers have fewer digits than Python's."""
    kind = column.type
    if pa.types.is_fixed_size_list(kind) and pa.types.is_float32(kind.value_type):
        vectors: Sequence[Any] = column.to_numpy(zero_copy_only=False)
        return vectors
    values: Sequence[Any] = column.to_pylist()
    return values


def _json(value: Any) -> bytes:
    return orjson.dumps(value, default=_without_type, option=orjson.OPT_SERIALIZE_NUMPY)


def _json_text(value: Any) -> str:
    return _json(value).decode()


def _without_type(value: Any) -> str:
    """A value that JSON has no type for."""
    return base64.b64encode(value).decode() if isinstance(value, bytes) else str(value)


_OF_BYTES = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary)
