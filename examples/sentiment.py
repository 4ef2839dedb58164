"""Sentiment: reviews of a chosen tone. φ(s) = p(positive | text), by VADER's lexicon or any classifier by name.

    pip install vaderSentiment
    python examples/sentiment.py --quick
    python examples/sentiment.py --model gpt2-medium --classifier distilbert-base-uncased-finetuned-sst-2-english

φ is a probability, so rejection gives exact samples, and FUDGE would learn here too; this trains by CTL.
"""

import math

from common import arguments, classifier, study

from fastsmc import SMCParams
from fastsmc.potentials import TextPotential
from fastsmc.training import TwistConfig


def vader():
    """Makes a function of texts that gives log sigmoid(6 · compound): VADER's score, -1 to 1, as log p(positive)."""
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    analyser = SentimentIntensityAnalyzer()
    return lambda texts: [-math.log1p(math.exp(-6.0 * analyser.polarity_scores(t)["compound"])) for t in texts]


if __name__ == "__main__":
    args = arguments(__doc__.splitlines()[0])
    params = SMCParams(
        n_particles=16 if args.quick else 256, max_tokens=5 if args.quick else 20, ignore_eos=True, seed=args.seed
    )
    config = TwistConfig(
        loss="ctl",
        samples="twisted",
        rank=256,
        steps=45 if args.quick else 3000,
        refresh=5,
        lr=3e-3,
        eval_every=45 if args.quick else 250,
        eval_runs=4,
    )
    potential = TextPotential(classifier(args.classifier, 1) if args.classifier else vader())
    study(
        "sentiment",
        args,
        "This movie was",
        params,
        potential,
        config,
        exact_count=8,
        samples=256 if args.quick else 1024,
    )
