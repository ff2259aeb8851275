"""Jobs without Ray: accounts, patience, vectors of a block, censuses, plans, templates, schemas."""

from __future__ import annotations

import argparse
import io
import json
import math
import random
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import csv

from forebay import errors
from forebay.call import Facts, Result
from forebay.codec import Answer
from forebay.pipelines import claim, commands, structured
from forebay.pipelines.account import Account, Done
from forebay.pipelines.api import _chat_setting, _embed_setting
from forebay.pipelines.census import Census, count, total
from forebay.pipelines.embedding import fixed_size
from forebay.pipelines.estimate import Range, Rates, chat_plan, embedding_plan, tokens_in
from forebay.pipelines.generating import GenerateWork, _Row
from forebay.pipelines.job import Watch
from forebay.pipelines.patience import Patience, kind_of
from forebay.pipelines.places import apart, destination, named, reading, source
from forebay.pipelines.progress import line
from forebay.pipelines.resume import left
from forebay.pipelines.sink import write_table
from forebay.pipelines.template import MissingValue, Template
from forebay.pipelines.vectors import EMPTY, Got, embed_rows, words_of

# ------------------------------------------------------------------------------------- account


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 100)), max_size=40))
def test_a_job_never_spends_more_than_it_may(blocks: list[tuple[int, int]]) -> None:
    """Whatever blocks cost in the end, as long as it is no more than was set aside."""
    account, spent, under_way = Account(100), 0, []
    for number, (most, share) in enumerate(blocks):
        answer = account.begin(str(number), most, 1)
        if answer == "go":
            under_way.append((str(number), most * share // 100))
        elif under_way:
            name, cost = under_way.pop(0)
            account.end(name, Done(rows=1, cost_nano=cost))
            spent += cost
        assert spent + sum(cost for _, cost in under_way) <= 100
    assert account.figures().cost_nano == spent


def test_money_is_used_up_when_nothing_under_way_can_give_any_back() -> None:
    account = Account(100)
    assert account.begin("a", 80, 1) == "go"
    assert account.begin("b", 30, 1) == "wait"
    account.end("a", Done(rows=1, cost_nano=60))
    assert account.begin("b", 30, 1) == "go"
    account.end("b", Done(rows=1, cost_nano=30))
    assert account.begin("c", 30, 1) == "stop"
    assert account.begin("d", 1, 1) == "stop"
    assert account.figures().stopped == "money"


def test_what_is_said_twice_is_counted_once() -> None:
    account = Account(100, 100)
    for _ in range(2):
        assert account.begin("a", 50, 5) == "go"
    for _ in range(2):
        account.end("a", Done(rows=5, failed=1, tokens=7, cost_nano=50, cached=2, repeated=1))
        account.written("file", 5)
    figures = account.figures()
    assert (figures.rows, figures.failed, figures.tokens, figures.cost_nano) == (5, 1, 7, 50)
    assert (figures.cached, figures.repeated, figures.blocks) == (2, 1, 1)
    assert account.begin("b", 50, 100) == "go"


def test_what_a_dead_worker_had_under_way_counts_as_spent_and_is_waited_for_no_more() -> None:
    account = Account(most_nano=100, unwritten_max=10)
    account.began("one")
    assert account.begin("one-a", 60, 10) == "go"
    assert account.begin("two-b", 50, 10) == "full"
    account.began("one")
    account.began("one")
    assert account.begin("two-c", 40, 10) == "go"
    assert account.begin("two-d", 10, 10, patient=False) == "wait"
    account.end("two-c", Done(10, 0, 10, 40))
    assert account.begin("two-d", 10, 10, patient=False) == "stop"


def test_what_a_dead_worker_said_last_is_not_counted_beside_its_most() -> None:
    account = Account(most_nano=100)
    assert account.begin("one-a", 60, 10) == "go"
    account.began("one")
    account.end("one-a", Done(10, 0, 10, 20))
    assert account.begin("one-b", 80, 10) == "go"


def test_rows_that_are_not_written_keep_others_back() -> None:
    account = Account(None, 10)
    assert account.begin("a", 0, 6) == "go"
    assert account.begin("b", 0, 6) == "full"
    account.end("a", Done(rows=6))
    assert account.begin("b", 0, 6) == "full"
    assert account.begin("c", 0, 6, patient=False) == "go"
    account.end("c", Done(rows=6))
    account.written("x", 6)
    assert account.begin("b", 0, 4) == "go"


def test_an_error_that_all_would_meet_stops_the_job_and_is_told() -> None:
    account, error = Account(), errors.AuthenticationError("no key")
    account.begin("a", 0, 1)
    account.fail("a", error, Done(rows=2, cost_nano=None))
    account.fail("b", errors.ModelNotFound("x"), Done())
    figures = account.figures()
    assert account.begin("c", 0, 1) == "stop"
    assert (figures.stopped, figures.error, figures.rows) == ("error", error, 2)
    assert figures.unpriced


def refused(rows: int, words: str) -> Done:
    return Done(rows=rows, failed=rows, refused=rows, refusal=words)


def test_first_rows_that_all_fail_alike_stop_the_job() -> None:
    account = Account(hopeless_rows=16)
    assert account.end("a", refused(10, "400: no such size")) is None
    error = account.end("b", refused(6, "400: no such size"))
    assert "first 16 rows" in str(error)
    assert "no such size" in str(error)
    assert account.begin("c", 0, 1) == "stop"
    assert account.figures().stopped == "error"


@pytest.mark.parametrize(
    "blocks",
    [
        [Done(rows=1), refused(99, "400: x")],
        [refused(10, "400: x"), refused(99, "content_filter: x")],
        [Done(rows=99, failed=99)],  # without texts
        [refused(15, "400: x")],
    ],
)
def test_other_failures_do_not(blocks: list[Done]) -> None:
    account = Account(hopeless_rows=16)
    assert [account.end(str(number), done) for number, done in enumerate(blocks)] == [None] * len(
        blocks
    )
    assert account.begin("z", 0, 1) == "go"
    retried = Account()
    assert retried.end("a", refused(99, "400: x")) is None


# ------------------------------------------------------------------------------------ patience


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (errors.InvalidRequest("x"), "row"),
        (errors.InvalidRequest.about("input[3]", "x"), "row"),
        (errors.InvalidRequest.about("dimensions", "x"), "job"),
        (errors.RequestTooLarge("x"), "row"),
        (errors.ResponseValidationError("x"), "row"),
        (errors.ProviderError("x", upstream_status=422), "row"),
        (errors.ProviderError("x", upstream_status=401), "job"),
        (errors.AuthenticationError("x"), "job"),
        (errors.BudgetExceeded("x", retry_after_s=9), "job"),
        (errors.RateLimitError("x", retry_after_s=9), "passing"),
        (errors.ProviderError("x"), "passing"),
        (errors.CircuitBreakerOpenError("x"), "passing"),
        (errors.Overloaded("x"), "passing"),
        (errors.GatewayTimeout("x"), "passing"),
    ],
)
def test_whose_failure_it_is(error: errors.GatewayError, kind: str) -> None:
    assert kind_of(error) == kind


