"""An answer for each row: a prompt over its columns, as text or as columns by JSON schema."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from forebay.errors import GatewayError
from forebay.pipelines import structured
from forebay.pipelines.account import Done, alike
from forebay.pipelines.patience import Patience, kind_of
from forebay.pipelines.system import answer as ask
from forebay.pipelines.system import most_nano_of_chat
from forebay.pipelines.template import MissingValue, Template
from forebay.pipelines.vectors import plain, words_of

if TYPE_CHECKING:
    from forebay.call import Result
    from forebay.gateway import LiteLLMGateway

ANSWER, ERROR, TOKENS = "answer", "generation_error", "tokens"


@dataclass(slots=True)
class _Row:
    """What came of one row. Neither text nor error: it was not sent."""

    text: str | None = None
    fields: dict[str, Any] | None = None
    error: str | None = None
    tokens: int = 0
    cost_nano: int | None = 0
    cached: bool = False

    @property
    def known(self) -> bool:
        return self.text is not None or self.error is not None


@dataclass(frozen=True, slots=True)
class GenerateWork:
    """How a block's rows are asked about. `parameters` are OpenAI's, for every row."""

    template: Template
    model: str | None
    schema: Mapping[str, Any] | None = None
    tenant_id: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    raises: bool = False
    patience_s: float = 600.0
    anew: bool = False
    error_column: str = ERROR

    @property
    def columns(self) -> tuple[str, ...]:
        made = (ANSWER,) if self.schema is None else tuple(self.schema["properties"])
        return (*made, ERROR, TOKENS)

    def again(self) -> GenerateWork:
        return replace(self, anew=True)

    def texts(self, table: pa.Table) -> list[str | None]:
        prompts = self._prompts(table)
        return [prompt if isinstance(prompt, str) else None for prompt in prompts]

    def most_nano(self, gateway: LiteLLMGateway, table: pa.Table) -> int:
        prompts = [prompt for prompt in self.texts(table) if prompt is not None]
        most = int(self.parameters["max_tokens"])
        return most_nano_of_chat(gateway, self.model, prompts, most)

    async def run(
        self, gateway: LiteLLMGateway, table: pa.Table, doubtful: bool
    ) -> tuple[pa.Table, Done, GatewayError | None]:
        patience = Patience.of(self.patience_s, doubtful)
        rows = [_Row() for _ in range(table.num_rows)]
        halted: list[GatewayError] = []

        async def one(row: _Row, prompt: str | MissingValue) -> None:
            if isinstance(prompt, MissingValue):
                row.error = str(prompt)
                return
            try:
                result = await patience.bear(lambda: self._send(gateway, prompt), never)
            except GatewayError as error:
                if kind_of(error) == "row":
                    row.error = words_of(error)
                else:
                    halted.append(error)
                return
            self._take(row, result)

        prompts = self._prompts(table)
        await asyncio.gather(*(one(row, prompt) for row, prompt in zip(rows, prompts, strict=True)))
        known = [row for row in rows if row.known]
        costs = [row.cost_nano for row in known]
        refusals = [
            row.error
            for row, prompt in zip(rows, prompts, strict=True)
            if row.error is not None and isinstance(prompt, str)
        ]
        done = Done(
            len(known),
            sum(row.error is not None for row in known),
            sum(row.tokens for row in known),
            None if None in costs else sum(cost or 0 for cost in costs),
            sum(row.cached for row in known),
            len(prompts) - len({str(prompt) for prompt in prompts}),
            len(refusals),
            alike(refusals),
        )
        return self._with_columns(table, rows), done, halted[0] if halted else None

    def nothing(self, table: pa.Table) -> pa.Table:
        return self._with_columns(table.slice(0, 0), [])

    def _prompts(self, table: pa.Table) -> list[str | MissingValue]:
        prompts: list[str | MissingValue] = []
        for row in table.select(list(self.template.columns)).to_pylist():
            try:
                prompts.append(self.template.fill(row))
            except MissingValue as missing:
                prompts.append(missing)
        return prompts

    async def _send(self, gateway: LiteLLMGateway, prompt: str) -> Result:
        body = {
            **self.parameters,
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
        }
        if self.tenant_id is not None:
            body["tenant_id"] = self.tenant_id
        if self.schema is not None:
            body["response_format"] = structured.response_format(self.schema)
        return await ask(gateway, "chat", body, anew=self.anew)

    def _take(self, row: _Row, result: Result) -> None:
        answer = result.answer
        choice = (answer.body.get("choices") or [{}])[0]
        text = (choice.get("message") or {}).get("content") or ""
        row.tokens = int((answer.usage or {}).get("total_tokens") or 0)
        row.cost_nano = result.facts.cost_nano
        row.cached = result.facts.cache == "hit"
        if self.schema is not None:
            try:
                row.fields = structured.read(text, self.schema)
            except ValueError as error:
                cut = choice.get("finish_reason") == "length"
                row.error = plain(f"{error}{' (it was cut at max_tokens)' if cut else ''}")
        row.text = plain(text)

    def _with_columns(self, table: pa.Table, rows: list[_Row]) -> pa.Table:
        places = [place for place, row in enumerate(rows) if row.known]
        if len(places) < table.num_rows:
            table = table.take(pa.array(places, pa.int64()))
        known = [rows[place] for place in places]
        if self.schema is None:
            texts = [None if row.error is not None else row.text for row in known]
            made = {ANSWER: pa.array(texts, pa.string())}
        else:
            made = structured.columns(self.schema, [row.fields for row in known])
        made[ERROR] = pa.array([row.error for row in known], pa.string())
        made[TOKENS] = pa.array([row.tokens for row in known], pa.int64())
        for name, column in made.items():
            table = table.append_column(name, column)
        return table


def never(_: GatewayError) -> bool:
    """A single question cannot be halved."""
    return False
