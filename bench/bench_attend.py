"""attend against vLLM's own attention: `python bench/bench_attend.py ops|steps|gpu --json FILE`.

    ops     one layer at a time on synthetic block tables: rows × length × how much is shared. Fits the costs that the
            engine's switch goes by; `--costs` puts them into fastsmc/vllm/attend_costs.json
    steps   a whole particle step of SmolLM2-135M, N = 256, by prompt length: steps of one group alternate between the
            engine as it is (switch included) and vLLM's attention, so that both meet the same rows and the same machine
    gpu     the Triton kernel alone at Llama-3.1-8B's shapes (N = 1024, 2048 prompt tokens, 512 generated), beside
            vLLM's FlashAttention on the same table and a copy: target G7. Not run yet

Everything is measured in turn (A B A B …); medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from machine import machine

#: SmolLM2-135M
HEADS, KEY_HEADS, HEAD_SIZE, BLOCK = 9, 3, 64, 32
ROWS, LENGTHS, SHARING = (1, 2, 4, 16, 64, 256, 1024), (24, 136, 520, 2056, 4104), ("prompt", "tree", "none")
#: tokens that a synthetic cache may hold: 200 MB
MAX_TOKENS = 1 << 18
PROMPTS = (8, 512, 1024, 4096)


def make_table(sharing: str, n_rows: int, n_columns: int) -> Any:
    """(R, C) block table. prompt: all columns but the last are shared; tree: so is the first half of them, then groups
    of 8 rows share; none: every row has its own."""
    import torch

    if sharing == "none":
        return torch.randperm(n_rows * n_columns).int().view(n_rows, n_columns)
    stem = n_columns - 1 if sharing == "prompt" else n_columns // 2
    branch = torch.arange(n_rows)[:, None] // 8 * n_columns + torch.arange(n_columns)
    leaf = torch.arange(n_rows)[:, None] + torch.zeros(n_columns, dtype=torch.int64)
    table = torch.empty(n_rows, n_columns, dtype=torch.int64)
    table[:, :stem] = torch.arange(stem)
    table[:, stem:] = n_columns + branch[:, stem:]
    table[:, -1:] = n_columns + n_columns * (n_rows // 8 + 1) + leaf[:, -1:]
    _, ids = torch.unique(table, return_inverse=True)
    return torch.randperm(int(ids.max()) + 1).int()[ids]


def interleaved(*functions: Callable[[], Any], seconds: float, least: int = 9) -> list[float]:
    """Lower-quartile seconds of each function, called in turn: what a case takes while no neighbour disturbs it."""
    rounds: list[list[float]] = []
    stop = time.perf_counter() + seconds
    while len(rounds) < least or time.perf_counter() < stop:
        times = []
        for f in functions:
            start = time.perf_counter()
            f()
            times.append(time.perf_counter() - start)
        rounds.append(times)
    return [statistics.quantiles(column, n=4)[0] for column in zip(*rounds[1:], strict=True)]


def bench_case(sharing: str, n_rows: int, length: int, dtype: Any, seconds: float) -> dict[str, Any]:
    import torch
    from vllm import _custom_ops
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    from fastsmc import ops
    from fastsmc.vllm.attention import features, find_layout, split_cache

    table = make_table(sharing, n_rows, -(-length // BLOCK))
    cache = torch.empty(int(table.max()) + 1, KEY_HEADS, BLOCK, 2 * HEAD_SIZE, dtype=dtype).normal_()
    keys, values = split_cache(cache)
    isa = _get_attn_isa(dtype, BLOCK, HEAD_SIZE)
    layout = find_layout(isa, dtype, BLOCK, HEAD_SIZE)
    query = torch.randn(n_rows, HEADS, HEAD_SIZE).to(dtype)
    out, theirs = torch.empty_like(query), torch.empty_like(query)
    starts = torch.arange(n_rows + 1, dtype=torch.int32)
    lengths = torch.full((n_rows,), length, dtype=torch.int32)
    schedule = _custom_ops.cpu_attn_get_scheduler_metadata(
        num_reqs=n_rows, num_heads=HEADS, num_kv_heads=KEY_HEADS, head_dim=HEAD_SIZE, seq_lens=lengths, dtype=dtype,
        query_start_loc=starts, causal=True, sliding_window_size=-1, isa=isa, enable_kv_split=True,
    )  # fmt: skip
    plan, scale = ops.plan_attend(table), HEAD_SIZE**-0.5
    ours_s, theirs_s, plan_s = interleaved(
        lambda: ops.attend(query, keys, values, plan, length, scale=scale, layout=layout, out=out),
        lambda: _custom_ops.cpu_attention_with_kv_cache(
            query, keys, values, theirs, starts, lengths, scale, True, None, -1, table, 0, schedule, None
        ),
        lambda: ops.plan_attend(table),
        seconds=seconds,
    )  # fmt: skip
    ours_units, theirs_units = features(plan, length, HEADS, KEY_HEADS, HEAD_SIZE, BLOCK)
    return {
        "isa": isa, "dtype": str(dtype).removeprefix("torch."), "sharing": sharing, "rows": n_rows, "length": length,
        "attend_s": ours_s, "stock_s": theirs_s, "ratio": theirs_s / ours_s, "plan_s": plan_s,
        "attend_gmac_s": ours_units[1] / ours_s / 1e9, "stock_gmac_s": ours_units[1] / theirs_s / 1e9,
        "relative_difference": float((out - theirs).float().norm() / theirs.float().norm()),
        "attend_units": ours_units, "stock_units": theirs_units,
    }  # fmt: skip


def fit(records: list[dict[str, Any]], who: str) -> list[float]:
    """Seconds a unit, non-negative, by least squares of relative errors."""
    import numpy as np
    from scipy.optimize import nnls

    seconds = np.array([r[f"{who}_s"] for r in records])
    units = np.array([r[f"{who}_units"] for r in records])
    size = units.max(axis=0)
    costs, _ = nnls(units / size / seconds[:, None], np.ones(len(seconds)))
    return (costs / size).tolist()


def bench_ops(seconds: float, write_costs: bool) -> dict[str, Any]:
    import torch

    from fastsmc.vllm.attention import COSTS, MARGIN, cost_key, dot

    torch.manual_seed(0)
    torch.set_num_threads(1)  # both sides use threads alike, and their barriers would measure the neighbours
    records, all_costs, worst = [], json.loads(COSTS.read_text()), {}
    for dtype in (torch.bfloat16, torch.float32):
        cases = [
            bench_case(sharing, n, length, dtype, seconds)
            for length in LENGTHS
            for n in ROWS
            for sharing in SHARING
            if (n * length <= MAX_TOKENS or (sharing == "prompt" and n <= 256))
            and (n >= 16 or sharing != "tree")
            and (n > 1 or sharing == "none")
        ]
        costs = {who: fit(cases, who) for who in ("attend", "stock")}
        for r in cases:
            r["predicted_ratio"] = dot(costs["stock"], r["stock_units"]) / dot(costs["attend"], r["attend_units"])
            r["chosen"] = "attend" if r["predicted_ratio"] > MARGIN else "stock"
            r["chosen_over_stock"] = (r["attend_s"] if r["chosen"] == "attend" else r["stock_s"]) / r["stock_s"]
            print(
                f"{r['dtype']:9s} {r['sharing']:6s} R={r['rows']:5d} L={r['length']:5d}  ms: attend "
                f"{1e3 * r['attend_s']:8.3f} vLLM {1e3 * r['stock_s']:8.3f}  ratio {r['ratio']:5.2f} predicted "
                f"{r['predicted_ratio']:5.2f}  GMAC/s: {r['attend_gmac_s']:6.1f} against {r['stock_gmac_s']:5.1f}",
                flush=True,
            )
        key = cost_key(cases[0]["isa"], dtype)
        worst[key] = max(r["chosen_over_stock"] for r in cases)
        all_costs[key] = costs
        records += cases
    print("worst chosen : vLLM", worst)
    left, right = torch.randn(768, 576).bfloat16(), torch.randn(576, 1536).bfloat16()
    product_s = interleaved(lambda: left @ right, seconds=seconds)[0]
    if write_costs:
        COSTS.write_text(json.dumps(all_costs, indent=1) + "\n")
    return {
        "bench": "attend ops",
        "costs": all_costs,
        "worst_chosen_over_stock": worst,
        "product_gmac_s": 768 * 576 * 1536 / product_s / 1e9,
        "records": records,
    }


def bench_steps(n: int, prompts: tuple[int, ...], max_tokens: int, repeats: int) -> dict[str, Any]:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count()))
    from vllm import SamplingParams

    from fastsmc import LLM, SMCParams
    from fastsmc.group import Group
    from fastsmc.models import resolve
    from fastsmc.potentials import Lexicon
    from fastsmc.vllm.attention import Attend

    llm = LLM(
        resolve("smollm2"), dtype="bfloat16", max_model_len=8192, enforce_eager=True, max_num_seqs=1024,
        kv_cache_memory_bytes=2 << 30,
    )  # fmt: skip
    tokenizer = llm.get_tokenizer()
    start = tokenizer.encode("Once upon a time, in a small village")
    story = SamplingParams(n=8, max_tokens=max(prompts) // 8, temperature=1.0, seed=0, ignore_eos=True)
    stories = llm.generate({"prompt_token_ids": start}, story, use_tqdm=False)[0].outputs
    text = start + [token for output in stories for token in output.token_ids]  # what the model writes, not repetitive
    potential = Lexicon(token_ids=tokenizer.encode(" the sea and a boat"), weight=0.5)
    params = SMCParams(n_particles=n, max_tokens=max_tokens, ess_threshold=1.0, ignore_eos=True)

    spent: dict[str, list[float]] = defaultdict(list)
    rows: list[int] = []
    used: list[bool] = []
    step, pays = Group.step, Attend.pays

    def choose(self, plan, length):
        rows.append(len(plan.order))
        answer = pays(self, plan, length)
        used.append(answer)
        return answer and len(rows) % 2 == 0

    def timed(self):
        before = len(rows)
        begin = time.perf_counter()
        step(self)
        seconds = time.perf_counter() - begin
        if len(rows) > before and self.t > 4:  # by then nearly all histories differ
            spent["ours" if len(rows) % 2 == 0 else "stock"].append(seconds)

    Attend.pays, Group.step = choose, timed
    records = []
    for prompt_len in prompts:
        for i in range(repeats + 1):
            if i <= 1:
                spent.clear(), rows.clear(), used.clear()
            rows[:] = rows[: len(rows) // 2 * 2]
            llm.smc(text[:prompt_len], params, potential)
            if i % 2:
                rows.append(0)  # the next run starts with the other
        ours, stock = statistics.median(spent["ours"]), statistics.median(spent["stock"])
        records.append(
            {
                "n_particles": n,
                "prompt_tokens": prompt_len,
                "max_tokens": max_tokens,
                "steps": {name: len(values) for name, values in spent.items()},
                "rows": statistics.median(r for r in rows if r),
                "attend_chosen": sum(used) / len(used),
                "step_s": ours,
                "stock_step_s": stock,
                "ratio": stock / ours,
                "growth": ours / records[0]["step_s"] if records else 1.0,
                "stock_growth": stock / records[0]["stock_step_s"] if records else 1.0,
            }
        )
        r = records[-1]
        print(
            f"N={n} prompt={prompt_len:5d}  step {1e3 * ours:7.1f} ms, with vLLM's attention {1e3 * stock:7.1f} ms, "
            f"ratio {r['ratio']:.2f}; growth {r['growth']:.2f} : {r['stock_growth']:.2f}; rows {r['rows']}, attend in "
            f"{r['attend_chosen']:.0%} of the steps",
            flush=True,
        )
    Attend.pays, Group.step = pays, step
    return {"bench": "attend steps", "records": records}


def bench_gpu(seconds: float) -> dict[str, Any]:
    """One layer; a generated block is shared by 8 rows on the average, as after resampling, the tail by none."""
    import torch
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    from fastsmc import ops

    heads, key_heads, size, block, layers = 32, 8, 128, 16, 32
    records = []
    for n_rows, prompt, generated in ((1024, 2048, 512), (1024, 2048, 16), (256, 4096, 128)):
        length = prompt + generated
        table = make_table("tree", n_rows, -(-length // block))
        stem = prompt // block
        table[:, :stem] = table[:1, :stem]
        table = table.cuda()
        n_blocks = int(table.max()) + 1
        cache = torch.empty(n_blocks, block, key_heads, 2 * size, dtype=torch.bfloat16, device="cuda").normal_()
        keys, values = cache.split(size, dim=3)
        query = torch.randn(n_rows, heads, size, dtype=torch.bfloat16, device="cuda")
        out = torch.empty_like(query)
        starts = torch.arange(n_rows + 1, dtype=torch.int32, device="cuda")
        lengths = torch.full((n_rows,), length, dtype=torch.int32, device="cuda")
        plan, tokens = ops.plan_attend(table), lengths[:1]
        ours = [t.transpose(1, 2) for t in (keys, values)]
        twin, scale = torch.empty_like(cache), size**-0.5

        def attend(plan=plan, ours=ours, tokens=tokens, query=query, out=out, scale=scale):
            return ops.attend(query, *ours, plan, tokens, scale=scale, out=out)

        def dense(keys=keys, values=values, query=query, table=table, starts=starts, lengths=lengths, length=length):
            return flash_attn_varlen_func(
                q=query, k=keys, v=values, max_seqlen_q=1, cu_seqlens_q=starts, max_seqlen_k=length,
                seqused_k=lengths, softmax_scale=size**-0.5, causal=True, block_table=table,
            )  # fmt: skip

        def copy(twin=twin, cache=cache):
            twin.copy_(cache)

        def planning(table=table, stem=stem):
            return ops.plan_attend(table, known_shared=stem).order

        def on_gpu(f):
            def timed():
                f()
                torch.cuda.synchronize()

            return timed

        difference = (attend() - dense()).float().norm() / dense().float().norm()
        times = interleaved(*map(on_gpu, (attend, dense, copy, planning)), seconds=seconds)
        distinct = int(sum(len(table[:, c].unique()) for c in range(table.shape[1])))
        block_bytes = 2 * block * key_heads * size * 2
        records.append(
            {
                "rows": n_rows, "prompt": prompt, "generated": generated, "attend_s": times[0], "flash_s": times[1],
                "ratio": times[1] / times[0], "plan_s": times[3], "distinct_bytes": distinct * block_bytes,
                "gb_s": distinct * block_bytes / times[0] / 1e9, "copy_gb_s": 2 * cache.nbytes / times[2] / 1e9,
                "layers_attend_s": layers * times[0], "layers_flash_s": layers * times[1],
                "relative_difference": float(difference),
            }
        )  # fmt: skip
        print(records[-1], flush=True)
    return {"bench": "attend gpu", "records": records}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("ops", "steps", "gpu"))
    parser.add_argument("--json", help="write the result here")
    parser.add_argument("--seconds", type=float, default=0.5, help="ops, gpu: for each case")
    parser.add_argument("--costs", action="store_true", help="ops: the engine's switch goes by these from now on")
    parser.add_argument("--particles", type=int, default=256)
    parser.add_argument("--prompts", default=",".join(map(str, PROMPTS)))
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args()
    if args.what == "ops":
        result = bench_ops(args.seconds, args.costs)
    elif args.what == "gpu":
        result = bench_gpu(args.seconds)
    else:
        prompts = tuple(int(x) for x in args.prompts.split(","))
        result = bench_steps(args.particles, prompts, args.max_tokens, args.repeats)
    import torch

    result["machine"] = machine() | {"torch_threads": torch.get_num_threads()}
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
