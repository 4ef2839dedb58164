"""The only place that touches vLLM: user face (llm), admission (lead), scheduler, worker, particle runner, compat."""
