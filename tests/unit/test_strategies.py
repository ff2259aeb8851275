"""In which order a group's deployments are tried, and what the router goes by."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.circuit_breaker.policy import CLEAN, Standing, State
from actors.ledger.policy import Rating
from forebay.config import GatewayConfig
from forebay.providers.prices import Prices
from forebay.routing import Deployment, ModelTable
from forebay.strategies import (
    ALIKE,
    BUSY_SPARE,
    EXPLORED_SHARE,
    KNOWN_FOR_S,
    PRICES_MAX,
    SENT_CALM,
    SENT_OVER_S,
    SENT_SHARE_MAX,
    SENT_SPARE,
    USUAL_CALL,
    Affinity,
    Router,
    by_hash,
)


class Unexploring(Random):
    """Shuffles, but never draws so low that latency would go by weight."""

    def random(self) -> float:
        return EXPLORED_SHARE + (1 - EXPLORED_SHARE) * super().random()


class Bench:
    """A router over one table, with a clock and prices of the test's own."""

    def __init__(self, strategy: str, *params: dict[str, Any], rng: Random | None = None) -> None:
        self.now_s = 100.0
        self.prices: dict[str, int | None] = {}
        self.asked: list[str] = []
        self.router = Router(rng or Unexploring(1), lambda: self.now_s, self._price_of)
        self.learn(strategy, *params)

    def learn(self, strategy: str, *params: dict[str, Any]) -> None:
        self.table = table(*params, routing=strategy)
        self.router.learn_table(self.table)

    def _price_of(self, deployment: Deployment) -> int | None:
        self.asked.append(deployment.id)
        return self.prices.get(deployment.id)

    def deployment(self, number: int) -> Deployment:
        return self.table.deployment(str(number))

    def order(
        self,
        standing: Callable[[str], Standing] | None = None,
        affinity: Affinity | None = None,
    ) -> list[str]:
        group = self.table.group("g")
        return [d.id for d in self.router.order(group, standing or clean, affinity)]

    def firsts(self, trials: int = 2000) -> Counter[str]:
        return Counter(self.order()[0] for _ in range(trials))

    def began(self, number: int) -> None:
        self.router.began(self.deployment(number))

    def called(self, number: int, took_s: float | None, ok: bool = True) -> None:
        self.began(number)
        self.router.ended(self.deployment(number), took_s, ok)

    def latency_s(self, number: int) -> float:
        found: float = self.router.stats()["deployments"][str(number)]["latency_s"]
        return found


def entry(number: int, model: str | None = None, /, **params: Any) -> dict[str, Any]:
    info = {"id": str(number)}
    params = {"model": model or f"openai/m{number}", **params}
    return {"model_name": "g", "litellm_params": params, "model_info": info}


def table(*params: dict[str, Any], **fields: Any) -> ModelTable:
    """A group g whose deployments are called 0, 1, 2, …"""
    entries = [entry(number, **given) for number, given in enumerate(params)]
    return ModelTable.build(GatewayConfig(model_list=entries, **fields))


def clean(_: str) -> Standing:
    return CLEAN


def standings(**by_id: Standing) -> Callable[[str], Standing]:
    return lambda circuit: by_id.get(f"d{circuit}", CLEAN)


ALL = pytest.mark.parametrize("strategy", ["weighted", "least_busy", "latency", "cost", "prefix"])


