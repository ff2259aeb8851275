"""Which prompts get which hint, where they go, and what the figures say of it."""

from __future__ import annotations

import sys
import threading
from collections import OrderedDict
from collections.abc import Mapping
from random import Random
from typing import Any

import pytest

import forebay
from actors.circuit_breaker.policy import CLEAN
from forebay.call import Call
from forebay.config import GatewayConfig
from forebay.errors import GatewayError, InvalidRequest, ProviderError
from forebay.kv_cache import (
    DEPLOYMENTS_MAX,
    HINTED_BYTES_MIN,
    KNOWN_MAX,
    MODELS_MAX,
    PROVIDERS_KEEP_S,
    TENANTS_MAX,
    KVCacheManager,
)
from forebay.providers.base import NO_HINTS
from forebay.providers.prices import PromptCaching
from forebay.routing import Deployment, ModelTable
from forebay.strategies import Router

CLAUDE = "anthropic.claude-sonnet-4-5"
LONG = "All work and no play makes Jack a dull boy. " * 100
SYSTEM = {"role": "system", "content": LONG}
TOOL = {"type": "function", "function": {"name": "f", "description": LONG}}
MARK = {"type": "ephemeral"}

OPENAI = Deployment("o", "g", "openai/gpt", "openai", {"api_key": "sk-1"})
ANTHROPIC = Deployment("a", "g", "anthropic/claude", "anthropic")
OTHER = Deployment("v", "g", "hosted_vllm/m", "hosted_vllm")


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def answer(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def call(*messages: dict[str, Any], tenant: str = "acme", **body: Any) -> Call:
    return Call("chat", {"messages": list(messages), **body}, tenant, "req_1")


class Bench:
    """A manager with a clock of the test's own and prices of 10 a token, 1 a cached one."""

    def __init__(
        self,
        hints: bool = True,
        ttl_s: float = 3600,
        affinity: bool = False,
        known_max: int = KNOWN_MAX,
    ) -> None:
        self.now_s = 100.0
        self.priced = True
        self.asked = 0
        self.listed: dict[str, PromptCaching] = {}
        self.changes = 0
        self.kv_cache = KVCacheManager(
            clock=lambda: self.now_s,
            price_of=self._price_of,
            caching_of=lambda deployment: self.listed.get(deployment.model),
            changed=self._changed,
            secret_of=lambda deployment: str(deployment.params.get("api_key")).encode(),
            known_max=known_max,
        )
        self.kv_cache.configure(hints, ttl_s, affinity=affinity)

    def _changed(self) -> None:
        self.changes += 1

    def _price_of(self, deployment: Deployment, usage: Mapping[str, Any]) -> int | None:
        self.asked += 1
        if not self.priced:
            return None
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
        written = usage.get("cache_creation_input_tokens", 0)
        plain = usage["prompt_tokens"] - cached - written
        return int(plain * 10 + cached + written * 12.5)

    def send(self, request: Call, deployment: Deployment = ANTHROPIC) -> dict[str, Any]:
        return self.kv_cache.sent(self.kv_cache.read(request), request.body, deployment)

    def key(self, request: Call, deployment: Deployment = OPENAI) -> str | None:
        found: str | None = self.send(request, deployment).get("prompt_cache_key")
        return found

    def marks(self, request: Call) -> list[int]:
        """The numbers of the messages that are marked, -1 for the tools."""
        body = self.send(request)
        found = [-1] if any(t.get("cache_control") for t in body.get("tools") or ()) else []
        for number, message in enumerate(body["messages"]):
            parts = message["content"] if isinstance(message["content"], list) else [message]
            found += [number for part in parts if part.get("cache_control") == MARK]
        return found


class TestWhereAHintPays:
    def test_nothing_is_said_of_what_is_sent_for_the_first_time(self) -> None:
        bench = Bench()
        request = call(SYSTEM, user("one"))
        assert bench.send(request) is request.body
        assert bench.key(call(SYSTEM, user("one"), tenant="other")) is None

    def test_a_beginning_that_comes_again_is_marked_where_it_ends(self) -> None:
        bench = Bench()
        bench.send(call(SYSTEM, user("one")))
        assert bench.marks(call(SYSTEM, user("two"))) == [0]
        assert bench.marks(call(SYSTEM, user("three"))) == [0]

    def test_a_short_one_is_not(self) -> None:
        bench = Bench()
        short = {"role": "system", "content": "x" * (HINTED_BYTES_MIN - 100)}
        for text in ("one", "two", "three"):
            request = call(short, user(text))
            assert bench.send(request) is request.body

    def test_a_short_beginning_of_long_prompts_is_not_either(self) -> None:
        bench = Bench()
        for text in ("one", "two", "three"):
            assert (
                bench.marks(call({"role": "system", "content": "short"}, user(text + LONG))) == []
            )

    def test_nor_is_one_that_the_provider_has_dropped(self) -> None:
        bench = Bench()
        bench.send(call(SYSTEM, user("one")))
        bench.now_s += PROVIDERS_KEEP_S + 1
        assert bench.marks(call(SYSTEM, user("two"))) == []
        bench.now_s += PROVIDERS_KEEP_S - 1
        assert bench.marks(call(SYSTEM, user("three"))) == [0]

    def test_a_shorter_ttl_of_our_own_counts(self) -> None:
        bench = Bench(ttl_s=10)
        bench.send(call(SYSTEM, user("one")))
        bench.now_s += 11
        assert bench.marks(call(SYSTEM, user("two"))) == []

    def test_another_tenants_prompts_are_none_of_ones_own(self) -> None:
        bench = Bench()
        bench.send(call(SYSTEM, user("one")))
        assert bench.marks(call(SYSTEM, user("two"), tenant="other")) == []

    def test_nor_are_those_of_another_model(self) -> None:
        bench = Bench()
        bench.send(call(SYSTEM, user("one")), Deployment("b", "h", "anthropic/x", "anthropic"))
        assert bench.marks(call(SYSTEM, user("two"))) == []

    def test_a_retry_is_no_second_prompt(self) -> None:
        bench = Bench()
        request = call(SYSTEM, user("one"))
        prompt = bench.kv_cache.read(request)
        for _ in range(3):
            assert bench.kv_cache.sent(prompt, request.body, ANTHROPIC) is request.body

    def test_who_has_marks_or_a_key_of_its_own_gets_none_of_ours(self) -> None:
        bench = Bench()
        part = {"type": "text", "text": LONG, "cache_control": MARK}
        for _ in range(3):
            request = call(SYSTEM, {"role": "user", "content": [part]})
            assert bench.send(request) is request.body
            assert bench.key(call(SYSTEM, user("x"), prompt_cache_key="mine")) == "mine"

    def test_where_nobody_takes_a_hint_no_prompt_is_read(self) -> None:
        bench = Bench()
        for text in ("one", "two"):
            request = call(SYSTEM, user(text))
            reading = bench.kv_cache.read(request)
            assert bench.kv_cache.sent(reading, request.body, OTHER) is request.body
        assert bench.kv_cache.get_cache_stats()["memory_entries"] == 0

    def test_switched_off_nothing_is_read(self) -> None:
        bench = Bench(hints=False)
        assert bench.kv_cache.read(call(SYSTEM, user("one"))) is None
        assert bench.marks(call(SYSTEM, user("one"))) == []

    def test_a_deployment_may_say_that_it_takes_none(self) -> None:
        bench = Bench()
        plain = Deployment("p", "g", "openai/x", "openai", info={"supports_prompt_caching": False})
        points = {"cache_control_injection_points": [{"location": "message"}]}
        marked = Deployment("a", "g", "anthropic/x", "anthropic", points)
        for deployment in (plain, OTHER, marked):
            for _ in range(3):
                request = call(SYSTEM, user("one"))
                assert bench.send(request, deployment) is request.body


class TestWhatTheListSays:
    @pytest.mark.parametrize(
        ("model", "provider", "pays", "hinted"),
        [
            ("openai/gpt-4", "openai", False, False),
            ("openai/gpt-4o", "openai", True, True),
            ("anthropic/claude-2", "anthropic", False, False),
            (f"bedrock/{CLAUDE}", "bedrock", True, True),
            (f"bedrock/{CLAUDE}", "bedrock", None, False),
            ("bedrock/amazon.nova-pro", "bedrock", True, False),
            ("vertex_ai/claude-sonnet-4-5", "vertex_ai", True, True),
            ("vertex_ai/gemini-2.5-pro", "vertex_ai", True, False),
            ("azure_ai/claude-sonnet-4-5", "azure_ai", True, True),
            ("groq/llama", "groq", True, False),
            ("hosted_vllm/m", "hosted_vllm", True, False),
        ],
    )
    def test_a_hint_is_given_where_it_is_known_and_pays(
        self, model: str, provider: str, pays: bool | None, hinted: bool
    ) -> None:
        bench = Bench()
        bench.listed[model] = PromptCaching(pays, 1024)
        deployment = Deployment("d", "g", model, provider)
        bench.send(call(SYSTEM, user("one")), deployment)
        request = call(SYSTEM, user("two"))
        assert (bench.send(request, deployment) is not request.body) == hinted

    def test_a_model_that_caches_from_a_greater_length_is_given_none_below(self) -> None:
        bench = Bench()
        bench.listed[ANTHROPIC.model] = PromptCaching(True, 4096)
        for text in ("one", "two", "three"):
            assert bench.marks(call(SYSTEM, user(text))) == []
        longer = {"role": "system", "content": LONG * 4}
        bench.send(call(longer, user("one")))
        assert bench.marks(call(longer, user("two"))) == [0]

    def test_one_that_caches_from_a_smaller_length_is_given_them_there(self) -> None:
        bench = Bench()
        bench.listed[ANTHROPIC.model] = PromptCaching(True, 512)
        bench.send(call(SYSTEM, user("one")))
        bench.send(call(SYSTEM, user("two")))
        short = {"role": "system", "content": "x" * 3000}
        bench.send(call(short, user("one")))
        assert bench.marks(call(short, user("two"))) == [0]
        bench.send(call(short, user("one")), OPENAI)
        assert bench.key(call(short, user("two"))) is None

    def test_that_is_learnt_from_prompts_as_short_as_that_alone(self) -> None:
        bench = Bench()
        bench.listed[ANTHROPIC.model] = PromptCaching(True, 512)
        short = {"role": "system", "content": "x" * 3000}
        for text in ("one", "two"):
            bench.send(call(short, user(text)))
        assert bench.marks(call(short, user("three"))) == [0]

    def test_the_configuration_knows_better(self) -> None:
        bench = Bench()
        info = {"supports_prompt_caching": True, "prompt_cache_min_tokens": 2048}
        deployment = Deployment("d", "g", "openai/own", "openai", info=info)
        bench.listed["openai/own"] = PromptCaching(False, 1024)
        longer = {"role": "system", "content": LONG * 2}
        for system, hinted in ((SYSTEM, False), (longer, True)):
            bench.send(call(system, user("one")), deployment)
            assert (bench.key(call(system, user("two")), deployment) is not None) == hinted

    def test_deployments_of_one_group_are_each_given_their_own(self) -> None:
        bench = Bench()
        bench.listed[OTHER.model] = PromptCaching(False, 1024)
        for text in ("one", "two"):
            request = call(SYSTEM, user(text))
            prompt = bench.kv_cache.read(request)
            sent = [
                bench.kv_cache.sent(prompt, request.body, each)
                for each in (OTHER, OPENAI, ANTHROPIC)
            ]
        assert sent[0] is request.body
        assert "prompt_cache_key" in sent[1]
        assert isinstance(sent[2]["messages"][0]["content"], list)


class TestWhereAHintIsRefused:
    def blamed(self, bench: Bench, request: Call, error: GatewayError) -> GatewayError:
        prompt = bench.kv_cache.read(request)
        bench.kv_cache.sent(prompt, request.body, OPENAI)
        return bench.kv_cache.blamed(prompt, OPENAI, error)

    def test_the_prompt_is_sent_again_without_and_no_more_are_given(self) -> None:
        bench = Bench()
        refusal = InvalidRequest("property 'prompt_cache_key' is unsupported")
        bench.send(call(SYSTEM, user("one")), OPENAI)
        failure = self.blamed(bench, call(SYSTEM, user("two")), refusal)
        assert isinstance(failure, ProviderError)
        assert failure.code == NO_HINTS
        assert bench.key(call(SYSTEM, user("two"))) is None
        assert bench.key(call(SYSTEM, user("three"))) is None
        bench.kv_cache.configure(True, 3600)
        assert bench.key(call(SYSTEM, user("four"))) is None

    def test_nobody_else_is_blamed(self) -> None:
        bench = Bench()
        refusal = InvalidRequest("prompt_cache_key: not permitted")
        first = call(SYSTEM, user("one"))
        assert self.blamed(bench, first, refusal) is refusal  # none was given
        own = call(SYSTEM, user("two"), prompt_cache_key="mine")
        assert self.blamed(bench, own, refusal) is refusal
        assert bench.kv_cache.blamed(None, OPENAI, refusal) is refusal
        other = InvalidRequest("temperature is too high")
        assert self.blamed(bench, call(SYSTEM, user("three")), other) is other
        down = ProviderError("prompt_cache_key broke it")
        assert self.blamed(bench, call(SYSTEM, user("four")), down) is down
        assert bench.key(call(SYSTEM, user("five"))) is not None

    def test_names_that_callers_choose_do_not_pile_up(self) -> None:
        bench = Bench()
        refusal = InvalidRequest("prompt_cache_key: not permitted")
        for number in range(DEPLOYMENTS_MAX + 9):
            deployment = Deployment(f"d{number}", "g", "openai/m", "openai")
            request = call(SYSTEM, user("again"))
            prompt = bench.kv_cache.read(request)
            bench.kv_cache.sent(prompt, request.body, deployment)
            bench.kv_cache.blamed(prompt, deployment, refusal)
        assert len(bench.kv_cache._refused) == 9 - 1  # nothing was known at the first one


class TestMarks:
    def test_a_conversation_is_marked_where_its_next_prompt_will_begin(self) -> None:
        bench = Bench()
        turns = [SYSTEM, user("one")]
        assert bench.marks(call(*turns)) == []
        turns += [answer("1"), user("two")]
        assert bench.marks(call(*turns)) == [0, 1, 3]
        turns += [answer("2"), user("three")]
        assert bench.marks(call(*turns)) == [0, 3, 5]

    def test_so_are_the_answers_of_an_agents_tools(self) -> None:
        bench = Bench()
        turns: list[dict[str, Any]] = [SYSTEM, user("one")]
        bench.send(call(*turns))
        calls = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
        turns.append({"role": "assistant", "content": None, "tool_calls": calls})
        turns.append({"role": "tool", "tool_call_id": "1", "content": "result"})
        body = bench.send(call(*turns))
        assert body["messages"][3]["cache_control"] == MARK

    def test_there_are_never_more_than_four(self) -> None:
        bench = Bench()
        turns = [SYSTEM, user("one")]
        bench.send(call(*turns, tools=[TOOL]))
        for number in range(20):
            turns += [answer("so"), user(str(number))]
            marks = bench.marks(call(*turns, tools=[TOOL]))
            assert len(marks) == 4
            assert marks[:2] == [-1, 0]
            assert marks[-1] == len(turns) - 1

    def test_examples_before_a_question_are_shared(self) -> None:
        bench = Bench()
        examples = [user("1+1" + LONG), answer("2")]
        bench.send(call(*examples, user("2+2")))
        assert bench.marks(call(*examples, user("3+3"))) == [1]

    def test_a_document_in_a_part_of_its_own_is_marked_there(self) -> None:
        bench = Bench()

        def asked(question: str) -> Call:
            parts = [{"type": "text", "text": LONG}, {"type": "text", "text": question}]
            return call({"role": "user", "content": parts})

        bench.send(asked("Who?"))
        (message,) = bench.send(asked("Why?"))["messages"]
        assert [part.get("cache_control") for part in message["content"]] == [MARK, None]

    def test_tools_that_others_share_are_marked_too(self) -> None:
        bench = Bench()
        bench.send(call(SYSTEM, user("one"), tools=[TOOL]))
        other = {"role": "system", "content": "Something else."}
        assert bench.marks(call(other, user("two"), tools=[TOOL])) == [-1]


class TestKeys:
    def test_one_beginning_one_key_however_long_it_grows(self) -> None:
        bench = Bench()
        turns = [SYSTEM, user("one")]
        bench.send(call(*turns), OPENAI)
        keys = set()
        for number in range(5):
            turns += [answer("so"), user(str(number))]
            keys.add(bench.key(call(*turns)))
        keys.add(bench.key(call(SYSTEM, user("else"))))
        (only,) = keys
        assert only is not None
        assert only.startswith("forebay-")
        assert len(only) <= 64

    def test_no_two_tenants_or_credentials_share_one(self) -> None:
        bench = Bench()
        keys = set()
        for tenant in ("a", "b", "a:b"):
            for secret in ("sk-1", "sk-2"):
                deployment = Deployment("o", secret, "openai/x", "openai", {"api_key": secret})
                bench.send(call(SYSTEM, user("one"), tenant=tenant), deployment)
                keys.add(bench.key(call(SYSTEM, user("two"), tenant=tenant), deployment))
        assert len(keys - {None}) == 6

    def test_all_processes_agree_on_it(self) -> None:
        keys = set()
        for _ in range(2):
            bench = Bench()
            bench.send(call(SYSTEM, user("one")), OPENAI)
            keys.add(bench.key(call(SYSTEM, user("two"))))
        assert len(keys) == 1


def usage(prompt: int, cached: int = 0, written: int = 0) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt,
        "completion_tokens": 1,
        "prompt_tokens_details": {"cached_tokens": cached},
        "cache_creation_input_tokens": written,
    }


