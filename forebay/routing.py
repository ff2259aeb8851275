"""Model name → its group of deployments, and the groups that may answer in its place.

Rule 1: everything here is decided in memory, from the configuration alone.
Rule 2: names and patterns match as LiteLLM's do, but a pattern must match the whole name.
Rule 3: no secret is looked at; a deployment's `params` keep their references.

A *group* is all entries of `model_list` with one `model_name`. A *pattern* is a group whose name
has a `*`; what the star stands for in the name asked for is filled into the deployment's model.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

from pydantic import SecretStr

from forebay.errors import ModelNotFound
from forebay.faults import Fault, nearest, refusal
from forebay.secrets import is_reference

if TYPE_CHECKING:
    from forebay.config import GatewayConfig

NAMES_SHOWN_MAX = 20
NAMES_COMPARED_MAX = 200  # likeness costs some 10 µs a name, and anybody may misspell
NAME_COMPARED_MAX = 64
MATCHED_MAX = 1_000  # names that patterns match are callers' choice; full = begin anew
CHAT_MODES = frozenset({"chat", "completion", "responses"})
OURS = frozenset({"model", "weight", "order", "rpm", "tpm", "allowed_params"})

CLAUDES_PARAMS = frozenset({"top_k", "thinking"})
"""Parameters of Anthropic's API that OpenAI's has not, and that LiteLLM hands on to any Claude."""
CLAUDES_HOSTS = frozenset({"bedrock", "bedrock_converse", "vertex_ai", "azure_ai"})

SpecialKind = Literal["context_window", "content_policy"]
SPECIAL_KINDS: tuple[SpecialKind, ...] = ("context_window", "content_policy")

# What a model's name says about it when `model_info.mode` is silent.
_EMBEDS = re.compile(r"embed|wordllama|voyage-\d|minilm|nomic|(^|[/-])(bge|gte|e5)-", re.I)
_NO_CHAT = re.compile(r"whisper|transcri|tts|dall-e|image|moderation|rerank|realtime|sora", re.I)

# Providers of model names without a prefix, as LiteLLM infers them.
_PROVIDER_OF = (
    (re.compile(r"text-embedding-|gpt-|chatgpt-|o[134](-|$)|ft:|dall-e|whisper-|tts-"), "openai"),
    (re.compile(r"(omni|text)-moderation-|davinci-|babbage-"), "openai"),
    (re.compile(r"claude-"), "anthropic"),
    (re.compile(r"gemini-"), "vertex_ai"),
    (re.compile(r"command-"), "cohere_chat"),
    (re.compile(r"(embed|rerank)-"), "cohere"),
)
_FAMILY = {"cohere_chat": "cohere", "google": "gemini", "text-completion-openai": "openai"}
_CALLABLE_NAME = re.compile(r"[A-Za-z0-9_.:@/+\-]{1,256}")


@dataclass(frozen=True, slots=True)
class Deployment:
    """One upstream endpoint that a group may be answered by.

    `id` is `model_info.id` if given, else a hash of the unresolved `litellm_params`: the same in
    every process, and the same for two groups that share an upstream. Literal secrets count only
    by being different, never by their value. A pattern's deployment that was filled in for a name
    has the name after its id. `meaning` is that hash in any case: a given id stays the same when
    what it names becomes something else. `params` are `litellm_params` without `model` and without
    what routing uses; they hold references and `SecretStr`s, for `secrets.resolve`.

    `rpm` and `tpm` limit it (see `bounds.deployment_limits`); here they serve as weights too, as in
    LiteLLM's simple shuffle. A pattern's deployments share one limit, that of `limited_as`.
    `filled_from` is the id of the pattern's deployment that this one was made from.
    """

    id: str
    group: str
    model: str
    provider: str
    params: dict[str, Any] = field(default_factory=dict)
    weight: float | None = None
    order: int | None = None
    rpm: int | None = None
    tpm: int | None = None
    allowed_params: frozenset[str] = frozenset()
    info: dict[str, Any] = field(default_factory=dict)
    meaning: str = ""
    filled_from: str | None = None

    @property
    def taken_params(self) -> frozenset[str]:
        """Parameters it takes beside OpenAI's: those it is said to, and Claude's own if it is one.

        At a cloud a Claude is known by its name; where that tells nothing (an ARN),
        `allowed_params` has to.
        """
        at_home = self.provider == "anthropic"
        if at_home or (self.provider in CLAUDES_HOSTS and "claude" in self.model.casefold()):
            return self.allowed_params | CLAUDES_PARAMS
        return self.allowed_params

    @property
    def limited_as(self) -> str:
        """The name that its own limits are held under: no tenant can have it."""
        return f"deployment/{self.circuit}"

    @property
    def circuit(self) -> str:
        """The name its breaker goes by: all names filled into a pattern share one.

        They have one endpoint and one credential, and the names are the callers' choice.
        """
        return self.filled_from or self.id


@dataclass(frozen=True, slots=True)
class Group:
    """The deployments behind a name. `pattern` is its name in the configuration.

    `allowed_params` are those that every deployment of the group takes beside OpenAI's.
    """

    name: str
    pattern: str
    mode: str
    deployments: tuple[Deployment, ...]
    allowed_params: frozenset[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        taken = frozenset.intersection(*(d.taken_params for d in self.deployments))
        object.__setattr__(self, "allowed_params", taken)


class ModelTable:
    """The models of one configuration: immutable, made anew for every version.

    Bounded by the configuration, and by MATCHED_MAX groups that patterns were filled in for and
    that are kept, since filling one in costs more than all else here. Failure behaviour: none; it
    reads nothing and asks nobody.
    """

    def __init__(self, config: GatewayConfig) -> None:
        self._config = config
        self._groups: dict[str, Group] = {}
        for group in _groups(config.model_list, config.api_keys):
            self._groups[group.name] = group
        self._by_id = {d.id: d for group in self._groups.values() for d in group.deployments}
        # The longest pattern is the most specific one: LiteLLM's rule.
        self._patterns = sorted(
            ((_regex(name), group) for name, group in self._groups.items() if "*" in name),
            key=lambda pair: len(pair[0].pattern),
            reverse=True,
        )
        self._matched: dict[str, Group] = {}
        self._general, self._fallbacks = _fallback_lists(config.fallbacks)
        self._special = {
            "context_window": _fallback_lists(config.context_window_fallbacks)[1],
            "content_policy": _fallback_lists(config.content_policy_fallbacks)[1],
        }
        self.default_chat: str | None = config.default_model or self._first(CHAT_MODES)
        self.default_embedding: str | None = config.default_embedding_model or self._first(
            frozenset({"embedding"})
        )

    @property
    def routing(self) -> str:
        """The strategy by which a group's deployments are ordered."""
        return self._config.routing

    @classmethod
    def build(cls, config: GatewayConfig) -> ModelTable:
        """The table of a configuration whose names all exist.

        Raises:
            ConfigurationError: a fallback, default or permitted model that no group has, or two
            different deployments with one id.
        """
        table = cls(config)
        faults = table.faults()
        if faults:
            raise refusal(faults)
        return table

    def faults(self) -> list[Fault]:
        """Every name in the configuration that names nothing, and ids that name two things."""
        config = self._config
        found = list(_shared_ids(self._groups.values()))
        for setting in ("fallbacks", "context_window_fallbacks", "content_policy_fallbacks"):
            for path, name in _fallback_names(getattr(config, setting)):
                is_key = isinstance(path[-1], str)  # and may then be a pattern's own name
                if not (is_key and name in {"*", *self._groups}):
                    found += self._unknown((setting, *path), name)
        for setting in ("default_model", "default_embedding_model"):
            name = getattr(config, setting)
            if name is not None:
                found += self._unknown((setting,), name)
        moderator = config.validation.moderation_model
        if moderator is not None:
            found += self._unknown(("validation", "moderation_model"), moderator)
        for index, tenant in enumerate(config.tenants):
            for place, name in enumerate(tenant.models or ()):
                if not any(_regex(name).fullmatch(known) for known in self._groups):
                    found += self._unknown(("tenants", index, "models", place), name)
        return found

    def group(self, name: str) -> Group:
        """The group that a name stands for.

        Raises:
            ModelNotFound: no group has this name and no pattern matches it.
        """
        found = self._groups.get(name)
        if found is not None and "*" not in name:
            return found
        found = self._by_pattern(name)
        if found is None:
            raise self._not_found(name)
        return found

    def names(self) -> list[str]:
        """Names of all groups that can be asked for, in the order of the configuration."""
        return [name for name in self._groups if "*" not in name]

    def patterns(self) -> list[str]:
        """Names of the groups with a `*`, in the order of the configuration."""
        return [name for name in self._groups if "*" in name]

    def deployment(self, deployment_id: str) -> Deployment:
        """A deployment by its id, one that a pattern was filled in for included.

        Raises:
            ModelNotFound: this configuration has no such deployment.
        """
        found = self._by_id.get(deployment_id)
        if found is not None:
            return found
        for _, group in self._patterns:
            for pattern in group.deployments:
                name = deployment_id.removeprefix(f"{pattern.id}:")
                filled = None if name == deployment_id else self._by_pattern(name)
                for deployment in filled.deployments if filled else ():
                    if deployment.id == deployment_id:
                        return deployment
        raise ModelNotFound(f"no deployment has the id {deployment_id[:400]!r}")

    def deployments(self) -> list[Deployment]:
        """Every deployment once, in the order of the configuration."""
        return list(self._by_id.values())

    def fallbacks(self, group: str) -> list[str]:
        """Names of the groups to try when this one cannot answer, in order."""
        if not (self._fallbacks or self._general):
            return []
        return self._listed(self._fallbacks, group, self._general)

    def special_fallbacks(self, kind: SpecialKind, group: str) -> list[str]:
        """Names of the groups to try, in order, when a provider refuses what this one was asked.

        `context_window`: the prompt is too long; `content_policy`: a filter would not answer it.
        Empty where nothing is configured: the refusal is then the answer.
        """
        lists = self._special[kind]
        return self._listed(lists, group, ()) if lists else []

    def reachable(self, group: str) -> list[str]:
        """Names of all groups that an answer for this one may come from, itself first.

        Its fallbacks, and whatever the special ones of these can lead to.
        """
        found = dict.fromkeys([group, *self.fallbacks(group)])
        if any(self._special.values()):
            queue = list(found)
            while queue:
                name = queue.pop(0)
                for kind in SPECIAL_KINDS:
                    new = [n for n in self.special_fallbacks(kind, name) if n not in found]
                    found |= dict.fromkeys(new)
                    queue += new
        return list(found)

    def _listed(
        self, lists: Mapping[str, list[str]], group: str, otherwise: Sequence[str]
    ) -> list[str]:
        """The list of a group: its own, else its pattern's, else that of `*`."""
        names: Sequence[str] | None = lists.get(group)
        if names is None and group not in self._groups:
            matched = self._by_pattern(group)
            names = None if matched is None else lists.get(matched.pattern)
        if names is None:
            names = lists.get("*", otherwise)
        return [name for name in dict.fromkeys(names) if name != group]

    def default(self, route: str) -> str:
        """The model of a request that names none; `route` is chat, completion or embedding.

        Raises:
            ModelNotFound: the configuration has no model for this route.
        """
        name = self.default_embedding if route == "embedding" else self.default_chat
        if name is None:
            setting = "default_embedding_model" if route == "embedding" else "default_model"
            raise ModelNotFound(
                f"no model is named, and none of the configured ones is for {route}; "
                f"name one, or set {setting}",
                param="model",
            )
        return name

    def describe(self, name: str) -> dict[str, Any]:
        """A model as `GET /v1/models` shows it, patterns included.

        Raises:
            ModelNotFound: no group has this name and no pattern matches it.
        """
        group = self._groups.get(name) or self.group(name)
        return {
            "id": name,
            "object": "model",
            "created": 0,
            "owned_by": group.deployments[0].provider,
            "mode": group.mode,
        }

    def _by_pattern(self, name: str) -> Group | None:
        known = self._matched.get(name)
        if known is not None or not is_callable_name(name):
            return known
        for text in (name, f"{provider_of(name)}/{name}"):  # LiteLLM's order, too
            for regex, group in self._patterns:
                match = regex.fullmatch(text)
                if match is not None:
                    return self._filled(group, name, match)
            if "/" in name:
                break
        return None

    def _filled(self, group: Group, name: str, match: re.Match[str]) -> Group:
        keys = self._config.api_keys
        deployments = tuple(_fill(d, name, match, keys) for d in group.deployments)
        filled = replace(group, name=name, deployments=deployments)
        if len(self._matched) >= MATCHED_MAX:
            self._matched.clear()
        self._matched[name] = filled
        return filled

    def _first(self, modes: Collection[str]) -> str | None:
        names = (n for n, group in self._groups.items() if "*" not in n and group.mode in modes)
        return next(names, None)

    def _unknown(self, path: tuple[str | int, ...], name: str) -> list[Fault]:
        if (name in self._groups and "*" not in name) or self._by_pattern(name) is not None:
            return []
        return [Fault(path, f"no model is named {name[:100]!r}; {self._hint(name)}")]

    def _not_found(self, name: str) -> ModelNotFound:
        shown = name[:100]
        message = f"the model {shown!r} does not exist; {self._hint(name)}"
        return ModelNotFound(message, param="model", model=shown)

    def _hint(self, name: str) -> str:
        close = nearest(name[:NAME_COMPARED_MAX], islice(self._groups, NAMES_COMPARED_MAX))
        if close is None:
            return f"the models are {self._shown()}"
        return f"did you mean {close!r}? The models are {self._shown()}"

    def _shown(self) -> str:
        names = list(self._groups)
        more = f" and {len(names) - NAMES_SHOWN_MAX} more" if len(names) > NAMES_SHOWN_MAX else ""
        return (", ".join(names[:NAMES_SHOWN_MAX]) or "none (model_list is empty)") + more


