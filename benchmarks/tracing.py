"""What tracing costs beside the sampling, on one thread, and how large a page gets.

python benchmarks/tracing.py runs/docs-small-1
"""

import sys
import time

import torch

import minillada
from minillada.sampler import Step
from minillada.show.page import to_html
from minillada.show.trace import Trace

LENGTH = 128
WAYS = {
    "low confidence, temperature 0": {},
    "random order, temperature 0.7": {"temperature": 0.7, "remasking": "random"},
    "one window of 128": {"block_len": LENGTH},
    "remdm-conf, temperature 0.7": {"temperature": 0.7, "revise": "remdm-conf"},
}


def seconds(work) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def measure(model, tokenizer, options: dict) -> None:
    """Sample twice in turns, with five rivals a token and without: what a trace costs beside what sampling costs."""
    config = minillada.SampleConfig(gen_len=LENGTH, steps=LENGTH, **{"block_len": 32, **options})
    prompt = tokenizer.encode("The return value")[: model.config.max_len - LENGTH]
    canvas = minillada.Canvas.continuation([prompt], LENGTH, model.config)
    runs = {rivals: minillada.stream(model, canvas, config, rivals=rivals) for rivals in (0, 5)}
    spent, kept = dict.fromkeys(runs, 0.0), {rivals: [] for rivals in runs}
    while not any(steps and steps[-1] is None for steps in kept.values()):
        for rivals, steps in runs.items():
            spent[rivals] += seconds(lambda: kept[rivals].append(next(steps, None)))  # noqa: B023
    made = []
    tracing = spent[5] - spent[0] + seconds(lambda: made.append(Trace.record(kept[5][:-1], tokenizer)))
    page = seconds(lambda: made.append(to_html(made[0])))
    print(f"sampling {spent[0]:.2f} s, tracing {tracing:.3f} s, {tracing / spent[0]:.1%}; "
          f"page {page:.3f} s, {len(made[1]) / 1e3:.0f} kB")  # fmt: skip


def noise(n: int, hold: int, words: int) -> list[Step]:
    """n tokens in n steps, in which the proposal of every hole changes every `hold` steps."""
    order = torch.randperm(n)
    draws = torch.randint(4, words, (n // hold + 1, n))
    x, steps, nothing = torch.zeros(1, n, dtype=torch.long), [], torch.zeros(1, n, dtype=torch.bool)
    for step in range(n):
        hole, committed = x == 0, nothing.clone()
        committed[0, order[step]] = True
        proposed = torch.where(hole, draws[step // hold], x)
        p = torch.rand(x.shape).masked_fill(~hole, torch.nan)
        x = torch.where(committed, proposed, x)
        steps.append(Step(x, proposed, p, p, committed, nothing, slice(0, n), step, step + 1))
    return steps


def main() -> None:
    torch.set_num_threads(1)
    model, tokenizer = minillada.load(sys.argv[1])
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {LENGTH} tokens in {LENGTH} steps")
    for name, options in WAYS.items():
        print(f"{name:34}", end="", flush=True)
        measure(model, tokenizer, options)
    for hold in (1, 8, 64):
        steps, made = noise(1024, hold, tokenizer.vocab_size), []
        recording = seconds(lambda: made.append(Trace.record(steps, tokenizer)))  # noqa: B023
        page = seconds(lambda: made.append(to_html(made[0])))  # noqa: B023
        print(f"1024 x 1024, proposals change every {hold:2} steps: {len(made[0].step):,} events, recorded in "
              f"{recording:.2f} s, page of {len(made[1]) / 1e6:.2f} MB in {page:.2f} s")  # fmt: skip


if __name__ == "__main__":
    main()
