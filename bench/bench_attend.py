"""attend against vLLM's own attention: `python bench/bench_attend.py ops|steps|gpu --json FILE`.

    ops     one layer at a time on synthetic block tables: rows × length × how much is shared. Fits the costs that the
            engine's switch goes by, and judges it on cases that were not fitted: other rows and lengths, another kind
            of sharing, another model's shape. `--costs` puts them into fastsmc/vllm/attention/costs.json
    steps   a whole particle step of SmolLM2-135M, N = 256, by prompt length: steps of one group alternate between the
            engine as it is (switch included) and vLLM's attention, so that both meet the same rows and the same machine
    gpu     the Triton kernel alone at Llama-3.1-8B's shapes (N = 1024, 2048 prompt tokens, 512 generated), beside
            vLLM's FlashAttention on the same table and a copy: target G7. Not run yet

Everything is measured in turn (A B A B …); medians.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import time
from collections import defaultdict
from typing import Any

from machine import write_result

from fastsmc.vllm.attention import costs as attend_costs
from fastsmc.vllm.attention.costs import Shape, interleaved, make_table

#: SmolLM2-135M, Llama-3.1-8B, GPT-2, Qwen2.5-0.5B: heads, key heads, head size, block size
SMOLLM2, LLAMA, GPT2, QWEN = Shape(9, 3, 64, 32), Shape(32, 8, 128, 32), Shape(12, 12, 64, 32), Shape(14, 2, 64, 32)
#: what costs are fitted on: shape → rows, lengths, sharing
FITTED = {
    SMOLLM2: ((1, 2, 4, 16, 64, 256, 1024), (24, 136, 520, 2056, 4104), ("prompt", "tree", "none")),
    LLAMA: ((1, 8, 80), (24, 160, 1000), ("prompt", "none")),
    GPT2: ((1, 8, 80), (24, 160, 1000), ("prompt", "none")),
}
#: what they are judged on
HELD_OUT = {
    SMOLLM2: ((3, 12, 48, 130, 700), (70, 300, 1500, 3000), ("prompt", "tree", "none", "genealogy")),
    LLAMA: ((1, 5, 24, 60), (50, 400, 1300), ("prompt", "none", "genealogy")),
    QWEN: ((1, 6, 100), (50, 400, 1300), ("prompt", "none", "genealogy")),
}
#: elements that a synthetic cache may hold: 200 MB of bfloat16
MAX_ELEMENTS = 100 << 20
#: as many caches as a model has layers, or of so many bytes together, are used in turn: a layer's keys and values are
#: not in the processor's cache when it reads them
LAYERS, CACHE_BYTES = 30, 64 << 20
PROMPTS = (8, 512, 1024, 4096)


def grid(cases: dict[Shape, tuple[Any, Any, Any]]) -> list[tuple[Shape, str, int, int]]:
    """Lists (shape, sharing, rows, length) that fit into the cache and differ."""
    return [
        (shape, sharing, n, length)
        for shape, (rows, lengths, sharings) in cases.items()
        for length in lengths
        for n in rows
        for sharing in sharings
        if (2 * n * length * shape.key_heads * shape.head_size <= MAX_ELEMENTS or (sharing == "prompt" and n <= 256))
        and (n >= 12 or sharing not in ("tree", "genealogy"))
        and (n > 1 or sharing == "none")
    ]


def bench_case(shape: Shape, sharing: str, n_rows: int, length: int, dtype: Any, seconds: float) -> dict[str, Any]:
    import torch
    from vllm import _custom_ops
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    from fastsmc import ops
    from fastsmc.vllm.attention.cpu import find_layout, split_cache

    heads, key_heads, size, block = shape
    table = make_table(sharing, n_rows, -(-length // block))
    cache = torch.empty(int(table.max()) + 1, key_heads, block, 2 * size, dtype=dtype).normal_()
    caches = [cache, *(cache.clone() for _ in range(min(LAYERS, -(-CACHE_BYTES // cache.nbytes)) - 1))]
    layers = [split_cache(cache) for cache in caches]
    isa = _get_attn_isa(dtype, block, size)
    if (layout := find_layout(isa, dtype, block, size)) is None:
        raise RuntimeError(f"attend does not know the KV layout of vLLM's kernels for {isa!r}")
    query = torch.randn(n_rows, heads, size).to(dtype)
    out, theirs = torch.empty_like(query), torch.empty_like(query)
    starts = torch.arange(n_rows + 1, dtype=torch.int32)
    lengths = torch.full((n_rows,), length, dtype=torch.int32)
    schedule = _custom_ops.cpu_attn_get_scheduler_metadata(
        num_reqs=n_rows, num_heads=heads, num_kv_heads=key_heads, head_dim=size, seq_lens=lengths, dtype=dtype,
        query_start_loc=starts, causal=True, sliding_window_size=-1, isa=isa, enable_kv_split=True,
    )  # fmt: skip
    plan, scale = ops.plan_attend(table), size**-0.5
    turn, their_turn = itertools.cycle(layers), itertools.cycle(layers[len(layers) // 2 :] + layers[: len(layers) // 2])
    ours_s, theirs_s, plan_s = interleaved(
        lambda: ops.attend(query, *next(turn), plan, length, scale=scale, layout=layout, out=out),
        lambda: _custom_ops.cpu_attention_with_kv_cache(
            query, *next(their_turn), theirs, starts, lengths, scale, True, None, -1, table, 0, schedule, None
        ),
        lambda: ops.plan_attend(table),
        seconds=seconds,
    )  # fmt: skip
    ours_units, theirs_units = attend_costs.features(n_rows, length, plan.n_reads, len(plan.nodes), shape)
    return {
        "isa": isa, "dtype": str(dtype).removeprefix("torch."), "shape": shape, "sharing": sharing, "rows": n_rows,
        "length": length,
        "attend_s": ours_s, "stock_s": theirs_s, "ratio": theirs_s / ours_s, "plan_s": plan_s,
        "attend_gmac_s": ours_units[1] / ours_s / 1e9, "stock_gmac_s": ours_units[1] / theirs_s / 1e9,
        "relative_difference": float((out - theirs).float().norm() / theirs.float().norm()),
        "attend_units": ours_units, "stock_units": theirs_units,
    }  # fmt: skip


def bench_ops(seconds: float, write_costs: bool) -> dict[str, Any]:
    import torch

    torch.manual_seed(0)
    torch.set_num_threads(1)  # both sides use threads alike, and their barriers would measure the neighbours
    records, all_costs, worst = [], json.loads(attend_costs.COSTS.read_text()), {}
    for dtype in (torch.bfloat16, torch.float32):
        fitted, held_out = ([bench_case(*case, dtype, seconds) for case in grid(of)] for of in (FITTED, HELD_OUT))
        costs = attend_costs.fit(
            [(r["attend_units"], r["stock_units"]) for r in fitted], [(r["attend_s"], r["stock_s"]) for r in fitted]
        )
        for r in fitted + held_out:
            units = (r["attend_units"], r["stock_units"])
            r["predicted_ratio"] = attend_costs.ratio(costs, units)
            r["chosen"] = "attend" if attend_costs.pays(costs, units) else "stock"
            r["chosen_over_stock"] = (r["attend_s"] if r["chosen"] == "attend" else r["stock_s"]) / r["stock_s"]
            print(
                f"{r['dtype']:9s} {'/'.join(map(str, r['shape'][:3])):9s} {r['sharing']:9s} R={r['rows']:5d} "
                f"L={r['length']:5d}  ms: attend {1e3 * r['attend_s']:8.3f} vLLM {1e3 * r['stock_s']:8.3f}  ratio "
                f"{r['ratio']:5.2f} predicted {r['predicted_ratio']:5.2f}  GMAC/s: {r['attend_gmac_s']:6.1f} against "
                f"{r['stock_gmac_s']:5.1f}",
                flush=True,
            )
        key = attend_costs.cost_key(fitted[0]["isa"], dtype)
        worst[key] = {
            name: max(r["chosen_over_stock"] for r in cases)
            for name, cases in (("fitted", fitted), ("held_out", held_out))
        }
        all_costs[key] = costs
        records += [{"set": "fitted", **r} for r in fitted] + [{"set": "held out", **r} for r in held_out]
    print("worst chosen : vLLM", worst)
    left, right = torch.randn(768, 576).bfloat16(), torch.randn(576, 1536).bfloat16()
    product_s = interleaved(lambda: left @ right, seconds=seconds)[0]
    if write_costs:
        attend_costs.COSTS.write_text(json.dumps(all_costs, indent=1) + "\n")
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
    from fastsmc.models import resolve
    from fastsmc.potentials import Lexicon
    from fastsmc.vllm.attention import Attend
    from fastsmc.vllm.passes import Pass

    llm = LLM(
        resolve("smollm2"), dtype="bfloat16", max_model_len=8192, enforce_eager=True, max_num_seqs=1024,
        kv_cache_memory_bytes=1 << 30,
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
    begun: list[float] = []
    begin, take, pays = Pass.__init__, Pass.take, Attend.pays

    def choose(self, plan, length, group):
        rows.append(len(plan.table))
        answer = pays(self, plan, length, group)
        used.append(answer)
        return answer and len(rows) % 2 == 0

    def timed_begin(self, *args):
        begun[:] = [time.perf_counter(), len(rows)]
        begin(self, *args)

    def timed_take(self):
        take(self)
        if len(rows) > begun[1] and self.groups[0].t > 4:  # by then nearly all histories differ
            spent["ours" if len(rows) % 2 == 0 else "stock"].append(time.perf_counter() - begun[0])

    Attend.pays, Pass.__init__, Pass.take = choose, timed_begin, timed_take  # type: ignore[assignment, method-assign]
    records: list[dict[str, Any]] = []
    for prompt_len in prompts:
        for i in range(repeats + 1):
            if i <= 1:
                spent.clear()
                rows.clear()
                used.clear()
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
    Attend.pays, Pass.__init__, Pass.take = pays, begin, take  # type: ignore[method-assign]
    return {"bench": "attend steps", "records": records}


def bench_gpu(seconds: float) -> dict[str, Any]:
    """Times a layer; a generated block is shared by 8 rows on the average, as after resampling, the tail by none."""
    import torch
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    from fastsmc import ops

    heads, key_heads, size, block, layers = 32, 8, 128, 16, 32
    flash = 3 if torch.cuda.get_device_capability()[0] == 9 else 2  # the one that vLLM takes on this GPU
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
        ours = keys.transpose(1, 2), values.transpose(1, 2)
        twin, scale = torch.empty_like(cache), size**-0.5

        def attend(plan=plan, ours=ours, tokens=tokens, query=query, out=out, scale=scale):
            our_keys, our_values = ours
            return ops.attend(query, our_keys, our_values, plan, tokens, scale=scale, out=out)

        def dense(keys=keys, values=values, query=query, table=table, starts=starts, lengths=lengths, length=length):
            return flash_attn_varlen_func(
                q=query, k=keys, v=values, max_seqlen_q=1, cu_seqlens_q=starts, max_seqlen_k=length,
                seqused_k=lengths, softmax_scale=size**-0.5, causal=True, block_table=table, fa_version=flash,
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
    return {"bench": "attend gpu", "flash_attention": flash, "records": records}


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
    if args.json:
        write_result(args.json, result)


if __name__ == "__main__":
    main()
