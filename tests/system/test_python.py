"""The Python API: inline, attached, in Ray tasks, in threads, and inside a running loop."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

import forebay
from forebay import GatewayConfig, LiteLLMGateway, errors
from tests.conftest import SIM_KEY
from tests.support import system as support
from tests.support.simulator.truth import vectors
from tests.support.upstream import Upstream


@pytest.fixture(scope="module")
def inline(upstream: Upstream) -> Iterator[LiteLLMGateway]:
    os.environ["SIM_KEY"] = SIM_KEY
    config = GatewayConfig(model_list=support.groups(upstream.url), retry_delay=0.1)
    with LiteLLMGateway(config, runtime="inline") as gateway:
        yield gateway


@pytest.fixture(scope="module")
def attached(ray_driver: Any) -> Iterator[LiteLLMGateway]:
    with LiteLLMGateway(runtime="ray") as gateway:
        yield gateway


@pytest.fixture(params=["inline", "attached"])
def gateway(request: pytest.FixtureRequest) -> LiteLLMGateway:
    found: LiteLLMGateway = request.getfixturevalue(request.param)
    return found


def test_generate_answers(gateway: LiteLLMGateway, upstream: Upstream) -> None:
    response = gateway.generate("Explain quantum computing", model="sim", max_tokens=50)

    assert response.text
    assert response.usage.total_tokens == response.usage["total_tokens"]
    assert response.finish_reason
    assert response.raw_response["choices"][0]["message"]["content"] == response.text


def test_a_stream_is_an_iterator_of_text(gateway: LiteLLMGateway, upstream: Upstream) -> None:
    whole = gateway.generate("Tell me a story", model="sim").text
    pieces = list(gateway.generate("Tell me a story", model="sim", stream=True))

    assert len(pieces) > 1
    assert "".join(pieces) == whole


async def test_the_async_methods_work_on_the_callers_loop(
    gateway: LiteLLMGateway, upstream: Upstream
) -> None:
    response = await gateway.generate_async("What is AI?", model="sim")
    pieces = [piece async for piece in gateway.generate_stream("What is AI?", model="sim")]
    vectors = await gateway.embed_async(["a", "b"], model="sim-embed", dimensions=8)
    health = await gateway.get_health()

    assert "".join(pieces) == response.text
    assert vectors.array.shape == (2, 8)
    assert health["status"] in ("healthy", "degraded")


async def test_the_sync_methods_work_inside_a_running_loop(
    gateway: LiteLLMGateway, upstream: Upstream
) -> None:
    assert asyncio.get_running_loop().is_running()
    assert gateway.generate("Hello", model="sim").text
    assert gateway.embed("Hello", model="sim-embed", dimensions=8).array.shape == (1, 8)


def test_twenty_threads_at_once(gateway: LiteLLMGateway, upstream: Upstream) -> None:
    def ask(number: int) -> str:
        return str(gateway.generate(f"Question {number}", model="sim").text)

    with ThreadPoolExecutor(20) as threads:
        answers = list(threads.map(ask, range(100)))

    assert all(answers)
    assert len(upstream.wait_log(100)) == 100


def test_embeddings_keep_their_order(gateway: LiteLLMGateway, upstream: Upstream) -> None:
    texts = [f"text {number}" for number in range(50)]
    together = gateway.embed(texts, model="sim-embed", dimensions=16)
    alone = np.stack(
        [gateway.embed(t, model="sim-embed", dimensions=16).array[0] for t in texts[:5]]
    )

    np.testing.assert_array_equal(together.array[:5], alone)
    assert together.embeddings[0] == together.array[0].tolist()


def test_messages_are_sent_verbatim_and_tools_come_back(
    gateway: LiteLLMGateway, upstream: Upstream
) -> None:
    upstream.script(tool="weather", log_bodies=True)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Weather?"}]
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    response = gateway.generate(model="sim", messages=messages, tools=[tool])

    assert response.text == ""
    assert response.raw_response["choices"][0]["message"]["tool_calls"]
    (record,) = upstream.wait_log(1)
    assert record.body is not None
    assert record.body["messages"] == messages


@pytest.mark.parametrize(
    ("keywords", "field"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": "x", "no_such": 1}, "no_such"),
        ({"prompt": "x", "api_base": "http://127.0.0.1:1"}, "api_base"),
        ({"prompt": "x", "temperature": "hot"}, "temperature"),
        ({"prompt": "x", "timeout": -1}, "timeout"),
    ],
)
def test_bad_arguments_name_the_field(
    gateway: LiteLLMGateway, upstream: Upstream, keywords: dict[str, Any], field: str
) -> None:
    with pytest.raises(errors.InvalidRequest) as caught:
        gateway.generate(model="sim", **keywords)

    assert field in (caught.value.param or "")
    assert upstream.log() == []


def test_a_timeout_is_ours_and_a_timeout_error(gateway: LiteLLMGateway, upstream: Upstream) -> None:
    upstream.script(latency=5)
    with pytest.raises(errors.GatewayTimeout) as caught:
        gateway.generate("slowly", model="sim", timeout=0.3)

    assert isinstance(caught.value, TimeoutError)


def test_no_key_is_ever_told(gateway: LiteLLMGateway, upstream: Upstream) -> None:
    upstream.script(status=500, leak=True, count=50)
    with pytest.raises(errors.GatewayError) as caught:
        gateway.generate("x", model="faulty-500")
    health = gateway.check_health()

    for text in (str(caught.value), repr(caught.value), repr(gateway), repr(gateway.config)):
        assert SIM_KEY not in text
    assert SIM_KEY not in str(health.details)


def test_health_and_usage(gateway: LiteLLMGateway, upstream: Upstream) -> None:
    tenant = f"usage-{id(gateway)}"
    for number in range(3):
        gateway.generate(f"Count {number}", model="sim", tenant_id=tenant)
    stats = gateway.get_usage_stats(tenant_id=tenant)
    health = gateway.check_health()

    assert stats["total_requests"] == 3
    assert stats["total_tokens"] > 0
    assert stats["success_rate"] == 1.0
    assert set(health.details["owners"]) >= {"registry", "ledger", "cache", "batcher"}
    assert f"{stats['total_cost']:.2f}"


def test_the_functions_work_in_a_plain_script(upstream: Upstream) -> None:
    os.environ["SIM_KEY"] = SIM_KEY
    gateway = forebay.create_gateway(
        model_list=support.groups(upstream.url), default_model="sim", timeout=30, runtime="inline"
    )
    with gateway:
        assert forebay.generate_text("Hello", gateway=gateway)
        vectors = forebay.generate_embeddings(
            ["a", "b"], "sim-embed", gateway=gateway, dimensions=4
        )
        answers = forebay.batch_generate(["one", "two", "three"], gateway=gateway)
        failed = forebay.batch_generate(["one"], "no-such-model", gateway=gateway)

    assert [len(vector) for vector in vectors] == [4, 4]
    assert all(isinstance(a, forebay.GenerateResponse) for a in answers)
    assert isinstance(failed[0], errors.ModelNotFound)


async def test_the_async_functions_too(inline: LiteLLMGateway, upstream: Upstream) -> None:
    assert await forebay.generate_text_async("Hello", "sim", gateway=inline)
    assert [p async for p in forebay.stream_text("Hello", "sim", gateway=inline)]
    assert await forebay.generate_embeddings_async("a", "sim-embed", gateway=inline, dimensions=4)
    assert len(await forebay.batch_generate_async(["a", "b"], "sim", gateway=inline)) == 2


def test_a_gateway_with_keys_does_not_travel(inline: LiteLLMGateway) -> None:
    import pickle

    with pytest.raises(TypeError, match="construct it there"):
        pickle.dumps(inline)


@pytest.mark.ray
def test_the_gateway_works_inside_ray_tasks(ray_driver: Any, upstream: Upstream) -> None:
    @ray_driver.remote(num_cpus=0.1)
    def ask(number: int) -> tuple[str, tuple[int, int]]:
        with LiteLLMGateway() as gateway:
            text = gateway.generate(f"Task {number}", model="sim").text
            return text, gateway.embed(["a", "b"], model="sim-embed", dimensions=8).array.shape

    answers = ray_driver.get([ask.remote(number) for number in range(4)])

    assert all(text for text, _ in answers)
    assert all(shape == (2, 8) for _, shape in answers)


@pytest.mark.ray
def test_handles_work_from_a_driver_a_task_and_an_actor(
    ray_driver: Any, upstream: Upstream
) -> None:
    def use() -> tuple[str, tuple[int, int], str]:
        from ray import serve

        handle = serve.get_app_handle("forebay")
        request = {"model": "sim", "messages": [{"role": "user", "content": "Hello"}]}
        answer = handle.generate.remote(request).result()
        array, _ = handle.embed.remote(["a", "b", "c"], model="sim-embed", dimensions=8).result()
        chunks = handle.options(stream=True).stream.remote(request)
        text = "".join(
            choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"]
        )
        return answer["choices"][0]["message"]["content"], array.shape, text

    class User:
        def use(self) -> tuple[str, tuple[int, int], str]:
            return use()

    in_driver = use()
    in_task = ray_driver.get(ray_driver.remote(num_cpus=0.1)(use).remote())
    user = ray_driver.remote(num_cpus=0.1)(User).remote()
    in_actor = ray_driver.get(user.use.remote())
    ray_driver.kill(user)

    assert in_driver == in_task == in_actor
    assert in_driver[0] == in_driver[2]
    assert in_driver[1] == (3, 8)


@pytest.mark.ray
def test_vectors_of_many_megabytes_cross_a_handle(ray_driver: Any, upstream: Upstream) -> None:
    texts = [f"text {number}" for number in range(1_500)]

    def use(**options: Any) -> tuple[bool, np.ndarray[Any, Any]]:
        from ray import serve

        handle = serve.get_app_handle("forebay").options(**options)
        array, usage = handle.embed.remote(texts, model="sim-embed", dimensions=1_536).result()
        assert usage["prompt_tokens"] > len(texts)
        return array.flags.writeable, array[[0, -1]]

    in_driver = use(_by_reference=True)
    in_task = ray_driver.get(ray_driver.remote(num_cpus=0.1)(use).remote())
    for _, ends in (in_driver, in_task):
        np.testing.assert_array_equal(ends, vectors([texts[0], texts[-1]], 1_536))
    assert not in_driver[0], "it is read where it was put, not copied"


@pytest.mark.ray
def test_errors_cross_a_handle_as_themselves(ray_driver: Any) -> None:
    from ray import serve

    handle = serve.get_app_handle("forebay")
    with pytest.raises(errors.ModelNotFound) as caught:
        handle.generate.remote(
            {"model": "none", "messages": [{"role": "user", "content": "x"}]}
        ).result()

    assert caught.value.status == 404
