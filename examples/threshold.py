"""A toxicity-style threshold: texts that a scorer puts beyond a limit. φ(s) = 1 there, and a floor elsewhere.

    pip install vaderSentiment
    python examples/threshold.py --quick
    python examples/threshold.py --model roneneldan/TinyStories-33M --classifier nicholasKluge/ToxicityModel

The floor keeps every weight positive, so that twists have something to learn from before the first hit. By default the
scorer is VADER's compound score, and the limit asks for clearly negative text.
"""

from common import arguments, classifier, study

from fastsmc import SMCParams
from fastsmc.potentials import TextPotential
from fastsmc.training import TwistConfig

LIMIT, LOG_FLOOR = -0.4, -5.0


def beyond(scores):
    """Takes the log of the indicator, with a floor."""
    return [0.0 if score <= LIMIT else LOG_FLOOR for score in scores]


def vader():
    """Makes a function of texts that gives their compound scores, -1 to 1."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    analyser = SentimentIntensityAnalyzer()
    return lambda texts: [analyser.polarity_scores(t)["compound"] for t in texts]


if __name__ == "__main__":
    args = arguments(__doc__.splitlines()[0])
    params = SMCParams(
        n_particles=16 if args.quick else 256, max_tokens=5 if args.quick else 20, ignore_eos=True, seed=args.seed
    )
    config = TwistConfig(
        loss="ctl",
        samples="twisted",
        rank=256,
        steps=80 if args.quick else 3000,
        refresh=4,
        lr=1e-3,
        eval_every=40 if args.quick else 250,
        eval_runs=4,
    )
    score = classifier(args.classifier, 0) if args.classifier else vader()
    potential = TextPotential(lambda texts: beyond(score(texts)))
    study(
        "threshold",
        args,
        "Once upon a time, there was a",
        params,
        potential,
        config,
        exact_count=8,
        samples=256 if args.quick else 1024,
    )
