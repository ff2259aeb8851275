"""The ledger's URL, which may hold a password: looked up where the ledger is, when it is opened."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from pydantic import SecretStr

from actors.ledger.policy import StoreFailed
from forebay.config import revealed
from forebay.errors import ConfigurationError
from forebay.secrets import Vault, is_reference


@dataclass(frozen=True, slots=True)
class LedgerUrl:
    """What crosses to the owner's process: a URL without a password, or a reference to one.

    Within one process it may be a hidden URL. Calling it tells the URL itself.
    """

    url: str | SecretStr
    data_dir: str

    def __call__(self) -> str:
        """Raises StoreFailed: it refers to nothing here."""
        try:
            return revealed(self.url, Vault(Path(self.data_dir)))
        except ConfigurationError as error:
            raise StoreFailed(f"ledger_url: {error}") from None

    @property
    def name(self) -> str:
        """The reference, or the URL without user and password: the same for the same ledger."""
        text = self.url.get_secret_value() if isinstance(self.url, SecretStr) else self.url
        if is_reference(text):
            return text
        parts = urlsplit(text)
        return f"{parts.hostname}:{parts.port or 5432}{parts.path}"
