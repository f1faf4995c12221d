"""Keep a run in a directory that survives a kill at any moment: the log, and checkpoints with all that resuming needs.

    RUN/run.json                     the config of the run, written once
    RUN/log.jsonl                    one JSON object per line
    RUN/checkpoints/step-00000500/   a Hugging Face directory, with the state of the training beside the model:
        optimizer.safetensors        its tensors,
        state.json                   the rest of it,
        manifest.json                sizes and SHA-256 of all the others, written last
    RUN/.lock                        held while a process works here

A checkpoint is written under a temporary name, flushed to the disk, and only then renamed: so no half one has a name.
"""

import json
import os
import random
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor, nn

from .. import files
from ..errors import BadInput, BadLuck
from ..files import LEFTOVER, checkpoints_of, newest_checkpoint, one_line, temporary
from ..weights import checkpoint

ROOM = "make room on the disk and resume"


class Run(AbstractContextManager):
    """Hold a run's directory, locked until `close`: `with Run.create(directory, config) as run`, or `Run.resume`. Of
    several processes that train together one leads; the others (leads=False) lock nothing and write nothing."""

    def __init__(self, directory: Path, leads: bool = True) -> None:
        self.directory, self.checkpoints, self.log_file = directory, directory / "checkpoints", directory / "log.jsonl"
        self.config: dict = {}
        self.newest: Path | None = None  # the newest whole checkpoint
        self.damaged: dict[Path, str] = {}  # those after it, and what is wrong with each
        self.notices: list[str] = []  # lines for the user
        self.leads, self._lock = leads, None
        if not leads:
            return
        with one_line(f"run directory: expected to write in {directory}", "choose another --out"):
            directory.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(directory / ".lock", blocking=False, thread_local=False)
            try:
                self._lock.acquire()  # the system takes it back when the process ends, even if killed
            except Timeout:
                what = f"run directory: expected no other process in {directory}, got one that holds its lock"
                raise BadLuck(f"{what}; wait for it or choose another --out") from None

    @classmethod
    def create(cls, directory: str | Path, config: dict, leads: bool = True) -> "Run":
        """Begin a run in a new or empty directory. Raises BadInput if it is neither, BadLuck if it is in use."""
        directory = Path(directory)
        if not leads:
            return cls(directory, leads)
        refuse_occupied(directory)  # before a lock file is left in somebody's home
        run = cls(directory)
        with one_line(f"run directory: expected to write in {directory}", "choose another --out", undo=run.close):
            refuse_occupied(directory)  # and again, for another process may have come and gone
            files.write_json(directory / "run.json", config)
            run.checkpoints.mkdir()
            files.sync_directory(directory)
            run.config = config
        return run

    @classmethod
    def resume(cls, directory: str | Path) -> "Run":
        """Go on from the newest whole checkpoint, with the directory in order: `open`, then `tidy`."""
        run = cls.open(directory)
        run.tidy()
        return run

    @classmethod
    def open(cls, directory: str | Path, leads: bool = True, accept: Callable = lambda config: None) -> "Run":
        """Find the config and the newest whole checkpoint of a run, and change nothing yet: whoever goes on may still
        refuse. accept is given the config; it may raise. Raises BadInput if this is no run or has no whole checkpoint,
        BadLuck if it is in use."""
        directory = Path(directory)
        if not (directory / "run.json").is_file():
            raise BadInput(f"run directory: expected one with a run.json, got {directory}; give the directory of a run")
        run = cls(directory, leads)
        fix = "change its permissions or copy it elsewhere"
        with one_line(f"run directory: expected to read and write {directory}", fix, undo=run.close):
            run.config = files.read_json(directory / "run.json", files.CONFIG_CAP)
            accept(run.config)
            run.newest, run.damaged = newest_checkpoint(directory)
            if run.newest is None:
                found = "; ".join(run.damaged.values()) or "none"
                raise BadInput(f"checkpoint: expected a whole one in {directory}, got {found}; choose another --out")
        return run

    def tidy(self) -> None:
        """Cut off the log's steps after the newest checkpoint, set damaged checkpoints aside as corrupt-step-…, name
        them in `notices`, and remove what a killed process left. Raises BadLuck."""
        if not self.leads:
            return
        fix = "change its permissions or copy it elsewhere"
        with one_line(f"run directory: expected to write in {self.directory}", fix, undo=self.close):
            for path, reason in self.damaged.items():
                aside = path.with_name(f"corrupt-{path.name}")
                discard(aside)
                os.replace(path, aside)
                self.notices.append(f"{path.name} is damaged, now {aside.name}; using {self.newest.name} ({reason})")
            for leftover in (*self.directory.glob(LEFTOVER), *self.checkpoints.glob(LEFTOVER)):
                discard(leftover)
            truncate_log(self.log_file, step_of(self.newest))

    def log(self, record: dict) -> None:
        """Append one line of strict JSON; a float that is not finite becomes null. resume() cuts lines by "step"."""
        if self.leads:
            finite = json.loads(json.dumps(record), parse_constant=lambda name: None)
            with one_line("log: expected to add a line", ROOM), open(self.log_file, "ab") as file:
                file.write(json.dumps(finite).encode() + b"\n")

    def save(
        self, step: int, model: nn.Module, tokenizer: Any, state: dict, keep: int = 3, best: int = 0,
        guide: dict | None = None,
    ) -> Path:  # fmt: skip
        """Write the checkpoint of a step; return its path once the disk has it and old ones are dropped, but the last
        `keep` (0: all) and that of step `best`. state: tensors that share no memory, and values of JSON, by name.
        guide: how to decode the model unless told otherwise, and what to try with it, for generation_config.json. What
        is saved already stays as it is. Raises BadLuck if it cannot write; the earlier ones are then as they were."""
        target = self.checkpoints / f"step-{step:08d}"
        if target.exists() or not self.leads:
            return target
        draft = temporary(target)
        tensors = {name: t.detach().cpu().contiguous() for name, t in state.items() if isinstance(t, Tensor)}
        rest = {name: value for name, value in state.items() if name not in tensors}
        files.check_space(self.directory, sum(t.nbytes for t in (*model.state_dict().values(), *tensors.values())))
        with one_line(f"checkpoint: expected to write {target}", ROOM, undo=lambda: discard(draft)):
            draft.mkdir()
            checkpoint.save(model, draft, tokenizer)
            if guide is not None:
                files.write_json(draft / "generation_config.json", {"minillada": guide})
            hashed = files.read_json(draft / files.MANIFEST, files.CONFIG_CAP)["files"]
            save_file(tensors, draft / "optimizer.safetensors")
            files.write_file(draft / "state.json", [json.dumps(rest, allow_nan=False).encode()])
            flush(draft / "optimizer.safetensors")  # the other writers flush their own files,
            files.write_manifest(draft, hashed)  # and this one the draft's names too
            if self.log_file.exists():
                flush(self.log_file)  # no log ends before its checkpoint
            os.replace(draft, target)
            files.sync_directory(self.checkpoints)
        self.newest = target
        for old in checkpoints_of(self.directory)[:-keep]:
            if step_of(old) != best:
                discard(old)
        return target

    def close(self, *_: object) -> None:
        """Let go of the directory."""
        if self._lock:
            self._lock.release()

    __exit__ = close


