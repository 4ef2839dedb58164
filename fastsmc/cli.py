"""The command line: `fastsmc run`, `counterfactual`, `serve`, `train-twist`, `evaluate`, `align`, `bench`, `info`.

Everything that can be refused is refused before an engine starts, in one line on stderr and with exit status 2; a
group that fails gives status 1. Nothing heavy is imported before it is needed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from fastsmc import __version__
from fastsmc.params import PROPOSALS, RESAMPLING_SCHEMES, SMCParams
from fastsmc.screen import EngineLog, engine_log, one_line
from fastsmc.values import check_int

BENCHES = ("ops", "smc", "step", "twist", "infill")


class _Parser(argparse.ArgumentParser):
    """Parses as argparse does, with errors of one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def make_parser() -> argparse.ArgumentParser:
    default = SMCParams()
    parser = _Parser(prog="fastsmc", description="Sequential Monte Carlo with language models, inside vLLM.")
    parser.add_argument("--version", action="version", version=f"fastsmc {__version__}")
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="{run,counterfactual,serve,train-twist,evaluate,align,bench,info}"
    )

    run = commands.add_parser(
        "run", help="run one group of particles and show its best texts, or one per line of a file"
    )
    _add_task(run, default).add_argument(
        "--input", metavar="FILE", help='JSON Lines, a prompt per line: {"prompt": TEXT or ids}; results go to --output'
    )
    run.add_argument(
        "--output", metavar="DIR", help="Parquet files of --input's results; prompts that are there are not run again"
    )
    run.add_argument("--ray", metavar="ADDRESS", help="run --input on a Ray cluster: an address, auto, or local")
    run.add_argument("--workers", type=int, metavar="K", help="engines on it (default: 1); above 1 implies --ray local")
    run.add_argument("--twist", metavar="DIR", help="a learned twist; brings its own potential if none is given")
    run.add_argument("--resampling", choices=RESAMPLING_SCHEMES, default=default.resampling)
    _add_resampling(run, default)
    run.add_argument("--proposal", choices=PROPOSALS, default=default.proposal)
    _add_power(run, default)
    run.add_argument("--islands", type=int, metavar="M", help="independent islands of --particles each, pooled")
    run.add_argument(
        "--migrate-every", type=int, metavar="K", help="tokens after which --islands migrate, all in one group"
    )
    run.add_argument("--n-particles", choices=("auto",), help="as many islands of --particles as --target-stderr needs")
    run.add_argument("--target-stderr", type=float, metavar="E", help="with --n-particles auto (default: 0.1)")
    run.add_argument("--max-particles", type=int, metavar="M", help="with --n-particles auto (default: 65536)")
    run.add_argument("--best", type=int, default=10, metavar="K", help="texts in the table (default: %(default)s)")
    run.add_argument("--json", metavar="FILE", help="write everything about the result there")
    run.add_argument("--save", metavar="FILE", help="write the population there, for Population.load")
    run.add_argument("--plot", metavar="FILE", help="draw weights there and the genealogy beside it")
    _add_engine(run)
    run.set_defaults(call=command_run)

    what_if = commands.add_parser("counterfactual", help="what a text would have been, all chance being the same")
    _add_counterfactual(what_if, default)
    _add_engine(what_if)
    what_if.set_defaults(call=command_counterfactual)

    serve = commands.add_parser("serve", help="serve a model over HTTP, with vLLM's server and its flags")
    serve.add_argument("model", metavar="MODEL", help="name or path, as for `vllm serve`")
    serve.add_argument("flags", nargs=argparse.REMAINDER, metavar="FLAG", help="any flag of `vllm serve`")
    serve.set_defaults(call=command_serve)

    train = commands.add_parser("train-twist", help="learn a twist for a potential; needs no vLLM")
    _add_task(train, default, many=True)
    train.add_argument(
        "--held-out", metavar="FILE", help="JSON Lines as of --prompts, to evaluate on; none of them is trained on"
    )
    train.add_argument("--out", required=True, metavar="DIR", help="where the twist and the run's files go")
    train.add_argument(
        "--config",
        metavar="JSON",
        default="{}",
        help='fields of fastsmc.training.TwistConfig, for instance \'{"loss": "ctl", "steps": 500}\'',
    )
    train.add_argument("--exact", metavar="FILE", help="JSON list of exact samples (lists of token ids)")
    train.add_argument("--device", default="cpu", help="default: %(default)s")
    train.set_defaults(call=command_train)

    judge = commands.add_parser("evaluate", help="bounds on log Z, divergences, ESS; against plain sampling")
    _add_task(judge, default)
    judge.add_argument("--twist", metavar="DIR", help="a learned twist; brings its own potential if none is given")
    _add_resampling(judge, default)
    _add_power(judge, default)
    judge.add_argument("--exact", metavar="FILE", help="JSON list of exact samples (lists of token ids)")
    judge.add_argument("--rejection", type=int, default=32, metavar="K", help="else so many by rejection (%(default)s)")
    judge.add_argument("--runs", type=int, default=16, metavar="R", help="of each kind (default: %(default)s)")
    judge.add_argument("--json", metavar="FILE", help="write the report there")
    judge.add_argument("--plot", metavar="FILE", help="draw bounds and ESS curves there")
    _add_engine(judge)
    judge.set_defaults(call=command_evaluate)

    align = commands.add_parser("align", help="find the subspaces that play a variable of a causal model")
    align.add_argument("--config", required=True, metavar="FILE", help="TOML: model, task, variable, layers, ...")
    align.add_argument("--verbose", action="store_true", help="show the engine's log, which else goes to a file")
    align.set_defaults(call=command_align)

    bench = commands.add_parser("bench", help="run a benchmark of the source tree")
    bench.add_argument("which", choices=BENCHES)
    bench.add_argument("--json", metavar="FILE", help="write the result there")
    bench.set_defaults(call=command_bench)

    info = commands.add_parser("info", help="versions, what is built, devices, registered potentials")
    info.add_argument("--json", action="store_true", help="as JSON")
    info.set_defaults(call=command_info)
    return parser


