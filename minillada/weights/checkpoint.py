"""Hugging Face directories ↔ the module: `load`, `save`, `check`. Safetensors and JSON only, and no code of theirs.

A checkpoint is data from a stranger. Everything about it (files, headers, config, names, shapes) is checked before one
weight is read or allocated; what does not fit exactly is refused in one line, BadInput, or BadLuck where the machine is
to blame. The names are those of schemes.py; files.py has the care that any file needs.
"""

import hashlib
import json
import math
import os
import warnings
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from .. import files
from ..errors import BadInput, check_whole
from ..files import confined, expect, listed, one_line
from ..model import LLaDA, ModelConfig
from ..text.tokenizer import Tokenizer
from . import hub
from .device import check_memory
from .schemes import SCHEMES, SIDE, Scheme, read_config, write_config

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CODES = {dtype: code for code, dtype in DTYPES.items()}
CHUNK = 1 << 24  # bytes read at a time
READERS = 4  # threads, since handing out fresh memory takes as long as the disk

Plan = dict[str, list[Tensor]]  # tensor of the files -> the parameters, or experts in them, that are its rows


class Entry(NamedTuple):
    """A tensor in a file, from byte `offset` on."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Report:
    """What a checkpoint is, as far as its headers tell; `non_finite` names tensors, after a deep check."""

    directory: Path
    scheme: str
    config: ModelConfig
    entries: dict[str, Entry] = field(repr=False)  # every tensor of the files
    meta: LLaDA = field(repr=False)  # the module, without memory
    hashes: dict[str, dict] = field(repr=False)  # the manifest, if the checkpoint is ours
    non_finite: tuple[str, ...] = ()

    @property
    def n_bytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries.values())

    @property
    def files(self) -> list[str]:
        return list(dict.fromkeys(entry.file for entry in self.entries.values()))

    @property
    def dtypes(self) -> list[str]:
        return sorted({str(entry.dtype).removeprefix("torch.") for entry in self.entries.values()})


# ---- Loading ----


def load(
    path_or_hub_id: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    progress: bool = False,
    mask_id: int | None = None,
) -> tuple[LLaDA, Tokenizer | None]:
    """The model, and the tokenizer if there is one: of a directory, of the newest whole checkpoint of a run of ours,
    or of a repository on the hub. dtype None keeps the files' own; mask_id is for files that do not tell it.

    Raises BadInput for a checkpoint that does not fit exactly, BadLuck for no file, no network or too little memory.
    """
    with one_line(f"device: expected one of this machine for {str(device)!r}", "use cpu", faults=Exception):
        device = torch.empty(0, device=device).device
    directory = locate(path_or_hub_id, revision, progress)
    tokenizer = load_tokenizer(directory)
    report = inspect(directory, tokenizer, mask_id)
    model, dtypes = report.meta.eval(), target_dtypes(report, dtype)
    shapes = {name: p.shape for name, p in weights(model).items()}
    check_memory(sum(math.prod(shape) * dtypes[name].itemsize for name, shape in shapes.items()), device)
    state = {name: allocate(shape, dtypes[name], device) for name, shape in shapes.items()}
    model.load_state_dict(state, assign=True, strict=False)  # not strict: a tied head is no tensor of its own
    if report.config.tie_head:
        model.head.weight = model.embed.weight
    with tqdm(total=report.n_bytes, unit="B", unit_scale=True, desc="loading", disable=not progress) as bar:
        for _, slot, read in read_all(report, model):
            if slot is not read:
                slot.copy_(read)
            bar.update(read.nbytes)
    if tokenizer is not None and tokenizer.mask_id != model.config.mask_id:  # whose files did not tell it
        tokenizer = Tokenizer(tokenizer.inner, {"mask": model.config.mask_id})
    return model, tokenizer


def check(
    path_or_hub_id: str | Path, deep: bool = False, revision: str | None = None, mask_id: int | None = None
) -> Report:
    """What a checkpoint is, found without reading its weights; deep: read them once, for NaN and infinity.

    Raises whatever `load` would raise, except for want of memory.
    """
    directory = locate(path_or_hub_id, revision)
    report = inspect(directory, load_tokenizer(directory), mask_id)
    bad = {}
    for name, _, read in read_all(report, report.meta) if deep else []:
        if not read.isfinite().all():
            bad[name] = None
    return replace(report, non_finite=tuple(bad))


def locate(path_or_hub_id: str | Path, revision: str | None = None, progress: bool = False) -> Path:
    """The directory of a checkpoint. What exists here is never looked for on the hub; of a run, a warning names each
    damaged checkpoint that is newer than the one it gives."""
    path = Path(path_or_hub_id)
    if not str(path_or_hub_id) or not os.path.lexists(path):
        return hub.fetch(str(path_or_hub_id), revision, progress)
    if revision is not None:
        raise BadInput(f"revision: expected none, since {path} is a directory here, got {revision!r}; leave it out")
    if not path.is_dir():
        raise BadInput(f"{path}: expected a directory with config.json, got something else; give its directory")
    if not (path / "run.json").exists():
        return path
    newest, damaged = files.newest_checkpoint(path)
    for left_out, reason in damaged.items():
        warnings.warn(f"{left_out} is left out: {reason}", stacklevel=3)
    if newest is None:
        raise BadInput(f"{path}: expected a run with a whole checkpoint, got {len(damaged)} damaged; train it again")
    return newest


def load_tokenizer(directory: Path) -> Tokenizer | None:
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        if os.path.lexists(directory / name):
            confined(directory, name)
    return Tokenizer.load(directory) if os.path.lexists(directory / "tokenizer.json") else None


def expect_tokenizer(directory: Path, name: str) -> None:
    """Raise BadInput if there is none."""
    if not (directory / "tokenizer.json").is_file():
        raise BadInput(f"{name}: expected a tokenizer.json, got none; save the model with its tokenizer")


def inspect(directory: Path, tokenizer: Tokenizer | None, mask_id: int | None) -> Report:
    """Everything that can be found out without reading a weight or taking memory for one. Raises BadInput, BadLuck."""
    ours = os.path.lexists(directory / files.MANIFEST)
    hashes = files.verify_manifest(directory, sizes_only=".safetensors") if ours else {}
    scheme, config = read_config(directory, tokenizer, mask_id)
    size = getattr(tokenizer, "vocab_size", 0)
    expect(size <= config.embedding_size, "tokenizer.json", f"at most the model's {config.embedding_size} ids", size,
           "use the tokenizer that belongs to the model")  # fmt: skip
    entries = read_headers(directory)
    experts = 3 * config.n_expert * (config.n_layer - len(config.dense_layers))
    expect(len(entries) >= 5 * config.n_layer + experts, "tensors", f"those of {config.n_layer} layers", len(entries),
           "use a config.json and weights that belong together")  # fmt: skip
    with torch.device("meta"):
        meta = LLaDA(config)
    if wrong := mismatches(meta, SCHEMES[scheme], entries):
        raise BadInput(f"tensors: expected those of config.json, got {listed(wrong)}; use files that belong together")
    return Report(directory, scheme, config, entries, meta, hashes)


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Everything a checkpoint holds, by its name in the module; a tied head is no tensor of its own."""
    return {name: t.detach() for name, t in chain(model.named_parameters(), model.named_buffers())}


