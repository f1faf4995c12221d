"""What 8 and 4 bits cost in accuracy: the bound of a trained run on its own validation text, in nats per character.

python benchmarks/quantize.py runs/docs-tiny-1
"""

import json
import sys
from pathlib import Path

import torch

from minillada import load, log_likelihoods
from minillada.text.corpora import cache_dir
from minillada.text.ids import tokenise, validation_batch
from minillada.weights.quantize import memory, quantize


def main(run: str) -> None:
    trained = json.loads((Path(run) / "run.json").read_text())
    _, tokenizer = load(run)
    text = tokenise(trained["data"], tokenizer, cache_dir() / "tokens", trained["length"])
    rows = [([], row) for row in validation_batch(text.val, 256, trained["length"]).tolist()]
    for dtype in (torch.float32, torch.bfloat16):
        plain = None
        for bits in (None, "int8", "int4"):
            model, _ = load(run, dtype=dtype)
            model = quantize(model, bits) if bits else model
            values, _ = log_likelihoods(model, rows, n_samples=8)  # the same masks every time
            values = -values / trained["length"] / text.characters_per_token
            plain = values if plain is None else plain
            lost, error = (values - plain).mean().item(), (values - plain).std().item() / len(rows) ** 0.5
            print(f"{str(dtype)[6:]:9} {bits or 'plain':6} {memory(model) / 1e6:6.2f} MB   <= {values.mean():.4f} "
                  f"nats per character, {lost:+.4f} (standard error {error:.4f})", flush=True)  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1])
