"""What a server costs: `/v1/smc` against `LLM.smc` in process, and ordinary requests against a stock vLLM server.

    python bench/bench_serve.py --json serve.json

    smc        tokens/s of one client's POST /v1/smc and of `fastsmc.LLM.smc` in another process
    ordinary   tokens/s and median inter-token latency of streams that know nothing of groups, on a server with the
               plug-in and on a stock one
    clients    tokens/s of many clients at once, each a group by /v1/smc, and the same clients with stock `n=N`

Every engine has its own process and stands all the while; what is compared runs in turn, `repeats` times after a
warm-up, and each ratio is the median of the ratios of those pairs. Clients are in this process.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import itertools
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import httpx
from bench_groups import in_turn, ratio
from machine import ROOT, write_result
from trees import OtherEngine, serve

PARTS = ("smc", "ordinary", "clients")
PROMPT, SEA = "Once upon a time, in a small village", " the sea and a boat"
#: particles and tokens of `smc`; streams and their tokens of `ordinary`; clients, particles and tokens of `clients`
SMC, ORDINARY, CLIENTS = (64, 32), (8, 128), (32, 16, 32)
SETTINGS: dict[str, Any] = {
    "dtype": "bfloat16", "max_num_seqs": 512, "max_model_len": 1024, "kv_cache_memory_bytes": 1 << 30,
}  # fmt: skip
START_S = 300.0


class Server:
    """Is an HTTP server in a process of its own, started with `settings`; `plugin` says whether it is ours or vLLM's as
    it comes."""

    def __init__(self, model: str, plugin: bool, settings: dict[str, Any] = SETTINGS) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        flags = [f"--{name.replace('_', '-')}" + f"={value}" * (value is not True) for name, value in settings.items()]
        flags += ["--host=127.0.0.1", f"--port={port}", "--disable-uvicorn-access-log", "--served-model-name=model"]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "VLLM_PLUGINS": "", "VLLM_LOGGING_LEVEL": "ERROR"}
        command = ["-m", "vllm.entrypoints.openai.api_server", f"--model={model}"]
        if plugin:
            environment.pop("VLLM_PLUGINS")
            command = ["-m", "fastsmc.cli", "serve", model]
        self._log = open(os.devnull, "w")  # noqa: SIM115  # as long as the process
        self.process = subprocess.Popen(
            [sys.executable, *command, *flags], env=environment, stdout=self._log, stderr=self._log
        )
        self.client = httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=600)

    async def wait(self) -> None:
        """Waits until it answers. RuntimeError: it ended, or takes too long."""
        until = time.monotonic() + START_S
        while time.monotonic() < until and self.process.poll() is None:
            with contextlib.suppress(httpx.TransportError):
                if (await self.client.get("/health")).status_code == 200:
                    return
            await asyncio.sleep(1)
        raise RuntimeError(f"the server did not start: {self.process.args!r}")

    async def post(self, path: str, **body: Any) -> dict[str, Any]:
        answer = await self.client.post(path, json={"model": "model", "prompt": PROMPT, **body})
        if answer.status_code != 200:
            raise RuntimeError(f"{path}: {answer.status_code} {answer.text}")
        return answer.json()

    async def smc(self, n: int, max_tokens: int, sea: list[int], seed: int = 0) -> None:
        await self.post(
            "/v1/smc", n_particles=n, max_tokens=max_tokens, ess_threshold=1.0, ignore_eos=True, seed=seed,
            potential="lexicon", potential_args={"token_ids": sea, "weight": 0.5},
        )  # fmt: skip

    async def stock(self, n: int, max_tokens: int) -> None:
        await self.post("/v1/completions", n=n, max_tokens=max_tokens, ignore_eos=True, temperature=1.0)

    async def stream(self, max_tokens: int) -> list[float]:
        """Streams one completion; returns when its tokens came."""
        body = {
            "model": "model", "prompt": PROMPT, "max_tokens": max_tokens, "ignore_eos": True, "temperature": 1.0,
            "stream": True,
        }  # fmt: skip
        times = []
        async with self.client.stream("POST", "/v1/completions", json=body) as answer:
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    times.append(time.perf_counter())
        return times

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(60)
        self._log.close()


class Offline:
    """Runs in a process of its own: `fastsmc.LLM`."""

    def __init__(self, model: str) -> None:
        from fastsmc import LLM

        self.llm = LLM(model, **SETTINGS)
        self.sea = self.llm.get_tokenizer().encode(SEA)

    def tokens(self) -> list[int]:
        return self.sea

    def smc(self, n: int, max_tokens: int) -> None:
        from fastsmc import SMCParams
        from fastsmc.potentials import Lexicon

        params = SMCParams(n_particles=n, max_tokens=max_tokens, ess_threshold=1.0, ignore_eos=True)
        self.llm.smc(PROMPT, params, Lexicon(token_ids=self.sea, weight=0.5))


def timed(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(loop: asyncio.AbstractEventLoop, servers: dict[str, Server], offline: Any, repeats: int) -> Iterator[dict]:
    """Yields a record per part."""
    wait, sea = loop.run_until_complete, offline.tokens()

    async def together(make: Callable[[int], Awaitable[Any]], count: int) -> list[Any]:
        return await asyncio.gather(*(make(i) for i in range(count)))

    n, length = SMC
    runs = in_turn(
        {
            "/v1/smc": lambda: timed(lambda: wait(servers["plug-in"].smc(n, length, sea))),
            "LLM.smc": lambda: timed(lambda: offline.smc(n, length)),
        },
        repeats,
    )
    yield {
        "part": "smc", "n_particles": n, "max_tokens": length, "seconds": runs,
        "ratio": ratio(runs["LLM.smc"], runs["/v1/smc"]),
    }  # fmt: skip

    streams, length = ORDINARY

    def ordinary(name: str) -> dict[str, float]:
        start = time.perf_counter()
        times = wait(together(lambda i: servers[name].stream(length), streams))
        gaps = [b - a for of in times for a, b in itertools.pairwise(of)]
        return {"seconds": time.perf_counter() - start, "itl": statistics.median(gaps)}

    found = in_turn({name: functools.partial(ordinary, name) for name in servers}, repeats)
    by = {name: {key: [run[key] for run in of] for key in ("seconds", "itl")} for name, of in found.items()}
    yield {
        "part": "ordinary", "streams": streams, "max_tokens": length, "runs": by,
        "throughput_ratio": ratio(by["stock"]["seconds"], by["plug-in"]["seconds"]),
        "itl_ratio": ratio(by["plug-in"]["itl"], by["stock"]["itl"]),
    }  # fmt: skip

    clients, n, length = CLIENTS
    smc, stock = servers["plug-in"].smc, servers["stock"].stock
    runs = in_turn(
        {
            "groups": lambda: timed(lambda: wait(together(lambda i: smc(n, length, sea, i), clients))),
            "stock n=N": lambda: timed(lambda: wait(together(lambda i: stock(n, length), clients))),
        },
        repeats,
    )
    yield {
        "part": "clients", "clients": clients, "n_particles": n, "max_tokens": length, "seconds": runs,
        "ratio": ratio(runs["stock n=N"], runs["groups"]),
    }  # fmt: skip


def run(json_path: str | None, model: str, repeats: int) -> list[dict]:
    """Measures all parts; writes and returns the records."""
    from fastsmc.models import resolve

    path, loop = str(resolve(model)), asyncio.new_event_loop()
    offline = OtherEngine(ROOT, __file__, "--serve", path)
    servers = {"plug-in": Server(path, True), "stock": Server(path, False)}
    records = []
    try:
        for server in servers.values():
            loop.run_until_complete(server.wait())
        for record in measure(loop, servers, offline, repeats):
            records.append(record)
            print(describe(record), flush=True)
        if json_path:
            write_result(json_path, {"bench": "serve", "model": model, "engine": SETTINGS, "records": records})
    finally:
        for server in servers.values():
            server.close()
        offline.close()
    return records


def describe(record: dict[str, Any]) -> str:
    """Sets a record as a line."""
    ratios = ", ".join(f"{name} {of['median']:.2f}" for name, of in record.items() if name.endswith("ratio"))
    return f"{record['part']}: {ratios}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="write the result here")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(lambda: Offline(args.serve))
        return
    run(args.json, args.model, args.repeats)


if __name__ == "__main__":
    main()
