"""`FastsmcLM`: the language model of genlm's programs, over a fastsmc engine."""

from __future__ import annotations

import asyncio
import inspect
import uuid
from collections.abc import Coroutine, Sequence
from typing import Any

import genlm.backend
import genlm.backend.llm
import numpy as np
import torch
from genlm.backend.llm import AsyncLM
from safetensors.torch import load
from torch import Tensor

from fastsmc import ops
from fastsmc.ops.draw import NO_TOKEN
from fastsmc.smc import SMCError
from fastsmc.vllm.asking import ANSWER_ELEMENTS, check_async_engine
from fastsmc.vllm.interchange import CACHE_BYTES
from fastsmc.vllm.llm import LLM


class FastsmcLM(AsyncLM):
    """Is an AsyncLM of genlm-backend, whose rows a running fastsmc engine computes.

    Queries of all tasks of an event loop that wait at the same time are one call of the engine. Equal ones run once,
    and what earlier ones have left in the cache does not run again.

    Over a `fastsmc.LLM` the call blocks the event loop, as genlm's own synchronous calls do. Groups (`llm.smc`) and
    requests may run before and after. Calls come from the thread that uses the engine otherwise. Over an `AsyncLLM`
    (`over`) the event loop goes on meanwhile, and so do other requests; what is not awaited then comes from another
    thread (`await asyncio.to_thread(lm.count_blocks)`).

    A row is log p0 of the base model without settings or adapters, (V,) float32, on the device of an engine in this
    process, else on the CPU.

    Args:
        llm: in this process or with its core in another.
        cache_bytes: of keys and values that are kept between calls, per tensor-parallel rank, beside the engine's KV
            cache.
        tokenizer: of transformers; None: the engine's.

    Raises:
        ValueError: an argument that cannot be, such as a cache of less than two blocks.
    """

    def __init__(self, llm: LLM, *, cache_bytes: int = CACHE_BYTES, tokenizer: Any = None) -> None:
        if not isinstance(llm, LLM):
            raise ValueError(f"llm={llm!r}: must be a fastsmc.LLM; over an AsyncLLM: await FastsmcLM.over(engine)")
        self._set_up(llm, None, cache_bytes, tokenizer)
        self._run(self._open(cache_bytes))

    @classmethod
    async def over(cls, engine: Any, *, cache_bytes: int = CACHE_BYTES, tokenizer: Any = None) -> FastsmcLM:
        """Makes the language model of an engine that serves others meanwhile; queries come from this event loop.

        Args:
            engine: vLLM's AsyncLLM, started in this event loop where VLLM_PLUGINS names fastsmc.
            cache_bytes, tokenizer: as above.

        Raises:
            ValueError: an argument that cannot be.
        """
        check_async_engine(engine)
        lm = cls.__new__(cls)
        lm._set_up(engine, asyncio.get_running_loop(), cache_bytes, tokenizer)
        await lm._open(cache_bytes)
        return lm

    def _set_up(self, llm: Any, loop: asyncio.AbstractEventLoop | None, cache_bytes: int, tokenizer: Any) -> None:
        if isinstance(cache_bytes, bool) or not isinstance(cache_bytes, int):
            raise ValueError(f"cache_bytes={cache_bytes!r}: must be an integer")
        if tokenizer is None:
            if llm.model_config.skip_tokenizer_init:
                raise ValueError("tokenizer=None: this engine was started with skip_tokenizer_init and has none")
            tokenizer = llm.get_tokenizer()
        super().__init__(tokenizer)
        self.llm, self._loop = llm, loop
        self._name = uuid.uuid4().hex
        self._packed = loop is not None or not llm._in_process()
        self._waiting: dict[asyncio.AbstractEventLoop, list[tuple[tuple[int, ...] | Tensor, asyncio.Future]]] = {}
        self._tasks: set[asyncio.Task] = set()
        self._owns_engine = False

    async def _open(self, cache_bytes: int) -> None:
        opened = await self._ask("smc_open_histories", cache_bytes)
        if isinstance(opened, str):
            raise ValueError(opened)
        self.n_blocks, self.block_size = opened

    @classmethod
    def from_name(cls, model_name: str, engine_opts: dict[str, Any] | None = None, **kwargs: Any) -> FastsmcLM:
        """Starts an engine, and makes its language model; `cleanup` ends both.

        Args:
            engine_opts: arguments of `fastsmc.LLM`.
            kwargs: other arguments of this class.
        """
        lm = cls(LLM(model_name, **(engine_opts or {})), **kwargs)
        lm._owns_engine = True
        return lm

    # ------------------------------------------------------------------------------------------------------- queries
    async def next_token_logprobs(self, token_ids: Sequence[int], lora_name: str | None = None) -> Tensor:
        """Computes log p of the token behind `token_ids`, (V,) float32.

        Raises:
            ValueError: no tokens, or one that the model does not have, or too many; a `lora_name`.
            SMCError: the model gave NaN.
        """
        return await self._enqueue(self._read(token_ids, lora_name))

    async def batch_next_token_logprobs(
        self, token_ids_list: Sequence[Sequence[int]], lora_name: str | None = None
    ) -> Tensor:
        """Computes the rows of several queries, (N, V) float32; errors are those of `next_token_logprobs`."""
        queries = [self._read(token_ids, lora_name) for token_ids in token_ids_list]
        rows = await asyncio.gather(*map(self._enqueue, queries))
        return torch.stack(rows) if rows else torch.zeros(0, self._vocab_size)

    def next_token_logprobs_sync(self, token_ids: Sequence[int], lora_name: str | None = None) -> Tensor:
        """Is `next_token_logprobs` for who does not await it."""
        return self.batch_next_token_logprobs_sync([token_ids], lora_name)[0]

    def batch_next_token_logprobs_sync(
        self, token_ids_list: Sequence[Sequence[int]], lora_name: str | None = None
    ) -> Tensor:
        """Is `batch_next_token_logprobs` for who does not await it."""
        queries = [self._read(token_ids, lora_name) for token_ids in token_ids_list]
        if not queries:
            return torch.zeros(0, self._vocab_size)
        found = self._run(self._compute(list(dict.fromkeys(queries))))
        rows = [found[query] for query in queries]
        for row in rows:
            _check_row(row)
        return torch.stack(rows)

    async def draw(self, row: Tensor) -> int:
        """Draws a token with probability proportional to exp(row), in one batch for all tasks that wait.

        The uniforms are those of numpy's global generator, as in llamppl.

        Args:
            row: (V,) float32, −inf where a token is ruled out.

        Raises:
            ValueError: no token has a probability, or one has NaN.
        """
        return await self._enqueue(row)

    @property
    def _vocab_size(self) -> int:
        return self.llm.model_config.get_vocab_size()

    def _read(self, token_ids: Sequence[int], lora_name: str | None) -> tuple[int, ...]:
        if lora_name is not None:
            raise ValueError(f"lora_name={lora_name!r}: FastsmcLM has no adapters")
        ids = tuple(map(int, token_ids))
        if not ids:
            raise ValueError("token_ids=[]: must not be empty")
        vocab, longest = self._vocab_size, self.llm.model_config.max_model_len
        if min(ids) < 0 or max(ids) >= vocab:
            i = next(i for i, token in enumerate(ids) if not 0 <= token < vocab)
            raise ValueError(f"token_ids[{i}]={ids[i]}: must be 0 to {vocab - 1}")
        if len(ids) > longest:
            raise ValueError(f"token_ids: has {len(ids)} tokens, more than max_model_len={longest}")
        if len(ids) > (room := self.n_blocks * self.block_size):
            raise ValueError(f"token_ids: has {len(ids)} tokens; the cache has room for {room}: raise cache_bytes")
        return ids

    def _enqueue(self, query: tuple[int, ...] | Tensor) -> asyncio.Future:
        """Has a query, or a draw from a row, answered with all others that come before the event loop has had a pass
        without new ones."""
        loop = asyncio.get_running_loop()
        if self._loop not in (None, loop):
            raise RuntimeError("FastsmcLM: over an AsyncLLM, queries come from the event loop in which it was made")
        future = loop.create_future()
        if loop not in self._waiting:
            # of a loop that was closed while callers waited nobody waits any more
            self._waiting = {each: queue for each, queue in self._waiting.items() if not each.is_closed()}
            self._waiting[loop] = []
            loop.call_soon(self._answer, loop, 0)
        self._waiting[loop].append((query, future))
        return future

    def _answer(self, loop: asyncio.AbstractEventLoop, n_seen: int) -> None:
        """Answers all who wait, unless somebody has come meanwhile. As a callback, it ends with nobody's task."""
        if len(self._waiting[loop]) > n_seen:
            loop.call_soon(self._answer, loop, len(self._waiting[loop]))
            return
        left = [(query, future) for query, future in self._waiting.pop(loop) if not future.done()]
        waiting = [(query, future) for query, future in left if not isinstance(query, Tensor)]
        if draws := [(row, future) for row, future in left if isinstance(row, Tensor)]:
            # with their tokens these tasks ask for rows, which are one call with those that others wait for
            self._waiting[loop] = [*waiting]
            loop.call_soon(self._answer, loop, -1)
            _draw(draws)
        elif waiting and self._loop is None:
            self._run(self._reply(waiting))
        elif waiting:
            task = loop.create_task(self._reply(waiting))
            self._tasks.add(task)  # the event loop holds no reference
            task.add_done_callback(self._tasks.discard)

    async def _reply(self, waiting: list[tuple[tuple[int, ...], asyncio.Future]]) -> None:
        """Tells those who wait their rows, or what has failed; an AsyncLLM's answer some no longer wait for."""
        try:
            found = await self._compute(list(dict.fromkeys(query for query, _ in waiting)))
        except BaseException as error:
            for _, future in waiting:
                if not future.done():
                    future.set_exception(SMCError(f"the engine failed: {type(error).__name__}: {error}", kind="engine"))
            if isinstance(error, Exception):
                return
            raise
        for query, future in waiting:
            if future.done():
                continue
            try:
                future.set_result(_check_row(found[query]))
            except SMCError as error:
                future.set_exception(error)

    async def _compute(self, queries: list[tuple[int, ...]]) -> dict[tuple[int, ...], Tensor]:
        """Asks the engine for rows of distinct queries, in as many calls as its answers need."""
        at_once = max(1, ANSWER_ELEMENTS // self._vocab_size)
        found: dict[tuple[int, ...], Tensor] = {}
        for begin in range(0, len(queries), at_once):
            part = queries[begin : begin + at_once]
            rows = await self._ask("smc_next_rows", list(map(list, part)), self._packed)
            rows = load(rows)["found"] if self._packed else rows.clone()  # the engine's are of inference mode
            found.update(zip(part, rows, strict=True))
        return found

    async def _ask(self, method: str, *args: Any) -> Any:
        answers = self.llm.collective_rpc(method, args=(self._name, *args))
        return (await answers if inspect.isawaitable(answers) else answers)[0]

    def _run(self, asking: Coroutine[Any, Any, Any]) -> Any:
        """Runs what asks the engine to its end. A `fastsmc.LLM` answers without a pause, an AsyncLLM in its event loop.

        Raises:
            RuntimeError: that event loop is this thread's, which would wait for itself, or it does not run.
        """
        if self._loop is None:
            try:
                asking.send(None)
            except StopIteration as done:
                return done.value
            raise AssertionError("a fastsmc.LLM answers at once")
        if asyncio._get_running_loop() is self._loop or not self._loop.is_running():
            asking.close()
            raise RuntimeError(
                "FastsmcLM: over an AsyncLLM, what is not awaited comes from another thread than its event loop, while "
                "that runs: await asyncio.to_thread(…)"
            )
        return asyncio.run_coroutine_threadsafe(asking, self._loop).result()

    # --------------------------------------------------------------------------------------------------------- cache
    def clear_cache(self) -> None:
        """Forgets all keys and values; the cache keeps its size."""
        self._run(self._ask("smc_clear_histories"))

    def count_blocks(self) -> tuple[int, int]:
        """Counts the blocks of the cache that are used and those that are free: `n_blocks` together."""
        used, free = self._run(self._ask("smc_count_histories"))
        return used, free

    def cleanup(self) -> None:
        """Gives the cache's memory back; ends the engine, too, if `from_name` has started it."""
        self._run(self._ask("smc_close_histories"))
        if self._owns_engine:
            self.llm.shutdown()

    def __enter__(self) -> FastsmcLM:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.cleanup()

    def add_new_lora(self, lora_path: str, lora_name: str = "lora_1") -> None:
        """Raises NotImplementedError: rows are the base model's."""
        raise NotImplementedError(f"add_new_lora({lora_path!r}, {lora_name!r}): FastsmcLM has no adapters")

    def remove_lora(self, lora_name: str) -> None:
        """Raises NotImplementedError."""
        raise NotImplementedError(f"remove_lora({lora_name!r}): FastsmcLM has no adapters")


def _draw(waiting: list[tuple[Tensor, asyncio.Future]]) -> None:
    """Draws a token from each row, and tells them who wait, or what has failed."""
    try:
        rows = torch.stack([row for row, _ in waiting])
        uniforms = torch.from_numpy(np.random.rand(len(rows))).to(rows.device)
        tokens = ops.draw(rows, ops.weigh(rows), torch.arange(len(rows), device=rows.device), uniforms).tokens.tolist()
    except Exception as error:
        for _, future in waiting:
            future.set_exception(error)
        return
    for token, (_, future) in zip(tokens, waiting, strict=True):
        if token == NO_TOKEN:
            future.set_exception(ValueError("row: no token has a probability, or one has NaN"))
        else:
            future.set_result(token)


def _check_row(row: Tensor) -> Tensor:
    if row.isnan().any():
        raise SMCError("the model gave NaN", kind="engine")
    return row


def install() -> None:
    """Has genlm make a `FastsmcLM` where a program asks for backend="vllm", in this process from now on.

    `genlm.backend.llm.AsyncVirtualLM` is `FastsmcLM` then, as is `genlm.backend.AsyncVirtualLM`.
    """
    genlm.backend.AsyncVirtualLM = FastsmcLM
    genlm.backend.llm.AsyncVirtualLM = FastsmcLM
