"""`PoolingReward`: a server that behaves as a test says."""

import math
import re
import threading
from importlib.metadata import EntryPoint

import cloudpickle
import pytest
from rewarding import ALL, TEXTS, letters_engine, pooling_server, score_of, segment_state, start

from fastsmc.potentials import (
    GROUP,
    PoolingReward,
    pooling_reward,
    registered,
    resolve,
)
from fastsmc.potentials.copying import own_copy
from fastsmc.smc import SMCError


@pytest.fixture(scope="module")
def engine():
    return letters_engine()


@pytest.fixture
def server():
    with pooling_server(lambda text: [1 - score_of(text), score_of(text)]) as server:
        yield server


def pooled(server, engine, route="/classify", **args):
    return start(PoolingReward(server.url + route, **{"template": "{text}", "timeout": 10, **args}), engine)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(pooling_reward, "PAUSES", (0.01, 0.02))


@pytest.mark.parametrize("route", ["/classify", "/pooling"])
def test_a_server_is_asked_in_batches(server, engine, route):
    reward = pooled(server, engine, route, batch_size=3, model="rm", template="{prompt}:{text}")
    assert reward.score(TEXTS) == [score_of(f"ab:{text}") for text in TEXTS]
    assert [body["input"] for body in server.asked] == [[f"ab:{t}" for t in TEXTS[:3]], [f"ab:{TEXTS[3]}"]]
    assert all(body["model"] == "rm" for body in server.asked)
    assert not any("Authorization" in headers for headers in server.headers)


def test_a_single_label_is_the_score(engine):
    with pooling_server(lambda text: [score_of(text)]) as server:
        assert pooled(server, engine).score(TEXTS) == [score_of(text) for text in TEXTS]


def test_a_server_weighs_particles(server, engine):
    reward = pooled(server, engine, aggregate="product")
    state = segment_state(["a.", "b$"], [False, True])
    future = reward.fetch(state, ALL)
    future.result(timeout=10)
    psi, phi = reward.prefix(state), reward.complete(state)
    assert [psi[0].item(), phi[1].item()] == pytest.approx([math.log(score_of(text)) for text in ("a.", "b")])
    assert len(server.asked) == 1


def test_what_may_pass_is_tried_again(server, engine, quick):
    server.plan += [500, "drop", 429]
    assert pooled(server, engine).score(["a."]) == [score_of("a.")]
    assert len(server.asked) == 4


def test_what_does_not_pass_ends_with_url_and_seconds(server, engine, quick):
    server.plan += [503] * 3
    said = rf"^PoolingReward: {server.url}/classify answered HTTP 503: .*\(3 of 3 attempts, \d+\.\d\d s\)$"
    with pytest.raises(RuntimeError, match=said):
        pooled(server, engine, retries=2).score(["a."])
    assert len(server.asked) == 3


def test_a_refusal_is_not_tried_again(server, engine):
    server.plan += [404]
    with pytest.raises(RuntimeError, match=r"/classify answered HTTP 404: .*\(1 of 4 attempts"):
        pooled(server, engine).score(["a."])
    assert len(server.asked) == 1


def test_a_dead_server_is_named(engine, quick):
    with pooling_server(lambda text: [0.5]) as server:
        pass
    with pytest.raises(RuntimeError, match=rf"{server.url}/classify cannot be reached: .*\(2 of 2 attempts, \d"):
        pooled(server, engine, retries=1).score(["a."])


def test_a_time_out_says_how_long(server, engine):
    server.hold.clear()
    reward, state = pooled(server, engine, timeout=0.2), segment_state(["a.", "b."], [False, False])
    said = rf"{server.url}/classify gave no answer within timeout=0.2 s \(1 of 4 attempts, 0\.\d+ s\)"
    with pytest.raises(RuntimeError, match=said):
        reward.fetch(state, ALL).result(timeout=20)
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda answer: "<html>", r"answered '<html>': JSONDecodeError"),
        (lambda answer: {"data": answer["data"][1:]}, "answered about 1 texts, was asked about 2"),
        (lambda answer: {"data": answer["data"] + answer["data"]}, "answered about 4 texts, was asked about 2"),
        (lambda answer: {"error": "busy"}, r"""answered '{"error": "busy"}': KeyError: 'data'"""),
        (lambda answer: {"data": [{"index": i, "probs": []} for i in (0, 1)]}, "answered .*label=1: must be below 0"),
        (
            lambda answer: {"data": [{"index": i, "probs": [0, math.nan]} for i in (0, 1)]},
            "^PoolingReward: http://.*/classify gave nan for 'a.'",
        ),
        (
            lambda answer: {"data": [{"index": i, "probs": [0, "1"]} for i in (0, 1)]},
            "^PoolingReward: http://.*/classify gave '1', a str: must be",
        ),
        (
            lambda answer: {"data": [{"index": i, "probs": [0, -1.5]} for i in (0, 1)]},
            "^PoolingReward: http://.*/classify gave -1.5 for 'a.'",
        ),
    ],
)
def test_answers_that_are_none_are_refused(server, engine, change, said):
    server.plan.append(change)
    reward, state = pooled(server, engine, label=1), segment_state(["a.", "b."], [False, False])
    with pytest.raises(ValueError, match=said):
        reward.fetch(state, ALL).result(timeout=10)


