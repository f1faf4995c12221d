"""Let a trained model write: after a prompt, into the holes of a text, or in a chat."""

from minillada.commands.ask import add_questions, answer, defaults_of, make_talker, parse
from minillada.commands.cli import Parser, newest_run, run
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


def main() -> None:
    p = Parser(__doc__, EXAMPLES)
    p.add_argument("run", nargs="?", help="a run directory, or any model directory (default: the newest run)")
    add_questions(p, required=False)
    args = parse(p)
    device = pick_device(args.device)
    name = args.run or str(newest_run())
    found = check(name)
    model, tokenizer = load(found.directory, device)
    defaults = defaults_of(name, found.directory)
    answer(args, make_talker(found.directory, name, model, tokenizer, args, **defaults))


if __name__ == "__main__":
    run(main)
