"""The user face: a `vllm.LLM` that can also run groups of particles."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import os
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, overload

import torch
import vllm
from safetensors.torch import load as load_tensors
from vllm import RequestOutput, SamplingParams
from vllm.lora.request import LoRARequest
from vllm.sampling_params import RequestOutputKind

from fastsmc import interventions, twists
from fastsmc.arguments import read_each, read_exact, read_prompts
from fastsmc.cases import Case, read_cases
from fastsmc.counterfactuals import Counterfactuals
from fastsmc.effects import Effects
from fastsmc.hf import HFEngine
from fastsmc.interventions import (
    Facts,
    Intervention,
    LayerIntervention,
    Reading,
    Sizes,
    check_facts_size,
    read_interventions,
    take_apart,
)  # fmt: skip
from fastsmc.islands import read_islands
from fastsmc.params import PREFIX, SMCParams
from fastsmc.population import Population
from fastsmc.potentials import Potential
from fastsmc.potentials.tokens import short
from fastsmc.scoring import Scored, read_wanted
from fastsmc.smc import SMCError, gather
from fastsmc.smc.engine import pickled
from fastsmc.texts import population_texts
from fastsmc.vllm import compat, options
from fastsmc.vllm.asking import WorkerInterchanges
from fastsmc.vllm.capacity import Limits
from fastsmc.vllm.compat import get_logger
from fastsmc.vllm.request import (
    COUNTERFACTUAL,
    OBJECT,
    GroupRequest,
    is_group_request,
    name_intervention,
    with_token_ids,
)
from fastsmc.vllm.starting import engine_args, environment, surroundings

if TYPE_CHECKING:
    from fastsmc.arguments import Prompt, Prompts

logger = get_logger(__name__)


class LLM(Effects, WorkerInterchanges, vllm.LLM):
    """A `vllm.LLM` whose `smc` runs Sequential Monte Carlo; `generate` and the rest work as ever.

    Args:
        model: name or path, as for `vllm.LLM`.
        shared_forward: "auto": the rows of all groups that are ready go through the model together; "never": each group
            has passes of its own. None: as `additional_config` says, or "auto".
        max_particle_rows_per_step: rows of groups in one engine step beside ordinary requests, or "all"; None: as many
            as take three to four ordinary decode steps (`fastsmc.vllm.options.EngineOptions`).
        captured_steps: groups for which that holds take steps without a wait for the device; its conditions and what
            else it changes are in `fastsmc.vllm.options.EngineOptions`.
        interventions: whether groups may run under interventions (`smc(…, intervention=…)`), which costs something
            even where none does; or {name: file} of those that requests may name (`lead_params`), too; see there.
        kwargs: any argument of `vllm.LLM` but `scheduler_cls` and `worker_cls`.

    Raises:
        ValueError: an argument that vLLM does not know, or a model's path where nothing is.
        UnsupportedError: the vLLM version, or a feature that is switched on, is not supported; says which. What only
            the loaded model shows (several KV cache groups, say) is refused by the engine as it starts.
    """

    def __init__(
        self,
        model: str,
        *,
        shared_forward: str | None = None,
        max_particle_rows_per_step: int | str | None = None,
        captured_steps: bool | None = None,
        interventions: bool | Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> None:
        compat.check_version()
        if str(model).startswith(("/", ".", "~")) and not os.path.exists(model):  # vLLM would take it for a hub's name
            raise ValueError(f"model={str(model)!r}: there is no such directory")
        self._strays: list[Any] = []
        self._standing: dict[int, str] = {}  # potentials that outlast a call of `smc`: id → name
        self._sizes: Sizes | None = None  # until interventions are asked for
        options = {
            "offline": True,
            "shared_forward": shared_forward,
            "max_particle_rows_per_step": max_particle_rows_per_step,
            "captured_steps": captured_steps,
            "interventions": interventions,
        }
        arguments = engine_args(kwargs | {name: value for name, value in options.items() if value is not None})
        settings = surroundings(arguments.get("tensor_parallel_size") or 1)
        with environment(settings):
            super().__init__(str(model), **arguments)
        if settings:
            logger.info("fastsmc started vLLM with %s", " ".join(f"{name}={value}" for name, value in settings.items()))
        compat.check_config(self.llm_engine.vllm_config)

    # ------------------------------------------------------------------------------------------------------ SMC
    @overload
    def smc(
        self,
        prompts: Prompt,
        params: SMCParams | Sequence[SMCParams] | None = None,
        potential: Potential | Sequence[Potential | None] | None = None,
        *,
        twist: str | os.PathLike | None = None,
        exact: Sequence | None = None,
        alone: bool = False,
        lora_request: LoRARequest | Sequence[LoRARequest | None] | None = None,
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
        alone: bool = False,
        lora_request: LoRARequest | Sequence[LoRARequest | None] | None = None,
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
        alone: bool = False,
        lora_request: LoRARequest | Sequence[LoRARequest | None] | None = None,
        intervention: Intervention | Sequence | None = None,
        islands: int = 1,
        migrate_every: int | None = None,
        n_particles: str | None = None,
        target_stderr: float | None = None,
        max_particles: int | None = None,
        use_tqdm: bool = False,
    ) -> Population | list[Population]: ...

    def smc(
        self,
        prompts: Any,
        params: SMCParams | Sequence[SMCParams] | None = None,
        potential: Potential | Sequence[Potential | None] | None = None,
        *,
        twist: str | os.PathLike | None = None,
        exact: Sequence | None = None,
        alone: bool = False,
        lora_request: LoRARequest | Sequence[LoRARequest | None] | None = None,
        intervention: Intervention | Sequence | None = None,
        islands: int = 1,
        migrate_every: int | None = None,
        n_particles: str | None = None,
        target_stderr: float | None = None,
        max_particles: int | None = None,
        use_tqdm: bool = False,
    ) -> Population | list[Population]:
        """Samples p0(s | prompt)·φ(s)/Z with N weighted particles.

        Args:
            prompts: text or token ids, in the forms of `fastsmc.arguments`; a list of prompts runs side by side and
                gives a list of populations, prompt i with `params.group + i`. An empty list gives an empty list.
            params: None is `SMCParams()`; with several prompts, a list of one for each is taken as it is, so that
                groups may share their random numbers.
            potential: φ and its twists, evaluated in the worker process: a `Potential`, or one for each prompt. None:
                plain ancestral sampling, log Z = 0, unless a power or a forced end makes weights differ.
            twist: directory of a learned twist (`fastsmc.twists`), which guides the particles towards the potential;
                the target stays p0·φ. Without a potential, the one that the twist was trained for, by its name.
            exact: exact samples of the target, as lists of token ids: a list of one makes the group conditional, of
                n_particles has them weighed (see `fastsmc.smc.group`). With several prompts, one such list for each.
            alone: True keeps each group's rows out of the forward passes of all others: the same seed then gives the
                same population whatever else runs, bit for bit, as `shared_forward="never"` does for a whole engine.
            lora_request: vLLM's LoRARequest, whose adapter is part of p0 (`enable_lora`); with several prompts one for
                all, or one or None for each.
            intervention: what the model does otherwise (`fastsmc.interventions`): an intervention or a list of them,
                which is one, for all prompts; or a list of one of these or None for each prompt, at least one of which
                is a list or None. It is part of p0, as are the keys and values of prompt positions that it reaches.
            islands: M, at least 1: so many independent groups per prompt, which are pooled (`Population.pool`): M·N
                particles. Island m of prompt i has the group `params.group + i·M + m`; with a list of params that of
                its own, + m. If one fails, its prompt has failed.
            migrate_every: K: the M islands of a prompt are one group of M·N particles, in which they migrate
                (`SMCParams.islands`), with `params.group + i`. All of it must have room in this engine (max_num_seqs):
                there is no migration across engines. None: they are independent.
            n_particles: "auto": `params.n_particles` is the size of an island; 8 pilot islands per prompt say how many
                others are run, which are pooled (`Population.pool`), so that the standard error of log Ẑ comes to
                `target_stderr`. The pilots are in `pilot` of the population, and in its estimates they are not. Runs
                are counted on from `params.group`: pilots of all prompts, then islands; with a list of params each
                prompt's from its own. None: a group per prompt.
            target_stderr: 1e-6 to 10; None: 0.1. What comes out scatters around it.
            max_particles: of the islands of a prompt; None: 65536. Where the pilots ask for more, the population is
                `capped`, and there is a warning.
            use_tqdm: a progress bar over particle steps.

        Raises:
            ValueError: an argument that cannot be, or a group larger than the engine; nothing has run then.
            SMCError: a group failed (its potential raised, the KV cache ran out, ...); with several prompts its
                attribute `populations` has those that did not, None for the others.
        """
        config = self.model_config
        ids, single = read_prompts(prompts, self._tokenizer(), config.get_vocab_size())
        if twist is not None and potential is None:
            potential = twists.card_potential(twist)
        each, chosen, retained = read_each(len(ids), single, params, potential, exact, config.get_vocab_size())
        apart = isinstance(params, (list, tuple))
        each, plan = read_islands(
            each, apart, islands=islands, migrate_every=migrate_every, n_particles=n_particles,
            target_stderr=target_stderr, max_particles=max_particles, exact=exact,
        )  # fmt: skip
        if not ids:
            return []
        adapters = self._read_adapters(lora_request, len(ids))
        intervened = [()] * len(ids) if intervention is None else self._read_interventions(intervention, len(ids))

        def sample(which: Sequence[int], asked: Sequence[SMCParams]) -> list[Any]:
            return self._sample(
                [take_apart(intervened[i], ids[i], one) for i, one in zip(which, asked, strict=True)],
                [chosen[i] for i in which],
                use_tqdm,
                twist=twist,
                alone=alone,
                each=[{"exact": retained[i]} for i in which],
                adapters=[adapters[i] for i in which],
            )

        populations = gather(plan.run(sample, each, apart), single)
        return populations[0] if single else populations

    def _sample(
        self,
        readings: Sequence[Reading],
        chosen: Sequence[Potential | None],
        use_tqdm: bool,
        *,
        each: Sequence[dict[str, Any]] | None = None,
        adapters: list[LoRARequest | None] | None = None,
        **common: Any,
    ) -> list[Any]:
        """Runs groups side by side: the population of each, or the error that it ended with.

        Args:
            readings, chosen: what each is to do, and its potential.
            each, common: further arguments of `lead_params`, of each group and of all.
        """
        names = dict(self._standing)  # by id; None has none
        kept: dict[tuple[LayerIntervention, ...], str] = {}  # names of interventions
        try:
            for layers in (one.layers for one in readings):
                if layers and layers not in kept:
                    kept[layers] = self.register_intervention(layers)
            for phi in chosen:
                if phi is not None and id(phi) not in names:
                    names[id(phi)] = self.register_potential(phi)
            requests = [
                self.lead_params(
                    one.params,
                    names.get(id(phi)),
                    intervention=kept.get(one.layers),
                    return_population=True,
                    **common,
                    **more,
                )
                for one, phi, more in zip(readings, chosen, each or [{}] * len(readings), strict=True)
            ]
            inputs = [self._prompt(one.prompt) for one in readings]
            outputs = self._run_groups(inputs, requests, adapters or [None] * len(inputs), use_tqdm)
        finally:
            for key, name in names.items():
                if key not in self._standing:
                    self.drop_potential(name)
            for name in kept.values():
                self.drop_intervention(name)
        return self._outcomes(outputs)

    def score(  # type: ignore[override]  # vLLM's compares texts by a pooling model, which has no next tokens
        self, prompt: Any, continuations: Sequence, params: SMCParams | None = None
    ) -> Scored:
        """Computes log p0 of continuations of one prompt, which runs once for all of them.

        p0 is the base model's, without an adapter or an intervention. A stop token is scored as any other, wherever it
        stands. A text is encoded by itself, without special tokens, so its tokens may be others than those that the
        whole text would have there.

        Args:
            prompt: one prompt, in any form that `smc` takes.
            continuations: texts, or lists of token ids; none of them, and one without tokens, are fine.
            params: whose settings of p0 hold (temperature, top_k, min_tokens, …), and nothing else of it; None:
                temperature 1, and nothing else.

        Raises:
            ValueError: naming the argument; a continuation with more tokens than a forward pass takes, or than fit the
                context.
            SMCError: the model gave NaN.
        """
        config = self.model_config
        wanted, params = read_wanted(
            prompt, continuations, params, self._tokenizer(), config.get_vocab_size(), config.max_model_len
        )
        most = self.llm_engine.vllm_config.scheduler_config.max_num_batched_tokens
        for i, ids in enumerate(wanted.token_ids):
            if len(ids) > most:
                raise ValueError(f"continuations[{i}]: has {len(ids)} tokens; at most max_num_batched_tokens={most}")
        if not wanted.distinct:
            return wanted.scored(torch.zeros(0))
        early = sorted(self._stops(dataclasses.replace(params, ignore_eos=False)))
        data = self.collective_rpc("smc_score", args=(wanted.prompt, wanted.distinct, params.p0(), early))[0]
        return wanted.scored(load_tensors(data)["found"])

    def facts(self, prompt: Any, text: Any, params: SMCParams | None = None) -> Facts:
        """Makes the facts of a text, for counterfactuals of it under another model of the same vocabulary.

        Args:
            prompt, text: as in `counterfactual`, one of each.
            params: whose settings of p0 drew the text; None: temperature 1, and nothing else.

        Raises:
            ValueError: an argument that cannot be, or a token that these settings rule out.
            SMCError: the model failed.
        """
        params = SMCParams() if params is None else params
        given = {"n": None, "max_tokens": None, "top_k": None, "top_p": None, "ignore_eos": None, "seed": None}
        cases, single = self._read_cases(prompt, text, params, None, "exact", **given)
        if not single or cases[0].text is None or cases[0].facts is not None:
            raise ValueError(f"text={short(text)}: facts are of one prompt and its text")
        return self._make_facts({"text": cases[0]})[0]

    def _make_facts(self, cases: Mapping[str, Case]) -> list[Facts]:
        """Runs the model along texts, side by side; cases by the names that errors give their texts."""
        config, names = self.model_config, [uuid.uuid4().hex for _ in cases]
        requests, inputs = [], []
        for case, name in zip(cases.values(), names, strict=True):
            assert case.text is not None
            check_facts_size(len(case.text), config.get_vocab_size())
            plain = SMCParams(n_particles=1, max_tokens=len(case.text), ignore_eos=True)
            requests.append(self.lead_params(plain, exact=[case.text], return_population=True))
            (requests[-1].extra_args or {})[PREFIX + "keep_logits"] = name
            inputs.append(self._prompt(case.prompt))
        try:
            gather(self._outcomes(self._run_groups(inputs, requests, [None] * len(cases))), len(cases) == 1)
        finally:
            kept = [self.collective_rpc("smc_take_logits", args=(name,))[0] for name in names]
        tokenizer, made = twists.tokenizer_hash(self._tokenizer()), []
        for (where, case), data in zip(cases.items(), kept, strict=True):
            logits, ids = load_tensors(data)["logits"], tuple(case.text or ())
            try:
                made.append(Facts(logits, ids, tuple(case.prompt), case.params.p0(), tokenizer))
            except ValueError as error:  # a token is impossible
                raise ValueError(f"{where}: {error}") from None
        return made

    def counterfactual(
        self,
        prompt: Any,
        text: Any = None,
        intervention: Any = None,
        *,
        n: int | None = None,
        max_tokens: int | None = None,
        params: SMCParams | None = None,
        potential: Potential | Sequence[Potential | None] | None = None,
        twist: str | os.PathLike | None = None,
        noise: str = "exact",
        top_k: int | None = None,
        top_p: float | None = None,
        ignore_eos: bool | None = None,
        seed: int | None = None,
        alone: bool = False,
        use_tqdm: bool = False,
    ) -> Any:
        """Draws N texts that the noise that gave `text` would have given under an intervention, or by this model.

        Gumbel-max counterfactuals (arXiv 2411.07180), by `ops.redraw`: no noise is made, and where the text is left is
        known exactly (`Counterfactuals.survival`). Beyond the text's end there is no evidence, and draws are plain.

        Args:
            prompt: one prompt or several, in any form that `smc` takes; or `Facts`, what another model said of a text,
                which have their own prompt and text, or a list of these. Several run side by side.
            text: what was drawn after the prompt: token ids, or a str, whose tokens must be those that were drawn;
                None draws one, with the same seed. With several prompts a list of these, or None for all.
            intervention: as `smc` takes it; None: nothing changes, unless `Facts` are given. One of layers needs an
                engine with `interventions=True`.
            n: particles, 64 unless `params` is given. Beside them the text itself has a row of the engine.
            max_tokens: at most so many tokens each; by default as many as the text has.
            params: in the place of n, max_tokens, top_k, top_p, ignore_eos and seed. Its settings of p0 are those that
                drew the text, and that the intervened model draws with (but for a `Temperature`); with `Facts` they are
                the intervened model's alone.
            potential: a target: log Ẑ then is that of the potential's mean over counterfactuals.
            twist: of the potential, as in `smc`.
            noise: "exact" draws by the law of counterfactuals; "gumbel" by the noise itself, which particle i of a seed
                and `params.group` has under every intervention, so that texts of several calls can be compared one by
                one; prompts of one call have other numbers each, as in `smc`. That takes longer, and no potential,
                whose resampling would give particles other numbers.
            alone, use_tqdm: as in `smc`.

        Returns:
            `Counterfactuals`; of several prompts, a list of them.

        Raises:
            ValueError: an argument that cannot be, or a token of the text that its settings rule out.
            SMCError: the group failed; with several prompts its attribute `populations` has those that did not.
        """
        if twist is not None and potential is None:
            potential = twists.card_potential(twist)
        cases, single = self._read_cases(
            prompt, text, params, potential, noise, n=n, max_tokens=max_tokens, top_k=top_k, top_p=top_p,
            ignore_eos=ignore_eos, seed=seed,
        )  # fmt: skip
        if not cases:
            return []
        parts = read_interventions(intervention, len(cases), self._model_sizes())
        under = [take_apart(each, case.prompt, case.params) for each, case in zip(parts, cases, strict=True)]
        for case, reading in zip(cases, under, strict=True):  # before anything runs
            self._check_text(case, reading)
        facts_names: dict[int, str] = {}  # by id
        try:
            cases = self._with_facts(self._with_texts(cases), under, single)
            for facts in (case.facts for case in cases):
                if facts is not None and id(facts) not in facts_names:
                    facts_names[id(facts)] = name = uuid.uuid4().hex
                    self.collective_rpc("smc_put_facts", args=(name, interventions.to_bytes([facts])))
            outcomes = self._sample(
                under,
                [case.potential for case in cases],
                use_tqdm,
                twist=twist,
                alone=alone,
                each=[
                    {
                        "counterfactual": case.text,
                        "factual_temperature": case.params.temperature,
                        "noise": noise,
                        "facts": None if case.facts is None else facts_names[id(case.facts)],
                    }
                    for case in cases
                ],
            )
            found = gather(outcomes, single)
        except SMCError as error:
            if single and error.kind == "refused":
                raise ValueError(str(error)) from None
            if len(error.populations) < len(cases):  # of texts to be drawn, or of their facts: nothing else has run
                error.populations = [None] * len(cases)
            raise
        finally:
            for name in facts_names.values():
                self.collective_rpc("smc_drop_facts", args=(name,))
        return found[0] if single else found

    def _read_cases(
        self, prompts: Any, texts: Any, params: Any, potential: Any, noise: str, **given: Any
    ) -> tuple[list[Case], bool]:
        tokenizer = self._tokenizer()
        return read_cases(
            prompts, texts, params, potential, noise, tokenizer, self._model_sizes(), twists.tokenizer_hash(tokenizer),
            self._stops, **given,
        )  # fmt: skip

    def _stops(self, params: SMCParams) -> frozenset[int]:
        """Lists the tokens that end a particle, as vLLM completes them."""
        wish = SamplingParams(stop_token_ids=list(params.stop_token_ids or ()), ignore_eos=params.ignore_eos)
        wish.update_from_generation_config(
            self.model_config.try_get_generation_config(), self.renderer.get_eos_token_id()
        )
        own = frozenset(params.stop_token_ids or ())
        return own if params.ignore_eos else own | wish.all_stop_token_ids

    def _check_text(self, case: Case, under: Reading) -> None:
        """Refuses a text that has no room in this engine."""
        text = case.text or [0] * case.params.max_tokens
        apart = case.facts is not None or under.prompt != case.prompt
        self._check_group(
            self.lead_params(under.params, counterfactual=text, facts="" if apart else None), len(under.prompt)
        )
        if apart and case.facts is None:
            self._check_group(
                self.lead_params(SMCParams(n_particles=1), counterfactual=text, facts=""), len(case.prompt)
            )

    def _with_texts(self, cases: list[Case]) -> list[Case]:
        """Draws the texts that are not given: from p0, of which force_stop is no part."""
        drawn = [i for i, case in enumerate(cases) if case.text is None]
        alone = [dataclasses.replace(cases[i].params, n_particles=1, force_stop=False) for i in drawn]
        readings = [Reading((), cases[i].prompt, params) for i, params in zip(drawn, alone, strict=True)]
        found = gather(self._sample(readings, [None] * len(drawn), False), False) if drawn else []
        out = list(cases)
        for i, population in zip(drawn, found, strict=True):
            out[i] = cases[i].with_text(population.token_ids[0])
        return out

    def _with_facts(self, cases: list[Case], under: Sequence[Reading], single: bool) -> list[Case]:
        """Makes the facts of texts that followed another prompt than their counterfactuals do."""
        apart = [i for i, case in enumerate(cases) if case.facts is None and under[i].prompt != case.prompt]
        names = {"text" if single else f"text[{i}]": cases[i] for i in apart}
        out = list(cases)
        for i, facts in zip(apart, self._make_facts(names) if apart else (), strict=True):
            out[i] = cases[i]._replace(facts=facts)
        return out

    def _outcomes(self, outputs: Sequence[RequestOutput | None]) -> list[Population | SMCError]:
        """Reads what the group requests of one call gave."""
        outcomes: list[Population | SMCError] = []
        for output in outputs:
            payload = (output.kv_transfer_params or {}).get("smc", {}) if output is not None else {}
            if output is not None and "population" in payload:
                outcomes.append(self.population(output))
            else:
                reason, kind = payload.get("error", "the request was aborted"), payload.get("error_kind", "engine")
                outcomes.append(SMCError(reason, kind=kind))
        return outcomes

    @staticmethod
    def lead_params(
        params: SMCParams,
        potential: str | None = None,
        *,
        group: int = 0,
        twist: str | os.PathLike | None = None,
        exact: Sequence[Sequence[int]] | None = None,
        alone: bool = False,
        intervention: str | None = None,
        counterfactual: Sequence[int] | None = None,
        factual_temperature: float | None = None,
        noise: str = "exact",
        facts: str | None = None,
        return_population: bool = False,
    ) -> SamplingParams:
        """Makes a group request's SamplingParams, for `generate`: the request's text is then one posterior sample.

        Args:
            potential: a registered name (`register_potential`, or an entry point in `fastsmc.potentials`).
            group: added to `params.group`.
            twist: directory of a learned twist, as the worker sees it.
            exact: exact samples of the target: one, or n_particles of them.
            alone: the group's rows share no forward pass with those of other groups.
            intervention: a name that `register_intervention` gave, or one of the engine's option `interventions`.
            counterfactual: a text after this prompt, as token ids: the particles are its counterfactuals.
            factual_temperature: at which it was drawn; None: at that of `params`.
            noise: as of `counterfactual`.
            facts: name of what another model said of the text, where the workers have it.
            return_population: the whole population comes back with the output, for `population(output)`.
        """
        extra = params.to_extra_args()
        extra[PREFIX + "group"] += group
        if potential is not None:
            extra[PREFIX + "potential"] = potential
        if twist is not None:
            extra[PREFIX + "twist"] = os.path.abspath(twist)
        if exact is not None:
            extra[PREFIX + "exact"] = read_exact("exact", exact, params)
        if alone is not False:
            extra[PREFIX + "alone"] = alone
        if intervention is not None:
            extra[PREFIX + "intervention"] = intervention
        if counterfactual is not None:
            extra[COUNTERFACTUAL], extra[PREFIX + "noise"] = list(counterfactual), noise
        if factual_temperature is not None:
            extra[PREFIX + "factual_temperature"] = factual_temperature
        if facts is not None:
            extra[PREFIX + "facts"] = facts
        if return_population:
            extra[PREFIX + "return_population"] = True
        return SamplingParams(**params.to_shared(), extra_args=extra)

    def population(self, output: RequestOutput) -> Population:
        """Returns the population of a finished group request that asked for it (`return_population`)."""
        payload = (output.kv_transfer_params or {}).get("smc", {})
        if "error" in payload and "population" not in payload:  # one of no weight is beside an error
            raise SMCError(payload["error"])
        if "population" not in payload:
            raise ValueError("output: holds no population; ask for it with smc_return_population")
        return read_population(payload, self._tokenizer())

    def register_potential(self, potential: Potential) -> str:
        """Sends a potential to the workers and sets it up there; returns the name to give to `lead_params`.

        Raises:
            ValueError: not a Potential.
            SMCError: it cannot be pickled, its `setup` raised, or left what no group can have a copy of.
        """
        if not isinstance(potential, Potential):
            raise ValueError(f"potential={potential!r}: must be a fastsmc.Potential (an instance, not a class)")
        if not self.model_config.skip_tokenizer_init:
            try:
                potential.prepare(self.get_tokenizer())
            except (ValueError, KeyboardInterrupt):
                raise
            except BaseException as error:
                who, what = type(potential).__name__, f"raised {type(error).__name__}: {error}"
                raise SMCError(f"potential {who}.prepare: {what}") from error
        name = f"{OBJECT}{uuid.uuid4().hex}:{int(potential.lookahead)}"
        if self._in_process():
            errors = self.collective_rpc("smc_put_potential", args=(name, potential))
        else:
            errors = self.collective_rpc("smc_put_potential", args=(name, pickled(potential, by_value=False)))
            if any(error and error.startswith("ModuleNotFoundError") for error in errors):
                # defined in a module that only this process can import, such as a test or a script
                errors = self.collective_rpc("smc_put_potential", args=(name, pickled(potential, by_value=True)))
        failed = [error for error in errors if error]
        if failed:
            self.drop_potential(name)
            raise SMCError(failed[0].removeprefix("SMCError: "))
        return name

    @contextlib.contextmanager
    def standing(self, potential: Potential) -> Iterator[None]:
        """Keeps a potential set up in the workers for all calls of `smc` within, each of which else sets it up anew.

        Raises:
            ValueError, SMCError: as `register_potential`.
        """
        self._standing[id(potential)] = name = self.register_potential(potential)
        try:
            yield
        finally:
            del self._standing[id(potential)]
            self.drop_potential(name)

    def drop_potential(self, name: str) -> None:
        """Makes the workers forget a registered potential; groups that run with it go on."""
        self.collective_rpc("smc_drop_potential", args=(name,))

    def register_intervention(self, intervention: Intervention | Sequence[Intervention]) -> str:
        """Sends interventions on layers to the workers; returns the name to give to `lead_params`.

        Raises:
            ValueError: one that does not fit the model, or whose place this engine does not have; `Prompt` and
                `Temperature`, which are a request's own.
        """
        (parts,) = self._read_interventions(intervention, 1)
        layers = [part for part in parts if isinstance(part, LayerIntervention)]
        if not layers or len(layers) < len(parts):
            raise ValueError(f"intervention={short(intervention)}: must be interventions on layers, at least one")
        for layer in layers:
            layer.check_registered()
        name, data = name_intervention(uuid.uuid4().hex, layers), interventions.to_bytes(layers)
        refused = [why for why in self.collective_rpc("smc_put_intervention", args=(name, data)) if why]
        if refused:
            self.drop_intervention(name)
            raise ValueError(refused[0])
        return name

    def drop_intervention(self, name: str) -> None:
        """Makes the workers forget a registered intervention; a group that still runs under it ends with an error."""
        self.collective_rpc("smc_drop_intervention", args=(name,))

    def load_hf(self) -> HFEngine:
        """Loads the model's weights once more, by transformers, in float32: what interventions are fitted with."""
        return HFEngine(self.model_config.model)

    # ---------------------------------------------------------------------------------------------- vLLM's own face
    def generate(self, prompts: Any, sampling_params: Any = None, **kwargs: Any) -> list[RequestOutput]:
        """Generates as `vllm.LLM` does. A group that can never run is refused before anything is sent."""
        several = isinstance(sampling_params, Sequence)
        wishes = [self._complete(wish) for wish in (sampling_params if several else [sampling_params])]
        return super().generate(prompts, wishes if several else wishes[0], **kwargs)

    def _complete(self, wish: Any) -> Any:
        """Returns what one prompt is to be answered by; of a group, checked, with token ids for text."""
        if not is_group_request(wish):
            return wish
        allowed = options.EngineOptions.of(self.llm_engine.vllm_config.additional_config)
        wish = wish.clone()
        wish.extra_args = with_token_ids(wish.extra_args, allowed, self._tokenizer())
        self._check_group(wish)
        return wish

    def _run_engine(self, *args: Any, **kwargs: Any) -> list[Any]:
        strays, self._strays = self._strays, []
        return sorted(strays + super()._run_engine(*args, **kwargs), key=lambda output: int(output.request_id))

    def shutdown(self) -> None:
        """Ends the engine and its processes."""
        self.llm_engine.engine_core.shutdown()

    # -------------------------------------------------------------------------------------------------- inner parts
    def _in_process(self) -> bool:
        """Says whether the (single) worker lives in this very process, so that objects need not be pickled."""
        core = getattr(self.llm_engine.engine_core, "engine_core", None)
        return core is not None and hasattr(core.model_executor, "driver_worker")

    def _tokenizer(self) -> Any:
        return None if self.model_config.skip_tokenizer_init else self.get_tokenizer()

    def _prompt(self, ids: list[int]) -> Any:  # vLLM's renderer has no type either
        return self.renderer.render_cmpl([{"prompt_token_ids": ids}])[0]

    def _read_adapters(self, adapters: Any, n: int) -> list[LoRARequest | None]:
        each = list(adapters) if isinstance(adapters, list | tuple) else [adapters] * n
        if len(each) != n or not all(adapter is None or isinstance(adapter, LoRARequest) for adapter in each):
            raise ValueError(
                f"lora_request={adapters!r}: must be a LoRARequest, or a list of one or None for each prompt"
            )
        if self.llm_engine.vllm_config.lora_config is None and any(adapter is not None for adapter in each):
            raise ValueError(f"lora_request={adapters!r}: this engine was started without enable_lora=True")
        return each

    def _model_sizes(self) -> Sizes:
        if self._sizes is None:
            self._sizes = Sizes(*self.collective_rpc("smc_sizes")[0])  # between processes a tuple is a list
        return self._sizes

    def _read_interventions(self, given: Any, n_prompts: int) -> list[tuple[Intervention, ...]]:
        return read_interventions(given, n_prompts, self._model_sizes())

    def _check_group(self, sampling_params: SamplingParams, prompt_len: int = 1) -> None:
        config = self.llm_engine.vllm_config
        allowed = options.EngineOptions.of(config.additional_config)
        asked = GroupRequest.parse(sampling_params)
        asked.check_allowed(allowed)
        asked.check_ids(self.model_config.get_vocab_size(), not self.model_config.skip_tokenizer_init)
        asked.check_fits(prompt_len, asked.lookahead(allowed), Limits.of(config))

    def _run_groups(
        self,
        inputs: list[Any],
        requests: list[SamplingParams],
        adapters: list[LoRARequest | None],
        use_tqdm: bool = False,
    ) -> list[RequestOutput | None]:
        for prompt, request in zip(inputs, requests, strict=True):
            self._check_group(request, len(prompt["prompt_token_ids"]))
        index: dict[str, int] = {}
        outputs: list[RequestOutput | None] = [None] * len(requests)
        steps = [0] * len(requests)
        bar = None
        if use_tqdm:
            from tqdm.auto import tqdm

            bar = tqdm(total=sum(map(_steps, requests)), desc="particle steps", file=sys.stderr)
        left = len(requests)
        try:
            for number, (prompt, request) in enumerate(zip(inputs, requests, strict=True)):
                # with a bar, outputs of unfinished requests too: they carry the step
                request.output_kind = RequestOutputKind.CUMULATIVE if use_tqdm else RequestOutputKind.FINAL_ONLY
                request_id = str(next(self.request_counter))
                index[request_id] = number
                self.llm_engine.add_request(request_id, prompt, request, lora_request=adapters[number])
            while left and self.llm_engine.has_unfinished_requests():
                for output in self.llm_engine.step():
                    i = index.get(output.request_id)
                    if i is None:
                        if output.finished:
                            self._strays.append(output)
                        continue
                    assert isinstance(output, RequestOutput)  # of one of our groups
                    payload = (output.kv_transfer_params or {}).get("smc", {})
                    if bar is not None:
                        total = _steps(requests[i])  # more are taken where particles wait for others
                        step = total if output.finished else min(payload.get("step", steps[i]), total)
                        bar.update(step - steps[i])
                        steps[i] = step
                    if output.finished:
                        outputs[i] = output
                        left -= 1
        finally:
            if bar is not None:
                bar.close()
            unfinished = [request_id for request_id, i in index.items() if outputs[i] is None]
            if unfinished:
                self.llm_engine.abort_request(unfinished)
        return outputs


def read_population(payload: Mapping[str, Any], tokenizer: Any) -> Population:
    """Reads the population that came with a finished group request; with a tokenizer it has texts."""
    kind = Counterfactuals if "counterfactual" in payload else Population
    population = kind.from_bytes(base64.b64decode(payload["population"]))
    if tokenizer is not None:
        population.texts = population_texts(tokenizer, population)
    return population


def _steps(request: SamplingParams) -> int:
    assert request.max_tokens is not None  # of a group
    return request.max_tokens
