"""Do experts learn more? `tiny-moe` against `tiny`, of as many active parameters, for equal time and equal tokens.

    python benchmarks/moe_curves.py docs                              four runs of 3 minutes, about
    python benchmarks/moe_curves.py shakespeare.txt --tokenizer characters --length 256

And `tiny-moe` without its balancing loss. Time is that of `benchmarks/curves.py`. Writes docs/moe_CORPUS.json, and the
picture beside it: the bound by minutes and by tokens.
"""

import argparse
from pathlib import Path

import torch
from curves import measure, read, write

from minillada.training.config import TrainConfig

DOCS = Path(__file__).parents[1] / "docs"
STYLES = {"tiny": ("black", "-"), "tiny-moe": ("tab:red", "-"), "tiny-moe, tokens of tiny": ("tab:red", "--"),
          "tiny-moe, not balanced": ("tab:orange", "-")}  # fmt: skip


def draw(results: dict[str, dict], tokens: int, path: Path) -> None:
    """The bound by minutes and by tokens; a step sees so many of them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for name, result in results.items():
        seconds, bounds, steps = zip(*result["curve"][2:], strict=True)  # what comes before is far above
        color, style = STYLES[name]
        label = f"{name}: {result['bound']:.3f}"
        left.plot([s / 60 for s in seconds], bounds, color=color, linestyle=style)
        right.plot([s * tokens / 1e6 for s in steps], bounds, color=color, linestyle=style, label=label)
    left.set(xlabel="minutes of training", ylabel="upper bound of −log p, nats per character")
    right.set(xlabel="million tokens")
    right.legend(frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", help="a name or a path, as for train_tiny.py")
    parser.add_argument("--tokenizer", help="characters, bytes or bpe:SIZE (default: the preset's)")
    parser.add_argument("--length", type=int, help="tokens of context (default: the preset's)")
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="JSON (default: docs/moe_CORPUS.json)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    common = {"data": args.corpus, "tokenizer": args.tokenizer, "length": args.length, "precision": "bfloat16"}
    file = args.out or DOCS / f"moe_{Path(args.corpus).stem}.json"
    results = read(file)
    for name in STYLES:
        changes: dict = {"preset": name.split(",")[0], "minutes": args.minutes}
        if "tokens" in name:
            changes |= {"minutes": None, "steps": results["tiny"]["steps"]}
        if "not balanced" in name:
            changes["balance"] = 0.0
        config = TrainConfig(**common, **changes)
        results[name] = results.get(name) or measure(name, config)
        write(results, file, corpus=Path(args.corpus).name, minutes=args.minutes)
        draw(results, config.batch_size * config.length, file.with_suffix(".png"))


if __name__ == "__main__":
    main()
