"""Requests that both lanes are held against each other with: every parameter of every route, and
messages of every kind. A case's name begins with the parameter that it is about.
"""

from __future__ import annotations

from typing import Any

from tests.support.two_lanes import CALL, HELLO, SCHEMA, TOOL

PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
FAR = {"type": "image_url", "image_url": {"url": "https://a.example/b.png", "detail": "low"}}

CHAT: dict[str, dict[str, Any]] = {
    "nothing more": {},
    "temperature": {"temperature": 0.7},
    "temperature 0": {"temperature": 0},
    "temperature 1": {"temperature": 1.0},
    "top_p": {"top_p": 0.9},
    "frequency_penalty": {"frequency_penalty": 0.5},
    "presence_penalty": {"presence_penalty": -0.5},
    "max_tokens": {"max_tokens": 9},
    "max_completion_tokens": {"max_completion_tokens": 9},
    "n": {"n": 1},
    "n 2": {"n": 2},
    "seed": {"seed": 7},
    "stop": {"stop": "END"},
    "stops": {"stop": ["a", "b"]},
    "user": {"user": "u-1"},
    "logit_bias": {"logit_bias": {"50256": -100.0}},
    "logprobs": {"logprobs": True},
    "top_logprobs": {"logprobs": True, "top_logprobs": 2},
    "metadata": {"metadata": {"tag": "x"}},
    "store": {"store": True},
    "store with metadata": {"store": True, "metadata": {"tag": "x"}},
    "tools": {"tools": [TOOL]},
    "strict tools": {
        "tools": [
            {
                "type": "function",
                "function": {
                    "name": "weather",
                    "description": "Of a city",
                    "strict": True,
                    "parameters": {**SCHEMA, "additionalProperties": False},
                },
            }
        ]
    },
    "tool_choice auto": {"tools": [TOOL], "tool_choice": "auto"},
    "tool_choice required": {"tools": [TOOL], "tool_choice": "required"},
    "tool_choice": {
        "tools": [TOOL],
        "tool_choice": {"type": "function", "function": {"name": "weather"}},
    },
    "parallel_tool_calls": {"tools": [TOOL], "parallel_tool_calls": False},
    "functions": {"functions": [TOOL["function"]]},
    "function_call": {"functions": [TOOL["function"]], "function_call": "auto"},
    "response_format text": {"response_format": {"type": "text"}},
    "response_format": {"response_format": {"type": "json_object"}},
    "response_format schema": {
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "place", "strict": True, "schema": SCHEMA},
        }
    },
    "reasoning_effort": {"reasoning_effort": "low"},
    "verbosity": {"verbosity": "low"},
    "service_tier": {"service_tier": "default"},
    "modalities": {"modalities": ["text"]},
    "audio": {"modalities": ["text", "audio"], "audio": {"voice": "alloy", "format": "wav"}},
    "prediction": {"prediction": {"type": "content", "content": "Hello"}},
    "moderation": {"moderation": {"model": "omni-moderation-latest"}},
    "prompt_cache_key": {"prompt_cache_key": "k"},
    "prompt_cache_retention": {"prompt_cache_retention": "24h"},
    "prompt_cache_options": {"prompt_cache_options": {"mode": "implicit"}},
    "safety_identifier": {"safety_identifier": "s-1"},
    "web_search_options": {"web_search_options": {"search_context_size": "low"}},
    "stream": {"stream": False},
    "nulls": {"temperature": None, "stop": None, "tools": None},
    "all of the usual": {
        "temperature": 0.2,
        "top_p": 0.9,
        "max_tokens": 100,
        "stop": ["a"],
        "seed": 3,
        "user": "u",
        "n": 1,
    },
}
MESSAGES: dict[str, list[dict[str, Any]]] = {
    "system": [{"role": "system", "content": "Be brief"}, *HELLO],
    "developer": [{"role": "developer", "content": "Be brief"}, *HELLO],
    "turns": [*HELLO, {"role": "assistant", "content": "Hi"}, {"role": "user", "content": "Why?"}],
    "twice": [*HELLO, {"role": "user", "content": "And?"}],
    "assistant last": [*HELLO, {"role": "assistant", "content": "It is"}],
    "named": [{"role": "user", "content": "Hello", "name": "ann"}],
    "empty": [{"role": "user", "content": ""}],
    "blank": [{"role": "user", "content": " "}],
    "one part": [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}],
    "two parts": [{"role": "user", "content": [{"type": "text", "text": t} for t in "ab"]}],
    "picture": [{"role": "user", "content": [{"type": "text", "text": "What?"}, PICTURE]}],
    "far picture": [{"role": "user", "content": [{"type": "text", "text": "What?"}, FAR]}],
    "called": [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "call_1", "content": "Sunny"},
    ],
    "called and said": [
        *HELLO,
        {"role": "assistant", "content": "Let me see", "tool_calls": [CALL, {**CALL, "id": "c2"}]},
        {"role": "tool", "tool_call_id": "call_1", "content": "Sunny"},
        {"role": "tool", "tool_call_id": "c2", "content": "Rain"},
    ],
    "cached part": [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "Hello", "cache_control": {"type": "ephemeral"}},
            ],
        }
    ],
    "file": [{"role": "user", "content": [{"type": "file", "file": {"file_id": "file-1"}}]}],
    "sound": [
        {
            "role": "user",
            "content": [
                {"type": "input_audio", "input_audio": {"data": "UklGRg==", "format": "wav"}}
            ],
        }
    ],
    "unicode": [{"role": "user", "content": "Grüße, 世界 \u2028 \x00"}],
}