def _add_task(parser: argparse.ArgumentParser, default: SMCParams, many: bool = False) -> Any:
    """Adds the options that say what is sampled: model, prompt (or `many`), potential, length; returns the prompt's."""
    prompts = _add_prompt(parser, default, many)
    add = parser.add_argument
    add("--particles", type=int, default=default.n_particles, metavar="N", help="default: %(default)s")
    add("--max-tokens", type=int, default=default.max_tokens, metavar="T", help="default: %(default)s")
    add("--potential", metavar="NAME", help="a registered potential; `fastsmc info` lists them")
    add("--potential-args", metavar="JSON", default="{}", help='for instance \'{"pattern": "yes|no"}\'')
    return prompts


def _add_resampling(parser: argparse.ArgumentParser, default: SMCParams) -> None:
    """Adds the options that say when a group resamples, and how strictly by weight."""
    parser.add_argument("--ess-threshold", type=float, default=default.ess_threshold, help="default: %(default)s")
    parser.add_argument(
        "--resample-every",
        type=int,
        default=default.resample_every,
        metavar="B",
        help="tokens, or with segments boundaries (default: %(default)s)",
    )
    parser.add_argument(
        "--segment",
        action="append",
        metavar="TEXT",
        help="a delimiter, at which particles wait until all are there, to be weighed and resampled; may be repeated",
    )
    parser.add_argument("--max-segment-tokens", type=int, metavar="K", help="of a segment at most")
    parser.add_argument(
        "--resampling-temperature",
        type=_tau,
        default=default.resampling_temperature,
        metavar="TAU",
        help="at least 1, or 'entropic' (default: %(default)s)",
    )


def _tau(text: str) -> float | str:
    return text if text == "entropic" else float(text)


def _resampling(args: argparse.Namespace) -> dict[str, Any]:
    names = ("ess_threshold", "resample_every", "resampling_temperature", "segment", "max_segment_tokens")
    return {name: getattr(args, name) for name in names}


def _add_prompt(parser: argparse.ArgumentParser, default: SMCParams, many: bool = False) -> Any:
    """Adds the options that say what is drawn from, and by what numbers; returns the group of ways to give a prompt."""
    add = parser.add_argument
    add("--model", default="smollm2", help="name or path, as for vLLM (default: %(default)s)")
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt")
    if many:
        prompts.add_argument(
            "--prompts",
            metavar="FILE",
            help='JSON Lines, a prompt per line: {"prompt": TEXT or ids}, with "continuation" for a conditional twist',
        )
    add("--temperature", type=float, default=default.temperature, help="default: %(default)s")
    add("--ignore-eos", action="store_true", help="particles go on past the end-of-sequence token")
    add("--seed", type=int, default=default.seed, help="default: %(default)s")
    return prompts


