"""The bodies of /v1/smc. The request's fields beside the prompt are those of `SMCParams`, with its defaults."""

from __future__ import annotations

import dataclasses
import re
import typing
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, create_model, model_validator

from fastsmc.params import SMCParams
from fastsmc.potentials.tokens import short
from fastsmc.vllm.serve.errors import GroupError


class _Request(BaseModel):
    """Asks for one group of particles: the weighted population that represents p0(s | prompt)·φ(s)/Z."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = Field(None, description="the served model, or a LoRA adapter of it")
    prompt: str | list[int] | None = Field(None, description="text or token ids; this or messages")
    messages: list[dict[str, Any]] | None = Field(None, description="of a chat, put into the model's template")
    potential: str | None = Field(None, description="name of φ among the server's potentials; null: plain sampling")
    potential_args: dict[str, Any] = Field({}, description="its arguments")
    twist: str | None = Field(None, description="name of a learned twist among the server's")
    exact: list[list[int]] | None = Field(None, description="exact samples of the target: one, or n_particles of them")
    intervention: str | None = Field(None, description="name of an intervention among the server's; part of p0")
    counterfactual: list[int] | None = Field(
        None, description="a text that p0 without the intervention drew here: the particles are its counterfactuals"
    )
    factual_temperature: float | None = Field(None, description="at which it was drawn; null: at `temperature`")
    noise: str | None = Field(None, description="how counterfactuals are drawn: exact (null) or gumbel")
    alone: bool = Field(False, description="the group's rows are in no other group's forward passes")
    n_samples: int = Field(1, ge=1, description="independent draws by weight: `samples` of the answer")
    return_genealogy: bool = Field(False, description="the answer holds ancestors and tokens of every step")
    stream: bool = Field(False, description="newline-delimited JSON: a line per step, then the population")

    @model_validator(mode="before")
    @classmethod
    def _check(cls, body: Any) -> Any:
        """Refuses what is no field, or what `SMCParams` refuses, in its words rather than in pydantic's."""
        if not isinstance(body, dict):
            raise GroupError(400, "the body must be a JSON object")
        for name, value in body.items():
            if name not in cls.model_fields:
                raise GroupError(400, f"{name}={short(value)}: unknown; known are {', '.join(cls.model_fields)}", name)
        if (body.get("prompt") is None) == (body.get("messages") is None):
            raise GroupError(400, "prompt: give it or messages, one of the two", "prompt")
        try:
            params = SMCParams(**{name: body[name] for name in NAMES if name in body})
        except ValueError as error:
            raise GroupError.refusal(error) from None
        return body | {name: getattr(params, name) for name in NAMES if name in body}

    def params(self) -> SMCParams:
        return SMCParams(**{name: getattr(self, name) for name in NAMES if name in self.model_fields_set})


#: fields of `SMCParams`
NAMES = tuple(field.name for field in dataclasses.fields(SMCParams))


def _descriptions() -> dict[str, str]:
    """Reads what the docstring of `SMCParams` says of each of its fields."""
    text = re.search(r"Args:\n(.*?)\n\n", SMCParams.__doc__ or "", re.S)
    entries = re.findall(r"^ {8}(\w[\w, ]*): (.*?)(?=^ {8}\w|\Z)", text[1] + "\n" if text else "", re.S | re.M)
    return {name.strip(): " ".join(what.split()) for names, what in entries for name in names.split(",")}


def _fields() -> dict[str, Any]:
    hints, said = typing.get_type_hints(SMCParams), _descriptions()
    return {
        field.name: (hints[field.name], Field(field.default, description=said.get(field.name)))
        for field in dataclasses.fields(SMCParams)
    }


if typing.TYPE_CHECKING:
    SMCRequest = _Request
else:
    SMCRequest = create_model("SMCRequest", __base__=_Request, __doc__=_Request.__doc__, **_fields())


class Particle(BaseModel):
    """Is one of the N weighted texts."""

    text: str | None = Field(description="without the stop string that ended it; null without a tokenizer")
    token_ids: list[int]
    weight: float = Field(description="normalised; the weights sum to 1")
    log_weight: float | None = Field(description="as in `Population.log_weights`; null: -inf")
    log_prob: float | None = Field(description="log p0 of its tokens; null: -inf")
    finish_reason: Literal["stop", "length", "dead"]
    segments: int | None = Field(None, description="that it has; null: the group had none")
    common_prefix: int | None = Field(
        None, description="tokens that it has in common with the text, of counterfactuals"
    )
    log_kernel: float | None = Field(None, description="log-probability given the text, of counterfactuals; null: -inf")


class Factual(BaseModel):
    """Says of the text whose counterfactuals the particles are where they leave it; exact, from no sample."""

    token_ids: list[int]
    text: str | None = Field(description="null without a tokenizer")
    log_probs: list[float] = Field(description="log p0 of its tokens as the model is")
    stay: list[float] = Field(description="probability that a token stays where all before it did")
    survival: list[float] = Field(description="probability that a token and all before it stay")
    expected_common_prefix: float = Field(description="tokens that stay before the first that does not, on average")


class Genealogy(BaseModel):
    """Says who descends from whom."""

    ancestors: list[list[int]] = Field(description="(T, N): row of the step before that row i continues")
    tokens: list[list[int]] = Field(description="(T, N): token that row i drew, -1 where it had ended")
    token_texts: dict[int, str] = Field(description="how each different token reads by itself; empty: no tokenizer")


class Usage(BaseModel):
    """Counts tokens, each particle's among them."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    particle_tokens: int


class SMCPopulation(BaseModel):
    """Is the answer: the weighted population."""

    id: str
    object: str = "smc.population"
    created: int
    model: str
    log_z: float | None = Field(description="log of the unbiased estimate of Z; null: -inf")
    log_z_is_minus_inf: bool = Field(False, description="never in a 200: such a population comes beside a 422")
    log_z_stderr: float | None = Field(description="standard error of log_z by this run; null: there is none")
    log_z_stderr_reason: str | None = Field(description="why there is no standard error")
    distinct_roots: int = Field(description="first tokens' rows that particles with weight descend from")
    questions: dict[str, int] | None = Field(None, description="what conditions were asked; null: there are none")
    biased: bool = Field(False, description="a cap on questions was met, so that log_z is too low on average")
    ess: float = Field(description="effective sample size of the final weights")
    steps: int
    boundaries: list[int] | None = Field(None, description="steps after which particles were weighed, with segments")
    seed: int
    p0: dict[str, Any] = Field(description="the settings of p0 that were in force")
    particles: list[Particle]
    samples: list[int] = Field(description="indexes of particles that were drawn by weight")
    usage: Usage
    genealogy: Genealogy | None = None
    counterfactual: Factual | None = Field(None, description="of the text, if the request had one")
