"""What fastsmc uses of vLLM, by name. `compat` probes it at start-up, scripts/check_vllm.py in unpacked wheels.

    CALLS      what is called, overridden or constructed, with the parameters that are passed or passed on
    MEMBERS    attributes that are read or set, of what vLLM hands over
    ONLY       modules that only one platform may import
    BEHAVIOUR  what must not only be there, but do the same: the script keeps a hash of its source per version
    FIELDS     classes in which a new field may be a new feature, which groups do not know until somebody has looked

This module imports nothing, so that the script can load it where neither vLLM nor PyTorch is. A test holds every import
from vllm in fastsmc/ against CALLS and MEMBERS.
"""

#: module:name → parameters. A list that begins with "self" is the beginning of the signature, in this order.
CALLS = {
    # the user face
    "vllm.entrypoints.llm:LLM": (),
    "vllm.entrypoints.llm:LLM.generate": ("prompts", "sampling_params"),
    "vllm.entrypoints.llm:LLM.get_tokenizer": (),
    "vllm.entrypoints.llm:LLM.collective_rpc": ("method", "args"),
    "vllm.entrypoints.llm:LLM._run_engine": (),
    "vllm.renderers.base:BaseRenderer.render_cmpl": ("prompts",),
    "vllm.v1.engine.llm_engine:LLMEngine.add_request": ("self", "request_id", "prompt", "params"),
    "vllm.v1.engine.llm_engine:LLMEngine.has_unfinished_requests": (),
    "vllm.v1.engine.llm_engine:LLMEngine.step": (),
    "vllm.v1.engine.llm_engine:LLMEngine.abort_request": ("request_ids",),
    "vllm.sampling_params:SamplingParams": (
        "max_tokens",
        "temperature",
        "ignore_eos",
        "stop_token_ids",
        "seed",
        "extra_args",
    ),
    "vllm.sampling_params:SamplingParams.clone": (),
    # the platform, the attention backends
    "vllm.platforms:current_platform": (),
    "vllm.platforms.interface:Platform.is_cpu": (),
    "vllm.platforms.interface:Platform.is_cuda": (),
    "vllm.v1.attention.backends.registry:register_backend": ("backend", "class_path"),
    "vllm.v1.attention.selector:_cached_get_attn_backend": (),
    "vllm.v1.attention.backend:AttentionMetadataBuilder.build": ("common_prefix_len", "common_attn_metadata"),
    "vllm.v1.attention.backends.cpu_attn:CPUAttentionBackend.get_impl_cls": (),
    "vllm.v1.attention.backends.cpu_attn:CPUAttentionBackendImpl.forward": (
        *("self", "layer", "query", "key", "value", "kv_cache", "attn_metadata", "output"),
    ),
    "vllm.envs:VLLM_CPU_ATTN_SPLIT_KV": (),
    "vllm._custom_ops:cpu_attn_reshape_and_cache": (
        *("key", "value", "key_cache", "value_cache", "slot_mapping", "isa"),
    ),
    "vllm.v1.attention.backends.flash_attn:FlashAttentionBackend.get_impl_cls": (),
    "vllm.v1.attention.backends.flash_attn:FlashAttentionImpl.forward": (
        *("self", "layer", "query", "key", "value", "kv_cache", "attn_metadata", "output"),
    ),
    "vllm.v1.attention.backends.triton_attn:TritonAttentionBackend.get_impl_cls": (),
    "vllm.v1.attention.backends.triton_attn:TritonAttentionImpl.forward": (
        *("self", "layer", "query", "key", "value", "kv_cache", "attn_metadata", "output"),
    ),
    # the scheduler
    "vllm.v1.core.sched.scheduler:Scheduler.schedule": (),
    "vllm.v1.core.sched.scheduler:Scheduler.add_request": ("self", "request"),
    "vllm.v1.core.sched.scheduler:Scheduler.update_from_output": (
        *("self", "scheduler_output", "model_runner_output"),
    ),
    "vllm.v1.core.sched.scheduler:Scheduler.reset_prefix_cache": ("self", "reset_running_requests"),
    "vllm.v1.core.sched.scheduler:Scheduler._preempt_request": ("self", "request"),
    "vllm.v1.core.sched.scheduler:Scheduler._free_request": ("self", "request"),
    "vllm.v1.core.sched.async_scheduler:AsyncScheduler": (),
    "vllm.v1.core.sched.request_queue:RequestQueue.add_request": ("self", "request"),
    "vllm.v1.core.sched.request_queue:RequestQueue.remove_requests": ("self", "requests"),
    "vllm.v1.core.sched.output:SchedulerOutput.make_empty": (),
    "vllm.v1.core.kv_cache_manager:KVCacheManager.get_block_ids": ("self", "request_id"),
    "vllm.v1.core.kv_cache_manager:KVCacheManager.estimate_cached_tokens": ("self", "request"),
    "vllm.v1.core.block_pool:BlockPool.get_new_blocks": ("self", "num_blocks"),
    "vllm.v1.core.block_pool:BlockPool.free_blocks": ("self", "ordered_blocks"),
    "vllm.v1.core.block_pool:BlockPool.get_num_free_blocks": (),
    "vllm.v1.request:Request.append_output_token_ids": ("self", "token_ids"),
    "vllm.v1.request:Request.get_finished_reason": (),
    "vllm.v1.request:Request.take_events": (),
    "vllm.v1.request:Request.take_prefill_stats": (),
    "vllm.v1.metrics.stats:PrefillStats.finalize": ("self", "num_cached_tokens"),
    "vllm.v1.engine:EngineCoreOutput": (
        *("request_id", "new_token_ids", "finish_reason", "stop_reason", "events", "prefill_stats"),
        *("kv_transfer_params", "trace_headers"),
    ),
    "vllm.v1.engine:EngineCoreOutputs": ("outputs",),
    # the worker
    "vllm.v1.worker.gpu_worker:Worker.load_model": (),
    "vllm.v1.worker.gpu_worker:Worker.determine_available_memory": (),
    "vllm.v1.worker.gpu_worker:Worker.compile_or_warm_up_model": (),
    "vllm.v1.worker.gpu_worker:Worker.execute_model": ("self", "scheduler_output"),
    "vllm.v1.worker.gpu_worker:Worker.sample_tokens": ("grammar_output",),
    "vllm.v1.worker.cpu_worker:CPUWorker.load_model": (),
    "vllm.v1.worker.cpu_worker:CPUWorker.determine_available_memory": (),
    "vllm.v1.worker.cpu_worker:CPUWorker.compile_or_warm_up_model": (),
    "vllm.v1.worker.cpu_worker:CPUWorker.execute_model": ("self", "scheduler_output"),
    "vllm.v1.worker.cpu_worker:CPUWorker.sample_tokens": ("grammar_output",),
    "vllm.v1.outputs:ModelRunnerOutput": ("req_ids", "req_id_to_index"),
    "vllm.v1.worker.cpu_worker:CPUWorker._should_warm_up_model": (),
    "vllm.v1.worker.cpu_worker:CPUWorker.get_kv_cache_spec": (),
    "vllm.v1.worker.cpu_model_runner:CPUModelRunner.warming_up_model": (),
    "vllm.utils.cpu_resource_utils:get_allowed_cpu_list": (),
    "vllm.utils.cpu_resource_utils:get_memory_node_info": ("node_id",),
    "vllm.utils.cpu_resource_utils:get_visible_memory_node": (),
    "vllm.v1.kv_cache_interface:KVCacheSpec.max_memory_usage_bytes": ("self", "vllm_config"),
    "vllm.distributed.parallel_state:get_world_group": (),
    "vllm.distributed.parallel_state:GroupCoordinator.barrier": (),
    "vllm.distributed:get_tp_group": (),
    "vllm.distributed.parallel_state:GroupCoordinator.broadcast_object": ("self", "obj", "src"),
    "vllm.forward_context:set_forward_context": (
        *("attn_metadata", "vllm_config", "num_tokens", "slot_mapping", "cudagraph_runtime_mode", "batch_descriptor"),
        "is_padding",
    ),
    "vllm.forward_context:get_forward_context": (),
    "vllm.forward_context:BatchDescriptor": ("num_tokens",),
    "vllm.v1.worker.gpu.cudagraph_utils:CudaGraphManager.dispatch": (
        *("self", "num_reqs", "num_tokens", "uniform_token_count", "num_active_loras"),
    ),
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner._model_forward": (*("input_ids", "positions"),),
    "vllm.v1.attention.backend:CommonAttentionMetadata": (
        *("query_start_loc", "query_start_loc_cpu", "seq_lens", "num_reqs", "num_actual_tokens", "max_query_len"),
        *("max_seq_len", "seq_lens_cpu_upper_bound", "block_table_tensor", "slot_mapping", "causal"),
    ),
    "vllm.v1.worker.utils:AttentionGroup.get_metadata_builder": (),
    "vllm.config.model:ModelConfig.get_vocab_size": (),
    "vllm.config.model:ModelConfig.get_hidden_size": (),
    "vllm.config.model:ModelConfig.get_sliding_window": (),
}

