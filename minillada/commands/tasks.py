"""Write a toy task to train.txt, train.jsonl and test.jsonl."""

from ..text.tasks import TASKS, make_task, write_task
from .cli import Parser, say

EXAMPLES = """examples:
  python -m minillada tasks addition --n 20000 --out data/addition
                                      two digits; addition:3 has three
  python -m minillada tasks sums:32 --out data/sums      32 additions in a line
  python train_tiny.py --data data/addition/train.txt --tokenizer characters
"""


def main() -> None:
    """Read the options, make the task, write it and print the paths."""
    p = Parser(__doc__, EXAMPLES)
    p.add_argument("task", metavar="NAME", help=f"{', '.join(TASKS)}; some take a number, as addition:3")
    p.add_argument("--n", type=int, default=10_000, help="examples to train on (default: 10000)")
    p.add_argument("--test", type=int, default=500, help="at most so many questions (default: 500)")
    p.add_argument("--seed", type=int, default=0, help="other examples; what is held out stays (default: 0)")
    p.add_argument("--out", required=True, metavar="DIR", help="where the files are written")
    args = p.parse_args()
    task = make_task(args.task, args.n, args.seed, args.test)
    for path in write_task(task, args.out).values():
        say(str(path))
