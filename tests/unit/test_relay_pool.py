"""The relay's connections: what is kept, what is not, and what a broken one is told as."""

from __future__ import annotations

import asyncio
import gzip
import socket
import ssl
import zlib
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from forebay.errors import ProviderError
from forebay.providers.relay.connection import (
    HEAD_BYTES_MAX,
    READ_BYTES,
    ConnectError,
    Disconnected,
    Response,
)
from forebay.providers.relay.pool import Origin, Pool, Target

LIMIT_S = 10.0
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


class Provider:
    """Answers each request with the next of `answers`; None: the connection is closed in its place.

    `requests` are the heads and bodies that came, with the number of their connection.
    """

    def __init__(self) -> None:
        self.answers: list[bytes | None] = []
        self.requests: list[tuple[int, bytes]] = []
        self.connections = 0
        self.closing: set[int] = set()
        self.gone = asyncio.Event()
        self._server: asyncio.Server | None = None
        self._writers: list[asyncio.StreamWriter] = []

    async def start(self, tls: ssl.SSLContext | None = None) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=tls)

    async def stop(self) -> None:
        assert self._server is not None
        for writer in self._writers:
            writer.close()
        self._server.close()
        await self._server.wait_closed()

    @property
    def origin(self) -> Origin:
        assert self._server is not None
        return Origin("127.0.0.1", self._server.sockets[0].getsockname()[1], None)

    @property
    def target(self) -> Target:
        return Target.of(self.origin, b"/v1/chat/completions", {b"host": b"a", b"x-own": b"1"})

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        number = self.connections
        self._writers.append(writer)
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                size = int(head.rpartition(b"content-length: ")[2])
                self.requests.append((number, head + await reader.readexactly(size)))
                answer = self.answers.pop(0)
                if answer is None:
                    return
                writer.write(answer)
                await writer.drain()
                if number in self.closing:
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            self.gone.set()
        finally:
            writer.close()

    async def say(self, data: bytes) -> None:
        """Without being asked, on the connection that came last."""
        self._writers[-1].write(data)
        await self._writers[-1].drain()

    def hang_up(self) -> None:
        self._writers[-1].close()


@pytest.fixture
async def provider() -> AsyncIterator[Provider]:
    provider = Provider()
    await provider.start()
    yield provider
    await provider.stop()


@pytest.fixture
async def pool() -> AsyncIterator[Pool]:
    pool = Pool()
    yield pool
    pool.close()


async def ask(pool: Pool, provider: Provider, *answers: bytes | None) -> Response:
    provider.answers += answers
    return await pool.post(provider.target, b"{}", LIMIT_S)


async def body(pool: Pool, provider: Provider, answer: bytes) -> bytes:
    return await (await ask(pool, provider, answer)).read(1 << 20)


async def until_it_is_seen(pool: Pool) -> None:
    """Let the loop hear what has been said, or that somebody has hung up."""
    while pool.idle:
        await asyncio.sleep(0)


# --- a request and its answer -------------------------------------------------------------------


async def test_a_request_is_its_head_and_its_body(pool: Pool, provider: Provider) -> None:
    assert await body(pool, provider, OK) == b"ok"
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\nx-own: 1\r\ncontent-length: 2\r\n\r\n"
    assert provider.requests == [(1, head + b"{}")]


def test_a_header_holds_no_line_break() -> None:
    with pytest.raises(ValueError, match="line breaks"):
        Target.of(Origin("a", 80, None), b"/", {b"x": b"1\r\ny: 2"})


async def test_status_and_headers_are_told(pool: Pool, provider: Provider) -> None:
    answer = b"HTTP/1.1 429 Slow down\r\nRetry-After: 3\r\nSet-Cookie: a\r\nSet-Cookie: b\r\n"
    response = await ask(pool, provider, answer + b"content-length: 0\r\n\r\n")
    assert (response.status, response.header(b"retry-after")) == (429, b"3")
    assert response.headers.get_list("set-cookie") == ["a", "b"]
    assert await response.read(9) == b""


