"""The only place that touches vLLM: user face (llm), request, messages, scheduler, worker, particle runner, compat."""
