"""Jobs over files: what is written, what is paid, and what a killed one leaves to the next."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import csv, parquet

from forebay import GatewayConfig, LiteLLMGateway, errors, pipelines
from forebay.pipelines.embedding import EmbedWork
from tests.support import system as support
from tests.support.simulator import truth
from tests.support.upstream import Record, Upstream

FULL = os.environ.get("FOREBAY_CHAOS_FULL") == "1"
ROWS, BLOCK = (100_000, 500) if FULL else (800, 20)
KILLS = 2 if FULL else 1
BLOCKS_MAX = 16 + 8
"""Blocks that are sent and not committed, at most: those that `Account.begin` lets be unwritten,
and those of write tasks at once, which two cores have room for."""
JOB_S = 600 if FULL else 120


def written(rows: int, poison: Sequence[int] = (), start: int = 0) -> pa.Table:
    texts = [f"row {i} of the river" + " POISON" * (i in poison) for i in range(start, rows)]
    return pa.table({"id": list(range(start, rows)), "text": texts})


def command(up: support.UpProcess, *arguments: Any) -> list[str]:
    return [sys.executable, "-m", "forebay", *map(str, arguments)]


def forebay(up: support.UpProcess, *arguments: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(up, *arguments),
        env=up.env,
        cwd=support.ROOT,
        capture_output=True,
        text=True,
        timeout=JOB_S,
        check=False,
    )


def paid_texts(log: Sequence[Record]) -> int:
    return sum(record.texts for record in log if record.status == 200)


def answered(folder: Path) -> dict[int, str]:
    lines = [json.loads(line) for file in folder.glob("*.jsonl") for line in file.open()]
    assert len({line["id"] for line in lines}) == len(lines)
    return {line["id"]: line["answer"] for line in lines}


def read(folder: Path) -> pa.Table:
    return parquet.read_table(folder).sort_by("id")


@pytest.mark.ray
@pytest.mark.timeout(1500 if FULL else 120)
def test_a_killed_job_loses_and_doubles_nothing(
    up: support.UpProcess, upstream: Upstream, ray_driver: Any, tmp_path: Path
) -> None:
    """Rows are equal in the end; what is paid twice was under way when the driver was killed."""
    poison = range(7, ROWS, ROWS // 10)
    src, dst = tmp_path / "in.parquet", tmp_path / "out"
    parquet.write_table(written(ROWS, poison), src)
    upstream.script(poison=True, text="POISON", count=10_000_000)
    upstream.script(latency=0.2)
    job: tuple[Any, ...] = ("embed", src, dst, "--model", "sim-embed", "--text-column", "text")
    job = (*job, "--id-column", "id", "--dimensions", 8, "--block-rows", BLOCK, "--json")
    given: dict[str, Any] = {"model": "sim-embed", "text_column": "text", "id_column": "id"}
    given |= {"dimensions": 8, "block_rows": BLOCK}

    for kill in range(1, KILLS + 1):
        with subprocess.Popen(command(up, *job), env=up.env, cwd=support.ROOT) as driver:
            done = tmp_path / "out.forebay" / "job.done"
            wanted = kill * ROWS // BLOCK // (KILLS + 2)
            deadline_s = time.monotonic() + JOB_S
            while len(list(done.glob("*_*[0-9].parquet"))) < wanted:
                assert driver.poll() is None, "the job ended before it was killed"
                assert time.monotonic() < deadline_s
                time.sleep(0.05)
            driver.kill()
    report = pipelines.embed_parquet(src, dst, **given)

    assert report is not None
    table, dead = read(dst), read(dst / "_dead_letter")
    assert KILLS * ROWS // BLOCK // (KILLS + 2) * BLOCK <= report.done_before < ROWS
    assert report.done_before + report.rows == ROWS
    assert report.left == 0
    assert sorted(table["id"].to_pylist() + dead["id"].to_pylist()) == list(range(ROWS))
    assert dead["id"].to_pylist() == list(poison)
    found = np.stack(table["embedding"].to_numpy(zero_copy_only=False))
    np.testing.assert_array_equal(found, truth.vectors(table["text"].to_pylist(), 8))
    paid = paid_texts(upstream.log())
    print(
        f"\npipelines: {ROWS} rows in blocks of {BLOCK}, killed {KILLS} times, with "
        f"{report.done_before} rows done before the last run: {paid} texts answered, "
        f"{paid - ROWS + len(poison)} of them again; {len(dead)} rows in the dead letter"
    )
    assert paid <= ROWS + KILLS * BLOCKS_MAX * BLOCK

    # The provider takes them now, and is asked though the Batcher knows how it refused them.
    upstream.reset()
    again = forebay(up, *job, "--retry-dead-letter")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["rows"] == len(poison)
    assert read(dst)["id"].to_pylist() == list(range(ROWS))


@pytest.mark.ray
def test_a_plan_spends_nothing_and_money_stops_a_job_cleanly(
    up: support.UpProcess, upstream: Upstream, ray_driver: Any, tmp_path: Path
) -> None:
    src, dst = tmp_path / "in", tmp_path / "out.csv"
    src.mkdir()
    csv.write_csv(written(400), src / "a.csv")
    given: dict[str, Any] = {"text_column": "text", "id_column": "id", "model": "priced-embed"}
    given |= {"dimensions": 4}
    job = ("embed", src, dst, "--model", "priced-embed", "--text-column", "text")
    told = forebay(up, *job, "--id-column", "id", "--dimensions", 4, "--dry-run", "--json")
    assert told.returncode == 0, told.stderr
    plan = json.loads(told.stdout)

    assert upstream.log() == []
    assert not dst.exists()
    assert (plan["rows"], plan["duplicates"], plan["calls"]) == (400, 0, 1)
    cost = plan["cost_usd"]
    assert 0 < cost["low"] <= cost["likely"] <= cost["high"]

    most = cost["high"] / 2
    cut = pipelines.embed_parquet(src, dst, block_rows=50, max_cost_usd=most, **given)

    assert cut is not None
    assert cut.stopped == "money"
    assert 0 < cut.rows < 400
    assert cut.left == 400 - cut.rows
    assert cut.cost_usd is not None
    assert cut.cost_usd <= most

    # What is left is done, with rows that are new, and nothing else.
    csv.write_csv(written(420, start=400), src / "b.csv")
    whole = pipelines.embed_parquet(src, dst, block_rows=50, **given)
    assert whole is not None
    assert (whole.done_before, whole.rows) == (cut.rows, 420 - cut.rows)
    assert paid_texts(upstream.log()) == 420
    ids = [id_ for file in dst.glob("*.csv") for id_ in csv.read_csv(file)["id"].to_pylist()]
    assert sorted(ids) == list(range(420))
    with pytest.raises(errors.ConfigurationError, match="dimensions"):
        pipelines.embed_parquet(src, dst, **{**given, "dimensions": 8})


@pytest.mark.ray
def test_a_dataset_gets_its_columns(ray_driver: Any, upstream: Upstream) -> None:
    import ray.data

    upstream.script(poison=True, text="POISON", count=1000)
    rows = [*written(10, poison=[3]).to_pylist(), {"id": 10, "text": None}]
    ds = pipelines.embed_dataset(
        ray.data.from_items(rows), text_column="text", model="sim-embed", dimensions=4
    )
    found = sorted(ds.take_all(), key=lambda row: row["id"])

    assert [row["id"] for row in found if row["embedding_error"]] == [3, 10]
    assert found[3]["embedding"] is None
    np.testing.assert_array_equal(found[0]["embedding"], truth.vector(rows[0]["text"], 4))
    assert all(row["tokens"] > 0 for row in found if not row["embedding_error"])

    upstream.script(answer="a river")
    asked = pipelines.generate_dataset(
        ray.data.from_items(rows[:2]), prompt="What is {text}?", model="sim"
    )
    answers = asked.take_all()
    assert [row["answer"] for row in answers] == ["a river"] * 2
    assert all(row["tokens"] > 0 and row["generation_error"] is None for row in answers)


@pytest.mark.ray
def test_what_is_wrong_is_said_before_anything_is_sent(
    ray_driver: Any, upstream: Upstream, tmp_path: Path
) -> None:
    src, dst = tmp_path / "in.parquet", tmp_path / "out"
    parquet.write_table(pa.table({"id": [1, 2, 2], "text": ["a", "b", "c"]}), src)
    empty = tmp_path / "empty.parquet"
    parquet.write_table(written(0), empty)
    given: dict[str, Any] = {"text_column": "text", "id_column": "id", "model": "sim-embed"}
    wrong: list[tuple[str, Path, Path, dict[str, Any]]] = [
        ("no column 'words'", src, dst, {**given, "text_column": "words"}),
        ("no column 'key'", src, dst, {**given, "id_column": "key"}),
        ("not unique: 2", src, dst, given),
        ("holds int64", src, dst, {**given, "text_column": "id", "resume": False}),
        ("unique ids", src, dst, {**given, "id_column": None}),
        ("nothing at", tmp_path / "none.parquet", dst, given),
        ("must end in", tmp_path / "notes.txt", dst, given),
        ("of one kind", tmp_path, dst, given),
        ("is in the source", src, src, given),
        ("no job has written", src, dst, {**given, "retry_dead_letter": True}),
        ("no-such", src, dst, {**given, "model": "no-such"}),
    ]
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "torn.jsonl").write_text('{"id": 1, "text": "a"}\nno json\n')
    (tmp_path / "two").mkdir()
    for name, id_ in (("a", 1), ("b", "x")):
        parquet.write_table(pa.table({"id": [id_], "text": ["a"]}), tmp_path / "two" / f"{name}.pq")
    wrong += [
        (r"torn.jsonl cannot be read: \w", tmp_path / "torn.jsonl", dst, given),
        ("incompatible types: int64 vs string", tmp_path / "two", dst, given),
    ]
    for words, source, to, arguments in wrong:
        with pytest.raises(errors.GatewayError, match=words):
            pipelines.embed_parquet(source, to, **arguments)
    nothing = pipelines.embed_parquet(empty, tmp_path / "none", **given)

    assert nothing is not None
    assert nothing.rows == 0
    assert upstream.log() == []

    # What the provider alone knows is seen by the first rows.
    upstream.script(status=400, count=1000)
    many = tmp_path / "many.parquet"
    parquet.write_table(written(500), many)
    with pytest.raises(errors.GatewayError, match="first 16 rows that were tried all failed alike"):
        pipelines.embed_parquet(many, tmp_path / "refused", **given)
    assert len(upstream.log()) < 60
    assert not (tmp_path / "refused" / "_dead_letter").exists()


@pytest.mark.ray
def test_a_model_is_asked_about_each_row(
    up: support.UpProcess, upstream: Upstream, ray_driver: Any, tmp_path: Path
) -> None:
    src, dst = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rows = [{"id": i, "name": None if i == 5 else f"place {i}"} for i in range(40)]
    src.write_text("".join(json.dumps(row) + "\n" for row in rows))
    properties = {"answer": {"type": "string", "maxLength": 9}}
    schema = {"type": "object", "properties": properties, "required": ["answer"]}
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    upstream.script(answer="yes")
    upstream.script(answer="certainly not", text="place 7 ", count=1000)
    job: tuple[Any, ...] = ("map", src, dst, "--model", "sim", "--id-column", "id")
    job = (*job, "--prompt", "Is {name} big?")
    job = (*job, "--schema", tmp_path / "schema.json", "--json")
    given: dict[str, Any] = {"model": "sim", "prompt": "Is {name} big?", "id_column": "id"}

    assert pipelines.plan_generate(src, dst=dst, **given).calls == 39
    assert upstream.log() == []
    ended = forebay(up, *job)
    assert ended.returncode == 3, ended.stderr
    told = json.loads(ended.stdout)

    assert (told["rows"], told["failed"], told["left"]) == (40, 2, 0)
    answers = answered(dst)
    assert sorted(answers) == [i for i in range(40) if i not in (5, 7)]
    assert set(answers.values()) == {"yes"}
    dead = read(dst / "_dead_letter")
    assert dead["id"].to_pylist() == [5, 7]
    assert "'name' is empty" in dead["generation_error"][0].as_py()

    # Another job's retry moves nothing.
    with pytest.raises(errors.ConfigurationError, match="is of a job with prompt"):
        pipelines.generate_parquet(
            src, dst, retry_dead_letter=True, **{**given, "prompt": "Where is {name}?"}
        )
    assert read(dst / "_dead_letter") == dead


def test_bad_rows_cost_a_job_few_requests(
    upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Batcher finds them within one request; a retry asks for them though it knows them."""
    monkeypatch.setenv("SIM_KEY", "sk-simulated")
    upstream.script(poison=True, text="POISON", count=10_000)
    poison = list(range(7, 1000, 100))
    rows = written(1000, poison)
    config = GatewayConfig(model_list=support.groups(upstream.url), enable_request_batching=True)
    work = EmbedWork("text", "sim-embed", dimensions=4)
    with LiteLLMGateway(config, runtime="inline") as gateway:
        made, done, error = gateway.run(work.run(gateway, rows, False))
        requests = gateway.get_usage_stats()["total_requests"]
        upstream.reset()
        dead = rows.take(poison)
        known = gateway.run(work.run(gateway, dead, False))[1]
        asked_by_memory = len(upstream.log())
        again = gateway.run(work.again().run(gateway, dead, False))[1]

    assert error is None
    assert requests == 1
    assert (done.rows, done.failed) == (1000, 10)
    failed = [place for place, words in enumerate(made["embedding_error"].to_pylist()) if words]
    assert failed == poison
    found = np.stack(made["embedding"].drop_null().to_numpy(zero_copy_only=False))
    good = [text for text in rows["text"].to_pylist() if "POISON" not in text]
    np.testing.assert_array_equal(found, truth.vectors(good, 4))
    assert (known.failed, asked_by_memory) == (10, 0)
    assert (again.failed, len(upstream.log())) == (0, 1)


def test_a_job_pays_no_fallback_whose_vectors_it_cannot_use(
    upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SIM_KEY", "sk-simulated")
    groups = support.groups(upstream.url)
    groups.append({**next(g for g in groups if g["model_name"] == "dead"), "model_name": "gone"})
    config = GatewayConfig(model_list=groups, fallbacks=[{"gone": ["sim-embed"]}], max_retries=0)
    work = EmbedWork("text", "gone", dimensions=4, patience_s=0)
    with LiteLLMGateway(config, runtime="inline") as gateway:
        made, _, error = gateway.run(work.run(gateway, written(3), True))
        asked_by_job = len(upstream.log())
        others = gateway.embed(["a"], model="gone", dimensions=4)

    assert error is not None
    assert (made.num_rows, asked_by_job) == (0, 0)
    assert others.array.shape == (1, 4)
