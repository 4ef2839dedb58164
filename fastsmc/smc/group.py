"""A group: N particles of one prompt and target, from the empty sequence to its population."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsmc import ops
from fastsmc.arguments import read_exact
from fastsmc.counterfactuals import Counterfactuals
from fastsmc.p0 import P0, restrict
from fastsmc.params import SMCParams
from fastsmc.population import Population, draw_indices
from fastsmc.potentials import Potential, answered
from fastsmc.potentials.condition import no_condition, questions
from fastsmc.potentials.copying import own_copy
from fastsmc.potentials.product import guides
from fastsmc.smc import faults
from fastsmc.smc.asking import Asker
from fastsmc.smc.cohort import Cohort
from fastsmc.smc.engine import GroupEngine, SMCError
from fastsmc.smc.evidence import Evidence
from fastsmc.smc.record import Lineages, make_population
from fastsmc.smc.step import CHOOSE, Kind
from fastsmc.smc.strings import Strings, unheld


class Setup:
    """Holds what a group is asked to do, whoever drives it.

    A group may be *conditional*: one particle, in a uniform place, retains an exact sample of the target at every step
    (forced tokens, forced ancestor), and the others are resampled from all N weights. Then E[1/Ẑ] = 1/Z, so that log Ẑ
    bounds log Z from above on average (docs/mathematics.md §4). That holds because the others have the law that they
    have in an ordinary run given the retained one, which is simple for independent draws: a conditional group resamples
    multinomially and draws without strata, whatever its parameters say. With N exact samples nothing is random: each of
    them is weighed.

    Args:
        params: what to do.
        potential: None for plain ancestral sampling. It must have been set up (`Potential.setup`); the group works on
            a copy of it (`potentials.copying`), so that groups do not share per-particle state.
        prompt: the prompt's token ids.
        stop_token_ids: all tokens that end a particle (end of sequence included).
        device: where the group's tensors live.
        engine: what the potential was set up with, for its calls of `continuation_log_prob`.
        exact: a list of one complete sequence of token ids, which makes the group conditional, or of N, to be weighed.
        all_stop_token_ids: what min_tokens rules out at first: beside `stop_token_ids` what would end a particle
            without ignore_eos; None: nothing.
        evidence: a text, whose counterfactuals the particles then are.
        copy_on_write: False copies the potential's tensors at once, so that their addresses stay.

    Attributes:
        n: number of particles N.
        asker: asks the potential; None without one.
        p0: what the group's p0 is besides the model.
        stop_strings, segment_strings: end particles, and segments, on their text; None without any.
        ends_itself: whether particles end otherwise than by stop tokens and length.
        kind: of the group.
        weighed: whether its weights differ: it has a potential, or raises p0 to a power.
        weighs_by_next: base proposal: unfinished particles are weighed by `logw_next`, since there is no `prefix`.
        exact: (K, T) int64 tokens of the exact samples, −1 after the end, or None.
        watch: of a group that follows a text (`Group.companions`): is shown the logits (V,) of its only row at each
            step, as p0 restricts them.

    Raises:
        SMCError: the potential or `exact` is refused.
    """

    def __init__(
        self,
        params: SMCParams,
        potential: Potential | None,
        prompt: Sequence[int],
        stop_token_ids: frozenset[int] | set[int] = frozenset(),
        device: torch.device | str = "cpu",
        engine: GroupEngine | None = None,
        exact: Sequence[Sequence[int]] | None = None,
        *,
        all_stop_token_ids: frozenset[int] | set[int] | None = None,
        copy_on_write: bool = True,
        evidence: Evidence | None = None,
    ) -> None:
        self.params, self.prompt, self.n = params, list(prompt), params.n_particles
        self.stop_token_ids, self.device = frozenset(stop_token_ids), torch.device(device)
        if params.force_stop and not self.stop_token_ids:
            none = "force_stop=True: needs a stop token, and there is none; give stop_token_ids"
            raise SMCError(none, kind="refused")
        self.all_stop_token_ids = self.stop_token_ids | (all_stop_token_ids or frozenset())
        self.p0 = P0(params, self.all_stop_token_ids, self.device)
        tokenizer = None if engine is None else engine.tokenizer
        self.stop_strings = self._strings("stop", params.stop, "stop_token_ids", tokenizer)
        self.segment_strings = self._strings("segment", params.segment, "segment_token_ids", tokenizer)
        if params.segment is not None and (not_held := unheld(tokenizer, params.segment)):
            raise SMCError(
                f"segment={list(params.segment)}: no text of this model's tokens holds {not_held[0]!r} (special tokens "
                "have no text); give segment_token_ids",
                kind="refused",
            )
        if params.segmented and evidence is not None:
            raise SMCError(f"{_segments(params)}: counterfactuals have no segments; leave it out", kind="refused")
        if params.islands > 1 and evidence is not None:
            raise SMCError(f"islands={params.islands}: counterfactuals have none; leave it out", kind="refused")
        self.watch: Callable[[Tensor], None] | None = None
        self.blame: Callable[[], str] | None = None  # says what of the model's call may have made a NaN
        self.asker: Asker | None = None
        methods: set[str] = set()
        if potential is not None:
            try:
                methods = answered(potential)
                copy = own_copy(potential, engine, on_write=copy_on_write)
            except ValueError as error:
                raise SMCError(str(error)) from error
            self.asker = Asker(copy, potential, params, self.prompt, self.stop_token_ids, engine)
        rejects = params.proposal == "rejection"
        if rejects and (self.asker is None or not self.asker.conditions):
            raise SMCError(no_condition(potential), kind="refused")
        if rejects and evidence is not None:
            raise SMCError("proposal='rejection': counterfactuals are not drawn by it; use 'twisted'", kind="refused")
        guided = potential is not None and (guides(potential) if rejects else potential.proposal_only)
        if guided and params.proposal == "base":
            raise SMCError(
                f"potential {type(potential).__name__}: is proposal-only and no intermediate target, so "
                f"proposal={params.proposal!r} cannot use it; use proposal='twisted'",
                kind="refused",
            )
        by_next = "logw_next" in methods and not guided and not rejects
        without = potential is None
        twisted = (by_next or (params.powered and without)) and params.proposal == "twisted"
        self.weighed = params.powered or not without
        self.weighs_by_next = by_next and not twisted and "prefix" not in methods
        self.ends_itself = self.stop_strings is not None or (self.asker is not None and self.asker.stops)
        self.exact: Tensor | None = None
        if exact is not None and self.asker is not None and self.asker.stops:
            raise SMCError("exact: a group whose potential has `stop` takes no exact samples", kind="refused")
        if exact is not None:
            self.exact = self._read_exact(exact, (engine and engine.vocab_size) or None)
        scheme = params.resampling if self.exact is None else "multinomial"
        self.evidence = evidence
        noise = None if evidence is None else evidence.noise
        self.kind = Kind(
            twisted, guided, self.exact is not None, scheme, noise, params.powered, rejects, params.segmented,
            params.islands,
        )  # fmt: skip

    def _strings(self, name: str, strings: Sequence[str] | None, instead: str, tokenizer: Any) -> Strings | None:
        if strings is None:
            return None
        if tokenizer is None:
            raise SMCError(f"{name}={list(strings)}: this engine has no tokenizer; give {instead}", kind="refused")
        return Strings(tokenizer, strings, self.prompt, self.n, self.device)

    def _read_exact(self, exact: Sequence[Sequence[int]], vocab: int | None) -> Tensor:
        steps = self.params.max_tokens
        try:
            samples = read_exact("exact", exact, self.params, vocab)
        except ValueError as error:
            raise SMCError(str(error), kind="refused") from None
        rows = []
        for i, ids in enumerate(samples):
            ends = [j for j, v in enumerate(ids) if v in self.stop_token_ids] or [steps - 1]
            if self.params.force_stop and ids[-1] not in self.stop_token_ids:
                raise SMCError(
                    f"exact[{i}]={ids[:20]}: does not end with a stop token, as force_stop=True has it", kind="refused"
                )
            if len(ids) != ends[0] + 1:
                raise SMCError(
                    f"exact[{i}]={ids[:20]}: {len(ids)} tokens are no complete sequence; it ends with its first stop "
                    f"token, or has max_tokens={steps} tokens",
                    kind="refused",
                )
            rows.append([*ids, *[-1] * (steps - len(ids))])
        return torch.tensor(rows, dtype=torch.int64, device=self.device)

    def fault_error(self, kind: int, particle: int, at: int, value: float, vocab: int) -> SMCError:
        """Makes the group's error of a fault: its kind, particle, step and value; `vocab` is V."""
        if kind == faults.MODEL:
            where = "" if self.blame is None else f"; {self.blame()}"
            return SMCError(f"model at step {at}: logits of row {int(value)} hold NaN or +inf{where}", kind="engine")
        if kind == faults.POOL:
            return SMCError(f"pool: its {int(value)} blocks were not enough at step {at}", kind="engine")
        if kind == faults.RULED_OUT and self.watch is not None:
            return SMCError(f"text: its token {at}, {int(value)}, is impossible under the settings", kind="refused")
        if kind == faults.RULED_OUT:
            ruled_out = f"the model or the twist rules out one of its tokens at step {at}"
            outside = f"token {int(value)} is outside the vocabulary of {vocab}"
            return SMCError(f"exact: {outside if value >= vocab else ruled_out}", kind="refused")
        if kind == faults.NO_WEIGHT:
            assert self.exact is not None  # nobody else retains
            return SMCError(
                f"exact[{particle if len(self.exact) > 1 else 0}]: has weight zero at step {at}: it is no sample of "
                "this target, or the twist is zero on what the target allows",
                kind="refused",
            )
        assert self.asker is not None  # the others are a potential's
        what = faults.describe(kind, particle, value, self.asker.last_sizes)
        return self.asker.error(faults.METHODS[kind], what, at)