def _add_counterfactual(parser: argparse.ArgumentParser, default: SMCParams) -> None:
    """Adds the options of `counterfactual`: what drew the text, what is otherwise, and what is made of it."""
    _add_prompt(parser, default)
    add = parser.add_argument
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--text", help="what was drawn after the prompt, if its tokens are those that were drawn")
    text.add_argument(
        "--token-ids", metavar="JSON", help="its tokens, for instance '[12, 5]'; without either one is drawn"
    )
    add("--top-k", type=int, default=default.top_k, help="that drew it; 0, the default: off")
    add("--top-p", type=float, default=default.top_p, help="that drew it; 1, the default: off")
    add("--intervention", metavar="FILE", help="made by fastsmc.interventions.save")
    add("--temperature-to", type=float, metavar="T", help="another temperature")
    add("--prompt-to", metavar="TEXT", help="another prompt")
    add("--n", type=int, default=default.n_particles, help="counterfactuals (default: %(default)s)")
    add("--max-tokens", type=int, metavar="T", help=f"default: as the text, or {default.max_tokens} where it is drawn")
    add("--noise", default="exact", help="exact or gumbel (default: %(default)s)")
    add("--best", type=int, default=10, metavar="K", help="of the most frequent in the table (default: %(default)s)")
    add("--json", metavar="FILE", help="write everything about the result there")
    add("--save", metavar="FILE", help="write it there, for Counterfactuals.load")
    add("--plot-survival", metavar="FILE", help="draw there how long the text stays")


def _add_engine(parser: argparse.ArgumentParser) -> None:
    """Adds the options of commands that start an engine."""
    parser.add_argument(
        "--engine-args",
        metavar="JSON",
        default="{}",
        help="further arguments of vllm.LLM; on a CPU '{\"enforce_eager\": false}' compiles the model",
    )
    parser.add_argument("--verbose", action="store_true", help="show the engine's log, which else goes to a file")


def _add_power(parser: argparse.ArgumentParser, default: SMCParams) -> None:
    parser.add_argument("--power", type=float, default=default.power, metavar="A", help="sample p0^A·φ (default: 1)")
    parser.add_argument("--power-ramp", metavar="K|A1,A2,...", help="reach the power in K steps, or by these powers")


def _ramp(text: str | None) -> int | tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return int(text) if text.isdecimal() else tuple(float(each) for each in text.split(","))
    except ValueError:
        raise ValueError(f"--power-ramp {text!r}: must be a number of steps, or powers with commas between") from None


# -- run ---------------------------------------------------------------------------------------------------------------
def command_run(args: argparse.Namespace) -> int:
    params = SMCParams(
        n_particles=args.particles,
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        **_resampling(args),
        resampling=args.resampling,
        proposal=args.proposal,
        power=args.power,
        power_ramp=_ramp(args.power_ramp),
        ignore_eos=args.ignore_eos,
        seed=args.seed,
    )
    if args.best < 0:
        raise ValueError(f"--best {args.best}: must be at least 0")
    engine_args = _json_object("--engine-args", args.engine_args)
    for option in ("json", "save", "plot"):
        _check_writable(f"--{option}", getattr(args, option))
    plots = _plot_paths(args.plot) if args.plot else None
    potential, potential_args = _potential(args)
    more: dict[str, Any] = {} if args.twist is None else {"twist": _twist(args.twist)}
    if args.twist is not None and potential is None:
        from fastsmc.twists import card_potential

        potential = card_potential(args.twist)
    if args.proposal == "rejection" and potential is None and not more:
        raise ValueError("--proposal rejection: needs a --potential with a condition to be asked")
    from fastsmc.islands import read_islands

    names = ("islands", "migrate_every", "n_particles", "target_stderr", "max_particles")
    asked = {name: value for name in names if (value := getattr(args, name)) is not None}
    [of_group], _ = read_islands([params], False, **asked)  # refused before an engine starts
    if args.input is not None:
        return _run_many(args, of_group, potential, potential_args, engine_args)
    for option in ("output", "ray", "workers"):
        if getattr(args, option) is not None:
            raise ValueError(f"--{option} {getattr(args, option)}: needs --input")
    more |= asked

    rows = of_group.n_particles
    with engine_log("run", args.verbose) as log, _engine(args.model, engine_args, rows, log) as llm:
        start = time.perf_counter()
        with contextlib.redirect_stderr(log.err):  # where the bar goes
            population = llm.smc(args.prompt, params, potential=potential, use_tqdm=log.err.isatty(), **more)
        seconds = time.perf_counter() - start
        _write_run(args, population, potential_args, seconds, plots)
        log.say(format_result(population, args.best, seconds, shutil.get_terminal_size().columns))
    return 0


