"""What Serve gets to see of a request, under which id, and on which ports."""

from __future__ import annotations

import socket
from contextlib import ExitStack
from typing import Any

from deployments.ingress import NO_WATCH, SIDE_PORTS, ControlHeaders, prepare
from deployments.request_ids import ID_BYTES, IDS_DRAWN, SHARED_BYTES, RequestIds

Headers = list[tuple[bytes, bytes]]


async def seen(headers: Headers, **options: Any) -> Headers:
    """The headers that the application inside gets."""
    found: Headers = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        found.extend(scope["headers"])

    async def nothing(*_: Any) -> Any: ...

    await ControlHeaders(app, **options)({"type": "http", "headers": headers}, nothing, nothing)
    return found


async def test_nobody_outside_steers_serve() -> None:
    told = [(b"x-request-timeout-seconds", b"0"), NO_WATCH, (b"x-request-id", b"mine")]

    assert await seen(told) == [(b"x-request-id", b"mine")]


async def test_who_watches_itself_tells_serve_not_to() -> None:
    asked = [(b"x-request-disconnect-disabled", b"?0"), (b"x-request-id", b"mine")]

    assert await seen(asked, watched=True) == [(b"x-request-id", b"mine"), NO_WATCH]


async def test_a_request_without_an_id_gets_one() -> None:
    ((name, given),) = await seen([])

    assert name == b"x-request-id"
    assert len(given) == len("req_") + 2 * ID_BYTES


def test_ids_are_drawn_by_the_hundred_and_never_given_twice() -> None:
    draws: list[int] = []

    def random(count: int) -> bytes:
        draws.append(count)
        return b"".join(
            (len(draws) * IDS_DRAWN + number).to_bytes(ID_BYTES, "big")
            for number in range(count // ID_BYTES)
        )

    ids = RequestIds(random)
    given = [ids() for _ in range(2 * IDS_DRAWN)]

    assert len(set(given)) == 2 * IDS_DRAWN
    assert draws == [IDS_DRAWN * ID_BYTES] * 2


def test_the_ids_of_one_draw_lie_together() -> None:
    ids = RequestIds()
    draws = [{ids()[: len("req_") + 2 * SHARED_BYTES] for _ in range(IDS_DRAWN)} for _ in range(9)]

    assert [len(begin_alike) for begin_alike in draws] == [1] * 9
    assert len(set.union(*draws)) > 1


def test_a_neighbour_keeps_its_side_doors() -> None:
    told: dict[str, str] = {"RAY_SERVE_HAPROXY_BINARY_PATH": "haproxy"}
    neighbour, ours = dict(told), dict(told)
    with ExitStack() as open_doors:
        for environ in (neighbour, ours):
            for held in prepare(environ):
                open_doors.enter_context(held)
        for name in SIDE_PORTS:  # Serve has its own all the same
            door = open_doors.enter_context(socket.socket())
            door.bind(("127.0.0.1", int(ours[name])))

    assert not {ours[name] for name in SIDE_PORTS} & {neighbour[name] for name in SIDE_PORTS}


def test_what_the_user_has_set_stays() -> None:
    theirs = {"RAY_SERVE_HAPROXY_MAXCONN": "7", "RAY_SERVE_HAPROXY_STATS_PORT": "9"}
    environ = dict(theirs)
    with ExitStack() as open_doors:
        for held in prepare(environ):
            open_doors.enter_context(held)

    assert {name: environ[name] for name in theirs} == theirs
