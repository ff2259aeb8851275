"""What this machine knows about the Forebay that runs on it: a small file in the data directory.

`forebay up` writes it when it is ready and removes it when it stops. `forebay down`, `status` and
`ask`, and a `LiteLLMGateway` in another process, read it. It holds no secret.
"""

from __future__ import annotations

import json
import os
from collections.abc import MutableMapping
from dataclasses import asdict, dataclass
from pathlib import Path

RUN_FILE = "run.json"


@dataclass(frozen=True, slots=True)
class Running:
    """A `forebay up` that is alive."""

    pid: int
    started: str
    url: str
    ray_address: str
    ray_auth_mode: str
    namespace: str

    @property
    def alive(self) -> bool:
        return process_start(self.pid) == self.started


def process_start(pid: int) -> str:
    """When the process started, in clock ticks since boot (proc(5)); empty if there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
    fields = stat.rpartition(")")[2].split()
    return "" if fields[0] == "Z" else fields[19]


def write(data_dir: Path, url: str, ray_address: str, namespace: str) -> None:
    """Say that this process is the one that runs."""
    running = Running(
        os.getpid(),
        process_start(os.getpid()),
        url,
        ray_address,
        os.environ.get("RAY_AUTH_MODE", ""),
        namespace,
    )
    whole = data_dir / f"{RUN_FILE}.{os.getpid()}"
    whole.write_text(json.dumps(asdict(running), indent=1), encoding="utf-8")
    whole.replace(data_dir / RUN_FILE)


def read(data_dir: Path) -> Running | None:
    """The `forebay up` that runs now, None if there is none."""
    try:
        fields = json.loads((data_dir / RUN_FILE).read_text(encoding="utf-8"))
        running = Running(**fields)
    except (OSError, ValueError, TypeError):
        return None
    return running if running.alive else None


def erase(data_dir: Path) -> None:
    """Take back what `write` said, if it was this process that said it."""
    running = read(data_dir)
    if running is not None and running.pid == os.getpid():
        (data_dir / RUN_FILE).unlink(missing_ok=True)


def prepare_ray(environ: MutableMapping[str, str], data_dir: Path) -> None:
    """Set Ray's switches before it is imported, where the user has not set them.

    A Ray that `forebay up` started on this machine asks for the token of this user; a process that
    attaches to it must be told so, since an address alone does not tell.
    """
    environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    running = read(data_dir)
    if running is not None and running.ray_auth_mode:
        environ.setdefault("RAY_AUTH_MODE", running.ray_auth_mode)
