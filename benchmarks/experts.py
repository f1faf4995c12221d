"""What the experts of a trained run learned, and how evenly they were used while it learned.

    python benchmarks/experts.py RUN [OTHER ...] [--out docs]

Writes experts.json and experts.png, of the first run: which share of each kind of token every expert of every layer
takes, in held-out text with masks at stratified levels. And expert_load.png, of all runs, one row each: the load of
every expert over training, from their logs.
"""

import argparse
import json
import math
from itertools import pairwise
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Generator, Tensor

from minillada import Tokenizer, load
from minillada.diffusion import exact_count, sample_t
from minillada.text.corpora import cache_dir
from minillada.text.ids import tokenise, validation_batch
from minillada.training.balance import watch_routing

KINDS = ["masked", "punctuation", "capitalised word", "digits", "whitespace", "identifier", "other"]


def kind(token: str) -> str:
    """What a visible token is, by its characters."""
    word = token.strip()
    if not word:
        return "whitespace"
    camel = any(a.islower() and b.isupper() for a, b in pairwise(word))
    digits, letters = (any(map(test, word)) for test in (str.isdigit, str.isalpha))
    if "_" in word or camel or (digits and letters):
        return "identifier"
    if not letters:
        return "digits" if digits else "punctuation"
    return "capitalised word" if word[0].isupper() else "other"


@torch.no_grad()
def shares(run: Path, n_rows: int) -> dict:
    """The share of the visits of each kind of token that go to each expert, (layers, kinds, E); every row sums to 1."""
    trained = json.loads((run / "run.json").read_text())
    model, tokenizer = load(run)
    text = tokenise(trained["data"], tokenizer, cache_dir() / "tokens", trained["length"])
    x0 = validation_batch(text.val, n_rows, trained["length"])
    noised = exact_count(x0, model.config.mask_id, sample_t(n_rows, Generator().manual_seed(0)), Generator())
    with watch_routing(model) as routings:
        model(noised.xt)
    of = kinds_of(tokenizer, model.config.vocab_size)[x0].masked_fill(noised.masked, KINDS.index("masked")).flatten()
    counts = of.bincount(minlength=len(KINDS))
    layers = []
    for r in routings:
        cells = of[:, None] * model.config.n_expert + r.experts
        visits = cells.flatten().bincount(minlength=len(KINDS) * model.config.n_expert).view(len(KINDS), -1)
        layers.append(visits / (counts[:, None] * model.config.n_expert_active).clamp(min=1))
    return {
        "run": run.name,
        "layer": [i for i, layer in enumerate(model.layers) if any(layer.ffn is r.moe for r in routings)],
        "tokens": dict(zip(KINDS, counts.tolist(), strict=True)),
        "shares": [[[round(share, 4) for share in row] for row in layer.tolist()] for layer in layers],
    }


def kinds_of(tokenizer: Tokenizer, vocab_size: int) -> Tensor:
    """The kind of every id, (V,), as an index into KINDS."""
    return torch.tensor([KINDS.index(kind(tokenizer.decode([id]))) for id in range(vocab_size)])


def heat_map(found: dict, path: Path) -> None:
    """One panel per layer: how many times its even share of a kind each expert takes."""
    layers, n_expert = found["shares"], len(found["shares"][0][0])
    figure = Figure(figsize=(1.6 + 2.6 * len(layers), 3.2), layout="constrained")
    panels = figure.subplots(1, len(layers), sharey=True, squeeze=False)[0]
    for axes, number, layer in zip(panels, found["layer"], layers, strict=True):
        times = [[math.log2(max(n_expert * share, 1 / 16)) for share in row] for row in layer]
        picture = axes.imshow(times, cmap="RdBu_r", vmin=-2, vmax=2, aspect="auto")
        axes.set(title=f"layer {number}", xlabel="expert")
        axes.set_yticks(range(len(KINDS)), [f"{name} ({found['tokens'][name]:,})" for name in KINDS])
    bar = figure.colorbar(picture, ax=panels, label="times the even share", extend="both")
    bar.set_ticks([-2, -1, 0, 1, 2], labels=["1/4", "1/2", "1", "2", "4"])
    figure.savefig(path, dpi=150)


def load_over_training(runs: list[Path], path: Path) -> None:
    """One row per run and one panel per layer: the experts' shares of all visits, stacked, mean of 1 % of the steps."""
    asked = [json.loads((run / "run.json").read_text()) for run in runs]
    columns = max(config["model"]["n_layer"] for config in asked)
    figure = Figure(figsize=(1 + 2.4 * columns, 0.6 + 2.1 * len(runs)), layout="constrained")
    panels = figure.subplots(len(runs), columns, sharey=True, squeeze=False)
    for run, config, row in zip(runs, asked, panels, strict=True):
        records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        steps, load = torch.tensor([r["step"] for r in records]), torch.tensor([r["load"] for r in records])  # (S,L,E)
        width = max(1, len(records) // 100)
        whole = len(records) // width * width
        load = load[:whole].unflatten(0, (-1, width)).mean(1)
        about = [f"{name} {config[name]:g}" for name in ("balance", "bias_rate") if config[name]]
        row[0].set_ylabel(f"{', '.join(about) or 'no balancing'}\nload")
        sparse = [i for i in range(columns) if i not in config["model"].get("dense_layers", ())]
        for number, shares_of_layer in zip(sparse, load.unbind(1), strict=False):
            shades = [f"C{e}" for e in range(load.shape[2])]
            row[number].stackplot(steps[width - 1 : whole : width], shares_of_layer.T, colors=shades, linewidth=0)
            row[number].set(ylim=(0, 1), title=f"layer {number}", xlabel="step")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--rows", type=int, default=256, help="of held-out text")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs")
    args = parser.parse_args()
    found = shares(args.runs[0], args.rows)
    (args.out / "experts.json").write_text(json.dumps(found) + "\n")
    heat_map(found, args.out / "experts.png")
    load_over_training(args.runs, args.out / "expert_load.png")
    for number, layer in zip(found["layer"], found["shares"], strict=True):
        for name, row in zip(KINDS, layer, strict=True):
            best = max(range(len(row)), key=row.__getitem__)
            print(f"layer {number}, {name:17} expert {best} takes {row[best]:.0%}, {len(row) * row[best]:.1f} x even")


if __name__ == "__main__":
    main()
