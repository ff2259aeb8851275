"""Files inside installed wheels, found without importing what they belong to."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from forebay.errors import ConfigurationError

Find = Callable[[str], Any]
"""`importlib.util.find_spec`, or a stand-in."""

EXTRA = "forebay[local]"


def located(
    package: str, file: str, *, model: str, install: str, find: Find = importlib.util.find_spec
) -> Path:
    """Where `file` of the installed `package` is.

    Raises:
        ConfigurationError: it is not installed; the message says what to install.
    """
    for folder in required(package, model=model, install=install, find=find) or ():
        path = Path(folder, file)
        if path.is_file():
            return path
    raise ConfigurationError(
        f"the embedded model {model} needs {file}, which the installed {package} does not have; "
        f"install it again: {install}"
    )


def required(
    package: str, *, model: str, install: str, find: Find = importlib.util.find_spec
) -> list[str] | None:
    """The folders of an installed package.

    Raises:
        ConfigurationError: it is not installed; the message says what to install.
    """
    spec = find(package)
    if spec is None:
        raise ConfigurationError(
            f"the embedded model {model} needs the package {package}, which is not installed; "
            f"install it with `{install}`, or the extra `{EXTRA}`"
        )
    folders = spec.submodule_search_locations
    return None if folders is None else list(folders)