class World:
    """A provider that refuses some texts, fails as it is told, and remembers what it was asked."""

    def __init__(self, *failures: errors.GatewayError, bad: Sequence[str] = ()) -> None:
        self.failures, self.bad = list(failures), bad
        self.searches = False
        self.asked: list[list[str]] = []
        self.pauses: list[float] = []

    async def send(self, texts: Sequence[str], partial: bool = False) -> Got:
        self.asked.append(list(texts))
        if self.failures:
            raise self.failures.pop(0)
        refused = errors.InvalidRequest("'$.input' is invalid")
        bad = {place: refused for place, text in enumerate(texts) if text in self.bad}
        if bad and (not (self.searches and partial) or len(bad) == len(texts)):
            raise refused
        array = np.array([[len(text), ord(text[0])] for text in texts], np.float32)
        good = [text for text in texts if text not in self.bad]
        return Got(array, sum(map(len, good)), 10 * len(good), 1, bad)

    async def pause(self, seconds: float) -> None:
        self.pauses.append(seconds)

    def patience(self) -> Patience:
        return Patience(self.pause, random.Random(1), most_s=60)


async def test_a_block_is_sent_at_once_and_keeps_its_order() -> None:
    world = World()
    rows = await embed_rows(["b", None, "ccc", " "], world.send, world.patience())

    assert world.asked == [["b", "ccc"]]
    assert rows.errors == [None, EMPTY, None, EMPTY]
    vectors = [None if vector is None else vector.tolist() for vector in rows.vectors]
    assert vectors == [[1, 98], None, [3, 99], None]
    assert rows.tokens == [1, 0, 3, 0]
    assert (rows.cost_nano, rows.cached, rows.halted) == (20, 1, None)


