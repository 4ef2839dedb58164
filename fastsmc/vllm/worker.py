"""vLLM's workers with a particle runner beside the model runner.

The particle runner is made at start-up, as soon as the model and the KV cache are there, so that what it cannot do is
refused then. That comes before vLLM's own warm-up: what is compiled for groups then does not count as compiled in the
middle of traffic (vllm.utils.jit_monitor), and no CUDA graph of vLLM's is there yet when `attend` is measured.

A particle-only step schedules no tokens for vLLM, so its result is returned from `execute_model` itself, in every
process mode; what rode in an ordinary step is returned with that one's tokens. Of several tensor-parallel ranks vLLM
takes the first one's result (`fastsmc.vllm.ranks`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import cloudpickle
import torch
from safetensors.torch import save
from vllm.distributed import get_tp_group
from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec, replace_as
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput
from vllm.v1.worker.gpu_worker import Worker

from fastsmc.interchange import Spots, read_asked
from fastsmc.interventions import Facts, LayerIntervention, Sizes, from_bytes
from fastsmc.ops._tensors import built_backends, missing_on_gpu
from fastsmc.p0 import P0
from fastsmc.reward_networks import Network, load_networks
from fastsmc.scoring import p0_params
from fastsmc.vllm import attention, capacity, compat, interchange, interventions, scoring
from fastsmc.vllm.compat import get_logger
from fastsmc.vllm.histories import Histories
from fastsmc.vllm.messages import GroupResult
from fastsmc.vllm.options import EngineOptions
from fastsmc.vllm.ranks import Follower, make_runner
from fastsmc.vllm.runner import ParticleRunner

logger = get_logger(__name__)


if TYPE_CHECKING:
    _Worker = Worker
else:
    _Worker = object  # the mixin is put before vLLM's GPU worker, or before its CPU worker


class SMCWorkerMixin(_Worker):
    """Adds a particle runner to a vLLM worker; see the module's docstring."""

    smc_runner: ParticleRunner | Follower
    _riders: Sequence[GroupResult] = ()  # results of groups that rode in the step whose tokens are sampled next
    _networks: Mapping[str, Network] = MappingProxyType({})  # of the reward models that this rank has

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        compat.check_config(self.vllm_config)  # before the weights are read
        compat.check_names(current_platform.device_type)
        attention.register()
        options = EngineOptions.of(self.vllm_config.additional_config)
        if options.reward_models and get_tp_group().rank_in_group == 0:  # which asks the potentials
            dtype, device = self.model_config.dtype, self.device
            assert isinstance(dtype, torch.dtype) and device is not None  # vLLM has resolved both
            self._networks = load_networks(options.reward_models, dtype, device)
            for name, network in self._networks.items():
                logger.info("reward model %r: %s of weights", name, capacity.gib(network.weight_bytes))
        # as `get_kv_cache_spec` below, in the small cache with which vLLM's GPU runners try their CUDA graphs
        self.vllm_config.scheduler_config.disable_hybrid_kv_cache_manager = True
        super().load_model(*args, **kwargs)
        interventions.install(self.model_runner.model, self.vllm_config)

    def reward_bytes(self, *, weights: bool) -> int:
        """Returns the bytes that scoring with this rank's reward models takes, one at a time, and those of all weights.

        Args:
            weights: whether those count; they do not where what is free is measured beside them.
        """
        step = max((network.step_bytes for network in self._networks.values()), default=0)
        return step + sum(network.weight_bytes for network in self._networks.values() if weights)

    def get_kv_cache_spec(self) -> Any:
        specs = keep_behind_windows(super().get_kv_cache_spec(), self.cache_config.block_size)
        compat.check_kv_cache_specs(specs)  # before vLLM tries to make one group of them
        return specs

    def compile_or_warm_up_model(self) -> Any:
        self._histories: dict[str, Histories] = {}
        self.smc_runner = make_runner(self.model_runner)
        if isinstance(self.smc_runner, ParticleRunner):
            self.smc_runner.shelf.open(self._networks)
        return super().compile_or_warm_up_model()

    def shutdown(self) -> None:
        runner = getattr(self, "smc_runner", None)  # None: it has not come so far
        if isinstance(runner, ParticleRunner):
            runner.shelf.close()
        super().shutdown()

    def execute_model(self, scheduler_output: Any) -> Any:
        order = getattr(scheduler_output, "smc", None)
        if order is not None and (order.drop or order.groups):
            self.smc_runner.drop(order.drop)
            if order.groups and scheduler_output.total_num_scheduled_tokens == 0:
                return _with_results(ModelRunnerOutput(req_ids=[], req_id_to_index={}), self.smc_runner.run(order))
            if order.groups:
                assert isinstance(self.smc_runner, ParticleRunner)  # see `GroupResult.rides`
                with self.smc_runner.riding(order) as self._riders:
                    return super().execute_model(scheduler_output)
        return super().execute_model(scheduler_output)

    def sample_tokens(self, grammar_output: Any) -> Any:
        output = super().sample_tokens(grammar_output)
        riders, self._riders = self._riders, ()
        if riders:  # the V2 runner hands out what the tokens are yet to come to
            later = isinstance(output, AsyncModelRunnerOutput)
            _with_results(output.model_runner_output if later else output, riders)
        return output

    def smc_put_potential(self, name: str, potential: Any) -> str | None:
        """Keeps a potential (an object, or its cloudpickle bytes); returns None, or why it could not be set up.

        Only tensor-parallel rank 0 unpickles it and sets it up; the others are asked too, since vLLM asks all.
        """
        if isinstance(self.smc_runner, Follower):
            return None
        try:
            if isinstance(potential, bytes):
                potential = cloudpickle.loads(potential)
            self.smc_runner.shelf.put(name, potential)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a user's code unpickles it
            return f"{type(error).__name__}: {error}"
        return None

    def smc_drop_potential(self, name: str) -> None:
        if not isinstance(self.smc_runner, Follower):
            self.smc_runner.shelf.drop(name)

    def smc_sizes(self) -> Sizes:
        """Says what interventions must fit."""
        return self.smc_runner.interventions.places.sizes

    def smc_put_intervention(self, name: str, data: bytes) -> str | None:
        """Keeps interventions (`fastsmc.interventions.to_bytes`) on every rank; returns None, or why it cannot."""
        try:
            layers = [part for part in from_bytes(data) if isinstance(part, LayerIntervention)]
            self.smc_runner.interventions.put(name, layers)
        except ValueError as error:
            return str(error)
        return None

    def smc_drop_intervention(self, name: str) -> None:
        self.smc_runner.interventions.drop(name)

    def smc_read_states(
        self, prompts: list[list[int]], at: list[list[int]], layers: list[int]
    ) -> tuple[bytes | None, str | None]:
        """Reads hidden states behind layers at positions of each prompt: (S, L, H) as safetensors, or why it cannot."""
        model, spots = self.smc_runner.own_model, Spots(at)
        return self._without_engine(lambda: interchange.read_states(model, prompts, spots, layers))

    def smc_put_states(
        self, bases: list[list[int]], sources: list[list[int]], configs: bytes, logits: bool, labels: Any
    ) -> tuple[bytes | None, str | None]:
        """Runs a call of `interchange`: its answers as safetensors, or why it cannot."""
        model, read = self.smc_runner.own_model, from_bytes(configs)
        asked = read_asked(bases, sources, read, logits, labels, model.interventions.places.sizes)
        return self._without_engine(lambda: interchange.put_states(model, asked).result())

    @torch.inference_mode()
    def smc_score(
        self, prompt: list[int], continuations: list[list[int]], p0: dict[str, Any], early: list[int]
    ) -> bytes | None:
        """Scores continuations of a prompt, all with tokens: (Q,) float64 as safetensors; None on other ranks than 0.

        Args:
            p0, early: settings of p0, and the tokens that min_tokens rules out.
        """
        model = self.smc_runner.own_model
        found = scoring.score(model, prompt, continuations, P0(p0_params(p0), early, model.device))
        return save({"found": found.cpu()}) if isinstance(self.smc_runner, ParticleRunner) else None

    @torch.inference_mode()
    def smc_open_histories(self, name: str, cache_bytes: int) -> tuple[int, int] | str:
        """Makes a KV cache for histories: blocks that it has for them, and tokens of a block; or why it cannot."""
        try:
            opened = Histories(self.smc_runner.own_model, cache_bytes)
        except (ValueError, torch.OutOfMemoryError) as error:
            return str(error)
        self._histories[name] = opened
        return opened.tree.total, self.smc_runner.own_model.block_size

    @torch.inference_mode()
    def smc_next_rows(self, name: str, histories: list[list[int]], packed: bool) -> torch.Tensor | bytes | None:
        """Computes log p of the token behind each history, (R, V) float32; None on other ranks than 0.

        Args:
            packed: as safetensors.
        """
        found = self._histories[name].next_rows(histories)
        if found is None or not isinstance(self.smc_runner, ParticleRunner):  # on a CPU all ranks get the logits
            return None
        return save({"found": found.cpu()}) if packed else found

    def smc_count_histories(self, name: str) -> tuple[int, int]:
        """Counts the blocks that are used and those that are free."""
        return self._histories[name].tree.used, self._histories[name].tree.free

    @torch.inference_mode()
    def smc_clear_histories(self, name: str) -> None:
        self._histories[name].clear()

    def smc_close_histories(self, name: str) -> None:
        self._histories.pop(name, None)

    @torch.inference_mode()
    def _without_engine(self, run: Callable[[], torch.Tensor]) -> tuple[bytes | None, str | None]:
        """Calls the model between two steps. What all ranks find is rank 0's to say."""
        why_not = self.smc_runner.interventions.places.why_not
        if why_not is not None:
            return None, f"interchange: {why_not}"
        try:
            found = run()
        except ValueError as error:
            return None, str(error)
        return (save({"found": found.cpu()}) if isinstance(self.smc_runner, ParticleRunner) else None), None

    def smc_put_facts(self, name: str, data: bytes) -> None:
        """Keeps what another model said of a text: `Facts`, by `fastsmc.interventions.to_bytes`."""
        if isinstance(self.smc_runner, ParticleRunner):
            [facts] = from_bytes(data)
            assert isinstance(facts, Facts)  # which nobody else sends
            self.smc_runner.facts[name] = facts

    def smc_drop_facts(self, name: str) -> None:
        if isinstance(self.smc_runner, ParticleRunner):
            self.smc_runner.facts.pop(name, None)

    def smc_take_logits(self, name: str) -> bytes | None:
        """Hands out the logits (T, V) along a text that are kept under a name, as safetensors; None: there are none."""
        if not isinstance(self.smc_runner, ParticleRunner):
            return None
        rows = self.smc_runner.kept_logits.pop(name, None)
        return None if rows is None else save({"logits": torch.stack(rows)})