def _run_many(
    args: argparse.Namespace,
    params: SMCParams,
    potential: Any,
    potential_args: dict[str, Any],
    engine_args: dict[str, Any],
) -> int:
    """Runs the prompts of --input that have no results in --output yet; failures are a line each."""
    from fastsmc.batches import Job, run_job, watched
    from fastsmc.prompts import read_lines
    from fastsmc.results import Results

    for option in ("json", "save", "plot", "n_particles"):
        if getattr(args, option) is not None:
            raise ValueError(f"--{option.replace('_', '-')}: is for one --prompt; leave it out with --input")
    if args.output is None:
        raise ValueError("--output: is missing; results of --input go there")
    workers = check_int("--workers", 1 if args.workers is None else args.workers, 1)
    lines = read_lines(args.input)
    numbers, prompts = list(lines), [p if isinstance(p := line.prompt, str) else list(p) for line in lines.values()]
    job = Job(prompts, params, 1 if args.islands is None or args.migrate_every is not None else args.islands)
    settings = {
        **{name: getattr(args, name) for name in ("model", "potential", "twist")}, "potential_args": potential_args,
        "params": dataclasses.asdict(params), "islands": job.islands, "engine_args": engine_args,
    }  # fmt: skip
    results = Results(args.output, prompts, settings)
    before, failed, start = len(results.finished), 0, time.perf_counter()
    if before == len(prompts):
        print(f"all {before} prompts are in {args.output}")
        return 0
    with engine_log("run", args.verbose) as log, contextlib.ExitStack() as stack:
        if args.ray is not None or workers > 1:
            fleet = _fleet(args, potential, engine_args, workers, log)
            found = stack.enter_context(fleet).run(job, results.finished)
        else:
            llm = stack.enter_context(_engine(args.model, engine_args, params.n_particles, log))
            found = run_job(llm, job, potential, args.twist, results.finished)
        with contextlib.redirect_stderr(log.err):  # where the bar goes
            for i, error in results.take(watched(found, len(prompts) - before, log.err.isatty())):
                failed += 1
                print(f"{args.input}, line {numbers[i]}: {one_line(error)}", file=log.err, flush=True)
        new, seconds = len(results.finished) - before, time.perf_counter() - start
        log.say(f"{new} prompts in {seconds:.1f} s, {before} were there, {failed} failed: {args.output}")
    return 1 if failed else 0


def _fleet(args: argparse.Namespace, potential: Any, engine_args: dict[str, Any], workers: int, log: EngineLog) -> Any:
    """Makes the engines of a Ray cluster, which start when their context is entered."""
    from fastsmc.ray import Fleet, ray

    fleet = Fleet(args.model, potential, twist=args.twist, engine_args=engine_args, n_workers=workers)
    log.progress(f"starting vLLM with {args.model} on {workers} Ray workers ...")
    ray.init(address=args.ray or "local", include_dashboard=False, log_to_driver=False)
    return fleet


def _write_run(
    args: argparse.Namespace,
    population: Any,
    potential_args: dict[str, Any],
    seconds: float,
    plots: tuple[Path, Path] | None,
) -> None:
    """Writes the files that --save, --json and --plot name."""
    if args.save:
        population.save(args.save)
    if args.json:
        result = {
            "model": args.model,
            "prompt": args.prompt,
            "potential": args.potential,
            "potential_args": potential_args,
            "seconds": seconds,
            "tokens_per_s": sum(map(len, population.token_ids)) / seconds,
            **population.to_dict(),
        }
        Path(args.json).write_text(json.dumps(result, allow_nan=False) + "\n")
    if plots:
        population.plot_weights(plots[0])
        population.plot_genealogy(plots[1])


@contextlib.contextmanager
def _engine(model: str, engine_args: dict[str, Any], rows: int, log: EngineLog) -> Iterator[Any]:
    """Starts `fastsmc.LLM` with what a command needs, and ends its processes while their words still go to the log.

    Args:
        rows: of a group.

    Raises:
        EngineError: it does not start, for whatever reason, or dies.
    """
    log.progress(f"starting vLLM with {model} ...")
    try:
        import torch

        from fastsmc import LLM, models

        if rows > 1024:  # what the engine takes by itself
            engine_args.setdefault("max_num_seqs", rows)
        if not torch.cuda.is_available():
            engine_args.setdefault("enforce_eager", True)  # compiling takes longer than most runs
        llm = LLM(models.resolve(model, log.progress), **engine_args)
    except Exception as error:
        raise log.error(f"the engine did not start with model {model!r}", error) from None
    try:
        yield llm
    except Exception as error:
        if type(error).__name__ == "EngineDeadError":  # by name: vLLM may not be importable here
            raise log.error("the engine died", error) from None
        raise
    finally:
        if hasattr(llm, "shutdown"):
            llm.shutdown()


