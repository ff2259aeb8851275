"""`python -m tests.support.simulator`: the simulator as a process of its own."""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import signal
import sys
from pathlib import Path

import uvloop

from tests.support.simulator.log import FLUSH_S, Log
from tests.support.simulator.server import Simulator, listen


def main() -> None:
    parser = argparse.ArgumentParser(prog="simulator", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0: any free port")
    parser.add_argument("--log", metavar="FILE", help="append a line per request here")
    parser.add_argument("--ready-file", metavar="F", help="write the port here when ready")
    parser.add_argument(
        "--fast", action="store_true", help="one log line a request, written every 10 ms"
    )
    parser.add_argument(
        "--with-stdin", action="store_true", help="end when stdin closes, as when a parent dies"
    )
    given = parser.parse_args()
    try:
        uvloop.run(serve(given))
    except OSError as error:
        sys.exit(f"simulator: {error}")


async def serve(given: argparse.Namespace) -> None:
    loop = asyncio.get_running_loop()
    log = Log(given.log, merged=given.fast)
    server = await listen(Simulator(log), given.host, given.port)
    port = server.sockets[0].getsockname()[1]
    over = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, over.set)
    if given.with_stdin:
        loop.add_reader(0, lambda: None if os.read(0, 4096) else over.set())
    if given.ready_file is not None:
        part = Path(given.ready_file + ".part")
        part.write_text(f"{port}\n")
        part.replace(given.ready_file)
    print(f"simulator http://{given.host}:{port}", flush=True)
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
    try:
        while not over.is_set():
            if given.fast:
                log.flush()
                await asyncio.sleep(FLUSH_S)
            else:
                await over.wait()
    finally:
        server.close()
        log.close()


if __name__ == "__main__":
    main()
