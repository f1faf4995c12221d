"""Text corpora of any size, their ids in memory-mapped files, and batches drawn from those.

A source is a name in `CORPORA`, a text file, a JSONL file, a directory, or a sequence of these. Text streams in chunks,
so memory does not depend on its size nor on the length of its lines. Two things are altered on the way, nothing else:
every line end (CRLF or CR) becomes LF, and a byte-order mark at the start of a file is dropped.

    source -> documents -> pieces of str -> train.bin, val.bin -> (B,T) batches
"""

import codecs
import errno
import hashlib
import io
import json
import os
import stat
import sys
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from itertools import chain, count, islice
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from tqdm import tqdm

from ..errors import BadInput, BadLuck, check_whole
from ..files import one_line, write_file, write_json
from .tales import tales
from .tokenizer import Tokenizer, refuse_surrogates

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt

CHUNK = 1 << 18  # bytes of a file, and so at most characters, that are read at a time
GROUP = 1 << 21  # characters that are encoded together, by all processors, and then safe on the disk
MERGES_FROM = 1 << 26  # characters that merges are learned from at most: more would hardly change them
BAR = {"unit": " characters", "unit_scale": True, "delay": 1, "leave": False, "disable": None}  # on terminals only
MAX_LINE = 1 << 26  # bytes of one JSONL line: it must be parsed whole
TEXT_SUFFIXES = (".txt", ".md")  # the files that a directory is searched for
SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SIZE = 1_115_394  # bytes
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

Source = str | Path | Sequence[str | Path]


def cache_dir() -> Path:
    """$MINILLADA_CACHE, or `minillada` in the place where this platform keeps caches."""
    if chosen := os.environ.get("MINILLADA_CACHE"):
        return Path(chosen)
    usual = {"win32": "AppData/Local", "darwin": "Library/Caches"}.get(sys.platform, ".cache")
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / usual) / "minillada"


# ---- where text comes from


def docs() -> Iterator[str]:
    """The reference of the Python language that comes with Python itself: about 465,000 characters, no download."""
    from pydoc_data.topics import topics

    yield "\n".join(topics.values())


def shakespeare(url: str = SHAKESPEARE) -> Iterator[str]:
    """Tiny Shakespeare (1.1 MB, public domain): downloaded once, checked on every use."""
    path = cache_dir() / "tinyshakespeare.txt"
    if not path.is_file() or not is_shakespeare(path.read_bytes()):
        by_hand = f"save {SHAKESPEARE} as {path}, or use the data 'docs'"
        try:
            with urllib.request.urlopen(url, timeout=30) as answer:
                data = answer.read(SHAKESPEARE_SIZE + 1)
        except (OSError, HTTPException) as error:
            raise BadLuck(f"shakespeare: expected to download {url}, got {error}; {by_hand}") from None
        if not is_shakespeare(data):
            raise BadLuck(f"shakespeare: expected {SHAKESPEARE_SIZE} known bytes, got others from {url}; {by_hand}")
        write_file(path, [data])
    yield from plain_text(path)


def is_shakespeare(data: bytes) -> bool:
    return len(data) == SHAKESPEARE_SIZE and hashlib.sha256(data).hexdigest() == SHAKESPEARE_SHA256


# The known names; each makes the chunks of one document. `tales` is about 1.1 MB of the stories of tales.py.
CORPORA: dict[str, Callable[[], Iterable[str]]] = {
    "docs": docs,
    "tales": lambda: (tale + "\n" for tale in tales(seed=0, n=2500)),
    "shakespeare": shakespeare,
}


def plain_text(path: Path) -> Iterator[str]:
    """The chunks of a UTF-8 file. A line may be of any length, and a character may straddle two reads."""
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8-sig")(), translate=True)
    with opened(path) as file:
        while True:
            data = file.read(CHUNK)
            try:
                chunk = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:  # its object ends where we have read to, and starts with what was held
                at = file.tell() - len(error.object) + error.start
                byte = f"byte 0x{error.object[error.start]:02X} at offset {at}"
                raise BadInput(f"{path}: expected UTF-8 text, got {byte}; convert it, or leave it out") from None
            yield without_nul(chunk, str(path))
            if not data:
                return


def records(path: Path) -> Iterator[tuple[str, object]]:
    """Where it stands ("FILE, line N"), and what JSON makes of it, of every line that is not empty. Raises BadInput."""
    with opened(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE + 1), b""), start=1):
            where = f"{path}, line {number}"
            if len(line) > MAX_LINE:
                raise BadInput(f"{where}: expected at most {MAX_LINE} bytes, got more; give long texts as plain files")
            if not line.strip():
                continue
            try:
                yield where, json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except (ValueError, RecursionError) as error:
                raise BadInput(f"{where}: expected JSON in UTF-8, got {error}; mend the line") from None