class TestFigures:
    def test_they_are_what_providers_report_and_what_it_would_have_cost(self) -> None:
        bench = Bench()
        bench.kv_cache.learn("acme", ANTHROPIC, usage(1000))
        bench.kv_cache.learn("acme", ANTHROPIC, usage(1000, cached=600))
        found = bench.kv_cache.get_cache_stats()
        assert (found["requests"], found["hits"], found["hit_rate"]) == (2, 1, 0.5)
        assert (found["prompt_tokens"], found["cached_tokens"]) == (2000, 600)
        assert found["cached_share"] == 0.3
        assert found["saved_usd"] == pytest.approx(600 * 9 / 1e9)
        assert found["by_model"]["g"]["cached_tokens"] == 600
        assert bench.kv_cache.stats() == found

    def test_what_was_written_and_never_read_is_a_loss(self) -> None:
        bench = Bench()
        bench.kv_cache.learn("acme", ANTHROPIC, usage(1000, written=1000))
        found = bench.kv_cache.get_cache_stats()
        assert (found["hits"], found["written_tokens"]) == (0, 1000)
        assert found["saved_usd"] == pytest.approx(-2500 / 1e9)

    def test_without_a_price_nothing_is_made_up(self) -> None:
        bench = Bench()
        bench.priced = False
        bench.kv_cache.learn("acme", OTHER, usage(1000, cached=600))
        found = bench.kv_cache.get_cache_stats()
        assert (found["cached_tokens"], found["saved_usd"], found["unpriced"]) == (600, 0, 1)

    @pytest.mark.parametrize(
        "told",
        [None, {"prompt_tokens": 9, "total_tokens": 9}, {**usage(9), "estimated": True}],
    )
    def test_what_tells_nothing_of_a_cache_is_not_counted(
        self, told: dict[str, Any] | None
    ) -> None:
        bench = Bench()
        bench.kv_cache.learn("acme", OTHER, told)
        found = bench.kv_cache.get_cache_stats()
        assert (found["requests"], found["hit_rate"], found["cached_share"]) == (0, 0.0, 0.0)

    def test_each_tenant_has_its_own(self) -> None:
        bench = Bench()
        bench.kv_cache.learn("a", ANTHROPIC, usage(1000, cached=600))
        bench.kv_cache.learn("b", ANTHROPIC, usage(500))
        found = bench.kv_cache.get_cache_stats()
        assert found["by_tenant"]["a"]["cached_tokens"] == 600
        assert found["by_tenant"]["b"]["hit_rate"] == 0
        own = bench.kv_cache.get_cache_stats("a")
        assert (own["requests"], own["hit_rate"]) == (1, 1.0)
        assert "by_tenant" not in own
        assert "by_model" not in own
        assert bench.kv_cache.get_cache_stats("nobody")["requests"] == 0

    def test_what_others_count_is_added_where_it_is_known(self) -> None:
        bench = Bench()
        bench.kv_cache.learn("a", ANTHROPIC, usage(1000, cached=600))
        assert bench.kv_cache.get_cache_stats()["scope"] == "process"
        bench.kv_cache.system_figures = lambda: {
            name: tuple(2 * number for number in numbers)
            for name, numbers in bench.kv_cache.figures().items()
        }
        found = bench.kv_cache.get_cache_stats()
        assert (found["scope"], found["cached_tokens"], found["hit_rate"]) == ("system", 1200, 1.0)
        assert found["by_tenant"]["a"]["requests"] == 2
        assert bench.kv_cache.stats()["cached_tokens"] == 600

    def test_whoever_wants_to_know_is_told_of_each_change(self) -> None:
        bench = Bench()
        bench.kv_cache.learn("a", ANTHROPIC, usage(1000))
        bench.kv_cache.learn("a", ANTHROPIC, None)
        assert bench.changes == 1

    def test_prices_are_looked_up_once_for_a_deployment(self) -> None:
        bench = Bench()
        for cached in range(1, 50):
            bench.kv_cache.learn("a", ANTHROPIC, usage(1000, cached=cached, written=cached))
        assert bench.asked == 4
        cached = sum(range(1, 50))
        saved = bench.kv_cache.get_cache_stats()["saved_usd"]
        assert saved == pytest.approx((9 * cached - 2.5 * cached) / 1e9, rel=0.01)
        bench.kv_cache.configure(True, 3600)
        bench.kv_cache.learn("a", ANTHROPIC, usage(1000, cached=9))
        assert bench.asked == 8

    def test_hints_are_counted(self) -> None:
        bench = Bench()
        for text in ("one", "two", "three"):
            bench.send(call(SYSTEM, user(text)))
        found = bench.kv_cache.get_cache_stats()
        assert (found["hinted"], found["by_tenant"]["acme"]["hinted"]) == (2, 2)

    def test_names_that_callers_choose_do_not_pile_up(self) -> None:
        bench = Bench()
        for number in range(MODELS_MAX + 9):
            bench.kv_cache.learn("acme", Deployment("o", f"g{number}", "m", "openai"), usage(1))
        found = bench.kv_cache.get_cache_stats()["by_model"]
        assert len(found) == MODELS_MAX + 1
        assert found["other"]["requests"] == 9

    def test_nor_do_tenants(self) -> None:
        bench = Bench()
        for number in range(TENANTS_MAX + 9):
            bench.kv_cache.learn(f"t{number}", ANTHROPIC, usage(1))
        found = bench.kv_cache.get_cache_stats()["by_tenant"]
        assert len(found) == TENANTS_MAX + 1
        assert found["other"]["requests"] == 9


