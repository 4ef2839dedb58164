"""What `smc` takes: prompts of every form, potentials and exact samples for each. What it refuses before it runs."""

import numpy as np
import pytest
import torch
from tiny import make_llama

from fastsmc import Potential, SMCError, SMCParams
from fastsmc.arguments import read_each, read_exact, read_prompts
from fastsmc.hf import HFEngine
from fastsmc.potentials import Infill, Lexicon

V = 8
PARAMS = SMCParams(n_particles=4, max_tokens=2)


class Letters:
    """A tokenizer of "abc…" whose texts begin with token 0."""

    def encode(self, text):
        return [0, *(ord(c) - 96 for c in text)]


class Encoding(dict):
    """As what a tokenizer returns."""


ONE = [
    "ab",
    [0, 1, 2],
    (0, 1, 2),
    range(3),
    np.arange(3),
    np.arange(3, dtype=np.uint8),
    torch.arange(3),
    torch.arange(3, dtype=torch.int32),
    [np.int64(0), torch.tensor(1), 2],
    {"prompt": "ab"},
    {"prompt": "x", "prompt_token_ids": [0, 1, 2]},
    {"prompt_token_ids": np.arange(3), "multi_modal_data": None},
    Encoding(input_ids=[0, 1, 2], attention_mask=[1, 1, 1]),
    Encoding(input_ids=torch.arange(3)[None], attention_mask=torch.ones(1, 3, dtype=torch.int64)),
]


@pytest.mark.parametrize("prompt", ONE, ids=range(len(ONE)))
def test_one_prompt(prompt):
    assert read_prompts(prompt, Letters(), V) == ([[0, 1, 2]], True)
    assert read_prompts([prompt, "b"], Letters(), V) == ([[0, 1, 2], [0, 2]], False)


@pytest.mark.parametrize(
    ("prompts", "ids"),
    [
        ([], []),
        ((), []),
        (["a"], [[0, 1]]),
        (("a", [3], {"prompt": "b"}), [[0, 1], [3], [0, 2]]),
        (np.arange(4).reshape(2, 2), [[0, 1], [2, 3]]),
        (torch.arange(2)[None], [[0, 1]]),
        (Encoding(input_ids=[[1, 2], [3]]), [[1, 2], [3]]),
        (Encoding(input_ids=[[1, 2]]), [[1, 2]]),
        (
            Encoding(input_ids=torch.tensor([[7, 1], [2, 3]]), attention_mask=torch.tensor([[0, 1], [1, 1]])),
            [[1], [2, 3]],
        ),
    ],
)
def test_several_prompts(prompts, ids):
    assert read_prompts(prompts, Letters(), V) == (ids, False)


@pytest.mark.parametrize(
    ("prompt", "why"),
    [
        ([1, V], "beyond the vocabulary"),
        ([-1], "-1: is not a token id"),
        ([1, 2.5], "2.5: is not a token id"),
        ([True, 1], "True: is not a token id"),
        (np.array([1.0]), "1.0: is not a token id"),
        (np.array([True]), "True: is not a token id"),
        (np.array(3), "0 dimensions"),
        (np.zeros((2, 2, 2), int), "3 dimensions"),
        ({"prompt_embeds": torch.zeros(2, 3)}, "'prompt_embeds'"),
        ({"prompt": "a", "multi_modal_data": {"image": 1}}, "'multi_modal_data'"),
        ({"encoder_prompt": "a", "decoder_prompt": "b"}, "'decoder_prompt', 'encoder_prompt'"),
        ({"role": "user", "content": "hi"}, "'content', 'role'"),
        ({"prompt": [1, 2]}, "must hold 'prompt', a text"),
        ({}, "must hold 'prompt', a text"),
        ({"prompt_token_ids": []}, "at least one token id"),
        (b"ab", "must be a list of token ids"),
        (None, "must be a list of token ids"),
        ({1, 2}, "must be a list of token ids"),
        (3, "must be a list of token ids"),
        ((x for x in "ab"), "must be a list of token ids"),
    ],
)
def test_prompts_are_refused_with_their_form_and_index(prompt, why):
    with pytest.raises(ValueError, match=rf"^prompt\b.*{why}"):
        read_prompts(prompt, Letters(), V)
    if not (hasattr(prompt, "ndim") and prompt.ndim == 3):
        with pytest.raises(ValueError, match=rf"^prompts\[1\].*{why}"):
            read_prompts(["a", prompt], Letters(), V)


def test_prompts_without_tokens_or_tokenizer():
    with pytest.raises(ValueError, match=r"^prompts\[1\]=\[\].*at least one token id"):
        read_prompts([[1], []], Letters(), V)
    with pytest.raises(ValueError, match="^prompt='a': this engine has no tokenizer"):
        read_prompts("a", None, V)


