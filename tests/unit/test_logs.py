"""The log as JSON: what is in a line, and what is not."""

from __future__ import annotations

import asyncio
import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deployments.http import build_asgi
from forebay import logs
from forebay.config import SystemConfig, parse
from forebay.errors import (
    ConfigurationError,
    GatewayError,
    ProviderConnectionError,
    ProviderError,
)
from forebay.logs import CHARS_MAX, LINES_PER_S_MAX, NAME_CHARS_MAX, RequestLog, install
from tests.support.house import House, open_house
from tests.support.scripted_service import Client, ScriptedService

CANARY = "sk-canary-0123456789abcdef"


@pytest.fixture
def lines() -> Iterator[Lines]:
    """What is logged while the test runs; logging is as it was afterwards."""
    loggers = [logging.getLogger(name) for name in logs.PACKAGES]
    before = [(one, one.handlers, one.level, one.propagate) for one in loggers]
    stream = io.StringIO()
    install(stream)
    yield Lines(stream)
    for one, one.handlers, level, one.propagate in before:
        one.setLevel(level)


class Lines:
    def __init__(self, stream: io.StringIO) -> None:
        self._stream = stream

    @property
    def text(self) -> str:
        return self._stream.getvalue()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return map(json.loads, self.text.splitlines())


async def telling(tmp_path: Path, wanted: logs.Wanted, **gateway: Any) -> House:
    house = await open_house(tmp_path, **gateway)
    house.system.request_log = RequestLog(wanted)
    return house


async def test_a_request_is_one_line_with_its_figures(tmp_path: Path, lines: Lines) -> None:
    house = await telling(tmp_path, "all")
    call = house.call("the prompt of this request")
    await house.pipeline.answer(call)
    await house.system.close()

    (line,) = lines
    assert line.pop("time").endswith("Z")
    spans = {name: line.pop(name) for name in ("duration_ms", "provider_ms", "overhead_ms")}
    assert 0 <= spans["provider_ms"] <= spans["duration_ms"] < 60_000
    assert line == {
        "level": "info",
        "logger": "forebay.requests",
        "message": "request",
        "request_id": call.request_id,
        "tenant": "acme",
        "route": "chat",
        "model": "m",
        "status": "ok",
        "stream": False,
        "deployment": house.deployment("openai/a").id,
        "cache": "miss",
        "attempts": 1,
        "retries": 0,
        "fallbacks": 0,
        "cost_usd": 7e-9,
        "config_version": 0,
        "prompt_tokens": 3,
        "completion_tokens": 2,
    }
    assert "the prompt" not in lines.text
    assert "hello" not in lines.text


async def test_only_failures_are_told_unless_more_is_asked_for(
    tmp_path: Path, lines: Lines
) -> None:
    house = await telling(tmp_path, "failed", max_retries=0)
    house.provider.steps["openai/a"] = [ProviderError(f"it says {CANARY}", status=502)]
    await house.pipeline.answer(house.call("fine", model="spare"))
    with pytest.raises(GatewayError):  # the caller's own fault
        await house.pipeline.answer(house.call(model="nobody"))
    with pytest.raises(ProviderError):
        await house.pipeline.answer(house.call())
    await house.system.close()

    (line,) = lines
    assert (line["level"], line["status"], line["attempts"]) == ("error", "502", 1)
    assert CANARY not in lines.text


async def test_a_cancelled_request_and_one_that_was_not_understood_are_told_too(
    tmp_path: Path, lines: Lines
) -> None:
    house = await telling(tmp_path, "all")
    house.provider.steps["openai/a"] = [(asyncio.Event(), None)]
    asking = asyncio.ensure_future(house.pipeline.answer(house.call()))
    while not house.provider.asked:
        await asyncio.sleep(0)
    asking.cancel()
    await asyncio.wait([asking])
    with pytest.raises(GatewayError):
        await house.pipeline.answer(house.call(model="nobody"))
    await house.system.close()

    cancelled, unknown = lines
    assert (cancelled["status"], cancelled["attempts"]) == ("cancelled", 1)
    assert (unknown["status"], unknown["model"], unknown["level"]) == ("404", "unknown", "info")


async def test_a_streams_line_comes_at_its_end(tmp_path: Path, lines: Lines) -> None:
    house = await telling(tmp_path, "all")
    stream = await house.pipeline.stream(house.call())
    assert not lines.text
    async for _ in stream.chunks:
        pass
    await house.system.close()

    (line,) = lines
    assert (line["stream"], line["status"]) == (True, "ok")


