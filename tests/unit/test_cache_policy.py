from __future__ import annotations

import json
import pickle
import random
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from actors.cache import policy
from actors.cache.policy import (
    ENTRY_OVERHEAD_BYTES,
    SHELF_OVERHEAD_BYTES,
    Ask,
    Entries,
    Failed,
    Flights,
    Follow,
    Gone,
    Landed,
    Lead,
    Miss,
    Scope,
    Sweep,
    Swept,
    key,
)
from actors.cache.tinylfu import Segment

ACME = Scope("acme")
BODY = {
    "messages": [{"role": "user", "content": "Hello, wörld"}],
    "temperature": 0,
    "max_tokens": 10,
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"minimum": 1}}}],
}

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=12,
)
bodies = st.dictionaries(
    st.text(max_size=6).filter(lambda name: name not in policy.TRANSPORT_FIELDS),
    json_values,
    max_size=4,
)


def respelled(value: Any, dice: random.Random) -> Any:
    """The same JSON value: other field order, other form of the same number."""
    if isinstance(value, dict):
        items = [(name, respelled(inner, dice)) for name, inner in value.items()]
        dice.shuffle(items)
        return dict(items)
    if isinstance(value, list):
        return [respelled(inner, dice) for inner in value]
    if type(value) is int and abs(value) <= 2**53 and dice.random() < 0.5:
        return float(value)
    return value


def meaning(value: Any) -> Any:
    """A form that two values share exactly if they are the same JSON value."""
    if isinstance(value, bool) or value is None:
        return ("word", value)
    if isinstance(value, int):
        return ("number", value)
    if isinstance(value, float):
        return ("number", int(value) if value.is_integer() and abs(value) < 2**63 else value)
    if isinstance(value, str):
        return ("text", value)
    if isinstance(value, list):
        return ("list", [meaning(inner) for inner in value])
    return ("dict", sorted((name, repr(meaning(inner))) for name, inner in value.items()))


@given(bodies, st.randoms(use_true_random=False))
def test_equal_requests_in_different_spelling_share_a_key(body: Any, dice: random.Random) -> None:
    twin = respelled(body, dice) | {
        "stream": True,
        "user": "u",
        "metadata": {"a": 1},
        "extra": None,
    }
    body.pop("extra", None)
    assert key(ACME, "chat", "m", body) == key(ACME, "chat", "m", twin)


@given(bodies, bodies)
def test_different_requests_have_different_keys(one: Any, other: Any) -> None:
    def top(body: Any) -> Any:
        return meaning({name: value for name, value in body.items() if value is not None})

    same = key(ACME, "chat", "m", one) == key(ACME, "chat", "m", other)
    assert same == (top(one) == top(other))


CHANGES: list[dict[str, Any]] = [
    {"temperature": 0.1},
    {"temperature": "0"},
    {"max_tokens": 11},
    {"top_p": 1},
    {"seed": 2**60},
    {"seed": 2**60 + 1},
    {"seed": 10**30},
    {"stop": []},
    {"stop": ""},
    {"logprobs": True},
    {"logprobs": 1},
    {"n": 1},
    {"response_format": {"type": "json_object"}},
    {"messages": [{"role": "system", "content": "Hello, wörld"}]},
    {"messages": [{"role": "user", "content": "Hello, wo\u0308rld"}]},
    {"messages": [{"role": "user", "content": "Hello, wörld "}]},
    {"messages": [{"role": "user", "content": "\ud800"}]},
    {"messages": [{"role": "user", "content": "\\ud800"}]},
    {"tools": []},
]


@pytest.mark.parametrize("change", CHANGES)
def test_each_difference_in_meaning_splits_the_key(change: dict[str, Any]) -> None:
    assert key(ACME, "chat", "m", {**BODY, **change}) != key(ACME, "chat", "m", BODY)


def test_no_pair_of_those_differences_collides() -> None:
    keys = {key(ACME, "chat", "m", {**BODY, **change}) for change in CHANGES}
    assert len(keys) == len(CHANGES)


def test_route_and_model_split_the_key() -> None:
    whole = key(ACME, "chat", "m", BODY)
    assert key(ACME, "completion", "m", BODY) != whole
    assert key(ACME, "chat", "n", BODY) != whole
    assert key(ACME, "cha", "tm", BODY) != whole
    assert key(ACME, "chat", "m", BODY, "deployment one") != whole
    assert len(whole) == 40


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Scope("a"), Scope("a:b")),
        (Scope(""), Scope(None)),
        (Scope("everybody"), Scope(None)),
        (Scope("a"), Scope("A")),
        (Scope("a\0"), Scope("a")),
    ],
)
def test_scopes_never_share_a_key(one: Scope, other: Scope) -> None:
    assert key(one, "chat", "m", BODY) != key(other, "chat", "m", BODY)