class TestWhateverTheStrategy:
    @ALL
    def test_lower_orders_come_first_and_those_without_one_last(self, strategy: str) -> None:
        bench = Bench(strategy, {}, {"order": 2}, {"order": 1}, {"order": 2}, rng=Random(1))
        bench.prices = {"0": 1, "1": 5, "2": 9, "3": 5}
        bench.called(0, 0.1)
        bench.began(2)
        for _ in range(100):
            found = bench.order()
            assert (found[0], set(found[1:3]), found[3]) == ("2", {"1", "3"}, "0")

    @ALL
    def test_what_the_breaker_holds_back_comes_last_soonest_first(self, strategy: str) -> None:
        standing = standings(
            d0=Standing(State.OPEN, retry_after_s=9),
            d1=Standing(State.CLOSED, retry_after_s=2),  # throttled
            d2=Standing(State.FORCED_OPEN),
        )
        bench = Bench(strategy, {"order": 1}, {"order": 1}, {"order": 1}, {"order": 2})
        assert bench.order(standing) == ["3", "1", "0", "2"]

    @ALL
    def test_one_that_may_be_probed_keeps_its_place(self, strategy: str) -> None:
        standing = standings(d0=Standing(State.HALF_OPEN), d1=Standing(State.FORCED_CLOSED))
        assert Bench(strategy, {"order": 1}, {"order": 2}).order(standing) == ["0", "1"]

    @ALL
    def test_a_weight_of_nothing_comes_after_all_others_of_its_order(self, strategy: str) -> None:
        for other in ({"weight": 1}, {"rpm": 1}, {}):
            bench = Bench(strategy, {"weight": 0, "rpm": 9}, other, {"order": 1})
            bench.prices = {"0": 1, "1": 5}
            bench.began(1)
            assert {tuple(bench.order()) for _ in range(50)} == {("2", "1", "0")}

    @ALL
    def test_a_deployment_listed_twice_is_tried_once(self, strategy: str) -> None:
        entries = [entry(0), entry(0), entry(1)]
        models = ModelTable.build(GatewayConfig(model_list=entries, routing=strategy))
        bench = Bench(strategy)
        bench.router.learn_table(models)
        found = bench.router.order(models.group("g"), clean)
        assert sorted(d.id for d in found) == ["0", "1"]

    def test_a_group_of_one_is_not_pondered(self) -> None:
        def nobody(_: str) -> Standing:
            raise AssertionError

        assert Bench("latency", {}).order(nobody) == ["0"]

    def test_names_filled_into_a_pattern_stand_as_their_pattern_does(self) -> None:
        entries = [
            {**entry(n, f"{p}/*"), "model_name": "x/*"} for n, p in enumerate(("openai", "azure"))
        ]
        models = ModelTable.build(GatewayConfig(model_list=entries))
        router = Router(Random(1), lambda: 0.0, lambda _: None)
        router.learn_table(models)
        throttled = standings(d0=Standing(State.CLOSED, retry_after_s=3))
        found = router.order(models.group("x/y"), throttled)
        assert [d.id for d in found] == ["1:x/y", "0:x/y"]

    @ALL
    @settings(deadline=None, max_examples=50)
    @given(
        st.lists(
            st.fixed_dictionaries(
                {},
                optional={
                    "weight": st.floats(0, 1e6),
                    "order": st.integers(-3, 3),
                    "rpm": st.integers(1, 10**6),
                },
            ),
            min_size=1,
            max_size=6,
        ),
        st.lists(st.tuples(st.integers(0, 5), st.floats(0, 99) | st.none(), st.booleans())),
        st.integers(0, 2**16),
    )
    def test_nothing_is_lost_or_tried_twice(
        self, strategy: str, given: list[dict[str, Any]], calls: list[Any], seed: int
    ) -> None:
        bench = Bench(strategy, *given, rng=Random(seed))
        for number, took_s, ok in calls:
            bench.called(number % len(given), took_s, ok)
            bench.now_s += took_s or 0
        orders = [("0", "1", "2", "3", "4", "5").index(found) for found in bench.order()]
        assert sorted(orders) == list(range(len(given)))
        ranks = [float("inf") if (o := given[n].get("order")) is None else o for n in orders]
        assert ranks == sorted(ranks)


class TestWeighted:
    def test_a_weight_is_a_share_of_first_tries(self) -> None:
        bench = Bench("weighted", {"weight": 3}, {"weight": 1}, rng=Random(1))
        assert 2850 < bench.firsts(4000)["0"] < 3150

    @pytest.mark.parametrize("figure", ["rpm", "tpm"])
    def test_without_weights_rpm_or_else_tpm_are_the_shares(self, figure: str) -> None:
        bench = Bench("weighted", {figure: 9000}, {figure: 1000}, rng=Random(1))
        assert 3480 < bench.firsts(4000)["0"] < 3720

    def test_weights_go_before_rpm_and_one_without_comes_last(self) -> None:
        bench = Bench("weighted", {"rpm": 10**6}, {"weight": 1}, {"weight": 0})
        assert bench.firsts(50).keys() == {"1"}

    def test_without_any_figure_all_are_alike(self) -> None:
        firsts = Bench("weighted", {}, {}, {}, rng=Random(1)).firsts(3000)
        assert all(850 < firsts[number] < 1150 for number in "012")