@pytest.mark.parametrize("exact", [[5, 6], [], "ab", 3, np.arange(2), [[1.5]], [["a"]], [[1, V]], [[1], [2]], {1: 2}])
def test_exact_is_refused_by_name(exact):
    with pytest.raises(ValueError, match="^exact"):
        read_each(1, True, PARAMS, None, exact, V)
    with pytest.raises(ValueError, match="^exact"):
        read_each(2, False, PARAMS, None, [exact, exact], V)


def test_exact_samples_are_read():
    free = SMCParams(n_particles=2, ess_threshold=0.0)
    assert read_exact("exact", np.array([[1, 2], [3, 4]]), free, V) == [[1, 2], [3, 4]]
    assert read_exact("exact", ((1, 2),), PARAMS, V) == [[1, 2]]
    assert read_exact("exact", [np.arange(2)], PARAMS, V) == [[0, 1]]
    assert read_each(2, False, PARAMS, None, [None, [[1]]], V)[2] == [None, [[1]]]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (dict(params={"n_particles": 3}), "params="),
        (dict(potential=[None]), "1 potentials for 2 prompts"),
        (dict(potential=Lexicon), "an instance"),
        (dict(potential=[None, 3]), "potential=3"),
        (dict(exact=[[[1]]]), "exact: samples for 1 prompts"),
        (dict(exact=3), "exact: 3"),
        (dict(params=SMCParams(stop_token_ids=[V])), r"stop_token_ids\[0\]=8.*vocabulary"),
        (dict(params=SMCParams(group=2**32 - 1)), "group=4294967296"),
    ],
)
def test_other_arguments_are_refused_by_name(change, why):
    with pytest.raises(ValueError, match=why):
        read_each(2, False, **{**dict(params=PARAMS, potential=None, exact=None, vocab_size=V), **change})


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor, lambda ids: range(ids[0], ids[-1] + 1)])
def test_token_ids_may_be_any_array(kind):
    ids = kind([1, 2])
    assert Infill(ids).lookahead == 2 and Lexicon(token_ids=ids).token_ids == [1, 2]
    assert SMCParams(stop_token_ids=ids).stop_token_ids == (1, 2)
    for bad in (np.array([1.5]), torch.tensor([1.5]), np.array([[1]]), [[1]], {1: 2}, np.array(1), 1):
        with pytest.raises(ValueError, match="continuation"):
            Infill(bad)
        with pytest.raises(ValueError, match="token_ids"):
            Lexicon(token_ids=bad)
        with pytest.raises(ValueError, match="stop_token_ids"):
            SMCParams(stop_token_ids=bad)


# -- the Hugging Face engine -------------------------------------------------------------------------------------------
class Zero(Potential):
    def prefix(self, state):
        return torch.zeros(len(state.finished))


class Broken(Zero):
    def reset(self, n_particles, prompt):
        raise RuntimeError("boom")


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    return HFEngine(make_llama(tmp_path_factory.mktemp("llama"), V, positions=16))


def test_hf_takes_what_vllm_takes(hf):
    assert hf.smc([], PARAMS) == []
    several = hf.smc([[1, 2], np.array([3])], PARAMS, [Lexicon(token_ids=[1]), None])
    assert [p.prompt_token_ids for p in several] == [[1, 2], [3]] and [p.params.group for p in several] == [0, 1]
    assert several[1].log_z == 0.0 and several[0].log_z != 0.0
    with pytest.raises(SMCError, match="^prompt 1: potential Broken.reset.*boom") as caught:
        hf.smc([[1], [1], [1]], PARAMS, [None, Broken(), Zero()])
    assert [p is None for p in caught.value.populations] == [False, True, False]
    for potential in (Infill([V]), Infill([1, 10**6]), Lexicon(token_ids=[V])):
        with pytest.raises(ValueError, match="vocabulary"):
            hf.smc([1], PARAMS, potential)


def test_hf_refuses_a_context_that_is_too_long(hf):
    hf.smc([1] * 14, PARAMS)
    with pytest.raises(ValueError, match="max_tokens=2: with a prompt of 15 tokens.*at most 16"):
        hf.smc([[1], [1] * 15], PARAMS)
    with pytest.raises(ValueError, match="lookahead of 3.*at most 16"):
        hf.smc([1] * 13, PARAMS, Infill([1, 2, 3]))


def test_hf_shows_its_steps(hf, capfd):
    hf.smc([[1], [2]], PARAMS, use_tqdm=True)
    assert "4/4" in capfd.readouterr().err