def format_result(population: Any, k: int, seconds: float, width: int) -> str:
    """Sets the k heaviest texts as a table, below it log Ẑ, final ESS and tokens/s; lines of at most `width`."""
    lines = [f"{'weight':>8}  {'log p0':>9}  text"]
    for text, weight, log_prob in population.best(k):
        shown = _cut(json.dumps(text, ensure_ascii=False), max(width - 21, 20))
        lines.append(f"{weight:8.4f}  {log_prob:9.3f}  {shown}")
    n, tokens = population.n_particles, sum(map(len, population.token_ids))
    lines.append("")
    if population.degenerate:
        lines.append("every particle has weight zero: the potential allows none of them")
    reason = population.log_z_stderr_reason
    error = f" ± {population.log_z_stderr:.4f}" if reason is None else ""
    roots = f"{population.n_roots} roots"
    lines.append(f"log Ẑ {population.log_z:.4f}{error}   ESS {population.final_ess:.1f} of {n}, {roots}")
    if population.pilot is None and population.n_islands > 1:
        lines.append(f"{population.n_islands} islands")
    elif population.pilot is not None:
        cap = "; --max-particles allowed no more" if population.capped else ""
        lines.append(f"{population.n_islands} islands, by {population.pilot.n_islands} pilots{cap}")
    if population.biased:
        lines.append(f"log Ẑ is too low on average: max_asked cut {population.questions['cut']} searches for a token")
    if reason is not None:
        lines.append(_cut(f"no standard error: {reason}", width))
    resamplings = int(population.resampled.sum())
    lines.append(f"{tokens} tokens in {seconds:.2f} s: {tokens / seconds:.0f} tokens/s, {resamplings} resamplings")
    return "\n".join(lines)


def _potential(args: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """Makes the potential that the options name (or None), and reads its arguments; checks the prompt with them."""
    from fastsmc.potentials import resolve

    if args.prompt == "":
        raise ValueError("--prompt: is empty")
    potential_args = _json_object("--potential-args", args.potential_args)
    if args.potential is not None:
        return resolve(args.potential, potential_args), potential_args
    if potential_args:
        raise ValueError("--potential-args: given without --potential")
    return None, potential_args


def _twist(path: str) -> str:
    from fastsmc.twists import Card

    Card.read(path)  # refused here rather than when an engine runs
    return path


def _exact(path: str | None) -> list[list[int]] | None:
    """Reads exact samples from a JSON file: a list of lists of token ids."""
    if path is None:
        return None
    from fastsmc.potentials import token_list

    try:
        value = json.loads(Path(path).read_text())
    except (ValueError, RecursionError) as error:  # bytes that are no text, too
        raise ValueError(f"--exact {path}: is not JSON: {error}") from None
    if not isinstance(value, list) or not value:
        raise ValueError(f"--exact {path}: must be a list of lists of token ids")
    return [token_list(f"--exact {path}: entry {i}", ids) for i, ids in enumerate(value)]


# -- counterfactual ----------------------------------------------------------------------------------------------------
def command_counterfactual(args: argparse.Namespace) -> int:
    ids, changes, engine_args = _read_counterfactual(args)
    length = len(ids) if ids else SMCParams().max_tokens
    params = SMCParams(
        n_particles=args.n,
        max_tokens=length if args.max_tokens is None else args.max_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        ignore_eos=args.ignore_eos,
        seed=args.seed,
    )
    plot = None if args.plot_survival is None else _plot_path("--plot-survival", args.plot_survival)

    from fastsmc.interventions import Prompt
    from fastsmc.texts import spell_diffs, texts_after

    log_name, rows = "counterfactual", params.n_particles + 1  # the text has one, too
    with engine_log(log_name, args.verbose) as log, _engine(args.model, engine_args, rows, log) as llm:
        tokenizer = llm.get_tokenizer()
        if args.text is not None:
            ids = tokenizer.encode(args.text, add_special_tokens=False)
            if args.max_tokens is None:
                params = dataclasses.replace(params, max_tokens=len(ids))
        if args.prompt_to is not None:
            changes.append(Prompt(tokenizer.encode(args.prompt_to)))
        start = time.perf_counter()
        found = llm.counterfactual(args.prompt, ids, changes, params=params, noise=args.noise)
        seconds, diffs = time.perf_counter() - start, spell_diffs(tokenizer, found)
        [text] = texts_after(tokenizer, found.prompt_token_ids, [found.factual_ids])
        if args.save:
            found.save(args.save)
        if args.json:
            asked = {name: getattr(args, name) for name in ("model", "prompt", "intervention", "noise")}
            asked |= {"temperature_to": args.temperature_to, "prompt_to": args.prompt_to}
            result = {**asked, "seconds": seconds, **found.to_dict(), "factual_text": text, "diffs": diffs}
            Path(args.json).write_text(json.dumps(result, allow_nan=False) + "\n")
        if plot is not None:
            found.plot_survival(plot)
        width = shutil.get_terminal_size().columns
        log.say(format_counterfactuals(found, text, diffs, args.best, seconds, width))
    return 0


def _read_counterfactual(args: argparse.Namespace) -> tuple[list[int] | None, list[Any], dict[str, Any]]:
    """Reads what needs no engine: the text's tokens, if they are given, the interventions, and the engine's arguments.

    Raises:
        ValueError: naming the option.
    """
    from fastsmc.interventions import LayerIntervention, Temperature, load
    from fastsmc.potentials import token_list
    from fastsmc.smc.evidence import NOISES

    for option in ("prompt", "text", "prompt_to"):
        if getattr(args, option) == "":
            raise ValueError(f"--{option.replace('_', '-')}: is empty")
    if args.intervention is None and args.temperature_to is None and args.prompt_to is None:
        raise ValueError("--intervention: is missing; give it, --temperature-to or --prompt-to, or nothing changes")
    if args.best < 0:
        raise ValueError(f"--best {args.best}: must be at least 0")
    if args.noise not in NOISES:
        raise ValueError(f"--noise {args.noise}: must be one of {', '.join(NOISES)}")
    for option in ("json", "save", "plot_survival"):
        _check_writable(f"--{option.replace('_', '-')}", getattr(args, option))
    ids = None
    if args.token_ids is not None:
        try:
            ids = token_list("--token-ids", json.loads(args.token_ids))
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"--token-ids: {args.token_ids!r} is not JSON: {error}") from None
        if not ids:
            raise ValueError("--token-ids: is empty")
    changes: list[Any] = [] if args.intervention is None else load(args.intervention)
    if args.temperature_to is not None:
        changes.append(Temperature(args.temperature_to))
    engine_args = _json_object("--engine-args", args.engine_args)
    if any(isinstance(part, LayerIntervention) for part in changes):
        engine_args.setdefault("interventions", True)
    return ids, changes, engine_args


