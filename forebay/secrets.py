"""What must not be seen: how secrets are recognised, kept, referred to and shown.

Rule 1: in this process a literal secret is a `SecretStr`; on disk it is in the `Vault`; it is
        nowhere else. What crosses to another process holds references.
Rule 2: there are two references: `os.environ/NAME` (LiteLLM's form) and `secret/<id>` (the Vault).
        They are resolved at call time, in the process that makes the call.
Rule 3: text in `litellm_params` that is not known to be harmless counts as a secret.
Rule 4: no error message holds a value.
"""

from __future__ import annotations

import base64
import fcntl
import hashlib
import hmac
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeGuard
from urllib.parse import urlsplit

from pydantic import SecretStr

from forebay.errors import ConfigurationError

SECRETS_MAX = 10_000
KEY_SECRET_BYTES_MIN = 16
HASH_PREFIX = "hmac-sha256:"
KEY_PREFIX = "sk-fb-"
OPERATOR_PREFIX = "sk-fb-op-"
MASK = "***"

_ENVIRONMENT = "os.environ/"
_VAULT = "secret/"
_BEGINNINGS = (_ENVIRONMENT, _VAULT)  # of references
_VARIABLE = re.compile(r"os\.environ/[A-Za-z_][A-Za-z0-9_]*")
_VAULTED = re.compile(r"secret/[0-9a-f]{32}")
_USERINFO = re.compile(r"(?<=://)[^/?#\s]*@")
_SECRET_NAME = re.compile(r"key$|secret|passw|token$|credential|private|authorization|cookie", re.I)

# Names in `litellm_params` whose text is shown and stored as it is (Rule 3).
PUBLIC_PARAMS = frozenset(
    "model custom_llm_provider base_model mode lane tags region_name api_base base_url api_version "  # noqa: SIM905
    "api_type organization azure_scope aws_region_name aws_profile_name aws_session_name "
    "aws_bedrock_runtime_endpoint vertex_project vertex_location watsonx_region_name timeout "
    "stream_timeout budget_duration encoding_format input_type truncate task reasoning_effort "
    "verbosity service_tier tool_choice response_format type modalities role stop thinking "
    "allowed_params allowed_openai_params additional_drop_params litellm_credential_name "
    "configurable_clientside_auth_params litellm_trace_id provider_affinity_header".split()
)


def is_reference(text: str) -> bool:
    """Whether a text stands for a secret that is kept elsewhere."""
    return bool(_VARIABLE.fullmatch(text) or _VAULTED.fullmatch(text))


def is_text(value: Any) -> TypeGuard[str | SecretStr]:
    """Whether a value is a text, hidden or not."""
    return isinstance(value, str | SecretStr)


def is_malformed_reference(value: str | SecretStr) -> bool:
    """Whether a text was meant as a reference, and would be sent to a provider as it stands."""
    text = value.get_secret_value() if isinstance(value, SecretStr) else value
    shell_form = re.fullmatch(r"\$\w+|\$\{\w+\}", text)
    return bool(shell_form) or (text.startswith(_ENVIRONMENT) and not is_reference(text))


def is_secret_param(name: str, text: str) -> bool:
    """Whether a text under this name in `litellm_params` is to be hidden."""
    return name not in PUBLIC_PARAMS or _url_tells(text)


def is_secret_name(name: str, text: str) -> bool:
    """Whether a text is to be hidden because its name, or a password in it, says so."""
    return bool(_SECRET_NAME.search(name)) or _url_tells(text)


