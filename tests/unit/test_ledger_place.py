from __future__ import annotations

import json
import pickle
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from actors.ledger import place
from actors.ledger.owner import Ledger
from actors.ledger.policy import StoreFailed
from forebay.config import GatewayConfig, SystemConfig, sqlite_path
from forebay.errors import ConfigurationError
from forebay.ledger_place import LedgerUrl
from forebay.secrets import Vault
from forebay.system import Boot, open_inline, owners
from tests.support.postgres_server import PASSWORD, PostgresServer
from tests.unit.test_ledger_owner import entry

CANARY = "canary-0123456789"
URL = f"postgresql://forebay:{CANARY}@db.example/ledger"


async def test_the_log_goes_into_the_file_before_it_is_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(place, "LOG_PAGES", 50)
    ledger = Ledger(str(tmp_path / "ledger.db"))
    for number in range(40):
        await ledger.append("h", number, [entry(number)])  # some ten pages each
    assert (tmp_path / "ledger.db-wal").stat().st_size < 100 * 4096
    await ledger.close()


def system(tmp_path: Path, url: str | None) -> SystemConfig:
    return SystemConfig(gateway=GatewayConfig(ledger_url=url), data_dir=str(tmp_path))


def test_what_crosses_to_the_owner_holds_no_password(tmp_path: Path) -> None:
    boot = Boot.of(system(tmp_path, URL), "forebay", durable=True)
    made = owners(boot)["ledger"][1]
    assert CANARY not in json.dumps(asdict(boot)) + repr(made)
    assert CANARY.encode() not in pickle.dumps(made)
    arguments = pickle.loads(pickle.dumps(made))
    assert arguments["path"] is None
    assert arguments["url"]() == URL


def test_a_file_is_told_by_its_path_and_is_there_without_a_word(tmp_path: Path) -> None:
    boot = Boot.of(system(tmp_path, None), "forebay", durable=True)
    assert owners(boot)["ledger"][1] == {"path": str(tmp_path / "ledger.db"), "url": None}
    boot = Boot.of(system(tmp_path, "sqlite:////tmp/l.db"), "forebay", durable=False)
    assert owners(boot)["ledger"][1] == {"path": "/tmp/l.db", "url": None}
    assert Boot.of(system(tmp_path, None), "forebay", durable=False).ledger_path is None


def test_a_system_in_memory_writes_no_vault(tmp_path: Path) -> None:
    boot = Boot.of(system(tmp_path, URL), "forebay", durable=False)
    assert CANARY not in repr(boot)
    assert list(tmp_path.iterdir()) == []


def test_a_reference_that_leads_nowhere_fails_the_store(tmp_path: Path) -> None:
    with pytest.raises(StoreFailed, match=r"ledger_url: .*NO_SUCH"):
        LedgerUrl("os.environ/NO_SUCH", str(tmp_path))()
    with pytest.raises(StoreFailed, match="ledger_url: secret/"):
        LedgerUrl("secret/" + "0" * 32, str(tmp_path))()


async def test_nobody_else_on_the_machine_reads_the_file(tmp_path: Path) -> None:
    ledger = Ledger(str(tmp_path / "ledger.db"))
    try:
        await ledger.append("p", 1, [entry(1)])
        assert {one.stat().st_mode & 0o077 for one in tmp_path.iterdir()} == {0}
        assert (tmp_path / "ledger.db-wal").exists()
    finally:
        await ledger.close()


def test_one_ledger_has_one_name_without_a_password() -> None:
    names = {
        LedgerUrl(url, "").name
        for url in (URL, SecretStr(URL), "postgresql+psycopg://other:pw@db.example:5432/ledger")
    }
    assert names == {"db.example:5432/ledger"}
    assert LedgerUrl("os.environ/DB", "").name == "os.environ/DB"
    assert CANARY not in repr(LedgerUrl(SecretStr(URL), ""))


@pytest.mark.parametrize(
    "url",
    [URL, "postgres://h/d", "postgresql+psycopg://h:1/d", "os.environ/DB", "sqlite:///~/l.db"],
)
def test_a_ledger_may_be_here(url: str, tmp_path: Path) -> None:
    config = GatewayConfig(ledger_url=url)
    assert CANARY not in repr(config)
    assert (sqlite_path(config.ledger_url) is None) == (not url.startswith("sqlite"))
    document = system(tmp_path, url).document(Vault(tmp_path))
    assert CANARY not in json.dumps(document)
    again = SystemConfig.from_document(document)
    assert LedgerUrl(again.ledger_url or "", str(tmp_path)).url
    if "environ" not in url and "sqlite" not in url:
        assert LedgerUrl(again.ledger_url or "", str(tmp_path))() == url


@pytest.mark.parametrize(
    "url",
    [
        f"mysql://u:{CANARY}@h/d",
        "sqlite:///:memory:",
        "sqlite:///",
        f"postgresql://u:{CANARY}#1@h/d",
        f"postgresql://u:a/{CANARY}@h/d",
        "postgresql:h",
        "postgresql://h:nine/d",
        "${DB}",
        7,
    ],
)
def test_a_ledger_cannot_be_there(url: Any) -> None:
    with pytest.raises(ConfigurationError) as caught:
        GatewayConfig(ledger_url=url)
    assert caught.value.param == "ledger_url"
    assert CANARY not in str(caught.value)


async def test_a_system_in_one_process_keeps_its_ledger_on_a_server(
    postgres: PostgresServer, tmp_path: Path
) -> None:
    config = system(tmp_path, postgres.fresh())
    first = await open_inline(config)
    first._ledger.record(entry(1))
    await first._ledger.flush()
    assert PASSWORD not in str(await first.health())
    await first.close()
    second = await open_inline(config)
    assert (await second._ledger.usage())["entries"] == 1
    await second.close()
