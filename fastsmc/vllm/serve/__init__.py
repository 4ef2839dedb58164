"""The HTTP server: vLLM's own, with groups of particles on its routes and `POST /v1/smc` beside them.

plugin     what vLLM loads where VLLM_PLUGINS names fastsmc: sets the engine up, checks requests, adds the routes
launch     `fastsmc serve`
outputs    runs a group request and makes of it what vLLM's handlers know, or an error with its HTTP status
routes     POST /v1/smc, and vLLM's completions and chat completions for requests with `smc_*` keys
schemas    the bodies of /v1/smc
errors     what a client gets when there is no population
metrics    what groups have done, on vLLM's /metrics
"""