def plan_tensors(model: nn.Module, scheme: Scheme) -> Plan:
    plan: Plan = {}
    for ours, tensor in weights(model).items():
        name = scheme.name_of(ours)
        for e, part in enumerate(tensor) if "{e}" in name else [(None, tensor)]:
            plan.setdefault(name.format(e=e), []).append(part)
    return plan


def file_shape(parts: list[Tensor]) -> list[int]:
    return [sum(map(len, parts)), *parts[0].shape[1:]]


def mismatches(meta: LLaDA, scheme: Scheme, entries: dict[str, Entry]) -> list[str]:
    """Each tensor that is missing, not expected, or of another shape or dtype: name, expected, found."""
    wanted = {name: file_shape(parts) for name, parts in plan_tensors(meta, scheme).items()}
    found = {name: list(entry.shape) for name, entry in entries.items()}
    if wanted == found:  # then dtypes: all have the embedding's, but for routers, which are often wider
        routers = {scheme.name_of(ours) for ours in weights(meta) if ".router" in ours}
        found = {name: entry.dtype for name, entry in entries.items() if name not in routers}
        wanted = dict.fromkeys(found, found[scheme.name_of("embed.weight")])
    pairs = [(name, wanted.get(name, "none"), found.get(name, "none")) for name in wanted | found]
    return [f"{name!r} (expected {expected}, found {got})" for name, expected, got in pairs if expected != got]


def target_dtypes(report: Report, dtype: torch.dtype | None) -> dict[str, torch.dtype]:
    """One dtype for all; a router may be wider, since rounding it would send tokens to other experts."""
    expect(dtype is None or dtype in CODES, "dtype", "a torch floating dtype", dtype, "use torch.bfloat16")
    held = lambda ours: report.entries[SCHEMES[report.scheme].name_of(ours)].dtype
    main = dtype or held("embed.weight")
    return {ours: torch.promote_types(held(ours), main) if ".router" in ours else main for ours in weights(report.meta)}