@given(st.text(), st.text(), st.text(), st.text())
def test_a_tenants_name_cannot_spell_another_scope_and_route(
    a: str, b: str, c: str, d: str
) -> None:
    same = key(Scope(a), b, "m", {}) == key(Scope(c), d, "m", {})
    assert same == ((a, b) == (c, d))


def test_a_forged_field_does_not_change_the_scope() -> None:
    forged = {**BODY, "tenant": "other", "scope": "everybody"}
    assert key(ACME, "chat", "m", forged) != key(Scope("other"), "chat", "m", BODY)
    assert key(ACME, "chat", "m", forged) != key(Scope("other"), "chat", "m", forged)


def test_what_json_cannot_say_is_an_error() -> None:
    with pytest.raises(ValueError, match="not a JSON number"):
        key(ACME, "chat", "m", {"temperature": float("nan")})


def test_a_body_parsed_from_json_keys_like_one_made_in_python() -> None:
    assert key(ACME, "chat", "m", json.loads(json.dumps(BODY))) == key(ACME, "chat", "m", BODY)


# ------------------------------------------------------------------------------------------ entries


def in_order(segment: Segment) -> list[bytes]:
    """The keys of a segment, by its links in both directions."""
    there, back = [], []
    entry = segment.after
    while entry is not segment:
        there.append(entry.key)
        entry = entry.after
    entry = segment.before
    while entry is not segment:
        back.append(entry.key)
        entry = entry.before
    assert there == back[::-1]
    return there


class Shelves(RuleBasedStateMachine):
    """Many tenants put, read and wait, in a cache that is far too small for them."""

    bytes_max = 100 * ENTRY_OVERHEAD_BYTES

    def __init__(self) -> None:
        super().__init__()
        self.entries = Entries(self.bytes_max, scope_share=0.6)
        self.now = 0.0
        self.truth: dict[tuple[str | None, bytes], tuple[bytes, float]] = {}
        self.sweeps: list[Iterator[int]] = []

    scopes = st.sampled_from([None, "a", "b", "a:b", "everybody"]).map(Scope)
    keys = st.builds(
        lambda n, model: n.to_bytes(32, "big") + policy.model_mark(model),
        st.integers(0, 40),
        st.sampled_from(["one", "other"]),
    )

    @rule(scope=scopes, key=keys, size=st.integers(0, 9000), ttl_s=st.integers(-1, 50))
    def put(self, scope: Scope, key: bytes, size: int, ttl_s: int) -> None:
        value = f"{scope.tenant} {size} ".encode().ljust(size, b".")
        kept = self.entries.put(key, scope, value, ttl_s, self.now)
        self.truth.pop((scope.tenant, key), None)
        if kept:
            self.truth[scope.tenant, key] = (value, self.now + ttl_s)
        else:
            assert self.entries.get(key, scope, self.now) is None
        if ttl_s <= 0 or len(value) + ENTRY_OVERHEAD_BYTES > self.bytes_max // 8:
            assert not kept
        elif size == 0:  # smaller than any window
            assert kept

    @rule(scope=scopes, key=keys)
    def get(self, scope: Scope, key: bytes) -> None:
        hit = self.entries.get(key, scope, self.now)
        if hit is not None:
            value, expires_s = self.truth[scope.tenant, key]
            assert hit.value == value
            assert self.now < expires_s

    @rule(
        scope=st.none() | scopes,
        model=st.none() | st.sampled_from(["one", "other", "another"]),
        key=st.none() | keys,
    )
    def invalidate(self, scope: Scope | None, model: str | None, key: bytes | None) -> None:
        before = len(self.entries)
        sweep = Sweep.of(scope, model, key)
        dropped = self.entries.invalidate(sweep)
        assert len(self.entries) == before - dropped
        assert self.entries.invalidate(sweep) == 0
        self._forget(scope, model, key)

    @rule(scope=st.none() | scopes, model=st.none() | st.sampled_from(["one", "other"]))
    def begin_to_invalidate(self, scope: Scope | None, model: str | None) -> None:
        self.sweeps.append(self.entries.sweep(Sweep.of(scope, model)))
        self._forget(scope, model, None)

    @rule()
    def go_on(self) -> None:
        self.sweeps = [steps for steps in self.sweeps if next(steps, None) is not None]

    @rule()
    def move(self) -> None:
        for name, scope, hit in self.entries.pop_some(500, self.now):
            value, expires_s = self.truth.pop((scope.tenant, name))
            assert (hit.value, self.now < expires_s) == (value, True)

    def _forget(self, scope: Scope | None, model: str | None, key: bytes | None) -> None:
        for tenant, known in list(self.truth):
            meant = (
                (scope is None or scope.tenant == tenant)
                and (model is None or known.endswith(policy.model_mark(model)))
                and key in (None, known)
            )
            if meant:
                del self.truth[tenant, known]  # `get` looks it up: it must not be there

    @rule(seconds=st.integers(1, 30))
    def wait(self, seconds: int) -> None:
        self.now += seconds

    @invariant()
    def bounds_hold(self) -> None:
        shelves = self.entries._shelves.values()
        assert self.entries.bytes <= self.bytes_max
        assert self.entries.bytes == sum(shelf.bytes for shelf in shelves)
        for shelf in shelves:
            held = sum(one.bytes for one in shelf.entries.values())
            assert 0 < held == shelf.bytes - SHELF_OVERHEAD_BYTES
            assert shelf.bytes <= 0.6 * self.bytes_max
            segments = (shelf._window, shelf._probation, shelf._protected)
            assert held == sum(segment.bytes for segment in segments)
            assert len(shelf.entries) == sum(len(in_order(segment)) for segment in segments)
        assert len(self.entries) == sum(len(shelf.entries) for shelf in shelves)
        assert len(self.entries._largest) <= 2 * len(self.entries._shelves) + 70


