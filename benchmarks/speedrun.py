"""Who learns most in the time? Rules and the board are in docs/speedrun.md.

    python benchmarks/speedrun.py                          every entry of the track `tales`: three minutes each
    python benchmarks/speedrun.py --only default narrower  some of them
    python benchmarks/speedrun.py --track shakespeare --file shakespeare.txt     ten minutes each
    python benchmarks/speedrun.py --name mine --set n_head=8 lr=0.02             an entry of your own

Two threads, one entry after the other; use an otherwise idle machine. Results are added to docs/speedrun.json.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

from minillada.files import write_json
from minillada.sampler import SampleConfig, generate
from minillada.text.tales import entropy_per_character, flawless
from minillada.training.config import PRESETS, TrainConfig
from minillada.training.run import RunStep, train

BOARD = Path(__file__).parents[1] / "docs" / "speedrun.json"
TINY = PRESETS["tiny"]["model"]
TRACKS = {"tales": 3.0, "shakespeare": 10.0}  # minutes

# name -> fields of TrainConfig that differ from the default; "model" has those of ModelConfig that differ
ENTRIES: dict[str, dict] = {
    "the default": {},
    "before: windows of the text, 2 heads, width 128": {
        "rows": "windows", "length": 128, "tokenizer": "bpe:4096", "model": {**TINY, "n_head": 2, "d_model": 128}
    },
    "AdamW": {"optimizer": "adamw", "lr": 0.003, "adam_lr": 0.003},
    "narrower: width 64, 4 heads": {"model": {"n_head": 4, "d_model": 64, "d_ff": 176}},
    "wider: width 128, 8 heads": {"model": {"n_head": 8, "d_model": 128, "d_ff": 352}},
    "2 heads": {"model": {"n_head": 2}},
    "rotary base 100": {"model": {"rope_theta": 100.0}},
    "16 rows a step": {"batch_size": 16},
    "blocks of 4": {"block": 4},
    "blocks of 1: autoregression": {"block": 1},
}  # fmt: skip


def config_of(changes: dict, source: str, minutes: float) -> TrainConfig:
    """Return the config of an entry: the default of its track, changed."""
    default = TrainConfig(data=source)
    model = {"model": {**default.model, **changes["model"]}} if "model" in changes else {}
    return TrainConfig(**{"data": source, "minutes": minutes, "eval_every": 10**9, **changes, **model})


def stories(step: RunStep, n: int = 100, seed: int = 0) -> list[str]:
    """Return n texts that a model writes from nothing, as its run says."""
    c, length = step.model.config, step.length - 1
    config = SampleConfig(**{"gen_len": length, "steps": length, "block_len": length, **step.config.sampling})
    return [step.tokenizer.decode(new).strip() for new in generate(step.model, [[c.eos_id]] * n, config, seed)]


def measure(config: TrainConfig) -> dict:
    """Train; return what the board shows of it."""
    for step in train(config):
        if sys.stderr.isatty():
            print(f"\rstep {step.step}, {step.seconds:.0f} s", end="", file=sys.stderr)
    found = {"bound": step.bound, "steps": step.step, "parameters": step.model.n_parameters()}
    if config.rows == "documents":
        told = stories(step)
        found |= {"flawless": flawless(told), "distinct": len(set(told)) / len(told), "example": told[0]}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--track", choices=TRACKS, default="tales")
    parser.add_argument("--file", help="the text of the track shakespeare, if it cannot be downloaded")
    parser.add_argument("--only", nargs="+", metavar="ENTRY", help=f"of {', '.join(ENTRIES)}")
    parser.add_argument("--name", help="of an entry of your own")
    parser.add_argument("--set", nargs="+", default=[], metavar="FIELD=VALUE", help="what differs from the default")
    parser.add_argument("--minutes", type=float, help="(default: the track's)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(2)
    if strange := set(args.only or ()) - set(ENTRIES):
        parser.error(f"only: expected {', '.join(ENTRIES)}, got {', '.join(sorted(strange))}")
    entries = {name: ENTRIES[name] for name in args.only or ENTRIES}
    if args.name:
        given = {key: json.loads(value) if value[:1] in "0123456789-{tf" else value
                 for key, _, value in (pair.partition("=") for pair in args.set)}  # fmt: skip
        inner = {key: given.pop(key) for key in [*given] if key in ("n_layer", "n_head", "d_model", "d_ff", "qk_norm")}
        entries = {args.name: given | ({"model": inner} if inner else {})}
    minutes = args.minutes or TRACKS[args.track]
    for name, changes in entries.items():
        config = config_of({"seed": args.seed, **changes}, args.file or args.track, minutes)
        found = measure(config)
        print(f"{args.track}: {name}: <= {found['bound']:.4f} nats/char, {found['steps']} steps, "
              f"flawless {found.get('flawless', float('nan')):.0%}", flush=True)  # fmt: skip
        board = json.loads(BOARD.read_text(encoding="utf-8")) if BOARD.exists() else {}
        row = {**found, "changes": changes, "minutes": minutes, "precision": config.precision}
        board.setdefault(args.track, {})[name if not args.seed else f"{name}, seed {args.seed}"] = row
        write_json(BOARD, board)
    if args.track == "tales":
        print(f"(the stories' entropy: {entropy_per_character():.4f} nats/char)")


if __name__ == "__main__":
    main()