class TestLeastBusy:
    def test_fewest_calls_in_flight_come_first(self) -> None:
        bench = Bench("least_busy", {}, {}, {})
        for number in (0, 0, 1):
            bench.began(number)
        assert bench.order() == ["2", "1", "0"]
        for _ in range(2):
            bench.router.ended(bench.deployment(0), 1.0, True)
        bench.began(2)
        bench.began(2)
        assert bench.order() == ["0", "1", "2"]

    def test_a_call_that_told_nothing_is_over_too(self) -> None:
        bench = Bench("least_busy", {}, {})
        bench.called(0, None, ok=False)
        assert 300 < bench.firsts(1000)["0"] < 700

    def test_those_equally_busy_go_by_weight(self) -> None:
        bench = Bench("least_busy", {"weight": 3}, {"weight": 1})
        bench.began(0)
        bench.began(1)
        assert 1400 < bench.firsts(2000)["0"] < 1600

    def test_calls_spread_evenly(self) -> None:
        bench = Bench("least_busy", {}, {}, {}, {})
        for _ in range(40):
            bench.began(int(bench.order()[0]))
        stats = bench.router.stats()["deployments"]
        assert [stats[number]["in_flight"] for number in "0123"] == [10, 10, 10, 10]


class TestLatency:
    def test_the_soonest_to_answer_comes_first(self) -> None:
        bench = Bench("latency", {}, {}, {})
        for number, took_s in enumerate((3.0, 1.0, 2.0)):
            bench.called(number, took_s)
        assert bench.order() == ["1", "2", "0"]

    def test_one_that_nobody_knows_is_tried_first_one_call_at_a_time(self) -> None:
        bench = Bench("latency", {}, {})
        bench.called(0, 0.5)
        assert bench.order() == ["1", "0"]
        bench.began(1)
        assert bench.order() == ["0", "1"]

    def test_the_first_sixteen_calls_do_not_all_go_to_one(self) -> None:
        bench = Bench("latency", {}, {})
        firsts: Counter[str] = Counter()
        for _ in range(16):
            first = bench.order()[0]
            firsts[first] += 1
            bench.began(int(first))
        assert min(firsts.values()) >= 3

    def test_those_about_alike_go_by_weight(self) -> None:
        bench = Bench("latency", {"weight": 3}, {"weight": 1}, {"weight": 9})
        for number, took_s in enumerate((1.0, ALIKE - 0.01, ALIKE + 0.01)):
            bench.called(number, took_s)
        firsts = bench.firsts()
        assert firsts.keys() == {"0", "1"}
        assert 1400 < firsts["0"] < 1600

    def test_a_small_share_of_requests_goes_by_weight_all_the_same(self) -> None:
        bench = Bench("latency", {}, {}, rng=Random(1))
        bench.called(0, 0.1)
        bench.called(1, 5.0)
        slow = bench.firsts(10_000)["1"] / 10_000
        assert EXPLORED_SHARE * 0.3 < slow < EXPLORED_SHARE * 0.7

    def test_failing_fast_is_not_being_fast(self) -> None:
        bench = Bench("latency", {}, {})
        bench.called(0, 0.5)
        bench.called(1, 2.0)
        for _ in range(20):
            bench.called(1, 0.001, ok=False)
        assert bench.latency_s(1) == 2.0
        assert bench.order() == ["0", "1"]

    def test_failing_late_is_being_slow(self) -> None:
        bench = Bench("latency", {}, {})
        bench.called(0, 1.0)
        bench.called(1, 0.5)
        bench.now_s += 20
        bench.called(1, 30.0, ok=False)
        bench.called(0, 1.0)
        assert bench.order() == ["0", "1"]

    def test_one_that_only_ever_failed_is_not_tried_first_again_and_again(self) -> None:
        bench = Bench("latency", {}, {})
        bench.called(0, 9.0)
        bench.called(1, 0.001, ok=False)
        assert bench.order() == ["0", "1"]
        bench.now_s += KNOWN_FOR_S + 1
        bench.called(0, 9.0)
        assert bench.order() == ["1", "0"]

    def test_where_all_fail_all_are_alike(self) -> None:
        bench = Bench("latency", {}, {})
        for number in range(2):
            bench.called(number, 0.1, ok=False)
        assert 800 < bench.firsts()["0"] < 1200

    def test_a_call_that_told_nothing_changes_nothing(self) -> None:
        bench = Bench("latency", {}, {})
        bench.called(0, 1.0)
        bench.called(1, None, ok=False)
        assert bench.order() == ["1", "0"]
        bench.called(1, 2.0)
        bench.called(0, None, ok=False)
        assert bench.order() == ["0", "1"]

    def test_what_is_known_ages(self) -> None:
        bench = Bench("latency", {}, {})
        bench.called(0, 1.0)
        bench.called(1, 9.0)
        bench.now_s += KNOWN_FOR_S + 1
        bench.called(0, 1.0)
        assert bench.order() == ["1", "0"]
        bench.began(1)
        assert bench.order() == ["0", "1"]
        bench.router.ended(bench.deployment(1), 0.5, True)
        assert bench.order() == ["1", "0"]

    def test_an_older_figure_gives_way_faster(self) -> None:
        bench = Bench("latency", {}, {})
        for number in range(2):
            bench.called(number, 1.0)
        bench.called(0, 2.0)
        bench.now_s += 30
        bench.called(1, 2.0)
        assert bench.latency_s(0) == pytest.approx(1.1)
        assert bench.latency_s(1) == pytest.approx(1.86, abs=0.01)

    def test_calls_follow_whoever_is_faster_now(self) -> None:
        bench = Bench("latency", {}, {}, rng=Random(1))

        def calls_for(seconds: float, **took_s: float) -> Counter[str]:
            firsts: Counter[str] = Counter()
            until_s = bench.now_s + seconds
            while bench.now_s < until_s:
                first = bench.order()[0]
                firsts[first] += 1
                bench.now_s += 0.1
                bench.called(int(first), took_s[f"d{first}"])
            return firsts

        assert calls_for(10, d0=0.2, d1=1.0)["0"] > 90
        calls_for(5, d0=3.0, d1=1.0)
        assert calls_for(10, d0=3.0, d1=1.0)["1"] > 90
        calls_for(KNOWN_FOR_S, d0=0.2, d1=1.0)
        assert calls_for(10, d0=0.2, d1=1.0)["0"] > 90

    def test_no_time_at_all_is_a_latency_too(self) -> None:
        bench = Bench("latency", {}, {})
        bench.called(0, 1.0)
        bench.called(1, 0.0)
        assert bench.order() == ["1", "0"]