TestShelves = Shelves.TestCase
TestShelves.settings = settings(max_examples=50, stateful_step_count=60, deadline=None)


def name(number: int) -> bytes:
    return number.to_bytes(32, "big")


def room_for(count: int, scopes: int = 1) -> int:
    return count * (100 + ENTRY_OVERHEAD_BYTES) + scopes * SHELF_OVERHEAD_BYTES


def test_what_has_expired_of_idle_tenants_makes_room_for_others() -> None:
    entries = Entries(200_000)
    for tenant in range(10):
        for number in range(50):
            entries.put(b"%040d" % number, Scope(f"t{tenant}"), b"v" * 200, 60.0, float(number))
    active, a_day_later = Scope("active"), 86_400.0
    for _ in range(3):
        for number in range(100):
            if entries.get(b"%040d" % number, active, a_day_later) is None:
                entries.put(b"%040d" % number, active, b"v" * 200, 60.0, a_day_later)

    assert all(entries.get(b"%040d" % number, active, a_day_later) for number in range(100))
    assert entries.bytes <= 200_000


def test_a_tenant_within_an_equal_share_is_never_evicted_by_others() -> None:
    entries = Entries(3 * room_for(10))
    for number in range(10):
        assert entries.put(name(number), Scope("small"), b"x" * 100, 60, now=0)
    for number in range(1000):
        entries.put(name(number), Scope(f"big {number % 2}"), b"x" * 100, 60, now=1)
    assert all(entries.get(name(number), Scope("small"), now=2) for number in range(10))
    assert entries.bytes == 3 * room_for(10)
    assert entries.evicted == 980


def test_a_scope_over_its_own_bound_evicts_its_own() -> None:
    entries = Entries(4 * room_for(10), scope_share=0.25)
    entries.put(name(1), Scope("other"), b"x" * 100, 60, now=0)
    for number in range(100):
        entries.put(name(number), ACME, b"x" * 100, 60, now=0)
    assert entries.scope_bytes(ACME) == room_for(10)
    assert entries.get(name(1), Scope("other"), now=0)


def test_an_entry_is_read_until_its_lifetime_ends_and_says_its_age() -> None:
    entries = Entries(room_for(10))
    entries.put(name(1), ACME, b"x", 60, now=100)
    hit = entries.get(name(1), ACME, now=159.5)
    assert hit is not None
    assert hit.age_s == 59.5
    assert entries.get(name(1), ACME, now=160) is None
    assert len(entries) == entries.bytes == 0


