"""Constrained generation: JSON of a given form. φ = 1 for texts that match a regular expression, else 0.

    python examples/constrained.py --quick

`Regex` brings a mask of its own, ψ = 1 as long as a match is possible. It says what is allowed and not what is likely,
so weights differ; a twist learns the rest beside it (`compose=True`): log weights of mask and twist add up.
"""

from common import arguments, study

from fastsmc import SMCParams
from fastsmc.potentials import Regex
from fastsmc.training import TwistConfig

PROMPT = "A user as JSON, with name, age and city:\n"
PATTERN = r'\{"name": "[A-Z][a-z]{2,8}", "age": [1-9]\d, "city": "[A-Z][a-z]{2,9}"\}'

if __name__ == "__main__":
    args = arguments(__doc__.splitlines()[0])
    params = SMCParams(n_particles=16 if args.quick else 256, max_tokens=26, seed=args.seed)
    config = TwistConfig(
        loss="ctl",
        samples="twisted",
        compose=True,
        rank=128,
        steps=30 if args.quick else 2000,
        refresh=5,
        lr=2e-3,
        eval_every=10 if args.quick else 250,
        eval_runs=2,
    )
    study("constrained", args, PROMPT, params, Regex(PATTERN), config, exact_count=0, samples=64 if args.quick else 512)