class TestForOperators:
    def test_the_package_has_it(self) -> None:
        assert forebay.KVCacheManager is KVCacheManager
        found = KVCacheManager(enable_kv_cache=True, kv_cache_ttl=60).get_cache_stats()
        assert (found["enabled"], found["ttl_seconds"], found["memory_entries"]) == (True, 60, 0)

    async def test_a_prompt_that_was_sent_is_found_by_its_key(self) -> None:
        bench = Bench()
        messages = [SYSTEM, user("one")]
        bench.send(call(*messages))
        key = bench.kv_cache.generate_cache_key(None, "g", messages)
        entry = await bench.kv_cache.get_kv_cache(key, tenant_id="acme")
        assert entry is None  # the key is the default tenant's

        key = bench.kv_cache.generate_cache_key(None, "g", messages, tenant_id="acme")
        entry = await bench.kv_cache.get_kv_cache(key, tenant_id="acme")
        assert entry is not None
        assert (entry.times, entry.tokens > 1024, entry.is_end) == (1, True, True)
        assert await bench.kv_cache.get_kv_cache(key, tenant_id="other") is None
        bench.now_s += 3601
        assert await bench.kv_cache.get_kv_cache(key, tenant_id="acme") is None

    def test_operators_ask_and_clear_from_any_thread(self) -> None:
        bench = Bench()
        failed: list[Exception] = []
        requests = [call(SYSTEM, user(f"{n}"), tenant=f"t{n % 5}") for n in range(200)]

        def work() -> None:
            try:
                for number, request in enumerate(requests):
                    bench.send(request)
                    deployment = Deployment("o", f"g{number}", "openai/gpt", "openai")
                    usage = {"prompt_tokens": 1, "completion_tokens": 1}
                    bench.kv_cache.learn(request.tenant, deployment, usage)
            except Exception as error:  # noqa: BLE001 - it is told by the test
                failed.append(error)

        interval_s = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        try:
            worker = threading.Thread(target=work)
            worker.start()
            while worker.is_alive():
                bench.kv_cache.stats()
                bench.kv_cache.clear_cache()
            worker.join()
        finally:
            sys.setswitchinterval(interval_s)
        assert failed == []

    async def test_what_is_forgotten_is_new(self) -> None:
        bench = Bench()
        for tenant in ("a", "b"):
            bench.send(call(SYSTEM, user("one"), tenant=tenant))
        entries = bench.kv_cache.get_cache_stats()["memory_entries"]
        assert await bench.kv_cache.invalidate_kv_cache(model="nobody") == 0
        assert await bench.kv_cache.invalidate_kv_cache(cache_key="nonsense") == 0
        assert await bench.kv_cache.invalidate_kv_cache(tenant_id="a", model="g") == entries / 2
        assert bench.marks(call(SYSTEM, user("two"), tenant="a")) == []
        assert bench.marks(call(SYSTEM, user("two"), tenant="b")) == [0]

        key = bench.kv_cache.generate_cache_key(None, "g", [SYSTEM], tenant_id="b")
        assert await bench.kv_cache.invalidate_kv_cache(key) == 1
        assert bench.marks(call(SYSTEM, user("three"), tenant="b")) == []
        assert bench.kv_cache.clear_cache() > 0
        assert bench.kv_cache.get_cache_stats()["memory_entries"] == 0

    def test_forgotten_between_two_attempts_it_breaks_nothing(self) -> None:
        bench = Bench(affinity=True)
        request = call(SYSTEM, user("one"))
        prompt = bench.kv_cache.read(request)
        bench.kv_cache.sent(prompt, request.body, OPENAI)
        bench.kv_cache.clear_cache()
        assert bench.kv_cache.sent(prompt, request.body, OPENAI) is request.body

    def test_it_forgets_what_was_not_sent_for_longest(self) -> None:
        bench = Bench(known_max=10)
        bench.send(call(SYSTEM, user("one")))
        for number in range(50):
            bench.send(call(user(f"{number}{LONG}")))
            bench.send(call(SYSTEM, user("again")))
        assert bench.kv_cache.get_cache_stats()["memory_entries"] == 10
        assert bench.marks(call(SYSTEM, user("two"))) == [0]