def test_the_same_key_under_another_scope_is_another_entry() -> None:
    entries = Entries(room_for(10))
    entries.put(name(1), ACME, b"mine", 60, now=0)
    assert entries.get(name(1), Scope("zenith"), now=0) is None
    assert entries.get(name(1), Scope(None), now=0) is None


# ------------------------------------------------------------------------------------------ flights


def ask(flight: str, number: int = 1, scope: Scope = ACME, silence_s: float = 2.0) -> Ask:
    return Ask(name(number), scope, flight, True, True, silence_s)


def lead(flight: str, number: int = 1) -> Lead:
    return Lead(name(number), ACME, flight)


def test_the_first_leads_and_the_others_follow_it() -> None:
    flights = Flights()
    assert flights.join(ask("a"), now=0) == lead("a")
    assert flights.join(ask("b"), now=1) == Follow("a")
    assert flights.join(ask("c", 2), now=1) == lead("c", 2)
    assert flights.outcome("a") is None
    assert flights.land("a", Landed(b"v"), now=1)
    assert flights.outcome("a") == Landed(b"v")
    assert flights.join(ask("d"), now=1) == lead("d")


def test_scopes_do_not_share_flights_even_under_one_key() -> None:
    flights = Flights()
    flights.join(ask("a"), now=0)
    assert isinstance(flights.join(ask("b", scope=Scope("zenith")), now=0), Lead)


def test_an_ask_that_is_delivered_twice_leads_once() -> None:
    flights = Flights()
    assert flights.join(ask("a"), now=0) == lead("a")
    assert flights.join(ask("a"), now=0) == lead("a")
    flights.land("a", Landed(b"v"), now=0)
    assert flights.join(ask("a"), now=0) == Miss()


def test_a_silent_leader_is_gone_and_one_follower_takes_over() -> None:
    flights = Flights()
    flights.join(ask("a"), now=0)
    flights.join(ask("b"), now=1)
    flights.join(ask("c"), now=1)
    assert flights.lapse(now=1.9) == []
    assert flights.lapse(now=2) == ["a"]
    assert flights.outcome("a") == Gone()
    assert flights.join(ask("b2"), now=2) == lead("b2")
    assert flights.join(ask("c2"), now=2) == Follow("b2")
    assert not flights.land("a", Landed(b"late"), now=3)


def test_a_leader_that_is_heard_of_stays_in_the_air() -> None:
    flights = Flights()
    flights.join(ask("a"), now=0)
    for now in range(1, 10):
        assert flights.renew("a", now)
        assert flights.lapse(now + 0.9) == []
    assert flights.silent_in_s("a", now=10) == 1
    assert flights.lapse(now=11) == ["a"]
    assert not flights.renew("a", now=11)


def test_a_landed_value_is_kept_for_late_followers_only_while_there_are_any() -> None:
    flights = Flights()
    flights.join(ask("a"), now=0)
    flights.land("a", Landed(b"x" * 1000), now=0)
    assert flights.outcome("a") == Gone()
    flights.join(ask("b"), now=0)
    flights.join(ask("c"), now=0)
    flights.land("b", Failed(b"500"), now=0)
    assert flights.outcome("b") == Failed(b"500")
    flights.lapse(now=policy.OUTCOMES_KEPT_S)
    assert flights.outcome("b") == Gone()
    assert flights._outcome_bytes == 0


def test_kept_outcomes_are_bounded_by_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy, "OUTCOMES_BYTES_MAX", 5000)
    flights = Flights()
    for number in range(10):
        flights.join(ask(f"l{number}", number), now=0)
        flights.join(ask(f"f{number}", number), now=0)
        flights.land(f"l{number}", Landed(b"x" * 1000), now=0)
    assert flights._outcome_bytes <= 5000
    assert flights.outcome("l0") == Gone()
    assert flights.outcome("l9") == Landed(b"x" * 1000)


def test_beyond_the_bound_everybody_flies_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy, "FLIGHTS_MAX", 1)
    flights = Flights()
    flights.join(ask("a"), now=0)
    assert flights.join(ask("b", 2), now=0) == Miss()
    assert flights.join(ask("c"), now=0) == Follow("a")


