"""Let a trained model write: after a prompt, into the holes of a text, or in a chat."""

from minillada.ask import add_questions, answer, make_talker, parse
from minillada.checkpoint import check, load
from minillada.cli import Parser, newest_run, pick_device, run

EXAMPLES = """examples:
  python sample.py                                            the newest run writes freely
  python sample.py runs/docs-tiny-1 --prompt "The return "    it goes on from there
  python sample.py runs/docs-tiny-1 --fill "if [MASK][MASK] in the list"
  python sample.py runs/docs-tiny-1 --temperature 1 --commit first-hitting --seed 7    an exact sample
  python sample.py runs/docs-tiny-1 --prompts lines.txt --out answers.jsonl

By default it draws at temperature 0.7 in random order: filling in the surest first (--remasking low_confidence), which
large models want, makes so small a one repeat itself.
"""
OPTIONS = {"temperature": 0.7, "remasking": "random"}


def main() -> None:
    p = Parser(__doc__, EXAMPLES)
    p.add_argument("run", nargs="?", help="a run directory, or any model directory (default: the newest run)")
    add_questions(p, required=False)
    args = parse(p)
    device = pick_device(args.device)
    found = check(args.run or newest_run())
    model, tokenizer = load(found.directory, device)
    answer(args, make_talker(found.directory, args.run or "", model, tokenizer, args, **OPTIONS))


if __name__ == "__main__":
    run(main)
