"""`forebay embed` and `forebay map`."""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forebay import config as configuration
from forebay import running
from forebay.errors import ConfigurationError

if TYPE_CHECKING:
    from forebay.pipelines.estimate import Plan, Range
    from forebay.pipelines.job import Report

DONE, PARTLY = 0, 3
Command = Callable[..., argparse.ArgumentParser]


def add_to(command: Command) -> None:
    """Add both to the parser, with the function that makes a command."""
    embed = command("embed", _embed, "vectors for a file or folder of texts")
    embed.add_argument(
        "--text-column", required=True, metavar="T", help="name of the column of texts"
    )
    embed.add_argument("--dimensions", type=int, metavar="D", help="length of the vectors")
    ask = command("map", _map, "ask a model about each row of a file or folder")
    ask.add_argument("--prompt", help='the question, such as "Summarise {title}: {body}"')
    ask.add_argument("--prompt-file", type=Path, metavar="FILE", help="read the question from it")
    ask.add_argument(
        "--schema", type=Path, metavar="FILE", help="JSON schema; its properties become columns"
    )
    ask.add_argument("--max-tokens", type=int, metavar="N", help="most tokens of an answer")
    ask.add_argument("--temperature", type=float, metavar="X")
    for made in (embed, ask):
        made.add_argument("src", metavar="SRC", help="Parquet, JSONL or CSV")
        made.add_argument("dst", metavar="DST", help="a folder; its ending says the format")
        made.add_argument("--model", metavar="M", help="a model group (default: the default one)")
        made.add_argument("--id-column", metavar="I", help="unique ids; needed to resume")
        made.add_argument("--tenant", metavar="ID", help="whose limits hold, and who pays")
        made.add_argument("--dry-run", action="store_true", help="say what it takes, send nothing")
        made.add_argument("--max-cost", type=float, metavar="USD", help="stop before it costs more")
        made.add_argument(
            "--resume", action=argparse.BooleanOptionalAction, default=True,
            help="go on where an earlier run ended (default)",
        )  # fmt: skip
        made.add_argument(
            "--retry-dead-letter", action="store_true", help="send only the rows that failed"
        )
        made.add_argument(
            "--block-rows", type=int, metavar="N", help="rows that are sent and written at once"
        )
        made.add_argument("--workers", type=int, default=1, metavar="N", help="processes that send")
        made.add_argument(
            "--config", type=Path, help="forebay.yaml, where no gateway runs (FOREBAY_CONFIG)"
        )


def _embed(arguments: argparse.Namespace) -> int:
    from forebay import pipelines

    given: dict[str, Any] = {"text_column": arguments.text_column}
    given["dimensions"] = arguments.dimensions
    return _run(arguments, given, pipelines.plan, pipelines.embed_parquet)


def _map(arguments: argparse.Namespace) -> int:
    from forebay import pipelines

    if (arguments.prompt is None) == (arguments.prompt_file is None):
        raise ConfigurationError("give --prompt or --prompt-file", param="prompt")
    prompt = arguments.prompt or _read(arguments.prompt_file, "--prompt-file")
    given: dict[str, Any] = {"prompt": prompt}
    if arguments.schema is not None:
        try:
            given["schema"] = json.loads(_read(arguments.schema, "--schema"))
        except ValueError as error:
            raise ConfigurationError(f"--schema: {arguments.schema}: {error}") from None
    for name in ("max_tokens", "temperature"):
        if getattr(arguments, name) is not None:
            given[name] = getattr(arguments, name)
    return _run(arguments, given, pipelines.plan_generate, pipelines.generate_parquet)