@given(st.lists(st.booleans(), min_size=1, max_size=60))
async def test_exactly_the_bad_texts_fail_and_no_good_one_is_paid_twice(bad: list[bool]) -> None:
    texts = [f"{number} text" for number in range(len(bad))]
    world = World(bad=[text for text, is_bad in zip(texts, bad, strict=True) if is_bad])
    rows = await embed_rows(texts, world.send, world.patience())

    assert [error is not None for error in rows.errors] == bad
    assert [vector is None for vector in rows.vectors] == bad
    assert rows.cost_nano == 10 * bad.count(False)


async def test_bad_texts_that_are_named_are_not_searched_for() -> None:
    world = World(bad=["b", "d"])
    world.searches = True
    rows = await embed_rows(["a", "b", None, "c", "d"], world.send, world.patience())

    assert world.asked == [["a", "b", "c", "d"]]
    assert [error is None for error in rows.errors] == [True, False, False, True, False]
    assert [vector is None for vector in rows.vectors] == [False, True, True, False, True]
    assert "is invalid" in (rows.errors[1] or "")
    assert (rows.tokens, rows.cost_nano) == ([1, 0, 0, 1, 0], 20)


async def test_who_refuses_every_row_is_not_asked_about_all_of_them() -> None:
    texts = [f"{number} text" for number in range(2048)]
    world = World(bad=texts)
    rows = await embed_rows(texts, world.send, world.patience(), doubtful=True)

    assert len(world.asked) == 17
    assert "first 16 rows" in str(rows.halted)
    assert not any(rows.errors)


@given(st.integers(0, 99), st.integers(1, 60))
async def test_a_doubtful_block_has_each_of_its_bad_rows_found(first: int, count: int) -> None:
    texts = [f"{number} text" for number in range(100)]
    bad = [text for place, text in enumerate(texts) if first <= place < first + count]
    world = World(bad=bad)
    rows = await embed_rows(texts, world.send, world.patience(), doubtful=True)

    assert rows.halted is None
    for text, vector, error in zip(texts, rows.vectors, rows.errors, strict=True):
        assert (error is not None) == (vector is None) == (text in bad)
    assert rows.cost_nano == 10 * (100 - len(bad))


async def test_passing_failures_are_waited_out() -> None:
    world = World(
        errors.RateLimitError("slow down", retry_after_s=7.0), errors.Overloaded("busy"),
        errors.CircuitBreakerOpenError("is OPEN", retry_after_s=3.0),
    )  # fmt: skip
    rows = await embed_rows(["a", "b"], world.send, world.patience())

    assert rows.halted is None
    assert [len(texts) for texts in world.asked] == [2, 2, 2, 2]
    assert world.pauses[0] == 7.0
    assert 0.5 <= world.pauses[1] <= 1.0
    assert world.pauses[2] == 3.0


async def test_what_does_not_pass_ends_the_job_and_no_row() -> None:
    world = World(*[errors.ProviderError("down", retry_after_s=25.0)] * 10)
    rows = await embed_rows(["a", "b"], world.send, world.patience())

    assert isinstance(rows.halted, errors.ProviderError)
    assert sum(world.pauses) >= 60
    assert rows.errors == [None, None]


async def test_a_job_that_never_did_a_row_soon_gives_up_on_an_outage() -> None:
    """A limit is waited out all the same."""
    waited = []
    for failure in (errors.ProviderError("no connection"), errors.RateLimitError("slow")):
        world = World(*[failure] * 100)
        patience = replace(Patience.of(600, doubtful=True), pause=world.pause)
        failure.retry_after_s = 25.0
        await embed_rows(["a"], world.send, patience)
        waited.append(sum(world.pauses))
    assert 60 <= waited[0] <= 100
    assert waited[1] >= 600
    assert Patience.of(600, doubtful=False).outage_s > 600


