"""Settings that have no effect yet. They are refused: a flag that does nothing would be a lie.

Building one means deleting its line here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from forebay.faults import Fault


class NotBuilt(NamedTuple):
    """A setting of a part (a class name), the values that are fine all the same, what to do."""

    owner: str
    field: str
    accepts: Callable[[Any], bool]
    message: str


def _only(*values: Any) -> Callable[[Any], bool]:
    return lambda value: value in values


_LEAVE_OUT = "is not enforced yet; leave it out"

NOT_BUILT = (
    NotBuilt(
        "GatewayConfig",
        "cache",
        _only(None),
        "a cache object of your own has no effect yet; leave it out and set enable_caching",
    ),
    NotBuilt("litellm_params", "itpm", _only(None), _LEAVE_OUT),
    NotBuilt("litellm_params", "otpm", _only(None), _LEAVE_OUT),
    NotBuilt("litellm_params", "max_parallel_requests", _only(None), _LEAVE_OUT),
    NotBuilt("litellm_params", "max_budget", _only(None), _LEAVE_OUT),
    NotBuilt("litellm_params", "budget_duration", _only(None), _LEAVE_OUT),
)


def not_built(owner: str, values: Mapping[str, Any]) -> Iterator[Fault]:
    """The settings of a part that would have no effect."""
    for rule in NOT_BUILT:
        if rule.owner == owner and rule.field in values and not rule.accepts(values[rule.field]):
            yield Fault((rule.field,), rule.message)
