"""Secrets are found, kept in one place, referred to, and never shown."""

from __future__ import annotations

import json
import pickle
import stat
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import SecretStr

from forebay import secrets
from forebay.errors import ConfigurationError
from forebay.secrets import Vault, hash_key, hide, key_secret, mask, new_key, refer, resolve

CANARY = "sk-canary-0123456789"


def hidden(params: Any) -> Any:
    return hide(params, secrets.is_secret_param)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


class TestHiding:
    def test_what_is_not_known_to_be_harmless_is_hidden(self) -> None:
        params = hidden({"model": "openai/x", "api_key": CANARY, "brand_new_token": CANARY})
        assert params["model"] == "openai/x"
        assert CANARY not in repr(params)
        assert isinstance(params["brand_new_token"], SecretStr)

    def test_numbers_and_truth_values_stay(self) -> None:
        params = {"timeout": 3, "drop_params": True, "temperature": 0.5, "seed": None}
        assert hidden(params) == params

    def test_every_header_is_hidden(self) -> None:
        assert CANARY not in repr(hidden({"extra_headers": {"X-Whatever": CANARY}}))

    def test_a_url_is_shown_unless_it_carries_a_password_or_a_query(self) -> None:
        plain = {"api_base": "https://host/v1"}
        assert hidden(plain) == plain
        for url in (f"https://u:{CANARY}@host/v1", f"https://host/v1?key={CANARY}"):
            assert CANARY not in repr(hidden({"api_base": url}))

    def test_references_stay_readable_even_in_a_secret_string(self) -> None:
        reference = "os.environ/OPENAI_API_KEY"
        assert hidden({"api_key": reference}) == {"api_key": reference}
        assert hidden({"api_key": SecretStr(reference)}) == {"api_key": reference}

    def test_names_that_tell_a_secret_are_hidden_in_model_info(self) -> None:
        info = hide({"owner": "me", "internal_token": CANARY}, secrets.is_secret_name)
        assert info["owner"] == "me"
        assert CANARY not in repr(info)

    @pytest.mark.parametrize("text", ["$KEY", "${KEY}", "os.environ/", "os.environ/A B"])
    def test_references_gone_wrong_are_recognised(self, text: str) -> None:
        assert secrets.is_malformed_reference(text)

    @pytest.mark.parametrize("text", ["sk-$abc", "os.environ/KEY", "secret/" + "0" * 32, ""])
    def test_other_texts_are_not_taken_for_them(self, text: str) -> None:
        assert not secrets.is_malformed_reference(text)

    def test_what_is_shown_has_stars(self) -> None:
        shown = mask({"a": [SecretStr(CANARY)], "url": f"postgresql://u:{CANARY}@host/db?x=1"})
        assert shown == {"a": ["***"], "url": "postgresql://***@host/db?x=1"}


class TestResolving:
    def test_variables_are_found_wherever_they_stand(self) -> None:
        params = {"api_key": "os.environ/KEY", "extra_headers": {"X": ["os.environ/KEY", "plain"]}}
        assert resolve(params, {"KEY": CANARY}) == {
            "api_key": CANARY,
            "extra_headers": {"X": [CANARY, "plain"]},
        }

    @pytest.mark.parametrize("environ", [{}, {"MISSING": ""}])
    def test_a_missing_variable_is_named_and_no_value_is(self, environ: dict[str, str]) -> None:
        with pytest.raises(ConfigurationError, match="MISSING is not set") as caught:
            resolve({"api_key": "os.environ/MISSING"}, {**environ, "OTHER": CANARY})
        assert CANARY not in str(caught.value)

    def test_a_vaulted_secret_without_a_vault_is_an_error(self) -> None:
        with pytest.raises(ConfigurationError, match="vault"):
            resolve("secret/" + "0" * 32, {})

    @settings(deadline=None)
    @given(
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.text(),
            lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        )
    )
    def test_hiding_referring_and_resolving_gives_back_what_went_in(self, value: Any) -> None:
        vault = Vault()
        plain = refer(hide(value, lambda *_: True), vault)
        assert resolve(json.loads(json.dumps(plain)), {}, vault) == value


