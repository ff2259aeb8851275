"""What is kept when not everything fits, and in how much memory."""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path

import pytest
from theine_core import TlfuCore

from actors.cache.policy import ENTRY_OVERHEAD_BYTES, SHELF_OVERHEAD_BYTES, Entries, Scope
from actors.cache.tinylfu import COUNT_MAX, SAMPLE, Sketch

ACME = Scope("acme")
VALUE = b"x" * 100
ENTRY_BYTES = len(VALUE) + ENTRY_OVERHEAD_BYTES


def name(number: int) -> bytes:
    return blake2b(b"%d" % number, digest_size=32).digest()


def room_for(count: int) -> Entries:
    return Entries(count * ENTRY_BYTES + SHELF_OVERHEAD_BYTES)


def asked(entries: Entries, number: int, now: float = 0.0, value: bytes = VALUE) -> bool:
    """A look-up, and what follows a miss; whether it was a hit."""
    if entries.get(name(number), ACME, now) is not None:
        return True
    entries.put(name(number), ACME, value, 60, now)
    return False


def holds(entries: Entries, numbers: range, now: float = 0.0) -> int:
    return sum(entries.get(name(number), ACME, now) is not None for number in numbers)


# ----------------------------------------------------------------------------------------- order


def test_a_scan_does_not_wash_away_what_is_asked_for_again() -> None:
    entries = room_for(1000)
    for _ in range(10):
        for number in range(500):
            asked(entries, number)
    for number in range(10_000, 12_000):
        asked(entries, number)
    assert holds(entries, range(500)) >= 450


def test_what_was_popular_once_gives_way_to_what_is_now() -> None:
    entries = room_for(300)
    for _ in range(20):
        for number in range(200):
            asked(entries, number)
    for _ in range(40):
        for number in range(1000, 1250):
            asked(entries, number)
    assert holds(entries, range(1000, 1250)) >= 230


def test_the_newest_is_there_for_those_who_ask_at_once() -> None:
    entries = room_for(100)
    for _ in range(5):
        for number in range(100):
            asked(entries, number)
    for number in range(1000, 1100):
        asked(entries, number)
        assert asked(entries, number)


