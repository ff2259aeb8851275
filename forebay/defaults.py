"""The models of a gateway that was given none: providers whose keys are there, and the embedded.

Nothing is read here; the environment is an argument.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from forebay.errors import ConfigurationError
from forebay.faults import one_of
from forebay.routing import family

Entry = dict[str, Any]
"""An entry of LiteLLM's `model_list`."""


class Usual(NamedTuple):
    """A provider's usual models, and the variables that may hold its key, first one first."""

    variables: tuple[str, ...]
    chat: tuple[str, ...] = ()
    embedding: tuple[str, ...] = ()


USUAL: Mapping[str, Usual] = {
    "openai": Usual(
        ("OPENAI_API_KEY",),
        ("openai/gpt-4o-mini", "openai/gpt-4o", "openai/gpt-4.1", "openai/gpt-4.1-mini"),
        (
            "openai/text-embedding-3-small",
            "openai/text-embedding-3-large",
            "openai/text-embedding-ada-002",
        ),
    ),
    "anthropic": Usual(
        ("ANTHROPIC_API_KEY",),
        (
            "anthropic/claude-haiku-4-5",
            "anthropic/claude-sonnet-4-5",
            "anthropic/claude-opus-4-5",
        ),
    ),
    "gemini": Usual(
        ("GEMINI_API_KEY", "GOOGLE_API_KEY"),
        ("gemini/gemini-2.5-flash", "gemini/gemini-2.5-pro"),
        ("gemini/gemini-embedding-001",),
    ),
    "cohere": Usual(
        ("COHERE_API_KEY", "CO_API_KEY"),
        ("cohere_chat/command-a-03-2025", "cohere_chat/command-r7b-12-2024"),
        ("cohere/embed-v4.0",),
    ),
    "mistral": Usual(
        ("MISTRAL_API_KEY",),
        ("mistral/mistral-small-latest", "mistral/mistral-large-latest"),
        ("mistral/mistral-embed",),
    ),
    "groq": Usual(("GROQ_API_KEY",), ("groq/openai/gpt-oss-20b", "groq/openai/gpt-oss-120b")),
    "deepseek": Usual(("DEEPSEEK_API_KEY",), ("deepseek/deepseek-v4-flash",)),
    "xai": Usual(("XAI_API_KEY",), ("xai/grok-4.5",)),
    "voyage": Usual(("VOYAGE_API_KEY",), (), ("voyage/voyage-3.5", "voyage/voyage-3.5-lite")),
    "openrouter": Usual(("OPENROUTER_API_KEY",)),
}

EMBEDDED: list[Entry] = [
    {
        "model_name": "local-chat",
        "litellm_params": {"model": "local/smollm2-135m"},
        "model_info": {"mode": "chat"},
    },
    {
        "model_name": "local-embed",
        "litellm_params": {"model": "local/wordllama-256"},
        "model_info": {"mode": "embedding"},
    },
]


def default_models(keys: Mapping[str, Any], environ: Mapping[str, str]) -> list[Entry]:
    """The usual models of every provider whose key is at hand, then the embedded ones."""
    found = [entry for name in USUAL for entry in _usual(name, keys, environ) or ()]
    return [*found, *EMBEDDED]


def models_of(
    providers: Sequence[str], keys: Mapping[str, Any], environ: Mapping[str, str]
) -> list[Entry]:
    """The usual models of providers that were asked for by name; `local` has the embedded ones.

    Raises:
        ConfigurationError: a provider is unknown here, or its key is nowhere.
    """
    return [entry for name in providers for entry in _asked_for(name, keys, environ)]


def _asked_for(name: str, keys: Mapping[str, Any], environ: Mapping[str, str]) -> list[Entry]:
    if name == "local":
        return EMBEDDED
    provider = family(name)
    if provider not in USUAL:
        raise ConfigurationError(
            f"providers: {one_of(name, [*USUAL, 'local'])}; write the models of another provider "
            "into model_list",
            param="providers",
        )
    found = _usual(provider, keys, environ)
    if found is None:
        raise ConfigurationError(
            f"providers: there is no key for {provider}; set {USUAL[provider].variables[0]}, or "
            f"give api_keys={{{provider!r}: …}}",
            param="providers",
        )
    return found


def _usual(
    provider: str, keys: Mapping[str, Any], environ: Mapping[str, str]
) -> list[Entry] | None:
    """A provider's usual models, and a pattern for all its others; None where there is no key."""
    usual = USUAL[provider]
    variable = next((name for name in usual.variables if environ.get(name)), None)
    if any(family(name) == provider for name in keys):
        params = {}
    elif variable is not None:
        params = {"api_key": f"os.environ/{variable}"}
    else:
        return None
    modes = [(model, "chat") for model in usual.chat]
    modes += [(model, "embedding") for model in usual.embedding]
    entries: list[Entry] = [
        {
            "model_name": model.rpartition("/")[2],
            "litellm_params": {"model": model, **params},
            "model_info": {"mode": mode},
        }
        for model, mode in modes
    ]
    every = f"{provider}/*"
    return [*entries, {"model_name": every, "litellm_params": {"model": every, **params}}]