def allows(models: Collection[str] | None, name: str) -> bool:
    """Whether a tenant's list of models, which may hold patterns, has this name. None has all."""
    return models is None or name in models or any(_regex(m).fullmatch(name) for m in models)


def provider_of(model: str) -> str:
    """LiteLLM's name of a model's provider: `openai/gpt-4o` and `gpt-4o` → `openai`."""
    if "/" in model:
        return model.partition("/")[0]
    return next((name for regex, name in _PROVIDER_OF if regex.match(model)), "unknown")


def family(provider: str) -> str:
    """The name under which a provider's key is given: `cohere_chat` → `cohere`."""
    return _FAMILY.get(provider, provider)


def is_callable_name(name: str) -> bool:
    """Whether a name may be filled into a pattern: no star, no URL, no way up a path."""
    odd = "//" in name or ".." in name or name.endswith("/")
    return bool(_CALLABLE_NAME.fullmatch(name)) and not odd


def _groups(entries: Sequence[dict[str, Any]], keys: Mapping[str, Any]) -> Iterator[Group]:
    """Groups in order of first appearance."""
    seen: dict[str, list[tuple[str, ...]]] = {}
    groups: dict[str, list[Deployment]] = {}
    for entry in entries:
        deployment = _deployment(entry, keys, seen)
        groups.setdefault(deployment.group, []).append(deployment)
    for name, members in groups.items():
        yield Group(name, name, _mode(name, members[0]), tuple(members))


