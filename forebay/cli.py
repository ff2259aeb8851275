"""The `forebay` command.

Exit codes: 0 done, 1 failed, 2 bad usage or configuration, 3 partly done.
"""

from __future__ import annotations

import argparse
import http.client
import importlib
import json
import os
import secrets
import signal
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from actors.registry.policy import RegistryUnavailable
from actors.registry.store import read_access
from forebay import __version__, running, usage_command
from forebay import config as configuration
from forebay.errors import AuthenticationError, ConfigurationError, GatewayError
from forebay.pipelines import commands as jobs
from forebay.secrets import HASH_PREFIX, hash_key, key_secret, new_key, operator_key

DONE, FAILED, BAD_USAGE = 0, 1, 2
DOWN_TIMEOUT_S = 400.0  # a drain waits for the longest stream


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and say how it went, as an exit code."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except ConfigurationError as error:
        return _say(arguments, error.message, BAD_USAGE)
    except GatewayError as error:
        return _say(arguments, error.message, FAILED)
    except BrokenPipeError:
        # Whoever read the output has seen enough; keep Python from complaining when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except (
        ConnectionError,
        TimeoutError,
        urllib.error.URLError,
        http.client.HTTPException,
    ) as error:
        url = _url(arguments) if hasattr(arguments, "url") else "http://127.0.0.1:8000"
        return _say(
            arguments, f"nothing answers at {url} ({error}); `forebay up` starts it", FAILED
        )
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="forebay", description="An LLM gateway on Ray.")
    parser.add_argument("--version", action="version", version=f"forebay {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(
        name: str, run: Callable[[argparse.Namespace], int], words: str, *, asks: bool = False
    ) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=words, description=words)
        made.add_argument("--json", action="store_true", help="print JSON")
        made.set_defaults(run=run)
        if asks:
            _reaches_the_gateway(made)
        return made

    up = command("up", _up, "start the gateway; Ctrl-C drains and stops it")
    up.add_argument("--config", type=Path, help="forebay.yaml (default: FOREBAY_CONFIG)")
    up.add_argument("--host", help="address to listen on (default 127.0.0.1)")
    up.add_argument("--port", type=int, help="port to listen on (default 8000)")
    up.add_argument(
        "--replicas", metavar="N|auto", help="how many gateway processes; auto: as fit the machine"
    )
    up.add_argument("--address", help="attach to this Ray instead of starting one")
    command("down", _down, "drain and stop the gateway that `forebay up` started here")
    command("status", _status, "what runs, and where", asks=True)
    ask = command("ask", _ask, "ask a model one question", asks=True)
    ask.add_argument("question")
    ask.add_argument("--model", help="default: the first of `forebay models`")
    ask.add_argument("--stream", action="store_true", help="print the answer as it comes")
    jobs.add_to(command)
    command("models", _models, "the models that can be asked", asks=True)
    command("health", _health, "how the gateway and its owners are", asks=True)
    usage = command("usage", _usage, "what was used, and what it cost", asks=True)
    usage_command.add_arguments(usage)

    keys = commands.add_parser("keys", help="keys for tenants").add_subparsers(
        required=True, metavar="ACTION"
    )
    new = keys.add_parser(
        "new", help="make a key in the running gateway; with none, print one for the configuration"
    )
    new.add_argument("tenant")
    new.add_argument("--id", help="the key's name (default: made up)")
    new.add_argument("--admin", action="store_true", help="may change keys and configuration")
    new.add_argument(
        "--limit", action="append", default=[], metavar="NAME=VALUE",
        help="a limit of the tenant, such as requests_per_minute=600",
    )  # fmt: skip
    new.add_argument("--model", action="append", metavar="NAME", help="a model it may use")
    listing = keys.add_parser("list", help="every key in force; keys themselves are not known")
    revoke = keys.add_parser("revoke", help="end a key, everywhere within a second")
    revoke.add_argument("id")
    revoke.add_argument("--tenant", help="whose, where several tenants have a key of this id")
    for made, run in ((new, _key_new), (listing, _key_list), (revoke, _key_revoke)):
        made.add_argument("--json", action="store_true", help="print JSON")
        _reaches_the_gateway(made)
        made.set_defaults(run=run)

    config = commands.add_parser("config", help="the configuration").add_subparsers(
        required=True, metavar="ACTION"
    )
    check = config.add_parser("check", help="say what is wrong in a file, and where")
    check.add_argument("file", type=Path)
    show = config.add_parser("show", help="the configuration in force, without secrets")
    show.add_argument("--config", type=Path)
    schema = config.add_parser("schema", help="the JSON schema of the file")
    for made, run in ((check, _config_check), (show, _config_show), (schema, _config_schema)):
        made.add_argument("--json", action="store_true")
        made.set_defaults(run=run)
    return parser


