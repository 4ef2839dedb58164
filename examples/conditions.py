"""Lines that a black box accepts: Python expressions by `ast`, JSON by a validator of JSON Schemas; docs/conditions.md.

A black box knows wholes. Of a beginning it is asked whether some ending makes a whole of it: a few are tried.
"""

import ast
import json
import re
import warnings
from functools import cache

PROMPTS = {
    "python": "# Python. The area of a circle of radius r is\narea = ",
    "json": 'Two people as JSON.\n{"name": "Alice", "age": 31}\n',
}
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
MEMBERS = ('{"name": ""', '{"age": 0')


def is_expression(text: str) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd literals
            ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return False
    return "\n" not in text.strip()


def may_be_expression(text: str) -> bool:
    """Says whether brackets and an operand can make an expression of a text."""
    closing = "".join({"(": ")", "[": "]", "{": "}"}.get(c, "") for c in reversed(_open_brackets(text)))
    return any(is_expression(text + operand + closing) for operand in ("", "1", "x", "'", '"')) or not text.strip()


def _open_brackets(text: str) -> str:
    while (shorter := re.sub(r"\([^()[\]{}]*\)|\[[^()[\]{}]*\]|\{[^()[\]{}]*\}", "", text)) != text:
        text = shorter
    return "".join(re.findall(r"[([{]", text))


@cache
def _validator():
    from jsonschema import Draft202012Validator  # type: ignore[import-untyped]  # it has no types

    return Draft202012Validator(SCHEMA)


def _once(pairs):
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key comes twice")
    return dict(pairs)


def _errors(text: str) -> list[str] | None:
    """Lists which rules of the schema a text breaks; None: it is no JSON."""
    try:
        value = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError):
        return None
    return [str(error.validator) for error in _validator().iter_errors(value)]


def is_person(text: str) -> bool:
    return _errors(text) == []


def may_be_person(text: str) -> bool:
    """Says whether the rest of a member, or nothing, and a bracket make a text valid but for what it still lacks."""
    endings = {member[at:] + "}" for member in MEMBERS for at in range(len(member) + 1)} | {""}
    found = (_errors(text + ending) for ending in sorted(endings))
    return any(errors is not None and set(errors) <= {"required"} for errors in found)


#: what a beginning and what a whole is asked
TASKS = {"python": (may_be_expression, is_expression), "json": (may_be_person, is_person)}


def all_of(function):
    """Makes a function of lists of a function of a text."""

    def batch(texts):
        return [function(text) for text in texts]

    batch.__name__ = function.__name__
    return batch


def main() -> None:
    from fastsmc import LLM, SMCParams
    from fastsmc.models import resolve
    from fastsmc.potentials import Condition

    llm = LLM(resolve("smollm2"), max_model_len=512)
    newline = tuple(llm.get_tokenizer().encode("\n"))
    for task, (begins, whole) in TASKS.items():
        condition = Condition(all_of(begins), complete=all_of(whole))
        params = SMCParams(n_particles=64, max_tokens=24, proposal="rejection", stop_token_ids=newline, force_stop=True)
        population = llm.smc(PROMPTS[task], params, condition)
        print(f"{task}: log Z {population.log_z:.2f}, {population.questions}")
        for text, weight, _ in [] if population.degenerate else population.best(5):
            print(f"  {weight:.3f}  {text!r}")


if __name__ == "__main__":
    main()