_IMPL = (
    *("scale", "num_heads", "num_kv_heads", "head_size", "kv_cache_dtype", "attn_type", "alibi_slopes"),
    *("logits_soft_cap", "sinks", "sliding_window"),
)

#: module:class → attributes: of the class, or set by one of its methods
MEMBERS = {
    "vllm.entrypoints.llm:LLM": ("llm_engine", "model_config", "renderer", "request_counter"),
    "vllm.v1.engine.llm_engine:LLMEngine": ("engine_core", "vllm_config"),
    "vllm.v1.engine.core_client:InprocClient": ("engine_core",),
    "vllm.v1.engine.core:EngineCore": ("model_executor", "scheduler"),
    "vllm.v1.executor.uniproc_executor:UniProcExecutor": ("driver_worker",),
    "vllm.outputs:RequestOutput": ("request_id", "finished", "outputs", "kv_transfer_params"),
    "vllm.sampling_params:RequestOutputKind": ("CUMULATIVE", "FINAL_ONLY"),
    "vllm.sampling_params:SamplingParams": (
        *("output_kind", "all_stop_token_ids"),
        # of request.GroupRequest.parse, which refuses any but the neutral value
        *("n", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "min_tokens"),
        *("stop", "logprobs", "prompt_logprobs", "logit_bias", "allowed_token_ids", "bad_words", "structured_outputs"),
        *("prompt_logprob_token_ids", "logprob_token_ids", "thinking_token_budget", "repetition_detection"),
    ),
    "vllm.forward_context:ForwardContext": ("attn_metadata", "slot_mapping"),
    "vllm.v1.attention.backend:AttentionType": ("DECODER",),
    "vllm.v1.attention.backends.registry:AttentionBackendEnum": ("CPU_ATTN", "FLASH_ATTN", "TRITON_ATTN"),
    "vllm.v1.attention.backends.cpu_attn:CPUAttentionBackendImpl": (*_IMPL, "is_fp8_kv_cache"),
    "vllm.v1.attention.backends.flash_attn:FlashAttentionImpl": (*_IMPL, "dcp_world_size"),
    "vllm.v1.attention.backends.triton_attn:TritonAttentionImpl": (*_IMPL, "dcp_world_size"),
    "vllm.model_executor.layers.attention.attention:Attention": (
        *("impl", "kv_cache", "dtype", "attn_backend", "head_size", "head_size_v"),
    ),
    "vllm.model_executor.layers.linear:LinearBase": ("input_size", "output_size"),
    "vllm.v1.core.sched.scheduler:Scheduler": (
        *("running", "waiting", "kv_holding_waiting", "requests", "finished_req_ids", "kv_cache_manager"),
        *("kv_cache_config", "pause_state", "max_num_running_reqs", "vllm_config"),
    ),
    "vllm.v1.core.sched.interface:PauseState": ("PAUSED_ALL",),
    "vllm.v1.core.sched.output:SchedulerOutput": ("num_scheduled_tokens", "total_num_scheduled_tokens"),
    "vllm.v1.core.kv_cache_manager:KVCacheManager": ("block_pool",),
    "vllm.v1.core.block_pool:BlockPool": ("num_gpu_blocks",),
    "vllm.v1.core.kv_cache_utils:KVCacheBlock": ("block_id",),
    "vllm.v1.request:Request": (
        *("request_id", "sampling_params", "prompt_token_ids", "prompt_embeds", "num_prompt_tokens", "resumable"),
        *("lora_request", "arrival_time", "status", "stop_reason", "client_index", "trace_headers"),
        *("num_computed_tokens", "num_output_placeholders", "num_in_flight_tokens"),
    ),
    "vllm.v1.request:RequestStatus": (*("RUNNING", "FINISHED_STOPPED", "FINISHED_LENGTH_CAPPED", "FINISHED_ERROR"),),
    "vllm.v1.worker.gpu_worker:Worker": ("model_runner",),
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner": (
        *("model", "attn_groups", "kv_cache_config", "vllm_config", "cudagraph_manager", "input_buffers"),
    ),
    "vllm.v1.worker.gpu.cudagraph_utils:CudaGraphManager": ("use_breakable_cg",),
    "vllm.v1.worker.gpu.cudagraph_utils:BatchExecutionDescriptor": (
        *("cg_mode", "num_tokens", "num_reqs", "uniform_token_count", "max_query_len"),
    ),
    "vllm.v1.worker.gpu.input_batch:InputBuffers": ("input_ids", "positions", "is_padding"),
    "vllm.v1.worker.gpu.async_utils:AsyncOutput": ("model_runner_output",),
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner": ("model", "attn_groups", "kv_cache_config", "vllm_config"),
    "vllm.v1.worker.utils:AttentionGroup": ("layer_names", "kernel_block_size"),
    "vllm.v1.outputs:ModelRunnerOutput": ("sampled_token_ids",),
    "vllm.v1.outputs:AsyncModelRunnerOutput": (),
    "vllm.distributed.parallel_state:GroupCoordinator": ("rank_in_group", "world_size", "cpu_group"),
    "vllm.utils.cpu_resource_utils:LogicalCPUInfo": ("id", "physical_core", "numa_node"),
    "vllm.utils.cpu_resource_utils:MemoryNodeInfo": ("available_memory",),
    "vllm.v1.kv_cache_interface:KVCacheConfig": ("kv_cache_groups", "num_blocks"),
    "vllm.v1.kv_cache_interface:KVCacheGroupSpec": ("kv_cache_spec",),
    "vllm.v1.kv_cache_interface:FullAttentionSpec": (
        *("block_size", "sliding_window", "attention_chunk_size", "non_causal"),
    ),
    "vllm.config.vllm:VllmConfig": (
        *("model_config", "cache_config", "parallel_config", "scheduler_config", "compilation_config", "lora_config"),
        *("speculative_config", "kv_transfer_config", "ec_transfer_config", "watermark_config", "diffusion_config"),
        *("aux_output_config", "additional_config", "use_v2_model_runner"),
    ),
    "vllm.config.model:ModelConfig": (
        *("model", "max_model_len", "skip_tokenizer_init", "tokenizer", "tokenizer_revision", "trust_remote_code"),
        *("runner_type", "is_encoder_decoder", "is_diffusion", "uses_mrope", "rswa_window", "logits_processors"),
        *("supports_multimodal_inputs", "enable_prompt_embeds", "return_sampling_mask"),
    ),
    "vllm.config.cache:CacheConfig": (
        *("num_gpu_blocks", "block_size", "kv_sharing_fast_prefill", "gpu_memory_utilization"),
        *("kv_cache_memory_bytes", "num_gpu_blocks_override"),
    ),
    "vllm.config:CacheConfig": ("gpu_memory_utilization",),
    "vllm.engine.arg_utils:EngineArgs": (),
    "vllm.v1.attention.backend:AttentionImpl": (),
    "vllm.config.scheduler:SchedulerConfig": ("max_num_seqs", "max_num_batched_tokens", "async_scheduling"),
    "vllm.config.parallel:ParallelConfig": (
        *("pipeline_parallel_size", "data_parallel_size", "decode_context_parallel_size"),
        *("prefill_context_parallel_size", "enable_hc_sp", "enable_elastic_ep", "use_ubatching"),
    ),
    "vllm.config.compilation:CompilationConfig": ("static_forward_context", "pass_config"),
    "vllm.config.compilation:PassConfig": ("fuse_attn_quant",),
    "vllm.config.compilation:CUDAGraphMode": ("NONE", "PIECEWISE"),
    "vllm.config.aux_output:AuxOutputConfig": ("enabled",),
}

