"""What a job is: its work, the columns it takes and makes, how much at once, its most money."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from forebay.errors import ConfigurationError
from forebay.gateway import LiteLLMGateway
from forebay.pipelines.census import Census
from forebay.pipelines.estimate import Plan
from forebay.pipelines.system import Route, rates_of
from forebay.pipelines.worker import Work

NANO = 10**9


@dataclass(frozen=True, slots=True)
class Setting:
    """What a job does, to which rows, and how much of it at once.

    `needs` are the columns that rows must have, `adds` those that they get, `only_good` those of
    them that failed rows lack. `of` says in JSON what the job is: another one is another job's.
    A block of `block_rows` is sent at once, and `blocks_at_once` of them by each of `workers`.
    """

    work: Work
    needs: tuple[str, ...]
    adds: tuple[str, ...]
    only_good: tuple[str, ...]
    of: Mapping[str, Any]
    plan: Callable[[LiteLLMGateway, Census, int], Plan]
    id_column: str | None
    block_rows: int
    blocks_at_once: int
    route: Route
    workers: int = 1
    string_column: str | None = None
    max_cost_usd: float | None = None
    namespace: str = "forebay"

    @property
    def unwritten_max(self) -> int:
        """Most rows that are sent and not yet written: as many are read ahead as are under way."""
        return 2 * self.workers * self.blocks_at_once * self.block_rows

    def check_columns(self, found: Mapping[str, Any], where: str, adds: bool = True) -> None:
        """
        Raises:
            ConfigurationError: a column is missing, is no text, or (`adds`) is there already.
        """
        import pyarrow as pa

        for name in [*self.needs, *([self.id_column] if self.id_column else [])]:
            if name not in found:
                raise ConfigurationError(
                    f"there is no column {name!r} in {where}; there are {', '.join(found)}",
                    param="id_column" if name == self.id_column else "text_column",
                )
        for name in self.adds if adds else ():
            if name in found:
                raise ConfigurationError(
                    f"{where} has a column {name!r} already; rename it first", param="src"
                )
        ids = found[self.id_column] if self.id_column else None
        if isinstance(ids, pa.DataType) and pa.types.is_nested(ids):
            raise ConfigurationError(
                f"column {self.id_column!r} holds {ids}, no ids", param="id_column"
            )
        if self.string_column is None:
            return
        kind = found[self.string_column]
        if not isinstance(kind, pa.DataType):
            return  # a pandas column of objects: what they are is seen when they are read
        value = kind.value_type if pa.types.is_dictionary(kind) else kind
        tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_null)
        if not any(test(value) for test in tests):
            raise ConfigurationError(
                f"column {self.string_column!r} holds {kind}, no texts", param="text_column"
            )

    def most_nano(self, gateway: LiteLLMGateway) -> int | None:
        """What the job may cost in nano-USD, if that is limited.

        Raises:
            ConfigurationError: what the model costs is not known.
        """
        if self.max_cost_usd is None:
            return None
        if rates_of(gateway, self.of["model"], self.route).prompt_nano is None:
            raise ConfigurationError(
                "max_cost_usd: what the model costs is not known; give its deployment "
                "input_cost_per_token",
                param="max_cost_usd",
            )
        return round(self.max_cost_usd * NANO)
