"""Which share of the words that a run writes are words of its training text? Beside it, real held-out text's share.

python benchmarks/words.py runs/docs-tiny-1 --samples 32 --temperature 0.7
"""

import argparse
import json
import re
from pathlib import Path

from minillada import SampleConfig, generate, load
from minillada.text.corpora import read_text, training_part


def words(text: str) -> list[str]:
    """Runs of letters; the first and the last may be cut off and do not count."""
    return re.findall(r"[A-Za-z]+", text)[1:-1]


def share(texts: list[str], known: set[str]) -> float:
    found = [word for text in texts for word in words(text)]
    return sum(word in known for word in found) / max(1, len(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--remasking", default="random")
    args = parser.parse_args()
    source = json.loads((args.run / "run.json").read_text())["data"]
    text = "".join(read_text(source))
    cut = training_part(len(text))
    known = set(words(text[:cut]))
    model, tokenizer = load(args.run)
    length = model.config.max_len
    config = SampleConfig(length, length, length, temperature=args.temperature, remasking=args.remasking)
    written = [tokenizer.decode(ids) for ids in generate(model, [[]] * args.samples, config)]
    size = sum(map(len, written)) // len(written)
    held_out = [text[i : i + size] for i in range(cut, len(text) - size, size)]
    print(f"written: {share(written, known):.1%} of {sum(len(words(t)) for t in written)} words are known")
    print(f"held-out: {share(held_out, known):.1%} of {sum(len(words(t)) for t in held_out)}")
    print(*("\n" + text for text in written[:3]), sep="\n")


if __name__ == "__main__":
    main()
