"""Accelerated traffic against one real server: groups of random size and random end, bad requests, ordinary requests.

    python bench/bench_soak.py --json soak.json

Groups finish, are left by their client (in a stream or not, at once or later), are aborted by name, are preempted by a
reset of the prefix cache, stand still in a pause of the engine, have potentials that raise, return NaN or a wrong
shape, sleep, allow nothing, or are never prepared; other requests are wrong in one of the ways of `BAD`. Beside them
go greedy streams that know nothing of groups, each compared with what it was alone. At the end nothing may be left: no
KV block, no group, no ordinary answer that is lost or wrong, no process that died or grew.

The model is a tiny random one, in float32. One seed makes the same requests, though not at the same times.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import json
import math
import os
import random
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from machine import ROOT, write_result

sys.path.insert(0, str(ROOT / "tests"))
from serve.process import (  # tests have no types
    KEY,
    SERVED,
    make_environment,
    make_letters_model,
    make_metadata,
    running,
)

MODEL = "tiny"
#: how many of a thousand requests end so; of each there is at least one
ENDS = {
    "finish": 420, "bad": 250, "left": 110, "left at once": 40, "aborted": 30, "preempted": 15, "paused": 5,
    "impossible": 40, "raises": 20, "raises at once": 20, "raises at the end": 20, "NaN": 20, "wrong shape": 20,
    "sleeps": 8, "hangs": 2,
}  # fmt: skip
#: the operator's potential that makes an end, and the status that the client gets
POTENTIALS = {
    "impossible": ("never", 422), "raises": ("fails", 500), "raises at once": ("failsatonce", 500),
    "raises at the end": ("failsatend", 500), "NaN": ("notanumber", 500), "wrong shape": ("wrongshape", 500),
    "sleeps": ("sleeps", 200), "hangs": ("hangs", 413),
}  # fmt: skip
ROUTES = ("/v1/smc", "/v1/completions", "/v1/chat/completions")
#: a difference between answers is a tie where the two best logits are nearer than this
TIE = 1e-4
#: groups, and ordinary requests, that are there at the same time
CLIENTS, ORDINARY_CLIENTS = 8, 2
#: different ordinary requests
N_CASES = 12
#: times at which memory and threads are looked at
SAMPLES = 50
OPTIONS: dict[str, Any] = {
    "max_particles": 64, "max_particle_tokens": 4096, "max_groups": 6, "setup_timeout_s": 2.0,
    "potentials": {"lexicon": "fastsmc.potentials:Lexicon", "regex": "fastsmc.potentials:Regex", **SERVED},
}  # fmt: skip

#: of /v1/smc: what is wrong, and the status
_BAD_SMC: list[tuple[dict[str, Any], int]] = [
    *(({"n_particles": value}, 400) for value in (0, -1, "8", 1.5, None, [8], True)),
    ({"n_particles": 100_000}, 413), ({"n_particles": 64, "max_tokens": 200}, 413),
    *(({"max_tokens": value}, 400) for value in (0, -3, "x", 300)),
    *(({"temperature": value}, 400) for value in (0, -1, "hot", None)),
    *(({"seed": value}, 400) for value in (-5, 2**64, "s")),
    ({"top_p": 0}, 400), ({"top_p": 1.5}, 400), ({"top_k": -2}, 400), ({"min_p": 2}, 400), ({"min_tokens": 99}, 400),
    ({"resampling": "no"}, 400), ({"proposal": "no"}, 400), ({"ess_threshold": 2}, 400),
    ({"allowed_token_ids": []}, 400), ({"allowed_token_ids": [999]}, 400), ({"logit_bias": {"999": 1.0}}, 400),
    ({"logit_bias": [1]}, 400), ({"stop_token_ids": [999]}, 400), ({"stop": ""}, 400), ({"stop": [1]}, 400),
    ({"force_stop": True, "ignore_eos": True}, 400), ({"potential": "infill"}, 400), ({"potential": 3}, 400),
    ({"potential": "served:Fails"}, 400), ({"potential": "regex"}, 400),
    ({"potential": "regex", "potential_args": {"pattern": "("}}, 400),
    ({"potential": "lexicon", "potential_args": {"no": 1}}, 400),
    ({"potential": "lexicon", "potential_args": "x"}, 400), ({"twist": "../x"}, 400), ({"n_samples": 0}, 400),
    ({"n_samples": 100_000}, 400), ({"exact": [[1], [2], [3]]}, 400), ({"prompt": None}, 400), ({"prompt": [999]}, 400),
    ({"prompt": []}, 400), ({"prompt": 300 * "a"}, 400), ({"messages": []}, 400), ({"presence_penalty": 1.0}, 400),
    ({"model": "no"}, 404),
]  # fmt: skip
#: of /v1/completions and chat
_BAD_COMPLETIONS: list[tuple[dict[str, Any], int]] = [
    ({"vllm_xargs": {"smc_particles": 8}}, 400), ({"vllm_xargs": {"smc_n_particles": 8, "smc_no": 8}}, 400),
    ({"vllm_xargs": {"smc_n_particles": 100_000}}, 413), ({"n": 60}, 400), ({"temperature": 0}, 400),
    ({"presence_penalty": 1.0}, 400), ({"repetition_penalty": 1.2}, 400), ({"bad_words": ["a"]}, 400),
    ({"use_beam_search": True}, 400), ({"structured_outputs": {"regex": "a"}}, 400),
]  # fmt: skip
BAD = [
    *(("/v1/smc", wrong, status) for wrong, status in _BAD_SMC),
    *((route, wrong, status) for route in ROUTES[1:] for wrong, status in _BAD_COMPLETIONS),
]


def group_body(route: str, task: dict[str, Any], stream: bool) -> dict[str, Any]:
    """Returns the body that asks for a group: `task` has fields of /v1/smc."""
    if route == "/v1/smc":
        return {"model": MODEL, **task, "stream": stream}
    shared = ("max_tokens", "seed", "ignore_eos")
    body: dict[str, Any] = {"model": MODEL, "stream": stream}
    body |= {name: task[name] for name in shared if name in task}
    if route == "/v1/completions":
        body["prompt"] = task["prompt"]
    else:
        body["messages"] = [{"role": "user", "content": task["prompt"]}]
    own = {name: value for name, value in task.items() if name not in (*shared, "prompt")}
    body["vllm_xargs"] = {f"smc_{k}": json.dumps(v) if isinstance(v, dict) else v for k, v in own.items()}
    return body


def schedule(requests: int, seed: int) -> list[str]:
    """Returns the end of each group request, in an order by the seed."""
    others = {end: max(1, round(requests * share / 1000)) for end, share in ENDS.items() if end != "finish"}
    ends = [end for end, count in others.items() for _ in range(count)]
    ends += ["finish"] * (requests - len(ends))
    random.Random(seed).shuffle(ends)
    return ends


class Soak:
    """Is the traffic of one run.

    Attributes:
        counts: how often each end came as it should.
        faults: what came otherwise: the request, the status and the text.
    """

    def __init__(self, server: Any, requests: int, seed: int, setup_timeout_s: float, seconds: float) -> None:
        self.seconds, self.made, self.n_bad = seconds, 0, 0
        headers = {"Authorization": f"Bearer {KEY}"}
        # the server closes a connection that was idle for 5 s, at which a request on it would be lost
        limits = httpx.Limits(max_connections=None, keepalive_expiry=2.0)
        self.client = httpx.AsyncClient(base_url=server.url, headers=headers, timeout=300, limits=limits)
        self.server, self.seed, self.setup_timeout_s = server, seed, setup_timeout_s
        self.ends = schedule(requests, seed)
        self.counts: collections.Counter[str] = collections.Counter()
        self.faults: list[dict[str, Any]] = []
        self.samples: list[dict[str, Any]] = []
        self.ordinary: collections.Counter[str] = collections.Counter()
        self.wrong: list[dict[str, Any]] = []
        self.resets, self.switch = 0, asyncio.Lock()

    # -- groups ------------------------------------------------------------------------------------------------------
    async def group(self, i: int, end: str) -> None:
        """Makes request i, which is to end so."""
        rng = random.Random(f"{self.seed}-{i}")
        route, stream = rng.choice(ROUTES), rng.random() < 0.5
        n, length = round(2 ** rng.uniform(0, 5)), round(2 ** rng.uniform(2, 5))
        task = {
            "prompt": "".join(rng.choices("abcdefgh", k=rng.randint(1, 60))), "n_particles": n, "max_tokens": length,
            "seed": rng.randrange(2**31), "ess_threshold": rng.choice([0.3, 0.7, 1.0]),
        }  # fmt: skip
        status = 200
        if end in POTENTIALS:
            task["potential"], status = POTENTIALS[end]
            task["ignore_eos"] = True  # some of them do what they do at step 2
            if end == "hangs":
                task["potential_args"] = {"key": i}
        elif rng.random() < 0.3:
            task |= {
                "potential": "lexicon",
                "potential_args": {"token_ids": rng.sample(range(2, 50), 5), "weight": 1.5},
            }
        if end in ("left", "aborted", "preempted", "paused") and rng.random() < 0.5:
            task |= {"potential": "slow", "potential_args": {}}  # so that it is under way for certain
        name = f"soak-{self.seed}-{i}"
        if end == "bad":
            await self.bad_request(i)
            return
        body = group_body(route, task, stream)
        if end in ("left", "left at once"):
            await self.leave(route, body, rng.uniform(0.02, 0.5) if end == "left" else rng.choice([0, 0.005]))
            self.counts[end] += 1
            return
        if end in ("aborted", "preempted", "paused"):
            asked = asyncio.ensure_future(self.ask(route, body, name))
            await asyncio.sleep(rng.uniform(0.02, 0.3))
            await self.intervene(end, route, name)
            found, text = await asked
        else:
            found, text = await self.ask(route, body, name)
        if end == "aborted" and (found == 500 if route == "/v1/smc" else found == -1):
            # vLLM's routes say it as ever: by the finish reason, or by nothing where no token had been streamed
            said = "was aborted" if route == "/v1/smc" else "" if stream else '"finish_reason":"abort"'
            self.check(end, said in text, found, text, route, body)
        elif self.resets and found == 500 and ("began anew" in text or "was restarted" in text):
            self.counts["restarted in a stream"] += 1
        else:
            self.check(end, found == status, found, text, route, body)

    async def bad_request(self, i: int) -> None:
        route, wrong, status = BAD[self.n_bad % len(BAD)]
        self.n_bad += 1
        task = {"prompt": "abc", "n_particles": 4, "max_tokens": 4, "seed": 0}
        body = group_body(route, task, stream=i % 2 == 0 and "use_beam_search" not in wrong) | wrong
        found, text = await self.ask(route, body, f"soak-{self.seed}-{i}")
        self.check("bad", found == status, found, text, route, wrong)

    def check(self, end: str, right: bool, status: int, text: str, route: str, body: dict[str, Any]) -> None:
        self.counts[end] += right
        if not right:
            self.faults.append({"end": end, "status": status, "text": text[-500:], "route": route, "body": body})

    async def ask(self, route: str, body: dict[str, Any], name: str) -> tuple[int, str]:
        """Returns status and text of an answer; of a stream that ended with an error, the error's status."""
        while True:
            try:
                answer = await self.client.post(route, json=body, headers={"X-Request-Id": name})
            except httpx.HTTPError as error:
                return 0, f"{type(error).__name__}: {error}"
            if answer.status_code != 503:
                break
            self.counts["asked again after 503"] += 1
            await asyncio.sleep(float(answer.headers["Retry-After"]) * 0.2)
        text = answer.text
        if answer.status_code != 200:
            return answer.status_code, text
        if not body.get("stream"):
            return (200 if "log_z" in text else -1), text
        lines = [line.removeprefix("data: ") for line in text.splitlines() if line and line != "data: [DONE]"]
        if not lines:
            return -1, "an empty stream"
        last = json.loads(lines[-1])
        if "error" in last:
            return last["error"]["code"], lines[-1]
        return (200 if last.get("event") == "population" or "smc" in last else -1), text

    async def leave(self, route: str, body: dict[str, Any], seconds: float) -> None:
        """Asks and goes away."""
        with contextlib.suppress(TimeoutError, httpx.HTTPError):
            async with asyncio.timeout(seconds):
                async with self.client.stream("POST", route, json=body) as answer:
                    async for _ in answer.aiter_raw():
                        pass

    async def intervene(self, what: str, route: str, name: str) -> None:
        """Does from outside what an operator may do to what runs."""
        if what == "aborted":
            ids = {"/v1/smc": f"smc-{name}", "/v1/completions": f"cmpl-{name}-0"}
            await self.client.post("/abort_requests", json={"request_ids": [ids.get(route, f"chatcmpl-{name}")]})
            return
        async with self.switch:  # one at a time
            if what == "preempted":
                self.resets += 1
                await self.client.post("/reset_prefix_cache?reset_running_requests=true")
            else:
                await self.client.post("/pause?mode=keep")
                await asyncio.sleep(0.3)
                await self.client.post("/resume")

    # -- ordinary requests -------------------------------------------------------------------------------------------
    async def greedy(self, case: tuple[str, int], stream: bool) -> tuple[list[str], list[float]]:
        """Returns an ordinary request's tokens, and how far apart the two best logits were for each."""
        body = {
            "model": MODEL, "prompt": case[0], "max_tokens": case[1], "temperature": 0, "repetition_penalty": 1.0,
            "ignore_eos": True, "logprobs": 2, "return_tokens_as_token_ids": True, "stream": stream,
        }  # fmt: skip
        answer = await self.client.post("/v1/completions", json=body)
        answer.raise_for_status()
        lines = (
            [line[6:] for line in answer.text.splitlines() if line.startswith("data: {")] if stream else [answer.text]
        )
        found = [choice["logprobs"] for line in lines for choice in json.loads(line)["choices"] if choice["logprobs"]]
        tokens = [token for part in found for token in part["tokens"]]
        best = [sorted(top.values(), reverse=True) for part in found for top in part["top_logprobs"]]
        return tokens, [pair[0] - pair[1] for pair in best]

    async def compare(self, case: tuple[str, int], alone: tuple[list[str], list[float]], stream: bool) -> None:
        self.ordinary["asked"] += 1
        try:
            tokens, _ = await self.greedy(case, stream)
        except (httpx.HTTPError, ValueError, KeyError) as error:
            self.ordinary["lost"] += 1
            self.wrong.append({"case": case, "lost": f"{type(error).__name__}: {error}"})
            return
        if tokens == alone[0]:
            self.ordinary["the same"] += 1
            return
        at = next((k for k, (a, b) in enumerate(zip(tokens, alone[0], strict=False)) if a != b), None)
        tie = at is not None and alone[1][at] <= TIE and len(tokens) == len(alone[0])
        self.ordinary["tie"] += tie
        self.ordinary["wrong"] += not tie
        gap = None if at is None else alone[1][at]
        self.wrong.append({"case": case, "at": at, "gap": gap, "tokens": len(tokens), "tie": tie})

    # -- the run -----------------------------------------------------------------------------------------------------
    async def run(self) -> dict[str, Any]:
        """Makes all requests; returns what was found."""
        rng = random.Random(self.seed)
        cases = [
            ("".join(rng.choices("abcdefgh", k=rng.randint(1, 80))), rng.choice([8, 16, 48])) for _ in range(N_CASES)
        ]
        alone = [await self.greedy(case, stream=False) for case in cases]
        fixed = group_body("/v1/smc", {"prompt": "abc", "n_particles": 16, "max_tokens": 12, "seed": 3}, False)
        before = (await self.client.post("/v1/smc", json=fixed | {"alone": True})).json()
        queue, done = collections.deque(enumerate(self.ends)), asyncio.Event()
        begin = time.monotonic()

        async def groups() -> None:
            while queue and time.monotonic() < begin + self.seconds:
                i, end = queue.popleft()
                self.made += 1
                if i % max(1, len(self.ends) // SAMPLES) == 0:
                    self.samples.append({"request": i, **usage(self.server.process.pid)})
                await self.group(i, end)

        async def ordinary(k: int) -> None:
            mine = random.Random(f"{self.seed}-ordinary-{k}")
            while not done.is_set():
                at = mine.randrange(len(cases))
                await self.compare(cases[at], alone[at], mine.random() < 0.5)

        beside = [asyncio.ensure_future(ordinary(k)) for k in range(ORDINARY_CLIENTS)]
        await asyncio.gather(*(groups() for _ in range(CLIENTS)))
        done.set()
        await asyncio.gather(*beside)
        seconds = time.monotonic() - begin
        for case, was in zip(cases, alone, strict=True):  # the engine is there, and right
            await self.compare(case, was, stream=False)
        after = (await self.client.post("/v1/smc", json=fixed | {"alone": True})).json()
        same = [before.get(key) == after.get(key) for key in ("log_z", "particles", "samples")]
        return self.found(seconds, all(same) and "particles" in before)

    def found(self, seconds: float, same: bool) -> dict[str, Any]:
        """Says what is left, once the requests have ended."""
        idle = self.server.wait_idle(self.setup_timeout_s + 10)
        text = self.server.client.get("/metrics").text
        blocks = int(match[1]) if (match := re.search(r'num_gpu_blocks="(\d+)"', text)) else 0
        last = usage(self.server.process.pid)
        self.samples.append({"request": self.made, **last})
        left = ("groups_running", "groups_waiting", "particles_running")
        return {
            "requests": self.made, "planned": len(self.ends), "seconds": seconds, "bad_kinds": len(BAD),
            "ends": dict(sorted(self.counts.items())), "faults": self.faults, "ordinary": dict(self.ordinary),
            "differences": self.wrong, "idle": idle, "blocks": blocks,
            "leaked_blocks": round(self.server.metric("vllm:kv_cache_usage_perc") * blocks),
            "left": {name: self.server.metric(f"fastsmc:{name}") for name in left},
            "same_group_before_and_after": same, "engine_deaths": self.deaths(),
            "rss_mib_per_1000_requests": slope([(s["request"], s["rss_mib"]) for s in self.samples]),
            "threads": [self.samples[len(self.samples) // 4]["threads"], last["threads"]], "samples": self.samples,
        }  # fmt: skip

    def deaths(self) -> int:
        """Counts processes of the beginning that are gone, and a server that does not answer."""
        first, last = (self.samples[k]["rss_mib_by_process"].keys() for k in (0, -1))
        return len(first - last) + (not self.server.is_up())


def usage(pid: int) -> dict[str, Any]:
    """Returns memory, threads and ids of a server's processes; those that prepare potentials come and go, and are
    not counted."""
    pids, rss, threads = [pid], {}, 0
    for parent in pids:
        for children in Path(f"/proc/{parent}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                pids += [int(child) for child in children.read_text().split() if not _is_helper(int(child))]
    for own in pids:
        status = dict(re.findall(r"^(VmRSS|Threads):\s*(\d+)", Path(f"/proc/{own}/status").read_text(), re.M))
        rss[own], threads = int(status.get("VmRSS", 0)) / 1024, threads + int(status.get("Threads", 0))
    return {"rss_mib": sum(rss.values()), "threads": threads, "rss_mib_by_process": rss}


def _is_helper(pid: int) -> bool:
    try:
        return "prepare_child" in Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return True


def slope(points: list[tuple[int, float]]) -> float:
    """Returns the change per 1000 requests over the second half, in which what is allocated once is there."""
    late = np.array(points[len(points) // 2 :], dtype=float)
    return float(np.polyfit(late[:, 0], late[:, 1], 1)[0] * 1000) if len(late) > 2 else 0.0


def run(json_path: str | None, requests: int, seed: int, seconds: float) -> dict[str, Any]:
    """Starts a server and makes the traffic; writes and returns what was found."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        environment = make_environment(make_metadata(folder)) | {"VLLM_SERVER_DEV_MODE": "1"}
        environment["VLLM_LOGGING_LEVEL"] = os.environ.get("VLLM_LOGGING_LEVEL", "WARNING")
        options = ["--additional-config", json.dumps({"fastsmc": OPTIONS}), "--disable-uvicorn-access-log"]
        model = make_letters_model(folder / "model")
        log = Path(json_path or folder / "soak").with_suffix(".server.log")
        with running(model, environment, log, options) as server:
            found = asyncio.run(soak(server, requests, seed, OPTIONS["setup_timeout_s"], seconds))
            if json_path:
                write_result(json_path, {"bench": "soak", "seed": seed, "options": OPTIONS, **found})
    return found


async def soak(
    server: Any, requests: int, seed: int, setup_timeout_s: float, seconds: float = math.inf
) -> dict[str, Any]:
    """Makes the traffic against a running server, no new request after so many seconds; returns what was found."""
    traffic = Soak(server, requests, seed, setup_timeout_s, seconds)
    try:
        return await traffic.run()
    finally:
        await traffic.client.aclose()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="write the result here, and the server's log beside it")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--minutes", type=float, default=30, help="no new request after that")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    found = run(args.json, args.requests, args.seed, args.minutes * 60)
    shown = {name: value for name, value in found.items() if name not in ("samples", "faults", "differences")}
    print(json.dumps(shown, indent=1))
    for fault in [*found["faults"], *found["differences"]][:40]:
        print(json.dumps(fault))


if __name__ == "__main__":
    main()
