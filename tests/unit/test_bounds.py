"""The most that a request may use: never less than it does use, never more than was asked for."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.rate_limiter.terms import Amount, Limits
from forebay import bounds
from forebay.bounds import ASKED, Bound, Guess, bound, clamped, lowered, used
from forebay.errors import BudgetExceeded, RequestTooLarge
from forebay.providers.prices import PriceBound, Rate
from forebay.routing import Deployment

FREE = Limits()


def tokens_limit(per_minute: int) -> Limits:
    return Limits(tokens_per_minute=per_minute)


def price(prompt: float | Decimal, completion: float | Decimal) -> PriceBound:
    rate = Rate(Decimal(prompt), Decimal(completion))
    return PriceBound(rate, rate)


def chat(text: str = "hello", **params: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], **params}


def deployment(model: str = "openai/gpt-4o", **params: Any) -> Deployment:
    return Deployment("d", "g", model, model.partition("/")[0], params)


counts = st.integers(1, 10**6)
asked = st.fixed_dictionaries({}, optional=dict.fromkeys(ASKED, counts))
choices = st.fixed_dictionaries({}, optional={"n": st.integers(1, 8)})
limits = st.builds(
    Limits,
    tokens_per_minute=st.none() | st.integers(1, 10**7),
    day_nano=st.none() | st.integers(1, 10**12),
    month_nano=st.none() | st.integers(1, 10**13),
)
prices = st.builds(
    price, st.decimals(0, 10**5, places=4), st.decimals(Decimal("0.0001"), 10**5, places=4)
)
bodies = st.builds(lambda text, a, n: chat(text, **a, **n), st.text(), asked, choices)


def reckoned(
    body: dict[str, Any], limits: Limits, guess: int, price: PriceBound | None
) -> Bound | None:
    """The bound of what may fit; None for what never does."""
    try:
        return bound("chat", body, limits, guess, price)
    except (RequestTooLarge, BudgetExceeded):
        return None


class TestAlways:
    @given(bodies, limits, counts, st.none() | prices, asked)
    def test_what_is_sent_never_asks_for_more_than_the_caller_or_the_deployment(
        self,
        body: dict[str, Any],
        limits: Limits,
        guess: int,
        price: PriceBound | None,
        own: dict[str, int],
    ) -> None:
        found = reckoned(body, limits, guess, price)
        if found is None:
            return
        sent = clamped("chat", body, found, deployment(**own))
        for name in ASKED:
            if name in body:
                assert sent[name] <= body[name]
            elif name in own and name in sent:
                assert sent[name] <= own[name]
        assert {k: v for k, v in sent.items() if k not in ASKED} == {
            k: v for k, v in body.items() if k not in ASKED
        }

    @given(bodies, limits, counts, st.none() | prices, st.data())
    def test_no_answer_to_what_is_sent_uses_more_than_the_bound(
        self,
        body: dict[str, Any],
        limits: Limits,
        guess: int,
        price: PriceBound | None,
        data: st.DataObject,
    ) -> None:
        found = reckoned(body, limits, guess, price)
        if found is None:
            return
        sent = clamped("chat", body, found, deployment())
        longest = [sent[name] for name in ASKED if name in sent]
        if not longest:
            return  # nothing is limited and nothing was asked for: a guess
        completion = data.draw(st.integers(0, max(longest) * body.get("n", 1)))
        usage = {"prompt_tokens": found.prompt, "completion_tokens": completion}
        assert used(usage, found) <= found.tokens
        if price is not None and found.nano is not None:
            assert price.plain.nano(found.prompt, completion) <= found.nano

    @given(bodies, limits, counts, st.none() | prices)
    def test_the_bound_is_within_what_the_limits_ever_allow(
        self, body: dict[str, Any], limits: Limits, guess: int, price: PriceBound | None
    ) -> None:
        found = reckoned(body, limits, guess, price)
        if found is None:
            return
        if limits.tokens_per_minute is not None:
            assert found.amount.tokens <= limits.tokens_most
        if limits.nano_most is not None:
            assert found.amount.nano <= limits.nano_most

    @given(st.text(), choices, st.integers(1, 10**7), counts)
    def test_an_untouched_bucket_never_refuses_a_first_request_that_names_no_length(
        self, text: str, n: dict[str, int], per_minute: int, guess: int
    ) -> None:
        body, limit = chat(text, **n), tokens_limit(per_minute)
        found = reckoned(body, limit, guess, None)
        if found is None:  # only a prompt that leaves no room for one token of each answer
            prompt = bounds.prompt_tokens("chat", body)
            assert prompt + n.get("n", 1) > limit.tokens_most
            return
        usual = found.prompt + bounds.LEAST_GUESS * found.choices
        assert found.tokens <= min(limit.tokens_most, max(limit.token_burst, usual))

    @given(bodies, counts, prices, st.integers(0, 10**12))
    def test_lowered_never_costs_more_than_what_is_left(
        self, body: dict[str, Any], guess: int, price: PriceBound, left: int
    ) -> None:
        whole = reckoned(body, Limits(day_nano=10**15), guess, price)
        assert whole is not None
        lower = lowered(whole, left)
        if lower is None:
            rate = price.plain
            assert rate.nano(whole.prompt, 0) + rate.completion * whole.choices > left
            return
        assert lower.nano is not None
        assert lower.nano <= left
        assert lower.completion <= whole.completion
        assert lower.tokens == lower.prompt + lower.completion * lower.choices

    @given(st.text())
    def test_a_prompt_has_at_least_the_bytes_of_its_text(self, text: str) -> None:
        assert bounds.prompt_tokens("chat", chat(text)) > len(text.encode("utf-8", "surrogatepass"))


class TestBound:
    def test_without_limits_nothing_is_clamped_and_nothing_costs(self) -> None:
        found = bound("chat", chat(), FREE, 1000)
        assert (found.clamp, found.nano, found.completion, found.asked) == (None, None, 1000, False)
        body = chat()
        assert clamped("chat", body, found, deployment()) is body

    def test_the_largest_of_what_was_asked_for_counts_for_each_choice(self) -> None:
        body = chat(max_tokens=5, max_completion_tokens=9, max_output_tokens=7, n=3)
        assert bounds.asked_tokens("chat", body) == 27
        found = bound("chat", body, tokens_limit(60_000), 1)
        assert (found.completion, found.tokens, found.clamp) == (9, found.prompt + 27, None)

    def test_what_fits_is_left_as_it_was(self) -> None:
        body = chat(max_tokens=100)
        found = bound("chat", body, tokens_limit(6000), 1)
        assert clamped("chat", body, found, deployment()) is body

    def test_what_does_not_fit_is_lowered_in_every_parameter_that_is_above(self) -> None:
        body = chat(max_tokens=50, max_completion_tokens=10_000)
        found = bound("chat", body, tokens_limit(600), 1)
        sent = clamped("chat", body, found, deployment())
        assert found.tokens == 600
        assert (sent["max_tokens"], sent["max_completion_tokens"]) == (50, 600 - found.prompt)
        assert body["max_completion_tokens"] == 10_000

    @pytest.mark.parametrize(
        ("model", "name"),
        [
            ("openai/gpt-4o", "max_tokens"),
            ("anthropic/claude-haiku-4-5", "max_tokens"),
            ("openai/o3-mini", "max_completion_tokens"),
            ("azure/gpt-5", "max_completion_tokens"),
        ],
    )
    def test_a_clamp_is_added_in_the_parameter_that_the_model_takes(
        self, model: str, name: str
    ) -> None:
        found = bound("chat", chat(), tokens_limit(60_000), 500)
        sent = clamped("chat", chat(), found, deployment(model))
        assert {name: sent[name] for name in ASKED if name in sent} == {name: 500}

    def test_the_deployments_own_length_is_lowered_and_never_raised(self) -> None:
        found = bound("chat", chat(), tokens_limit(60_000), 500)
        assert clamped("chat", chat(), found, deployment(max_tokens=90))["max_tokens"] == 90
        assert clamped("chat", chat(), found, deployment(max_tokens=900))["max_tokens"] == 500

    def test_a_guess_stays_within_the_burst_unless_the_prompt_is_long(self) -> None:
        limit = tokens_limit(6000)
        assert bound("chat", chat(), limit, 50_000).tokens == 1000
        long = bound("chat", chat("x" * 3000), limit, 50_000)
        assert long.completion == bounds.LEAST_GUESS

    def test_a_prompt_that_can_never_fit_is_refused_at_once(self) -> None:
        with pytest.raises(RequestTooLarge, match="tokens_per_minute 100") as caught:
            bound("chat", chat("x" * 200), tokens_limit(100), 10)
        assert (caught.value.code, caught.value.retry_after_s) == ("tokens_over_limit", None)

    def test_a_request_that_can_never_be_paid_is_refused_at_once(self) -> None:
        limit = Limits(day_nano=1000, month_nano=500)
        with pytest.raises(BudgetExceeded, match="usd_per_month is") as caught:
            bound("chat", chat(), limit, 10, price(1000, 1000))
        assert caught.value.code == "cost_over_limit"

    def test_money_shortens_the_answer_that_it_does_not_buy(self) -> None:
        body = chat(max_tokens=1000, n=2)
        prompt = bounds.prompt_tokens("chat", body)
        found = bound("chat", body, Limits(day_nano=prompt + 400), 1, price(1, 2))
        assert (found.completion, found.clamp, found.nano) == (100, 100, prompt + 400)

    def test_without_a_price_money_clamps_nothing(self) -> None:
        found = bound("chat", chat(), Limits(day_nano=1), 10)
        assert (found.nano, found.clamp) == (None, None)

    def test_an_embedding_uses_its_prompt_and_is_never_clamped(self) -> None:
        body = {"input": ["one", "two"]}
        found = bound(
            "embedding", body, Limits(tokens_per_minute=600, day_nano=10**9), 9, price(1, 0)
        )
        assert (found.tokens, found.completion, found.nano) == (found.prompt, 0, found.prompt)
        assert clamped("embedding", body, found, deployment()) is body
        assert lowered(found, found.prompt - 1) is None

    def test_prompts_in_a_list_have_an_answer_each(self) -> None:
        body = {"prompt": ["a", "b"], "max_tokens": 10, "n": 2, "best_of": 3}
        assert bounds.asked_tokens("completion", body) == 60
        assert bounds.asked_tokens("completion", {**body, "prompt": [1, 2, 3]}) == 30

    def test_what_is_no_plain_text_has_the_dearest_rate(self) -> None:
        both = PriceBound(Rate(Decimal(1), Decimal(1)), Rate(Decimal(7), Decimal(7)))
        image = {"type": "image_url", "image_url": {"url": "https://h/x.png"}}
        body = {"messages": [{"role": "user", "content": [image]}]}
        limit = Limits(day_nano=10**12)
        assert bound("chat", chat(), limit, 10, both).rate == both.plain
        assert bound("chat", body, limit, 10, both).rate == both.dearest


class TestPrompt:
    def test_an_image_counts_as_the_dearest_of_the_models(self) -> None:
        image = {"type": "image_url", "image_url": {"url": "https://h/x.png"}}
        body = {"messages": [{"role": "user", "content": [image]}]}
        usual = bounds.prompt_tokens("chat", body, models=["openai/gpt-4o"])
        both = bounds.prompt_tokens("chat", body, models=["openai/gpt-4o", "openai/gpt-4o-mini"])
        assert both - usual == bounds.IMAGE_TOKENS_4O_MINI - bounds.IMAGE_TOKENS

    def test_tools_and_unknown_parameters_count_and_settings_do_not(self) -> None:
        plain = bounds.prompt_tokens("chat", chat())
        assert bounds.prompt_tokens("chat", chat(temperature=0, user="x" * 99)) == plain
        tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
        assert bounds.prompt_tokens("chat", chat(tools=[tool])) > plain + bounds.PER_TOOLS
        assert bounds.prompt_tokens("chat", chat(system="x" * 99)) >= plain + 99

    def test_token_ids_count_one_each(self) -> None:
        one = bounds.prompt_tokens("embedding", {"input": [7]})
        assert bounds.prompt_tokens("embedding", {"input": [7] * 100}) == one + 99
        lists = bounds.prompt_tokens("embedding", {"input": [[7] * 100, [7]]})
        assert lists == one + 100 + bounds.PER_TEXT

    def test_only_long_texts_go_to_a_tokenizer_and_not_without_end(self) -> None:
        seen: list[int] = []

        def tighter(text: str) -> int:
            seen.append(len(text))
            return len(text) // 4

        def measured(*sizes: int) -> int:
            seen.clear()
            messages = [{"role": "user", "content": "x" * size} for size in sizes]
            return bounds.prompt_tokens("chat", {"messages": messages}, tighter=tighter)

        short = measured(bounds.LONG_BYTES)
        assert seen == []
        assert measured(8000) < short
        measured(60_000, 60_000)
        assert seen == [60_000], "more than that would stall everybody else"


class TestUsed:
    def test_it_is_what_the_provider_says_or_else_all_of_the_bound(self) -> None:
        found = bound("chat", chat(max_tokens=10), FREE, 1)
        assert used({"prompt_tokens": 3, "completion_tokens": 2}, found) == 5
        assert used({"prompt_tokens": 3, "completion_tokens": None}, found) == 3
        assert used({"total_tokens": 9}, found) == 9
        assert used({"total_tokens": None}, found) == found.tokens
        assert used(None, found) == used({}, found) == found.tokens


class TestGuess:
    def test_at_first_there_is_only_the_first_guess(self) -> None:
        assert Guess().guess("acme", "g", 700) == 700
        assert bounds.first_guess(chat()) == bounds.FIRST_GUESS
        assert bounds.first_guess(chat(), "openai/o3") == bounds.FIRST_GUESS_REASONING
        assert bounds.first_guess(chat(reasoning_effort="high")) == bounds.FIRST_GUESS_REASONING
        assert bounds.first_guess(chat(thinking={"budget_tokens": 5000})) == 6024

    def test_twice_the_95th_percentile_of_what_came(self) -> None:
        guess = Guess()
        for tokens in range(1, 65):
            guess.learn("acme", "g", tokens * 100, cut=False)
        assert guess.guess("acme", "g") == 2 * 6100
        assert guess.guess("other", "g") == bounds.FIRST_GUESS

    def test_a_few_short_answers_do_not_make_it_short(self) -> None:
        guess = Guess()
        guess.learn("acme", "g", 1, cut=False)
        assert guess.guess("acme", "g") == bounds.FIRST_GUESS
        for _ in range(20):
            guess.learn("acme", "g", 1, cut=False)
        assert guess.guess("acme", "g") == bounds.LEAST_GUESS

    def test_an_answer_that_was_cut_counts_double_and_choices_share(self) -> None:
        guess = Guess()
        for _ in range(20):
            guess.learn("acme", "g", 2000, cut=True, choices=2)
        assert guess.guess("acme", "g") == 4000

    def test_the_pair_that_was_used_least_recently_is_forgotten(self) -> None:
        guess = Guess(pairs_max=2)
        for tenant in ("a", "b"):
            guess.learn(tenant, "g", 5000, cut=False)
        guess.guess("a", "g")
        guess.learn("c", "g", 5000, cut=False)
        assert len(guess) == 2
        assert guess.guess("a", "g") == 10_000
        assert guess.guess("b", "g") == bounds.FIRST_GUESS


class TestDeployments:
    def test_their_quota_is_held_in_any_minute(self) -> None:
        assert bounds.deployment_limits(None, None) is None
        limits = bounds.deployment_limits(600, 6000, 3)
        assert limits is not None
        assert limits.hard_minute
        assert limits.burst + limits.rate_per_s * 60 <= 601
        assert limits.token_burst + limits.token_rate_per_s * 60 == pytest.approx(6000)

    def test_what_is_more_than_the_quota_takes_all_of_it(self) -> None:
        limits = bounds.deployment_limits(None, 600)
        assert limits is not None
        large = bound("chat", chat(max_tokens=10_000), FREE, 1)
        assert bounds.fits(large, limits) == Amount(500)
        assert bounds.fits(large, FREE) == Amount()
