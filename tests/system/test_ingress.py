"""HAProxy with the file that Serve renders under Forebay's profile: long streams, large prompts,
reloads, and what is told when no replica answers. No Ray: the replica is an HTTP server.
"""

from __future__ import annotations

import asyncio
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import httpx
import psutil
import pytest

from deployments import ingress
from tests.support.front import Front

STREAMS, CHUNKS, GAP_S = 500, 64, 0.02
LARGE = (1 << 20, 4 << 20)


@pytest.fixture(scope="module")
def front(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    with Front(tmp_path_factory.mktemp("front")) as running:
        yield running


def settings(front: Front) -> dict[str, str]:
    """The rendered file's settings of one value, by their names."""
    rows = (line.strip().rpartition(" ") for line in front.config.read_text().splitlines())
    return {name: value for name, _, value in rows}


def test_no_limit_of_time_is_shorter_than_the_longest_stream(front: Front) -> None:
    told = settings(front)
    named = ("hard-stop-after", "timeout client", "timeout server")
    limits_s = [int(told[name].removesuffix("s")) for name in named]

    assert min(limits_s) > ingress.LONGEST_STREAM_S


def test_connections_fit_what_the_machine_allows(front: Front) -> None:
    told = settings(front)

    assert 2 * STREAMS < int(told["maxconn"]) <= ingress.CONNECTIONS_MAX
    assert 1 <= int(told["nbthread"]) <= max(2, psutil.cpu_count())


def test_side_doors_are_shut(front: Front) -> None:
    """Serve binds stats and metrics to every interface, and lets anybody write to the socket."""
    listening = [c for c in front.process.net_connections("tcp") if c.status == psutil.CONN_LISTEN]

    assert len(listening) >= 3
    assert {c.laddr.ip for c in listening} == {"127.0.0.1"}
    assert stat.S_IMODE(front.socket.stat().st_mode) == 0o600


@pytest.mark.parametrize("size", LARGE)
def test_large_prompts_pass(front: Front, size: int) -> None:
    told = httpx.post(f"{front.url}/x", content=b"x" * size).json()

    assert told["body"] == size


def test_large_headers_pass(front: Front) -> None:
    """An identity provider's tokens, say; with Serve's 16 KiB they are a bad request."""
    answer = httpx.post(f"{front.url}/x", headers={"x-token": "y" * 40_000})

    assert answer.json()["headers"] > 40_000


async def test_hundreds_of_streams_pass_at_a_time(front: Front) -> None:
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as client:

        async def read() -> int:
            url = f"{front.url}/stream?chunks={CHUNKS}&gap={GAP_S}"
            async with client.get(url) as answer:
                return (await answer.read()).count(b"data:")

        counts = await asyncio.gather(*(read() for _ in range(STREAMS)))

    assert counts == [CHUNKS + 1] * STREAMS


def test_a_reload_cuts_no_stream(front: Front) -> None:
    before = front.process
    with httpx.stream("GET", f"{front.url}/stream?chunks=6&gap=0.25") as answer:
        lines = answer.iter_lines()
        told = [next(lines)]
        front.reload()
        reloaded_s = time.monotonic()
        told += lines
        went_on_s = time.monotonic() - reloaded_s

    assert front.process.pid != before.pid
    assert went_on_s > 0.25
    assert told.count("data: 5") == 1
    assert "data: [DONE]" in told
    assert httpx.post(f"{front.url}/x").status_code == 200


def test_a_silent_stream_ends_with_the_limits_of_time_and_not_before(tmp_path: Path) -> None:
    """The limits, reduced: two seconds for a server, one for a client that reads and waits."""
    with Front(
        tmp_path,
        RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S="1",
        RAY_SERVE_HAPROXY_TIMEOUT_SERVER_S="2",
    ) as front:
        waited = httpx.get(f"{front.url}/stream?chunks=2&gap=1.6", timeout=20)
        assert waited.text.endswith("data: [DONE]\n\n")

        with pytest.raises(httpx.RemoteProtocolError):
            httpx.get(f"{front.url}/stream?chunks=1&gap=30", timeout=20)


def test_what_no_replica_answers_is_told_in_the_forms_of_the_api(tmp_path: Path) -> None:
    """A 503 with the time to wait where nothing was sent; Serve's template makes it a bare 500."""
    with Front(tmp_path, RAY_SERVE_HAPROXY_TIMEOUT_SERVER_S="1") as front:
        front.freeze_replica()
        late = httpx.post(f"{front.url}/x", timeout=20)
        front.thaw_replica()
        host, port = front.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as line:
            line.sendall(b"POST /x HTTP/1.1\r\nhost: x\r\ncontent-length: 10\r\n\r\nhalf")
            time.sleep(0.2)
            front.kill_replica()
            died = line.recv(65536).decode()
        gone = httpx.post(f"{front.url}/x")

    assert late.status_code == 504
    assert late.json()["error"]["type"] == "timeout_error"
    assert died.startswith("HTTP/1.1 502 ")
    assert '"code": "replica_died"' in died
    assert gone.status_code == 503
    assert gone.headers["retry-after"] == "1"
    assert gone.json()["error"]["code"] == "overloaded"
