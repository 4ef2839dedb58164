"""How many questions genlm-control's AWRS asks on rows that `bench_condition.py` has written; it calls this script.

    PEER/bin/python bench/peers/genlm_condition_bench.py DIRECTORY

DIRECTORY holds `rows.npy` (R, V) float32 log p0, `histories.json` (a task of examples/conditions.py, the stop tokens,
and of each row its text, bytes in hex, and how often to run) and `tokens.json` (of each id its bytes in hex, null for
none). `asked.json` is written there: of each row, the questions of each run. A token without text is refused unasked,
as fastsmc does it; a stop token is a question about a whole.
"""

from __future__ import annotations

import asyncio
import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from genlm.control.sampler.token import AWRS

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from machine import ROOT


def sampler() -> AWRS:
    """Makes an AWRS with its defaults that needs no potentials: rows and answers are handed to `_run_rejection`."""
    made = AWRS.__new__(AWRS)
    made.prune_logws, made.proper_weights, made.max_accepts, made.max_rejects = False, True, 2, float("inf")
    made.rng, made._seed, made._gen_cache = np.random.default_rng(0), None, None
    return made


class Asked:
    """Answers about the tokens of one row, and counts: `begins` and `whole` are asked once per token."""

    def __init__(self, text: bytes, tokens: list[bytes | None], stops: set[int], begins: Any, whole: Any) -> None:
        self.text, self.tokens, self.stops, self.begins, self.whole = text, tokens, stops, begins, whole
        self.known: dict[int, bool] = {}
        self.n = 0

    async def accept(self, token: int) -> bool:
        spelled = b"" if token in self.stops else self.tokens[token]
        if spelled is None:
            return False
        self.n += 1
        if token not in self.known:
            text = (self.text + spelled).decode(errors="replace")
            self.known[token] = self.whole(text) if token in self.stops else self.begins(text.rstrip("\ufffd"))
        return self.known[token]


def main() -> None:
    folder = Path(sys.argv[1])
    about = json.loads((folder / "histories.json").read_text())
    tokens = [None if t is None else bytes.fromhex(t) for t in json.loads((folder / "tokens.json").read_text())]
    begins, whole = runpy.run_path(str(ROOT / "examples" / "conditions.py"))["TASKS"][about["task"]]
    rows, stops = np.load(folder / "rows.npy", mmap_mode="r"), set(about["stops"])
    awrs = sampler()
    counts: list[list[int]] = []
    torch.manual_seed(0)
    for row, history in zip(rows, about["histories"], strict=True):
        asked = Asked(bytes.fromhex(history["text"]), tokens, stops, begins, whole)
        counts.append([])
        for _ in range(history["runs"]):
            asked.n = 0
            weights = SimpleNamespace(weights=torch.from_numpy(np.array(row)), decode=range(len(row)))
            asyncio.run(awrs._run_rejection(weights, asked.accept))
            counts[-1].append(asked.n)
    with open(folder / "asked.json", "w") as file:
        file.write(json.dumps(counts))


if __name__ == "__main__":
    main()