async def test_what_took_too_long_or_is_too_much_at_once_is_halved() -> None:
    never = errors.RateLimitError("more tokens than there ever are")
    for failure in (errors.GatewayTimeout("late"), never):
        world = World(failure)
        rows = await embed_rows(["a", "b", "c", "d"], world.send, world.patience())
        assert [len(texts) for texts in world.asked] == [4, 2, 2]
        assert all(vector is not None for vector in rows.vectors)


async def test_a_refused_key_is_asked_for_once() -> None:
    world = World(errors.AuthenticationError("no"))
    rows = await embed_rows(["a", "b", "c"], world.send, world.patience())
    assert len(world.asked) == 1
    assert isinstance(rows.halted, errors.AuthenticationError)


async def test_vectors_of_two_lengths_do_not_mix() -> None:
    sizes = iter([3, 2])

    async def send(texts: Sequence[str], partial: bool) -> Got:
        if len(texts) == 2:
            raise errors.GatewayTimeout("late")
        return Got(np.ones((1, next(sizes)), np.float32), 1, 0)

    patience = Patience(World().pause, random.Random(1), most_s=0)
    rows = await embed_rows(["a", "b"], send, patience)
    assert "different lengths" in str(rows.halted)


# -------------------------------------------------------------------------- census and estimate


def test_a_census_counts_duplicates_and_finds_an_id_that_is_there_twice() -> None:
    blocks = [
        count(["a", "b", None, "a"], np.array([1, 2, 3, 4])),
        count(["ü", " ", "b"], np.array([5, 6, 2])),
    ]
    census = total(blocks)
    assert (census.rows, census.empty, census.duplicates, census.size) == (7, 2, 2, 6)
    assert census.twice is not None
    assert total(blocks[:1]).twice is None
    assert total([]).rows == 0


def test_beyond_what_is_kept_the_share_of_duplicates_is_estimated() -> None:
    blocks = [
        count([f"text {i % 5000}" for i in range(s, s + 500)], None) for s in range(0, 10_000, 500)
    ]
    assert total(blocks).duplicates == 5000
    assert total(blocks, hashes_max=1000).duplicates == pytest.approx(5000, rel=0.15)
    assert len(total(blocks).sample) <= 2000


