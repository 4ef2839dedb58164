"""What an operator allows (`EngineOptions`): the options, and what a request is refused for, by the scheduler too."""

import json

import pytest
from vllm import SamplingParams

from fastsmc import SMCParams
from fastsmc.interventions import Facts, Steer, Temperature, save
from fastsmc.potentials import registry
from fastsmc.vllm.options import EngineOptions, put_options
from fastsmc.vllm.request import GroupRequest, OverLimit, with_token_ids

from .test_scheduler import engine_of, make  # noqa: F401  fixtures

OBJECT = "object:" + 32 * "0" + ":0"
INTERVENTION = "intervention:" + 32 * "0" + ":0"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"potentials": ["lexicon", "no"]}, "potentials: 'no' is not registered; known are choice, grammar, "),
        ({"potentials": "lexicon,no"}, "potentials: 'no' is not registered"),
        ({"potentials": 3}, "potentials=3: must be a list of registered names, or a mapping of names to 'module:attr'"),
        ({"potentials": [3]}, "potentials=[3]: must be a list of registered names"),
        ({"potentials": {"mine": "a.py"}}, "potentials['mine']='a.py': must be a name and the 'module:attr' of its"),
        ({"potentials": {"a/b": "a:B"}}, "potentials['a/b']='a:B': must be a name"),
        ({"potentials": {OBJECT: "a:B"}}, f"potentials[{OBJECT!r}]='a:B': must be a name"),
        ({"twists": ["/warm"]}, "twists=['/warm']: must be a mapping of names to directories"),
        ({"twists": {"/warm": "/warm"}}, "twists['/warm']='/warm': must be a name and the directory of a twist"),
        ({"twists": {"warm": 1}}, "twists['warm']=1: must be"),
        ({"reward_models": "prm"}, "reward_models='prm': must be a mapping of names to directories"),
        ({"reward_models": {"prm": ""}}, "reward_models['prm']='': must be a name and the directory of a reward model"),
        ({"interventions": 1}, "interventions=1: must be True or False, or a mapping of names to files"),
        ({"interventions": {"a/b": "/calm"}}, "interventions['a/b']='/calm': must be a name and the file of"),
        ({"interventions": {"intervention:0": "/calm"}}, "interventions['intervention:0']='/calm': must be a name"),
        ({"interventions": {"calm": True}}, "interventions['calm']=True: must be a name"),
        ({"max_particles": 0}, "max_particles=0: must be a positive integer, or None for no limit"),
        ({"max_particle_tokens": "9"}, "max_particle_tokens='9': must be a positive integer"),
        ({"max_groups": True}, "max_groups=True: must be a positive integer"),
        ({"setup_timeout_s": 0}, "setup_timeout_s=0: must be a positive number of seconds"),
        ({"setup_timeout_s": float("inf")}, "setup_timeout_s=inf: must be"),
        ({"setup_timeout_s": None}, "setup_timeout_s=None: must be"),
        ({"offline": 1}, "offline=1: must be True or False"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(ValueError) as caught:
        EngineOptions.of({"fastsmc": options})
    assert str(caught.value).startswith(message)


def test_which_potentials_there_are():
    known = registry.registered()
    assert EngineOptions().known_potentials() == known
    assert list(EngineOptions(potentials="regex, lexicon").known_potentials()) == ["regex", "lexicon"]
    mine = EngineOptions(potentials={"regex": "my.code:Regex", "plain": "prepared:Plain"}).known_potentials()
    assert [entry.value for entry in mine.values()] == ["my.code:Regex", "prepared:Plain"]


def parse(n=4, max_tokens=5, **extra):
    keys = SMCParams(n_particles=n).to_extra_args() | {f"smc_{key}": value for key, value in extra.items()}
    return GroupRequest.parse(SamplingParams(max_tokens=max_tokens, extra_args=keys))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (None, "No such file"),
        (b"{}", "holds no interventions"),
        ([], "holds nothing; must hold interventions on layers alone, at least one"),
        ([Steer(0, [1.0]), Temperature(2.0)], "holds Steer, Temperature; must hold interventions on layers alone"),
        ([Facts([[0.0, 0.0]], [1], [1])], "holds Facts; must"),
    ],
)
def test_files_of_interventions(tmp_path, parts, message):
    """Those that no engine can have are refused as the options are put together, by name."""
    path = tmp_path / "bad.safetensors"
    if isinstance(parts, bytes):
        path.write_bytes(parts)
    elif parts is not None:
        save(parts, path)
    save([Steer(0, [1.0])], tmp_path / "good")
    with pytest.raises(ValueError) as caught:
        put_options({"interventions": {"good": str(tmp_path / "good"), "bad": str(path)}})
    assert str(caught.value).startswith(f"interventions['bad']={str(path)!r}: ") and message in str(caught.value)
    assert str(caught.value).count(str(path)) == 1


ALLOWED = dict(potentials=["lexicon"], twists={"warm": "/warm"}, max_particles=8, max_particle_tokens=60)
LEXICON = dict(potential="lexicon", potential_args='{"token_ids": [1]}')


