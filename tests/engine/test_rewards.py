"""Reward models in an engine: loaded by name before the KV cache is sized, asked at boundaries, and failing alone."""

import math
import re
import threading
from dataclasses import replace

import numpy as np
import pytest
from rewarding import LETTERS, SYMBOLS, letters_tokenizer, make_reward, pooling_server
from tiny import make_llama

from fastsmc import SMCParams
from fastsmc.potentials import HFReward, PoolingReward, Product, RewardModel
from fastsmc.smc import SMCError

from .conftest import make_engine

SEGMENTS = SMCParams(n_particles=16, max_tokens=12, proposal="base", segment=".", max_segment_tokens=4, seed=2)


@pytest.fixture(scope="module")
def rm_path(tmp_path_factory):
    return make_reward(tmp_path_factory.mktemp("rm"), "LlamaForSequenceClassification")


@pytest.fixture(scope="module")
def llm(tmp_path_factory, rm_path):
    path = make_llama(tmp_path_factory.mktemp("letters"), len(LETTERS))
    letters_tokenizer(eos_token="<eos>").save_pretrained(path)
    return make_engine(path, skip_tokenizer_init=False, max_num_seqs=256, reward_models={"rm": str(rm_path)})


@pytest.fixture(scope="module")
def worker(llm):
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker


def pieces(population, i):
    """A particle's text up to the end of each of its segments, without its stop token."""
    ends, begin, ids = [], 0, population.token_ids[i]
    for t in range(1, len(ids) + 1):
        if LETTERS.index(".") in ids[begin:t] or t - begin == 4 or t == len(ids):
            ends.append(t)
            begin = t
    return ["".join(LETTERS[v] for v in ids[:end] if v) for end in ends]


@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_a_network_in_the_worker_weighs_segments(llm, rm_path, threshold):
    from transformers import AutoModelForSequenceClassification

    from fastsmc.reward_networks import Network

    reward = HFReward("rm", template="Q{text}", aggregate="product", scale="logit")
    population = llm.smc("ab", replace(SEGMENTS, ess_threshold=threshold), reward)
    network = AutoModelForSequenceClassification.from_pretrained(rm_path).eval()
    alone = Network(network, letters_tokenizer(SYMBOLS))
    log_phi = []
    for i in range(SEGMENTS.n_particles):
        texts = pieces(population, i)
        assert population.segments[i] == len(texts)
        scores = [alone.probabilities([[SYMBOLS.index(c) for c in "Q" + text]])[0, 1].item() for text in texts]
        log_phi.append(sum(math.log(score / (1 - score)) for score in scores))
    if threshold == 0:
        np.testing.assert_allclose(population.log_weights, log_phi, rtol=1e-4, atol=1e-5)
    else:  # resampled at every boundary: a weight is the mean at the last one times what came since
        assert population.resampled.sum() >= 2 and np.isfinite(population.log_z)


def test_a_name_that_is_not_loaded_is_refused(llm):
    with pytest.raises((ValueError, SMCError), match="HFReward: model='orm': is not loaded .there are: 'rm'"):
        llm.smc("ab", SEGMENTS, HFReward("orm"))


def test_its_memory_is_counted(worker, rm_path, monkeypatch):
    [network] = worker._networks.values()
    assert network.weight_bytes > (rm_path / "model.safetensors").stat().st_size // 2
    assert worker.reward_bytes(weights=True) == network.weight_bytes + network.step_bytes
    if hasattr(worker, "_need"):  # the CPU worker measures what is free beside the weights
        with_rewards = worker._need().step
        monkeypatch.setattr(worker, "_networks", {})
        assert with_rewards - worker._need().step == network.step_bytes


OVER = threading.Event()


class UntilOver(RewardModel):
    """Says when its group's particles have ended."""

    def score(self, texts):
        if len(texts[0]) == SEGMENTS.max_tokens:
            OVER.set()
        return [0.5] * len(texts)


def test_others_go_on_while_a_server_is_waited_for(llm):
    """A server that answers when the other group is over: its group is parked, and is weighed then."""
    over = []
    with pooling_server(lambda text: [0.5, 0.2 + 0.6 * (len(text) % 2)]) as server:
        server.hold.clear()
        reward = PoolingReward(f"{server.url}/classify", template="{text}", timeout=60)
        thread = threading.Thread(target=lambda: (over.append(OVER.wait(60)), server.hold.set()))
        thread.start()
        params = replace(SEGMENTS, ignore_eos=True)
        population, other = llm.smc(["ab", "cd"], params, [reward, UntilOver()])
        thread.join()
    assert over == [True] and np.isfinite([population.log_z, other.log_z]).all()
    asked = [body["input"] for body in server.asked]
    assert all(len(texts) == len(set(texts)) for texts in asked)
    assert len(asked) == len(population.boundaries)  # those that have ended are asked about with the others


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_time_out_ends_its_group_alone_with_url_and_seconds(llm, wrapped):
    with pooling_server(lambda text: [0.5, 0.5]) as server:
        server.hold.clear()
        slow = PoolingReward(f"{server.url}/classify", template="{text}", timeout=0.3)
        fine = HFReward("rm")
        with pytest.raises(
            SMCError, match=re.escape(f"{server.url}/classify gave no answer within timeout=0.3 s")
        ) as e:
            llm.smc(["ab", "cd"], SEGMENTS, [Product(slow, fine) if wrapped else slow, fine])
        server.hold.set()
    assert "prompt 0: " in str(e.value)
    failed, other = e.value.populations
    assert failed is None and np.isfinite(other.log_z)
    assert np.isfinite(llm.smc("ab", SEGMENTS, fine).log_z)
