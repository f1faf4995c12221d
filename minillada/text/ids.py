"""Write the ids of a text to disk once, map them into memory, and draw batches from them.

    source -> documents -> pieces of str -> train.bin, val.bin -> batches (B,T)

The first nine tenths of the characters are for training, the rest for validation. The directory of the files is named
after the SHA-256 of tokenizer and text.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import chain, count, islice
from pathlib import Path
from shutil import rmtree

import numpy as np
import torch
from filelock import FileLock
from tqdm import tqdm

from ..errors import BadInput, check_whole
from ..files import one_line, replacing, sync_directory, verify_manifest, write_json, write_manifest
from .corpora import BAR, Source, documents, training_part
from .tokenizer import Tokenizer

GROUP = 1 << 21  # characters that are encoded together, by all processors
PARTS = ("train", "val")
FILES = {"train.bin", "val.bin", "counts.json"}


@dataclass(frozen=True)
class Tokens:
    """The ids of a text, mapped into memory."""

    train: np.ndarray  # (N,) uint16 or uint32
    val: np.ndarray
    characters_per_token: float  # of the validation part: nats per token / this = nats per character
    bytes_per_token: float  # the same for bytes of UTF-8
    fingerprint: str  # SHA-256 of the tokenizer and the text


def tokenise(
    source: Source, tokenizer: Tokenizer, directory: str | Path, length: int = 1, field: str = "text"
) -> Tokens:
    """Write the ids of a source to files under `directory`, or find them there if they are whole and up to date.
    Several documents are separated by eos; of several processes one writes and the others wait for it. Raises BadInput
    if either part is shorter than `length` tokens, BadLuck if the files cannot be written."""
    digest = digest_of(tokenizer)
    characters = sum(len(text) for _, text in pieces(source, field, digest, 0))
    if not characters:
        raise BadInput(f"data: expected some text, got none in {source}; give another file")
    fingerprint = digest.hexdigest()
    home = Path(directory) / fingerprint[:16]
    draft = home.with_name(f".{home.name}.tmp")
    if not is_whole(home):
        undone = (f"{home}: expected to write ids", "make room and start again")
        lock = FileLock(home.with_name(f".{home.name}.lock"))  # the system takes it back from a killed process
        with one_line(*undone):
            home.parent.mkdir(parents=True, exist_ok=True)
        with one_line(*undone), lock, one_line(*undone, undo=lambda: rmtree(draft, ignore_errors=True)):
            if not is_whole(home):  # another process may have written it in the meantime
                rmtree(draft, ignore_errors=True)  # of a process that was killed
                write_ids(source, tokenizer, draft, fingerprint, characters, field)
                rmtree(home, ignore_errors=True)  # a damaged one
                os.rename(draft, home)  # which fails if something is there still
                sync_directory(home.parent)
    counts = json.loads((home / "counts.json").read_bytes())
    for part in PARTS:
        if (n := counts[part]["tokens"]) < length:
            what = f"data: expected at least {length} tokens for {part}, got {n}"
            raise BadInput(f"{what}; give more text or a shorter context")
    train, val = (np.memmap(home / f"{part}.bin", counts["dtype"], "r") for part in PARTS)
    characters, size = (counts["val"][unit] / counts["val"]["tokens"] for unit in ("characters", "bytes"))
    return Tokens(train, val, characters, size, fingerprint)


def digest_of(tokenizer: Tokenizer) -> "hashlib._Hash":
    """Begin a SHA-256 with everything about the tokenizer that decides the ids."""
    return hashlib.sha256(f"{tokenizer.to_json()}{tokenizer.eos_id}".encode())


def pieces(source: Source, field: str, digest: "hashlib._Hash", cut: int) -> Iterator[tuple[str, str]]:
    """Yield the text as (part, text), the first `cut` characters for training, "" between two documents; digest it."""
    for number, document in enumerate(documents(source, field)):
        if number:
            yield "train" if cut > 0 else "val", ""
        for chunk in document:
            digest.update(chunk.encode())
            for part, text in zip(PARTS, (chunk[:cut], chunk[cut:]), strict=True):
                if text:
                    yield part, text
            cut = max(cut - len(chunk), 0)
        digest.update(b"\0")  # which no text holds


def groups(stream: Iterable[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    """Yield the same pieces in lists of about GROUP characters, however short the documents are."""
    group, size = [], 0
    for piece in stream:
        group.append(piece)
        size += len(piece[1]) + 1
        if size >= GROUP:
            yield group
            group, size = [], 0
    if group:
        yield group


def is_whole(home: Path) -> bool:
    """Tell whether the ids are there and every file still has the SHA-256 it was written with."""
    try:
        return set(verify_manifest(home)) == FILES
    except (BadInput, OSError):  # missing or damaged: they are written again
        return False


def write_ids(source: Source, tokenizer: Tokenizer, home: Path, fingerprint: str, characters: int, field: str) -> None:
    """Write train.bin, val.bin, counts.json and a manifest, in one pass over the text."""
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    counts: dict = {part: dict.fromkeys(("tokens", "characters", "bytes"), 0) for part in PARTS}
    digest, cut = digest_of(tokenizer), training_part(characters)
    with ExitStack() as stack:
        outputs = {part: stack.enter_context(replacing(home / f"{part}.bin")) for part in PARTS}
        bar = stack.enter_context(tqdm(desc="tokenising", total=characters, **BAR))
        for group in groups(pieces(source, field, digest, cut)):
            rows = iter(tokenizer.encode_batch([text for _, text in group if text]))
            for part, text in group:
                if not text and tokenizer.eos_id is None:
                    raise BadInput("tokenizer: expected an eos id between documents, got none; give one document")
                ids = next(rows) if text else [tokenizer.eos_id]
                outputs[part].write(np.array(ids, dtype).tobytes())
                for unit, n in (("tokens", len(ids)), ("characters", len(text)), ("bytes", len(text.encode()))):
                    counts[part][unit] += n
                bar.update(len(text))
    if digest.hexdigest() != fingerprint:
        raise BadInput(f"data: expected {source} to stay as it is while it is read, got another text; start again")
    write_json(home / "counts.json", {**counts, "dtype": dtype})
    write_manifest(home)


def check_length(tokens: np.ndarray, length: int) -> None:
    if not 1 <= length <= len(tokens):
        raise BadInput(f"length: expected 1 to the {len(tokens)} tokens there are, got {length}; give more text")


def windows(tokens: np.ndarray, starts: Iterable[int], length: int) -> torch.Tensor:
    """Cut a window at each start: (B,T) long."""
    return torch.from_numpy(np.stack([tokens[start : start + length] for start in starts]).astype(np.int64))


def batches(tokens: np.ndarray, batch_size: int, length: int, seed: int, start: int = 0) -> Iterator[torch.Tensor]:
    """Yield batches (B,T) long without end, from number `start` on. Batch n depends on the seed and on n alone.
    An epoch cuts the text into N windows side by side, from a random phase on, and takes each once, in random order;
    fewer than 2 T - 1 tokens at the two ends are left out. Takes 16 bytes of memory per window."""
    check_length(tokens, length)
    check_whole("seed", seed, 0)
    n_windows = max(1, (len(tokens) - length + 1) // length)  # the same for every phase up to T - 1
    epoch, taken = divmod(start * batch_size, n_windows)
    starts = chain.from_iterable(epoch_of(tokens, n_windows, length, seed, number) for number in count(epoch))
    starts = islice(starts, taken, None)
    while True:
        yield windows(tokens, islice(starts, batch_size), length)


def epoch_of(tokens: np.ndarray, n_windows: int, length: int, seed: int, number: int) -> np.ndarray:
    """Return where the windows of an epoch start, in the order they are taken: (N,)."""
    rng = np.random.default_rng((seed, number))
    phase = rng.integers(len(tokens) - n_windows * length, endpoint=True)
    return phase + length * rng.permutation(n_windows)


def validation_batch(tokens: np.ndarray, n: int, length: int) -> torch.Tensor:
    """Return n evenly spaced windows, (n,T) long, always the same ones, so that two evaluations can be compared."""
    check_length(tokens, length)
    return windows(tokens, np.linspace(0, len(tokens) - length, n).astype(int), length)


def whole_documents(tokens: np.ndarray, eos_id: int) -> np.ndarray:
    """Return [start, stop) of what stands between two ends of text, with both of them: (N,2). The one in front says
    where a row begins: a model that knows distances alone could not tell one hidden place from another. The first
    document of a part has none, so it is left out: the split may have cut it. Raises BadInput if none is left."""
    ends = np.flatnonzero(tokens == eos_id) + 1
    if len(ends) < 2:
        raise BadInput(
            "rows: expected many documents, each a row, got one; give JSONL with short texts, or use windows"
        )
    return np.stack([ends[:-1] - 1, ends[1:]], axis=1)


def by_documents(text: Tokens, length: int, eos_id: int) -> Tokens:
    """Return a text whose documents are rows of `length` tokens, padding included: a token then has fewer characters.
    Raises BadInput if a document does not fit."""
    sizes = {
        part: np.diff(whole_documents(tokens, eos_id))
        for part, tokens in zip(PARTS, (text.train, text.val), strict=True)
    }
    if (longest := max(int(size.max()) for size in sizes.values())) > length:
        what = f"rows: expected documents of at most {length} tokens, got one of {longest}"
        raise BadInput(f"{what}; choose a longer length, or rows that are windows")
    share = (sizes["val"].mean() - 1) / length  # the end of text in front is given
    return replace(
        text, characters_per_token=text.characters_per_token * share, bytes_per_token=text.bytes_per_token * share
    )


def document_rows(tokens: np.ndarray, spans: np.ndarray, length: int) -> torch.Tensor:
    """Put each document (N,2) into a row and fill it up with its last token, the end of text: (N,T) long."""
    rows = [np.pad(tokens[start:stop].astype(np.int64), (0, length - stop + start), "edge") for start, stop in spans]
    return torch.from_numpy(np.stack(rows))


def document_batches(
    tokens: np.ndarray, spans: np.ndarray, batch_size: int, length: int, seed: int, start: int = 0
) -> Iterator[torch.Tensor]:
    """Yield batches (B,T) of whole documents without end, from number `start` on; an epoch takes each document once, in
    random order. Batch n depends on the seed and on n alone."""
    epoch, taken = divmod(start * batch_size, len(spans))
    orders = (np.random.default_rng((seed, number)).permutation(len(spans)) for number in count(epoch))
    order = islice(chain.from_iterable(orders), taken, None)
    while True:
        yield document_rows(tokens, spans[list(islice(order, batch_size))], length)