@pytest.mark.parametrize(
    "answer",
    [
        OK,
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\no\r\n1\r\nk\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nx-after: 1\r\n\r\n",
        b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n" + OK,
        b"HTTP/1.1 100 Continue\r\n\r\n" + OK,
    ],
)
async def test_an_answer_is_read_and_its_connection_kept(
    pool: Pool, provider: Provider, answer: bytes
) -> None:
    for _ in range(3):
        response = await ask(pool, provider, answer)
        assert (response.status, await response.read(2)) == (200, b"ok")
        assert "link" not in response.headers
        assert "x-after" not in response.headers
    assert provider.connections == 1
    assert (pool.busy, pool.idle) == (0, 1)


async def test_an_answer_may_end_with_its_connection(pool: Pool, provider: Provider) -> None:
    provider.closing = {1}
    assert await body(pool, provider, b"HTTP/1.1 200 OK\r\n\r\nto the end") == b"to the end"
    assert (pool.busy, pool.idle) == (0, 0)


@pytest.mark.parametrize(
    ("packing", "packed"),
    [
        (b"gzip", gzip.compress(b"Hello" * 99, mtime=0)),
        (b"deflate", zlib.compress(b"Hello" * 99)),
        (b"deflate", zlib.compress(b"Hello" * 99, wbits=-15)),
        (b"identity", b"Hello" * 99),
    ],
    ids=["gzip", "deflate", "deflate without a head", "identity"],
)
async def test_a_packed_answer_is_unpacked(
    pool: Pool, provider: Provider, packing: bytes, packed: bytes
) -> None:
    head = b"HTTP/1.1 200 OK\r\ncontent-encoding: %b\r\ncontent-length: %d\r\n\r\n"
    answer = head % (packing, len(packed)) + packed
    assert await body(pool, provider, answer) == b"Hello" * 99
    response = await ask(pool, provider, answer)
    pieces = [piece async for piece in iterated(response)]
    assert b"".join(pieces) == b"Hello" * 99


async def test_what_unpacks_to_very_much_comes_in_pieces(pool: Pool, provider: Provider) -> None:
    packed = gzip.compress(bytes(8 << 20))
    head = b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: %d\r\n\r\n" % len(packed)
    response = await ask(pool, provider, head + packed)
    sizes = [len(piece) async for piece in iterated(response)]
    assert (sum(sizes), max(sizes)) == (8 << 20, READ_BYTES)
    response = await ask(pool, provider, head + packed)
    with pytest.raises(ProviderError, match="more than 1000 bytes"):
        await response.read(1000)


async def test_a_packing_that_is_not_known_is_refused(pool: Pool, provider: Provider) -> None:
    answer = b"HTTP/1.1 200 OK\r\ncontent-encoding: br\r\ncontent-length: 2\r\n\r\nok"
    with pytest.raises(ValueError, match="nobody asked"):
        await body(pool, provider, answer)


async def iterated(response: Response) -> AsyncIterator[bytes]:
    while piece := await response.piece():
        yield piece


# --- bounds -------------------------------------------------------------------------------------


async def test_an_answer_has_a_most(pool: Pool, provider: Provider) -> None:
    answer = b"HTTP/1.1 200 OK\r\ncontent-length: 1000000\r\n\r\n" + bytes(1_000_000)
    response = await ask(pool, provider, answer)
    with pytest.raises(ProviderError, match="more than 999999 bytes"):
        await response.read(999_999)
    response = await ask(pool, provider, answer)
    assert len(await response.read(1_000_000)) == 1_000_000


async def test_a_provider_waits_for_who_reads_slowly(pool: Pool, provider: Provider) -> None:
    size = 64 * READ_BYTES
    answer = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % size + bytes(size)
    response = await ask(pool, provider, answer)
    pieces = []
    while piece := await response.piece():
        pieces.append(len(piece))
        for _ in range(5):
            await asyncio.sleep(0)
    assert sum(pieces) == size
    assert max(pieces) < 4 * READ_BYTES


async def test_headers_have_a_most(pool: Pool, provider: Provider) -> None:
    endless = b"HTTP/1.1 200 OK\r\nx: " + b"y" * (HEAD_BYTES_MAX + 1)
    with pytest.raises(Disconnected, match="headers"):
        await ask(pool, provider, endless)
    assert pool.busy == 0


