"""The command line: `fastsmc run`, `serve`, `train-twist`, `evaluate`, `bench`, `info`.

Everything that can be refused is refused before an engine starts, in one line on stderr and with exit status 2; a
group that fails gives status 1. Nothing heavy is imported before it is needed.
"""

from __future__ import annotations

import argparse
import contextlib
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
        dest="command", required=True, metavar="{run,serve,train-twist,evaluate,bench,info}"
    )

    run = commands.add_parser("run", help="run one group of particles and show its best texts")
    _add_task(run, default)
    run.add_argument("--twist", metavar="DIR", help="a learned twist; brings its own potential if none is given")
    run.add_argument("--ess-threshold", type=float, default=default.ess_threshold, help="default: %(default)s")
    run.add_argument("--resampling", choices=RESAMPLING_SCHEMES, default=default.resampling)
    run.add_argument("--proposal", choices=PROPOSALS, default=default.proposal)
    run.add_argument("--best", type=int, default=10, metavar="K", help="texts in the table (default: %(default)s)")
    run.add_argument("--json", metavar="FILE", help="write everything about the result there")
    run.add_argument("--save", metavar="FILE", help="write the population there, for Population.load")
    run.add_argument("--plot", metavar="FILE", help="draw weights there and the genealogy beside it")
    _add_engine(run)
    run.set_defaults(call=command_run)

    serve = commands.add_parser("serve", help="serve a model over HTTP, with vLLM's server and its flags")
    serve.add_argument("model", metavar="MODEL", help="name or path, as for `vllm serve`")
    serve.add_argument("flags", nargs=argparse.REMAINDER, metavar="FLAG", help="any flag of `vllm serve`")
    serve.set_defaults(call=command_serve)

    train = commands.add_parser("train-twist", help="learn a twist for a potential; needs no vLLM")
    _add_task(train, default)
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
    judge.add_argument("--ess-threshold", type=float, default=default.ess_threshold, help="default: %(default)s")
    judge.add_argument("--exact", metavar="FILE", help="JSON list of exact samples (lists of token ids)")
    judge.add_argument("--rejection", type=int, default=32, metavar="K", help="else so many by rejection (%(default)s)")
    judge.add_argument("--runs", type=int, default=16, metavar="R", help="of each kind (default: %(default)s)")
    judge.add_argument("--json", metavar="FILE", help="write the report there")
    judge.add_argument("--plot", metavar="FILE", help="draw bounds and ESS curves there")
    _add_engine(judge)
    judge.set_defaults(call=command_evaluate)

    bench = commands.add_parser("bench", help="run a benchmark of the source tree")
    bench.add_argument("which", choices=BENCHES)
    bench.add_argument("--json", metavar="FILE", help="write the result there")
    bench.set_defaults(call=command_bench)

    info = commands.add_parser("info", help="versions, what is built, devices, registered potentials")
    info.add_argument("--json", action="store_true", help="as JSON")
    info.set_defaults(call=command_info)
    return parser


def _add_task(parser: argparse.ArgumentParser, default: SMCParams) -> None:
    """Adds the options that say what is sampled: model, prompt, potential, length."""
    add = parser.add_argument
    add("--model", default="smollm2", help="name or path, as for vLLM (default: %(default)s)")
    add("--prompt", required=True)
    add("--particles", type=int, default=default.n_particles, metavar="N", help="default: %(default)s")
    add("--max-tokens", type=int, default=default.max_tokens, metavar="T", help="default: %(default)s")
    add("--potential", metavar="NAME", help="a registered potential; `fastsmc info` lists them")
    add("--potential-args", metavar="JSON", default="{}", help='for instance \'{"pattern": "yes|no"}\'')
    add("--temperature", type=float, default=default.temperature, help="default: %(default)s")
    add("--ignore-eos", action="store_true", help="particles go on past the end-of-sequence token")
    add("--seed", type=int, default=default.seed, help="default: %(default)s")


def _add_engine(parser: argparse.ArgumentParser) -> None:
    """Adds the options of commands that start an engine."""
    parser.add_argument(
        "--engine-args",
        metavar="JSON",
        default="{}",
        help="further arguments of vllm.LLM; on a CPU '{\"enforce_eager\": false}' compiles the model",
    )
    parser.add_argument("--verbose", action="store_true", help="show the engine's log, which else goes to a file")


