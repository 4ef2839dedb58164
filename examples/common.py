"""What the examples share: train a twist, then sample with it and without it, and see what it is worth.

A script says what the task is; `study` does the rest and leaves two figures, the bounds during training and the
comparison. Training is over Hugging Face, sampling and evaluation in vLLM by the twist's directory, both in float32.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np


def arguments(description: str) -> argparse.Namespace:
    """Reads the options; --quick takes minutes on two CPU cores, and without it sizes are for a GPU."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="few steps and particles: minutes on a CPU")
    parser.add_argument("--model", default="smollm2", help="name or path, as for vLLM (default: %(default)s)")
    parser.add_argument("--classifier", metavar="NAME", help="a Hugging Face text classifier, where the task has one")
    parser.add_argument("--device", default="cpu", help="of the training")
    parser.add_argument("--figures", metavar="DIR", help="write the figures there")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def study(name, args, prompt, params, potential, config, exact_count, samples=1024):
    """Trains, evaluates, prints and draws.

    Args:
        name: of the figures.
        prompt, params, potential, config: as for `fastsmc.training.Trainer`; params.n_particles is also the N that is
            evaluated.
        exact_count: exact samples by rejection for the upper bound; 0: φ is too rare, or not at most 1, and log Ẑ and
            ESS are compared instead.
        samples: of each set that is trained on. With too few per step, so that φ likes hardly any, a twist may repeat
            the first that φ liked: `positive_ess` in metrics.jsonl is near 1 then, and KL(σ‖q) large.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from fastsmc import LLM, evaluate
    from fastsmc.hf import HFEngine
    from fastsmc.models import resolve
    from fastsmc.training import Trainer

    path = resolve(args.model)
    directory = Path(tempfile.mkdtemp(prefix=f"twist-{name}-"))
    hf = HFEngine(path, device=args.device)
    many = dataclasses.replace(params, n_particles=samples)
    trainer = Trainer(hf, prompt, many, potential, config, directory)
    trainer.run(progress=True)
    del hf, trainer

    llm = LLM(path, dtype="float32", max_model_len=512, enforce_eager=True)
    print(f"\n{prompt!r}: twist in {directory}")
    runs = 4 if args.quick else 16
    if exact_count:
        large = dataclasses.replace(params, n_particles=256, seed=params.seed + 1)
        exact = evaluate.rejection(llm, prompt, large, potential, exact_count)
        result = evaluate.report(llm, prompt, params, potential, exact=exact, runs=runs, twist=directory)
        print(evaluate.table(result))
        figure = evaluate.plot(result)
    else:
        figure = compare(llm, prompt, params, potential, directory, runs)
    for label, twist in (("without the twist", None), ("with the twist", directory)):
        population = llm.smc(prompt, params, potential, twist=twist)
        print(f"{label}: log Ẑ {population.log_z:.2f}, ESS {population.final_ess:.1f} of {population.n_particles}")
        for text, weight, _ in population.best(3):
            print(f"   {weight:6.3f}  {text!r}")
    if args.figures:
        os.makedirs(args.figures, exist_ok=True)
        figure.savefig(os.path.join(args.figures, f"{name}.png"), dpi=80)
        if (directory / "bounds.png").exists():
            shutil.copy(directory / "bounds.png", os.path.join(args.figures, f"{name}-training.png"))


def compare(llm, prompt, params, potential, directory, runs):
    """Draws log Ẑ and final ESS of `runs` groups without the twist and with it, and prints their means."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    ids = llm.get_tokenizer().encode(prompt)
    for i, (label, twist) in enumerate((("without", None), ("twist", directory))):
        populations = llm.smc([ids] * runs, params, potential, twist=twist)
        log_z = np.array([p.log_z for p in populations])
        ess = np.mean([p.final_ess for p in populations])
        print(f"{label:<8} log Ẑ {log_z.mean():.3f} (standard deviation {log_z.std(ddof=1):.3f}), final ESS {ess:.1f}")
        left.plot(np.full(runs, i), log_z, f"C{i}o", alpha=0.6)
        right.bar(i, ess, color=f"C{i}")
    for axes, what in ((left, "log Z estimates"), (right, "mean final ESS")):
        axes.set(xticks=[0, 1], xticklabels=["without", "twist"], title=f"{what}, N = {params.n_particles}")
    return figure


def classifier(name, label_index):
    """Makes a function of texts that gives the log-probability of a label, by a Hugging Face text classifier."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForSequenceClassification.from_pretrained(name).eval()

    def score(texts):
        with torch.inference_mode():
            batch = tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
            return model(**batch).logits.log_softmax(-1)[:, label_index].tolist()

    return score
