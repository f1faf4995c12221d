"""Which recipe learns the most in three minutes? Trains each for the same time, one after the other, and draws them.

    python benchmarks/recipes.py --minutes 3            all of them: about 4 minutes each, on an otherwise idle machine
    python benchmarks/recipes.py --only default adamw   some of them
    python benchmarks/recipes.py --details --minutes 1 --threads 1      what is smaller: twenty minutes of a processor

Writes docs/recipes.json and docs/recipes.png; details are printed only. The bound is in nats per character of the
validation text, whatever the tokens are. With one thread, time is the processor's.
"""

import argparse
from pathlib import Path

import torch
from curves import draw, measure, read, write
from torch import nn

from minillada.model import LLaDA
from minillada.training.config import PRESETS, TrainConfig

DOCS = Path(__file__).parents[1] / "docs"
TINY = PRESETS["tiny"]["model"]
W192 = {"model": {**TINY, "d_model": 192, "d_ff": 512, "n_head": 3}}

# name -> what differs from the default
RECIPES: dict[str, dict] = {
    "default": {},
    "6 layers": {"model": {**TINY, "n_layer": 6}},
    "width 192": W192,
    "width 256": {"model": {**TINY, "d_model": 256, "d_ff": 704, "n_head": 4}},
    "width 192, vocabulary 2048": {**W192, "tokenizer": "bpe:2048"},
    "width 192, vocabulary 2048, batch 16": {**W192, "tokenizer": "bpe:2048", "batch_size": 16},
    "width 192, adamw": {**W192, "optimizer": "adamw", "lr": 0.003},
    "adamw": {"optimizer": "adamw", "lr": 0.006},
    "adamw at 0.001": {"optimizer": "adamw", "lr": 0.001, "adam_lr": 0.001},
    "1/t of the guidelines": {"process": "bernoulli"},
    "float32": {"precision": "float32"},
    "characters": {"tokenizer": "characters", "length": 256},
}


def plainly(model: LLaDA) -> None:
    """Begin with the same deviation everywhere, as GPT-2 does."""
    rng = torch.Generator().manual_seed(0)
    for p in model.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=0.02, generator=rng)


DETAILS: dict[str, dict] = {  # the same; `stratified` and `begin` are of curves.measure
    "default": {},
    "another seed": {"seed": 1},
    "head tied to the embedding": {"model": {**TINY, "tie_head": True}},
    "initial deviation 0.02 everywhere": {"begin": plainly},
    "rotary base 10,000": {"model": {**TINY, "rope_theta": 10_000.0}},
    "4 × 128 tokens a step": {"batch_size": 4},
    "16 × 128 tokens a step": {"batch_size": 16},
    "16 × 64 tokens a step": {"batch_size": 16, "length": 64},
    "4 × 256 tokens a step": {"batch_size": 4, "length": 256},
    "no warm-up": {"warmup": 0.0},
    "the rate falls from the start": {"decay": 1.0},
    "the rate falls in the last tenth": {"decay": 0.1},
    "no clipping": {"clip": 1e6},
    "no weight decay": {"weight_decay": 0.0},
    "independent masking levels": {"stratified": False},
    "Bernoulli masks, weight 1/t": {"process": "bernoulli"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--only", nargs="+", metavar="RECIPE", help=f"of {', '.join(RECIPES)}; of the details: by name")
    parser.add_argument("--details", action="store_true", help="what makes less of a difference")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    recipes, file = DETAILS if args.details else RECIPES, DOCS / "recipes.json"
    if strange := set(args.only or ()) - set(recipes):
        parser.error(f"only: expected {', '.join(recipes)}, got {', '.join(sorted(strange))}")
    for name in args.only or recipes:
        changes = dict(recipes[name])
        how = {key: changes.pop(key) for key in ("stratified", "begin") if key in changes}
        config = TrainConfig(**{"precision": "bfloat16", **changes}, minutes=args.minutes)
        found = measure(name, config, **how)
        if not args.details:
            results = read(file) | {name: found | {"changes": changes}}
            write(results, file, minutes=args.minutes)
            draw(results, DOCS / "recipes.png")


if __name__ == "__main__":
    main()
