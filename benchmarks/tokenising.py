"""Measure how fast a large text is tokenised, and with how much memory.

    python benchmarks/tokenising.py                       100 MB: about five minutes
    python benchmarks/tokenising.py --megabytes 1000      and about half an hour

The text is made of the files of the installed Python and its packages, whole ones in a random order, then all of them
in another order, until it is large enough. Every row of the table is a process of its own: the tokenizer of the preset
`tiny` learns its merges; the ids are written; a training finds them and takes its first steps (it learns the merges
again). Seconds are those of the clock and of the processor. The peak is of resident memory, Python and PyTorch
included: 0.3 GB before anything is done. RAYON_NUM_THREADS sets the threads that tokenise.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from loading import peak_memory

from minillada import TrainConfig, train
from minillada.text.corpora import cache_dir, make_tokenizer
from minillada.text.ids import tokenise
from minillada.text.tokenizer import Tokenizer

SUFFIXES = (".py", ".txt", ".rst", ".md")
TRAINING = {"steps": 20, "eval_every": 10}
STAGES: dict[str, Callable[[str, Path], object]] = {
    "merges": lambda text, home: make_tokenizer(TrainConfig().tokenizer, text).save(home),
    "ids": lambda text, home: tokenise(text, Tokenizer.load(home), cache_dir() / "tokens"),
    "20 steps": lambda text, home: list(train(TrainConfig(data=text, **TRAINING))),
}


def files() -> Iterator[bytes]:
    """What the installed Python and its packages hold as text, in one random order after the other for ever."""
    roots, rng = {sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")}, random.Random(0)
    found = sorted({p for root in roots for p in Path(root).rglob("*") if p.suffix in SUFFIXES and p.is_file()})
    while True:
        yield from (path.read_bytes() for path in rng.sample(found, len(found)))


def write_text(path: Path, size: int) -> None:
    """At least `size` bytes of UTF-8."""
    texts = files()
    with open(path, "wb") as file:
        while file.tell() < size:
            text = next(texts)
            if b"\0" not in text and text.decode(errors="replace").encode() == text:
                file.write(text)


def measure(stage: str, text: Path, home: Path) -> None:
    """Run a stage in a process of its own and print its row of the table."""
    command = [sys.executable, __file__, "--stage", stage, str(text), str(home)]
    environment = os.environ | {"MINILLADA_CACHE": str(home / "cache")}
    found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, env=environment).stdout)
    seconds, size = found["seconds"], text.stat().st_size
    speed = f"{size / 1e6 / seconds:.1f}" if stage == "ids" else ""
    print(f"| {stage} | {seconds:.0f} | {found['processor']:.0f} | {speed} | {found['peak'] / 1e6:.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--stage", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.stage:
        stage, text, home = args.stage
        start, before = time.perf_counter(), time.process_time()
        STAGES[stage](text, Path(home))
        found = {"seconds": time.perf_counter() - start, "processor": time.process_time() - before}
        return print(json.dumps(found | {"peak": peak_memory()}))
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(temporary)
        text = home / "text.txt"
        write_text(text, args.megabytes * 10**6)
        print("| | Seconds | of the processor | MB/s | Peak, MB |\n|---|---|---|---|---|")
        for stage in STAGES:
            measure(stage, text, home)


if __name__ == "__main__":
    main()
