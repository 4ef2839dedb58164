"""vLLM's workers with a particle runner beside the model runner.

The particle runner is made at start-up, as soon as the model and the KV cache are there, so that what it cannot do is
refused then. A particle-only step schedules no tokens for vLLM, so its result is returned from `execute_model` itself,
in every process mode. Of several tensor-parallel ranks vLLM takes the first one's result (`fastsmc.vllm.ranks`).
"""

from __future__ import annotations

from typing import Any

import cloudpickle
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.worker.gpu_worker import Worker

from fastsmc.vllm import attention, compat
from fastsmc.vllm.ranks import Follower, make_runner
from fastsmc.vllm.runner import ParticleRunner


class SMCWorkerMixin:
    smc_runner: ParticleRunner | Follower

    def load_model(self, *args: Any, **kwargs: Any) -> Any:
        compat.check_attention()
        attention.register()
        return super().load_model(*args, **kwargs)

    def compile_or_warm_up_model(self) -> Any:
        times = super().compile_or_warm_up_model()
        self.smc_runner = make_runner(self.model_runner)
        return times

    def execute_model(self, scheduler_output: Any) -> Any:
        tick = getattr(scheduler_output, "smc", None)
        if tick is not None and (tick.drop or tick.groups):
            self.smc_runner.drop(tick.drop)
            if tick.groups:
                output = ModelRunnerOutput(req_ids=[], req_id_to_index={})
                output.smc_results = self.smc_runner.run(tick)
                return output
        return super().execute_model(scheduler_output)

    def smc_put_potential(self, name: str, potential: Any) -> str | None:
        """Keeps a potential (an object, or cloudpickle bytes of one); None, or why it could not be set up.

        Only tensor-parallel rank 0 unpickles it and sets it up; the others are asked too, since vLLM asks all.
        """
        if isinstance(self.smc_runner, Follower):
            return None
        try:
            if isinstance(potential, bytes):
                potential = cloudpickle.loads(potential)
            self.smc_runner.put_potential(name, potential)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return None

    def smc_drop_potential(self, name: str) -> None:
        if not isinstance(self.smc_runner, Follower):
            self.smc_runner.drop_potential(name)


class SMCGPUWorker(SMCWorkerMixin, Worker):
    """vLLM's GPU worker with groups."""