class TestCost:
    def test_the_cheapest_comes_first_and_the_unknown_last(self) -> None:
        bench = Bench("cost", {}, {}, {}, {})
        bench.prices = {"0": 300, "2": 100, "3": 200}
        assert bench.order() == ["2", "3", "0", "1"]

    def test_free_is_cheapest(self) -> None:
        bench = Bench("cost", {}, {})
        bench.prices = {"0": 1, "1": 0}
        assert bench.order() == ["1", "0"]

    def test_those_of_one_price_go_by_weight(self) -> None:
        bench = Bench("cost", {"weight": 3}, {"weight": 1})
        bench.prices = {"0": 5, "1": 5}
        assert 1400 < bench.firsts()["0"] < 1600

    def test_a_known_price_is_asked_for_once_a_table_and_an_unknown_one_again(self) -> None:
        bench = Bench("cost", {}, {})
        bench.prices = {"0": 5}
        bench.order()
        bench.order()
        assert Counter(bench.asked) == {"0": 1, "1": 2}
        bench.prices = {"0": 5, "1": 4}  # a list of prices was loaded
        assert bench.order() == ["1", "0"]
        bench.learn("cost", {}, {})
        bench.prices = {"0": 3, "1": 4}
        assert bench.order() == ["0", "1"]

    def test_prices_of_any_number_of_names_are_not_all_kept(self) -> None:
        entries = [
            {**entry(n, f"{p}/*"), "model_name": "x/*"} for n, p in enumerate(("openai", "azure"))
        ]
        models = ModelTable.build(GatewayConfig(model_list=entries, routing="cost"))
        router = Router(Random(1), lambda: 0.0, lambda d: len(d.id))
        router.learn_table(models)
        for number in range(PRICES_MAX):
            router.order(models.group(f"x/{number}"), clean)
            assert router.stats()["prices"] <= PRICES_MAX

    def test_configured_prices_are_compared_by_three_tokens_in_for_one_out(self) -> None:
        models = table(
            {"input_cost_per_token": 1e-6, "output_cost_per_token": 9e-6},
            {"input_cost_per_token": 2e-6, "output_cost_per_token": 2e-6},
            {"input_cost_per_token": 1e-6, "output_cost_per_token": 3e-6},
            routing="cost",
        )
        prices = Prices()
        router = Router(Random(1), lambda: 0.0, lambda d: prices.of_usage(d, USUAL_CALL))
        router.learn_table(models)
        assert [d.id for d in router.order(models.group("g"), clean)] == ["2", "1", "0"]


