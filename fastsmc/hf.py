"""fastsmc without vLLM: groups over a Hugging Face model in this process. What twists are trained with.

    TrunkRows  the `RowModel` of one group over a `Trunk` (fastsmc/trunk.py)
    HFEngine   `smc` as `fastsmc.LLM` has it, one group after the other; `counterfactual`

Slower than vLLM by far for long sequences and many particles, but it needs no server process, and weights that are
being trained can be sampled with at every step.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, overload

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fastsmc import twists
from fastsmc.arguments import Prompt, Prompts, read_each, read_prompts
from fastsmc.cases import Case, read_cases, read_text
from fastsmc.counterfactuals import Counterfactuals
from fastsmc.effects import Effects
from fastsmc.interchange import Answers, Asked, Interchanges, Spots, putting, reading
from fastsmc.interventions import Facts, Intervention, LayerIntervention, Reading, Sizes, read_interventions, take_apart
from fastsmc.islands import read_islands
from fastsmc.maps import Maps, blame, lay_out
from fastsmc.p0 import P0, token_log_probs
from fastsmc.params import SMCParams
from fastsmc.population import Population
from fastsmc.potentials import Potential
from fastsmc.potentials.tokens import short, token_list
from fastsmc.reward_networks import load_networks
from fastsmc.scoring import Scored, read_wanted
from fastsmc.smc import Group, GroupEngine, SMCError, gather, set_up
from fastsmc.smc.driving import run_group, take_step
from fastsmc.smc.evidence import Evidence
from fastsmc.texts import population_texts
from fastsmc.trunk import Trunk, fork

#: logits elements that scoring may hold at once
SCORE_ELEMENTS = 1 << 25
#: rows of `interchange` that go through the model at once
SWAP_ROWS = 64


class TrunkRows:
    """Keeps the slots of one group over a trunk, as a `RowModel`."""

    def __init__(self, trunk: Trunk, prompt: list[int], n: int, layers: Sequence[LayerIntervention] = ()) -> None:
        self._trunk, self._prompt = trunk, prompt
        self._row_of = torch.zeros(n, dtype=torch.int64, device=trunk.device)  # a slot's row in the cache
        self._length = 0  # tokens of each row
        self._maps = Maps(layers)
        variants = dict(enumerate(self._maps.variants))
        self._sites = lay_out(variants, len(variants), trunk.device)

    def _appending(self, n: int) -> AbstractContextManager[None]:
        """Has the model run under the interventions while each row appends n tokens."""
        if not self._maps.variants:
            return nullcontext()
        of = self._maps.of_positions(len(self._prompt), self._length + n)[self._length :]
        return self._trunk.under(self._sites, torch.tensor(of, device=self._trunk.device))

    @property
    def is_intervened(self) -> bool:
        return bool(self._maps.variants)

    def blame(self) -> str:
        """Says what has become of numbers under the interventions."""
        return blame(self._sites, self._maps, range(len(self._maps.variants)))

    def first(self) -> tuple[Tensor, Tensor]:
        with self._appending(len(self._prompt)):
            hidden, self._cache = self._trunk.start(self._prompt)
        self._length = len(self._prompt)
        return self._trunk.logits(hidden), hidden

    def next(self, tokens: Tensor, slots: Tensor) -> tuple[Tensor, Tensor]:
        with self._appending(1):
            hidden, self._cache = self._trunk.next(self._cache, self._row_of[slots], tokens)
        self._length += 1
        self._row_of[slots] = torch.arange(len(slots), device=slots.device)
        return self._trunk.logits(hidden), hidden

    def reindex(self, ancestors: Tensor) -> None:
        self._row_of = self._row_of[ancestors]

    def continuation_log_prob(
        self, tokens: Tensor, slots: Tensor, continuation: list[int], p0: P0, before: int, given: int = 0
    ) -> Tensor:
        target = torch.tensor(continuation, device=slots.device)
        chunk = max(1, SCORE_ELEMENTS // (self._trunk.vocab_size * len(continuation)))
        out = []
        for part, rows in zip(tokens.split(chunk), self._row_of[slots].split(chunk), strict=True):
            ids = torch.cat([part[:, None], target[None, :-1].expand(len(part), -1)], dim=1)
            with self._appending(len(continuation)):
                hidden, _ = self._trunk.next(fork(self._cache), rows, ids)
            logits = self._trunk.logits(hidden).flatten(0, 1).detach()
            at = (before + torch.arange(len(continuation), device=slots.device)).repeat(len(part))
            score = token_log_probs(logits, target.repeat(len(part)), [p0], [0, len(logits)], at)
            out.append(score.reshape(len(part), -1)[:, given:].sum(1))
        return torch.cat(out)


class HFEngine(Effects, Interchanges):
    """Runs groups over a Hugging Face model in this process.

    Args:
        model: name or path, or a `Trunk`.
        tokenizer: a tokenizer; by default that of the path, None for a `Trunk`.
        name: what the model is called on the cards of twists; by default its name or path.
        stop_token_ids: what ends a particle unless `ignore_eos`; by default the model's end-of-sequence tokens.
        dtype, device: of the weights, when a path is given.
        reward_models: {name: path} of the reward models that `HFReward` finds by name, in the dtype of the model and on
            its device.
    """

    def __init__(
        self,
        model: str | os.PathLike | Trunk,
        tokenizer: Any = None,
        name: str | None = None,
        stop_token_ids: Sequence[int] | None = None,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        reward_models: Mapping[str, str] | None = None,
    ) -> None:
        if isinstance(model, Trunk):
            self.trunk = model
        else:
            from transformers import AutoTokenizer

            self.trunk, name = Trunk.load(model, dtype, device), name or str(model)
            if tokenizer is None and os.path.exists(os.path.join(model, "tokenizer_config.json")):
                tokenizer = AutoTokenizer.from_pretrained(str(model))
        if stop_token_ids is None:
            config = getattr(self.trunk.model, "generation_config", None)
            ids = getattr(config, "eos_token_id", None)
            ids = [ids] if ids is None or isinstance(ids, int) else ids
            ends: Sequence[int | None] = [*ids, None if tokenizer is None else tokenizer.eos_token_id]
        else:
            ends = token_list("stop_token_ids", stop_token_ids, self.trunk.vocab_size)
        self.stop_token_ids = frozenset(token for token in ends if token is not None)
        trunk = self.trunk
        self.engine = GroupEngine(tokenizer, trunk.device, trunk.vocab_size, trunk.hidden_size, trunk.model, name)
        if reward_models:
            self.engine.reward_models = load_networks(reward_models, trunk.model.dtype, trunk.device)

    def get_tokenizer(self) -> Any:
        return self.engine.tokenizer

    def encode(self, prompt: Any) -> list[int]:
        """Reads one prompt, in any form that `smc` takes: token ids. ValueError: it has no such form, or is empty."""
        prompts, single = read_prompts(prompt, self.engine.tokenizer, self.engine.vocab_size)
        if not single:
            raise ValueError(f"prompt={short(prompt)}: must be one prompt, got {len(prompts)}")
        return prompts[0]

    def stops(self, params: SMCParams) -> frozenset[int]:
        """Collects all tokens that end a particle."""
        return frozenset(params.stop_token_ids or ()) | (frozenset() if params.ignore_eos else self.stop_token_ids)

    @overload
    def smc(
        self,
        prompts: Prompt,
        params: SMCParams | Sequence[SMCParams] | None = None,
        potential: Potential | Sequence[Potential | None] | None = None,
        *,
        twist: str | os.PathLike | None = None,
        exact: Sequence | None = None,
        intervention: Intervention | Sequence | None = None,
        islands: int = 1,
        migrate_every: int | None = None,
        n_particles: str | None = None,
        target_stderr: float | None = None,
        max_particles: int | None = None,
        use_tqdm: bool = False,
    ) -> Population: ...
    @overload
    def smc(
        self,
        prompts: Prompts,
        params: SMCParams | Sequence[SMCParams] | None = None,
        potential: Potential | Sequence[Potential | None] | None = None,
        *,
        twist: str | os.PathLike | None = None,
        exact: Sequence | None = None,
        intervention: Intervention | Sequence | None = None,
        islands: int = 1,
        migrate_every: int | None = None,
        n_particles: str | None = None,
        target_stderr: float | None = None,
        max_particles: int | None = None,
        use_tqdm: bool = False,
    ) -> list[Population]: ...
    @overload  # forms that are one prompt or several by their shape
    def smc(
        self,
        prompts: Any,
        params: SMCParams | Sequence[SMCParams] | None = None,
        potential: Potential | Sequence[Potential | None] | None = None,
        *,
        twist: str | os.PathLike | None = None,
        exact: Sequence | None = None,
        intervention: Intervention | Sequence | None = None,
        islands: int = 1,
        migrate_every: int | None = None,
        n_particles: str | None = None,
        target_stderr: float | None = None,
        max_particles: int | None = None,
        use_tqdm: bool = False,
    ) -> Population | list[Population]: ...
    @torch.no_grad()  # not inference mode: what is sampled may be trained on
    def smc(
        self,
        prompts: Any,
        params: SMCParams | Sequence[SMCParams] | None = None,
        potential: Potential | Sequence[Potential | None] | None = None,
        *,
        twist: str | os.PathLike | None = None,
        exact: Sequence | None = None,
        intervention: Intervention | Sequence | None = None,
        islands: int = 1,
        migrate_every: int | None = None,
        n_particles: str | None = None,
        target_stderr: float | None = None,
        max_particles: int | None = None,
        use_tqdm: bool = False,
    ) -> Population | list[Population]:
        """Samples as `fastsmc.LLM.smc` does, one group after the other; potentials are set up at every call.

        Args:
            prompts, params, potential, twist, exact, intervention, islands, migrate_every, n_particles, target_stderr,
                max_particles, use_tqdm: as there.

        Raises:
            ValueError: an argument that cannot be, or one that a potential's `setup` refuses.
            SMCError: a group failed; with several prompts its attribute `populations` has those that did not.
        """
        ids, single = read_prompts(prompts, self.engine.tokenizer, self.engine.vocab_size)
        if twist is not None and potential is None:
            potential = twists.card_potential(twist)
        each, chosen, kept = read_each(len(ids), single, params, potential, exact, self.engine.vocab_size)
        apart = isinstance(params, (list, tuple))
        each, plan = read_islands(
            each, apart, islands=islands, migrate_every=migrate_every, n_particles=n_particles,
            target_stderr=target_stderr, max_particles=max_particles, exact=exact,
        )  # fmt: skip
        if not ids:
            return []
        if any(asked.segmented for asked in each):
            raise ValueError("segment: the rows of this engine have one length, so it has no segments; use fastsmc.LLM")
        layers, ids, each = self._intervene(intervention, ids, each)
        guide = None if twist is None else twists.Twist.load(twist)
        ready: dict[int, Potential | None] = {}
        for target in chosen:
            if id(target) in ready:
                continue
            if target is None and guide is not None:
                raise ValueError("potential=None: with a twist each prompt needs a potential")
            guided = target if target is None or guide is None else guide.guide(target)
            ready[id(target)] = None if guided is None else self._set_up(guided)
        for prompt, asked, target in zip(ids, each, chosen, strict=True):
            self.check_context(prompt, asked, ready[id(target)])

        def sample(which: Sequence[int], asked: Sequence[SMCParams]) -> list[Any]:
            bar = None
            if use_tqdm:
                from tqdm.auto import tqdm

                bar = tqdm(total=sum(each.max_tokens for each in asked), desc="particle steps", file=sys.stderr)
            return _run_each(
                [
                    partial(self._run, ids[i], own, ready[id(chosen[i])], kept[i], layers[i], bar=bar)
                    for i, own in zip(which, asked, strict=True)
                ]
            )

        done = gather(plan.run(sample, each, apart), single)
        return done[0] if single else done

    @torch.no_grad()
    def score(self, prompt: Any, continuations: Sequence, params: SMCParams | None = None) -> Scored:
        """Scores continuations as `fastsmc.LLM.score` does."""
        trunk = self.trunk
        wanted, params = read_wanted(
            prompt, continuations, params, self.engine.tokenizer, trunk.vocab_size, trunk.max_positions
        )
        if not wanted.distinct:
            return wanted.scored(torch.zeros(0))
        p0 = P0(params, self.stops(params) | self.stop_token_ids, trunk.device)
        first, cache = trunk.start(wanted.prompt)
        order = sorted(range(len(wanted.distinct)), key=lambda i: len(wanted.distinct[i]))
        found: dict[int, Tensor] = {}
        while order:  # the longest ones first, padded to one length
            longest = len(wanted.distinct[order[-1]])
            n = max(1, SCORE_ELEMENTS // (trunk.vocab_size * longest))
            chosen, order = order[-n:], order[:-n]
            targets = pad_sequence([torch.tensor(wanted.distinct[i]) for i in chosen], True).to(trunk.device)
            hidden = first[:, None].expand(len(chosen), -1, -1)
            if longest > 1:
                parents = torch.zeros(len(chosen), dtype=torch.int64, device=trunk.device)
                after, _ = trunk.next(fork(cache), parents, targets[:, :-1])
                hidden = torch.cat([hidden, after.reshape(len(chosen), longest - 1, -1)], dim=1)
            at = torch.arange(longest, device=trunk.device).repeat(len(chosen))
            logits = trunk.logits(hidden).flatten(0, 1)
            scored = token_log_probs(logits, targets.flatten(), [p0], [0, len(logits)], at).view(targets.shape)
            found |= {i: row[: len(wanted.distinct[i])] for i, row in zip(chosen, scored, strict=True)}
        return wanted.scored(torch.cat([found[i] for i in range(len(found))]).cpu())

    @torch.no_grad()
    def facts(self, prompt: Any, text: Any, params: SMCParams | None = None) -> Facts:
        """Makes the facts of a text, for counterfactuals of it under another model of the same vocabulary.

        Args:
            prompt, text: as in `counterfactual`.
            params: whose settings of p0 drew the text; None: temperature 1, and nothing else.

        Raises:
            ValueError: an argument that cannot be, or a token that these settings rule out.
        """
        ids, params = self.encode(prompt), SMCParams() if params is None else params
        tokens = read_text(text, self.engine.tokenizer, self.trunk.vocab_size, self.stops(params))
        plain = SMCParams(n_particles=1, max_tokens=len(tokens), ignore_eos=True)
        self.check_context(ids, plain, None)
        group = Group(plain, None, ids, self.stops(params), self.trunk.device, exact=[tokens])
        logits: list[Tensor] = []
        group.watch = logits.append
        run_group(group, TrunkRows(self.trunk, ids, 1))
        tokenizer = twists.tokenizer_hash(self.engine.tokenizer)
        return Facts(torch.stack(logits), tuple(tokens), tuple(ids), params.p0(), tokenizer)

    @torch.no_grad()
    def counterfactual(
        self,
        prompt: Any,
        text: Any = None,
        intervention: Any = None,
        *,
        n: int | None = None,
        max_tokens: int | None = None,
        params: SMCParams | None = None,
        potential: Potential | None = None,
        twist: str | os.PathLike | None = None,
        noise: str = "exact",
        top_k: int | None = None,
        top_p: float | None = None,
        ignore_eos: bool | None = None,
        seed: int | None = None,
    ) -> Any:
        """Draws counterfactuals as `fastsmc.LLM.counterfactual` does, one text after the other.

        Args, returns, raises: as there.
        """
        if twist is not None and potential is None:
            potential = twists.card_potential(twist)
        cases, single = read_cases(
            prompt, text, params, potential, noise, self.engine.tokenizer, self.trunk.sizes,
            twists.tokenizer_hash(self.engine.tokenizer), self.stops,
            n=n, max_tokens=max_tokens, top_k=top_k, top_p=top_p, ignore_eos=ignore_eos, seed=seed,
        )  # fmt: skip
        if not cases:
            return []
        each = self._intervene(intervention, [case.prompt for case in cases], [case.params for case in cases])
        readings = [Reading(*one) for one in zip(*each, strict=True)]
        guide = None if twist is None else twists.Twist.load(twist)
        ready: dict[int, Potential | None] = {}
        for target in (case.potential for case in cases):
            if id(target) not in ready:
                guided = target if target is None or guide is None else guide.guide(target)
                ready[id(target)] = None if guided is None else self._set_up(guided)
        for case, under in zip(cases, readings, strict=True):
            longest = max(under.params.max_tokens, len(case.text or ()))
            self.check_context(
                under.prompt, dataclasses.replace(under.params, max_tokens=longest), ready[id(case.potential)]
            )
            self.check_context(case.prompt, dataclasses.replace(under.params, max_tokens=longest), None)
        jobs = [
            partial(self._run_case, case, under, ready[id(case.potential)], noise)
            for case, under in zip(cases, readings, strict=True)
        ]
        try:
            done = gather(_run_each(jobs), single)
        except SMCError as error:
            if single and error.kind == "refused":
                raise ValueError(str(error)) from None
            raise
        return done[0] if single else done

    def _run_case(self, case: Case, under: Reading, potential: Potential | None, noise: str) -> Counterfactuals:
        if case.text is None:  # p0 draws it, of which force_stop is no part
            alone = dataclasses.replace(case.params, n_particles=1, force_stop=False)
            case = case.with_text(self._run(case.prompt, alone, None, None, ()).token_ids[0])
        device, stops = self.trunk.device, self.stops(case.params) | self.stop_token_ids
        if case.facts is None:
            evidence = Evidence(case.text or (), case.params.temperature, noise, device)
        else:
            evidence = Evidence.of_facts(case.facts, stops, device, noise)
        population = self._run(
            under.prompt, under.params, potential, None, under.layers, evidence=evidence,
            drawn=None if case.facts is not None else (case.params, case.prompt),
        )  # fmt: skip
        assert isinstance(population, Counterfactuals)  # the group had evidence
        return population

    def _asked_prompts(self, name: str, prompts: Any) -> list[list[int]]:
        ids, _ = read_prompts(prompts, self.engine.tokenizer, self.engine.vocab_size, name)
        limit = self.trunk.max_positions
        for i, one in enumerate(ids):
            if limit is not None and len(one) > limit:
                raise ValueError(f"{name}[{i}]: has {len(one)} tokens, this model at most {limit} positions")
        return ids

    def _model_sizes(self) -> Sizes:
        return self.trunk.sizes

    @torch.no_grad()
    def _read_states(self, prompts: list[list[int]], spots: Spots, layers: Sequence[int]) -> Tensor:
        states = torch.zeros(len(spots), len(layers), self.trunk.hidden_size, device=self.trunk.device)
        for i, prompt in enumerate(prompts):
            self.trunk.read(prompt, reading(states, layers), spots.of_prompt(i, len(prompt)))
        return states.cpu()

    @torch.no_grad()
    def _put_states(self, asked: Asked) -> Tensor:
        trunk, spots, answers = self.trunk, asked.spots(), Answers(asked, self.trunk.vocab_size)
        states = self._read_states(asked.sources, spots, asked.layers)
        spots.check_finite(states, asked.layers, "sources")
        maps, states = asked.maps(trunk.hidden_size, trunk.device), states.to(trunk.device)
        for b, base in enumerate(asked.bases):
            _, cache = trunk.start(base)
            for position in sorted({at[b] for at in asked.at}):
                chosen = [(c, b) for c, at in enumerate(asked.at) if at[b] == position]
                for rows in (chosen[i : i + SWAP_ROWS] for i in range(0, len(chosen), SWAP_ROWS)):
                    begin = 0 if any(cache.is_sliding) else position  # a window keeps nothing to go back to
                    number = torch.full((len(rows), len(base) - begin), -1, device=trunk.device)
                    number[:, position - begin] = torch.arange(len(rows), device=trunk.device)
                    tokens = torch.tensor(base[begin:], device=trunk.device).expand(len(rows), -1)
                    with trunk.under(putting(asked, maps, rows, spots, states), number):
                        hidden = trunk.again(cache, begin, tokens)
                    answers.put(rows, trunk.logits(hidden[:, -1]))
        return answers.result()

    def _set_up(self, potential: Potential) -> Potential:
        try:
            potential.prepare(self.engine.tokenizer)
            return set_up(potential, self.engine)
        except (ValueError, KeyboardInterrupt, SMCError) as error:
            cause = error.__cause__ if isinstance(error, SMCError) else None
            raise cause if isinstance(cause, ValueError) else error from None
        except BaseException as error:
            name, what = type(potential).__name__, f"raised {type(error).__name__}: {error}"
            raise SMCError(f"potential {name}.prepare: {what}") from error

    def check_context(self, prompt: list[int], params: SMCParams, potential: Potential | None) -> None:
        """Refuses what has more positions than the model."""
        ahead, limit = 0 if potential is None else int(potential.lookahead), self.trunk.max_positions
        if limit is not None and len(prompt) + params.max_tokens + max(ahead, 1) - 1 > limit:
            raise ValueError(
                f"max_tokens={params.max_tokens}: with a prompt of {len(prompt)} tokens and a lookahead of {ahead}, at "
                f"most {limit} positions of this model"
            )

    def _intervene(
        self, intervention: Any, prompts: list[list[int]], params: list[SMCParams]
    ) -> tuple[list[tuple[LayerIntervention, ...]], list[list[int]], list[SMCParams]]:
        """Reads the interventions of a call: those of layers, and prompts and parameters as the others have them."""
        if intervention is None:
            return [()] * len(prompts), prompts, params
        each = read_interventions(intervention, len(prompts), self.trunk.sizes)
        read = [take_apart(*one) for one in zip(each, prompts, params, strict=True)]
        return [one.layers for one in read], [one.prompt for one in read], [one.params for one in read]

    def _run(
        self,
        prompt: list[int],
        params: SMCParams,
        potential: Potential | None,
        exact: Any,
        layers: tuple[LayerIntervention, ...],
        *,
        bar: Any = None,
        evidence: Evidence | None = None,
        drawn: tuple[SMCParams, list[int]] | None = None,
    ) -> Population:
        """Runs a group, one of counterfactuals beside those that follow its text.

        Args:
            drawn: the settings that drew the text, and its prompt, where this model drew it.
        """
        rows = TrunkRows(self.trunk, prompt, params.n_particles, layers)
        stops = self.stops(params)
        group = Group(
            params, potential, prompt, stops, self.trunk.device, self.engine, exact,
            all_stop_token_ids=stops | self.stop_token_ids, evidence=evidence,
        )  # fmt: skip
        parts = [(group, rows)]
        if evidence is not None:
            *factual, followed = group.companions(*drawn or (None,))
            parts.insert(0, (followed, TrunkRows(self.trunk, prompt, 1, layers)))
            if drawn is not None:
                parts.insert(0, (factual[0], TrunkRows(self.trunk, drawn[1], 1)))
        for one, its_rows in parts:
            one.blame = its_rows.blame if its_rows.is_intervened else None
        while not all(one.done for one, _ in parts):
            for one, its_rows in parts:
                if not one.done:
                    take_step(one, its_rows)
            if bar is not None:
                bar.update(1)
        population = group.population()
        if self.engine.tokenizer is not None:
            population.texts = population_texts(self.engine.tokenizer, population)
        return population


def _run_each(jobs: Sequence[Callable[[], Any]]) -> list[Any]:
    """Runs groups one after the other; those that fail, which give their error, do not keep the others from it."""
    outcomes: list[Any] = []
    for run in jobs:
        try:
            outcomes.append(run())
        except SMCError as error:
            outcomes.append(error)
    return outcomes