class TestVault:
    def test_the_same_secret_keeps_its_reference(self) -> None:
        vault = Vault()
        assert vault.put("a") == vault.put("a") != vault.put("b")

    def test_a_reference_tells_nothing_and_neither_does_the_vault(self) -> None:
        vault = Vault()
        assert CANARY not in vault.put(CANARY)
        assert CANARY not in repr(vault)

    def test_it_writes_nothing_before_there_is_a_secret(self, tmp_path: Path) -> None:
        vault = Vault(tmp_path / "data")
        assert refer({"model": "x"}, vault) == {"model": "x"}
        assert not (tmp_path / "data").exists()

    def test_its_file_is_private_and_another_process_finds_the_secret(self, tmp_path: Path) -> None:
        reference = Vault(tmp_path / "data").put(CANARY)
        assert mode(tmp_path / "data" / "vault.json") == 0o600
        assert mode(tmp_path / "data") == 0o700
        assert Vault(tmp_path / "data").get(reference) == CANARY
        assert Vault(tmp_path / "data").put(CANARY) == reference

    def test_a_secret_added_later_by_another_process_is_found(self, tmp_path: Path) -> None:
        early = Vault(tmp_path)
        first = early.put("first")
        second = Vault(tmp_path).put("second")
        assert (early.get(first), early.get(second)) == ("first", "second")

    def test_writers_at_once_lose_nothing(self, tmp_path: Path) -> None:
        references: dict[str, str] = {}

        def write(name: str) -> None:
            references[name] = Vault(tmp_path).put(name)

        threads = [threading.Thread(target=write, args=(str(n % 8),)) for n in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        vault = Vault(tmp_path)
        assert {name: vault.get(reference) for name, reference in references.items()} == {
            name: name for name in map(str, range(8))
        }

    def test_an_unknown_reference_says_what_to_do(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigurationError, match=r"os\.environ/NAME"):
            Vault(tmp_path).get("secret/" + "0" * 32)

    def test_a_file_that_others_may_read_is_refused(self, tmp_path: Path) -> None:
        reference = Vault(tmp_path).put(CANARY)
        (tmp_path / "vault.json").chmod(0o640)
        with pytest.raises(ConfigurationError, match="chmod 600"):
            Vault(tmp_path).get(reference)

    @pytest.mark.parametrize("content", ["{", "[]", '{"a": 1}'])
    def test_a_file_that_is_no_vault_is_refused(self, tmp_path: Path, content: str) -> None:
        (tmp_path / "vault.json").write_text(content)
        (tmp_path / "vault.json").chmod(0o600)
        with pytest.raises(ConfigurationError, match="not a vault"):
            Vault(tmp_path).put("x")

    def test_it_is_bounded(self) -> None:
        vault = Vault(secrets_max=2)
        for secret in ("a", "b", "a"):
            vault.put(secret)
        with pytest.raises(ConfigurationError, match="takes no more"):
            vault.put("c")

    def test_a_place_that_cannot_be_written_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(ConfigurationError, match="FOREBAY_DATA_DIR"):
            Vault(tmp_path / "file" / "data").put("x")

    def test_a_literal_secret_without_a_vault_is_an_error(self) -> None:
        with pytest.raises(ConfigurationError, match="no vault") as caught:
            refer({"api_key": SecretStr(CANARY)}, None)
        assert CANARY not in str(caught.value)


class TestKeys:
    def test_the_secret_comes_from_the_environment_first(self, tmp_path: Path) -> None:
        environ = {"FOREBAY_KEY_SECRET": "x" * 32}
        assert key_secret(environ, tmp_path / "data") == b"x" * 32
        assert not (tmp_path / "data").exists()

    def test_a_short_secret_is_refused_without_showing_it(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigurationError, match="FOREBAY_KEY_SECRET") as caught:
            key_secret({"FOREBAY_KEY_SECRET": "hunter2"}, tmp_path)
        assert "hunter2" not in str(caught.value)

    def test_it_is_made_once_and_private(self, tmp_path: Path) -> None:
        first = key_secret({}, tmp_path / "data")
        assert len(first) == 64
        assert key_secret({}, tmp_path / "data") == first
        assert mode(tmp_path / "data" / "key_secret") == 0o600

    def test_all_who_make_it_at_once_get_the_same(self, tmp_path: Path) -> None:
        found: list[bytes] = []
        threads = [
            threading.Thread(target=lambda: found.append(key_secret({}, tmp_path)))
            for _ in range(16)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 16
        assert len(set(found)) == 1

    def test_a_secret_that_others_may_read_is_refused(self, tmp_path: Path) -> None:
        key_secret({}, tmp_path)
        (tmp_path / "key_secret").chmod(0o644)
        with pytest.raises(ConfigurationError, match="chmod 600"):
            key_secret({}, tmp_path)

    def test_an_emptied_file_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "key_secret").touch(0o600)
        with pytest.raises(ConfigurationError, match="openssl rand"):
            key_secret({}, tmp_path)

    def test_keys_are_long_and_differ(self) -> None:
        key = new_key()
        assert key != new_key()
        assert key.startswith("sk-fb-")
        assert len(key) == len("sk-fb-") + 43

    def test_a_hash_depends_on_key_and_secret_and_holds_neither(self) -> None:
        hashed = hash_key("key", b"secret")
        assert hashed.startswith("hmac-sha256:")
        assert len(hashed) == len("hmac-sha256:") + 64
        assert len({hashed, hash_key("key2", b"secret"), hash_key("key", b"secret2")}) == 3
        # RFC 4231, test case 2
        assert hash_key("what do ya want for nothing?", b"Jefe").endswith(
            "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843"
        )

    def test_any_text_can_be_hashed(self) -> None:
        assert hash_key("\udcff\x00ü", b"secret").startswith("hmac-sha256:")


def test_hidden_secrets_survive_pickling_hidden() -> None:
    params = pickle.loads(pickle.dumps(hidden({"api_key": CANARY})))
    assert CANARY not in repr(params)
    assert resolve(params, {}) == {"api_key": CANARY}