class Group(Setup):
    """Is a group among others of a cohort, with what has become of it. The arguments are those of `Setup`.

    Attributes:
        cohort, index: who has its particles, and which group it is there.
        t: steps done.
        done: whether it is over.
        error: why it failed; None if it has not.
        n_rows: how many rows it wants of the model at its next step.
        copies: whether slots must be copied for that.
        lineages: its record.
        held_hidden: (N, H) hidden states of particles that wait for a boundary, as they were; or None.
        n_cut: how often a particle was asked about no more tokens because of `Potential.max_asked`.
        progress: None, or how each step went, for whoever takes it away: the step, ESS and log Ẑ so far as it was
            weighed (log of the mean weight in the record; None: no weight is left), whether it `resampled` thereupon,
            particles that have `finished`, and `distinct` histories that go on.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.t, self.n_rows, self.copies, self.n_cut = 0, 1, False, 0
        self.started = self.done = self.ended_by_resampling = False
        self.error: SMCError | None = None
        self.lineages = Lineages(self.n, self.device)
        self.progress: list[dict[str, Any]] | None = None
        self.held_hidden: Tensor | None = None
        self.cohort = Cohort([self])
        self.index = 0
        self.cohort.begin()

    @property
    def asked_with(self) -> tuple:
        """Gives what is equal for groups that may be asked together (`Potential.per_particle`)."""
        asker = self.asker
        if asker is None:
            return ()
        if not asker.joinable or self.params.segmented:
            return (id(self),)
        origin, same = (id(asker.origin), id(asker.engine)), (self.weighs_by_next, self.stop_token_ids)
        return *origin, *same, self.t, self.params.max_tokens

    def companions(self, drawn: SMCParams | None, prompt: Sequence[int] | None = None) -> list[Group]:
        """Makes the groups of one particle that follow the text of a counterfactual group: they are to take each step
        just before it, in any order, and show its evidence what the model says along the text.

        Args:
            drawn: the settings that drew the text, for the first of them, which is to run as the model was; None: there
                is none, as the evidence has all it needs. The last one is to run as this group does.
            prompt: what the text followed, where that is not this group's prompt.
        """
        evidence, device = self.evidence, self.device
        assert evidence is not None  # of a counterfactual group

        def restricted(row: Tensor, step: int) -> Tensor:
            return restrict(row[None].clone(), [self.p0], [0, 1], torch.tensor([step], device=device))[0]

        n = len(evidence.token_ids)
        plain = SMCParams(n_particles=1, max_tokens=n)
        intervened = self._companion(plain, self.prompt)
        intervened.watch = lambda row: evidence.compare(restricted(row, intervened.t), self.params.temperature)
        if drawn is None:
            return [intervened]
        drawn = dataclasses.replace(
            drawn, n_particles=1, max_tokens=n, min_tokens=min(n, drawn.min_tokens), force_stop=False, stop=None
        )
        factual = self._companion(drawn, self.prompt if prompt is None else prompt)
        factual.watch = evidence.show
        return [factual, intervened]

    def _companion(self, params: SMCParams, prompt: Sequence[int]) -> Group:
        assert self.evidence is not None
        return Group(
            params, None, prompt, self.stop_token_ids, self.device, exact=[self.evidence.token_ids],
            all_stop_token_ids=self.all_stop_token_ids,
        )  # fmt: skip

    def become_base(self) -> None:
        """Goes on with the base proposal, since the potential does not shape the first draw."""
        self.kind = dataclasses.replace(self.kind, twisted=False)

    # ---------------------------------------------------------------------------------------------- the result
    @property
    def log_w(self) -> Tensor:
        """Gives (N,) float64 log weights since the last resampling."""
        return self.cohort.particles.log_w[self.cohort.layout.part(self.index)]

    @property
    def log_z(self) -> float:
        """Gives the log of the closed resampling intervals. Waits for the device."""
        return float(self.cohort.step.log_z[self.index])

    def population(self) -> Population:
        """Gives the weighted particles, traced back through the genealogy."""
        names = ["tokens", "token_log_probs", "ancestors", "resampled", "ess", "step_log_w"]
        names += ["boundary"] * self.kind.segmented + ["island_resampled"] * (self.kind.islands > 1)
        part = self.cohort.layout.part(self.index)
        population = make_population(
            {name: self.lineages.stacked(name) for name in names},
            self.log_w,
            self.log_z,
            twisted=self.kind.twisted,
            retains=self.kind.retains,
            equal_by_law=not self.weighed and not self.params.force_stop,
            ended_by_resampling=self.ended_by_resampling,
            stopped=self.cohort.particles.stopped[part],
            prompt=self.prompt,
            params=self.params,
            segments=self.cohort.particles.segments[part] if self.kind.segmented else None,
        )
        asked = None if self.asker is None else questions(self.asker.potential)
        if asked is not None:
            population.questions = {**asked, "cut": self.n_cut}
        if self.evidence is None:
            return population
        kernels = self.lineages.stacked("token_log_kernels")
        return Counterfactuals.of(
            population,
            factual_ids=self.evidence.token_ids,
            factual_log_probs=self.evidence.log_probs.cpu().numpy(),
            stay=self.evidence.stay.cpu().numpy(),
            token_log_kernels=kernels,
        )


def _segments(params: SMCParams) -> str:
    """Names the first parameter that makes segments."""
    names = ("segment", "segment_token_ids", "max_segment_tokens")
    return next(f"{name}={value!r}" for name in names if (value := getattr(params, name)) is not None)


def choose(log_w: Tensor, params: SMCParams, n_samples: int = 1) -> list[int]:
    """Draws particles independently by final log weights (N,), samples of the target; none if there is no weight.

    The first ones are the same however many are drawn.
    """
    weights = torch.softmax(log_w, 0).cpu().numpy()
    if not np.isfinite(weights).all():
        return []
    u = ops.uniforms(n_samples, seed=params.seed, group=params.group, step=0, stream=CHOOSE, device="cpu")
    return draw_indices(weights, u.numpy()).tolist()
