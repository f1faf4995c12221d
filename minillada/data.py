"""Text corpora of any size, their ids in memory-mapped files, and batches drawn from those.

A source is a name in `CORPORA`, a text file, a JSONL file, a directory, or a sequence of these. Text streams in chunks,
so memory does not depend on its size nor on the length of its lines. Two things are altered on the way, nothing else:
every line end (CRLF or CR) becomes LF, and a byte-order mark at the start of a file is dropped.

    source -> documents -> chunks of str -> train.bin, val.bin -> (B,T) batches
"""

import codecs
import hashlib
import io
import json
import os
import stat
import sys
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from itertools import chain
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from .errors import BadInput, BadLuck
from .files import one_line, replacing, write_file, write_json
from .tales import tales
from .tokenizer import Tokenizer, refuse_surrogates

CHUNK = 1 << 18  # bytes of a file, and so at most characters, that are worked on at a time
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


def json_lines(path: Path, field: str) -> Iterator[str]:
    """The text of each line's `field`, one document per line. Raises BadInput with the number of the line."""
    with opened(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE + 1), b""), start=1):
            where = f"{path}, line {number}"
            if len(line) > MAX_LINE:
                raise BadInput(f"{where}: expected at most {MAX_LINE} bytes, got more; give long texts as plain files")
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except (ValueError, RecursionError) as error:
                raise BadInput(f"{where}: expected JSON in UTF-8, got {error}; mend the line") from None
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
    """`read_text` without the last tenth of its characters."""
    left = training_part(sum(map(len, read_text(source, field))))
    for chunk in read_text(source, field):
        if left > 0:
            yield chunk[:left]
        left -= len(chunk)


# ---- ids on disk


@dataclass(frozen=True)
class Tokens:
    """The ids of a text, memory-mapped: training takes the first nine tenths of its characters, validation the rest."""

    train: np.ndarray  # (N,) uint16 or uint32
    val: np.ndarray
    characters_per_token: float  # of the validation part: nats per token / this = nats per character
    bytes_per_token: float  # the same for bytes of UTF-8
    fingerprint: str  # SHA-256 of the tokenizer and the text


def tokenise(
    source: Source, tokenizer: Tokenizer, directory: str | Path, length: int = 1, field: str = "text"
) -> Tokens:
    """Write the ids of a source to files in `directory`, or find them there if neither text nor tokenizer changed.

    Several documents are separated by eos. The split is made before tokenising, so no token straddles it.
    Raises BadInput if either part is shorter than `length` tokens.
    """
    fingerprint, characters = survey(source, tokenizer, field)
    base = Path(directory) / fingerprint[:16]  # another text or tokenizer has other files: none is ever overwritten
    counts = whole(base) or write_tokens(source, tokenizer, base, training_part(characters), field)
    for part in ("train", "val"):
        found = counts[part]["tokens"]
        if found < length:
            fix = "give more text or a shorter context"
            raise BadInput(f"data: expected at least {length} tokens for {part}, got {found}; {fix}")
    train, val = (np.memmap(f"{base}.{part}.bin", counts["dtype"], "r") for part in ("train", "val"))
    characters, size = (counts["val"][unit] / counts["val"]["tokens"] for unit in ("characters", "bytes"))
    return Tokens(train, val, characters, size, fingerprint)


def survey(source: Source, tokenizer: Tokenizer, field: str) -> tuple[str, int]:
    """The SHA-256 of tokenizer and text, and the text's number of characters. Raises BadInput if there are none."""
    digest, characters = hashlib.sha256(f"{tokenizer.to_json()}{tokenizer.eos_id}".encode()), 0
    for document in documents(source, field):
        for chunk in document:
            digest.update(chunk.encode())
            characters += len(chunk)
        digest.update(b"\0")  # where a document ends; no text holds it
    if not characters:
        raise BadInput(f"data: expected some text, got none in {source}; give another file")
    return digest.hexdigest(), characters


def whole(base: Path) -> dict | None:
    """The counts of the files of `base` if all three are there and of the right size."""
    try:
        counts = json.loads(base.with_suffix(".json").read_bytes())
        width = np.dtype(counts["dtype"]).itemsize
        sizes = {part: Path(f"{base}.{part}.bin").stat().st_size for part in ("train", "val")}
        return counts if all(sizes[part] == counts[part]["tokens"] * width for part in sizes) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_tokens(source: Source, tokenizer: Tokenizer, base: Path, cut: int, field: str) -> dict:
    """Write base.train.bin (the first `cut` characters), base.val.bin (the others), and last base.json, the counts."""
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    counts = {"dtype": dtype} | {part: {"tokens": 0, "characters": 0, "bytes": 0} for part in ("train", "val")}
    with replacing(Path(f"{base}.train.bin")) as train, replacing(Path(f"{base}.val.bin")) as val:
        files = {"train": train, "val": val}

        def write(part: str, ids: list[int], text: str = "") -> None:
            files[part].write(np.array(ids, dtype).tobytes())
            for unit, amount in zip(counts[part], (len(ids), len(text), len(text.encode())), strict=True):
                counts[part][unit] += amount

        for number, document in enumerate(documents(source, field)):
            if number and tokenizer.eos_id is None:
                raise BadInput("tokenizer: expected an eos id to put between documents, got none; give one document")
            if number:
                write("train" if cut > 0 else "val", [tokenizer.eos_id])
            for chunk in document:
                for part, text in (("train", chunk[:cut]), ("val", chunk[cut:])):
                    if text:
                        write(part, tokenizer.encode(text), text)
                cut = max(cut - len(chunk), 0)
    write_json(base.with_suffix(".json"), counts)
    return counts


# ---- batches


def check_length(tokens: np.ndarray, length: int) -> None:
    if not 1 <= length <= len(tokens):
        raise BadInput(f"length: expected 1 to the {len(tokens)} tokens there are, got {length}; give more text")


def windows(tokens: np.ndarray, starts: Iterable[int], length: int) -> torch.Tensor:
    return torch.from_numpy(np.stack([tokens[start : start + length] for start in starts]).astype(np.int64))  # (B,T)


def batches(tokens: np.ndarray, batch_size: int, length: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """For ever: (B,T) long, windows that start anywhere. The generator's state is all there is to resume from."""
    check_length(tokens, length)
    while True:
        starts = torch.randint(len(tokens) - length + 1, (batch_size,), generator=generator)
        yield windows(tokens, starts.tolist(), length)


def validation_batch(tokens: np.ndarray, n: int, length: int) -> torch.Tensor:
    """(n,T) long, always the same evenly spaced windows, so that two evaluations compare."""
    check_length(tokens, length)
    return windows(tokens, np.linspace(0, len(tokens) - length, n).astype(int), length)