def json_lines(path: Path, field: str) -> Iterator[str]:
    """The text of each line's `field`, one document per line. Raises BadInput with the number of the line."""
    for where, record in records(path):
        text = record.get(field) if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise BadInput(f'{where}: expected an object with a text "{field}", got none; name another field')
        refuse_surrogates(text, where)  # JSON can hold what UTF-8 cannot
        yield without_nul(text.replace("\r\n", "\n").replace("\r", "\n"), where)


def without_nul(text: str, where: str) -> str:
    if "\0" in text:
        raise BadInput(f"{where}: expected text, got a NUL character; is it a binary file?")
    return text


def opened(path: Path) -> BinaryIO:
    with one_line(f"{path}: expected a readable file", "check its permissions"):
        return open(path, "rb")


def documents(source: Source, field: str = "text") -> Iterator[Iterable[str]]:
    """Each document of the source as its chunks: a corpus and a plain file are one, a JSONL file one per line."""
    if not isinstance(source, (str, Path)):
        for one in source:
            yield from documents(one, field)
        return
    if source in CORPORA:  # a file of that name is `./name`
        yield CORPORA[source]()
        return
    path = Path(source)
    try:
        mode = path.stat().st_mode
    except OSError as error:
        known = ", ".join(CORPORA)
        raise BadLuck(f"data: expected {known} or a path, got {str(source)!r} ({error.strerror}); mend it") from None
    if stat.S_ISDIR(mode):
        files = sorted(p for p in path.rglob("*") if p.suffix.lower() in TEXT_SUFFIXES and p.is_file())
        if not files:
            raise BadInput(f"{path}: expected {' or '.join(TEXT_SUFFIXES)} files, got none; give another directory")
        yield from documents(files, field)
    elif not stat.S_ISREG(mode):  # opening a FIFO would block for ever
        raise BadInput(f"{path}: expected a file of text, got something else; give a regular file")
    elif path.suffix.lower() == ".jsonl":
        yield from ([text] for text in json_lines(path, field) if text)
    else:
        yield plain_text(path)


def read_text(source: Source, field: str = "text") -> Iterator[str]:
    """The whole text in chunks of bounded size, documents one after the other (to train a tokenizer on, for instance).

    Raises BadLuck for what is missing or unreadable, BadInput for what is no text.
    """
    return chain.from_iterable(documents(source, field))


def training_part(characters: int) -> int:
    """How many of a text's characters are trained on; the rest, the last tenth, validates."""
    return characters * 9 // 10


def make_tokenizer(kind: str, source: Source, field: str = "text") -> Tokenizer:
    """`characters` (of the whole text), `bytes`, or `bpe:SIZE` (merges learned from the training part alone)."""
    name, _, size = kind.partition(":")
    if kind == "characters":
        return Tokenizer.characters(read_text(source, field))
    if kind == "bytes":
        return Tokenizer.bytes()
    if name != "bpe" or not size.isdigit():
        raise BadInput(f"tokenizer: expected characters, bytes or bpe:SIZE, got {kind!r}; choose one")
    return Tokenizer.bpe(training_text(source, field), int(size))


def training_text(source: Source, field: str = "text") -> Iterator[str]:
    """`read_text` without the last tenth of its characters, and of a large text no more than the first 67 million."""
    left = min(training_part(sum(map(len, read_text(source, field)))), MERGES_FROM)
    with tqdm(desc="reading to learn merges", total=left, **BAR) as bar:
        for chunk in read_text(source, field):
            yield chunk[:left]
            bar.update(min(left, len(chunk)))
            left -= len(chunk)
            if left <= 0:
                return


# ---- ids on disk


@dataclass(frozen=True)
class Tokens:
    """The ids of a text, memory-mapped: training takes the first nine tenths of its characters, validation the rest."""

    train: np.ndarray  # (N,) uint16 or uint32
    val: np.ndarray
    characters_per_token: float  # of the validation part: nats per token / this = nats per character
    bytes_per_token: float  # the same for bytes of UTF-8
    fingerprint: str  # SHA-256 of the tokenizer and the text


PARTS = ("train", "val")


