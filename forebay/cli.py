"""The `forebay` command.

Exit codes: 0 done, 1 failed, 2 bad usage or configuration.
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
from urllib.parse import urlsplit

from forebay import __version__, running
from forebay import config as configuration
from forebay.errors import ConfigurationError, GatewayError

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
            made.add_argument("--url", help="the gateway (default: the one that runs here)")
            made.add_argument("--key", help="API key (default: FOREBAY_API_KEY)")
        return made

    up = command("up", _up, "start the gateway; Ctrl-C drains and stops it")
    up.add_argument("--config", type=Path, help="forebay.yaml (default: FOREBAY_CONFIG)")
    up.add_argument("--host", help="address to listen on (default 127.0.0.1)")
    up.add_argument("--port", type=int, help="port to listen on (default 8000)")
    up.add_argument("--replicas", type=int, help="how many gateway processes")
    up.add_argument("--address", help="attach to this Ray instead of starting one")
    command("down", _down, "drain and stop the gateway that `forebay up` started here")
    command("status", _status, "what runs, and where", asks=True)
    ask = command("ask", _ask, "ask a model one question", asks=True)
    ask.add_argument("question")
    ask.add_argument("--model", help="default: the first of `forebay models`")
    ask.add_argument("--stream", action="store_true", help="print the answer as it comes")
    command("models", _models, "the models that can be asked", asks=True)
    command("health", _health, "how the gateway and its owners are", asks=True)

    keys = commands.add_parser("keys", help="keys for tenants").add_subparsers(
        required=True, metavar="ACTION"
    )
    new = keys.add_parser("new", help="print a new key once, and its hash for the configuration")
    new.add_argument("tenant")
    new.add_argument("--json", action="store_true")
    new.set_defaults(run=_key_new)

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


# ------------------------------------------------------------------------------------- up, down


def _up(arguments: argparse.Namespace) -> int:
    config = configuration.load(arguments.config, _environment(arguments))
    # By name, as `serve run deployments.app:build` does: imports point the other way.
    ingress = importlib.import_module("deployments.ingress")
    host, port = config.server.host, config.server.port
    ingress.require_keys_or_loopback(host, config.gateway.tenants)
    _require_free_port(host, port)
    data_dir = Path(config.data_dir).expanduser()
    data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    if (other := running.read(data_dir)) is not None:
        raise ConfigurationError(
            f"Forebay runs already at {other.url} (pid {other.pid}) with this data directory; "
            "`forebay down` stops it, FOREBAY_DATA_DIR names another directory"
        )
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
    _, told = _get(arguments, "/health/detail")
    _print(arguments, told)
    return DONE if told.get("status") == "healthy" else FAILED


def _url(arguments: argparse.Namespace) -> str:
    if arguments.url:
        return str(arguments.url).rstrip("/")
    found = running.read(configuration.data_dir(os.environ))
    return "http://127.0.0.1:8000" if found is None else found.url


def _request(
    arguments: argparse.Namespace, path: str, body: dict[str, Any] | None = None
) -> urllib.request.Request:
    url = _url(arguments)
    if not url.startswith(("http://", "https://")):
        raise ConfigurationError(f"--url must begin with http:// or https://, not {url!r}")
    headers = {"content-type": "application/json"}
    key = arguments.key or os.environ.get("FOREBAY_API_KEY")
    if key:
        headers["authorization"] = f"Bearer {key}"
    data = None if body is None else json.dumps(body).encode()
    return urllib.request.Request(url + path, data, headers)  # noqa: S310 (checked above)


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
            message = json.loads(error.read())["error"]["message"]
        except (ValueError, KeyError, TypeError):
            message = f"HTTP {error.code}"
        raise GatewayError(message, status=error.code) from None


def _get(
    arguments: argparse.Namespace,
    path: str,
    body: dict[str, Any] | None = None,
    statuses: tuple[int, ...] = (200,),
) -> tuple[int, Any]:
    with _open(_request(arguments, path, body), statuses) as response:
        try:
            return response.status, json.loads(response.read() or b"null")
        except ValueError:
            raise GatewayError(f"what answers at {_url(arguments)} is not Forebay") from None


# ----------------------------------------------------------------------- keys, configuration


def _key_new(arguments: argparse.Namespace) -> int:
    from forebay.secrets import hash_key, key_secret, new_key

    key = new_key()
    secret = key_secret(os.environ, configuration.data_dir(os.environ))
    told = {
        "tenant": arguments.tenant,
        "id": secrets.token_hex(4),
        "key": key,
        "hash": hash_key(key, secret),
    }
    if arguments.json:
        print(json.dumps(told))
    else:
        print(f"key (shown once): {key}")
        print("in the configuration:")
        print(f"  tenants:\n    - id: {told['tenant']}")
        print(f'      keys: [{{id: {told["id"]}, hash: "{told["hash"]}"}}]')
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
