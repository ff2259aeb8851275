"""Jobs over whole datasets, with Ray Data: vectors or answers for every row.

    embed_dataset      a ray.data.Dataset with vectors           generate_dataset   with answers
    embed_parquet      files to files, to be resumed             generate_parquet   the same
    plan               what it will take; nothing is sent        plan_generate      the same

Names are loaded when they are first used: Ray Data's import takes seconds.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOMES = {
    "embed_dataset": "api",
    "embed_parquet": "api",
    "generate_dataset": "api",
    "generate_parquet": "api",
    "plan": "api",
    "plan_generate": "api",
    "Plan": "estimate",
    "Report": "job",
}

__all__ = [
    "Plan",
    "Report",
    "embed_dataset",
    "embed_parquet",
    "generate_dataset",
    "generate_parquet",
    "plan",
    "plan_generate",
]

if TYPE_CHECKING:
    from forebay.pipelines.api import (
        embed_dataset,
        embed_parquet,
        generate_dataset,
        generate_parquet,
        plan,
        plan_generate,
    )
    from forebay.pipelines.estimate import Plan
    from forebay.pipelines.job import Report


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'forebay.pipelines' has no attribute {name!r}")
    return getattr(importlib.import_module(f"forebay.pipelines.{home}"), name)


def __dir__() -> list[str]:
    return __all__
