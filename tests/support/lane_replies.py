"""Replies that both lanes are held against each other with: answers, errors and streams, good ones
and odd ones.
"""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
from aiohttp import web

from tests.support import two_lanes as lanes
from tests.support.two_lanes import (
    CALL,
    DONE,
    SPENT,
    TOKENS,
    Reply,
    as_json,
    as_text,
    chat,
    choice,
    chunk,
    event,
    events,
    vectors,
)

TOOLED = choice("tool_calls", content=None, tool_calls=[CALL])
SAID = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
CONTEXT = {
    "message": "This model's maximum context length is 8 tokens",
    "type": "invalid_request_error",
    "param": "messages",
    "code": "context_length_exceeded",
}
FILTER = {
    "message": "The response was filtered",
    "type": None,
    "param": "prompt",
    "code": "content_filter",
}


def broken(message: str, **fields: Any) -> dict[str, Any]:
    return {"error": {"message": message, "type": "t", "param": None, "code": None, **fields}}


async def hung_up(request: web.Request, _: dict[str, Any]) -> web.StreamResponse:
    """The connection is cut before anything is said."""
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


async def cut_short(request: web.Request, _: dict[str, Any]) -> web.StreamResponse:
    """Less comes than was said."""
    response = web.StreamResponse(headers={"content-length": "1000"})
    await response.prepare(request)
    await response.write(b'{"id": "c", ')
    assert request.transport is not None
    request.transport.abort()
    return response


