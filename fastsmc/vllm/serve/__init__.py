"""What makes a vLLM server one of groups: routes, metrics, the page."""