async def test_the_attempts_errors_are_told_where_they_are_known(
    tmp_path: Path, lines: Lines
) -> None:
    from tests.support.otlp_receiver import otlp_receiver

    house = await telling(tmp_path, "all", fallbacks=[{"m": ["spare"]}], max_retries=0)
    house.provider.steps["openai/a"] = [ProviderConnectionError("refused")]
    with otlp_receiver() as receiver:
        house.system._tell_to(receiver.url)
        await house.pipeline.answer(house.call())
        await house.system.close()

    (line,) = lines
    assert line["errors"] == ["ProviderConnectionError"]
    assert {span["trace"] for span in receiver.spans} == {line["trace_id"]}


async def test_an_outage_is_told_in_a_bounded_number_of_lines(tmp_path: Path, lines: Lines) -> None:
    house = await telling(tmp_path, "failed", max_retries=0, enable_circuit_breaker=False)
    house.system.clock = lambda: 1000.0
    down = ProviderError("down", status=502)
    house.provider.steps["openai/a"] = [down] * (LINES_PER_S_MAX + 8)
    for number in range(LINES_PER_S_MAX + 7):
        with pytest.raises(ProviderError):
            await house.pipeline.answer(house.call(f"{number}"))
    house.system.clock = lambda: 1001.0
    with pytest.raises(ProviderError):
        await house.pipeline.answer(house.call("later"))
    await house.system.close()

    told = list(lines)
    assert len(told) == LINES_PER_S_MAX + 1
    assert told[-1]["left_out"] == 7


def test_what_nobody_wants_is_not_told() -> None:
    statuses = ["ok", "cancelled", "error", "400", "429", "499", "500", "503"]
    wanted = {level: [s for s in statuses if RequestLog(level).wants(s)] for level in LEVELS}
    assert wanted == {"none": [], "failed": ["error", "500", "503"], "all": statuses}


LEVELS: tuple[logs.Wanted, ...] = ("none", "failed", "all")


def test_any_record_is_a_line_without_keys(lines: Lines) -> None:
    log = logging.getLogger("forebay.something")
    try:
        raise ValueError(f"api_key={CANARY}\nand more")
    except ValueError:
        log.exception("it failed with %s\nand a second line", CANARY)
    logging.getLogger("actors.x").warning("long " * CHARS_MAX)
    fields = {"tenant": "t" * 999, "level": "mine", "odd": object(), "list": [CANARY, 1]}
    log.warning("with fields", extra={"fields": fields})
    log.debug("not told")

    failed, long, with_fields = lines
    assert CANARY not in lines.text
    assert failed["message"].startswith("it failed with ***\nand")
    assert "ValueError" in failed["error"]
    assert len(long["message"]) == CHARS_MAX
    assert (with_fields["level"], len(with_fields["tenant"])) == ("warning", NAME_CHARS_MAX)
    assert (with_fields["odd"], with_fields["list"]) == ("object", ["***", 1])


def test_a_level_holds_from_now_on(lines: Lines) -> None:
    def say(level: int) -> None:
        for package in logs.PACKAGES:
            logging.getLogger(f"{package}.x").log(level, "said")

    logs.obey("warning")
    say(logging.INFO)
    say(logging.WARNING)
    logs.obey("debug")
    say(logging.DEBUG)

    assert [line["level"] for line in lines] == ["warning"] * 3 + ["debug"] * 3


def test_the_level_comes_from_the_configuration() -> None:
    assert SystemConfig().telemetry.log_level == "info"
    told = SystemConfig.model_validate({"telemetry": {"log_level": "error"}})
    assert told.telemetry.log_level == "error"
    with pytest.raises(ConfigurationError, match="log_level"):
        parse({"telemetry": {"log_level": "loud"}})


async def test_an_unforeseen_failure_has_the_requests_id(lines: Lines) -> None:
    class Broken(ScriptedService):
        def models(self, tenant: str) -> list[dict[str, Any]]:
            raise KeyError(f"token: {CANARY}")

    client = Client(build_asgi(Broken(), new_id=lambda: "req_7"), None)
    assert (await client.get("/v1/models")).status == 500

    (line,) = lines
    assert (line["logger"], line["level"]) == ("forebay.http", "error")
    assert line["request_id"] == "req_7"
    assert CANARY not in lines.text


def test_a_library_prints_nothing_of_requests(capfd: pytest.CaptureFixture[str]) -> None:
    handlers = logging.getLogger().handlers[:]
    logging.getLogger().handlers = []
    try:
        logs.requests_log.error("request", extra={"fields": {}})
    finally:
        logging.getLogger().handlers = handlers
    assert capfd.readouterr().err == ""