def format_counterfactuals(found: Any, text: str, diffs: Sequence[str], k: int, seconds: float, width: int) -> str:
    """Sets the text, and what becomes of it in the k most frequent counterfactuals; lines of at most `width`."""
    share: dict[tuple[int, ...], float] = {}
    place: dict[tuple[int, ...], int] = {}
    for i, (ids, weight) in enumerate(zip(found.token_ids, found.weights, strict=True)):
        share[tuple(ids)] = share.get(tuple(ids), 0.0) + float(weight)
        place.setdefault(tuple(ids), i)
    kernel, prefix = found.log_kernel, found.common_prefix
    order = sorted(share, key=lambda ids: (-share[ids], -kernel[place[ids]]))
    lines = [
        _cut(f"text: {json.dumps(text, ensure_ascii=False)}", width),
        "",
        f"{'share':>6}  {'kept':>5}  counterfactual",
    ]
    for ids in order[:k]:
        same = list(ids) == found.factual_ids
        shown = "the text" if same else json.dumps(_from_change(diffs[place[ids]]), ensure_ascii=False)
        lines.append(f"{share[ids]:6.3f}  {prefix[place[ids]]:5}  {_cut(shown, max(width - 15, 20))}")
    n, survival = len(found.factual_ids), found.survival
    lines += [
        "",
        f"{found.expected_common_prefix:.2f} of {n} tokens stay; all of them with probability {survival[-1]:.4f}",
    ]
    lines.append(f"{len(share)} different ones of {found.n_particles} in {seconds:.2f} s")
    return "\n".join(lines)


def _from_change(diff: str, before: int = 12) -> str:
    """Cuts off what stays before the first change, but for a few characters."""
    first = min((at for mark in ("[-", "{+") if (at := diff.find(mark)) >= 0), default=0)
    return diff if first <= before else "…" + diff[first - before :]


def _cut(line: str, width: int) -> str:
    return line if len(line) <= width else line[: width - 1] + "…"


# -- serve -------------------------------------------------------------------------------------------------------------
def command_serve(args: argparse.Namespace) -> int:
    from fastsmc import models
    from fastsmc.vllm.serve import launch

    launch.name_plugin()
    model, flags = models.resolve(args.model), list(args.flags)
    named = any(flag.replace("_", "-").startswith("--served-model-name") for flag in flags)
    if model != args.model and not named:  # clients know it by the name given here, not by where it was unpacked
        flags += ["--served-model-name", args.model]
    launch.serve(model, flags)
    return 0


