"""Tiny random reward models with tokenizers of letters, and a pooling server that behaves as a test says."""

from __future__ import annotations

import contextlib
import http.server
import json
import math
import threading
import zlib
from pathlib import Path
from typing import Any

import torch

from fastsmc.potentials import State
from fastsmc.potentials.copying import own_copy
from fastsmc.smc import GroupEngine, set_up

#: of the model that draws, by token id
LETTERS = ["<eos>", "a", "b", "c", "d", "e", "f", "."]
#: of reward models
SYMBOLS = ["<pad>", "<step>", "+", "-", "a", "b", "c", "d", "e", "f", ".", "?", "Q", ":"]

EOS = 0
ALL = torch.tensor([True, True])
TEXTS = ["ab.", "c.", "ddefff.", "a.b.c.d.e.f."]


def letters_tokenizer(tokens: list[str] = LETTERS, **special: str):
    """A tokenizer of single characters."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=[]))
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)


def make_reward(path: Path, kind: str, *, labels: int = 2, seed: int = 0, **config: Any) -> Path:
    """Saves a random reward model: `kind` is the name of a class of transformers' Llama or Bert."""
    import transformers

    shape = dict(
        vocab_size=len(SYMBOLS), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, initializer_range=0.6, num_labels=labels, pad_token_id=None, bos_token_id=None,
        eos_token_id=None, dtype="float32",
    )  # fmt: skip
    made = getattr(transformers, "BertConfig" if kind.startswith("Bert") else "LlamaConfig")(**(shape | config))
    torch.manual_seed(seed)
    getattr(transformers, kind)(made).save_pretrained(path)
    letters_tokenizer(SYMBOLS, additional_special_tokens=["<step>"], pad_token="<pad>").save_pretrained(path)
    return path


def letters_engine():
    """What potentials are set up with: the tokenizer of single characters."""
    return GroupEngine(tokenizer=letters_tokenizer(eos_token="<eos>"), vocab_size=len(LETTERS))


def score_of(text) -> float:
    """A number in (0, 1) that hangs on the whole text (or its token ids)."""
    text = text if isinstance(text, str) else "".join(LETTERS[v] for v in text)
    return 0.05 + 0.9 * (zlib.crc32(text.encode()) % 1000) / 1000


def segment_state(rows, finished, segmented=True) -> State:
    """The state of a group: rows of letters, "-" where a particle waited or had ended, "$" the stop token."""
    state, t = State(), max(map(len, rows))
    ids = [[LETTERS.index(c) if c in LETTERS else {"-": -1, "$": EOS}[c] for c in row.ljust(t, "-")] for row in rows]
    state.tokens = torch.tensor(ids)
    state.lengths = (state.tokens >= 0).sum(1)
    state.finished, state.step = torch.tensor(finished), t
    state.segments = torch.zeros(len(rows), dtype=torch.int64) if segmented else None
    state.prompt, state.max_tokens, state.stop_token_ids = [1, 2], 99, frozenset({EOS})
    return state


def start(potential, engine, n=2):
    potential.prepare(engine.tokenizer)
    copy = own_copy(set_up(potential, engine), engine)
    copy.reset(n, [1, 2])
    return copy


def logit(score: float) -> float:
    return math.log(score / (1 - score))


class PoolingServer:
    """Answers as a vLLM pooling server does, in a thread.

    Attributes:
        url: without a route.
        score: text → the probabilities that it is answered with.
        plan: what the next requests get instead, one after the other: a status, "drop", or a function of the answer.
        asked: the bodies of the requests; `headers` theirs.
    """

    def __init__(self, score) -> None:
        self.score, self.plan, self.asked, self.headers = score, [], [], []
        self.hold = threading.Event()  # requests wait for it
        self.hold.set()
        self.began = threading.Event()

    def answer(self, path: str, texts: list[str]) -> dict[str, Any]:
        data = []
        for i, text in enumerate(texts):
            probs = self.score(text)
            field = {"probs": probs} if path.endswith("/classify") else {"data": [[0.5] * len(probs), probs]}
            data.append({"index": i, **field})
        return {"object": "list", "data": data[::-1]}  # in no order


@contextlib.contextmanager
def pooling_server(score):
    server = PoolingServer(score)

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.asked.append(body)
            server.headers.append(dict(self.headers))
            server.began.set()
            server.hold.wait(30)
            step = server.plan.pop(0) if server.plan else None
            if step == "drop":
                self.close_connection = True
                return
            answer: Any = server.answer(self.path, body["input"])
            if callable(step):
                answer = step(answer)
            told = answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # who asked has gone
                self.send_response(step if isinstance(step, int) else 200)
                self.send_header("Content-Length", str(len(told)))
                self.end_headers()
                self.wfile.write(told)

        def log_message(self, *args: Any) -> None:
            pass

    listener = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    listener.daemon_threads = True
    thread = threading.Thread(target=listener.serve_forever, daemon=True)
    thread.start()
    server.url = f"http://127.0.0.1:{listener.server_address[1]}"
    try:
        yield server
    finally:
        server.hold.set()
        listener.shutdown()
        listener.server_close()
        thread.join()


def operators_reward():
    """As an operator's code makes it, for `potentials={"prm": "rewarding:operators_reward"}`."""
    from fastsmc.potentials import PoolingReward

    return PoolingReward("http://127.0.0.1:9/classify")
