"""Let a trained model write: after a prompt, into the holes of a text, or in a chat."""

from argparse import Namespace

from minillada.commands.ask import add_questions, answer_file, defaults_of, files_of, make_talker, parse, question, show
from minillada.commands.chat import chat
from minillada.commands.cli import Parser, newest_run, run
from minillada.sampler import stream
from minillada.weights.checkpoint import check, load
from minillada.weights.device import pick_device

EXAMPLES = """examples:
  python sample.py                                            the newest run writes freely
  python sample.py runs/docs-tiny-1 --prompt "The return "    it goes on from there
  python sample.py runs/docs-tiny-1 --fill "If the[MASK] is not a[MASK]"
  python sample.py runs/docs-tiny-1 --temperature 1 --commit first-hitting --block-len 128    an exact sample
  python sample.py runs/docs-tiny-1 --prompts lines.txt --out answers.jsonl
  python sample.py runs/docs-tiny-1 --watch 0.2 --html run.html --svg run.svg    to be followed, and to be kept

A run of train_tiny.py is drawn from at temperature 0.7 in random order unless told otherwise: filling in the surest
first (--temperature 0 --remasking low_confidence, the default for other models) makes so small a one repeat itself.
"""


def options() -> Namespace:
    p = Parser(__doc__, EXAMPLES)
    p.add_argument("run", nargs="?", help="a run directory, or any model directory (default: the newest run)")
    add_questions(p, required=False)
    return parse(p)


def main() -> None:
    args = options()
    device = pick_device(args.device)
    name = args.run or str(newest_run())
    directory = check(name).directory
    model, tokenizer = load(directory, device)
    talker = make_talker(directory, name, model, tokenizer, args, **defaults_of(name, directory))
    if args.chat:
        chat(args, talker)
    elif args.prompts is not None:
        answer_file(args, talker)
    else:
        asked = question(args, talker)  # a canvas with holes, and how to decode it
        steps = stream(model, asked.canvas, asked.config, args.seed, rivals=5 if files_of(args) else 0)
        show(args, talker, asked, steps)


if __name__ == "__main__":
    run(main)