def step_of(path: Path) -> int:
    """Return the step of a checkpoint's directory."""
    return int(path.name.removeprefix("step-"))


def load_state(path: str | Path) -> dict:
    """Return the state saved with a checkpoint, bit for bit, its tensors on the CPU. Raises BadInput or BadLuck."""
    path = Path(path)
    with one_line(f"checkpoint: expected a training state in {path}", "use a checkpoint of a run"):
        # Cloned: load_file maps the file, and Windows keeps a mapped file from being deleted.
        tensors = {name: t.clone() for name, t in load_file(path / "optimizer.safetensors").items()}
        return files.read_json(path / "state.json", files.INDEX_CAP) | tensors


def rng_state(**generators: Generator) -> dict:
    """Return the state of every source of randomness, for `Run.save`: Python, NumPy, torch on each device in use, and
    the generators, by name."""
    (version, words, gauss), (name, keys, *rest) = random.getstate(), np.random.get_state()
    state = {"rng.python": [version, list(words), gauss], "rng.numpy": [name, keys.tolist(), *rest]}
    if torch.backends.mps.is_available():
        state["rng.mps"] = torch.mps.get_rng_state()
    return state | {f"rng.{name}": g.get_state() for name, g in (torch_generators() | generators).items()}


def set_rng_state(state: dict, **generators: Generator) -> None:
    """Put states back, except those of a device that this machine lacks: such a run goes on, but not bit for bit."""
    version, words, gauss = state["rng.python"]
    random.setstate((version, tuple(words), gauss))
    np.random.set_state(state["rng.numpy"])
    if "rng.mps" in state and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["rng.mps"])
    for name, generator in (torch_generators() | generators).items():
        if f"rng.{name}" in state:
            generator.set_state(state[f"rng.{name}"])


def torch_generators() -> dict[str, Generator]:
    """Return torch's own generators, of the CPU and of each CUDA device in use."""
    return {"torch": torch.default_generator} | {f"cuda.{i}": g for i, g in enumerate(torch.cuda.default_generators)}


def refuse_occupied(directory: Path) -> None:
    """Raise BadInput for anything but a directory with nothing in it (or what a killed create() left)."""
    found = directory.iterdir() if directory.is_dir() else [directory] if directory.exists() else []
    if any(path.name != ".lock" and not path.match(LEFTOVER) for path in found):
        raise BadInput(f"run directory: expected a new or empty one, got {directory}; add --resume or another --out")


def flush(file: Path) -> None:
    """Have the disk hold a file's bytes before anything that follows."""
    with open(file, "r+b") as f:  # Windows flushes only what is open for writing
        os.fsync(f.fileno())


def discard(path: Path) -> None:
    """Remove a file or directory if possible: it is renamed first, so that a kill never leaves half of a checkpoint."""
    doomed = path if path.match(LEFTOVER) else temporary(path)
    with suppress(OSError):
        os.replace(path, doomed)
        doomed.unlink() if doomed.is_file() else shutil.rmtree(doomed)


def truncate_log(file: Path, step: int) -> None:
    """Cut the log before the first line that is unfinished, after a kill, or of a later step."""
    if not file.exists():
        return
    end = 0
    with open(file, "rb") as lines, suppress(ValueError, TypeError, AttributeError):  # of a line that is no record
        for line in lines:
            if not line.endswith(b"\n") or json.loads(line).get("step", 0) > step:
                break
            end += len(line)
    os.truncate(file, end)  # one system call: the log is the old one or the new one
