"""Infilling: two tokens that make a given next token likely. φ(s) = p0(continuation | prompt, s).

    python examples/infilling.py --quick

The paper's small setting (T = 2, c = 1). A twist learns by CTL which tokens lead there.
"""

from common import arguments, study

from fastsmc import SMCParams
from fastsmc.potentials import Infill
from fastsmc.training import TwistConfig

if __name__ == "__main__":
    args = arguments(__doc__.splitlines()[0])
    params = SMCParams(n_particles=32 if args.quick else 256, max_tokens=2, ignore_eos=True, seed=args.seed)
    config = TwistConfig(
        loss="ctl",
        samples="twisted",
        rank=256,
        steps=60 if args.quick else 2000,
        refresh=3,
        lr=3e-3,
        eval_every=20 if args.quick else 200,
        eval_runs=4,
    )
    study("infilling", args, "The old man opened the door and", params, Infill(" warm"), config, exact_count=8)
