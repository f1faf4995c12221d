"""Write files whole or not at all, read only plain files of bounded size, and record SHA-256 hashes in a manifest.

Every fault is one line: BadInput if a file's content is to blame, BadLuck if the system is.
"""

import errno
import hashlib
import json
import os
import reprlib
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PureWindowsPath
from typing import Any, BinaryIO

from safetensors import SafetensorError

from .errors import BadInput, BadLuck

MANIFEST = "manifest.json"
CONFIG_CAP, HEADER_CAP, INDEX_CAP = 1 << 20, 10 << 20, 20 << 20  # bytes of JSON that are parsed
LEFTOVER = ".*.tmp"  # what `temporary` names look like: a process that was killed leaves such files
SYSTEM = (OSError, SafetensorError)  # safetensors raises its own error when the disk is full


def expect(holds: bool, what: str, expected: object, got: object, fix: str) -> None:
    """Raise BadInput unless the condition holds."""
    if not holds:
        raise BadInput(f"{what}: expected {expected}, got {reprlib.repr(got)}; {fix}")


def listed(items: list, most: int = 6) -> str:
    """Join the first items with commas and count the others: `a, b and 3 more`."""
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(str(item)[:200] for item in items[:most]) + more


@contextmanager
def one_line(expected: str, fix: str, faults: type | tuple = SYSTEM, undo: Callable = lambda: None) -> Iterator[None]:
    """Turn a fault inside into BadLuck if it is the system's, else into BadInput; call undo first on any failure.

    faults: the errors to turn; BaseException for a library that panics, because a panic is no `Exception`. BadInput,
    BadLuck, Ctrl-C, exits and a lack of memory pass unchanged.
    """
    passes = (BadInput, BadLuck, MemoryError, KeyboardInterrupt, SystemExit)
    try:
        yield
    except BaseException as error:
        undo()
        if isinstance(error, passes) or not isinstance(error, faults):
            raise
        reason = getattr(error, "strerror", None) or repr(" ".join(str(error).split())[:200])
        kind = BadLuck if isinstance(error, SYSTEM) else BadInput
        raise kind(f"{expected}, got {reason}; {fix}") from error


# ---- Writing ----
def temporary(path: Path) -> Path:
    """Return the hidden name beside `path`, of this process alone, under which it is written."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


@contextmanager
def drafted(path: Path) -> Iterator[Path]:
    """Give a name to write under; then flush the file and rename it to `path`, or leave no trace. Raises BadLuck."""
    draft = temporary(path)
    with one_line(f"{path}: expected to write it", "free the disk or choose another"):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            draft.touch()
            mode = stat.S_IMODE(draft.stat().st_mode)
            yield draft  # safetensors puts another file here, which others may not read
            os.chmod(draft, mode)
            with open(draft, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(draft, path)
        finally:
            draft.unlink(missing_ok=True)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a file that becomes `path` in this way. Raises BadLuck."""
    with drafted(path) as draft, open(draft, "wb") as file:
        yield file


def write_file(path: Path, chunks: Iterable[bytes]) -> None:
    """Write a file whole or not at all. Raises BadLuck."""
    with replacing(path) as file:
        file.writelines(chunks)


def write_json(path: Path, document: dict) -> None:
    """Write a JSON object in the same way, without a newline: then losing any byte leaves invalid JSON."""
    write_file(path, [json.dumps(document, indent=2, sort_keys=True, allow_nan=False).encode()])


def sync_directory(directory: str | Path) -> None:
    """Flush the names in a directory to disk, where the system and the file system can do so."""
    if os.name != "posix":
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def check_space(directory: Path, size: int) -> None:
    """Raise BadLuck unless 1.2 times `size` bytes are free."""
    with one_line(f"disk: expected to ask {directory} for its free space", "choose another directory"):
        free, needed = shutil.disk_usage(directory).free / 1e6, 1.2 * size / 1e6
    if free < needed:
        raise BadLuck(f"disk: expected {needed:.1f} MB free in {directory}, got {free:.1f} MB; make room")


