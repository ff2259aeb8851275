"""Owners as named, supervised Ray actors: the only file under `actors/` that imports ray.

Rule 1: an owner is a plain class; what makes it an actor is here and nowhere else.
Rule 2: whoever misses an owner creates it anew, under the same name; `get_if_exists` settles races.
Rule 3: the code of a detached actor is frozen when it is created, so each owner class has a
        `PROTOCOL` number, and `ensure` replaces an actor whose number is lower than ours.
"""

from __future__ import annotations

import asyncio
import gc
import json
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    RayActorError,
    RayError,
    RayTaskError,
)
from ray.experimental import internal_kv

from actors.ref import OwnerUnavailable

CALLS_MAX = 10_000  # calls an owner may hold at once: watchers and waiting followers park here
OWNER_RESOURCE = "forebay_owner"  # a cluster that has this resource keeps its owners there
RETRY_PAUSE_S = 0.05
LOOKUP_TIMEOUT_S = 10.0
CREATE_TIMEOUT_S = 60.0  # a new process imports Ray first, beside a dozen others that do
BOOT_NAMESPACE = b"forebay"
COLLECT_AFTER = (10_000, 20, 1_000)  # new objects; young collections per middle; middle per full


@dataclass(frozen=True, slots=True)
class OwnerSpec:
    """One owner: its actor name, its class, and what it is constructed with.

    `kwargs` must be picklable and free of secrets: Ray's state API shows them.
    """

    name: str
    cls: type
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def protocol(self) -> int:
        return int(self.cls.PROTOCOL)  # type: ignore[attr-defined]


class ProtocolMismatch(OwnerUnavailable):
    """The running owner is of another protocol version than this process's code."""

    def __init__(self, owner: str, running: int, ours: int) -> None:
        super().__init__(owner, f"it speaks protocol {running}, this process {ours}")
        self.args = (owner, running, ours)

    def __str__(self) -> str:
        newer = "run `forebay up` from the newer version, it replaces older owners"
        return f"{super().__str__()}: {newer}"


class RayRef:
    """A desk's line to a named actor.

    Failure behaviour: a message to a dying, restarting or missing actor is sent again until
    `timeout_s` has passed, then `OwnerUnavailable` is raised. An actor that is gone for good is
    created anew. A message may therefore be executed more than once, or be executed although
    `OwnerUnavailable` was raised.
    """

    def __init__(self, spec: OwnerSpec, namespace: str) -> None:
        self.spec = spec
        self.name = spec.name
        self.sent: Counter[str] = Counter()
        self._namespace = namespace
        self._handle: Any = None
        self._resolving: asyncio.Task[Any] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return (RayRef, (self.spec, self._namespace))

    async def ask(self, method: str, /, *args: Any, timeout_s: float = 5.0) -> Any:
        self.sent[method] += 1
        deadline = time.monotonic() + timeout_s
        reason = "no answer in time"
        while True:
            try:
                async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                    handle = self._handle or await self._resolve()
                    return await getattr(handle, method).remote(*args)
            except RayTaskError as error:
                raise _cause(error) from None
            except TimeoutError:
                raise OwnerUnavailable(self.name, reason) from None
            except ActorUnavailableError:
                reason = "it is restarting"
            except (ActorDiedError, RayActorError):
                reason = "it died"
                self._handle = None
            except RayError as error:
                raise OwnerUnavailable(self.name, str(error)) from None
            if time.monotonic() + RETRY_PAUSE_S >= deadline:
                raise OwnerUnavailable(self.name, reason)
            await asyncio.sleep(RETRY_PAUSE_S)

    async def _resolve(self) -> Any:
        """The actor's handle, looked up once for all callers that miss it at the same time."""
        if self._resolving is None:
            loop = asyncio.get_running_loop()
            work = loop.run_in_executor(None, ensure, self.spec, self._namespace, False)
            self._resolving = asyncio.ensure_future(work)
            self._resolving.add_done_callback(self._resolved)
        return await asyncio.shield(self._resolving)

    def _resolved(self, work: asyncio.Future[Any]) -> None:
        self._resolving = None
        if not work.cancelled() and work.exception() is None:
            self._handle = work.result()


