"""Where a job reads and writes: files or folders, in one of three formats, on any file system.

Rule 1: the ending of a name says its format. A folder's is that of the files in it.
Rule 2: a destination is a folder, and what a job remembers of it lies beside it, in
        `<destination>.forebay`: Ray looks for half-written files below the destination by name.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from forebay.errors import ConfigurationError

Format = Literal["parquet", "jsonl", "csv"]
ENDINGS: dict[str, Format] = {
    "parquet": "parquet", "pq": "parquet", "jsonl": "jsonl", "ndjson": "jsonl", "json": "jsonl",
    "csv": "csv",
}  # fmt: skip
TASK_CPUS = 0
"""Of a core, for each task and worker of a job. Ray Data splits whole cores evenly among drivers,
and counts one that was killed for three minutes more: on two cores a third has none, and nothing
that asks for a part of one is ever run."""
TASKS_PER_CORE = 2
"""Tasks of one kind at once, instead: they wait most of the time."""
RAISED = re.compile(r"^(?:[a-z_]\w*\.)*[A-Z]\w*(?:Error|Invalid|Exception): (.+)$", re.MULTILINE)
"""How a trace names what was raised, on the last line of it."""
DEAD_LETTER = "_dead_letter"
"""The folder in a destination that failed rows go to. Readers skip names that begin so."""


@dataclass(frozen=True, slots=True)
class Place:
    """A path, its format, and where it is: `inner` is its name on `filesystem` (pyarrow's)."""

    path: str
    format: Format
    filesystem: Any
    inner: str

    @property
    def is_local(self) -> bool:
        return "://" not in self.path

    def beside(self, name: str) -> str:
        return f"{self.path.rstrip('/')}.forebay/{name}"

    def beside_inner(self, name: str) -> str:
        return f"{self.inner.rstrip('/')}.forebay/{name}"


def source(path: str | os.PathLike[str], filesystem: Any = None) -> Place:
    """What is read.

    Raises:
        ConfigurationError: there is nothing, or its format is not known.
    """
    from pyarrow.fs import FileSelector, FileType

    text, found, inner = _resolved(path, filesystem, "src")
    info = _info(found, inner, text)
    if info.type == FileType.NotFound:
        raise ConfigurationError(f"src: there is nothing at {text}", param="src")
    if info.type == FileType.File:
        return Place(text, _format(text, "src"), found, inner)
    names = [
        entry.path
        for entry in found.get_file_info(FileSelector(inner, recursive=True))
        if entry.type == FileType.File and not _is_hidden(entry.path, inner)
    ]
    formats = {_ending(name) for name in names}
    if not names:
        raise ConfigurationError(f"src: the folder {text} holds no files", param="src")
    if len(formats) > 1 or None in formats:
        raise ConfigurationError(
            f"src: the files in {text} must all be .parquet, .jsonl or .csv, and of one kind",
            param="src",
        )
    return Place(text, formats.pop() or "parquet", found, inner)


def named(path: str | os.PathLike[str], filesystem: Any = None) -> Place:
    """A destination as it is, which may not be there yet."""
    text, found, inner = _resolved(path, filesystem, "dst")
    return Place(text, _ending(text) or "parquet", found, inner)


def apart(src: Place, dst: Place) -> None:
    """
    Raises:
        ConfigurationError: the destination is in the source, so the next run would read it.
    """
    if f"{dst.path.rstrip('/')}/".startswith(f"{src.path.rstrip('/')}/"):
        raise ConfigurationError(
            f"dst: {dst.path} is in the source, {src.path}; name a folder beside it", param="dst"
        )


def destination(path: str | os.PathLike[str], filesystem: Any = None) -> Place:
    """The folder that is written: its name's ending says the format, else it is Parquet.

    Raises:
        ConfigurationError: it cannot be made or written to.
    """
    from pyarrow.fs import FileType

    place = named(path, filesystem)
    text, found, inner = place.path, place.filesystem, place.inner
    if _info(found, inner, text).type == FileType.File:
        raise ConfigurationError(f"dst: {text} is a file; name a folder", param="dst")
    probe = place.beside_inner("writable")
    try:
        for folder in (inner, place.beside_inner("").rstrip("/")):
            found.create_dir(folder, recursive=True)
        with found.open_output_stream(probe) as stream:
            stream.write(b"")
        if place.is_local and not os.access(inner, os.W_OK | os.X_OK):
            raise PermissionError(13, "Permission denied")
        found.delete_file(probe)
    except OSError as error:
        raise ConfigurationError(
            f"dst: {text} cannot be written to: {error}", param="dst"
        ) from None
    return place


def tasks_at_once() -> int:
    """How many tasks of one kind run at once, on all of the cluster."""
    import ray

    cluster: Any = ray
    return TASKS_PER_CORE * max(1, int(cluster.cluster_resources().get("CPU", 1)))


def read(place: Place) -> Any:
    """The place's rows, as a `ray.data.Dataset`."""
    import ray.data

    readers: dict[Format, Any] = {
        "parquet": ray.data.read_parquet,
        "jsonl": ray.data.read_json,
        "csv": ray.data.read_csv,
    }
    # Ray knows fewer endings than we do. Files beside Parquet, such as `_SUCCESS`, are not read.
    endings = [end for end, kind in ENDINGS.items() if kind == "parquet"]
    try:
        return readers[place.format](
            place.inner,
            filesystem=place.filesystem,
            num_cpus=TASK_CPUS,
            concurrency=tasks_at_once(),
            file_extensions=endings if place.format == "parquet" else None,
        )
    except (OSError, ValueError, TypeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigurationError(
            f"src: {place.path} cannot be read: {reason}", param="src"
        ) from None


@contextmanager
def reading(path: str) -> Iterator[None]:
    """
    Raises:
        ConfigurationError: for whatever is raised, since Ray wraps what its readers raise.
    """
    try:
        yield
    except ConfigurationError:
        raise
    except Exception as error:  # noqa: BLE001
        raise ConfigurationError(
            f"src: {path} cannot be read: {reason_of(error)}", param="src"
        ) from None


def reason_of(error: BaseException) -> str:
    """What one of Ray's errors is about: traces stand before that, and advice behind."""
    told = []
    cause: BaseException | None = error
    while cause is not None:
        told += RAISED.findall(str(cause))
        cause = cause.__cause__
    return told[-1] if told else str(error).strip().partition("\n")[0]


def columns(dataset: Any, path: str) -> dict[str, Any]:
    """Names and Arrow types of a dataset's columns; none if it has no rows."""
    with reading(path):
        schema = dataset.schema()
    return {} if schema is None else dict(zip(schema.names, schema.types, strict=True))


def has_files(filesystem: Any, folder: str) -> bool:
    """Whether there is a file anywhere below a folder."""
    from pyarrow.fs import FileSelector, FileType

    found = filesystem.get_file_info(FileSelector(folder, recursive=True, allow_not_found=True))
    return any(entry.type == FileType.File for entry in found)


def _resolved(path: str | os.PathLike[str], filesystem: Any, name: str) -> tuple[str, Any, str]:
    from ray.data.datasource.path_util import _resolve_paths_and_filesystem

    text = os.fspath(path)
    if not text:
        raise ConfigurationError(f"{name} must name a file or a folder", param=name)
    if "://" not in text:
        text = os.path.abspath(os.path.expanduser(text))
    try:
        (inner,), found = _resolve_paths_and_filesystem(text, filesystem)
    except (ValueError, ImportError, OSError) as error:
        raise ConfigurationError(f"{name}: {text} cannot be reached: {error}", param=name) from None
    return text, found, inner


def _info(filesystem: Any, inner: str, text: str) -> Any:
    try:
        return filesystem.get_file_info(inner)
    except OSError as error:
        raise ConfigurationError(f"{text} cannot be reached: {error}") from None


def _ending(path: str) -> Format | None:
    name = path.rstrip("/").rpartition("/")[2].casefold()
    return ENDINGS.get(name.removesuffix(".gz").rpartition(".")[2])


def _format(path: str, name: str) -> Format:
    found = _ending(path)
    if found is None:
        raise ConfigurationError(f"{name}: {path} must end in .parquet, .jsonl or .csv", param=name)
    return found


def _is_hidden(path: str, folder: str) -> bool:
    return any(part[:1] in ("_", ".") for part in path[len(folder) :].strip("/").split("/"))