def _deployment(
    entry: dict[str, Any], keys: Mapping[str, Any], seen: dict[str, list[tuple[str, ...]]]
) -> Deployment:
    given = entry["litellm_params"]
    info = dict(entry.get("model_info") or {})
    # LiteLLM's place is `litellm_params`; older files have these beside it, or in `model_info`.
    ours = {k: given.get(k, entry.get(k, info.get(k))) for k in ("weight", "order", "rpm", "tpm")}
    allowed = {*entry.get("allowed_params", ()), *(given.get("allowed_params") or ())}
    model = given["model"]
    provider = given.get("custom_llm_provider") or provider_of(model)
    params = _with_key({k: v for k, v in given.items() if k not in OURS}, provider, keys)
    explicit = info.get("id")
    # The lane that it is reached by tells two apart, and changes nothing of their answers.
    meaning, hidden = _meaning(model, {k: v for k, v in params.items() if k != "lane"})
    name = f"{meaning}-{params['lane']}" if params.get("lane") else meaning
    return Deployment(
        id=_hash_id(name, hidden, seen) if explicit is None else str(explicit),
        group=entry["model_name"],
        model=model,
        provider=provider,
        params=params,
        allowed_params=frozenset(allowed),
        info=info,
        meaning=meaning,
        **ours,
    )