def _cause(error: RayTaskError) -> BaseException:
    """What the owner raised, without Ray's wrapping."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, BaseException) else error


def ensure(spec: OwnerSpec, namespace: str, replace_older: bool) -> Any:
    """The handle of the owner's actor, created if it is missing. Blocking.

    Raises:
        ProtocolMismatch: the running actor is older and `replace_older` is False, or it is newer.
    """
    deadline = time.monotonic() + CREATE_TIMEOUT_S
    while True:
        try:
            handle = _get_or_create(spec, namespace)
            left_s = max(0.0, deadline - time.monotonic())
            running = int(ray.get(handle.protocol.remote(), timeout=left_s))
        except (RayActorError, ValueError) as error:
            # A name outlives its actor for a moment; ask again until it points to a live one.
            if time.monotonic() > deadline:
                raise OwnerUnavailable(spec.name, str(error)) from None
            time.sleep(RETRY_PAUSE_S)
            continue
        except RayError as error:
            raise OwnerUnavailable(spec.name, str(error)) from None
        if running == spec.protocol:
            return handle
        if running > spec.protocol or not replace_older:
            raise ProtocolMismatch(spec.name, running, spec.protocol)
        ray.kill(handle, no_restart=True)


def _get_or_create(spec: OwnerSpec, namespace: str) -> Any:
    try:
        return ray.get_actor(spec.name, namespace=namespace)
    except ValueError:
        pass
    has_place = ray.cluster_resources().get(OWNER_RESOURCE, 0) > 0  # type: ignore[no-untyped-call]
    actor_class: Any = ray.remote(alone(spec.cls))
    actor = actor_class.options(
        name=spec.name,
        namespace=namespace,
        lifetime="detached",
        get_if_exists=True,
        max_restarts=-1,
        max_task_retries=0,
        max_concurrency=CALLS_MAX,
        num_cpus=0,
        resources={OWNER_RESOURCE: 0.001} if has_place else None,
        enable_task_events=False,
    )
    return actor.remote(**spec.kwargs)


def alone(cls: type) -> type:
    """An owner's class for a process of its own, where Python's collector is told what lasts.

    An owner's state lives long, grows large and has no cycles in it. A full collection would walk
    over all of it, 0.8 s for a limiter's 100,000 tenants, while everybody waits.
    """

    class Alone(cls):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            gc.collect()
            gc.freeze()
            gc.set_threshold(*COLLECT_AFTER)

    Alone.__name__, Alone.__qualname__ = cls.__name__, cls.__qualname__
    return Alone


def running(spec: OwnerSpec, namespace: str) -> bool:
    """Whether an actor of this name exists now."""
    try:
        ray.get_actor(spec.name, namespace=namespace)
    except ValueError:
        return False
    return True


def nodes_alive() -> set[str]:
    """Ids of the cluster's nodes that Ray holds for alive. Blocking."""
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}  # type: ignore[no-untyped-call]


def remove(spec: OwnerSpec, namespace: str) -> bool:
    """End the owner for good, after letting it close what it holds. True if there was one."""
    try:
        handle = ray.get_actor(spec.name, namespace=namespace)
    except ValueError:
        return False
    try:
        ray.get(handle.close.remote(), timeout=LOOKUP_TIMEOUT_S)
    except RayError:
        pass  # it is gone or stuck already; killing it is all that is left
    ray.kill(handle, no_restart=True)
    return True


def write_boot(namespace: str, boot: Mapping[str, Any]) -> None:
    """Leave word in the cluster's key-value store of how this namespace's owners are made.

    Whoever attaches later, on any node, can then create a missing owner just as it was.
    """
    value = json.dumps(dict(boot), sort_keys=True).encode()
    internal_kv._internal_kv_put(namespace.encode(), value, namespace=BOOT_NAMESPACE)


def read_boot(namespace: str) -> dict[str, Any] | None:
    """What `write_boot` left, or None when no system runs in this namespace."""
    value = internal_kv._internal_kv_get(namespace.encode(), namespace=BOOT_NAMESPACE)
    return None if value is None else dict(json.loads(value))


def erase_boot(namespace: str) -> None:
    """Forget the namespace's system."""
    internal_kv._internal_kv_del(namespace.encode(), namespace=BOOT_NAMESPACE)