BLOCKS_MAX = 600


def words(messages: list[dict[str, Any]]) -> str:
    return "".join(message["content"] for message in messages)


class Server:
    """A simulated server's prefix cache: blocks of 64 characters, the least used going first."""

    def __init__(self, blocks_max: int) -> None:
        self._blocks: OrderedDict[str, None] = OrderedDict()
        self._blocks_max = blocks_max
        self.requests = 0
        self.cached = 0

    def serve(self, text: str) -> None:
        self.requests += 1
        hits = True
        for end in range(64, len(text) + 1, 64):
            block = text[:end]
            hits = hits and block in self._blocks
            self.cached += 64 * hits
            self._blocks[block] = None
            self._blocks.move_to_end(block)
            if len(self._blocks) > self._blocks_max:
                self._blocks.popitem(last=False)


class Fleet:
    """A group of simulated servers behind a router, in as many processes."""

    def __init__(
        self, routing: Any, servers: int = 3, processes: int = 1, rate: float = 20
    ) -> None:
        entries = [
            {
                "model_name": "g",
                "litellm_params": {"model": f"hosted_vllm/m{n}"},
                "model_info": {"id": str(n)},
            }
            for n in range(servers)
        ]
        self.table = ModelTable.build(GatewayConfig(model_list=entries, routing=routing))
        self.now_s = 100.0
        self._pause_s = 1 / rate
        self.servers = [Server(BLOCKS_MAX) for _ in range(servers)]
        self._turn = 0
        self._processes = []
        for seed in range(processes):
            router = Router(Random(seed), lambda: self.now_s, lambda _: None)
            router.learn_table(self.table)
            kv_cache = KVCacheManager(clock=lambda: self.now_s)
            kv_cache.configure(True, 3600, affinity=routing == "prefix")
            self._processes.append((router, kv_cache))

    def ask(self, messages: list[dict[str, Any]]) -> None:
        self.now_s += self._pause_s
        router, kv_cache = self._processes[self._turn % len(self._processes)]
        group = self.table.group("g")
        if self.table.routing == "prefix":
            request = call(*messages)
            prompt = kv_cache.read(request)
            affinity = kv_cache.affinity(prompt, "g")
            deployment = router.order(group, lambda _: CLEAN, affinity)[0]
            kv_cache.sent(prompt, request.body, deployment)
        else:
            deployment = group.deployments[self._turn % len(group.deployments)]
        self._turn += 1
        router.began(deployment)
        self.servers[int(deployment.id)].serve(words(messages))
        router.ended(deployment, 0.1, True)

    @property
    def cached(self) -> int:
        return sum(server.cached for server in self.servers)

    @property
    def spread(self) -> float:
        """How far the server farthest from its share is from it."""
        mean = sum(server.requests for server in self.servers) / len(self.servers)
        return max(abs(server.requests - mean) for server in self.servers) / mean


