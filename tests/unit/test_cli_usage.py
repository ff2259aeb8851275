"""`forebay usage`, against the HTTP app on a real socket and a ledger behind it."""

from __future__ import annotations

import csv
import io
import json
from argparse import Namespace
from dataclasses import dataclass
from decimal import Decimal
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.ledger.owner import Ledger
from actors.ledger.policy import fold
from forebay import cli, usage_command
from forebay.errors import ConfigurationError
from forebay.usage import report
from tests.support.scripted_service import ScriptedService, keys_of
from tests.unit.test_cli_health import url
from tests.unit.test_ledger_owner import entry

__all__ = ["url"]

DAY = 1_767_225_600_000  # 2026-01-01
SOME = [
    entry(1, at_ms=DAY - 1, cost_nano=1_500_000_000, latency_ms=900),
    entry(2, at_ms=DAY, cost_nano=28, model="large", latency_ms=5),
    entry(3, at_ms=DAY, status="hit", saved_nano=1_200, tenant="zenith", latency_ms=0),
    entry(4, at_ms=DAY, status="refused", model="", http_status=429, error="answered with 429"),
    entry(5, at_ms=DAY + 1, status="voided", model="=2+2", error="ProviderError: no"),
]
TABLE = """\
MODEL  REQUESTS  OK  FAILED  REFUSED  HITS  PROMPT  COMPLETION  P50 MS  P95 MS    SAVED USD     COST USD
-             1   0       0        1     0       0           0       0       0    0.0000000  0.000000000
=2+2          1   0       1        0     0       0           0       0       0    0.0000000  0.000000000
large         1   1       0        0     0      10           5       2       5    0.0000000  0.000000028
small         2   2       0        0     1      10           5       5     950    0.0000012  1.500000000
total         5   3       1        1     1      20          10       4     925    0.0000012  1.500000028
"""  # noqa: E501


@dataclass
class Told(ScriptedService):
    """A service with a ledger."""

    async def usage(self, **query: Any) -> dict[str, Any]:
        self.queries.append(query)
        ledger = Ledger()
        await ledger.append("h", 1, SOME)
        told = await report(ledger, DAY / 1000 + 9, **query)
        await ledger.close()
        return told


@pytest.fixture
def service() -> Told:
    return Told(keys=keys_of(ops="fb-ops", acme="fb-acme", admins=("ops",)))


@dataclass
class Shell:
    url: str
    capsys: pytest.CaptureFixture[str]

    def __call__(self, *arguments: str, key: str = "fb-ops", code: int = 0) -> str:
        assert cli.main(["usage", *arguments, "--url", self.url, "--key", key]) == code
        out, err = self.capsys.readouterr()
        return out if code == 0 else err


@pytest.fixture
def run(url: str, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(url, capsys)


def as_written(table: str) -> list[list[str]]:
    return [line.split() for line in table.splitlines()]


def test_people_read_a_table_by_model_with_every_digit_of_the_money(run: Shell) -> None:
    told = run()

    assert as_written(told) == as_written(TABLE)
    assert len({line.rindex(" ") for line in told.splitlines()[1:]}) == 1  # one below the other


def test_several_groups_are_several_columns(run: Shell) -> None:
    lines = run("--by", "day,tenant").splitlines()

    assert [line.split()[:3] for line in lines] == [
        ["DAY", "TENANT", "REQUESTS"],
        ["2025-12-31", "acme", "1"],
        ["2026-01-01", "acme", "3"],
        ["2026-01-01", "zenith", "1"],
        ["total", "5", "3"],
    ]


def test_without_groups_there_is_one_line(run: Shell) -> None:
    lines = run("--by", "").splitlines()

    assert len(lines) == 2
    assert lines[1].split()[0] == "5"


def test_json_is_the_gateways_answer(run: Shell) -> None:
    told = json.loads(run("--json", "--by", "day"))

    assert told == json.loads(run("--format", "json", "--by", "day"))
    assert told["total_cost_nano"] == fold(SOME).cost_nano
    assert [row["day"] for row in told["data"]] == ["2025-12-31", "2026-01-01"]


def test_csv_has_every_figure_and_exact_money(run: Shell) -> None:
    rows = list(csv.DictReader(io.StringIO(run("--format", "csv"))))

    assert [row["model"] for row in rows] == ["", "'=2+2", "large", "small"]
    for row in rows:
        assert Decimal(row["total_cost"]) == Decimal(row["total_cost_nano"]) / 10**9
    mine = fold(e for e in SOME if e.model == "small").as_dict()
    assert {name: float(rows[-1][name]) for name in mine} == mine


def test_csv_of_nothing_has_its_head(run: Shell) -> None:
    lines = run("--format", "csv", "--by", "day,model", "--tenant", "nobody").splitlines()

    assert len(lines) == 1
    assert lines[0].startswith("day,model,total_requests,")


def test_hours_without_a_beginning_are_a_mistake_of_usage(run: Shell, service: Told) -> None:
    assert "--by hour needs --since" in run("--by", "model,hour", code=2)
    assert not service.queries


def test_a_tenant_sees_its_own_and_is_refused_anothers(run: Shell, service: Told) -> None:
    own = json.loads(run("--json", "--by", "tenant", key="fb-acme"))
    assert list(own["by_tenant"]) == ["acme"]

    assert "only its own" in run("--tenant", "zenith", key="fb-acme", code=1)
    assert len(service.queries) == 1


def test_a_range_is_handed_on(run: Shell, service: Told) -> None:
    told = json.loads(run("--json", "--start", "2026-01-01", "--end", "2026-01-01T00:00:00.001"))

    assert told["total_requests"] == 3
    assert service.queries[-1]["since_s"] == DAY / 1000


def options(**given: Any) -> Namespace:
    known = {"tenant": None, "by": "model", "start": None, "end": None, "since": None}
    return Namespace(**{**known, "format": None, "json": False, **given})


@pytest.mark.parametrize(
    ("age", "start"),
    [
        ("90m", "2025-12-31T22:30:00+00:00"),
        ("24h", "2025-12-31T00:00:00+00:00"),
        ("7d", "2025-12-25T00:00:00+00:00"),
        ("4w", "2025-12-04T00:00:00+00:00"),
        ("999999w", "1970-01-01T00:00:00+00:00"),
    ],
)
def test_since_counts_back_from_now(age: str, start: str) -> None:
    asked = usage_command.path(options(since=age), DAY / 1000)

    assert parse_qs(urlsplit(asked).query) == {"group_by": ["model"], "start": [start]}


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"by": "model,colour"}, "by"),
        ({"since": "7"}, "since"),
        ({"since": "-1d"}, "since"),
        ({"since": "7d", "start": "2026-01-01"}, "since"),
        ({"start": "yesterday"}, "start"),
        ({"end": "20260131"}, "end"),
        ({"json": True, "format": "csv"}, "format"),
    ],
)
def test_what_is_wrong_is_said_before_anybody_is_asked(given: dict[str, Any], param: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        usage_command.path(options(**given), DAY / 1000)

    assert caught.value.param == param


def test_bad_usage_has_its_exit_code(run: Shell, service: Told) -> None:
    assert "--by takes model, day" in run("--by", "colour", code=2)
    assert not service.queries


@given(st.integers(-(10**18), 10**18))
def test_an_amount_has_all_its_digits(nano: int) -> None:
    assert Decimal(usage_command.usd(nano)) * 10**9 == nano
    assert len(usage_command.usd(nano).partition(".")[2]) >= usage_command.CENTS
