"""Write the questions of the tasks beside this file: `python examples/lm_eval/make.py`. Always the same ones."""

import json
import random
from pathlib import Path

from minillada.text.tasks import make_task

HERE = Path(__file__).parent


def choices() -> list[dict]:
    """A sum and four numbers to choose from, which differ in a digit."""
    rng, items = random.Random(0), []
    for example in make_task("addition", 0, n_test=40).test:
        right = int(example.answer)
        options = [*rng.sample([right - 10, right - 1, right + 1, right + 10], 3), right]
        rng.shuffle(options)
        answer = options.index(right)
        items.append({"prompt": f"\n{example.prompt}", "options": [str(o) for o in options], "answer": answer})
    return items


def sums() -> list[dict]:
    """The same kind of sum, to be written out."""
    return [{"prompt": f"\n{e.prompt}", "answer": e.answer} for e in make_task("addition", 0, n_test=40).test]


def text() -> list[dict]:
    """Ten texts of 30 sums in lines, longer than a toy model sees at a time."""
    lines = [e.text for e in make_task("addition", 0, n_test=300).test]
    return [{"text": "\n" + "\n".join(lines[i : i + 30])} for i in range(0, 300, 30)]


FILES = {"choices.jsonl": choices, "sums.jsonl": sums, "text.jsonl": text}

if __name__ == "__main__":
    for name, make in FILES.items():
        (HERE / name).write_text("".join(json.dumps(item) + "\n" for item in make()), encoding="utf-8", newline="\n")