def keep_behind_windows(specs: dict[str, Any], block_size: int) -> dict[str, Any]:
    """Has vLLM keep the blocks of layers with a sliding window as it keeps those of the other layers.

    vLLM would take a block back once the window has passed it. A group's rows share one block table for all layers, and
    a row of a parent further back may be read again, so blocks stay until nobody's history holds them. The layers go on
    to attend within their windows: that is said to their implementations, not to the KV cache.
    """
    promoted = dict(specs)
    windows = {spec.sliding_window for spec in specs.values() if type(spec) is SlidingWindowSpec}
    for name, spec in specs.items():
        if type(spec) is SlidingWindowSpec and spec.page_size_padded is None:
            window = spec.sliding_window if len(windows) == 1 else None  # one group of layers can name only one
            promoted[name] = replace_as(
                spec,
                FullAttentionSpec,
                drop=("extra_retained_tokens",),
                block_size=block_size,
                sliding_window=window,
            )
    return promoted


def _with_results(output: ModelRunnerOutput, results: Sequence[GroupResult]) -> ModelRunnerOutput:
    output.smc_results = results  # type: ignore[attr-defined]  # added to vLLM's fields
    return output


class SMCGPUWorker(SMCWorkerMixin, Worker):
    """Is vLLM's GPU worker with groups."""

    def load_model(self, *args: Any, **kwargs: Any) -> Any:
        if missing := missing_on_gpu(built_backends()):
            logger.warning(missing)
        return super().load_model(*args, **kwargs)

    def determine_available_memory(self) -> int:
        """Returns vLLM's answer less what groups need beside the KV cache, unless the user has set the cache's size."""
        available = super().determine_available_memory()
        if self.cache_config.kv_cache_memory_bytes:
            return available
        rows, model = self.scheduler_config.max_num_seqs, self.model_config
        assert isinstance(model.dtype, torch.dtype)  # vLLM has resolved its name
        needed = capacity.unprofiled_step_bytes(
            rows, model.get_vocab_size(), model.get_hidden_size(), model.dtype.itemsize
        )
        available -= self.reward_bytes(weights=True)  # vLLM's profile is of its own model alone
        left, warning = capacity.leave_room(available, needed)
        logger.info("%.2f GiB of the device are left to the steps of groups", (available - left) / 2**30)
        if warning is not None:
            logger.warning("max_num_seqs=%d: %s", rows, warning)
        return left