async def test_who_finds_no_room_waits_for_it(provider: Provider) -> None:
    pool = Pool(connections_max=2)
    cut = OK[:-1]
    first = await ask(pool, provider, cut)
    second = await ask(pool, provider, cut)
    provider.answers += [OK, OK]
    third = asyncio.create_task(pool.post(provider.target, b"3", LIMIT_S))
    fourth = asyncio.create_task(pool.post(provider.target, b"4", LIMIT_S))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert len(provider.requests) == 2
    first.close()
    assert await (await third).read(9) == b"ok"
    assert await (await fourth).read(9) == b"ok"
    assert [data[-1:] for _, data in provider.requests[2:]] == [b"3", b"4"]
    second.close()
    pool.close()


async def test_waiting_for_room_ends_at_the_deadline(provider: Provider) -> None:
    pool = Pool(connections_max=1)
    await ask(pool, provider, OK[:-1])
    with pytest.raises(TimeoutError):
        await pool.post(provider.target, b"{}", 0.01)
    pool.close()


async def test_an_idle_connection_makes_room_for_another_origin(provider: Provider) -> None:
    pool = Pool(connections_max=1)
    assert await body(pool, provider, OK) == b"ok"
    other = Provider()
    await other.start()
    assert await body(pool, other, OK) == b"ok"
    assert pool.idle == 1
    pool.close()
    await other.stop()


# --- what is not kept, and what breaks ----------------------------------------------------------


async def test_a_connection_that_says_it_closes_is_not_kept(pool: Pool, provider: Provider) -> None:
    answer = b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nok"
    assert await body(pool, provider, answer) == b"ok"
    assert pool.idle == 0
    assert await body(pool, provider, OK) == b"ok"
    assert provider.connections == 2


async def test_a_connection_that_says_too_much_is_not_kept(pool: Pool, provider: Provider) -> None:
    assert await body(pool, provider, OK + b"HTTP/1.1 200 OK\r\n") == b"ok"
    assert pool.idle == 0
    assert await body(pool, provider, OK) == b"ok"
    await provider.say(OK)
    await until_it_is_seen(pool)
    assert await body(pool, provider, OK) == b"ok"
    assert provider.connections == 3


async def test_a_connection_that_was_closed_meanwhile_is_not_taken(
    pool: Pool, provider: Provider
) -> None:
    assert await body(pool, provider, OK) == b"ok"
    provider.hang_up()
    await until_it_is_seen(pool)
    assert await body(pool, provider, OK) == b"ok"
    assert provider.connections == 2


async def test_a_request_is_sent_once_whatever_becomes_of_it(
    pool: Pool, provider: Provider
) -> None:
    assert await body(pool, provider, OK) == b"ok"
    with pytest.raises(Disconnected, match="closed the connection"):
        await ask(pool, provider, None)
    assert len(provider.requests) == 2


@pytest.mark.parametrize("answer", [OK[:-1], OK[:20], OK[:-2].replace(b"2\r", b"x\r"), b"SSH-2.0"])
async def test_half_an_answer_is_none(pool: Pool, provider: Provider, answer: bytes) -> None:
    provider.closing = {1}
    with pytest.raises(Disconnected):
        await body(pool, provider, answer)
    assert (pool.busy, pool.idle) == (0, 0)


async def test_what_came_before_the_break_is_given(pool: Pool, provider: Provider) -> None:
    provider.closing = {1}
    head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
    response = await ask(pool, provider, head + b"5\r\nHello\r\n")
    assert await response.piece() == b"Hello"
    with pytest.raises(Disconnected):
        await response.piece()


async def test_nobody_there_is_told_as_such(pool: Pool) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        target = Target.of(Origin("127.0.0.1", taken.getsockname()[1], None), b"/", {})
        with pytest.raises(ConnectError):
            await pool.post(target, b"", LIMIT_S)