def tokenise(
    source: Source, tokenizer: Tokenizer, directory: str | Path, length: int = 1, field: str = "text"
) -> Tokens:
    """Write the ids of a source to files in `directory`, or find them there if neither text nor tokenizer changed.

    Several documents are separated by eos. The split is made before tokenising, so no token straddles it. What was
    interrupted goes on from where it was; of several processes one writes and the others wait for it.
    Raises BadInput if either part is shorter than `length` tokens.
    """
    fingerprint, characters = survey(source, tokenizer, field)
    base = Path(directory) / fingerprint[:16]  # another text or tokenizer has other files: none is ever overwritten
    counts = whole(base) or write_tokens(source, tokenizer, base, fingerprint, characters, field)
    for part in PARTS:
        found = counts[part]["tokens"]
        if found < length:
            fix = "give more text or a shorter context"
            raise BadInput(f"data: expected at least {length} tokens for {part}, got {found}; {fix}")
    train, val = (np.memmap(f"{base}.{part}.bin", counts["dtype"], "r") for part in PARTS)
    characters, size = (counts["val"][unit] / counts["val"]["tokens"] for unit in ("characters", "bytes"))
    return Tokens(train, val, characters, size, fingerprint)


def survey(source: Source, tokenizer: Tokenizer, field: str) -> tuple[str, int]:
    """The SHA-256 of tokenizer and text, and the text's number of characters. Raises BadInput if there are none."""
    digest = digest_of(tokenizer)
    characters = sum(len(text) for _, text in pieces(source, field, digest))
    if not characters:
        raise BadInput(f"data: expected some text, got none in {source}; give another file")
    return digest.hexdigest(), characters


def digest_of(tokenizer: Tokenizer) -> "hashlib._Hash":
    return hashlib.sha256(f"{tokenizer.to_json()}{tokenizer.eos_id}".encode())


def pieces(source: Source, field: str, digest: "hashlib._Hash", cut: int = sys.maxsize) -> Iterator[tuple[str, str]]:
    """The text as (part, text), the first `cut` characters for training; "" stands between two documents.

    What has been read is also in the digest, where each document ends with a NUL, which no text holds.
    """
    for number, document in enumerate(documents(source, field)):
        if number:
            yield "train" if cut > 0 else "val", ""
        for chunk in document:
            digest.update(chunk.encode())
            for part, text in zip(PARTS, (chunk[:cut], chunk[cut:]), strict=True):
                if text:
                    yield part, text
            cut = max(cut - len(chunk), 0)
        digest.update(b"\0")


