"""Which recipe learns the most in three minutes? Trains each for the same time, one after the other, and draws them.

    python benchmarks/recipes.py --minutes 3            all of them: about 4 minutes each, on an otherwise idle machine
    python benchmarks/recipes.py --only default adamw   some of them

Writes docs/recipes.json and docs/recipes.png. The bound is in nats per character of the validation text, whatever the
tokens are.
"""

import argparse
from pathlib import Path

from curves import draw, measure, read, write

from minillada.presets import PRESETS, TrainConfig

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--only", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    args = parser.parse_args()
    file = DOCS / "recipes.json"
    results = read(file)
    for name in args.only:
        config = TrainConfig(**{"precision": "bfloat16", **RECIPES[name]}, minutes=args.minutes)
        results[name] = measure(name, config) | {"changes": RECIPES[name]}
        write(results, file, minutes=args.minutes)
        draw(results, DOCS / "recipes.png")


if __name__ == "__main__":
    main()
