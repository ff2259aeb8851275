"""Everything that is refused: the status, OpenAI's shape, and when to come back."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest

from deployments.http import build_asgi
from deployments.http.exchange import duration
from forebay.body import BODY_BYTES_MAX
from forebay.call import Facts
from forebay.errors import BudgetExceeded, GatewayError, Overloaded, ProviderError, RateLimitError
from tests.support.scripted_service import Answered, Client, Figure, ScriptedService, raises

CHAT = {"model": "small", "messages": [{"role": "user", "content": "hi"}]}
PATH = "/v1/chat/completions"


async def post(service: ScriptedService, body: Any, path: str = PATH, **headers: str) -> Answered:
    return await Client(build_asgi(service)).post(path, body, **headers)


async def refused(body: Any = CHAT, **headers: str) -> Answered:
    service = ScriptedService()
    answered = await post(service, body, **headers)
    error = answered.error

    assert answered.status in range(400, 500)
    assert error.keys() == {"message", "type", "param", "code"}
    assert answered.headers["x-request-id"]
    assert "Traceback" not in answered.body.decode()
    return answered


async def test_an_unknown_path_is_404() -> None:
    answered = await post(ScriptedService(), CHAT, "/v1/nowhere")

    assert answered.status == 404
    assert answered.error["code"] == "unknown_url"


@pytest.mark.parametrize("path", ["/v1/responses", "/dashboard"])
async def test_what_is_not_built_is_404_and_no_stub(path: str) -> None:
    assert (await post(ScriptedService(), CHAT, path)).status == 404


async def test_a_trailing_slash_is_another_path() -> None:
    assert (await post(ScriptedService(), CHAT, PATH + "/")).status == 404


async def test_a_wrong_method_is_405_and_names_the_right_ones() -> None:
    answered = await Client(build_asgi(ScriptedService())).get(PATH)

    assert answered.status == 405
    assert answered.error["type"] == "invalid_request_error"
    assert answered.headers["allow"] == "POST"


async def test_head_is_answered_without_a_body() -> None:
    answered = await Client(build_asgi(ScriptedService())).request("HEAD", "/health")

    assert answered.status == 200
    assert answered.body == b""
    assert int(answered.headers["content-length"]) > 0


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"x"', b'{"model": NaN}', b"\xff\xfe"])
async def test_a_body_that_is_no_json_object_is_400(body: bytes) -> None:
    assert (await refused(body)).status == 400


async def test_each_bound_on_json_has_its_own_code() -> None:
    deep = b'{"a":' * 70 + b"1" + b"}" * 70

    assert (await refused(deep)).error["code"] == "json_too_deep"
    assert (await refused(b'{"a":1,"a":2}')).error["code"] == "duplicate_key"
    assert (await refused(b'{"a":NaN}')).error["code"] == "not_a_number"


async def test_a_missing_model_is_named() -> None:
    assert (await refused({"messages": CHAT["messages"]})).error["param"] == "model"


async def test_an_unknown_parameter_is_named() -> None:
    answered = await refused({**CHAT, "api_base": "http://evil"})

    assert answered.error["param"] == "api_base"
    assert answered.error["code"] == "unknown_parameter"


async def test_a_declared_size_over_the_bound_is_413_before_anything_is_read() -> None:
    answered = await refused(content_length=str(BODY_BYTES_MAX + 1))

    assert answered.status == 413
    assert answered.error["code"] == "body_too_large"


async def test_a_body_is_counted_while_it_streams_in() -> None:
    client = Client(build_asgi(ScriptedService()))
    pieces = [b" " * (1024 * 1024)] * 12
    answered = await client.request("POST", PATH, headers={"content-length": "5"}, pieces=pieces)

    assert answered.status == 413


async def test_a_body_in_pieces_is_put_together() -> None:
    raw = json.dumps(CHAT).encode()
    pieces = [raw[:10], raw[10:11], raw[11:]]
    answered = await Client(build_asgi(ScriptedService())).request("POST", PATH, pieces=pieces)

    assert answered.status == 200


@pytest.mark.parametrize("encoding", ["gzip", "br", "deflate, gzip", "zstd"])
async def test_a_compressed_body_is_415(encoding: str) -> None:
    answered = await refused(content_encoding=encoding)

    assert answered.status == 415
    assert answered.error["param"] == "Content-Encoding"


async def test_a_form_is_415() -> None:
    assert (await refused(content_type="multipart/form-data; boundary=x")).status == 415


@pytest.mark.parametrize("kind", ["", "text/plain", "application/x-www-form-urlencoded"])
async def test_json_under_another_name_is_taken(kind: str) -> None:
    assert (await post(ScriptedService(), CHAT, content_type=kind)).status == 200


@pytest.mark.parametrize(
    ("header", "value"),
    [
        ("x-forebay-timeout", "0"),
        ("x-forebay-timeout", "-1"),
        ("x-forebay-timeout", "nan"),
        ("x-forebay-timeout", "inf"),
        ("x-forebay-timeout", "soon"),
        ("x-forebay-priority", "urgent"),
        ("idempotency-key", ""),
        ("idempotency-key", "x" * 300),
    ],
)
async def test_a_header_that_makes_no_sense_is_named(header: str, value: str) -> None:
    answered = await refused(**{header: value})

    assert answered.error["param"].lower() == header


async def test_a_request_id_is_echoed_even_on_errors() -> None:
    assert (await refused(b"{", x_request_id="abc-1")).headers["x-request-id"] == "abc-1"


@pytest.mark.parametrize("given", ["a b", "x" * 129, "a\tb", "é", "a\x01", ""])
async def test_a_request_id_that_is_none_is_replaced(given: str) -> None:
    answered = await refused(b"{", x_request_id=given)

    assert answered.headers["x-request-id"] != given


async def test_a_refusal_says_when_to_come_back() -> None:
    limits = {"requests": Figure(60, 0, 0.95)}
    service = raises(RateLimitError("over", retry_after_s=0.9501))
    service.limits = limits
    answered = await post(service, CHAT)

    assert answered.status == 429
    assert answered.headers["retry-after"] == "1"
    assert answered.headers["retry-after-ms"] == "951"
    assert answered.headers["x-ratelimit-remaining-requests"] == "0"
    assert answered.headers["x-ratelimit-reset-requests"] == "950ms"
    assert "x-should-retry" not in answered.headers


async def test_the_figures_of_the_refusal_itself_go_first() -> None:
    figures = {"requests": Figure(60, 0, 2.0), "tokens": Figure(1000, 12.9, 0.5)}
    service = raises(RateLimitError("over", retry_after_s=2, figures=figures))
    service.limits = {"requests": Figure(60, 59, 0.1)}
    headers = (await post(service, CHAT)).headers

    assert headers["x-ratelimit-remaining-requests"] == "0"
    assert headers["x-ratelimit-reset-requests"] == "2s"
    assert headers["x-ratelimit-limit-tokens"] == "1000"
    assert headers["x-ratelimit-remaining-tokens"] == "12"


async def test_what_no_limit_can_ever_allow_asks_not_to_retry() -> None:
    answered = await post(raises(RateLimitError("larger than the limit")), CHAT)

    assert answered.status == 429
    assert answered.headers["x-should-retry"] == "false"
    assert "retry-after" not in answered.headers


async def test_a_provider_that_gives_no_time_may_be_tried_again() -> None:
    answered = await post(raises(RateLimitError("slow down", upstream_status=429)), CHAT)

    assert "x-should-retry" not in answered.headers


async def test_a_retry_is_never_too_early_by_rounding() -> None:
    headers = (await post(raises(RateLimitError("over", retry_after_s=1.0001)), CHAT)).headers

    assert (headers["retry-after"], headers["retry-after-ms"]) == ("2", "1001")


async def test_an_overload_says_when_to_come_back() -> None:
    answered = await post(raises(Overloaded("full", retry_after_s=2)), CHAT)

    assert answered.status == 503
    assert (answered.headers["retry-after"], answered.headers["retry-after-ms"]) == ("2", "2000")


async def test_a_refusal_says_what_was_tried() -> None:
    error = ProviderError("down")
    error.facts = Facts("m", "d-2", attempts=3, retries=1, fallbacks=1)
    tried = (await post(raises(error), CHAT)).headers
    error.facts = Facts("m")
    untried = (await post(raises(error), CHAT)).headers
    other = (await post(raises(ProviderError("down")), CHAT)).headers

    assert tried["x-forebay-deployment"] == tried["x-litellm-model-id"] == "d-2"
    assert tried["x-forebay-attempts"] == "3"
    assert tried["x-litellm-attempted-retries"] == tried["x-litellm-attempted-fallbacks"] == "1"
    assert "x-forebay-deployment" not in untried
    assert untried["x-forebay-attempts"] == "0"
    assert "x-forebay-attempts" not in other


async def test_a_hard_budget_asks_not_to_retry() -> None:
    answered = await post(raises(BudgetExceeded("spent", retry_after_s=3600)), CHAT)

    assert answered.status == 429
    assert answered.headers["x-should-retry"] == "false"
    assert answered.error["code"] == "budget_exceeded"


async def test_every_gateway_error_has_its_status_and_shape() -> None:
    def tree(cls: type[GatewayError]) -> list[type[GatewayError]]:
        return [cls, *(below for sub in cls.__subclasses__() for below in tree(sub))]

    for cls in tree(GatewayError):
        answered = await post(raises(cls("it broke", param="p")), CHAT)

        assert answered.status == cls.status
        assert answered.error["message"] == "it broke"
        assert answered.error["param"] == "p"


async def test_what_nobody_foresaw_is_a_500_that_tells_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    service = ScriptedService(answer=KeyError("api_key=sk-1234567890abcdefgh"))
    with caplog.at_level(logging.ERROR):
        answered = await post(service, CHAT, x_request_id="r9")

    assert answered.status == 500
    assert answered.error["code"] == "internal_error"
    assert "r9" in answered.error["message"]
    assert "KeyError" not in answered.body.decode()
    assert "KeyError" in caplog.text
    assert "r9" in caplog.text
    assert "sk-1234567890" not in caplog.text


async def test_nobody_is_answered_when_the_client_left_while_sending() -> None:
    client = Client(build_asgi(ScriptedService()))
    client.leave.set()
    answered = await client.request("POST", PATH, pieces=[])

    assert answered.status == 0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (0.0201, "21ms"), (1, "1s"), (1.5, "1.5s"), (60, "1m0s"), (3661.25, "1h1m1.25s")],
)
def test_durations_are_written_as_openai_does(seconds: float, text: str) -> None:
    assert duration(seconds).decode() == text