class TestChangesOfTheTable:
    def test_the_strategy_is_the_tables(self) -> None:
        bench = Bench("weighted", {}, {})
        assert bench.router.stats()["strategy"] == "weighted"
        bench.called(0, 9.0)
        bench.called(1, 1.0)
        bench.learn("latency", {}, {})
        assert bench.router.stats()["strategy"] == "latency"
        assert bench.order() == ["1", "0"]

    def test_what_is_known_of_deployments_that_stay_is_kept(self) -> None:
        bench = Bench("latency", {}, {}, {})
        for number in range(3):
            bench.called(number, 1.0 + number)
        bench.learn("latency", {}, {})
        assert bench.router.stats()["deployments"].keys() == {"0", "1"}
        assert bench.latency_s(1) == 2.0

    def test_those_that_left_go_when_their_last_call_is_over(self) -> None:
        bench = Bench("least_busy", {}, {})
        gone = bench.deployment(1)
        bench.router.began(gone)
        bench.router.began(gone)
        bench.learn("least_busy", {})
        bench.router.ended(gone, 1.0, True)
        bench.learn("least_busy", {})
        assert bench.router.stats()["deployments"] == {"1": {"in_flight": 1, "latency_s": 1.0}}
        bench.router.ended(gone, 1.0, True)
        assert bench.router.stats()["deployments"] == {}

    def test_any_number_of_names_filled_into_a_pattern_share_a_record(self) -> None:
        pattern = {**entry(0, "openai/*"), "model_name": "x/*"}
        models = ModelTable.build(GatewayConfig(model_list=[pattern]))
        router = Router(Random(1), lambda: 0.0, lambda _: None)
        router.learn_table(models)
        for number in range(100):
            (deployment,) = models.group(f"x/{number}").deployments
            router.began(deployment)
            router.ended(deployment, 1.0, True)
        assert router.stats()["deployments"].keys() == {"0"}


def beginning(number: int, home: str | None = None) -> Affinity:
    return Affinity(number.to_bytes(4), home)