def text(rng: Random, size: int) -> str:
    return "".join(rng.choices("abcdefghij ", k=size))


def documents(rng: Random, families: int) -> list[list[dict[str, Any]]]:
    """Questions about documents, each document its own system message."""
    systems = [text(rng, 4000) for _ in range(families)]
    return [
        [{"role": "system", "content": rng.choice(systems)}, user(text(rng, 100))]
        for _ in range(600)
    ]


def one_system(rng: Random, families: int) -> list[list[dict[str, Any]]]:
    """The same system message before documents that are in the user's message."""
    system, papers = text(rng, 2000), [text(rng, 4000) for _ in range(families)]
    return [
        [{"role": "system", "content": system}, user(rng.choice(papers) + text(rng, 100))]
        for _ in range(600)
    ]


def conversations(rng: Random, families: int) -> list[list[dict[str, Any]]]:
    """Conversations that grow, turn about."""
    open_ones: list[list[dict[str, Any]]] = [[] for _ in range(families)]
    prompts = []
    for number in range(600):
        turns = open_ones[number % families]
        if len(turns) > 12:
            turns.clear()
        turns += [answer(text(rng, 300))] if turns else []
        turns.append(user(text(rng, 700)))
        prompts.append(list(turns))
    return prompts


WORKLOADS = pytest.mark.parametrize("workload", [documents, one_system, conversations])