TEXT: dict[str, dict[str, Any]] = {
    "nothing more": {},
    "prompt list": {"prompt": ["Hello"]},
    "prompts": {"prompt": ["Hello", "there"]},
    "prompt ids": {"prompt": [1, 2, 3]},
    "best_of": {"best_of": 2},
    "echo": {"echo": True},
    "frequency_penalty": {"frequency_penalty": 0.5},
    "logit_bias": {"logit_bias": {"50256": -100.0}},
    "logprobs": {"logprobs": 2},
    "max_tokens": {"max_tokens": 9},
    "max_tokens 0": {"max_tokens": 0},
    "n": {"n": 2},
    "presence_penalty": {"presence_penalty": 0.5},
    "seed": {"seed": 3},
    "stop": {"stop": ["a"]},
    "stream": {"stream": False},
    "suffix": {"suffix": "!"},
    "temperature": {"temperature": 0.7},
    "top_p": {"top_p": 0.9},
    "user": {"user": "u"},
}

EMBED: dict[str, dict[str, Any]] = {
    "input one": {"input": ["Hello"]},
    "input": {"input": ["Hello", "there"]},
    "input ids": {"input": [(1, 2), (3,)]},
    "dimensions": {"input": ["Hello"], "dimensions": 4},
    "user": {"input": ["Hello"], "user": "u"},
}

WORDY = (
    'a@b.example https://c.example/d.png {"e": 1} <|f|> ' + "ß世\u2028\x00\n" * 50 + "word " * 5_000
)

ALIKE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "numbers": (
        {"temperature": 0.7, "top_p": 0.9, "max_tokens": 9, "seed": 7},
        {"temperature": 1.99, "top_p": 0.001, "max_tokens": 2**31 - 1, "seed": -(2**63)},
    ),
    "penalties": (
        {"frequency_penalty": 0.5, "presence_penalty": -0.5},
        {"frequency_penalty": -2.0, "presence_penalty": 1.75},
    ),
    "integers": (
        {"temperature": 2, "max_completion_tokens": 9, "n": 2},
        {"temperature": 2, "max_completion_tokens": 77_777, "n": 128},
    ),
    "biases": (
        {"logit_bias": {"1": -100.0}, "top_logprobs": 2, "logprobs": True},
        {"logit_bias": {"50256": 5, "7": 0.5}, "top_logprobs": 20, "logprobs": True},
    ),
    "names": (
        {"user": "u", "prompt_cache_key": "k", "safety_identifier": "s"},
        {"user": WORDY[:900], "prompt_cache_key": "x" * 1000, "safety_identifier": "a@b.example"},
    ),
    "metadata": ({"metadata": {"a": "b"}}, {"metadata": {"c": "d", "e": "f"}}),
    "words": (
        {"messages": [{"role": "system", "content": "Be brief"}, *HELLO]},
        {"messages": [{"role": "system", "content": WORDY}, {"role": "user", "content": WORDY}]},
    ),
    "long talks": (
        {"messages": [*HELLO, {"role": "assistant", "content": "Hi"}, *HELLO]},
        {"messages": [*HELLO, *([{"role": "assistant", "content": WORDY}, *HELLO] * 20)]},
    ),
    "parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, PICTURE]}]},
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": WORDY},
                        {
                            "type": "image_url",
                            "image_url": {"url": "data:image/png;base64,AAAA" + "B" * 5_000},
                        },
                        {"type": "text", "text": "b"},
                    ],
                }
            ]
        },
    ),
    "far pictures": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, FAR]}]},
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "a"},
                        {
                            "type": "image_url",
                            "image_url": {"url": "https://b.example/?c=d.gif#e", "detail": "low"},
                        },
                    ],
                }
            ]
        },
    ),
    "calls": (
        {"messages": MESSAGES["called"]},
        {
            "messages": [
                *HELLO,
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [
                        {
                            "id": "call_" + "z" * 60,
                            "type": "function",
                            "function": {"name": "other", "arguments": "no JSON"},
                        }
                    ],
                },
                {"role": "tool", "tool_call_id": "call_" + "z" * 60, "content": WORDY},
            ]
        },
    ),
}
"""Pairs of requests of one form: what LiteLLM shows with the first must hold for the second."""