def _with_key(params: dict[str, Any], provider: str, keys: Mapping[str, Any]) -> dict[str, Any]:
    """`params` with the provider's key from `api_keys`, if they have none of their own."""
    if params.get("api_key") is not None or "*" in provider:
        return params
    for name, key in keys.items():
        if family(name) == family(provider):
            return {**params, "api_key": key}
    return params


def _meaning(model: str, params: dict[str, Any]) -> tuple[str, tuple[str, ...]]:
    """A hash of everything but secrets, and the secrets."""
    secrets: list[str] = []
    shape = json.dumps([model, _masked(params, secrets)], sort_keys=True, default=str)
    return hashlib.blake2b(shape.encode(), digest_size=8).hexdigest(), tuple(secrets)


def _hash_id(meaning: str, secrets: tuple[str, ...], seen: dict[str, list[tuple[str, ...]]]) -> str:
    """The hash as an id; a number tells apart those that differ only in secrets."""
    variants = seen.setdefault(meaning, [])
    if secrets not in variants:
        variants.append(secrets)
    number = variants.index(secrets)
    return f"{meaning}-{number + 1}" if number else meaning


def _masked(value: Any, secrets: list[str]) -> Any:
    if isinstance(value, SecretStr):
        secrets.append(value.get_secret_value())
        return "*"
    if isinstance(value, str) and value.startswith("secret/") and is_reference(value):
        secrets.append(value)
        return "*"
    if isinstance(value, Mapping):
        return {str(key): _masked(value[key], secrets) for key in sorted(value, key=str)}
    if isinstance(value, list | tuple):
        return [_masked(item, secrets) for item in value]
    return value