def test_tokens_are_a_range_around_what_a_sample_says() -> None:
    dice = random.Random(3)
    sizes = [dice.randint(10, 200) for _ in range(2000)]
    truth = [max(1, size // dice.randint(3, 5)) for size in sizes]
    census = Census(2000, 0, 0, sum(sizes), (), None)
    range_ = tokens_in(census, list(zip(sizes, truth, strict=True))[:200], exact=True)
    assert range_.low <= sum(truth) <= range_.high
    assert range_.high < 1.1 * range_.low
    foreign = tokens_in(census, list(zip(sizes, truth, strict=True))[:200], exact=False)
    assert foreign.low < foreign.likely < range_.likely
    assert foreign.high == pytest.approx(range_.high)
    assert tokens_in(total([]), [], exact=True) == Range(0, 0, 0)


def test_duplicates_and_finished_rows_make_a_plan_cheaper() -> None:
    rates = Rates(100.0, 200.0, rpm=60, tpm=6000, items_max=100)
    census = Census(1000, 0, 250, 4000, ("abcd",), None)
    tokens = tokens_in(census, [(4, 1)] * 50, exact=True)
    plan = embedding_plan(census, tokens, rates, done=500)
    assert (plan.calls, plan.done) == (5, 500)
    assert plan.tokens == Range(375, 500, 500)
    assert plan.cost_usd is not None
    assert plan.cost_usd.high == pytest.approx(500 * 100e-9)
    assert plan.time_s == pytest.approx(5)
    unknown = embedding_plan(census, tokens, Rates(None, None), done=0)
    assert (unknown.cost_usd, unknown.time_s) == (None, None)


def test_a_chat_plan_has_a_call_and_an_answer_for_each_row() -> None:
    census = Census(100, 10, 0, 400, ("abcd",), None)
    tokens = tokens_in(census, [(4, 1)], exact=True, extra=8)
    plan = chat_plan(census, tokens, Range(1, 2, 10), Rates(1.0, 10.0, rpm=30), done=0)
    assert plan.calls == 90
    assert plan.completion_tokens == Range(90, 180, 900)
    assert plan.cost_usd is not None
    assert plan.cost_usd.high == pytest.approx((plan.tokens.high + 9000) / 1e9)
    assert plan.time_s == 180


# ---------------------------------------------------------------------------- columns and files


def test_vectors_are_a_fixed_size_list_with_nulls() -> None:
    array = fixed_size([None, np.array([1, 2], np.float32), None])
    assert array.type == pa.list_(pa.float32(), 2)
    assert array.to_pylist() == [None, [1.0, 2.0], None]
    assert fixed_size([None, None]).type == pa.null()
    assert len(fixed_size([])) == 0


def test_files_hold_vectors_in_every_format() -> None:
    vector = np.array([0.1, 1], np.float32)
    table = pa.table({"id": [1, 2], "embedding": fixed_size([vector, None])})
    lines, sheet = io.BytesIO(), io.BytesIO()
    write_table(table, lines, "jsonl")
    write_table(table, sheet, "csv")
    first, second = map(json.loads, lines.getvalue().splitlines())
    assert first == {"id": 1, "embedding": [0.1, 1.0]}
    assert second == {"id": 2, "embedding": None}
    back = csv.read_csv(io.BytesIO(sheet.getvalue()))
    assert np.array_equal(np.float32(json.loads(back["embedding"][0].as_py())), vector)


def test_bytes_are_base64_where_a_format_has_none() -> None:
    table = pa.table({"image": [b"\xff\xd8", None], "parts": [[b"\xff"], []]})
    lines, sheet = io.BytesIO(), io.BytesIO()
    write_table(table, lines, "jsonl")
    write_table(table, sheet, "csv")
    assert json.loads(lines.getvalue().splitlines()[0]) == {"image": "/9g=", "parts": ["/w=="]}
    back = csv.read_csv(io.BytesIO(sheet.getvalue())).to_pylist()
    assert back[0] == {"image": "/9g=", "parts": '["/w=="]'}


def test_a_template_names_columns() -> None:
    template = Template.of("{a}: {{b}} {a} {c}")
    assert template.columns == ("a", "c")
    assert template.fill({"a": 1, "c": "x"}) == "1: {b} 1 x"
    with pytest.raises(MissingValue, match="'c' is empty"):
        template.fill({"a": 1, "c": None})
    with pytest.raises(errors.ConfigurationError, match="no column 'c'; there are a"):
        template.require(["a"])
    for wrong in ("plain", "{a", "{}", "{a!r}", "{a:>3}"):
        with pytest.raises(errors.ConfigurationError, match="prompt"):
            Template.of(wrong)


SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "n": {"type": ["integer", "null"]},
        "x": {"type": "number"},
        "tags": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["x"],
}


NAMED = {"type": "object", "properties": {"name": {"type": "string"}, "x": {"type": "number"}}}


def test_answers_by_schema_become_columns() -> None:
    structured.check(SCHEMA)
    row = structured.read('{"n": 2.0, "x": 1, "tags": ["a"]}', SCHEMA)
    made = structured.columns(SCHEMA, [row, None, {"x": 0.5}])
    assert made["n"].to_pylist() == [2, None, None]
    assert made["n"].type == pa.int64()
    assert made["x"].to_pylist() == [1.0, None, 0.5]
    assert made["tags"].to_pylist() == ['["a"]', None, None]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("hello", "no JSON"),
        ("{}", "not by the schema"),
        ('{"x": 1, "n": 1e30}', "too large"),
        (f'{{"x": {10**400}}}', "too large"),
        ("[" * 100_000, "too deeply"),
    ],
)
def test_an_answer_that_is_not_by_the_schema_says_why(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        structured.read(text, SCHEMA)


def test_half_an_emoji_spoils_no_column() -> None:
    row = structured.read('{"name": "a \\ud83d", "x": 1}', NAMED)
    assert structured.columns(NAMED, [row])["name"].to_pylist() == ["a \ufffd"]
    assert words_of(errors.GatewayError("no \udc00")).endswith("no \ufffd")
    choice = {"message": {"content": "yes \ud83d"}}
    answer = Answer(body={"choices": [choice]}, usage={}, cost_nano=0, model="m")
    made = _Row()
    asked = GenerateWork(Template.of("{a}"), None)
    asked._take(made, Result(answer, Facts("m")))
    assert made.text == "yes \ufffd"


def test_schemas_that_make_no_columns_are_refused() -> None:
    for wrong in ({"type": "array"}, {"type": "object"}, {"type": "nonsense"}):
        with pytest.raises(errors.ConfigurationError, match="schema"):
            structured.check(wrong)
    for one, words in (({"$ref": "#/$defs/a"}, "defs/a"), ({"pattern": "("}, "not a 'regex'")):
        with pytest.raises(errors.ConfigurationError, match=words):
            structured.check({"type": "object", "properties": {"x": one}})
    with pytest.raises(errors.ConfigurationError, match="called 'x'"):
        structured.check(SCHEMA, ("x",))


def test_places_are_known_by_their_endings(tmp_path: Any) -> None:
    for name in ("a.csv", "b.csv"):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_text("x\n1\n")
    (tmp_path / "in" / "_hidden.txt").write_text("")
    assert source(tmp_path / "in").format == "csv"
    assert source(tmp_path / "in" / "a.csv").format == "csv"
    place = destination(tmp_path / "out.jsonl")
    assert (place.format, place.beside_inner("x")) == ("jsonl", f"{tmp_path}/out.jsonl.forebay/x")
    assert destination(tmp_path / "plain").format == "parquet"
    (tmp_path / "in" / "c.parquet").write_text("")
    for path, words in ((tmp_path / "in", "of one kind"), (tmp_path / "no", "nothing at")):
        with pytest.raises(errors.ConfigurationError, match=words):
            source(path)
    with pytest.raises(errors.ConfigurationError, match="is a file"):
        destination(tmp_path / "in" / "a.csv")
    with pytest.raises(errors.ConfigurationError, match="cannot be written"):
        destination("/proc/forebay/out")


def test_what_a_reader_says_is_found_in_what_ray_makes_of_it() -> None:
    trace = (
        'ray::ReadCSV()\n  File "x.py", line 1, in read\n    raise ValueError(\n'
        "pyarrow.lib.ArrowInvalid: Expected 2 columns, got 3\nValueError: Failed to read a.csv\n"
        "Failed to read stream after 1/10 attempts.\nTo change retry attempts, see elsewhere.\n"
    )
    raised = RuntimeError("")
    raised.__cause__ = RuntimeError(trace)
    for error, words in (
        (raised, "Failed to read a.csv"),
        (OSError("no such column\nand advice"), "no such column"),
    ):
        with pytest.raises(errors.ConfigurationError) as told, reading("a.csv"):
            raise error
        assert told.value.message == f"src: a.csv cannot be read: {words}"


def test_a_destination_is_not_in_its_source(tmp_path: Any) -> None:
    (tmp_path / "in.csv").write_text("x\n1\n")
    folder = source(tmp_path)
    for name in ("", "out", "a/b"):
        with pytest.raises(errors.ConfigurationError, match="is in the source"):
            apart(folder, named(tmp_path / name))
    apart(folder, named(f"{tmp_path}-out"))
    apart(source(tmp_path / "in.csv"), named(tmp_path / "in.csv-out"))


def test_only_a_job_that_was_there_has_a_dead_letter(tmp_path: Any) -> None:
    with pytest.raises(errors.ConfigurationError, match="no job has written to"):
        claim.known(named(tmp_path / "out"), {"model": "m"})
    assert list(tmp_path.iterdir()) == []
    place = destination(tmp_path / "out")
    claim.take(place, {"model": "m"}, resume=True)
    claim.known(place, {"model": "m"})
    with pytest.raises(errors.ConfigurationError, match="is of a job with model 'm', not 'n'"):
        claim.known(place, {"model": "n"})


def test_arguments_that_make_no_job_are_refused() -> None:
    def embed(**changed: Any) -> None:
        usual: dict[str, Any] = {"dimensions": None, "on_error": "raise", "max_cost_usd": None}
        usual |= {"workers": 1, **changed}
        _embed_setting(
            "", "text", "m", "id", None, usual["dimensions"], usual["on_error"],
            usual["max_cost_usd"], usual["workers"], "forebay",
        )  # fmt: skip

    for name, value in (
        ("dimensions", 0), ("on_error", "ignore"), ("max_cost_usd", 0), ("workers", 0),
        ("max_cost_usd", math.inf),
    ):  # fmt: skip
        with pytest.raises(errors.ConfigurationError, match=name):
            embed(**{name: value})
    for parameters, words in (({"stream": True}, "stream"), ({}, "max_cost_usd needs max_tokens")):
        with pytest.raises(errors.ConfigurationError, match=words):
            _chat_setting("", "{a}", "m", None, "id", None, "raise", 1.0, 1, "forebay", parameters)


def test_progress_fits_a_line() -> None:
    account = Account()
    account.end("a", Done(rows=50, failed=2, tokens=500, cost_nano=10**7, cached=5, repeated=10))
    census = Census(200, 0, 0, 800, (), None)
    plan = embedding_plan(census, Range(1, 2, 3), Rates(1.0, 1.0), done=50)
    said = line(account.figures(), plan, 10.0)
    assert "100/200 rows  5 rows/s  50 tokens/s  $0.0100  10% cached  20% repeated" in said
    assert "2 failed  0:20 left" in said
    assert said.count("#") == said.count(".") - 1  # the bar is half full; one point is the money's


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_what_ended_a_job_stands_below_its_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*_: Any, watch: Watch, **__: Any) -> Any:
        plan = embedding_plan(Census(2, 0, 0, 8, (), None), Range(1, 2, 3), Rates(1.0, 1.0), 0)
        watch(Account().figures(), plan, 1.0)
        raise errors.GatewayError("all is lost")

    def attached(_: Any) -> None:
        pass

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(commands, "_attach", attached)
    names = ("model", "id_column", "tenant", "max_cost", "workers", "block_rows", "config")
    given = dict.fromkeys((*names, "dry_run", "retry_dead_letter", "resume", "json"))
    arguments = argparse.Namespace(src="a.csv", dst="out", **given)
    with pytest.raises(errors.GatewayError):
        commands._run(arguments, {}, run, run)
    assert terminal.getvalue().endswith("\n")
    arguments.dry_run = arguments.retry_dead_letter = True
    with pytest.raises(errors.ConfigurationError, match="not of failed rows"):
        commands._run(arguments, {}, run, run)