class TestPrefix:
    def test_a_beginning_has_one_order_in_every_process(self) -> None:
        one, other = (Bench("prefix", {}, {}, {}, rng=Random(seed)) for seed in (1, 2))
        orders = [one.order(affinity=beginning(number)) for number in range(300)]
        assert [other.order(affinity=beginning(number)) for number in range(300)] == orders
        firsts = Counter(found[0] for found in orders)
        assert all(75 < firsts[number] < 125 for number in "012")

    def test_a_weight_is_a_share_of_the_beginnings(self) -> None:
        bench = Bench("prefix", {"weight": 3}, {"weight": 1}, {"weight": 1e-9})
        firsts = Counter(bench.order(affinity=beginning(n))[0] for n in range(2000))
        assert 1400 < firsts["0"] < 1600
        assert firsts["2"] == 0

    def test_who_goes_takes_only_its_own_beginnings_along(self) -> None:
        three = table({}, {}, {}).group("g").deployments
        for number in range(100):
            key = beginning(number).key
            before = [d.id for d in by_hash(three, key)]
            after = [d.id for d in by_hash(three[:2], key)]
            assert after == [name for name in before if name != "2"]

    def test_home_is_first_wherever_the_hash_points(self) -> None:
        bench = Bench("prefix", {}, {}, {})
        for number in range(20):
            assert bench.order(affinity=beginning(number, "1"))[0] == "1"
        assert bench.order(affinity=beginning(1, "gone")) == bench.order(affinity=beginning(1))

    def test_home_gets_no_more_than_a_little_over_its_share(self) -> None:
        bench = Bench("prefix", {}, {}, {})
        sent: Counter[str] = Counter()
        for _ in range(300):
            first = bench.order(affinity=beginning(1, "1"))[0]
            sent[first] += 1
            bench.called(int(first), 0.0)
        assert sent["1"] == max(sent.values())
        assert sent["1"] <= 100 * SENT_SHARE_MAX + SENT_SPARE

    def test_what_was_sent_long_ago_keeps_nobody_from_home(self) -> None:
        bench = Bench("prefix", {}, {}, {})
        for _ in range(50):
            bench.called(1, 0.0)
        assert bench.order(affinity=beginning(1, "1"))[0] != "1"
        bench.now_s += 10 * SENT_OVER_S
        assert bench.order(affinity=beginning(1, "1"))[0] == "1"

    def test_calls_that_do_not_end_turn_others_away(self) -> None:
        bench = Bench("prefix", {}, {}, {})
        for _ in range(2 * BUSY_SPARE):
            bench.began(1)
        bench.now_s += 10 * SENT_OVER_S
        found = bench.order(affinity=beginning(1, "1"))
        assert (found[0] != "1", found[-1]) == (True, "1")

    def test_a_few_calls_are_no_reason_to_leave_home(self) -> None:
        bench = Bench("prefix", {}, {}, {})
        for _ in range(SENT_CALM):
            assert bench.order(affinity=beginning(1, "1"))[0] == "1"
            bench.called(1, 0.0)

    def test_prompts_without_a_beginning_even_out_the_shares(self) -> None:
        bench = Bench("prefix", {}, {}, {}, rng=Random(1))
        for _ in range(40):
            bench.called(1, 0.0)
        assert bench.firsts(200).keys() == {"0", "2"}

    def test_home_behind_an_open_breaker_is_passed_by(self) -> None:
        open_one = standings(d1=Standing(State.OPEN, retry_after_s=9))
        found = Bench("prefix", {}, {}, {}).order(open_one, beginning(1, "1"))
        assert (found[0] != "1", found[-1]) == (True, "1")

    def test_other_strategies_do_not_heed_it(self) -> None:
        bench = Bench("cost", {}, {})
        bench.prices = {"0": 1, "1": 2}
        assert bench.order(affinity=beginning(1, "1")) == ["0", "1"]

    @settings(deadline=None, max_examples=50)
    @given(
        st.lists(st.floats(0, 1e6), min_size=1, max_size=6),
        st.lists(st.integers(0, 5), max_size=40),
        st.integers(0, 99),
    )
    def test_nothing_is_lost_and_nothing_breaks(
        self, weights: list[float], calls: list[int], number: int
    ) -> None:
        bench = Bench("prefix", *({"weight": weight} for weight in weights))
        for called in calls:
            bench.called(called % len(weights), 0.0)
        found = bench.order(affinity=beginning(number, "0"))
        assert sorted(found) == [str(n) for n in range(len(weights))]


class TestFeedback:
    def test_without_ratings_it_goes_by_weight(self) -> None:
        bench = Bench("feedback", {"weight": 3}, {"weight": 1})
        firsts = bench.firsts()

        assert 0.7 < firsts["0"] / sum(firsts.values()) < 0.8

    def test_the_better_rated_one_gets_most_calls_and_the_other_some(self) -> None:
        bench = Bench("feedback", {}, {})
        bench.router.ratings = {"0": Rating(7, 3), "1": Rating(3, 7)}
        firsts = bench.firsts()

        assert 0.9 < firsts["0"] / sum(firsts.values()) < 1.0

    def test_one_that_nobody_rated_is_tried(self) -> None:
        bench = Bench("feedback", {}, {})
        bench.router.ratings = {"0": Rating(5, 5)}

        assert bench.firsts()["1"] > 500

    def test_what_is_long_ago_leaves_more_open(self) -> None:
        def worse(good: float, bad: float) -> int:
            bench = Bench("feedback", {}, {})
            bench.router.ratings = {"0": Rating(good, bad), "1": Rating(bad, good)}
            return bench.firsts()["1"]

        assert worse(80, 20) < worse(8, 2) < worse(0.8, 0.2)

    def test_order_and_weight_0_go_before_ratings(self) -> None:
        bench = Bench("feedback", {"order": 2}, {"order": 1}, {"order": 1, "weight": 0})
        bench.router.ratings = {"0": Rating(100, 0), "1": Rating(0, 100), "2": Rating(100, 0)}

        assert bench.firsts(50).keys() == {"1"}

    def test_other_strategies_do_not_heed_them(self) -> None:
        bench = Bench("cost", {}, {})
        bench.prices = {"0": 1, "1": 2}
        bench.router.ratings = {"1": Rating(100, 0)}

        assert bench.order() == ["0", "1"]
