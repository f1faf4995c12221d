"""How much memory does a training step of the preset `small` need, and how does that grow?

    python benchmarks/memory.py            every row in a fresh process, single-threaded: two minutes

Prints a Markdown table: the peak of the resident memory during two optimiser steps, less what the process had before
the model was made (Python, PyTorch, the batch). "Held" is what stays from step to step, by arithmetic: weights,
gradients, the optimisers' state, and the copy of weights and state that a crash would go back to.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
from dataclasses import replace

import numpy as np
import torch

from minillada import TrainConfig
from minillada.model import LLaDA, ModelConfig
from minillada.text.ids import Tokens
from minillada.train import learn
from minillada.training.optim import make_optimizers, recompute, snapshot
from minillada.training.pretraining import TextPretraining

VOCABULARY = 2048

ROWS: dict[str, dict] = {
    "6 layers, 4 × 256": {},
    "3 layers": {"n_layer": 3},
    "12 layers": {"n_layer": 12},
    "length 512": {"length": 512},
    "length 1024": {"length": 1024},
    "batch 8": {"batch_size": 8},
    "batch 16": {"batch_size": 16},
    "batch 16, accumulate 4": {"batch_size": 16, "accumulate": 4},
    "batch 16, recompute": {"batch_size": 16, "recompute": True},
    "batch 16, bfloat16": {"batch_size": 16, "precision": "bfloat16"},
}


def peak() -> int:
    """The most resident memory so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure(changes: dict) -> dict:
    """Bytes of one configuration: to be called in a fresh process."""
    torch.set_num_threads(1)
    changes = {"batch_size": 4, "length": 256, "precision": "float32", "twin": 0.0} | changes
    n_layer = changes.pop("n_layer", None)
    config = TrainConfig(preset="small", **changes)
    if n_layer:
        config = replace(config, model={**config.model, "n_layer": n_layer})
    ids = np.random.default_rng(0).integers(0, VOCABULARY - 1, 4 * config.batch_size * config.length, dtype=np.uint16)
    objective = TextPretraining(Tokens(ids, ids, 1.0, 1.0, ""), config, VOCABULARY - 1)
    torch.ones(1).bfloat16() @ torch.ones(1, 1).bfloat16()  # what libraries set up once is not counted
    before = peak()
    model = LLaDA(ModelConfig(VOCABULARY, VOCABULARY - 1, max_len=config.length, **config.model))
    model = recompute(model) if config.recompute else model
    optimizers = make_optimizers(model, config)
    kept = None
    for _, _ in zip(range(2), learn(model, optimizers, objective, config, torch.Generator()), strict=False):
        kept = kept or snapshot(model, optimizers)  # as in training, what one can go back to
    state = sum(t.nbytes for of in kept[1:] for s in of["state"].values() for t in s.values())
    weights = sum(p.nbytes for p in model.parameters())
    return {"peak": peak() - before, "held": 3 * weights + 2 * state, "parameters": model.n_parameters()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--row", choices=list(ROWS), help="this one alone, as JSON")
    args = parser.parse_args()
    if args.row:
        print(json.dumps(measure(dict(ROWS[args.row]))))
        return
    print("| | Parameters | Held | Peak | The rest, mostly activations |\n|---|---|---|---|---|")
    for name in ROWS:
        command = [sys.executable, __file__, "--row", name]
        threads = os.environ | {"OMP_NUM_THREADS": "1"}
        found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True, env=threads).stdout)
        held, most = found["held"] / 1e6, found["peak"] / 1e6
        print(
            f"| {name} | {found['parameters'] / 1e6:.1f} M | {held:.0f} MB | {most:.0f} MB | {most - held:.0f} MB |",
            flush=True,
        )


if __name__ == "__main__":
    main()
