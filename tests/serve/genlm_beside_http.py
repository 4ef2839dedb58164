"""Runs programs of genlm-control over an AsyncLLM that serves HTTP in this process, and checks both: a script, for it
configures the whole process, and processes start from it.

    VLLM_PLUGINS=fastsmc python genlm_beside_http.py MODEL
"""

from fastsmc.genlm import FastsmcLM, smc  # isort: skip  (before genlm, whose import it contains)
import asyncio
import socket
import sys

import httpx
import numpy as np
import pytest
import torch
import uvicorn
from genlm.control import SMC, BoolFSA, PromptedLLM, direct_token_sampler
from tokenizers import decoders
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

PROMPT = [5, 9, 20, 3]
STEPS = 24


async def complete(client):
    """Asks for greedy texts, each in a request."""

    async def ask(i):
        prompt = [2 + (7 * i + k) % 50 for k in range(5 + 9 * i)]
        body = dict(model="tiny", prompt=prompt, max_tokens=60, temperature=0, ignore_eos=True, logprobs=1)
        response = await client.post("/v1/completions", json=body)
        assert response.status_code == 200, response.text
        (choice,) = response.json()["choices"]
        return choice["text"], choice["logprobs"]["token_logprobs"]

    return await asyncio.gather(*map(ask, range(6)))


def run_program(llm, coerced):
    """Starts a program, whose draws are those of the global generators."""
    np.random.seed(3)
    torch.manual_seed(3)
    sampler = direct_token_sampler(llm * coerced)
    return asyncio.ensure_future(SMC(sampler)(n_particles=12, ess_threshold=0.9, max_tokens=STEPS))


def check_texts(found, alone):
    for (text, log_probs), (text_alone, log_probs_alone) in zip(found, alone, strict=True):
        assert text == text_alone
        np.testing.assert_allclose(log_probs, log_probs_alone, atol=5e-5)  # other rows beside them, float32


async def check_rows(lm, path):
    """Rows are those of transformers without a KV cache."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    histories = [PROMPT, [*PROMPT, 7], [*PROMPT, 7, 8], PROMPT * 20]
    rows = await lm.batch_next_token_logprobs(histories)
    with torch.inference_mode():
        for ids, row in zip(histories, rows, strict=True):
            expected = model(torch.tensor([ids]), use_cache=False).logits[0, -1].log_softmax(-1)
            torch.testing.assert_close(row, expected, atol=5e-5, rtol=0)


async def check_refusals(engine, lm, llm):
    with pytest.raises(ValueError, match=r"must be a fastsmc.LLM; over an AsyncLLM: await FastsmcLM.over\(engine\)"):
        FastsmcLM(engine)
    with pytest.raises(ValueError, match="engine='x': must be vLLM's AsyncLLM"):
        await FastsmcLM.over("x")
    with pytest.raises(ValueError, match="cache_bytes=9: must be at least"):
        await FastsmcLM.over(engine, cache_bytes=9, tokenizer=lm.tokenizer)
    for call in (lm.count_blocks, lm.clear_cache, lm.cleanup, lambda: lm.next_token_logprobs_sync(PROMPT)):
        with pytest.raises(RuntimeError, match="comes from another thread than its event loop"):
            call()
    with pytest.raises(RuntimeError, match="queries come from the event loop in which it was made"):
        await asyncio.to_thread(lambda: asyncio.run(lm.next_token_logprobs(PROMPT)))
    with pytest.raises(ValueError, match="runs over an AsyncLLM"):
        smc(direct_token_sampler(llm), n_particles=4, ess_threshold=0.5, max_tokens=4)
    row = await lm.next_token_logprobs(PROMPT)
    assert torch.equal(await asyncio.to_thread(lm.next_token_logprobs_sync, PROMPT), row)


async def measure_usage(client):
    """Reads how much of the engine's KV cache requests hold."""
    metrics = (await client.get("/metrics")).text.splitlines()
    (usage,) = [line for line in metrics if line.startswith("vllm:kv_cache_usage_perc{")]
    return float(usage.rsplit(" ", 1)[1])


async def check_all(engine, client, path):
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.backend_tokenizer.decoder = decoders.ByteFallback()  # which genlm knows
    lm = await FastsmcLM.over(engine, tokenizer=tokenizer)
    await check_rows(lm, path)
    llm = PromptedLLM(lm, prompt_ids=PROMPT, eos_byte_strings=[b"</s>"])
    await check_refusals(engine, lm, llm)
    coerced = BoolFSA.from_regex("([a-z][A-M])*[a-z]?").coerce(llm, f=b"".join)

    await asyncio.to_thread(lm.clear_cache)
    run_alone, texts_alone = await run_program(llm, coerced), await complete(client)
    # side by side: HTTP is answered while the program runs, and neither changes the other
    await asyncio.to_thread(lm.clear_cache)
    program, texts = run_program(llm, coerced), asyncio.create_task(complete(client))
    n_answered = 0
    while not program.done():
        assert (await client.get("/health")).status_code == 200
        n_answered += 1
    assert n_answered > 3
    run = await program
    assert run.contexts == run_alone.contexts and run.log_ml == pytest.approx(run_alone.log_ml, abs=1e-5)
    assert np.isfinite(run.log_ml) and max(map(len, run.contexts)) > 4
    check_texts(await texts, texts_alone)

    # two programs, one of which is cancelled where it waits for the engine
    first, second, texts = run_program(llm, coerced), run_program(llm, coerced), asyncio.create_task(complete(client))
    while not lm._tasks:
        await asyncio.sleep(0)
    second.cancel()
    assert np.isfinite((await first).log_ml)
    with pytest.raises(asyncio.CancelledError):
        await second
    check_texts(await texts, texts_alone)
    await check_rows(lm, path)

    used, free = await asyncio.to_thread(lm.count_blocks)
    assert used > 0 and used + free == lm.n_blocks
    await asyncio.to_thread(lm.clear_cache)
    assert await asyncio.to_thread(lm.count_blocks) == (0, lm.n_blocks)
    await asyncio.to_thread(lm.cleanup)
    async with asyncio.timeout(30):
        while await measure_usage(client):
            await asyncio.sleep(0.05)


async def main(path):
    options = ["--model", path, "--served-model-name", "tiny", "--dtype=float32", "--enforce-eager"]
    sizes = [
        "--max-model-len=256",
        "--max-num-batched-tokens=256",
        "--max-num-seqs=64",
        "--kv-cache-memory-bytes=16777216",
    ]
    args = make_arg_parser(FlexibleArgumentParser()).parse_args([*options, *sizes])
    async with build_async_engine_client(args) as engine:
        tasks = await engine.get_supported_tasks()
        app = build_app(args, tasks, engine.model_config)
        await init_app_state(engine, app.state, args, tasks)
        with socket.socket() as listening:
            listening.bind(("127.0.0.1", 0))
            server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
            serving = asyncio.create_task(server.serve(sockets=[listening]))
            url = f"http://127.0.0.1:{listening.getsockname()[1]}"
            try:
                async with httpx.AsyncClient(base_url=url, timeout=120) as client:
                    while not server.started:
                        await asyncio.sleep(0.05)
                    await check_all(engine, client, path)
            finally:
                server.should_exit = True
                await serving


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