def test_a_server_that_reads_at_another_token_is_told_so(server, engine):
    server.plan.append(lambda answer: {"data": [{"index": 0, "data": []}]})
    with pytest.raises(
        ValueError, match="/pooling answered .*: no row for a text: is step_token='!' the server's step"
    ):
        pooled(server, engine, "/pooling", step_token="!").score(["a."])


def test_an_aborted_group_asks_no_more(server, engine, quick):
    reward = pooled(server, engine, batch_size=1, retries=50)
    server.hold.clear()
    future = reward.fetch(segment_state(["a.", "b."], [False, False]), ALL)
    assert server.began.wait(10)
    [thread] = [t for t in threading.enumerate() if t.name == "fastsmc-background"]
    assert future.cancel()
    server.plan += [500]
    server.hold.set()
    thread.join(10)
    assert not thread.is_alive()
    assert len(server.asked) == 1 and reward._known == {}


def test_the_key_comes_from_the_operators_environment(server, engine, monkeypatch):
    with pytest.raises(SMCError, match="api_key_env='FASTSMC_TEST_KEY': is not set in this process"):
        pooled(server, engine, api_key_env="FASTSMC_TEST_KEY")
    monkeypatch.setenv("FASTSMC_TEST_KEY", "secret")
    reward = pooled(server, engine, api_key_env="FASTSMC_TEST_KEY")
    reward.score(["a."])
    assert server.headers[0]["Authorization"] == "Bearer secret"
    assert b"secret" not in cloudpickle.dumps(reward)


def test_a_proxy_of_the_environment_does_not_stand_before_localhost(server, engine, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    assert pooled(server, engine, retries=0).score(["a."]) == [score_of("a.")]


def test_it_travels_after_it_was_used(server, engine):
    origin = PoolingReward(server.url + "/classify", template="{text}")
    first = start(origin, engine)
    first.score(["a."])
    sent = cloudpickle.loads(cloudpickle.dumps(origin))
    assert start(sent, engine).score(["b."]) == [score_of("b.")]
    assert start(origin, engine)._client is own_copy(origin, engine)._client  # groups share connections


def known(code):
    return {"prm": EntryPoint("prm", code, GROUP)}


def test_requests_cannot_make_one():
    assert not any("eward" in entry.value for entry in registered().values())
    url = "http://localhost/classify"
    for args in ({}, {"url": url}):
        with pytest.raises(ValueError, match="the arguments of PoolingReward are the operator's; name a function"):
            resolve("prm", args, known("fastsmc.potentials:PoolingReward"))
    made = resolve("prm", {}, known("rewarding:operators_reward"))
    assert isinstance(made, PoolingReward) and made.url == "http://127.0.0.1:9/classify"
    with pytest.raises(ValueError, match="unexpected keyword argument"):
        resolve("prm", {"url": url}, known("rewarding:operators_reward"))


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"url": "ftp://x/classify"}, "url='ftp://x/classify': must be http"),
        ({"url": "http://x/v1/completions"}, "url='http://x/v1/completions': must be http"),
        ({"url": "http://x:99999/classify"}, "url='http://x:99999/classify': must be http"),
        ({"url": "http:///classify"}, "url='http:///classify': must be"),
        ({"url": "http://x/classify?key=1"}, "url='http://x/classify?key=1': must be http"),
        ({"url": "http://user:hidden@x/classify"}, "url: must be http(s)://host"),
        ({"url": None}, "url=None: must be"),
        ({"timeout": 0}, "timeout=0: must be a number in"),
        ({"timeout": math.inf}, "timeout=inf: must be a number in"),
        ({"retries": -1}, "retries=-1: must be an integer from 0 to 100"),
        ({"batch_size": 0}, "batch_size=0: must be an integer of at least 1"),
        ({"api_key_env": ""}, "api_key_env='': must be text"),
    ],
)
def test_arguments_of_pooling_rewards_are_checked(args, said):
    with pytest.raises(ValueError, match=re.escape(said)) as refusal:
        PoolingReward(**{"url": "http://localhost:8000/classify", **args})
    assert "hidden" not in str(refusal.value)
