"""Draw a run, where matplotlib is installed (extra `plot`)."""

import json
from pathlib import Path
from statistics import fmean

# The held-out figures of objectives by their names in the log, and what they are.
HELD_OUT = {
    "bound": "bound",
    "preference_loss": "preference loss",
    "jump_loss": "jump loss",
    "wrong": "share of wrong answers",
}


def loss_curve(run: Path) -> Path | None:
    """Draw RUN/log.jsonl as RUN/loss.png and return its path; None where matplotlib is not installed. Left, the loss
    and the held-out figure by step. Right, if the evaluations logged "levels" [[t, nats per masked token], ...], the
    loss by masking level at the first, the middle and the last of them."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    records = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    evaluations = [r for r in records if r.get("levels")]
    figure = Figure(figsize=(10 if evaluations else 6.5, 4), layout="constrained")
    panels = figure.subplots(1, 2 if evaluations else 1, squeeze=False)[0]
    for axes, draw, data in zip(panels, (draw_steps, draw_levels), (records, evaluations), strict=False):
        draw(axes, data)
        axes.legend(frameon=False, ncols=3, columnspacing=1.2, loc="lower left", bbox_to_anchor=(0, 1))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="0.92")
        axes.set_axisbelow(True)
    figure.savefig(run / "loss.png", dpi=150)
    return run / "loss.png"


def draw_steps(axes, records: list[dict]) -> None:
    """Draw every step's loss that is finite, its running mean, and the held-out figure where there is one. Losses in
    nats per token become nats per character; those of other objectives stay as they are."""
    held_out = next((name for name in HELD_OUT if any(name in r for r in records)), "bound")
    is_bound = held_out == "bound"
    finite = [r for r in records if r["loss"] is not None]
    steps = [r["step"] for r in finite]
    losses = [r["loss"] / (r["characters_per_token"] if is_bound else 1.0) for r in finite]
    bounds = [(r["step"], r[held_out]) for r in records if r[held_out] is not None]
    width = max(1, len(losses) // 50)
    smooth = [fmean(losses[max(0, i - width + 1) : i + 1]) for i in range(len(losses))]
    label = f"training, mean of {width} steps" if width > 1 else "training"
    axes.plot(steps, losses, color="tab:blue", alpha=0.2, linewidth=0.5)
    axes.plot(steps, smooth, "o-" if len(steps) == 1 else "-", color="tab:blue", label=label)
    axes.plot(*zip(*bounds, strict=True) if bounds else ((), ()), "o-", color="tab:orange", ms=4, label="validation")
    top = min(1.05 * max(losses), 2.5 * smooth[-1]) if losses else 0
    axes.set_ylim(0, top or 1)
    other = f"training: loss; validation: {HELD_OUT[held_out]}"
    height = "upper bound of −log p, nats per character" if is_bound else other
    axes.set(xlabel="step", ylabel=height)


def draw_levels(axes, evaluations: list[dict]) -> None:
    """Draw the held-out loss by masking level: small with few holes, and with nothing but holes that of frequencies."""
    chosen = sorted({0, len(evaluations) // 2, len(evaluations) - 1})
    for i, shade in zip(chosen, ("#fdc086", "#f0801a", "#8c3a04")[-len(chosen) :], strict=True):
        t, nats = zip(*evaluations[i]["levels"], strict=True)
        nats = [float("nan") if x is None else x for x in nats]
        axes.plot(t, nats, "o-", color=shade, ms=4, label=f"step {evaluations[i]['step']:,}")
    axes.set(xlabel="masking level t, share of tokens masked", ylabel="validation, nats per masked token")
    axes.set(xlim=(0, 1), ylim=(0, None))