def ideal(prompts: list[list[dict[str, Any]]]) -> int:
    """What one server with all their memory would have found in its cache."""
    server = Server(3 * BLOCKS_MAX)
    for prompt in prompts:
        server.serve(words(prompt))
    return server.cached


class TestTheFleet:
    @WORKLOADS
    @pytest.mark.parametrize("seed", range(3))
    def test_most_is_found_that_could_be_and_twice_what_round_robin_finds(
        self, workload: Any, seed: int
    ) -> None:
        prompts = workload(Random(seed), 25)
        plain, ours = Fleet("weighted"), Fleet("prefix")
        for prompt in prompts:
            plain.ask(prompt)
            ours.ask(prompt)
        assert ours.cached >= 0.8 * ideal(prompts)
        if workload is not one_system:  # which is a third of every prompt, and cached anywhere
            assert ours.cached >= 2 * plain.cached
        assert ours.spread <= 0.15

    def test_one_hot_beginning_is_shared_among_all(self) -> None:
        ours = Fleet("prefix")
        rng = Random(1)
        system = {"role": "system", "content": text(rng, 4000)}
        for _ in range(300):
            ours.ask([system, user(text(rng, 100))])
        assert ours.spread <= 0.15
        assert ours.cached >= 0.9 * 300 * 4000

    @WORKLOADS
    def test_four_processes_mostly_agree(self, workload: Any) -> None:
        prompts = workload(Random(7), 25)
        ours = Fleet("prefix", processes=4)
        for prompt in prompts:
            ours.ask(prompt)
        assert ours.cached >= 0.6 * ideal(prompts)
        assert ours.spread <= 0.15