# -- twists ------------------------------------------------------------------------------------------------------------
def command_train(args: argparse.Namespace) -> int:
    params = SMCParams(
        n_particles=args.particles,
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        ignore_eos=args.ignore_eos,
        seed=args.seed,
    )
    potential, potential_args = _potential(args)
    from fastsmc.prompts import read_twist_prompts
    from fastsmc.training import Trainer, TwistConfig

    settings = _json_object("--config", args.config)
    try:
        config = TwistConfig(**settings)
    except TypeError as error:
        raise ValueError(f"--config: {error}") from None
    if potential is None and not config.continuation_tokens:
        raise ValueError("--potential: is missing; a twist is learned for one, or has continuation_tokens in --config")
    if potential is not None and config.continuation_tokens:
        raise ValueError("--potential: must not stand beside continuation_tokens in --config, whose φ is infill")
    prompts = args.prompt if args.prompts is None else read_twist_prompts(args.prompts)
    held_out = None if args.held_out is None else read_twist_prompts(args.held_out)
    exact = _exact(args.exact)

    from fastsmc import models
    from fastsmc.hf import HFEngine

    engine = HFEngine(models.resolve(args.model), device=args.device)
    trainer = Trainer(
        engine,
        prompts,
        params,
        potential,
        config,
        args.out,
        exact=exact,
        held_out=held_out,
        name=args.potential,
        args=potential_args,
    )
    trainer.run(progress=sys.stderr.isatty())
    last = trainer.history[-1]
    print(f"{config.kind} twist by {config.loss} after {config.steps} steps in {args.out}; loss {last['loss']:.5g}")
    if "lower" in last:
        upper = f", {last['upper']:.4f} from above" if "upper" in last else ""
        of = "" if held_out is None else f", mean of {len(held_out)} held-out prompts"
        print(f"log Z with N = {config.eval_particles}{of}: {last['lower']:.4f} from below{upper}")
    return 0


def command_evaluate(args: argparse.Namespace) -> int:
    params = SMCParams(
        n_particles=args.particles,
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        **_resampling(args),
        power=args.power,
        power_ramp=_ramp(args.power_ramp),
        ignore_eos=args.ignore_eos,
        seed=args.seed,
    )
    potential, _ = _potential(args)
    twist = None if args.twist is None else _twist(args.twist)
    if potential is None:
        if twist is None:
            raise ValueError("--potential: is missing, and there is no --twist that would bring one")
        from fastsmc.twists import card_potential

        potential = card_potential(twist)
    if args.runs < 2:
        raise ValueError(f"--runs {args.runs}: must be at least 2")
    for option in ("json", "plot"):
        _check_writable(f"--{option}", getattr(args, option))
    exact = _exact(args.exact)
    engine_args = _json_object("--engine-args", args.engine_args)

    from fastsmc import evaluate

    rows = params.n_particles
    with engine_log("evaluate", args.verbose) as log, _engine(args.model, engine_args, rows, log) as llm:
        if exact is None:
            exact = evaluate.rejection(llm, args.prompt, params, potential, args.rejection)
        result = evaluate.report(llm, args.prompt, params, potential, exact=exact, runs=args.runs, twist=twist)
        result = {"model": args.model, "prompt": args.prompt, "twist": twist, **result}
        if args.json:
            Path(args.json).write_text(json.dumps(result, allow_nan=False) + "\n")
        if args.plot:
            evaluate.plot(result, args.plot)
        log.say(evaluate.table(result))
    return 0


def command_align(args: argparse.Namespace) -> int:
    from fastsmc.alignment.command import Config, Task, format_heat_map

    config = Config.read(args.config)
    task = Task.load(config)
    with engine_log("align", args.verbose) as log, contextlib.redirect_stderr(log.err):  # where bars go
        engine_args = {"interventions": True, **config.engine_args}
        found = task.run(lambda: _engine(config.model, engine_args, 1, log), log.progress)
        log.say(format_heat_map(found, config.out))
    return 0


def _json_object(option: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{option}: {text!r} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f'{option}: {text!r} must be a JSON object such as {{"name": 1}}')
    return value


def _check_writable(option: str, path: str | None) -> None:
    if path is None:
        return
    parent = Path(path).resolve().parent
    if not parent.is_dir():
        raise ValueError(f"{option} {path}: there is no directory {parent}")
    if Path(path).is_dir() or not os.access(path if os.path.exists(path) else parent, os.W_OK):
        raise ValueError(f"{option} {path}: cannot be written")