# -- run ---------------------------------------------------------------------------------------------------------------
def command_run(args: argparse.Namespace) -> int:
    params = SMCParams(
        n_particles=args.particles,
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        ess_threshold=args.ess_threshold,
        resampling=args.resampling,
        proposal=args.proposal,
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
    more = {} if args.twist is None else {"twist": _twist(args.twist)}

    with engine_log("run", args.verbose) as log, _engine(args.model, engine_args, params, log) as llm:
        start = time.perf_counter()
        with contextlib.redirect_stderr(log.err):  # where the bar goes
            population = llm.smc(args.prompt, params, potential=potential, use_tqdm=log.err.isatty(), **more)
        seconds = time.perf_counter() - start
        _write_run(args, population, potential_args, seconds, plots)
        log.say(format_result(population, args.best, seconds, shutil.get_terminal_size().columns))
    return 0


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
def _engine(model: str, engine_args: dict[str, Any], params: SMCParams, log: EngineLog) -> Iterator[Any]:
    """Starts `fastsmc.LLM` with what a command needs, and ends its processes while their words still go to the log.

    Raises:
        EngineError: it does not start, for whatever reason, or dies.
    """
    log.progress(f"starting vLLM with {model} ...")
    try:
        import torch

        from fastsmc import LLM, models

        if params.n_particles > 1024:  # what the engine takes by itself
            engine_args.setdefault("max_num_seqs", params.n_particles)
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
        shown = json.dumps(text, ensure_ascii=False)
        room = max(width - 21, 20)
        lines.append(f"{weight:8.4f}  {log_prob:9.3f}  {shown if len(shown) <= room else shown[: room - 1] + '…'}")
    n, tokens = population.n_particles, sum(map(len, population.token_ids))
    lines.append("")
    if population.degenerate:
        lines.append("every particle has weight zero: the potential allows none of them")
    lines.append(f"log Ẑ {population.log_z:.4f}   ESS {population.final_ess:.1f} of {n}")
    resamplings = int(population.resampled.sum())
    lines.append(f"{tokens} tokens in {seconds:.2f} s: {tokens / seconds:.0f} tokens/s, {resamplings} resamplings")
    return "\n".join(lines)


def _potential(args: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """Makes the potential that the options name (or None), and reads its arguments; checks the prompt with them."""
    from fastsmc.potentials import resolve

    if not args.prompt:
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
    if potential is None:
        raise ValueError("--potential: is missing; a twist is learned for one")
    from fastsmc.training import Trainer, TwistConfig

    settings = _json_object("--config", args.config)
    try:
        config = TwistConfig(**settings)
    except TypeError as error:
        raise ValueError(f"--config: {error}") from None
    exact = _exact(args.exact)

    from fastsmc import models
    from fastsmc.hf import HFEngine

    engine = HFEngine(models.resolve(args.model), device=args.device)
    trainer = Trainer(
        engine,
        args.prompt,
        params,
        potential,
        config,
        args.out,
        exact=exact,
        name=args.potential,
        args=potential_args,
    )
    trainer.run(progress=sys.stderr.isatty())
    last = trainer.history[-1]
    print(f"{config.kind} twist by {config.loss} after {config.steps} steps in {args.out}; loss {last['loss']:.5g}")
    if "lower" in last:
        upper = f", {last['upper']:.4f} from above" if "upper" in last else ""
        print(f"log Z with N = {config.eval_particles}: {last['lower']:.4f} from below{upper}")
    return 0


def command_evaluate(args: argparse.Namespace) -> int:
    params = SMCParams(
        n_particles=args.particles,
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        ess_threshold=args.ess_threshold,
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

    with engine_log("evaluate", args.verbose) as log, _engine(args.model, engine_args, params, log) as llm:
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
    from fastsmc import plots

    weights, known = Path(path) if Path(path).suffix else Path(path + ".png"), plots.suffixes()
    if weights.suffix[1:].lower() not in known:
        raise ValueError(f"--plot {path}: unknown suffix; known are {', '.join(known)}")
    return weights, weights.with_stem(weights.stem + "-genealogy")


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