# ---- Reading ----
def confined(directory: Path, name: str, deep: bool = False) -> Path:
    """Return the path of the regular file `name` in a directory, or deep within it. Raises BadInput, BadLuck. A link
    may lead to the hub cache's own blobs and nowhere else."""
    where = f"{directory.name or directory}/{name!r:.200}"
    parts = name.split("/") if deep and isinstance(name, str) else [name]
    if not all(isinstance(p, str) and p not in ("", ".", "..") and PureWindowsPath(p).name == p for p in parts):
        raise BadInput(f"{where}: expected the plain name of a file in this directory, got a path; name it without one")
    root = Path(os.path.realpath(directory))
    with one_line(f"{where}: expected a readable file", "put a plain file there", (OSError, ValueError)):
        try:
            real = Path(os.path.realpath(directory / name, strict=True))
        except FileNotFoundError:
            raise BadLuck(f"{where}: expected a file, got nothing; put the file there") from None
        mode = real.stat().st_mode
    homes = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    if real.parent not in homes and not (deep and real.is_relative_to(root)):
        raise BadInput(f"{where}: expected a file of this directory, got a link that leaves it; copy the file here")
    if not os.access(real, os.R_OK):
        raise BadLuck(f"{where}: expected a readable file, got one without permission; give read permission")
    if not stat.S_ISREG(mode):
        raise BadInput(f"{where}: expected a regular file, got {stat.filemode(mode)}; put a plain file there")
    return real


def read_json(path: Path, cap: int) -> dict:
    """Return the JSON object in a file of at most cap bytes. Raises BadInput."""
    if (size := path.stat().st_size) > cap:
        raise BadInput(f"{path.name}: expected at most {cap:,} bytes, got {size:,}; download it again")
    return parse_json(path.read_bytes(), path.name)


def parse_json(data: bytes, what: str) -> dict:
    """Return a JSON object in UTF-8; refuse NaN and a key that occurs twice. Raises BadInput."""

    def unique(pairs: list) -> dict:
        if len(found := dict(pairs)) < len(pairs):
            raise ValueError("a key that occurs twice")
        return found

    def refuse(word: str) -> None:
        raise ValueError(word)

    try:
        found = json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as e:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise BadInput(f"{what}: expected JSON in UTF-8, got {str(e)[:200]}; write or download it again") from None
    if not isinstance(found, dict):
        raise BadInput(f"{what}: expected a JSON object, got {type(found).__name__}; write or download it again")
    return found


# ---- Manifests: {"files": {"name": {"bytes": n, "sha256": hex}}} ----
def hash_file(path: Path) -> dict:
    """Return the manifest entry of a file, {"bytes": n, "sha256": hex}."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
        return {"bytes": file.tell(), "sha256": digest.hexdigest()}


def write_manifest(directory: Path, known: dict[str, dict] | None = None) -> None:
    """Record every file of a directory, as the last step of a save. known: entries that are not computed again."""
    names = [p.name for p in directory.iterdir() if p.is_file() and not p.name.startswith(".") and p.name != MANIFEST]
    files = {name: (known or {}).get(name) or hash_file(directory / name) for name in names}
    write_json(directory / MANIFEST, {"files": files})
    sync_directory(directory)


def verify_manifest(directory: Path, sizes_only: str | tuple[str, ...] = ()) -> dict[str, dict]:
    """Compare every file that manifest.json lists with its entry; return the entries. Raises BadInput, BadLuck.
    sizes_only: the endings of files whose SHA-256 the caller compares itself, while it reads them."""
    files = read_json(confined(directory, MANIFEST), CONFIG_CAP).get("files")
    entries = list(files.values()) if isinstance(files, dict) else [None]
    holds = all(isinstance(entry, dict) and set(entry) == {"bytes", "sha256"} for entry in entries)
    expect(holds, MANIFEST, "files with bytes and sha256 each", files, "use another checkpoint")
    for name, entry in files.items():
        path = confined(directory, name)
        compare(name, entry, {"bytes": path.stat().st_size})
        if not name.endswith(sizes_only):
            compare(name, entry, hash_file(path))
    return files


def compare(name: str, entry: dict, found: dict[str, Any]) -> None:
    """Raise BadInput if what was found out about a file differs from its entry in the manifest."""
    for what, got in found.items():
        expected = f"{what} {entry[what]!r:.80} as in {MANIFEST}"
        expect(got == entry[what], name, expected, got, "use another checkpoint")


# ---- The checkpoints of a run, in RUN/checkpoints/step-00000500 ----
def checkpoints_of(run: Path) -> list[Path]:
    """Return the checkpoint directories of a run, whole or not, oldest first."""
    return sorted((run / "checkpoints").glob("step-" + 8 * "[0-9]"))


def newest_checkpoint(run: str | Path) -> tuple[Path | None, dict[Path, str]]:
    """Return the newest checkpoint whose manifest matches, or None, and the fault of every later one."""
    while True:
        damaged: dict[Path, str] = {}
        there = checkpoints_of(Path(run))
        for path in reversed(there):
            try:
                verify_manifest(path)
                return path, damaged
            except (BadInput, OSError) as error:  # noqa: PERF203
                if path.is_dir():  # else a training that goes on has dropped it
                    damaged[path] = str(error)
        if all(path.is_dir() for path in there):
            return None, damaged