def certified(directory: Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """A server's side of TLS for `localhost`, and that of a client who trusts it."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    plain = serialization.NoEncryption()
    form = serialization.PrivateFormat.PKCS8
    both = directory / "both.pem"
    both.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, form, plain)
        + certificate.public_bytes(serialization.Encoding.PEM)
    )
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(both)
    return server, ssl.create_default_context(cafile=str(both))


async def test_a_safe_connection_is_kept_like_others(pool: Pool, tmp_path: Path) -> None:
    server, client = certified(tmp_path)
    provider = Provider()
    await provider.start(server)
    origin = provider.origin._replace(host="localhost", tls=client)
    big = b"HTTP/1.1 200 OK\r\ncontent-length: 900000\r\n\r\n" + bytes(900_000)
    for size in (2, 900_000):
        provider.answers.append(big)
        response = await pool.post(Target.of(origin, b"/", {}), bytes(size), LIMIT_S)
        assert len(await response.read(1 << 20)) == 900_000
    assert provider.connections == 1
    stranger = origin._replace(tls=ssl.create_default_context())
    with pytest.raises(ConnectError, match="verify failed"):
        await pool.post(Target.of(stranger, b"/", {}), b"", LIMIT_S)
    pool.close()
    await provider.stop()


async def test_an_unsafe_connection_is_told_as_none(pool: Pool) -> None:
    async def speak_plainly(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(OK)
        writer.close()

    async with await asyncio.start_server(speak_plainly, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        origin = Origin("127.0.0.1", port, ssl.create_default_context())
        with pytest.raises(ConnectError):
            await pool.post(Target.of(origin, b"/", {}), b"", LIMIT_S)


# --- time ---------------------------------------------------------------------------------------


async def test_a_deadline_closes_the_connection(pool: Pool, provider: Provider) -> None:
    provider.answers = [b"HTTP/1.1 200 OK\r\n"]
    with pytest.raises(TimeoutError):
        await pool.post(provider.target, b"{}", 0.02)
    await asyncio.wait_for(provider.gone.wait(), 5)
    response = await ask(pool, provider, OK[:-1])
    assert pool.busy == 1
    response.close()


async def test_a_later_deadline_does_not_wait_for_an_earlier_one(
    pool: Pool, provider: Provider
) -> None:
    provider.answers = [OK[:-1], OK[:-1]]
    slow = await pool.post(provider.target, b"{}", 60.0)
    late = await pool.post(provider.target, b"{}", 0.02)
    with pytest.raises(TimeoutError):
        await late.read(9)
    assert pool.busy == 1
    slow.close()


async def test_a_stream_that_has_begun_has_a_clock_of_its_own(
    pool: Pool, provider: Provider
) -> None:
    provider.answers = [OK[:-1], OK[:-1]]
    response = await pool.post(provider.target, b"{}", 0.02)
    response.unhurried()
    with pytest.raises(TimeoutError):
        await (await pool.post(provider.target, b"{}", 0.03)).read(9)
    assert await response.piece() == b"o"
    assert pool.busy == 1
    response.close()


async def test_who_waits_for_a_response_that_is_closed_is_told(
    pool: Pool, provider: Provider
) -> None:
    response = await ask(pool, provider, OK[:-2])
    waiting = asyncio.create_task(response.piece())
    await asyncio.sleep(0)
    response.close()
    with pytest.raises(Disconnected):
        await waiting
    await asyncio.wait_for(provider.gone.wait(), 5)


async def test_a_response_that_is_left_gives_its_connection_back(
    pool: Pool, provider: Provider
) -> None:
    head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
    response = await ask(pool, provider, head + b"5\r\nHello\r\n")
    assert await response.piece() == b"Hello"
    response.leave()
    await provider.say(b"0\r\n\r\n")
    while not pool.idle:
        await asyncio.sleep(0)
    assert await body(pool, provider, OK) == b"ok"
    assert provider.connections == 1


async def test_idle_connections_are_closed_in_the_end(provider: Provider) -> None:
    pool = Pool(keepalive_s=0.01)
    assert await body(pool, provider, OK) == b"ok"
    await asyncio.wait_for(provider.gone.wait(), 5)
    assert pool.idle == 0
