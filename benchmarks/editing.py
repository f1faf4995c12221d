"""Show what overwriting repairs: boards filled in few steps by models that learned to correct, or did not.

python benchmarks/editing.py        two trainings of a few minutes on one core, then a table
"""

import argparse
import json
from pathlib import Path

import torch

import minillada
from minillada import SampleConfig, stream
from minillada.files import write_file
from minillada.sampler import Canvas
from minillada.text.tasks import make_task
from minillada.training.config import TrainConfig
from minillada.training.run import train

RUNS, BOARD = Path("runs/editing"), {"n_layer": 3, "n_head": 4, "d_model": 96, "d_ff": 256, "rope_theta": 100.0}


def trained(errors: float, steps: int) -> Path:
    """Train a solver of 4x4 boards, unless it is there; errors: the share of given cells that are made wrong."""
    data, out = RUNS / "boards.jsonl", RUNS / f"errors-{errors:g}-{steps}"
    if not data.exists():
        rows = ({"text": f"{example.text}\n"} for example in make_task("sudoku4", 60_000, 1, 0).train)
        write_file(data, (f"{json.dumps(row)}\n".encode() for row in rows))
    if not (out / "checkpoints").exists():
        config = TrainConfig(data=str(data), model=BOARD, tokenizer="characters", rows="documents", length=36,
                             steps=steps, batch_size=64, errors=errors, out=str(out), eval_every=steps)  # fmt: skip
        for step in train(config):
            if step.step % 100 == 0:
                print(f"errors {errors:g}: step {step.step}, {step.seconds:.0f} s", flush=True)
    return out


def solved(home: Path, commit: str, n: int = 100) -> tuple[float, float, int]:
    """Return the share of unseen boards solved, the evaluations, and how many cells were overwritten."""
    model, tokenizer = minillada.load(home)
    puzzles = make_task("sudoku4", 0, 7, n).test
    rows = [[tokenizer.eos_id, *tokenizer.encode(p.prompt), *[tokenizer.mask_id] * 16] for p in puzzles]
    config = SampleConfig(gen_len=16, steps=16, block_len=16, commit=commit, stop_at_eos=False, ban_eos=True)
    right, evaluations, edits = 0, 0, 0
    for row, puzzle in zip(rows, puzzles, strict=True):
        before = torch.tensor([row])
        for step in stream(model, Canvas.infill([row], model.config), config):
            edits += (step.committed & (before != tokenizer.mask_id)).sum().item()
            before = step.x
        evaluations += step.nfe
        right += tokenizer.decode(step.x[0, -16:].tolist()) == puzzle.answer
    return right / n, evaluations / n, edits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=1000, help="of each training (default: 1000)")
    parser.add_argument("--n", type=int, default=100, help="boards (default: 100)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for errors in (0.15, 0.0):
        home = trained(errors, args.steps)
        for tau in (0.0, 0.5, 0.9):
            for edit in (1.0, 0.5):
                share, nfe, edits = solved(home, f"llada2.1:{tau},{edit},16", args.n)
                how = f"overwriting above {edit:g}" if edit < 1 else "no overwriting"
                print(f"learned errors {errors:g}, writes above {tau:g}, {how}: {share:.0%} solved in {nfe:.1f} "
                      f"evaluations, {edits} cells overwritten", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
