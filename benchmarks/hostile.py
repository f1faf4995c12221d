"""Measure what each hostile checkpoint of the tests costs: `python benchmarks/hostile.py [--all]`.

Every fault of tests/test_checkpoint_faults.py is made in a copy of a small checkpoint, and `load_8b.py DIRECTORY
--check` is run on it in a forked process, so that the import of PyTorch does not count. Prints exit code, time of the
processor, wall time and peak memory (PyTorch's libraries included): the worst ones, or with --all each.
"""

import os
import runpy
import shutil
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from test_checkpoint_faults import FAULTS, GOLDEN  # noqa: E402

from minillada.commands.cli import run  # noqa: E402


def measure(main, home: Path, log: int) -> tuple[int, float, float, float]:
    """Return exit code, seconds of the processor, seconds, and MB at the peak of a check in a process of its own."""
    start = time.monotonic()
    if not (child := os.fork()):
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.argv = ["load_8b.py", str(home), "--check"]
        try:
            run(main)
            code = 0
        except SystemExit as end:
            code = end.code
        except BaseException:
            code = 1
        os._exit(code)
    _, status, used = os.wait4(child, 0)
    seconds = time.monotonic() - start
    return os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime, seconds, used.ru_maxrss / 1024


def main() -> None:
    check = runpy.run_path(str(ROOT / "load_8b.py"))["main"]
    rows = []
    with tempfile.TemporaryFile() as log:
        for fault, (damage, _) in FAULTS.items():
            place = Path(tempfile.mkdtemp())
            home = shutil.copytree(GOLDEN / "llada_dense", place / "model")
            (home / "expected.safetensors").unlink()
            damage(home)
            rows.append((fault, *measure(check, home, log.fileno())))
            shutil.rmtree(place)
        log.seek(0)
        told = log.read().decode().splitlines()
    shown = rows if "--all" in sys.argv else sorted(rows, key=lambda row: -row[2])[:8]
    for fault, code, used, seconds, peak in shown:
        print(f"{fault:<40} exit {code}   {used:5.2f} s of CPU   {seconds:5.2f} s   {peak:4.0f} MB")
    worst = [max(row[i] for row in rows) for i in (2, 3, 4)]
    print(f"{len(rows)} files, exit codes {sorted({row[1] for row in rows})}, {len(told)} lines; at most "
          f"{worst[0]:.2f} s of CPU, {worst[1]:.2f} s, {worst[2]:.0f} MB")  # fmt: skip


if __name__ == "__main__":
    main()