@pytest.mark.parametrize(
    ("asked", "limit", "message"),
    [
        ({}, None, None),
        (LEXICON, None, None),
        (LEXICON | {"twist": "warm"}, None, None),
        ({"potential": "regex"}, None, "smc_potential='regex': unknown; known are 'lexicon'"),
        ({"potential": "os:system"}, None, "smc_potential='os:system': unknown; known are 'lexicon'"),
        ({"potential": OBJECT}, None, f"smc_potential={OBJECT!r}: unknown"),
        (LEXICON | {"twist": "/warm"}, None, "smc_twist='/warm': unknown; known are 'warm'"),
        (LEXICON | {"twist": "../warm"}, None, "smc_twist='../warm': unknown"),
        ({"intervention": "calm"}, None, "smc_intervention='calm': unknown; known are none"),
        ({"intervention": INTERVENTION}, None, f"smc_intervention={INTERVENTION!r}: unknown"),
        ({"counterfactual": [1], "facts": "a"}, None, "smc_facts='a': is for fastsmc.LLM alone"),
        ({"n": 1, "exact": [[1]], "keep_logits": "a"}, None, "smc_keep_logits='a': is for fastsmc.LLM alone"),
        ({"n": 9}, "max_particles", "n_particles=9: at most max_particles=8"),
        ({"counterfactual": [1] * 20}, None, None),
        (
            {"counterfactual": [1] * 21},
            "max_particle_tokens",
            "n_particles=4, max_tokens=5: their product 20 and 42 tok",
        ),
        ({"n": 8, "max_tokens": 8}, "max_particle_tokens", "n_particles=8, max_tokens=8: their product 64 is over max"),
    ],
)
def test_what_a_request_may_ask(engine_of, asked, limit, message):  # noqa: F811
    """The same from the check and from the scheduler, which any client's request passes."""
    server = engine_of(**ALLOWED)
    name = server.add(**{"n": 4} | asked)
    if message is None:
        parse(**asked).check_allowed(EngineOptions(**ALLOWED))
        assert not server.scheduler._refused
        return
    with pytest.raises(ValueError) as caught:
        parse(**asked).check_allowed(EngineOptions(**ALLOWED))
    assert str(caught.value).startswith(message)
    assert getattr(caught.value, "limit", None) == limit and getattr(caught.value, "kind", "limit") == "limit"
    assert str(caught.value) in server.scheduler._refused[name]


def test_what_is_offline_may_name_directories_and_objects():
    for extra in ({"potential": OBJECT}, {"potential": "lexicon", "twist": "/any/where"}):
        asked = parse(**extra)
        asked.check_allowed(EngineOptions(offline=True))
        with pytest.raises(ValueError, match="unknown"):
            asked.check_allowed(EngineOptions())


def test_a_request_cannot_say_that_it_is_offline(engine):
    """The program's own engine is; nothing in a request's `extra_args` makes another so."""
    assert EngineOptions.of(engine.llm_engine.vllm_config.additional_config).offline
    with pytest.raises(ValueError, match="unknown key"):
        parse(offline=True)


def test_groups_that_may_wait(engine_of):  # noqa: F811
    """Those that fit do not count, even before a step has begun, nor do those that have ended."""
    server = engine_of(ends=3, max_groups=2)
    running = [server.add(10) for _ in range(4)]
    waiting = [server.add(40), server.add(40)]
    refused = server.add(2)
    message = "2 groups wait to be admitted, at most max_groups=2; ask later"
    assert message in server.scheduler._refused[refused] and not server.scheduler._refused.keys() - {refused}
    assert OverLimit(message, "max_groups").kind == "busy"
    server.add()  # an ordinary request is no group
    server.drain()
    assert {*running, *waiting} <= {name for name, how in server.ended.items() if how == "length"}
    assert server.add(2) not in server.scheduler._refused
    server.drain()


# --------------------------------------------------------------------------------------------- text in a request's args
class Letters:
    """A tokenizer: a is 0, b is 1, ..."""

    def encode(self, text, add_special_tokens):
        assert not add_special_tokens
        return [ord(c) - ord("a") for c in text if c != " "]


def test_text_becomes_token_ids_before_room_is_looked_for():
    """Where it says how many tokens a particle is scored beyond its end, and only there."""
    options = EngineOptions(potentials={"follow": "fastsmc.potentials:Infill", "plain": "prepared:Plain"})

    def args_of(potential, args):
        extra = {"smc_n_particles": 4, "smc_potential": potential, "smc_potential_args": args}
        return with_token_ids(extra, options, Letters())["smc_potential_args"]

    args = args_of("follow", '{"continuation": "a cab", "every_step": true}')
    assert json.loads(args) == {"continuation": [0, 2, 0, 1], "every_step": True}
    assert parse(potential="follow", potential_args=args).lookahead(options) == 4
    for name, kept in (("follow", '{"continuation":  [1]}'), ("plain", '{"continuation": "a"}'), ("no", "{}")):
        assert args_of(name, kept) == kept
    for wrong in (
        '{"continuation": ""}',
        "[3]",
        "{",
        '"a"',
        None,
        '{"continuation": 3}',
    ):  # `parse` and `resolve` say it
        assert args_of("follow", wrong) == wrong
    with pytest.raises(ValueError, match="Infill: continuation=' ' has no tokens"):
        args_of("follow", '{"continuation": " "}')
    asked = {"smc_potential": "follow", "smc_potential_args": '{"continuation": "a"}'}
    with pytest.raises(ValueError, match="needs a tokenizer"):
        with_token_ids(asked, options, None)