def test_finished_rows_are_left_out() -> None:
    for done, ids in (([2, 5, 9], [9, 1, 5, 10]), (["b", "x"], ["x", "a", "b", "z"]), ([], [1])):
        known, asked = np.array(done, object), np.array(ids, object)
        assert left(known, asked).tolist() == [one not in done for one in ids]


def test_columns_are_checked_before_anything_is_sent() -> None:
    setting = _embed_setting("", "t", "m", "id", None, None, "raise", None, 1, "forebay")
    good = {"id": pa.int64(), "t": pa.dictionary(pa.int32(), pa.string())}
    setting.check_columns(good, "here")
    for changed, words in (
        ({"t": pa.list_(pa.string())}, "holds list"),
        ({"t": pa.int64()}, "holds int64"),
        ({"tokens": pa.int64()}, "'tokens' already"),
        ({"id": pa.list_(pa.int64())}, "holds list<item: int64>, no ids"),
    ):
        with pytest.raises(errors.ConfigurationError, match=words):
            setting.check_columns({**good, **changed}, "here")
    with pytest.raises(errors.ConfigurationError, match="no column 'id' in here; there are t"):
        setting.check_columns({"t": pa.string()}, "here")
    setting.check_columns({**good, "tokens": pa.int64()}, "here", adds=False)
