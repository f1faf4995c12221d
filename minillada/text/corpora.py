"""Read text from where it lies: a corpus by name, a text file, a JSONL file, a directory, or a sequence of these.

Text comes in chunks, so memory depends neither on its size nor on the length of its lines. Two things are changed on
the way: every line end (CRLF or CR) becomes LF, and a byte-order mark at the start of a file is dropped.
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
from http.client import HTTPException
from itertools import chain
from pathlib import Path
from typing import BinaryIO, NamedTuple

from tqdm import tqdm

from ..errors import BadInput, BadLuck, meant
from ..files import one_line, write_file
from .tales import tales
from .tokenizer import Tokenizer, refuse_surrogates

CHUNK = 1 << 18  # bytes read at a time, and so the most characters that come at a time
MERGES_FROM = 1 << 26  # characters that merges are learned from at most: more would hardly change them
BAR = {"unit": " characters", "unit_scale": True, "delay": 1, "leave": False, "disable": None}  # on terminals only
MAX_LINE = 1 << 26  # bytes of one JSONL line, which must be parsed whole
TEXT_SUFFIXES = (".txt", ".md")  # the files that a directory is searched for
SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SIZE, SHAKESPEARE_SHA256 = 1_115_394, "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"

Source = str | Path | Sequence[str | Path]
# How a small model of wild text writes best: filling in the surest first makes it repeat itself.
WRITING = {"temperature": 0.7, "remasking": "random"}


def cache_dir() -> Path:
    """Return $MINILLADA_CACHE, or `minillada` where this platform keeps caches."""
    if chosen := os.environ.get("MINILLADA_CACHE"):
        return Path(chosen)
    usual = {"win32": "AppData/Local", "darwin": "Library/Caches"}.get(sys.platform, ".cache")
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / usual) / "minillada"


def docs() -> Iterator[str]:
    """Yield the language reference that comes with Python: about 465,000 characters, no download."""
    from pydoc_data.topics import topics

    yield "\n".join(topics.values())


def shakespeare(url: str = SHAKESPEARE) -> Iterator[str]:
    """Yield Tiny Shakespeare (1.1 MB, public domain), downloaded once and checked on every use. Raises BadLuck."""
    path = cache_dir() / "tinyshakespeare.txt"
    right = lambda data: len(data) == SHAKESPEARE_SIZE and hashlib.sha256(data).hexdigest() == SHAKESPEARE_SHA256
    if not path.is_file() or not right(path.read_bytes()):
        by_hand = f"save {SHAKESPEARE} as {path}, or use the data 'docs'"
        try:
            with urllib.request.urlopen(url, timeout=30) as answer:
                data = answer.read(SHAKESPEARE_SIZE + 1)
        except (OSError, HTTPException) as error:
            raise BadLuck(f"shakespeare: expected to download {url}, got {error}; {by_hand}") from None
        if not right(data):
            raise BadLuck(f"shakespeare: expected {SHAKESPEARE_SIZE} known bytes, got others from {url}; {by_hand}")
        write_file(path, [data])
    yield from plain_text(path)


# Many narrow heads: each thing that a tale must remember (hero, pronoun, toy, friend, food) can have one of its own.
TELLER = {"n_layer": 4, "n_head": 6, "d_model": 96, "d_ff": 256, "rope_theta": 10_000.0}


class Corpus(NamedTuple):
    """A text with a name, and what suits a model of it."""

    documents: Callable[[], Iterable[Iterable[str]]]  # each as its chunks
    train: dict = {}  # noqa: RUF012 (fields of TrainConfig with preset "tiny", for who asks for no other tokens)
    sampling: dict = WRITING  # fields of SampleConfig: how a model of it is decoded unless told otherwise


CORPORA: dict[str, Corpus] = {
    "docs": Corpus(lambda: [docs()]),
    "tales": Corpus(
        lambda: ([tale + "\n"] for tale in tales(seed=0, n=2500)),  # about 1.1 MB
        {"rows": "documents", "length": 136, "tokenizer": "bpe:1024", "model": TELLER},
    ),
    "shakespeare": Corpus(lambda: [shakespeare()]),
}


def corpus(source: Source) -> Corpus:
    """Return the corpus of that name, or what suits a text that has none."""
    return CORPORA[source] if isinstance(source, str) and source in CORPORA else Corpus(lambda: documents(source))


def plain_text(path: Path) -> Iterator[str]:
    """Yield the chunks of a UTF-8 file; a character may lie across two reads. Raises BadInput, BadLuck."""
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8-sig")(), translate=True)
    with opened(path) as file:
        while True:
            data = file.read(CHUNK)
            try:
                chunk = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                # error.object ends where reading has come to, and starts with the bytes held back from the last chunk.
                at = file.tell() - len(error.object) + error.start
                byte = f"byte 0x{error.object[error.start]:02X} at offset {at}"
                raise BadInput(f"{path}: expected UTF-8 text, got {byte}; convert it, or leave it out") from None
            yield without_nul(chunk, str(path))
            if not data:
                return


def records(path: Path) -> Iterator[tuple[str, object]]:
    """Yield ("FILE, line N", the parsed JSON) of every line that is not empty. Raises BadInput with that line."""
    with opened(path) as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE + 1), b""), start=1):
            where = f"{path}, line {number}"
            if len(line) > MAX_LINE:
                raise BadInput(f"{where}: expected at most {MAX_LINE} bytes, got more; give long texts as plain files")
            if not line.strip():
                continue
            with one_line(f"{where}: expected JSON in UTF-8", "write it as JSON", (ValueError, RecursionError)):
                record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            yield where, record


def json_lines(path: Path, field: str) -> Iterator[str]:
    """Yield the text in `field` of each line: a document per line. Raises BadInput with the number of the line."""
    for where, record in records(path):
        text = record.get(field) if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise BadInput(f'{where}: expected an object with a text "{field}", got none; name another field')
        refuse_surrogates(text, where)  # JSON can hold what UTF-8 cannot
        yield without_nul(text.replace("\r\n", "\n").replace("\r", "\n"), where)


def without_nul(text: str, where: str) -> str:
    """Return the text; raise BadInput if it holds a NUL, which only binary files do."""
    if "\0" in text:
        raise BadInput(f"{where}: expected text, got a NUL character; leave out binary files")
    return text


def opened(path: Path) -> BinaryIO:
    with one_line(f"{path}: expected a readable file", "check its permissions"):
        return open(path, "rb")


def documents(source: Source, field: str = "text") -> Iterator[Iterable[str]]:
    """Yield each document as its chunks: a corpus or a plain file is one document, a JSONL file has one per line."""
    if not isinstance(source, (str, Path)):
        if not source:
            raise BadInput("data: expected a name or a path, got none; give one")
        for one in source:
            yield from documents(one, field)
        return
    if source in CORPORA:  # a file of that name is `./name`
        yield from CORPORA[source].documents()
        return
    if not str(source):  # which would be this directory
        raise BadInput(f"data: expected {', '.join(CORPORA)} or a path, got an empty name; give one of these")
    path = Path(source)
    try:
        mode = path.stat().st_mode
    except OSError as error:
        got, fix = f"{str(source)!r} ({error.strerror})", meant(source, CORPORA, "give one of these")
        raise BadLuck(f"data: expected {', '.join(CORPORA)} or a path, got {got}; {fix}") from None
    if stat.S_ISDIR(mode):
        if not (found := sorted(p for p in path.rglob("*") if p.suffix.lower() in TEXT_SUFFIXES and p.is_file())):
            raise BadInput(f"{path}: expected {' or '.join(TEXT_SUFFIXES)} files, got none; give another directory")
        yield from documents(found, field)
    elif not stat.S_ISREG(mode):  # opening a FIFO would block for ever
        raise BadInput(f"{path}: expected a file of text, got something else; give a regular file")
    elif path.suffix.lower() == ".jsonl":
        yield from ([text] for text in json_lines(path, field) if text)
    else:
        yield plain_text(path)


def read_text(source: Source, field: str = "text") -> Iterator[str]:
    """Yield the whole text in chunks. Raises BadLuck for a file it cannot read, BadInput for one that is not text."""
    return chain.from_iterable(documents(source, field))


def training_part(characters: int) -> int:
    """Return how many of a text's characters are trained on; the rest, the last tenth, is for validation."""
    return characters * 9 // 10