ANSWERS: dict[str, Reply] = {
    "tool calls": as_json(chat(choices=[TOOLED])),
    "two tool calls": as_json(
        chat(choices=[choice("tool_calls", content=None, tool_calls=[CALL, {**CALL, "id": "c2"}])])
    ),
    "a call with words": as_json(chat(choices=[choice("tool_calls", tool_calls=[CALL])])),
    "a call without an id": as_json(
        chat(
            choices=[
                choice(
                    "tool_calls",
                    content=None,
                    tool_calls=[{k: v for k, v in CALL.items() if k != "id"}],
                )
            ]
        )
    ),
    "a custom call": as_json(
        chat(
            choices=[
                choice(
                    "tool_calls",
                    content=None,
                    tool_calls=[
                        {"id": "c", "type": "custom", "custom": {"name": "x", "input": "y"}}
                    ],
                )
            ]
        )
    ),
    "a function call": as_json(
        chat(
            choices=[
                choice(
                    "function_call",
                    content=None,
                    function_call={"name": "weather", "arguments": "{}"},
                )
            ]
        )
    ),
    "a refusal": as_json(chat(choices=[choice(content=None, refusal="No.")])),
    "nothing said": as_json(chat(choices=[choice(content=None)])),
    "an empty text": as_json(chat(choices=[choice(content="")])),
    "annotations": as_json(
        chat(
            choices=[
                choice(
                    annotations=[
                        {
                            "type": "url_citation",
                            "url_citation": {
                                "url": "https://a.example",
                                "title": "A",
                                "start_index": 0,
                                "end_index": 1,
                            },
                        }
                    ]
                )
            ]
        )
    ),
    "sound": as_json(
        chat(
            choices=[
                choice(
                    content=None,
                    audio={"id": "a", "data": "UklGRg==", "expires_at": 1, "transcript": "Hi"},
                )
            ]
        )
    ),
    "two choices": as_json(chat(choices=[choice(), choice("length", 1, content="Hey")])),
    "choices out of order": as_json(chat(choices=[choice("stop", 1), choice("stop", 0)])),
    "logprobs": as_json(
        chat(
            choices=[
                {
                    **choice(),
                    "logprobs": {
                        "content": [
                            {"token": "Hi", "logprob": -0.5, "bytes": [72], "top_logprobs": []}
                        ],
                        "refusal": None,
                    },
                }
            ]
        )
    ),
    "cut at its length": as_json(chat(choices=[choice("length")])),
    "filtered": as_json(chat(choices=[choice("content_filter")])),
    "ended in words of its own": as_json(chat(choices=[choice("eos")])),
    "ended without a reason": as_json(chat(choices=[choice(None)])),
    "reasoning_content": as_json(chat(choices=[choice(reasoning_content="Hm.")])),
    "reasoning": as_json(chat(choices=[choice(reasoning="Hm.")])),
    "parts": as_json(chat(choices=[choice(content=[{"type": "text", "text": "Hello"}])])),
    "filter results": as_json(
        chat(
            choices=[{**choice(), "content_filter_results": {"hate": {"filtered": False}}}],
            prompt_filter_results=[{"prompt_index": 0}],
        )
    ),
    "fields of its own": as_json(
        chat(
            x_groq={"id": "req"},
            provider="Acme",
            citations=["https://a.example"],
            system_fingerprint="fp",
            prompt=[],
        )
    ),
    "no system fingerprint": as_json(chat(system_fingerprint=None)),
    "another tier": as_json(chat(service_tier="flex")),
    "cached tokens": as_json(chat(usage={**SAID, "prompt_tokens_details": {"cached_tokens": 8}})),
    "reasoning tokens": as_json(
        chat(usage={**SAID, "completion_tokens_details": {"reasoning_tokens": 3}})
    ),
    "DeepSeek's cached tokens": as_json(
        chat(usage={**SAID, "prompt_cache_hit_tokens": 8, "prompt_cache_miss_tokens": 2})
    ),
    "OpenRouter's cost": as_json(chat(usage={**SAID, "cost": 0.000125, "is_byok": False})),
    "Groq's times": as_json(chat(usage={**SAID, "queue_time": 0.1, "total_time": 0.2})),
    "no usage": as_json(chat(usage=None)),
    "zero usage": as_json(
        chat(usage={"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0})
    ),
    "half a usage": as_json(chat(usage={"prompt_tokens": 5})),
    "usage of texts": as_json(
        chat(usage={"prompt_tokens": "5", "completion_tokens": "2", "total_tokens": "7"})
    ),
    "no model": as_json(chat(model=None)),
    "a model with a maker": as_json(chat(model="acme/reported-1")),
    "no id": as_json(chat(id=None)),
    "no choices": as_json({**chat(), "choices": []}),
    "null choices": as_json({**chat(), "choices": None}),
    "a choice that is none": as_json({**chat(), "choices": ["x"]}),
    "an error with 200": as_json(broken("the boiler burst")),
    "a list": as_json([chat()]),
    "null": as_json(None),
    "half an answer": as_text('{"id": "c", "choices": [', content_type="application/json"),
    "no JSON": as_text("<html>busy</html>"),
    "nothing": as_text("", content_type="application/json"),
    "no UTF-8": as_text(b'{"id": "\xff"}', content_type="application/json"),
    "headers": as_json(chat(), headers={"x-request-id": "r", "openai-processing-ms": "5"}),
    "hung up": hung_up,
    "cut short": cut_short,
    "no content": as_json(None, status=204),
    "too long a prompt": as_json({"error": CONTEXT}, 400),
    "a filtered prompt": as_json({"error": FILTER}, 400),
    "a quota": as_json(broken("You exceeded your current quota", code="insufficient_quota"), 429),
    "come back later": as_json(broken("Slow down"), 429, {"retry-after": "7"}),
    "come back soon": as_json(broken("Slow down"), 429, {"retry-after-ms": "250"}),
    "busy": as_json(broken("Busy"), 503, {"retry-after": "3"}),
    "a page": as_text("<html>Bad gateway</html>", 502),
    "nothing, with 500": as_text("", 500),
    "a detail": as_json({"detail": "Not Found"}, 404),
    "a message": as_json({"object": "error", "message": "nope", "type": "x", "code": 400}, 400),
    "a key quoted": as_json(broken(f"Incorrect API key provided: {lanes.KEY}"), 401),
    **{
        f"{status}": as_json(broken(f"It is {status}"), status)
        for status in (400, 401, 402, 403, 404, 405, 408, 409, 413, 415, 418, 422, 424, 429)
    },
    **{
        f"{status}": as_json(broken(f"It is {status}"), status)
        for status in (500, 501, 502, 503, 504, 529)
    },
}


HEAD = chunk({"role": "assistant", "content": ""})
END = [chunk({}, "stop"), SPENT, DONE]


def called(index: int, arguments: str, **more: Any) -> str:
    function = {"arguments": arguments, **({"name": "weather"} if more else {})}
    return chunk({"tool_calls": [{"index": index, "function": function, **more}]})


STREAMS: dict[str, Reply] = {
    "hung up": hung_up,
    "words": events([HEAD, chunk({"content": "Hel"}), chunk({"content": "lo"}), *END]),
    "in one piece": events(["".join([HEAD, chunk({"content": "Hel"}), *END])]),
    "in small pieces": events(
        [bytes([b]) for b in "".join([HEAD, chunk({"content": "Grüße 世"}), *END]).encode()]
    ),
    "no head": events([chunk({"content": "Hel"}), *END]),
    "a word in the head": events([chunk({"role": "assistant", "content": "Hi"}), *END]),
    "a word at the end": events([HEAD, chunk({"content": "Hi"}, "stop"), SPENT, DONE]),
    "usage at the end": events(
        [HEAD, chunk({"content": "Hi"}), chunk({}, "stop", usage=TOKENS), DONE]
    ),
    "usage all the way": events(
        [HEAD, chunk({"content": "Hi"}, usage=TOKENS), chunk({}, "stop", usage=TOKENS), DONE]
    ),
    "usage of Groq": events(
        [
            HEAD,
            chunk({"content": "Hi"}),
            chunk({}, "stop", x_groq={"id": "r", "usage": TOKENS}),
            DONE,
        ]
    ),
    "no usage": events([HEAD, chunk({"content": "Hi"}), chunk({}, "stop"), DONE]),
    "null usage": events([chunk({"content": "Hi"}, usage=None), *END]),
    "cached tokens": events(
        [
            HEAD,
            chunk({"content": "Hi"}),
            chunk({}, "stop"),
            event(
                {
                    **lanes.CHUNK,
                    "choices": [],
                    "usage": {**TOKENS, "prompt_tokens_details": {"cached_tokens": 3}},
                }
            ),
            DONE,
        ]
    ),
    "DeepSeek's cached tokens": events(
        [
            HEAD,
            chunk({"content": "Hi"}),
            chunk({}, "stop"),
            event(
                {**lanes.CHUNK, "choices": [], "usage": {**TOKENS, "prompt_cache_hit_tokens": 3}}
            ),
            DONE,
        ]
    ),
    "a call": events(
        [
            HEAD,
            called(0, "", id="c1", type="function"),
            called(0, '{"city"'),
            called(0, ': "Ulm"}'),
            chunk({}, "tool_calls"),
            SPENT,
            DONE,
        ]
    ),
    "two calls": events(
        [
            HEAD,
            called(0, "{}", id="c1", type="function"),
            called(1, "", id="c2", type="function"),
            called(1, "{}"),
            chunk({}, "tool_calls"),
            SPENT,
            DONE,
        ]
    ),
    "a whole call": events(
        [
            chunk({"role": "assistant", "content": None, "tool_calls": [{**CALL, "index": 0}]}),
            chunk({}, "tool_calls"),
            SPENT,
            DONE,
        ]
    ),
    "a refusal": events([HEAD, chunk({"refusal": "No."}), *END]),
    "two choices": events(
        [
            HEAD,
            chunk({"role": "assistant", "content": ""}, index=1),
            chunk({"content": "a"}),
            chunk({"content": "b"}, index=1),
            chunk({}, "stop"),
            chunk({}, "length", index=1),
            SPENT,
            DONE,
        ]
    ),
    "logprobs": events(
        [
            event(
                {
                    **lanes.CHUNK,
                    "choices": [
                        {
                            "index": 0,
                            "delta": {"content": "Hi"},
                            "logprobs": {
                                "content": [
                                    {
                                        "token": "Hi",
                                        "logprob": -0.5,
                                        "bytes": [72],
                                        "top_logprobs": [],
                                    }
                                ]
                            },
                            "finish_reason": None,
                        }
                    ],
                }
            ),
            *END,
        ]
    ),
    "filter results first": events(
        [
            event(
                {**lanes.CHUNK, "id": "", "model": "", "choices": [], "prompt_filter_results": []}
            ),
            HEAD,
            chunk({"content": "Hi"}),
            *END,
        ]
    ),
    "filtered": events([HEAD, chunk({"content": "Hi"}), chunk({}, "content_filter"), SPENT, DONE]),
    "cut at its length": events([HEAD, chunk({"content": "Hi"}), chunk({}, "length"), SPENT, DONE]),
    "ended in words of its own": events(
        [HEAD, chunk({"content": "Hi"}), chunk({}, "eos"), SPENT, DONE]
    ),
    "reasoning_content": events(
        [HEAD, chunk({"reasoning_content": "Hm."}), chunk({"content": "Hi"}), *END]
    ),
    "reasoning": events([HEAD, chunk({"reasoning": "Hm."}), chunk({"content": "Hi"}), *END]),
    "comments": events(
        [": ping\n\n", HEAD, ": OPENROUTER PROCESSING\n\n", chunk({"content": "Hi"}), *END]
    ),
    "carriage returns": events(
        [p.replace("\n", "\r\n") for p in (HEAD, chunk({"content": "Hi"}), *END)]
    ),
    "names and ids": events(["event: message\nid: 4\n" + chunk({"content": "Hi"}), *END]),
    "no [DONE]": events([HEAD, chunk({"content": "Hi"}), chunk({}, "stop"), SPENT]),
    "no end": events([HEAD, chunk({"content": "Hi"})]),
    "no end, but [DONE]": events([HEAD, chunk({"content": "Hi"}), DONE]),
    "cut": events([HEAD, chunk({"content": "Hi"})], "cut"),
    "cut at once": events([], "cut"),
    "nothing": events([]),
    "only [DONE]": events([DONE]),
    "half an event": events([HEAD, chunk({"content": "Hi"}), 'data: {"id": "c-1", "cho\n\n', *END]),
    "no JSON": events([HEAD, "data: the boiler burst\n\n", *END]),
    "no choices": events([HEAD, event({"id": "c-1", "object": "chat.completion.chunk"}), *END]),
    "wrong types": events([HEAD, event({"choices": [{"index": "zero", "delta": "word"}]}), *END]),
    "no UTF-8": events(
        [HEAD, b'data: {"choices": [{"index": 0, "delta": {"content": "\xff"}}]}\n\n', *END]
    ),
    "an error": events([HEAD, event(broken("the boiler burst", code="server_error")), DONE]),
    "an error first": events([event(broken("the boiler burst"))]),
    "an error of limits": events([HEAD, event(broken("slow", code="rate_limit_exceeded"))]),
    "another kind of events": events(
        [HEAD, chunk({"content": "Hi"}), *END], **{"content-type": "text/plain"}
    ),
    "events with a charset": events(
        [HEAD, chunk({"content": "Hi"}), *END],
        **{"content-type": "text/event-stream; charset=utf-8"},
    ),
    "a whole answer": as_json(chat()),
    "a page": as_text("<html>busy</html>"),
    "no answer": as_text("", 502),
    "come back later": as_json(broken("Slow down"), 429, {"retry-after": "7"}),
    "too long a prompt": as_json({"error": CONTEXT}, 400),
    **{
        f"{status}": as_json(broken(f"It is {status}"), status)
        for status in (400, 401, 404, 500, 503)
    },
}


def without_a_vector(answer: dict[str, Any]) -> None:
    answer["data"].pop()


def shuffled(answer: dict[str, Any]) -> None:
    answer["data"].reverse()


def endless(answer: dict[str, Any]) -> None:
    answer["data"][0]["embedding"] = [1.0, float("inf"), 0.0, 0.0]


def without_usage(answer: dict[str, Any]) -> None:
    answer.pop("usage")


def without_model(answer: dict[str, Any]) -> None:
    answer.pop("model")


def quantised(answer: dict[str, Any]) -> None:
    answer["data"][0]["embedding"] = "AAA="


def whole_numbers(answer: dict[str, Any]) -> None:
    for row in answer["data"]:
        row["embedding"] = base64.b64encode(np.arange(4, dtype="<f4").tobytes()).decode()


LEFT = {
    "x-ratelimit-remaining-requests": "0",
    "x-ratelimit-reset-requests": "1m2s",
    "x-ratelimit-remaining-tokens": "149984",
}


VECTORS: dict[str, Reply] = {
    "good": vectors(),
    "one too few": vectors(without_a_vector),
    "shuffled": vectors(shuffled),
    "not finite": vectors(endless),
    "no usage": vectors(without_usage),
    "no model": vectors(without_model),
    "quantised": vectors(quantised),
    "no float32": vectors(whole_numbers),
    "what is left": vectors(headers=LEFT),
    "no base64": as_json(broken("encoding_format is not supported", param="encoding_format"), 400),
    "no data": as_json({"object": "list", "model": "m", "usage": {"prompt_tokens": 1}}),
    "half an answer": as_text('{"data": [', content_type="application/json"),
    **{f"{status}": as_json(broken(f"It is {status}"), status) for status in (400, 401, 429, 500)},
}