def allocate(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised memory. NumPy asks Linux for huge pages: first touching small ones costs more than the reading."""
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64  # aligned as torch would
    return torch.from_numpy(raw[start : start + size]).view(dtype).view(shape)


# ---- Reading safetensors ----


def read_headers(directory: Path) -> dict[str, Entry]:
    """Every tensor of a checkpoint, from the headers of its files alone."""
    if not os.path.lexists(directory / INDEX):
        if not os.path.lexists(directory / SINGLE):
            pickles = sorted(p.name for p in directory.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
            got = f"{listed(pickles)}: pickle is not supported" if pickles else "none"
            raise BadInput(f"weights: expected {SINGLE} or {INDEX}, got {got}; convert or fetch them")
        return read_header(directory, SINGLE)
    where = files.read_json(confined(directory, INDEX), files.INDEX_CAP).get("weight_map")
    what, fix = f"weight_map in {INDEX}", "fetch it again"
    expect(isinstance(where, dict) and len(where) > 0, what, "an object", where, fix)
    for file in where.values():
        holds = isinstance(file, str) and file.endswith(".safetensors")
        expect(holds, what, "names that end in .safetensors", file, fix)
    entries: dict[str, Entry] = {}
    for file in dict.fromkeys(where.values()):
        for name, entry in read_header(directory, file).items():
            if name in entries:
                raise BadInput(f"{name!r}: expected in one file, got {entries[name].file} and {file}; delete one")
            entries[name] = entry
    there = {name: entry.file for name, entry in entries.items()}
    if astray := sorted({repr(name) for name, _ in where.items() ^ there.items()}):
        raise BadInput(f"{INDEX}: expected what the files hold, got another place for {listed(astray)}; fetch it again")
    return entries


def read_header(directory: Path, file: str) -> dict[str, Entry]:
    """The tensors of one safetensors file, which must fill it exactly: no gap, no overlap, nothing behind."""
    path, check = confined(directory, file), partial(expect, fix="fetch the file again")
    size = path.stat().st_size
    with open(path, "rb") as f:
        length = int.from_bytes(f.read(8), "little")
        cap = min(files.HEADER_CAP, size - 8)
        check(0 < length <= cap, file, f"a header of 1 to {cap:,} bytes", length)
        header = files.parse_json(f.read(length), f"header of {file}")
    metadata = header.pop("__metadata__", {})
    check(isinstance(metadata, dict), file, "an object as __metadata__", metadata)
    check(len(header) > 0, file, "at least one tensor", "none")
    end, entries = 8 + length, {}
    for name, value in header.items():
        what = f"{name!r:.200} in {file}"
        holds = isinstance(value, dict) and value.keys() == {"dtype", "shape", "data_offsets"}
        check(holds, what, "dtype, shape and data_offsets", value)
        code, shape, span = value["dtype"], value["shape"], value["data_offsets"]
        check(isinstance(code, str) and code in DTYPES, what, f"a dtype of {', '.join(DTYPES)}", code)
        check(whole(shape, 1, 8), what, "a shape of 1 to 8 whole numbers", shape)
        check(whole(span, 2, 2), what, "two offsets", span)
        entry = entries[name] = Entry(file, DTYPES[code], tuple(shape), end + span[0])
        check(span[1] - span[0] == entry.nbytes, what, f"{entry.nbytes} bytes", span)
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        check(entry.offset == end, f"{name!r:.200} in {file}", f"to start at byte {end}", entry.offset)
        end += entry.nbytes
    check(end == size, file, f"{end} bytes", size)
    return entries


def whole(values: Any, least: int, most: int) -> bool:
    """A list of least to most whole numbers, none beyond what a disk could hold."""
    counted = isinstance(values, list) and least <= len(values) <= most
    return counted and all(type(value) is int and 0 <= value < 2**48 for value in values)


def read_all(report: Report, model: LLaDA) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Read every file front to back into the parameters of model, a few chunks ahead of the consumer.

    Yields (tensor, slot, read), flat: `read` is the slot itself where the bytes can go straight into it, else a small
    buffer on the host. Raises BadInput at the end of a file that is ours if its SHA-256 is not the recorded one.
    """
    plan = plan_tensors(model, SCHEMES[report.scheme])
    for file in report.files:
        path, digest, recorded = confined(report.directory, file), hashlib.sha256(), report.hashes.get(file)
        entries = sorted((e.offset, name, e.dtype) for name, e in report.entries.items() if e.file == file)
        with open(path, "rb") as f:
            digest.update(f.read(entries[0][0]))  # the header
        with ThreadPoolExecutor(READERS) as pool:
            begun = ((*job, pool.submit(read_at, path, at, job[-1])) for at, *job in jobs(entries, plan))
            for name, slot, read, done in ahead(begun, READERS):
                done.result()
                if recorded:
                    digest.update(as_bytes(read))
                yield name, slot, read
        if recorded:
            files.compare(file, recorded, {"sha256": digest.hexdigest()})


def jobs(entries: list[tuple[int, str, torch.dtype]], plan: Plan) -> Iterator[tuple[int, str, Tensor, Tensor]]:
    """(offset into the file, tensor, slot, read) of at most a chunk each, in the order of the file."""
    for at, name, dtype in entries:
        for slot in chain.from_iterable(part.flatten().split(CHUNK // dtype.itemsize) for part in plan[name]):
            straight = slot.device.type == "cpu" and slot.dtype == dtype
            yield at, name, slot, slot if straight else torch.empty(len(slot), dtype=dtype, pin_memory=slot.is_cuda)
            at += len(slot) * dtype.itemsize


def ahead(items: Iterator, n: int) -> Iterator:
    """The same items, but up to n more are taken before one is given."""
    queue = deque(islice(items, n))
    for item in items:
        queue.append(item)
        yield queue.popleft()
    yield from queue


def as_bytes(flat: Tensor) -> memoryview:
    return memoryview(flat.view(torch.uint8).numpy())


def read_at(path: Path, offset: int, into: Tensor) -> None:
    """Fill a flat tensor with the bytes of a file from offset on."""
    view = as_bytes(into)
    with one_line(f"{path.name}: expected to read it", "check the disk"), open(path, "rb", buffering=0) as f:
        f.seek(offset)
        while view:
            n = f.readinto(view)
            expect(n > 0, path.name, "the size it had", "less", "do not write while it loads")
            view = view[n:]


# ---- Saving ----


def save(model: LLaDA, directory: str | Path, tokenizer: Tokenizer | None = None, shard_bytes: int = 5 * 10**9) -> None:
    """Write a Hugging Face directory that the official code reads: LLaDA's names, LLaDA-MoE's for experts or QK-norm,
    LLaDA2's for its router or a shared expert. What their config.json has no key for goes into minillada.json.

    A directory that already holds a model is refused; one that cannot be finished is left as it was. Every file is
    there whole or not at all; the last, manifest.json, has the SHA-256 of the others. Raises BadInput, BadLuck.
    """
    directory = Path(directory)
    check_whole("shard_bytes", shard_bytes, 1)
    scheme, raw, side = write_config(model.config)
    plan = plan_tensors(model, SCHEMES[scheme])
    shards, total = group(plan, shard_bytes), sum(tensor.nbytes for tensor in weights(model).values())
    documents = {"config.json": raw} | ({SIDE: side} if side else {})
    if len(shards) > 1:
        index = {name: file for file, names in shards.items() for name in names}
        documents[INDEX] = {"metadata": {"total_size": total}, "weight_map": index}
    before = make_home(directory, total)
    try:
        entries = {file: files.write_file(directory / file, shard(names, plan)) for file, names in shards.items()}
        for name, document in documents.items():
            entries[name] = files.write_json(directory / name, document)
        if tokenizer is not None:
            tokenizer.save(directory)
        files.write_manifest(directory, entries)
    except BaseException:
        for path in set(directory.iterdir()) - before:
            path.unlink(missing_ok=True)
        raise


def make_home(directory: Path, size: int) -> set[Path]:
    """Make the directory and see that it holds no model and has room; return what it does hold."""
    with one_line(f"{directory}: expected to make it", "choose another directory"):
        directory.mkdir(parents=True, exist_ok=True)
        before = set(directory.iterdir())
    if held := sorted(path.name for path in before if path.name == "config.json" or path.suffix == ".safetensors"):
        raise BadInput(f"{directory}: expected no model there yet, got {listed(held)}; choose another directory")
    files.check_space(directory, size)
    return before


def group(plan: Plan, shard_bytes: int) -> dict[str, list[str]]:
    """File names -> the tensors in each, in the module's order, a new file where shard_bytes would be exceeded."""
    shards: list[list[str]] = []
    filled = math.inf
    for name, parts in plan.items():
        size = sum(part.nbytes for part in parts)
        if filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": names for i, names in enumerate(shards, 1)}


def shard(names: list[str], plan: Plan) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file: length of the header, header, tensors one after the other without a gap."""
    names = sorted(names, key=lambda name: -plan[name][0].dtype.itemsize)  # so that each is aligned
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        parts, dtype, begin = plan[name], plan[name][0].dtype, end
        expect(dtype in CODES, name, "a floating dtype", dtype, "save the model before quantising it")
        end += sum(part.nbytes for part in parts)
        header[name] = {"dtype": CODES[dtype], "shape": file_shape(parts), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for part in chain.from_iterable(plan[name] for name in names):
        yield as_bytes(part.contiguous().cpu().flatten())
