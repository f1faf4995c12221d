"""Which recipe learns the most in three minutes? Trains each for the same time, one after the other, and draws them.

    python benchmarks/recipes.py --minutes 3            all of them: about 4 minutes each, on an otherwise idle machine
    python benchmarks/recipes.py --only default adamw   some of them

Writes docs/recipes.json and docs/recipes.png. The bound is in nats per character of the validation text, whatever the
tokens are.
"""

import argparse
import json
import platform
from pathlib import Path

import torch

from minillada import TrainConfig, train
from minillada.presets import PRESETS

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
    "1/t of the guidelines": {"process": "bernoulli"},
    "float32": {"precision": "float32"},
    "characters": {"tokenizer": "characters", "length": 256},
}


def measure(name: str, minutes: float) -> dict:
    config = TrainConfig(minutes=minutes, precision=RECIPES[name].get("precision", "bfloat16"),
                         **{k: v for k, v in RECIPES[name].items() if k != "precision"}, eval_every=250)  # fmt: skip
    curve = []
    for step in train(config):
        if step.bound is not None:
            curve.append([round(step.seconds, 1), round(step.bound, 4)])
    result = {"bound": curve[-1][1], "tokens_per_second": round(step.tokens_per_second), "steps": step.step}
    print(f"{name}: <= {step.bound:.4f} nats per character, {step.step} steps, {step.tokens_per_second:,.0f} tokens/s")
    return result | {"parameters": step.model.n_parameters(), "changes": RECIPES[name], "curve": curve}


def draw(results: dict[str, dict], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="seconds of training", ylabel="upper bound of -log p, nats per character")
    for name, result in sorted(results.items(), key=lambda item: item[1]["bound"]):
        line = {"linewidth": 2.5, "color": "black"} if name == "default" else {"linewidth": 1.2}
        axes.plot(*zip(*result["curve"], strict=True), label=f"{name}: {result['bound']:.3f}", **line)
    axes.set_ylim(top=2.6)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--only", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    args = parser.parse_args()
    file = DOCS / "recipes.json"
    results = json.loads(file.read_text())["recipes"] if file.exists() else {}
    for name in args.only:
        results[name] = measure(name, args.minutes)
        about = {"python": platform.python_version(), "torch": torch.__version__, "threads": torch.get_num_threads()}
        file.write_text(json.dumps(about | {"minutes": args.minutes, "recipes": results}, indent=1) + "\n")
        draw(results, DOCS / "recipes.png")


if __name__ == "__main__":
    main()