def groups(stream: Iterable[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    """The same pieces in lists of about GROUP characters, however short the documents are."""
    group, size = [], 0
    for piece in stream:
        group.append(piece)
        size += len(piece[1]) + 1
        if size >= GROUP:
            yield group
            group, size = [], 0
    if group:
        yield group


def recorded(base: Path) -> dict | None:
    """What base.json counts, if the files hold it: all there is or, with "pieces", what an interrupted call did."""
    try:
        counts = json.loads(base.with_suffix(".json").read_bytes())
        width = np.dtype(counts["dtype"]).itemsize
        for part in PARTS:
            size, counted = Path(f"{base}.{part}.bin").stat().st_size, counts[part]["tokens"] * width
            if size < counted or (size > counted and "pieces" not in counts):
                return None
        return counts
    except (OSError, ValueError, KeyError, TypeError):
        return None


def whole(base: Path) -> dict | None:
    """The counts of the files of `base` if they are finished and of the right size."""
    counts = recorded(base)
    return counts if counts and "pieces" not in counts else None


def pass_over(stream: Iterator[tuple[str, str]], counts: dict) -> bool:
    """Read past the pieces that are done; False if the text is not cut as it was, as after a change of line ends."""
    seen = dict.fromkeys(PARTS, 0)
    for part, text in islice(stream, counts["pieces"]):
        seen[part] += len(text)
    return all(seen[part] == counts[part]["characters"] for part in PARTS)


def write_tokens(
    source: Source, tokenizer: Tokenizer, base: Path, fingerprint: str, characters: int, field: str
) -> dict:
    """Write base.train.bin, base.val.bin and base.json, their counts; or finish what an earlier call left.

    After each group the disk has its ids first and then a base.json that counts them, with the number of "pieces"
    done; what is past those counts was never promised and is cut off. The finished base.json has no "pieces".
    """
    undone = f"{base}: expected to write ids", "make room and start again: it goes on from here"
    with one_line(*undone), locked(base.with_name(f".{base.name}.lock")):
        if counts := whole(base):
            return counts  # somebody else's, while we waited
        try:
            write_groups(source, tokenizer, base, fingerprint, characters, field)
        except BadInput:  # the text is to blame: with another one these files are of no use
            discard(base)
            raise
    return whole(base)


def write_groups(
    source: Source, tokenizer: Tokenizer, base: Path, fingerprint: str, characters: int, field: str
) -> None:
    dtype = np.dtype("uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32")
    counts, digest, cut = recorded(base), digest_of(tokenizer), training_part(characters)
    stream = pieces(source, field, digest, cut)
    if counts is None or not pass_over(stream, counts):
        discard(base)  # not emptied: a process may still read the old ones
        counts = {part: {"tokens": 0, "characters": 0, "bytes": 0} for part in PARTS}
        counts |= {"dtype": dtype.name, "pieces": 0}
        digest = digest_of(tokenizer)
        stream = pieces(source, field, digest, cut)
    with ExitStack() as stack:
        files = {part: stack.enter_context(open(f"{base}.{part}.bin", "ab")) for part in PARTS}
        for part, file in files.items():
            file.truncate(counts[part]["tokens"] * dtype.itemsize)
        done = sum(counts[part]["characters"] for part in PARTS)
        bar = stack.enter_context(tqdm(desc="tokenising", total=characters, initial=done, **BAR))
        for group in groups(stream):
            rows = iter(tokenizer.encode_batch([text for _, text in group if text]))
            for part, text in group:
                if not text and tokenizer.eos_id is None:
                    fix = "give one document"
                    raise BadInput(f"tokenizer: expected an eos id to put between documents, got none; {fix}")
                ids = next(rows) if text else [tokenizer.eos_id]
                files[part].write(np.array(ids, dtype).tobytes())
                for unit, n in (("tokens", len(ids)), ("characters", len(text)), ("bytes", len(text.encode()))):
                    counts[part][unit] += n
                bar.update(len(text))
            for file in files.values():
                file.flush()
                os.fsync(file.fileno())
            counts["pieces"] += len(group)
            write_json(base.with_suffix(".json"), counts)
    if digest.hexdigest() != fingerprint:
        raise BadInput(f"data: expected {source} to stay as it is while it is read, got another text; start again")
    del counts["pieces"]
    write_json(base.with_suffix(".json"), counts)


def discard(base: Path) -> None:
    for path in (base.with_suffix(".json"), *(Path(f"{base}.{part}.bin") for part in PARTS)):
        path.unlink(missing_ok=True)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file, waiting for whoever does. It goes when the process ends, however it ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX)
        while not fcntl:
            try:
                msvcrt.locking(file.fileno(), msvcrt.LK_LOCK, 1)
                break
            except OSError as error:  # it gives up after ten seconds
                if error.errno != errno.EDEADLK:
                    raise
        yield


# ---- batches


def check_length(tokens: np.ndarray, length: int) -> None:
    if not 1 <= length <= len(tokens):
        raise BadInput(f"length: expected 1 to the {len(tokens)} tokens there are, got {length}; give more text")


def windows(tokens: np.ndarray, starts: Iterable[int], length: int) -> torch.Tensor:
    return torch.from_numpy(np.stack([tokens[start : start + length] for start in starts]).astype(np.int64))  # (B,T)


def batches(tokens: np.ndarray, batch_size: int, length: int, seed: int, start: int = 0) -> Iterator[torch.Tensor]:
    """For ever from the batch number `start` (from 0): (B,T) long. Batch n depends on the seed and on n alone.

    An epoch is N windows side by side, each once, in random order and from a random phase: their borders move. Fewer
    than 2 T - 1 tokens, at the two ends, are left out of an epoch. Memory: 16 bytes per window.
    """
    check_length(tokens, length)
    check_whole("seed", seed, 0)
    n_windows = max(1, (len(tokens) - length + 1) // length)  # the same for every phase up to T - 1
    epoch, taken = divmod(start * batch_size, n_windows)
    starts = chain.from_iterable(epoch_of(tokens, n_windows, length, seed, number) for number in count(epoch))
    starts = islice(starts, taken, None)
    while True:
        yield windows(tokens, islice(starts, batch_size), length)


def epoch_of(tokens: np.ndarray, n_windows: int, length: int, seed: int, number: int) -> np.ndarray:
    """Where the windows of an epoch start, in its order, (N,)."""
    rng = np.random.default_rng((seed, number))
    phase = rng.integers(len(tokens) - n_windows * length, endpoint=True)
    return phase + length * rng.permutation(n_windows)


def validation_batch(tokens: np.ndarray, n: int, length: int) -> torch.Tensor:
    """(n,T) long, always the same evenly spaced windows, so that two evaluations compare."""
    check_length(tokens, length)
    return windows(tokens, np.linspace(0, len(tokens) - length, n).astype(int), length)
