"""A random Llama small enough to enumerate, and what is known about it exactly.

`TinyLlama` holds log p0(v | prompt, prefix) of every prefix up to T tokens, from Hugging Face in float32. `TableRows`
is the `RowModel` over that table, so that a group can be stepped without any engine.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastsmc import Potential, SMCParams, reference
from fastsmc.smc import Group, arrange, finish
from fastsmc.smc.driving import run_group

PROMPT = [1, 3, 2, 5, 4]


def make_llama(
    path: Path,
    vocab: int,
    *,
    seed: int = 0,
    scale: float = 0.15,
    positions: int = 512,
    heads: tuple[int, int] = (2, 1),
) -> Path:
    """Saves a random 2-layer Llama without tokenizer, with heads of size 32 for queries and keys; `scale` is the spread
    of its weights: larger is less uniform."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=heads[0],
        num_key_value_heads=heads[1],
        head_dim=32,
        max_position_embeddings=positions,
        tie_word_embeddings=False,
        initializer_range=scale,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        dtype="float32",
    )
    torch.manual_seed(seed)
    LlamaForCausalLM(config).save_pretrained(path)
    return path


#: tokens that a layer with a sliding window of `make_windowed` sees: more than a block of 32
WINDOW = 40


def make_windowed(path: Path, vocab: int, kind: str) -> Path:
    """Saves a random model with sliding windows: "gemma3" in three layers of four, "gpt_oss" in one of two (and with
    attention sinks and experts), "mistral" in both."""
    from transformers import AutoModelForCausalLM, Gemma3TextConfig, GptOssConfig, MistralConfig

    shape = dict(
        vocab_size=vocab,
        hidden_size=64,
        intermediate_size=128,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=512,
        sliding_window=WINDOW,
        tie_word_embeddings=False,
        initializer_range=0.15,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        dtype="float32",
    )
    config: Any
    if kind == "mistral":
        config = MistralConfig(num_hidden_layers=2, **shape)
    elif kind == "gpt_oss":
        experts = dict(num_local_experts=4, num_experts_per_tok=2, rope_scaling=None)
        config = GptOssConfig(num_hidden_layers=2, **(shape | experts))
    else:
        layers = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"]
        config = Gemma3TextConfig(num_hidden_layers=4, layer_types=layers, query_pre_attn_scalar=32, **shape)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


