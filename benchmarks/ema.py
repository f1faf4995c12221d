"""Does an exponential moving average of the weights help the default recipe? Its bound beside the weights' own.

    python benchmarks/ema.py              the default's 2,000 steps on docs: five minutes on one thread
    python benchmarks/ema.py --decay 0    and with a learning rate that never falls

After every step each average moves towards the weights, so that what it holds of step s of n is decay^(n - s) over the
sum of those: none of the weights that training began with. The training is that of `curves.py`, by steps, so averaging
costs it nothing. Prints a Markdown table in nats per character of validation text.
"""

import argparse
from copy import deepcopy
from itertools import count

import torch
from curves import follow

from minillada.model import LLaDA
from minillada.training.config import TrainConfig
from minillada.training.making import Made, make


def averages(made: Made, decays: list[float]) -> list[LLaDA]:
    """One model for each decay; from now on they follow the one in training."""
    models, steps = [deepcopy(made.model) for _ in decays], count(1)

    @torch.no_grad()
    def move(*_: object) -> None:
        n = next(steps)
        for decay, model in zip(decays, models, strict=True):
            for average, p in zip(model.parameters(), made.model.parameters(), strict=True):
                average.lerp_(p, (1 - decay) / (1 - decay**n))

    made.optimizers[-1].register_step_post_hook(move)
    return models


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", default="docs", help="a name or a path, as for train_tiny.py (default: docs)")
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--steps", type=int, help="(default: the preset's)")
    parser.add_argument("--decay", type=float, default=0.4, help="share of training over which the rate falls to zero")
    parser.add_argument("--averages", type=float, nargs="+", default=[0.99, 0.998, 0.9995], metavar="DECAY")
    args = parser.parse_args()
    config = TrainConfig(data=args.corpus, preset=args.preset, steps=args.steps, decay=args.decay)
    print("| Step | Weights | " + " | ".join(f"{decay:g}" for decay in args.averages) + " |")
    print("|---" * (2 + len(args.averages)) + "|")
    made = make(config)
    models = averages(made, args.averages)
    for _, bound, step in follow(made, evaluations=8):
        bounds = [bound, *(made.objective.validate(model)["bound"] for model in models)]
        print(f"| {step:,} | " + " | ".join(f"{b:.4f}" for b in bounds) + " |", flush=True)


if __name__ == "__main__":
    main()