def _shared_ids(groups: Iterable[Group]) -> Iterator[Fault]:
    first: dict[str, Deployment] = {}
    for deployment in (d for group in groups for d in group.deployments):
        other = first.setdefault(deployment.id, deployment)
        if (other.model, other.params) != (deployment.model, deployment.params):
            message = f"two different deployments have model_info.id {deployment.id!r}"
            yield Fault(("model_list",), f"{message}; give each its own")


def _mode(name: str, deployment: Deployment) -> str:
    said = deployment.info.get("mode")
    if isinstance(said, str) and said:
        return said
    text = f"{name} {deployment.model}"
    if _EMBEDS.search(text):
        return "embedding"
    return "other" if _NO_CHAT.search(text) else "chat"


def _fill(
    deployment: Deployment, name: str, match: re.Match[str], keys: Mapping[str, Any]
) -> Deployment:
    """A pattern's deployment for one name: LiteLLM's rules for what the stars become."""
    model = deployment.model
    if "*" in model:
        parts = match.groups()
        if len(parts) > model.count("*"):
            model = match.string
        else:
            for part in parts:
                model = model.replace("*", part, 1)
    provider = deployment.params.get("custom_llm_provider") or provider_of(model)
    params = _with_key(deployment.params, provider, keys)
    return replace(
        deployment,
        id=f"{deployment.id}:{name}",
        group=name,
        model=model,
        provider=provider,
        params=params,
        filled_from=deployment.id,
    )


def _regex(pattern: str) -> re.Pattern[str]:
    return re.compile(re.escape(pattern).replace(r"\*", "(.*)"))


def _fallback_lists(
    fallbacks: Sequence[str | dict[str, list[str]]] | None,
) -> tuple[list[str], dict[str, list[str]]]:
    """The list for every group, and the lists of single groups."""
    general = [item for item in fallbacks or () if isinstance(item, str)]
    special: dict[str, list[str]] = {}
    for item in fallbacks or ():
        if not isinstance(item, str):
            for name, names in item.items():
                special.setdefault(name, []).extend(names)
    return general, special


def _fallback_names(
    fallbacks: Sequence[str | dict[str, list[str]]] | None,
) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """Every name in a list of fallbacks, with its place in it."""
    for index, item in enumerate(fallbacks or ()):
        if isinstance(item, str):
            yield (index,), item
            continue
        for name, names in item.items():
            yield from (((index, name, n), text) for n, text in enumerate(names))
            yield (index, name), name
