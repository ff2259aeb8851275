"""Embedding and asking over whole datasets: see `forebay.pipelines`."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from forebay.errors import ConfigurationError
from forebay.gateway import LiteLLMGateway
from forebay.pipelines import claim, embedding, generating, places, structured
from forebay.pipelines.account import HOPELESS_ROWS, Account
from forebay.pipelines.census import Census
from forebay.pipelines.embedding import EmbedWork
from forebay.pipelines.estimate import Plan, Range, chat_plan, embedding_plan, tokens_in
from forebay.pipelines.flow import apply
from forebay.pipelines.generating import GenerateWork
from forebay.pipelines.job import Job, Report, Watch
from forebay.pipelines.setting import Setting
from forebay.pipelines.system import counts_of, deployments_of, rates_of
from forebay.pipelines.template import Template

OnError = Literal["dead_letter", "raise"]
Path = str | os.PathLike[str]
EMBED_BLOCK_ROWS, EMBED_BLOCKS_AT_ONCE = 2048, 8
CHAT_BLOCK_ROWS, CHAT_BLOCKS_AT_ONCE = 32, 4
BLOCK_ROWS_MAX = 50_000
CHAT_EXTRA_TOKENS = 8
"""What a chat format adds to one message, about."""
ANSWER_TOKENS = Range(10, 150, 1000)
"""What an answer has where `max_tokens` does not say."""


def embed_dataset(
    ds: Any,
    *,
    text_column: str,
    model: str | None = None,
    id_column: str | None = None,
    tenant_id: str | None = None,
    dimensions: int | None = None,
    on_error: OnError = "dead_letter",
    max_cost_usd: float | None = None,
    workers: int = 1,
    namespace: str = "forebay",
) -> Any:
    """A `ray.data.Dataset` with vectors beside its texts. Lazy, as all of Ray Data is.

    Args:
        ds: a `ray.data.Dataset` with a column of texts.
        text_column: the column's name.
        model: a model group; None takes the default embedding one.
        id_column: a column that has to be there; what is resumed by it is `embed_parquet`.
        tenant_id: whose limits hold, and who pays.
        dimensions: the length of the vectors, where the model can shorten them.
        on_error: "dead_letter" keeps rows that cannot be embedded, with `embedding_error`; "raise"
            ends the job with the first one.
        max_cost_usd: rows beyond it are left out, so the dataset ends early.
        workers: processes that send blocks; the gateway's limits hold over all of them.

    Returns:
        The dataset with `embedding` (FixedSizeList of float32, null where the row failed),
        `embedding_error` (why, else null) and `tokens` (the provider's count, split by length).

    Raises:
        ConfigurationError: an argument or a column is wrong.
        GatewayError: when the dataset is consumed; every row would meet it.
    """
    setting = _embed_setting(
        "", text_column, model, id_column, tenant_id, dimensions, on_error, max_cost_usd,
        workers, namespace,
    )  # fmt: skip
    return _over_dataset(ds, setting)


def embed_parquet(
    src: Path,
    dst: Path,
    *,
    text_column: str,
    id_column: str | None = None,
    model: str | None = None,
    tenant_id: str | None = None,
    dimensions: int | None = None,
    on_error: OnError = "dead_letter",
    max_cost_usd: float | None = None,
    resume: bool = True,
    retry_dead_letter: bool = False,
    workers: int = 1,
    block_rows: int | None = None,
    filesystem: Any = None,
    namespace: str = "forebay",
    watch: Watch | None = None,
) -> Report | None:
    """Embed a file or folder of Parquet, JSONL or CSV into the folder `dst`.

    The ending of `dst` says its format, else it is Parquet. Rows that cannot be embedded are in
    `dst/_dead_letter`, as Parquet; with `retry_dead_letter` only those are sent, and None is
    returned where there are none. What the job remembers is in `dst.forebay`: killed at any time,
    the same call goes on where whole blocks ended, by `id_column`, which must be unique. Rows that
    are new in `src` are done by the same call, too.

    `block_rows` are sent at once, written to one file, and lost together where a run is killed.
    Other arguments are those of `embed_dataset`; `filesystem` is pyarrow's, of src and dst; `watch`
    is told how far the job is, twice a second.

    Raises:
        ConfigurationError: nothing was sent; the message names the argument and the remedy.
        GatewayError: the job met an error that every row would meet.
    """
    setting = _embed_setting(
        os.fspath(src), text_column, model, id_column, tenant_id, dimensions, on_error,
        max_cost_usd, workers, namespace,
    )  # fmt: skip
    setting = _in_blocks(setting, block_rows)
    return _over_files(src, dst, setting, resume, retry_dead_letter, filesystem, watch)


def plan(
    src: Path,
    *,
    text_column: str,
    dst: Path | None = None,
    id_column: str | None = None,
    model: str | None = None,
    dimensions: int | None = None,
    filesystem: Any = None,
    namespace: str = "forebay",
) -> Plan:
    """What `embed_parquet` would take: nothing is sent, and `dst` is not written.

    With `dst` the rows that are done there already are left out.

    Raises:
        ConfigurationError: as `embed_parquet`.
    """
    setting = _embed_setting(
        os.fspath(src), text_column, model, id_column, None, dimensions, "dead_letter", None, 1,
        namespace,
    )  # fmt: skip
    return _planned(src, dst, setting, filesystem)


def generate_dataset(
    ds: Any,
    *,
    prompt: str,
    model: str | None = None,
    schema: Mapping[str, Any] | None = None,
    id_column: str | None = None,
    tenant_id: str | None = None,
    on_error: OnError = "dead_letter",
    max_cost_usd: float | None = None,
    workers: int = 1,
    namespace: str = "forebay",
    **parameters: Any,
) -> Any:
    """A `ray.data.Dataset` with an answer for each row.

    Args:
        prompt: the question, with columns in braces: `"Summarise {title}: {body}"`.
        schema: a JSON schema of an object; its properties become columns, and an answer that is
            not by it is an error. Without it the answer is the column `answer`.
        **parameters: OpenAI's chat parameters for every row; `max_tokens` is needed with
            `max_cost_usd`.

    Returns:
        The dataset with those columns, `generation_error` (null where all is well) and `tokens`.

    Other arguments, and what is raised, are as in `embed_dataset`.
    """
    setting = _chat_setting(
        "", prompt, model, schema, id_column, tenant_id, on_error, max_cost_usd, workers,
        namespace, parameters,
    )  # fmt: skip
    return _over_dataset(ds, setting)


def generate_parquet(
    src: Path,
    dst: Path,
    *,
    prompt: str,
    id_column: str | None = None,
    model: str | None = None,
    schema: Mapping[str, Any] | None = None,
    tenant_id: str | None = None,
    on_error: OnError = "dead_letter",
    max_cost_usd: float | None = None,
    resume: bool = True,
    retry_dead_letter: bool = False,
    workers: int = 1,
    block_rows: int | None = None,
    filesystem: Any = None,
    namespace: str = "forebay",
    watch: Watch | None = None,
    **parameters: Any,
) -> Report | None:
    """As `embed_parquet`, with the answers of `generate_dataset`."""
    setting = _chat_setting(
        os.fspath(src), prompt, model, schema, id_column, tenant_id, on_error, max_cost_usd,
        workers, namespace, parameters,
    )  # fmt: skip
    setting = _in_blocks(setting, block_rows)
    return _over_files(src, dst, setting, resume, retry_dead_letter, filesystem, watch)


def plan_generate(
    src: Path,
    *,
    prompt: str,
    dst: Path | None = None,
    id_column: str | None = None,
    model: str | None = None,
    schema: Mapping[str, Any] | None = None,
    filesystem: Any = None,
    namespace: str = "forebay",
    **parameters: Any,
) -> Plan:
    """What `generate_parquet` would take; as `plan`."""
    setting = _chat_setting(
        os.fspath(src), prompt, model, schema, id_column, None, "dead_letter", None, 1, namespace,
        parameters,
    )  # fmt: skip
    return _planned(src, dst, setting, filesystem)


# ------------------------------------------------------------------------------------- settings


def _embed_setting(
    src: str,
    text_column: str,
    model: str | None,
    id_column: str | None,
    tenant_id: str | None,
    dimensions: int | None,
    on_error: OnError,
    max_cost_usd: float | None,
    workers: int,
    namespace: str,
) -> Setting:
    _check(on_error, max_cost_usd, workers)
    if not isinstance(text_column, str) or not text_column:
        raise ConfigurationError("text_column must name a column", param="text_column")
    if dimensions is not None and not (isinstance(dimensions, int) and dimensions > 0):
        raise ConfigurationError("dimensions must be a positive number", param="dimensions")

    def planned(gateway: LiteLLMGateway, census: Census, done: int) -> Plan:
        counts, exact = counts_of(gateway, model, "embedding", census.sample)
        tokens = tokens_in(census, counts, exact=exact)
        return embedding_plan(census, tokens, rates_of(gateway, model, "embedding"), done)

    work = EmbedWork(text_column, model, tenant_id, dimensions, on_error == "raise")
    of: dict[str, Any] = {"source": _absolute(src), "model": model, "text column": text_column}
    of |= {"id column": id_column, "dimensions": dimensions}
    return Setting(
        work, (text_column,), embedding.COLUMNS, (embedding.EMBEDDING,), of, planned, id_column,
        EMBED_BLOCK_ROWS, EMBED_BLOCKS_AT_ONCE, "embedding", workers, text_column, max_cost_usd,
        namespace,
    )  # fmt: skip


def _chat_setting(
    src: str,
    prompt: str,
    model: str | None,
    schema: Mapping[str, Any] | None,
    id_column: str | None,
    tenant_id: str | None,
    on_error: OnError,
    max_cost_usd: float | None,
    workers: int,
    namespace: str,
    parameters: Mapping[str, Any],
) -> Setting:
    _check(on_error, max_cost_usd, workers)
    template = Template.of(prompt)
    for name in ("messages", "stream", "n", "response_format"):
        if name in parameters and (name != "response_format" or schema is not None):
            raise ConfigurationError(f"{name} cannot be given to a job over rows", param=name)
    if schema is not None:
        structured.check(schema, (generating.ERROR, generating.TOKENS))
    most = parameters.get("max_tokens")
    if max_cost_usd is not None and most is None:
        raise ConfigurationError(
            "max_cost_usd needs max_tokens: else nobody knows what a row costs at most",
            param="max_tokens",
        )

    def planned(gateway: LiteLLMGateway, census: Census, done: int) -> Plan:
        counts, exact = counts_of(gateway, model, "chat", census.sample)
        tokens = tokens_in(census, counts, exact=exact, extra=CHAT_EXTRA_TOKENS)
        usual = ANSWER_TOKENS
        answer = usual if most is None else Range(min(usual.low, most), min(150, most), most)
        return chat_plan(census, tokens, answer, rates_of(gateway, model, "chat"), done)

    work = GenerateWork(template, model, schema, tenant_id, dict(parameters), on_error == "raise")
    of = {"source": _absolute(src), "model": model, "prompt": prompt, "schema": schema}
    of |= {"id column": id_column, "parameters": dict(parameters)}
    only_good = tuple(n for n in work.columns if n not in (generating.ERROR, generating.TOKENS))
    return Setting(
        work, template.columns, work.columns, only_good, of, planned, id_column,
        CHAT_BLOCK_ROWS, CHAT_BLOCKS_AT_ONCE, "chat", workers, None, max_cost_usd, namespace,
    )  # fmt: skip


def _in_blocks(setting: Setting, block_rows: int | None) -> Setting:
    if block_rows is None:
        return setting
    if not 1 <= block_rows <= BLOCK_ROWS_MAX:
        raise ConfigurationError(
            f"block_rows must be from 1 to {BLOCK_ROWS_MAX}, not {block_rows}", param="block_rows"
        )
    return replace(setting, block_rows=block_rows)


def _check(on_error: str, max_cost_usd: float | None, workers: int) -> None:
    if on_error not in ("dead_letter", "raise"):
        raise ConfigurationError(
            f"on_error must be 'dead_letter' or 'raise', not {on_error!r}", param="on_error"
        )
    if max_cost_usd is not None and not 0 < max_cost_usd < math.inf:
        raise ConfigurationError("max_cost_usd must be positive", param="max_cost_usd")
    if not (isinstance(workers, int) and workers >= 1):
        raise ConfigurationError("workers must be 1 or more", param="workers")


def _absolute(path: str) -> str:
    return path if "://" in path or not path else os.path.abspath(os.path.expanduser(path))


# ----------------------------------------------------------------------------------------- runs


def _over_dataset(ds: Any, setting: Setting) -> Any:
    found = places.columns(ds, "the dataset")
    if found:
        setting.check_columns(found, "the dataset")
    with LiteLLMGateway(runtime="ray", namespace=setting.namespace) as gateway:
        deployments_of(gateway, setting.of["model"], setting.route)
        most_nano = setting.most_nano(gateway)
    import ray

    account = ray.remote(num_cpus=0)(Account).remote(most_nano, None, HOPELESS_ROWS)
    return apply(ds, setting, account, loud=True, doubtful=True)


def _over_files(
    src: Path,
    dst: Path,
    setting: Setting,
    resume: bool,
    retry_dead_letter: bool,
    filesystem: Any,
    watch: Watch | None,
) -> Report | None:
    if resume and setting.id_column is None:
        raise ConfigurationError(
            "id_column: resuming needs a column of unique ids; name one, or switch resuming off "
            "(resume=False, --no-resume)",
            param="id_column",
        )
    if retry_dead_letter and not resume:
        raise ConfigurationError("retry_dead_letter needs resume", param="resume")
    with LiteLLMGateway(runtime="ray", namespace=setting.namespace) as gateway:
        deployments_of(gateway, setting.of["model"], setting.route)
        source, there = places.source(src, filesystem), places.named(dst, filesystem)
        places.apart(source, there)
        if retry_dead_letter:
            claim.known(there, setting.of)
        job = Job(setting, source, places.destination(dst, filesystem), resume)
        return job.retry(gateway, watch) if retry_dead_letter else job.run(gateway, watch)


def _planned(src: Path, dst: Path | None, setting: Setting, filesystem: Any) -> Plan:
    with LiteLLMGateway(runtime="ray", namespace=setting.namespace) as gateway:
        deployments_of(gateway, setting.of["model"], setting.route)
        source = places.source(src, filesystem)
        there = None if dst is None else places.named(dst, filesystem)
        if there is not None:
            places.apart(source, there)
        return Job(setting, source, there).plan(gateway)
