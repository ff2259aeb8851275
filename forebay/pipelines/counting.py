"""A census of a source, by Ray's tasks: what it holds, what of it is done, and ids that are twice.

Nothing is sent and nothing is written. Tasks run in new processes, which import this and the work's
own module: so neither imports the gateway, which takes half a second of a core.
"""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from forebay.errors import ConfigurationError
from forebay.pipelines import places
from forebay.pipelines.census import Census, Counted, count, total
from forebay.pipelines.places import TASK_CPUS, Place, tasks_at_once

if TYPE_CHECKING:
    from forebay.pipelines.setting import Setting
    from forebay.pipelines.worker import Work

IDS_SHOWN = 3


def census_of(src: Place, setting: Setting, finished: NDArray[Any]) -> tuple[Census, int]:
    """What the source holds, and how many of its rows have an id among those `finished`.

    Raises:
        ConfigurationError: ids are missing, or there twice.
    """
    from pandas.util import hash_array

    id_column = setting.id_column
    needs = list(dict.fromkeys([*setting.needs, *([id_column] if id_column else [])]))
    dataset = _mapped(src, needs, _counted, work=setting.work, id_column=id_column)
    known = hash_array(finished, categorize=False) if len(finished) else finished
    nulls = done = 0

    def parts() -> Iterator[Counted]:
        nonlocal nulls, done
        for row in dataset.iter_rows():
            nulls += row["nulls"]
            part: Counted = pickle.loads(row["part"])  # noqa: S301 (our own task made it)
            done += int(np.isin(part.ids, known).sum()) if len(known) else 0
            yield part

    with places.reading(src.path):
        census = total(parts())
    if nulls:
        raise ConfigurationError(
            f"column {id_column!r} is null in {nulls} rows; every row needs an id",
            param="id_column",
        )
    if census.twice is not None and id_column is not None:
        _say_twice(src, id_column, census.twice)
    return census, done


def _say_twice(src: Place, id_column: str, hashed: int) -> None:
    """Name the ids that are there twice; two ids of one hash are no fault."""
    dataset = _mapped(src, [id_column], _same, id_column=id_column, hashed=hashed)
    found = Counter(row[id_column] for row in dataset.iter_rows()).most_common(IDS_SHOWN)
    twice = [f"{value!r} ({times} times)" for value, times in found if times > 1]
    if twice:
        raise ConfigurationError(
            f"ids in column {id_column!r} are not unique: {', '.join(twice)}; resuming needs an id "
            "of its own for every row",
            param="id_column",
        )


def _mapped(src: Place, columns: list[str], function: Callable[..., Any], **arguments: Any) -> Any:
    """The source's columns through a function, a block at a time."""
    from ray.data import TaskPoolStrategy

    return (
        places.read(src)
        .select_columns(columns)
        .map_batches(
            function,
            batch_format="pyarrow",
            batch_size=None,
            num_cpus=TASK_CPUS,
            compute=TaskPoolStrategy(size=tasks_at_once()),
            fn_kwargs=arguments,
        )
    )


def _counted(table: Any, work: Work, id_column: str | None) -> dict[str, list[Any]]:
    """A block's part of the census, as a row."""
    if id_column is None:
        return {"part": [pickle.dumps(count(work.texts(table), None))], "nulls": [0]}
    ids = table[id_column]
    part = count(work.texts(table), ids.to_pandas().to_numpy())
    return {"part": [pickle.dumps(part)], "nulls": [ids.null_count]}


def _same(table: Any, id_column: str, hashed: int) -> Any:
    """The rows whose id has this hash."""
    from pandas.util import hash_array

    ids = table[id_column].to_pandas().to_numpy()
    return table.filter(hash_array(ids, categorize=False) == hashed)