def _run(
    arguments: argparse.Namespace,
    given: dict[str, Any],
    plan: Callable[..., Plan],
    run: Callable[..., Report | None],
) -> int:
    if arguments.dry_run and arguments.retry_dead_letter:
        raise ConfigurationError(
            "--dry-run tells of the source, not of failed rows; leave out --retry-dead-letter",
            param="dry_run",
        )
    _attach(arguments.config)
    given |= {"model": arguments.model, "id_column": arguments.id_column}
    if arguments.dry_run:
        planned = plan(arguments.src, dst=arguments.dst, **given)
        if arguments.json:
            print(json.dumps(planned.as_dict()))
        else:
            print("\n".join(_words(planned)))
        return DONE
    from forebay.pipelines.progress import Progress

    progress = Progress(sys.stderr)
    try:
        report = run(
            arguments.src,
            arguments.dst,
            tenant_id=arguments.tenant,
            max_cost_usd=arguments.max_cost,
            resume=arguments.resume,
            retry_dead_letter=arguments.retry_dead_letter,
            workers=arguments.workers,
            block_rows=arguments.block_rows,
            watch=None if arguments.json else progress,
            **given,
        )
    finally:
        progress.end()
    if report is None:
        print(json.dumps({"rows": 0}) if arguments.json else "the dead letter is empty")
        return DONE
    if arguments.json:
        print(json.dumps(report.as_dict()))
    else:
        print(_said(report, arguments.dst))
    return PARTLY if report.failed or report.left else DONE


def _attach(config: Path | None) -> None:
    """Join the gateway that runs here; without one, let a local Ray and its owners be started."""
    running.prepare_ray(os.environ, configuration.data_dir(os.environ))  # before Ray is imported
    # Ray tells of each step, and of Ray Data's own actors what nobody here can change.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    importlib.import_module("ray.data")  # which sets its own level
    for name in ("ray.data", "ray._private"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    found = running.read(configuration.data_dir(os.environ))
    if found is not None:
        if config is not None:
            raise ConfigurationError(
                f"--config: a gateway runs at {found.url}, and its configuration counts",
                param="config",
            )
        from forebay.system import ray_ready

        ray_ready(found.ray_address, found.namespace)
    elif config is not None:
        os.environ["FOREBAY_CONFIG"] = str(config.absolute())


def _read(path: Path, name: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"{name}: {path}: {error.strerror}", param=name) from None


def _words(plan: Plan) -> list[str]:
    def spread(range_: Range, form: str = ",.0f", unit: str = "") -> str:
        low, likely, high = (f"{unit}{value:{form}}" for value in asdict(range_).values())
        return f"{likely} ({low} to {high})"

    price = "not known: the deployment has no price"
    time = "not limited by the deployments"
    if plan.time_s is not None:
        from forebay.pipelines.progress import clock

        time = f"{clock(plan.time_s)} at least, by the deployments' limits"
    rows = [
        ("rows", f"{plan.rows:,}"),
        ("done", f"{plan.done:,}"),
        ("without text", f"{plan.empty:,}"),
        ("duplicates", f"{plan.duplicates:,}"),
        ("tokens", spread(plan.tokens)),
        ("calls", f"{plan.calls:,}"),
        ("cost", price if plan.cost_usd is None else spread(plan.cost_usd, ".4f", "$")),
        ("time", time),
    ]
    if plan.completion_tokens is not None:
        rows.insert(5, ("tokens of answers", spread(plan.completion_tokens)))
    width = max(len(name) for name, _ in rows) + 2
    return [name.ljust(width) + value for name, value in rows]


def _said(report: Report, dst: str) -> str:
    money = "cost not known" if report.cost_usd is None else f"${report.cost_usd:.4f}"
    good = _rows(report.rows - report.failed)
    words = [f"{good} in {dst}, {report.tokens:,} tokens, {money}"]
    if report.done_before:
        words.append(f"done before: {_rows(report.done_before)}")
    if report.failed:
        failed = f"failed: {_rows(report.failed)}, in {report.dead_letter}"
        words.append(f"{failed} (--retry-dead-letter sends them again)")
    if report.left:
        left = f"left: {_rows(report.left)}, since --max-cost is used up"
        words.append(f"{left}; the same command goes on")
    return "\n".join(words)


def _rows(count: int) -> str:
    return "1 row" if count == 1 else f"{count:,} rows"
