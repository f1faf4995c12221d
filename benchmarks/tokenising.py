"""How fast is a large text tokenised, with how much memory, and what does a kill cost?

    python benchmarks/tokenising.py                       100 MB: about five minutes
    python benchmarks/tokenising.py --megabytes 1000      and about half an hour

The text is made of the files of the installed Python and its packages, whole ones in a random order, then all of them
in another one, until it is large enough. Every row of the table is a process of its own: the tokenizer of the preset
`tiny` learns its merges; the ids are written; again, but killed half-way, and the rest, which must end with the same
files; and the first steps of a training that finds them (it learns the merges again). Seconds are those of the clock
and of the processor; the peak is of resident memory, Python and PyTorch included: 0.3 GB before anything is done.
RAYON_NUM_THREADS sets the threads that tokenise.
"""

import argparse
import filecmp
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
from minillada.text.data import cache_dir, make_tokenizer, tokenise
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


def begin(stage: str, text: Path, home: Path, cache: Path) -> subprocess.Popen:
    command = [sys.executable, __file__, "--stage", stage, str(text), str(home)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | {"MINILLADA_CACHE": str(cache)})


def finish(what: str, child: subprocess.Popen, megabytes: float) -> None:
    found = json.loads(child.communicate()[0])
    speed = f"{megabytes / found['seconds']:.1f}" if child.args[3] == "ids" else ""
    print(
        f"| {what} | {found['seconds']:.0f} | {found['processor']:.0f} | {speed} | {found['peak'] / 1e6:.0f} |",
        flush=True,
    )


def kill_half_way(child: subprocess.Popen, cache: Path, size: int) -> None:
    """Send SIGKILL when the record of what is done counts half of the bytes."""
    done = 0
    while done < size / 2:
        time.sleep(0.1)
        if child.poll() is not None:
            raise SystemExit("it ended before half of it was seen done: take a larger text")
        for record in cache.glob("tokens/*.json"):
            counts = json.loads(record.read_bytes())
            done = counts["train"]["bytes"] + counts["val"]["bytes"]
    child.kill()
    child.wait()


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
        text, whole, killed = home / "text.txt", home / "whole", home / "killed"
        write_text(text, args.megabytes * 10**6)
        size = text.stat().st_size
        print("| | Seconds | of the processor | MB/s | Peak, MB |\n|---|---|---|---|---|")
        finish("merges", begin("merges", text, home, whole), size / 1e6)
        finish("ids", begin("ids", text, home, whole), size / 1e6)
        kill_half_way(begin("ids", text, home, killed), killed, size)
        finish("the rest after a kill", begin("ids", text, home, killed), size / 2e6)
        finish("20 steps", begin("20 steps", text, home, whole), size / 1e6)
        names = [path.name for path in (whole / "tokens").iterdir() if path.suffix in (".bin", ".json")]
        same = filecmp.cmpfiles(whole / "tokens", killed / "tokens", names, shallow=False)[0]
        print(f"{len(same)} of {len(names)} files are the same after a kill")


if __name__ == "__main__":
    main()
