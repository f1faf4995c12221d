"""Pictures of a run, where matplotlib is installed (extra `plot`)."""

import json
from pathlib import Path
from statistics import fmean


def loss_curve(run: Path) -> Path | None:
    """Draw RUN/log.jsonl as RUN/loss.png and return its path; None where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="upper bound of -log p, nats per character")
    steps = [r["step"] for r in records]
    losses = [r["loss"] / r["characters_per_token"] for r in records]
    width = max(1, len(losses) // 50)
    smooth = [fmean(losses[max(0, i - width) : i + 1]) for i in range(len(losses))]
    axes.plot(steps, losses, color="tab:blue", alpha=0.2, linewidth=0.5)
    axes.plot(steps, smooth, color="tab:blue", label=f"training, mean of {width} steps")
    bounds = [(r["step"], r["bound"]) for r in records if r["bound"] is not None]
    axes.plot(*zip(*bounds, strict=True), "o-", color="tab:orange", label="validation")
    axes.set_ylim(bottom=0, top=min(max(losses), 2.5 * smooth[-1]))
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(run / "loss.png", dpi=150)
    return run / "loss.png"