#: module → the platform on which alone it is probed. `cpu_worker` puts stubs in the place of torch.cuda's functions.
ONLY = {
    "vllm.v1.worker.cpu_worker": "cpu",
    "vllm.v1.worker.cpu_model_runner": "cpu",
    "vllm.v1.worker.gpu.model_runner": "cuda",
    "vllm.v1.worker.gpu.cudagraph_utils": "cuda",
    "vllm.v1.worker.gpu.input_batch": "cuda",
    "vllm.v1.worker.gpu.async_utils": "cuda",
    "vllm.v1.attention.backends.flash_attn": "cuda",
    "vllm.v1.attention.backends.triton_attn": "cuda",
}

#: functions and classes whose source is hashed, and why they are
BEHAVIOUR = {
    "vllm.v1.core.sched.scheduler:Scheduler.schedule": "runs on a queue from which groups are hidden",
    "vllm.v1.core.sched.scheduler:Scheduler.add_request": "a group request enters as any other",
    "vllm.v1.core.sched.scheduler:Scheduler.update_from_output": "gets no token of a group request, and empty results",
    "vllm.v1.core.sched.scheduler:Scheduler._preempt_request": "ends a group's epoch and frees its prompt's blocks",
    "vllm.v1.core.sched.scheduler:Scheduler._free_request": "every way out passes it once",
    "vllm.v1.core.sched.scheduler:Scheduler.reset_prefix_cache": "preempts all that runs",
    "vllm.v1.core.sched.async_scheduler:AsyncScheduler": "counts placeholders, which we set to 0 after a prefill",
    "vllm.v1.core.sched.output:SchedulerOutput.make_empty": "a particle-only step schedules nothing",
    "vllm.v1.core.kv_cache_manager:KVCacheManager.estimate_cached_tokens": "of the output's statistics",
    "vllm.v1.core.block_pool:BlockPool.get_new_blocks": "hands out blocks outside any request",
    "vllm.v1.core.block_pool:BlockPool.free_blocks": "takes them back",
    "vllm.v1.request:Request": "its counters and what ends it",
    "vllm.v1.engine.core:EngineCore.step": "runs the model for a step of 0 tokens too",
    "vllm.v1.engine.core:EngineCore.step_with_batch_queue": "takes execute_model's result of a step of 0 tokens",
    "vllm.v1.executor.uniproc_executor:UniProcExecutor": "RPC and execute_model on one thread, in one order",
    "vllm.v1.worker.gpu_worker:Worker.execute_model": "is not reached by a particle-only step",
    "vllm.v1.worker.gpu_worker:Worker.compile_or_warm_up_model": "the KV cache is there when it returns",
    "vllm.v1.worker.gpu_worker:Worker.determine_available_memory": "bytes for the KV cache",
    "vllm.v1.worker.cpu_worker:CPUWorker.determine_available_memory": "bytes for the KV cache",
    "vllm.v1.worker.cpu_worker:CPUWorker.compile_or_warm_up_model": "the KV cache is there when it returns",
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner.execute_model": "how the model is called; we call it likewise",
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner.prepare_inputs": "tokens and positions begin the input buffers",
    "vllm.v1.worker.gpu.cudagraph_utils:CudaGraphManager": "which steps replay which graphs, and what captured them",
    "vllm.v1.worker.gpu.cudagraph_utils:ModelCudaGraphManager": "what its graphs read",
    "vllm.v1.worker.gpu.async_utils:AsyncOutput": "hands out the model_runner_output that riders' results are added to",
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner._model_forward": "how the model is called; we call it likewise",
    "vllm.v1.worker.utils:AttentionGroup": "kernel block size and metadata builders",
    "vllm.v1.worker.utils:allocate_kv_cache": "the KV cache's shapes and strides, and what lies beside it in a block",
    "vllm.v1.worker.utils:bind_kv_cache_to_layers": "puts the KV cache where we read it",
    "vllm.forward_context:set_forward_context": "what a forward pass outside the runner needs",
    "vllm.v1.attention.backend:CommonAttentionMetadata": "what the builders read of our rows",
    "vllm.v1.attention.backends.cpu_attn:CPUAttentionMetadataBuilder.build": "metadata of our rows",
    "vllm.v1.attention.backends.flash_attn:FlashAttentionMetadataBuilder.build": "metadata of our rows",
    "vllm.v1.attention.backends.triton_attn:TritonAttentionMetadataBuilder.build": "metadata of our rows",
    "vllm.v1.attention.backends.cpu_attn:CPUAttentionBackendImpl.forward": "writes the KV cache, then reads it",
    "vllm.v1.attention.backends.flash_attn:FlashAttentionImpl.forward": "does not write the KV cache",
    "vllm.v1.attention.backends.triton_attn:TritonAttentionImpl.forward": "does not write the KV cache",
    "vllm.v1.attention.backends.registry:register_backend": "our subclasses under vLLM's names",
    "vllm.model_executor.layers.attention.attention:Attention.forward": "reaches forward of the implementation",
    "vllm.model_executor.layers.attention.attention:unified_attention_with_output": "what it passes",
    "vllm.model_executor.layers.attention.attention:set_default_quant_scales": "sets _q_scale, _k_scale, _v_scale",
    "vllm.model_executor.layers.logits_processor:LogitsProcessor": "logits on every rank, without the padding",
    "vllm.entrypoints.common.offline:OfflineInferenceMixin._run_engine": "outputs of requests, in order",
    "vllm.v1.engine.output_processor:RequestState.make_request_output": "brings kv_transfer_params to the user",
    "vllm.config.model:ModelConfig._supports_multimodal_inputs": "whether the model takes inputs_embeds",
}

FIELDS = (
    "vllm.sampling_params:SamplingParams",
    "vllm.config.vllm:VllmConfig",
    "vllm.config.model:ModelConfig",
    "vllm.config.cache:CacheConfig",
    "vllm.config.parallel:ParallelConfig",
    "vllm.config.scheduler:SchedulerConfig",
    "vllm.config.compilation:PassConfig",
    "vllm.v1.kv_cache_interface:FullAttentionSpec",
    "vllm.v1.attention.backend:CommonAttentionMetadata",
    "vllm.v1.core.sched.output:SchedulerOutput",
    "vllm.v1.outputs:ModelRunnerOutput",
    "vllm.v1.engine:EngineCoreOutput",
)