class Crowd(RuleBasedStateMachine):
    """Callers ask, land, fail, fall silent and ask again; at most one leads a key at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.flights = Flights()
        self.now = 0.0
        self.minted = 0
        self.leading: dict[str, int] = {}  # flight → key, by what callers were told
        self.heard: dict[str, float] = {}
        self.following: list[str] = []

    @rule(number=st.integers(0, 3))
    def somebody_asks(self, number: int) -> None:
        self.lapse()
        self.minted += 1
        answer = self.flights.join(ask(f"f{self.minted}", number), self.now)
        leaders = [flight for flight, led in self.leading.items() if led == number]
        if isinstance(answer, Lead):
            assert leaders == []
            self.leading[f"f{self.minted}"] = number
            self.heard[f"f{self.minted}"] = self.now
        else:
            assert answer == Follow(leaders[0])
            self.following.append(leaders[0])

    @rule(which=st.integers(0, 9), well=st.booleans())
    def a_leader_lands(self, which: int, well: bool) -> None:
        if self.leading:
            flight = sorted(self.leading)[which % len(self.leading)]
            outcome = Landed(b"v") if well else Failed(b"e")
            assert self.flights.land(flight, outcome, self.now)
            assert not self.flights.land(flight, Landed(b"again"), self.now)
            del self.leading[flight]
            if flight in self.following:
                assert self.flights.outcome(flight) == outcome

    @rule(which=st.integers(0, 9))
    def a_leader_is_heard_of(self, which: int) -> None:
        if self.leading:
            flight = sorted(self.leading)[which % len(self.leading)]
            assert self.flights.renew(flight, self.now)
            self.heard[flight] = self.now

    @rule(seconds=st.sampled_from([0.5, 1.0, 2.5]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.lapse()

    def lapse(self) -> None:
        gone = set(self.flights.lapse(self.now))
        assert gone == {f for f in self.leading if self.now - self.heard[f] >= 2.0}
        for flight in gone:
            del self.leading[flight]

    @invariant()
    def the_owner_knows_the_leaders(self) -> None:
        assert len(self.flights) == len(self.leading)
        assert all(self.flights.outcome(flight) is None for flight in self.leading)


TestCrowd = Crowd.TestCase
TestCrowd.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)


def test_messages_survive_pickling() -> None:
    for message in (
        ask("a"),
        lead("a"),
        policy.Hit(b"v", 1.5),
        policy.Landing(name(1), ACME, "a", b"v", None, 3.0),
        Landed(b"v"),
        Failed(b"e"),
        Gone(),
        Miss(),
        policy.News((b"p",), Gone()),
    ):
        assert pickle.loads(pickle.dumps(message)) == message


# ------------------------------------------------------------------------------- keys of texts


def test_each_text_of_a_list_has_the_key_that_it_has_alone() -> None:
    body = {"dimensions": 8}
    one, other = policy.text_keys(ACME, "embedding", "m", body, ["x", "y"])
    assert policy.text_keys(ACME, "embedding", "m", body, ["y", "x"]) == [other, one]
    assert policy.text_keys(ACME, "embedding", "m", {"dimensions": 8.0, "user": "u"}, ["x"]) == [
        one
    ]


def test_whatever_else_differs_splits_the_keys_of_texts() -> None:
    def of(scope: Scope = ACME, route: str = "r", model: str = "m", **body: Any) -> bytes:
        text = body.pop("text", "x")
        return policy.text_keys(scope, route, model, body, [text])[0]

    keys = [
        of(),
        of(Scope("a")),
        of(Scope(None)),
        of(route="s"),
        of(model="n"),
        of(dimensions=8),
        of(dimensions=9),
        of(text="y"),
        of(text=""),
        of(text="\ud800"),
        key(ACME, "r", "m", {"input": "x"}),
        key(ACME, "r/text", "m", {}),
    ]
    assert len(set(keys)) == len(keys)


# ------------------------------------------------------------------------- streams, and their ends


def test_pieces_are_bounded_for_one_stream_and_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy, "SPEECH_BYTES_MAX", 3 * (policy.PIECE_OVERHEAD_BYTES + 10))
    monkeypatch.setattr(policy, "SPEECHES_BYTES_MAX", 4 * (policy.PIECE_OVERHEAD_BYTES + 10))
    flights = Flights()
    piece = b"0123456789"
    for number in (1, 2):
        flights.join(Ask(bytes([number]) * 32, ACME, f"d-{number}", True, True, 9.0, True), 0)
    assert flights.say("d-1", 0, [piece] * 3, 0)
    assert not flights.say("d-1", 3, [piece], 0)
    assert flights.say("d-2", 0, [piece], 0)
    assert not flights.say("d-2", 1, [piece], 0)
    flights.land("d-1", Gone(), 0)
    assert flights.say("d-2", 1, [piece], 0)
    assert flights.news("d-2", 0).pieces == (piece, piece)


def test_nothing_of_a_stream_is_left_when_it_is_over() -> None:
    flights = Flights()
    flights.join(Ask(name(1), ACME, "d-1", True, True, 9.0, True), 0)
    flights.join(Ask(name(1), ACME, "e-1", True, True, 9.0, True), 0)
    flights.say("d-1", 0, [b"a"], 0)
    assert flights.heard("d") == ["d-1"]
    flights.land("d-1", Landed(b"a"), 0)
    assert (flights.heard("d"), flights._heard, flights._speech_bytes) == ([], {}, 0)
    assert flights.news("d-1", 1) == policy.News((), Landed(b"a"))


def test_a_hit_says_how_long_it_is_good_and_age_can_be_told() -> None:
    entries = Entries(1_000_000)
    entries.put(name(1), ACME, b"v", 10.0, 100.0, age_s=3.0)
    hit = entries.get(name(1), ACME, 104.0)
    assert hit is not None
    assert (hit.age_s, hit.left_s) == (7.0, 6.0)
    entries.remove(name(1), ACME)
    entries.remove(name(2), ACME)
    assert entries.get(name(1), ACME, 104.0) is None
    assert entries.bytes == 0


# ----------------------------------------------------------------------------------- invalidation

MINE = key(ACME, "chat", "mine", BODY)
OTHERS = key(Scope("other"), "chat", "mine", BODY)


@pytest.mark.parametrize(
    ("sweep", "mine", "others"),
    [
        (Sweep(), True, True),
        (Sweep.of(ACME), True, False),
        (Sweep.of(Scope(None)), False, False),
        (Sweep.of(None, "mine"), True, True),
        (Sweep.of(None, "min"), False, False),
        (Sweep.of(ACME, "mine"), True, False),
        (Sweep.of(ACME, "else"), False, False),
        (Sweep.of(None, None, MINE), True, False),
        (Sweep.of(Scope("other"), None, MINE), False, False),
    ],
)
def test_a_sweep_takes_what_all_of_it_names(sweep: Sweep, mine: bool, others: bool) -> None:
    assert sweep.takes(ACME.mark, MINE) == mine
    assert sweep.takes(Scope("other").mark, OTHERS) == others
    assert pickle.loads(pickle.dumps(sweep)) == sweep


def test_what_was_begun_before_a_sweep_is_not_kept_and_what_began_after_is() -> None:
    swept = Swept()
    assert not swept.forbids(MINE, ACME, 9.0, now=10)
    swept.add(Sweep.of(ACME), now=10)
    assert swept.forbids(MINE, ACME, 10.0, now=11)
    assert not swept.forbids(MINE, ACME, 10.1, now=11)
    assert not swept.forbids(OTHERS, Scope("other"), 9.0, now=11)
    swept.add(Sweep.of(ACME), now=20)
    assert swept.forbids(MINE, ACME, 15.0, now=21)
    assert not swept.forbids(MINE, ACME, 15.0, now=20 + policy.SWEPT_KEPT_S)


def test_too_many_sweeps_are_one_of_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy, "SWEPT_MAX", 3)
    swept = Swept()
    for number in range(3):
        swept.add(Sweep.of(Scope(f"t{number}")), now=number)
    assert not swept.forbids(MINE, ACME, 0.0, now=3)
    swept.add(Sweep.of(Scope("t3")), now=3)
    assert len(swept._times) <= 3
    assert swept.forbids(MINE, ACME, 3.0, now=3)
    assert not swept.forbids(MINE, ACME, 3.5, now=4)


def test_who_asks_after_a_sweep_leads_anew_and_who_followed_still_gets_the_answer() -> None:
    flights = Flights()
    flights.join(ask("a"), now=0)
    flights.join(ask("b"), now=0)
    assert flights.part(Sweep.of(Scope("other"))) == 0
    assert flights.part(Sweep.of(ACME)) == 1
    assert flights.part(Sweep.of(ACME)) == 0
    assert flights.join(ask("c"), now=1) == lead("c")
    assert flights.land("a", Landed(b"old"), now=2)
    assert flights.outcome("a") == Landed(b"old")
    assert flights.join(ask("d"), now=2) == Follow("c")
    assert (flights.begun_s("c"), flights.begun_s("a"), flights.begun_s(None)) == (1, None, None)
