"""Let a trained model write: after a prompt, into the holes of a text, or in a chat."""

import os
import signal
import sys
from argparse import Namespace

if __name__ == "__main__":  # importing PyTorch takes seconds
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # Ctrl-C ends it at once; `run` listens later
    if sys.stderr and sys.stderr.isatty():
        print("loading…", end="\r", file=sys.stderr, flush=True)

from minillada.commands.ask import (
    DTYPES,
    add_questions,
    answer_file,
    defaults_of,
    files_of,
    make_talker,
    parse,
    question,
    quick_dtype,
    show,
)
from minillada.commands.chat import chat
from minillada.commands.cli import Parser, here, run
from minillada.sampler import stream
from minillada.weights.checkpoint import load, reading
from minillada.weights.device import pick_device

EXAMPLES = """examples:
  python sample.py                                       the newest run writes
  python sample.py tales --prompt "Once upon a time"     a shipped model
  python sample.py tales --fill "Once upon a time a[MASK] child named[MASK]."
  python sample.py sudoku4 --prompt "2.14..3.342..24.="  it solves a 4x4 board
  python sample.py questions --chat                      it answers
  python sample.py tales --watch 0.2 --html run.html     to follow, and to keep
  python sample.py tales --temperature 1 --commit first-hitting --gen-len 96 \\
                         --block-len 96                  an exact sample
  python sample.py runs/docs-tiny-1 --prompts lines.txt --out answers.jsonl
  python sample.py GSAI-ML/LLaDA-8B-Base --hub --prompt "The capital of"

A model is decoded as its generation_config.json says, unless told otherwise.
"""


def options() -> Namespace:
    p = Parser(__doc__, EXAMPLES)
    p.add_argument(
        "run", nargs="?", help="a run, a model directory, a GGUF file or a shipped model (default: the newest run)"
    )
    p.add_argument("--dtype", help=f"{', '.join(DTYPES)} (default: the files'; of a run on a CPU that has "
                   "instructions for it, bfloat16)")  # fmt: skip
    p.add_argument("--hub", action="store_true", help="fetch RUN, as OWNER/NAME, from the Hugging Face hub")
    add_questions(p, required=False)
    return parse(p)


def main() -> None:
    args = options()
    device = pick_device(args.device)
    name = here(args.run, args.hub, fix="choose one, or add --hub")
    dtype = lambda directory: DTYPES[args.dtype] if args.dtype else quick_dtype(directory, device)
    model = lambda directory: load(directory, device, dtype(directory))
    meet = lambda directory: make_talker(directory, name, *model(directory), args, **defaults_of(directory))
    talker = reading(name, meet, progress=sys.stderr.isatty())
    if args.chat:
        chat(args, talker)
    elif args.prompts is not None:
        answer_file(args, talker)
    else:
        asked = question(args, talker)  # a canvas with holes, and how to decode it
        steps = stream(talker.writer, asked.canvas, asked.config, args.seed, rivals=5 if files_of(args) else 0)
        show(args, talker, asked, steps)


if __name__ == "__main__":
    run(main)