def make_adapter(path: Path, base: Path, seed: int, rank: int = 3) -> tuple[Path, Path]:
    """Saves a random LoRA adapter of all linear layers of a model, the lm head among them, as PEFT does.

    Returns:
        the adapter's folder, and that of the model with the adapter merged into its weights.
    """
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    model, generator = AutoModelForCausalLM.from_pretrained(base), torch.Generator().manual_seed(seed)
    tensors, alpha = {}, 2 * rank
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            n_out, n_in = module.weight.shape
            a, b = (0.3 * torch.randn(shape, generator=generator) for shape in ((rank, n_in), (n_out, rank)))
            module.weight.data += alpha / rank * b @ a
            tensors |= {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
    model.save_pretrained(path / "merged")
    (path / "adapter").mkdir()
    save_file(tensors, path / "adapter" / "adapter_model.safetensors")
    names = sorted({key.split(".")[-3] for key in tensors})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": names, "bias": "none"}
    (path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    return path / "adapter", path / "merged"


def hf_log_probs(
    path: Path | str, prompt: list[int], sequences: list[list[int]], temperature: float = 1.0, **config: Any
) -> list:
    """log p0 of each token of each sequence after the prompt, by a full float32 recompute with transformers, `config`
    changed as it says."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **config).eval()
    return recompute(model, prompt, sequences, temperature)


#: tokens, and logits that are kept, of one call of `recompute`
MOST_TOKENS, MOST_LOGITS = 1 << 12, 1 << 24


@torch.inference_mode()
def recompute(model: Any, prompt: list[int], sequences: list[list[int]], temperature: float = 1.0) -> list:
    """log p of each token of each sequence after the prompt by a model of transformers without a KV cache. Sequences of
    one length go through it together, and equal ones once."""
    found: dict[tuple[int, ...], np.ndarray] = {}
    for n, alike in itertools.groupby(sorted({tuple(s) for s in sequences}, key=len), len):
        rows = torch.tensor([[*prompt, *tokens] for tokens in alike])
        at_once = max(1, min(MOST_TOKENS // rows.shape[1], MOST_LOGITS // ((n + 1) * model.config.vocab_size)))
        for ids in rows.split(at_once):
            logits = model(ids, use_cache=False, logits_to_keep=n + 1).logits[:, :-1].double() / temperature
            drawn = ids[:, len(prompt) :]
            scores = logits.log_softmax(-1).gather(2, drawn[:, :, None])[:, :, 0]
            found.update(zip(map(tuple, drawn.tolist()), scores.numpy(), strict=True))
    return [found[tuple(tokens)] for tokens in sequences]


class TinyLlama:
    """Everything about V tokens and T steps, enumerated.

    Attributes:
        table: dict prefix (tuple) → (V,) float64 log p0 of the next token.
        sequences: all complete sequences: those that end with a stop token, and those of T tokens.
        log_p: dict sequence → log p0.
    """

    def __init__(
        self,
        path: Path,
        vocab: int,
        steps: int,
        stop: frozenset[int],
        temperature: float = 1.0,
        prompt: list[int] = PROMPT,
    ) -> None:
        from transformers import AutoModelForCausalLM

        self.vocab, self.steps, self.stop = vocab, steps, stop
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self.table: dict[tuple[int, ...], np.ndarray] = {}
        with torch.inference_mode():
            for t in range(steps):
                prefixes = list(itertools.product(range(vocab), repeat=t))
                ids = torch.tensor([prompt + list(p) for p in prefixes])
                logits = model(ids).logits[:, -1].double() / temperature
                self.table.update(zip(prefixes, logits.log_softmax(-1).numpy(), strict=True))
        self._enumerate()

    def _enumerate(self, ends: Callable[[tuple[int, ...]], bool] | None = None) -> None:
        self.log_p: dict[tuple[int, ...], float] = {}
        self._walk((), 0.0, ends)
        self.sequences = list(self.log_p)

    def _walk(self, prefix: tuple[int, ...], log_p: float, ends: Callable[[tuple[int, ...]], bool] | None) -> None:
        if len(prefix) == self.steps or (prefix and (prefix[-1] in self.stop or (ends and ends(prefix)))):
            self.log_p[prefix] = log_p
            return
        for v in range(self.vocab):
            if self.table[prefix][v] > -math.inf:
                self._walk((*prefix, v), log_p + self.table[prefix][v], ends)

    def restricted(self, params: SMCParams, ends: Callable[[tuple[int, ...]], bool] | None = None) -> TinyLlama:
        """The same under p0's settings in `params`, with sequences that end where `ends` says, too. With `force_stop`
        the complete sequences are those that end by a stop token, or before the last step. `log_p` is to the power."""
        names = ("temperature", "top_k", "top_p", "min_p", "logit_bias", "allowed_token_ids", "min_tokens")
        settings = {name: getattr(params, name) for name in names}
        target = copy.copy(self)
        target.table = {}
        for prefix, row in self.table.items():
            z = reference.restrict(row.astype(np.float32), len(prefix), stop_token_ids=list(self.stop), **settings)
            z = z / params.temperature
            target.table[prefix] = z - np.logaddexp.reduce(z)
        target._enumerate(ends)
        if params.force_stop:
            kept = {s: p for s, p in target.log_p.items() if s[-1] in self.stop or len(s) < self.steps}
            target.log_p, target.sequences = kept, list(kept)
        target.log_p = {s: params.power * p for s, p in target.log_p.items()}
        return target

    def log_z(self, log_phi) -> float:
        """log Σ_s p0(s) φ(s), with log_phi a function of the sequence."""
        return float(np.logaddexp.reduce([lp + log_phi(s) for s, lp in self.log_p.items()]))

    def posterior(self, log_phi) -> dict[tuple[int, ...], float]:
        z = self.log_z(log_phi)
        return {s: float(np.exp(lp + log_phi(s) - z)) for s, lp in self.log_p.items()}


class TableRows:
    """`RowModel` over `TinyLlama.table`."""

    def __init__(self, tiny: TinyLlama, n_rows: int) -> None:
        self.tiny = tiny
        self.rows: list[tuple[int, ...]] = [()] * n_rows

    def _logits(self, prefixes: list[tuple[int, ...]]) -> torch.Tensor:
        return torch.tensor(np.array([self.tiny.table[p] for p in prefixes]), dtype=torch.float32)

    def first(self):
        return self._logits([()]), None

    def next(self, tokens, slots):
        for row, token in zip(slots.tolist(), tokens.tolist(), strict=True):
            self.rows[row] = (*self.rows[row], token)
        histories = [self.rows[row] for row in slots.tolist()]
        assert len(set(histories)) == len(histories)  # no history goes through the model twice
        return self._logits(histories), None

    def reindex(self, ancestors):
        self.rows = [self.rows[a] for a in ancestors.tolist()]

    def continuation_log_prob(self, tokens, slots, continuation, p0, before, given=0):
        raise NotImplementedError


def run_table(tiny: TinyLlama, params: SMCParams, potential: Potential | None):
    """The population of one group stepped over the table."""
    return run_group(Group(params, potential, PROMPT, tiny.stop), TableRows(tiny, params.n_particles))


def step_tables(tiny: TinyLlama, groups: list[Group]) -> None:
    """Steps groups over the table side by side, each to its end or its error."""
    rows = {id(group): TableRows(tiny, group.n) for group in groups}
    while going := [group for group in groups if not group.done]:
        for cohort in arrange(going):
            wants, logits = cohort.wants(), []
            for g, group in enumerate(cohort.groups):
                part, first, model = slice(*wants.bounds[g : g + 2]), cohort.layout.bounds[g], rows[id(group)]
                if wants.moves is not None:
                    model.reindex(wants.moves[cohort.layout.part(g)] - first)
                out = model.first() if group.t == 0 else model.next(wants.tokens[part], wants.slots[part] - first)
                logits.append(out[0])
            finish(cohort.take(torch.cat(logits), None))


def run_tables(tiny: TinyLlama, groups: list[Group]) -> list:
    """The populations of groups stepped over the table side by side: those that each has alone."""
    step_tables(tiny, groups)
    for group in groups:
        if group.error is not None:
            raise group.error
    return [group.population() for group in groups]


def run_each(tiny: TinyLlama, asked: list[SMCParams], potential: Potential | None) -> list:
    """The populations of a group for each of `asked`, all of one potential. This takes a third of the time of
    `run_table` for one after the other; tests/test_cohort.py says that the populations are the same."""
    return run_tables(tiny, [Group(params, potential, PROMPT, tiny.stop) for params in asked])


class TableLLM:
    """`smc` as `fastsmc.LLM` has it, over the table."""

    def __init__(self, tiny: TinyLlama) -> None:
        self.tiny = tiny

    def smc(self, prompts, params, potential, *, twist=None, exact=None):
        assert twist is None
        groups = []
        for i, prompt in enumerate(prompts):
            own = dataclasses.replace(params, group=params.group + i)
            kept = None if exact is None else exact[i]
            groups.append(Group(own, potential, prompt, self.tiny.stop, exact=kept))
        return run_tables(self.tiny, groups)


class TableTwist(Potential):
    """φ(s) = exp(Σ_t value[t, s_t]), with a deliberately imperfect twist ψ_t = exp(share · what φ has so far).

    One object serves engines on several devices: it answers where the state is. Groups of it are asked together.

    Args:
        value: (T, V) float64.
        share: 1 is the natural prefix, 0 no twist.
    """

    per_particle = ()

    def __init__(self, value: np.ndarray, share: float = 0.6) -> None:
        self.value = torch.tensor(value)
        self.share = share

    def log_phi(self, sequence: tuple[int, ...]) -> float:
        return float(sum(self.value[t, v] for t, v in enumerate(sequence)))

    def _so_far(self, state) -> torch.Tensor:
        t, device = state.tokens.shape[1], state.tokens.device
        if t == 0:
            return torch.zeros(len(state.finished), dtype=torch.float64, device=device)
        known = state.tokens.clamp(min=0)
        values = self.value[:t].to(device).T[known, torch.arange(t, device=device)]
        return (values * (state.tokens >= 0)).sum(1)

    def prefix(self, state):
        return self.share * self._so_far(state)

    def complete(self, state):
        return self._so_far(state)

    def logw_next(self, state):
        return (self.share * self.value[state.step]).to(state.finished.device).expand(len(state.finished), -1)


class Guide(TableTwist):
    """The same φ, with a twist that only shapes the proposal: it has a constant of its own in every prefix."""

    proposal_only = True
    per_particle = ()

    def prefix(self, state):
        return 0.0 * self._so_far(state)

    def logw_next(self, state):
        return super().logw_next(state) + state.lengths[:, None] * 1.7 - 40.0


def value_table(steps: int, vocab: int, seed: int = 1) -> np.ndarray:
    """(T, V) float64 log potentials, one of them −inf; tame enough for standard errors to be estimated from 80 runs."""
    value = np.random.default_rng(seed).normal(scale=0.3, size=(steps, vocab))
    value[1, 2] = -np.inf
    return value