def _reaches_the_gateway(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--url", help="the gateway (default: the one that runs here)")
    parser.add_argument(
        "--key", help="API key (default: FOREBAY_API_KEY, else the operator's for the one here)"
    )


# ------------------------------------------------------------------------------------- up, down


def _up(arguments: argparse.Namespace) -> int:
    config = configuration.load(arguments.config, _environment(arguments))
    # By name, as `serve run deployments.app:build` does: imports point the other way.
    ingress = importlib.import_module("deployments.ingress")
    host, port = config.server.host, config.server.port
    data_dir = Path(config.data_dir).expanduser()
    if (other := running.read(data_dir)) is not None:
        raise ConfigurationError(
            f"Forebay runs already at {other.url} (pid {other.pid}) with this data directory; "
            "`forebay down` stops it, FOREBAY_DATA_DIR names another directory"
        )
    if not ingress.is_loopback(host):
        ingress.require_keys_or_loopback(host, has_keys(config, data_dir))
    _require_free_port(host, port)
    data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    from forebay.up import Up

    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    with Up(config, arguments.address, _progress(arguments)) as up:
        up.start(stop)
        if stop.is_set():
            return FAILED
        running.write(data_dir, up.url, up.ray_address, up.namespace)
        try:
            _announce(arguments, up.url, up.models, up.took_s)
            stop.wait()
        finally:
            running.erase(data_dir)
        return DONE


def has_keys(config: configuration.SystemConfig, data_dir: Path) -> bool:
    """Whether a key was ever made, in the configuration or in a system that ran here before."""
    if any(tenant.keys for tenant in config.gateway.tenants):
        return True
    try:
        access = read_access(str(data_dir / "registry.db"))
    except RegistryUnavailable as error:
        raise ConfigurationError(str(error)) from None
    return access is not None and bool(access.keys or access.revoked)


def _environment(arguments: argparse.Namespace) -> dict[str, str]:
    """The environment, with what the command line says on top."""
    environ = dict(os.environ)
    for name in ("host", "port", "replicas"):
        value = getattr(arguments, name)
        if value is not None:
            environ[f"FOREBAY_SERVER_{name.upper()}"] = str(value)
    return environ


def _require_free_port(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigurationError(
                f"cannot listen on {host}:{port}: {error.strerror}; choose another with --port",
                param="server.port",
            ) from None


def _progress(arguments: argparse.Namespace) -> Callable[[str], None]:
    begun_s = time.monotonic()

    def say(words: str) -> None:
        took_s = time.monotonic() - begun_s
        print(f"  {took_s:5.1f} s  {words}", file=sys.stderr, flush=True)

    return say


def _announce(arguments: argparse.Namespace, url: str, models: list[str], took_s: float) -> None:
    if arguments.json:
        told = {"url": url, "models": models, "took_s": round(took_s, 2), "pid": os.getpid()}
        print(json.dumps(told), flush=True)
        return
    body = json.dumps({"model": models[0], "messages": [{"role": "user", "content": "Hello"}]})
    print(
        f"\nForebay is ready at {url} after {took_s:.1f} s (Ctrl-C drains and stops)\n"
        f"  models: {', '.join(models)}\n"
        f"  curl {url}/v1/chat/completions -H 'content-type: application/json' -d '{body}'\n",
        flush=True,
    )


def _down(arguments: argparse.Namespace) -> int:
    found = running.read(configuration.data_dir(os.environ))
    if found is None:
        return _say(arguments, "nothing runs that `forebay up` started here", FAILED)
    os.kill(found.pid, signal.SIGINT)
    deadline_s = time.monotonic() + DOWN_TIMEOUT_S
    while found.alive:
        if time.monotonic() > deadline_s:
            return _say(arguments, f"pid {found.pid} is still draining", FAILED)
        time.sleep(0.1)
    return _say(arguments, f"stopped {found.url}", DONE)


def _status(arguments: argparse.Namespace) -> int:
    found = running.read(configuration.data_dir(os.environ))
    if found is None and arguments.url is None:
        return _say(arguments, "nothing runs that `forebay up` started here", FAILED)
    url = _url(arguments)
    ready, _ = _get(arguments, "/health/ready", statuses=(200, 503))
    told = {
        "url": url,
        "ready": ready == 200,
        "pid": None if found is None else found.pid,
        "ray_address": None if found is None else found.ray_address,
    }
    _print(arguments, told)
    return DONE if ready == 200 else FAILED


# ---------------------------------------------------------------------------------- over HTTP


def _ask(arguments: argparse.Namespace) -> int:
    model = arguments.model or _get(arguments, "/v1/models")[1]["data"][0]["id"]
    message = {"role": "user", "content": arguments.question}
    body: dict[str, Any] = {"model": model, "messages": [message]}
    if not arguments.stream:
        _, answer = _get(arguments, "/v1/chat/completions", body)
        if arguments.json:
            print(json.dumps(answer))
        else:
            print(answer["choices"][0]["message"]["content"])
        return DONE
    request = _request(arguments, "/v1/chat/completions", {**body, "stream": True})
    with _open(request, (200,)) as response:
        for line in response:
            data = line.decode().strip().removeprefix("data: ")
            if not data or data == "[DONE]":
                continue
            chunk = json.loads(data)
            if "error" in chunk:
                return _say(arguments, chunk["error"]["message"], FAILED)
            if arguments.json:
                print(data, flush=True)
            else:
                for choice in chunk.get("choices") or []:
                    print(choice["delta"].get("content") or "", end="", flush=True)
    if not arguments.json:
        print()
    return DONE


def _models(arguments: argparse.Namespace) -> int:
    _, answer = _get(arguments, "/v1/models")
    if arguments.json:
        print(json.dumps(answer))
    else:
        for model in answer["data"]:
            print(model["id"])
    return DONE


def _health(arguments: argparse.Namespace) -> int:
    """Degraded is no failure: requests are served."""
    _, told = _get(arguments, "/health/detail")
    status = told.get("status")
    if arguments.json:
        print(json.dumps(told))
    else:
        checks = told.get("details", {}).get("checks", {})
        print(status if checks else f"{status}: {told.get('message')}")
        rows = [(name, check["status"], check["message"]) for name, check in checks.items()]
        _print_table(rows, "  ")
    return DONE if status in ("healthy", "degraded") else FAILED


def _usage(arguments: argparse.Namespace) -> int:
    _, told = _get(arguments, usage_command.path(arguments, time.time()))
    if arguments.json or arguments.format == "json":
        print(json.dumps(told))
    else:
        print(usage_command.text(arguments, told))
    return DONE


def _url(arguments: argparse.Namespace) -> str:
    if arguments.url:
        return str(arguments.url).rstrip("/")
    found = running.read(configuration.data_dir(os.environ))
    return "http://127.0.0.1:8000" if found is None else found.url


def _key(arguments: argparse.Namespace, url: str) -> str | None:
    """The key as given, else the operator's, which only the gateway of this data directory gets."""
    given: str | None = arguments.key or os.environ.get("FOREBAY_API_KEY")
    if given:
        return given
    data_dir = configuration.data_dir(os.environ)
    found = running.read(data_dir)
    if found is None or found.url.rstrip("/") != url:
        return None
    return operator_key(key_secret(os.environ, data_dir))


def _request(
    arguments: argparse.Namespace, path: str, body: Any = None, method: str | None = None
) -> urllib.request.Request:
    url = _url(arguments)
    if not url.startswith(("http://", "https://")):
        raise ConfigurationError(f"--url must begin with http:// or https://, not {url!r}")
    headers = {"content-type": "application/json"}
    key = _key(arguments, url)
    if key:
        if not (key.isascii() and key.isprintable()):
            raise ConfigurationError("the API key holds characters that no key has")
        headers["authorization"] = f"Bearer {key}"
    data = None if body is None else json.dumps(body).encode()
    return urllib.request.Request(url + path, data, headers, method=method)  # noqa: S310 (checked)


def _open(request: urllib.request.Request, statuses: tuple[int, ...]) -> Any:
    near = urlsplit(request.full_url).hostname in ("127.0.0.1", "::1", "localhost")
    # HTTP_PROXY is not meant for this machine.
    proxies = [urllib.request.ProxyHandler({})] if near else []
    try:
        return urllib.request.build_opener(*proxies).open(request, timeout=310)
    except urllib.error.HTTPError as error:
        if error.code in statuses:
            return error
        try:
            message = str(json.loads(error.read())["error"]["message"])
        except (ValueError, KeyError, TypeError):
            message = f"HTTP {error.code}"
        if error.code == AuthenticationError.status:
            raise AuthenticationError(f"{message} Give one: --key or FOREBAY_API_KEY.") from None
        raise GatewayError(message, status=error.code) from None


def _get(
    arguments: argparse.Namespace,
    path: str,
    body: Any = None,
    statuses: tuple[int, ...] = (200,),
    method: str | None = None,
) -> tuple[int, Any]:
    """Status and JSON of an answer; a POST if there is a body and no other method is named."""
    with _open(_request(arguments, path, body, method), statuses) as response:
        try:
            return response.status, json.loads(response.read() or b"null")
        except ValueError:
            raise GatewayError(f"what answers at {_url(arguments)} is not Forebay") from None


# ----------------------------------------------------------------------- keys, configuration


def _key_new(arguments: argparse.Namespace) -> int:
    """A key made in the gateway that runs, or one for the configuration of one that will."""
    limits = _limits(arguments.limit)
    # What is wrong is said here, before anything is asked or made.
    given: dict[str, Any] = {"id": arguments.tenant, "models": arguments.model}
    given |= {"admin": arguments.admin, "limits": limits or None}
    tenant = configuration.TenantConfig(**given)
    key_id = arguments.id or secrets.token_hex(4)
    configuration.KeyConfig(id=key_id, hash=HASH_PREFIX + "0" * 64)
    nothing_runs = running.read(configuration.data_dir(os.environ)) is None
    if arguments.url is None and nothing_runs:
        return _key_for_the_configuration(arguments, tenant, key_id, limits)
    body = {"tenant": tenant.id, "id": key_id, "admin": tenant.admin, "models": tenant.models}
    body |= {"limits": limits or None}
    _, made = _get(arguments, "/admin/keys", body, statuses=(201,))
    if arguments.json:
        print(json.dumps(made))
        return DONE
    print(f"key (shown once): {made['key']}")
    print(f"  id {made['id']}, tenant {made['tenant']}{', admin' if made['admin'] else ''}")
    print(f"  curl {_url(arguments)}/v1/models -H 'authorization: Bearer {made['key']}'")
    return DONE


def _key_for_the_configuration(
    arguments: argparse.Namespace,
    tenant: configuration.TenantConfig,
    key_id: str,
    limits: dict[str, Any],
) -> int:
    key = new_key()
    hashed = hash_key(key, key_secret(os.environ, configuration.data_dir(os.environ)))
    if arguments.json:
        told = {"tenant": tenant.id, "id": key_id, "key": key, "hash": hashed}
        more = {"admin": tenant.admin, "limits": limits, "models": tenant.models}
        print(json.dumps(told | {name: value for name, value in more.items() if value}))
        return DONE
    print(f"key (shown once): {key}")
    print("no gateway runs here; for its configuration:")
    print(f"  tenants:\n    - id: {json.dumps(tenant.id)}")
    print(f'      keys: [{{id: {json.dumps(key_id)}, hash: "{hashed}"}}]')
    for name, value in (("limits", limits), ("models", tenant.models), ("admin", tenant.admin)):
        if value:
            print(f"      {name}: {json.dumps(value)}")  # JSON is YAML
    return DONE


def _limits(given: Sequence[str]) -> dict[str, Any]:
    """Limits as `--limit NAME=VALUE` names them; their values are checked elsewhere."""
    limits: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not (name and equals):
            raise ConfigurationError(f"--limit takes NAME=VALUE, not {text!r}", param="limit")
        if name in limits:
            raise ConfigurationError(f"--limit {name} is given twice", param="limit")
        try:
            limits[name] = json.loads(value)
        except ValueError:
            limits[name] = value
    return limits


def _key_list(arguments: argparse.Namespace) -> int:
    _, answer = _get(arguments, "/admin/keys")
    keys = answer["data"]
    if arguments.json:
        print(json.dumps(keys))
        return DONE
    rows = [("ID", "TENANT", "SOURCE", "ADMIN", "CREATED")]
    rows += [
        (key["id"], key["tenant"], key["source"], "yes" if key["admin"] else "",
         str(key.get("created") or ""))
        for key in keys
    ]  # fmt: skip
    _print_table(rows)
    return DONE


def _key_revoke(arguments: argparse.Namespace) -> int:
    query = "" if arguments.tenant is None else f"?tenant={quote(arguments.tenant, safe='')}"
    path = f"/admin/keys/{quote(arguments.id, safe='')}{query}"
    _, gone = _get(arguments, path, method="DELETE")
    if arguments.json:
        print(json.dumps(gone))
    else:
        print(f"revoked: key {gone['id']} of {gone['tenant']}")
    return DONE


def _config_check(arguments: argparse.Namespace) -> int:
    problems = configuration.check(arguments.file)
    if arguments.json:
        print(json.dumps([{**vars_of(problem)} for problem in problems]))
    else:
        for problem in problems:
            print(problem)
        if not problems:
            print(f"{arguments.file}: nothing wrong")
    return BAD_USAGE if problems else DONE


def vars_of(problem: Any) -> dict[str, Any]:
    """A problem's fields, for JSON."""
    return {name: getattr(problem, name) for name in ("file", "line", "field", "message")}


def _config_show(arguments: argparse.Namespace) -> int:
    config = configuration.load(arguments.config, os.environ)
    if arguments.json:
        print(json.dumps(configuration.shown(config)))
    else:
        print(configuration.show(config), end="")
    return DONE


def _config_schema(arguments: argparse.Namespace) -> int:
    print(json.dumps(configuration.config_schema(), indent=1))
    return DONE


# ------------------------------------------------------------------------------------- words


def _print(arguments: argparse.Namespace, told: dict[str, Any], indent: str = "") -> None:
    if arguments.json:
        print(json.dumps(told, default=str))
        return
    for name, value in told.items():
        if isinstance(value, dict):
            print(f"{indent}{name}:")
            _print(arguments, value, indent + "  ")
        else:
            print(f"{indent}{name}: {value}")


def _print_table(rows: Sequence[Sequence[str]], indent: str = "") -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print(indent + "  ".join(cells).rstrip())


def _say(arguments: argparse.Namespace, words: str, code: int) -> int:
    if getattr(arguments, "json", False):
        print(json.dumps({"message": words, "exit": code}))
    else:
        print(
            words if code == DONE else f"forebay: {words}", file=sys.stderr if code else sys.stdout
        )
    return code


if __name__ == "__main__":
    sys.exit(main())
