"""vLLM's CPU worker with groups, in a module of its own.

`vllm.v1.worker.cpu_worker` puts stubs in the place of torch.cuda's streams and events when it is imported, so nothing
that a CUDA machine imports may import this module.
"""

from __future__ import annotations

from vllm.v1.worker.cpu_worker import CPUWorker

from fastsmc.vllm.worker import SMCWorkerMixin


class SMCCPUWorker(SMCWorkerMixin, CPUWorker):
    """vLLM's CPU worker with groups."""
