"""The layers above by themselves against full forward passes with hooks: logits, and the gradients of a DAS step."""

import errno
from functools import partial

import pytest
import torch
from hooked import LAYERS, VOCAB, H, hooked_logits, make_trunk, states
from tiny import make_windowed
from torch.nn import functional as F

from fastsmc.alignment import BoundlessDAS
from fastsmc.alignment.frozen import Frozen, Place, without_gradients
from fastsmc.models import smollm2
from fastsmc.trunk import Trunk

LENGTHS, SOURCE_LENGTHS = (9, 9, 7, 12, 12), (9, 5, 7, 12, 3)
PLACES = [
    Place([3, 8, 0, 5, 11, 6], [8, 4, 0, 3, 2, 8]),  # ragged; of the first position, too
    Place([8, 8, 6, 11, 11, 8], [8, 4, 6, 11, 2, 8]),  # the last ones
    Place([2] * 6, [2] * 6),
]


def prompts(lengths, seed, vocab=VOCAB):
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(0, vocab, (n,), generator=generator).tolist() for n in lengths]
    return [*rows, rows[0]]  # two pairs share a prompt


BASES, SOURCES = prompts(LENGTHS, 0), prompts(SOURCE_LENGTHS, 1)


def filled(trunk, bases, sources, layers, places, max_bytes=1 << 30, **more):
    frozen = Frozen(trunk, bases, sources, layers, places, max_bytes=max_bytes, **more)
    frozen.fill()
    return frozen


def step_gradients(das, logits, labels):
    loss = F.cross_entropy(logits, labels) + das._b
    return torch.autograd.grad(loss, [das._turn, das._b])


def check_step(frozen, bases, sources, layer, place, rows, das, labels):
    """Compares a step over what is frozen with full forward passes, one per pair."""
    trunk, at, wanted = frozen.trunk, frozen.places[place], []
    with without_gradients(trunk.model):
        hb, hs = frozen.states(layer, place, rows)
        found = frozen.logits(layer, place, das.swap(hb, hs, 5.0), rows)
        for row in rows:
            source = states(trunk, sources[row], layer)[at.source[row]][None]
            change = partial(das.swap, hs=source, temperature=5.0)
            wanted.append(hooked_logits(trunk, bases[row], layer, at.base[row], change))
        torch.testing.assert_close(found, torch.stack(wanted), atol=1e-3, rtol=1e-4)
        each = [step_gradients(das, logits, labels) for logits in (found, torch.stack(wanted))]
        for ours, theirs in zip(*each, strict=True):
            assert float((ours - theirs).norm() / theirs.norm()) < 1e-4


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_gradients_are_those_of_a_full_pass(attention):
    trunk = make_trunk(attention=attention)
    frozen = filled(trunk, BASES, SOURCES, [2, 0, LAYERS - 1], PLACES)
    labels = torch.tensor([3, 1, 4, 1, 5, 9])
    for layer in (0, 2, LAYERS - 1):
        for place in range(len(PLACES)):
            if layer == LAYERS - 1 and place != 1:
                continue  # nothing that the last layer puts out before the last position is read again
            for rank in (None, 4):
                das = BoundlessDAS(H, seed=1, rank=rank)
                das._turn.data = 0.3 * torch.randn(das._turn.shape, generator=torch.Generator().manual_seed(2))
                check_step(frozen, BASES, SOURCES, layer, place, range(6), das, labels)
    subset = [4, 1]  # another batch of the same store
    check_step(frozen, BASES, SOURCES, 2, 0, subset, BoundlessDAS(H), labels[:2])
    assert all(parameter.requires_grad and parameter.grad is None for parameter in trunk.model.parameters())


def test_gradients_on_a_real_model():
    """Four pairs: of fewer rows MKL sums the product with 49152 logits' gradients to 1.5e-4 only."""
    trunk = Trunk.load(smollm2())
    base, source = (prompts((20, 17, 12), seed, 40000) for seed in (3, 4))
    frozen = filled(trunk, base, source, [15], [Place([18, 16, 11, 19], [19, 10, 11, 0])])
    labels = torch.tensor([500, 7, 9, 40])
    check_step(frozen, base, source, 15, 0, range(4), BoundlessDAS(trunk.hidden_size), labels)


