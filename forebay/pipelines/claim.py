"""A destination belongs to one job, and to one run of it at a time.

What is remembered of it lies in `<destination>.forebay`: `job.json` says what the job is, `running`
is there while it runs and after it was killed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from actors.file_lock import FileLock, FileLocked
from forebay.errors import ConfigurationError
from forebay.pipelines import places
from forebay.pipelines.places import Place

SETTLE_S = 2.0
"""How long tasks of a driver that was killed are given to be gone, before a job is taken up."""
RUNNING = "running"


@contextmanager
def alone(dst: Place) -> Iterator[None]:
    """This is the only run on the destination, as far as this machine can tell.

    Raises:
        ConfigurationError: it is not.
    """
    if not dst.is_local:
        yield
        return
    lock = FileLock(dst.beside_inner("job"))
    try:
        lock.acquire(SETTLE_S)
    except FileLocked as error:
        raise ConfigurationError(
            f"dst: another run writes to {dst.path} (process {error.pid})", param="dst"
        ) from None
    try:
        yield
    finally:
        lock.release()


def settle(dst: Place) -> None:
    """Wait for the tasks of a run that was killed."""
    if dst.filesystem.get_file_info(dst.beside_inner(RUNNING)).is_file:
        time.sleep(SETTLE_S)


def take(dst: Place, of: Mapping[str, Any], resume: bool) -> None:
    """Make the destination this job's, or see that it is; and say that it runs.

    Raises:
        ConfigurationError: it is another job's, or holds other files.
    """
    path = dst.beside_inner("job.json")
    ours = json.loads(json.dumps(dict(of)))
    theirs = _read_json(dst.filesystem, path)
    if theirs is None or not resume:
        if places.has_files(dst.filesystem, dst.inner):
            raise ConfigurationError(
                f"dst: {dst.path} holds files that are not this job's; name an empty folder",
                param="dst",
            )
        with dst.filesystem.open_output_stream(path) as stream:
            stream.write(json.dumps(ours, indent=1).encode())
    else:
        _same(dst, ours, theirs)
    with dst.filesystem.open_output_stream(dst.beside_inner(RUNNING)) as stream:
        stream.write(b"")


def known(dst: Place, of: Mapping[str, Any]) -> None:
    """See that this job has been at the destination before, so that it has a dead letter.

    Raises:
        ConfigurationError: no job has, or another one.
    """
    theirs = _read_json(dst.filesystem, dst.beside_inner("job.json"))
    if theirs is None:
        raise ConfigurationError(
            f"dst: no job has written to {dst.path}, so there are no failed rows to retry",
            param="dst",
        )
    _same(dst, json.loads(json.dumps(dict(of))), theirs)


def _same(dst: Place, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    for name in ours:
        if ours[name] != theirs.get(name):
            raise ConfigurationError(
                f"dst: {dst.path} is of a job with {name} {theirs.get(name)!r}, not "
                f"{ours[name]!r}; name another folder",
                param="dst",
            )


def ended(dst: Place) -> None:
    """The run is over."""
    dst.filesystem.delete_file(dst.beside_inner(RUNNING))


def _read_json(filesystem: Any, path: str) -> dict[str, Any] | None:
    try:
        with filesystem.open_input_stream(path) as stream:
            found = json.loads(stream.read())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