def make_tokenizer(kind: str, source: Source, field: str = "text") -> Tokenizer:
    """Make a tokenizer: `characters` (of the whole text), `bytes`, or `bpe:SIZE` (learned from the training part)."""
    name, _, size = kind.partition(":")
    if kind == "characters":
        return Tokenizer.characters(read_text(source, field))
    if kind == "bytes":
        return Tokenizer.bytes()
    if name != "bpe" or not (size.isascii() and size.isdigit() and len(size) < 10):
        known = ("characters", "bytes", "bpe")
        fix = meant(name, known, "choose one") if name not in known else "give SIZE as a number like 2048"
        raise BadInput(f"tokenizer: expected characters, bytes or bpe:SIZE, got {kind!r:.60}; {fix}")
    return Tokenizer.bpe(training_text(source, field), int(size))


def training_text(source: Source, field: str = "text") -> Iterator[str]:
    """Yield the training part of the text, of a large text only the first MERGES_FROM characters."""
    left = min(training_part(sum(map(len, read_text(source, field)))), MERGES_FROM)
    with tqdm(desc="reading to learn merges", total=left, **BAR) as bar:
        for chunk in read_text(source, field):
            yield chunk[:left]
            bar.update(min(left, len(chunk)))
            left -= len(chunk)
            if left <= 0:
                return