def hide(value: Any, is_secret: Callable[[str, str], bool], name: str = "") -> Any:
    """A copy of a JSON-like value with the secrets in it as `SecretStr`; references stay."""
    if isinstance(value, SecretStr):
        text = value.get_secret_value()
        return text if is_reference(text) else value
    if isinstance(value, str):
        shown = not value or is_reference(value) or not is_secret(name, value)
        return value if shown else SecretStr(value)
    if isinstance(value, Mapping):
        return {key: hide(item, is_secret, str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [hide(item, is_secret, name) for item in value]
    return value


def refer(value: Any, vault: Vault | None) -> Any:
    """A copy with every hidden secret, and every URL with a password, put into the vault.

    Raises:
        ConfigurationError: there is a secret and no vault to keep it.
    """
    if isinstance(value, SecretStr):
        return _keep(value.get_secret_value(), vault)
    if isinstance(value, str):
        return _keep(value, vault) if _USERINFO.search(value) else value
    if isinstance(value, Mapping):
        return {key: refer(item, vault) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [refer(item, vault) for item in value]
    return value


def resolve(value: Any, environ: Mapping[str, str], vault: Vault | None = None) -> Any:
    """A copy with every reference and hidden secret replaced by the secret itself.

    Raises:
        ConfigurationError: an environment variable is not set, or the vault lacks the secret; the
            message names the variable or the reference.
    """
    if isinstance(value, str):
        return _look_up(value, environ, vault) if value.startswith(_BEGINNINGS) else value
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    if isinstance(value, Mapping):
        resolved = dict(value)
        for name, item in resolved.items():
            resolved[name] = resolve(item, environ, vault)
        return resolved
    if isinstance(value, list | tuple):
        return list(map(partial(resolve, environ=environ, vault=vault), value))
    return value


def mask(value: Any) -> Any:
    """A copy fit for showing: secrets become `***`, passwords in URLs too."""
    if isinstance(value, SecretStr):
        return MASK
    if isinstance(value, str):
        return _USERINFO.sub(f"{MASK}@", value)
    if isinstance(value, Mapping):
        return {key: mask(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [mask(item) for item in value]
    return value


class Vault:
    """Owns the literal secrets of a configuration, under random ids that tell nothing.

    The same secret keeps its id, so that equal configurations have equal documents. With a data
    directory it is the file `vault.json` there, which only its owner may read, made when the
    first secret comes and replaced whole under a lock; without one it lives in memory.
    Bound: `secrets_max` secrets, then `ConfigurationError`.

    Failure behaviour: a crash leaves the old file or the new one. A file that others may read or
    that is not a vault raises `ConfigurationError`. A lost file loses the secrets that were given
    literally; loading the configuration again puts them back under new ids.
    """

    def __init__(
        self,
        data_dir: Path | None = None,
        random: Callable[[int], bytes] = os.urandom,
        secrets_max: int = SECRETS_MAX,
    ) -> None:
        self._path = None if data_dir is None else data_dir / "vault.json"
        self._random = random
        self._secrets_max = secrets_max
        self._secrets: dict[str, str] = {}  # id → secret

    def __repr__(self) -> str:
        return f"Vault({str(self._path)!r}, {len(self._secrets)} secrets)"

    def put(self, secret: str) -> str:
        """Keep a secret; the reference to it, `secret/<id>`."""
        known = self._reference(secret)
        if known is not None:
            return known
        if self._path is None:
            return self._add(secret)
        with _locked(self._path):
            self._read()
            known = self._reference(secret)
            if known is not None:
                return known
            reference = self._add(secret)
            _write_private(self._path, json.dumps(self._secrets).encode())
            return reference

    def get(self, reference: str) -> str:
        """The secret behind a reference.

        Raises:
            ConfigurationError: this vault has no such secret.
        """
        name = reference.removeprefix(_VAULT)
        found = self._secrets.get(name)
        if found is None:
            self._read()
            found = self._secrets.get(name)
        if found is None:
            where = "this process" if self._path is None else f"{self._path} on this node"
            raise ConfigurationError(
                f"{reference} is not in the vault of {where}; load the configuration here again, "
                "or give the secret as os.environ/NAME"
            )
        return found

    def resolve(self, params: Mapping[str, Any], environ: Mapping[str, str]) -> dict[str, Any]:
        """A deployment's parameters with the secrets themselves, for one provider call."""
        resolved: dict[str, Any] = resolve(params, environ, self)
        return resolved

    def _reference(self, secret: str) -> str | None:
        return next((f"secret/{k}" for k, kept in self._secrets.items() if kept == secret), None)

    def _add(self, secret: str) -> str:
        if len(self._secrets) >= self._secrets_max:
            raise ConfigurationError(
                f"the vault holds {self._secrets_max} secrets and takes no more; give secrets as "
                "os.environ/NAME, or remove the vault file and load the configuration again"
            )
        name = self._random(16).hex()
        self._secrets[name] = secret
        return f"secret/{name}"

    def _read(self) -> None:
        if self._path is None:
            return
        raw = _read_private(self._path)
        if raw is None:
            return
        try:
            kept = json.loads(raw)
        except ValueError:
            kept = None
        if not isinstance(kept, dict) or not all(isinstance(v, str) for v in kept.values()):
            raise ConfigurationError(f"{self._path} is not a vault; remove it and load again")
        self._secrets = kept


def key_secret(
    environ: Mapping[str, str], data_dir: Path, random: Callable[[int], bytes] = os.urandom
) -> bytes:
    """The secret that API keys are hashed with, the same on every node of a system.

    It is FOREBAY_KEY_SECRET, or else the file `key_secret` in the data directory, which is made
    on first use; of several processes that make it at once, all get the same.

    Raises:
        ConfigurationError: the secret is too short, or the file may be read by others.
    """
    given = environ.get("FOREBAY_KEY_SECRET")
    if given:
        return _long_enough(given.encode(), "FOREBAY_KEY_SECRET")
    path = data_dir / "key_secret"
    found = _read_private(path)
    if found is None:
        with _locked(path):
            found = _read_private(path)
            if found is None:
                found = random(32).hex().encode()
                _write_private(path, found)
    return _long_enough(found.strip(), str(path))


def new_key(random: Callable[[int], bytes] = os.urandom) -> str:
    """A new API key of 256 random bits. It is shown once and never stored; `hash_key` is."""
    return KEY_PREFIX + base64.urlsafe_b64encode(random(32)).rstrip(b"=").decode()


def hash_key(key: str, secret: bytes) -> str:
    """An API key as it is stored: `hmac-sha256:` and 64 hexadecimal digits (RFC 2104)."""
    return KeyHash(secret)(key)


class KeyHash:
    """`hash_key` for many keys: the secret's own part of the work is done once."""

    def __init__(self, secret: bytes) -> None:
        self._blank = hmac.new(secret, digestmod=hashlib.sha256)

    def __call__(self, key: str) -> str:
        digest = self._blank.copy()
        digest.update(key.encode("utf-8", "surrogatepass"))
        return HASH_PREFIX + digest.hexdigest()


def operator_key(secret: bytes) -> str:
    """The key of whoever can read the key secret: the command line on a node of the system.

    It is derived, so there is nothing to store or to revoke; a new secret makes a new one.
    """
    digest = hmac.new(secret, b"forebay operator", hashlib.sha256).digest()
    return OPERATOR_PREFIX + base64.urlsafe_b64encode(digest).rstrip(b"=").decode()


def _keep(secret: str, vault: Vault | None) -> str:
    if vault is None:
        raise ConfigurationError(
            "the configuration holds a literal secret and there is no vault to keep it; "
            "give it as os.environ/NAME"
        )
    return vault.put(secret)


def _look_up(text: str, environ: Mapping[str, str], vault: Vault | None) -> str:
    if text.startswith(_ENVIRONMENT):
        variable = text.removeprefix(_ENVIRONMENT)
        found = environ.get(variable)
        if not found:
            raise ConfigurationError(
                f"the environment variable {variable} is not set, and the configuration refers "
                f"to it as {text}; set it where the gateway runs",
                param=variable,
            )
        return found
    if _VAULTED.fullmatch(text):
        if vault is None:
            raise ConfigurationError(f"{text} is in a vault, and none is open in this process")
        return vault.get(text)
    return text


def _url_tells(text: str) -> bool:
    """Whether a text is a URL with a user, a password or a query in it."""
    if "://" not in text:
        return False
    try:
        url = urlsplit(text)
    except ValueError:
        return True
    return "@" in url.netloc or bool(url.query)


def _long_enough(secret: bytes, where: str) -> bytes:
    if len(secret) < KEY_SECRET_BYTES_MIN:
        raise ConfigurationError(
            f"{where} is shorter than {KEY_SECRET_BYTES_MIN} bytes; make one with "
            "`openssl rand -hex 32`"
        )
    return secret


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """The only writer of a file, among all processes and threads of this machine.

    Raises:
        ConfigurationError: the file cannot be written.
    """
    lock = -1
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(path.with_name(path.name + ".lock"), os.O_RDWR | os.O_CREAT, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    except OSError as error:
        raise ConfigurationError(
            f"{path} cannot be written: {error.strerror}; name another directory in "
            "FOREBAY_DATA_DIR"
        ) from None
    finally:
        if lock >= 0:
            os.close(lock)


def _write_private(path: Path, data: bytes) -> None:
    """Replace a file at once, durably, readable by its owner only. The caller holds the lock."""
    fresh = path.with_name(path.name + ".new")
    fresh.unlink(missing_ok=True)
    with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(fresh, path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _read_private(path: Path) -> bytes | None:
    """A private file's bytes, None if there is none.

    Raises:
        ConfigurationError: it cannot be read, or others may read it.
    """
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_mode & 0o077:
                raise ConfigurationError(f"{path} may be read by others; run `chmod 600 {path}`")
            return file.read()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror}") from None
