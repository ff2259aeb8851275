"""The doors from Python: what they hand to the pipeline."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from deployments.gateway import Gateway
from forebay import schemas
from forebay.call import Call, Facts, Stream
from forebay.config import GatewayConfig
from forebay.errors import InvalidRequest
from forebay.feedback import FeedbackType
from forebay.gateway import LiteLLMGateway

USAGE: dict[str, Any] = {"stream_options": {"include_usage": True}}
CHUNKS: list[dict[str, Any]] = [
    {"choices": [{"delta": {"content": "fine"}}]},
    {"choices": [], "usage": {"total_tokens": 2}},
]


class Checking:
    """A pipeline that checks a request as the true one does, and answers a stream of two chunks."""

    async def stream(self, call: Call) -> Stream:
        schemas.check(call.route, call.body)
        return Stream(self._chunks(), Facts("m"))

    async def _chunks(self) -> AsyncGenerator[dict[str, Any], None]:
        for chunk in CHUNKS:
            yield chunk


@pytest.fixture
def gateway() -> Iterator[LiteLLMGateway]:
    models = [{"model_name": "m", "litellm_params": {"model": "openai/a", "api_key": "sk-x"}}]
    with LiteLLMGateway(GatewayConfig(model_list=models), runtime="inline") as made:
        made._system.pipeline = Checking()  # type: ignore[assignment]
        yield made


def test_a_stream_takes_stream_options(gateway: LiteLLMGateway) -> None:
    assert list(gateway.generate("hi", stream=True, **USAGE)) == ["fine"]


async def test_an_async_stream_takes_stream_options(gateway: LiteLLMGateway) -> None:
    asked = await gateway.generate_async("hi", stream=True, **USAGE)

    assert [text async for text in asked] == ["fine"]
    assert [text async for text in gateway.generate_stream("hi", **USAGE)] == ["fine"]


@pytest.mark.parametrize("hours", [-1, float("nan"), "24", None])
def test_a_time_range_that_makes_no_sense_is_named(gateway: LiteLLMGateway, hours: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        gateway.get_llmops_metrics(time_range_hours=hours)

    assert caught.value.param == "time_range_hours"


def test_a_tenant_that_is_no_text_is_named(gateway: LiteLLMGateway) -> None:
    wrong: Any = 5
    asks = (gateway.get_usage_stats, gateway.get_cost_summary, gateway.get_feedback_stats)
    for ask in (*asks, gateway.get_llmops_metrics):
        with pytest.raises(InvalidRequest) as caught:
            ask(tenant_id=wrong)
        assert caught.value.param == "tenant_id"


@pytest.mark.parametrize("hours", [1e30, float("inf")])
def test_a_time_range_may_be_longer_than_time(gateway: LiteLLMGateway, hours: float) -> None:
    assert gateway.get_cost_summary(time_range_hours=hours)["total_cost"] == 0


@pytest.mark.parametrize("options", [{}, USAGE])
async def test_a_handles_stream_takes_stream_options(options: dict[str, Any]) -> None:
    replica: Any = SimpleNamespace(_system=SimpleNamespace(pipeline=Checking()))
    request = {"messages": [{"role": "user", "content": "hi"}], **options}
    chunks = [chunk async for chunk in Gateway.stream(replica, request)]

    assert chunks == (CHUNKS if options else CHUNKS[:1])


# --- feedback and validation --------------------------------------------------------------------


def test_feedback_from_python_counts_for_its_tenant(gateway: LiteLLMGateway) -> None:
    response = "It is 8."
    told = gateway.record_feedback("What is 3 + 4?", response, FeedbackType.CORRECTION, "It is 7.")
    stats = gateway.get_feedback_stats("default")

    assert told
    assert (stats["total"], stats["by_type"]["correction"]) == (1, 1)
    assert gateway.feedback_loop is not None
    assert gateway.feedback_loop.stats()["recorded"] == 1


async def test_feedback_may_be_given_from_a_running_loop(gateway: LiteLLMGateway) -> None:
    assert await gateway.record_feedback_async(None, None, "useful", True)
    assert (await gateway.get_feedback_stats_async())["mean_score"] == 1.0


def test_a_desk_whose_flag_is_off_is_none() -> None:
    models = [{"model_name": "m", "litellm_params": {"model": "openai/a", "api_key": "sk-x"}}]
    off = {"enable_validation": False, "enable_feedback_loop": False}
    with LiteLLMGateway(GatewayConfig(model_list=models, **off), runtime="inline") as made:
        assert made.validation_manager is None
        assert made.feedback_loop is None
        assert made.record_feedback("q", "a", "useful") is None


def test_rules_are_added_through_the_gateway(gateway: LiteLLMGateway) -> None:
    manager = gateway.validation_manager
    assert manager is not None
    manager.add_blocked_pattern("projects", "(?i)bluebird")
    manager.add_validator("short", lambda text, request: "too long" if len(text) > 20 else None)

    assert manager.validate("BlueBird is nearly done").fatal == [
        "the answer holds what 'projects' blocks",
        "short: too long",
    ]