def _plot_paths(path: str) -> tuple[Path, Path]:
    """Names the plots: `path` (.png unless it has a suffix) for the weights, with '-genealogy' for the other."""
    weights = _plot_path("--plot", path)
    return weights, weights.with_stem(weights.stem + "-genealogy")


def _plot_path(option: str, path: str) -> Path:
    from fastsmc import plots

    out, known = Path(path) if Path(path).suffix else Path(path + ".png"), plots.suffixes()
    if out.suffix[1:].lower() not in known:
        raise ValueError(f"{option} {path}: unknown suffix; known are {', '.join(known)}")
    return out


# -- bench -------------------------------------------------------------------------------------------------------------
def command_bench(args: argparse.Namespace) -> int:
    _check_writable("--json", args.json)
    import fastsmc

    script = Path(fastsmc.__file__).resolve().parents[1] / "bench" / f"bench_{args.which}.py"
    if not script.is_file():
        raise ValueError(
            f"bench {args.which}: needs the source tree with bench/{script.name}; this fastsmc is installed without it"
        )
    sys.path.insert(0, str(script.parent))  # as for `python bench/…`
    spec = importlib.util.spec_from_file_location(f"fastsmc_{script.stem}", script)
    assert spec is not None and spec.loader is not None  # it is a .py file
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.run(args.json)
    return 0


# -- info --------------------------------------------------------------------------------------------------------------
def gather_info() -> dict[str, Any]:
    """Gathers what `fastsmc info` shows, in plain JSON values. Neither vLLM nor the extension need be there."""
    import torch

    import fastsmc
    from fastsmc.potentials import registered

    try:
        from fastsmc import _C
        from fastsmc.ops._tensors import built_backends, missing_on_gpu

        extension, cuda_archs, backends = True, list(_C.cuda_archs), built_backends()
        missing = missing_on_gpu(backends)
    except ImportError:
        extension, backends, cuda_archs, missing = False, [], [], None
    try:
        from fastsmc.vllm.compat import SUPPORTED, vllm_version

        vllm, supported = vllm_version(), SUPPORTED
    except ImportError as error:
        vllm, supported = None, f"unknown: {error}"
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "fastsmc": fastsmc.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "vllm": vllm,
        "vllm_supported": supported,
        "extension_built": extension,
        "backends": backends,
        "cuda_archs": cuda_archs,  # what the extension was built for
        "missing_on_gpu": missing,  # in words; None: nothing
        "threads": torch.get_num_threads(),  # of the one OpenMP runtime that torch and the extension share
        "gpus": gpus,
        "cuda": torch.version.cuda,
        "potentials": {name: entry.value for name, entry in registered().items()},
    }


def command_info(args: argparse.Namespace) -> int:
    info = gather_info()
    if args.json:
        print(json.dumps(info, indent=1))
        return 0
    archs = ", ".join(f"sm_{arch}" for arch in info["cuda_archs"])
    with_cuda = f" with CUDA for {archs}" if archs else " without CUDA"
    rows = {
        "fastsmc": info["fastsmc"],
        "python": info["python"],
        "torch": info["torch"] + (f" (CUDA {info['cuda']})" if info["cuda"] else ""),
        "vllm": f"{info['vllm'] or 'not installed'} (supported: {info['vllm_supported']})",
        "extension": ("built" + with_cuda) if info["extension_built"] else "not built: pip install -e . builds it",
        "backends": ", ".join(info["backends"]) or "none",
        **({"on a gpu": info["missing_on_gpu"]} if info["missing_on_gpu"] else {}),
        "threads": f"{info['threads']} (OpenMP)",
        "gpu": ", ".join(info["gpus"]) or "none",
        "potentials": ", ".join(info["potentials"]) or "none registered",
    }
    for name, value in rows.items():
        print(f"{name:<11} {value}")
    return 0


# -- errors ------------------------------------------------------------------------------------------------------------
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and gives the exit status: 0, 1 (a group failed), 2 (bad input or surroundings)."""
    args = make_parser().parse_args(argv)
    call: Callable[[argparse.Namespace], int] = args.call
    try:
        return call(args)
    except BrokenPipeError:  # the reader of our output has left, as in `fastsmc info | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, ImportError) as error:
        status, message = 2, one_line(error)
    except RuntimeError as error:
        # by name: the modules of these may not be importable here
        kinds = {"SMCError": 1, "UnsupportedError": 2, "EngineError": 2}
        if type(error).__name__ not in kinds:
            raise
        status, message = kinds[type(error).__name__], one_line(error)
    except KeyboardInterrupt:
        status, message = 130, "interrupted"
    print(f"fastsmc {args.command}: error: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