def test_a_large_answer_asked_for_once_takes_nobodys_place() -> None:
    entries = room_for(1000)
    for _ in range(2):
        for number in range(1000):
            asked(entries, number)
    before = len(entries)
    large = bytes(entries.bytes_max // 10)
    assert not entries.put(name(5000), ACME, large, 60, 0.0)
    assert len(entries) == before


def test_a_large_answer_is_kept_if_it_is_asked_for_more_often_than_all_it_displaces() -> None:
    size = 5000 + ENTRY_OVERHEAD_BYTES
    entries = Entries(200 * size + SHELF_OVERHEAD_BYTES)
    for number in range(200):
        asked(entries, number, value=bytes(5000))
    kept = [entries.put(name(5000), ACME, bytes(4 * size), 60, 0.0) for _ in range(8)]
    assert kept[:3] == [False] * 3
    assert kept[-1]
    assert len(entries) == 200 - 5 + 1
    assert entries.bytes <= entries.bytes_max


def test_what_has_expired_goes_before_what_has_not() -> None:
    entries = room_for(100)
    for _ in range(5):
        for number in range(50):
            if entries.get(name(number), ACME, 0.0) is None:
                entries.put(name(number), ACME, VALUE, 10, 0.0)
    for number in range(50, 100):
        entries.put(name(number), ACME, VALUE, 100, 0.0)
    for number in range(100, 150):
        entries.put(name(number), ACME, VALUE, 100, 20.0)
    assert holds(entries, range(50, 150), 20.0) == 100


# ---------------------------------------------------------------------------------------- sketch


def test_counts_are_never_too_low_and_survive_a_wider_sketch() -> None:
    sketch = Sketch()
    for number in range(40):
        for _ in range(number % COUNT_MAX):
            sketch.add(name(number))
    before = [sketch.count(name(number)) for number in range(40)]
    assert all(count >= number % COUNT_MAX for number, count in enumerate(before))
    sketch.fit(1000)
    sketch.fit(1000)
    assert [sketch.count(name(number)) for number in range(40)] == before
    for _ in range(100):
        sketch.add(name(1))
    assert sketch.count(name(1)) == COUNT_MAX


def test_counts_fade_by_half_when_a_sample_is_full() -> None:
    sketch = Sketch()
    for _ in range(8):
        sketch.add(name(1))
    full = [sketch.add(name(2)) for _ in range(SAMPLE * 32 - 8)]
    assert full == [False] * (len(full) - 1) + [True]
    sketch.fade(32)
    assert sketch.count(name(1)) == 4
    assert sketch.count(name(2)) == COUNT_MAX // 2
    full = [sketch.add(name(2)) for _ in range(SAMPLE * 16)]
    assert full.index(True) == len(full) - 1


# ------------------------------------------------------------------------------------- hit ratio


def zipf(keys: int, exponent: float, count: int, seed: int) -> list[int]:
    weights = list(itertools.accumulate(1 / (rank + 1) ** exponent for rank in range(keys)))
    return random.Random(seed).choices(range(keys), cum_weights=weights, k=count)


def hit_ratio(trace: list[int], capacity: int) -> float:
    entries = room_for(capacity)
    names = {number: name(number) for number in set(trace)}
    hits = 0
    for number in trace:
        if entries.get(names[number], ACME, 0.0) is not None:
            hits += 1
        else:
            entries.put(names[number], ACME, VALUE, 60, 0.0)
    assert len(entries) <= capacity
    return hits / len(trace)


def theines_hit_ratio(trace: list[int], capacity: int) -> float:
    """The same, by the W-TinyLFU of a library."""
    core, held, hits = TlfuCore(capacity), set[int](), 0
    for number in trace:
        if number in held:
            hits += 1
            core.access([number])
        else:
            held.add(number)
            held.difference_update(core.set([(number, 0)]))
    return hits / len(trace)


@pytest.mark.parametrize("exponent", [0.7, 0.9, 1.1])
def test_of_zipf_traffic_at_ten_times_its_room_as_much_is_hit_as_by_a_library(
    exponent: float,
) -> None:
    capacity = 1000
    trace = zipf(10 * capacity, exponent, 60_000, seed=1)
    ours, theirs = hit_ratio(trace, capacity), theines_hit_ratio(trace, capacity)
    print(f"Zipf {exponent}: hit ratio {ours:.4f}, theine's {theirs:.4f}")
    assert ours >= theirs - 0.02


def moving() -> Iterator[int]:
    """Popularity that moves on: every second request is for something asked for lately."""
    dice = random.Random(1)
    seen: list[int] = []
    for number in range(60_000):
        again = seen and dice.random() < 0.6
        back = min(len(seen), 1 + int(dice.expovariate(1 / 700)))
        seen.append(seen[-back] if again else number)
        yield seen[-1]


def test_traffic_that_moves_on_is_followed_as_well_as_by_a_library() -> None:
    trace = list(moving())
    ours, theirs = hit_ratio(trace, 1000), theines_hit_ratio(trace, 1000)
    print(f"moving on: hit ratio {ours:.4f}, theine's {theirs:.4f}")
    assert ours >= theirs - 0.02


# ---------------------------------------------------------------------------------------- memory

FILL = """
import gc, hashlib, json, os, random, sys
from actors.cache.policy import Entries, Scope

def rss():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

kind, bytes_max = sys.argv[1], int(sys.argv[2])
dice = random.Random(1)
sizes = {
    "small": lambda: 40,
    "middle": lambda: dice.randrange(500, 6000),
    "large": lambda: dice.randrange(50_000, 800_000),
    "mixed": lambda: int(min(400_000, 200 * dice.paretovariate(0.9))),
    "tenants": lambda: 100,
}[kind]
entries = Entries(bytes_max)
gc.collect()
before, most, put, number = rss(), 0, 0, 0
while put < 3 * bytes_max:
    scope = Scope(f"tenant {number}" if kind == "tenants" else "acme")
    value = dice.randbytes(sizes())
    key = hashlib.blake2b(b"%d" % number, digest_size=40).digest()
    if number % 3 == 0:
        entries.put(key, scope, value, 60, 0.0)
    entries.put(key, scope, value, 60, 0.0)
    put += len(value) + (2000 if kind == "tenants" else 300)
    number += 1
    if number % 1000 == 0 or len(value) > 50_000:
        most = max(most, rss() - before)
most = max(most, rss() - before)
print(json.dumps({"entries": len(entries), "bytes": entries.bytes, "rss": most}))
"""


@pytest.mark.parametrize("kind", ["small", "middle", "large", "mixed", "tenants"])
def test_memory_in_use_is_what_is_counted(kind: str) -> None:
    bytes_max = 24 * 1024 * 1024
    told = subprocess.run(
        [sys.executable, "-c", FILL, kind, str(bytes_max)],
        capture_output=True,
        check=True,
        cwd=Path(__file__).parents[2],
    ).stdout
    used = json.loads(told)
    over = used["rss"] / bytes_max - 1
    print(f"{kind}: {used['entries']} entries, {over:+.1%} of the bound at the most")
    assert over <= 0.30
    assert used["bytes"] <= bytes_max
    assert used["bytes"] > 0.85 * bytes_max, "and the room is used"