def test_store_is_of_distinct_prompts_and_says_its_size():
    trunk, said = make_trunk(), []
    frozen = filled(trunk, BASES, SOURCES, [1, 2], PLACES, say=said.append)
    kept, before = 0, 0
    for prompt in {tuple(ids) for ids in BASES}:
        at = [p for place in PLACES for p, ids in zip(place.base, BASES, strict=True) if tuple(ids) == prompt]
        kept, before = kept + len(prompt) - min(at), before + max(at)
    kept += len({(tuple(ids), p) for place in PLACES for p, ids in zip(place.source, SOURCES, strict=True)})
    assert frozen.n_bytes == 4 * (2 * kept * H + 2 * 2 * before * 2 * 8)  # two layers above 1, two heads of 8
    assert said == [f"fastsmc: 5 distinct bases and 5 sources take {frozen.n_bytes / 2**20:.1f} MiB of memory on cpu"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_store_on_disk_says_the_same(tmp_path, dtype):
    trunk, said = make_trunk(dtype=dtype), []
    memory = filled(trunk, BASES, SOURCES, [1], PLACES)
    disk = filled(trunk, BASES, SOURCES, [1], PLACES, max_bytes=memory.n_bytes - 1, directory=tmp_path, say=said.append)
    assert disk.on_disk and not memory.on_disk and said[0].endswith(f"above max_cache_bytes={memory.n_bytes - 1}")
    assert not list(tmp_path.iterdir())  # nothing is left, whatever becomes of the process
    for place in range(len(PLACES)):
        ours, theirs = disk.states(1, place, range(6)), memory.states(1, place, range(6))
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        with torch.no_grad():
            logits = [one.logits(1, place, ours[1], range(6)) for one in (disk, memory)]
        assert torch.equal(*logits)


def test_windows_and_unknown_families(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    long = [list(range(8)) * 6]  # 48 tokens, more than the window
    windowed = Trunk.load(make_windowed(tmp_path / "mistral", 8, "mistral"))
    with pytest.raises(
        ValueError, match="MistralForCausalLM: has a sliding window of 40 tokens, and bases have up to 48"
    ):
        filled(windowed, long, long, [0], [Place([47], [47])])
    filled(windowed, [long[0][:40]], long, [0], [Place([39], [39])])  # all within
    gemma = Trunk.load(make_windowed(tmp_path / "gemma3", 8, "gemma3"))
    with pytest.raises(ValueError, match="Gemma3ForCausalLM: its layers are not known"):
        filled(gemma, [[1, 2, 3]], [[1, 2, 3]], [0], [Place([2], [2])])
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_positions=16, n_embd=16, n_layer=2, n_head=2))
    with pytest.raises(ValueError, match="GPT2LMHeadModel: has no rotary_emb"):
        filled(Trunk(gpt2), [[1, 2, 3]], [[1, 2, 3]], [0], [Place([2], [2])])


def test_layers_that_differ_by_themselves_are_refused():
    trunk = make_trunk()
    trunk.layers[3].register_forward_hook(lambda module, inputs, output: output + (output.shape[1] > 2))
    with pytest.raises(
        ValueError, match="LlamaForCausalLM: its layers are not known: those above 1 by themselves give"
    ):
        filled(trunk, BASES, SOURCES, [1], PLACES[1:2])


def test_states_that_are_not_finite_are_named():
    trunk = make_trunk()
    trunk.model.model.embed_tokens.weight.data[7] = float("nan")
    with pytest.raises(ValueError, match="source \\[1, 7, 2\\]…: layer 1 puts out NaN or an infinity at position 2"):
        filled(trunk, [[1, 2, 3]], [[1, 7, 2]], [1], [Place([2], [2])])


def test_no_room_on_disk(monkeypatch, tmp_path):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10})())
    with pytest.raises(ValueError, match="has 0.0 MiB free, the cache takes"):
        Frozen(make_trunk(), BASES, SOURCES, [1], PLACES, max_bytes=0, directory=tmp_path)
    monkeypatch.undo()

    def full(handle, begin, n):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)  # others have filled it since
    with pytest.raises(ValueError, match="cannot hold the cache, .* MiB: .*No space left on device"):
        Frozen(make_trunk(), BASES, SOURCES, [1], PLACES, max_bytes=0, directory=tmp_path)
    assert not list(tmp_path.iterdir())
