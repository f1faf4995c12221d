"""Load, save and check Hugging Face directories: safetensors and JSON, never code or pickle. Load GGUF files too.

The config, the headers and the names and shapes of the tensors are all checked before memory is taken or a weight is
read. What does not fit exactly is refused in one line: BadInput, or BadLuck if the machine is to blame.
"""

import hashlib
import math
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from .. import files
from ..errors import BadInput, check_whole
from ..files import confined, expect, listed, one_line
from ..model import LLaDA, ModelConfig
from ..text.tokenizer import Tokenizer
from . import gguf, hub
from .convert import GGUF, home_of, is_gguf, read_pieces
from .convert import read_config as read_gguf_config
from .device import check_memory
from .headers import DTYPES, INDEX, SINGLE, Entry, read_headers
from .schemes import SCHEMES, SIDE, Scheme, read_config, write_config
from .shipped import HOME, shipped
from .tower import TOWER, Vision, read_vision, write_vision
from .vision import sees, with_vision

NAMES = SCHEMES | GGUF  # Report.scheme -> the names of the tensors
STORED = {"f16": torch.float16, "bf16": torch.bfloat16}  # kind of a GGUF tensor -> its dtype here; float32 for others
CHUNK = 1 << 24  # bytes read at a time
T = TypeVar("T")
Plan = dict[str, list[Tensor]]  # tensor of the files -> the parameters (or single experts) that are its rows


@dataclass(frozen=True)
class Report:
    """What a checkpoint is, as far as its headers tell."""

    directory: Path  # or a GGUF file
    scheme: str
    config: ModelConfig
    entries: dict[str, Entry | gguf.Stored] = field(repr=False)  # every tensor of the files
    meta: LLaDA = field(repr=False)  # the module, without memory
    hashes: dict[str, dict] = field(repr=False)  # the manifest, if the checkpoint is ours
    non_finite: tuple[str, ...] = ()  # after a deep check: tensors with NaN or infinity

    @property
    def n_bytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries.values())

    @property
    def files(self) -> list[str]:
        return list(dict.fromkeys(entry.file for entry in self.entries.values()))

    @property
    def dtypes(self) -> list[str]:
        return sorted({entry.kind for entry in self.entries.values()})

    def dtype_of(self, ours: str) -> torch.dtype:
        """Return the dtype in which the files, or what is unpacked from them, hold a parameter of the module."""
        entry = self.entries[NAMES[self.scheme].name_of(ours)]
        if isinstance(entry, Entry):
            return entry.dtype
        return torch.float32 if len(set(self.dtypes) - {"f32"}) > 1 else STORED.get(entry.kind, torch.float32)


def load(
    path_or_hub_id: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    progress: bool = False,
    mask_id: int | None = None,
    tokenizer: str | Path | None = None,
    allow_unknown_keys: bool = False,
) -> tuple[LLaDA, Tokenizer | None]:
    """Return the model, in eval mode, and the tokenizer if there is one, of a directory, a run (its newest whole
    checkpoint), a GGUF file, or the hub (revision: a branch, tag or commit). dtype: None for the files'. mask_id: if
    they lack it. tokenizer: a directory with a tokenizer to take instead, for GGUF files without one.
    allow_unknown_keys: of config.json, even if they could change the model. Raises BadInput for what does not fit
    exactly, BadLuck if a file, the network or memory is missing."""
    with one_line(f"device: expected one of this machine for {str(device)!r}", "use cpu", faults=Exception):
        device = torch.empty(0, device=device).device
    how = device, dtype, progress, mask_id, tokenizer, allow_unknown_keys
    return reading(path_or_hub_id, lambda directory: load_directory(directory, *how), revision, progress)


def load_directory(
    directory: Path,
    device: torch.device,
    dtype: torch.dtype | None,
    progress: bool,
    mask_id: int | None,
    tokenizer: str | Path | None,
    allow_unknown_keys: bool,
) -> tuple[LLaDA, Tokenizer | None]:
    """Do what `load` does, for a directory that is known."""
    if directory.parent == HOME and dtype is None:
        dtype = torch.float32  # stored in half of that, which many processors compute slowly with
    tokenizer = load_tokenizer(Path(tokenizer or directory))
    report = inspect(directory, tokenizer, mask_id, allow_unknown_keys)
    model, dtypes = report.meta.eval(), target_dtypes(report, dtype)
    shapes = {name: p.shape for name, p in weights(model).items()}
    check_memory(sum(math.prod(shape) * dtypes[name].itemsize for name, shape in shapes.items()), device)
    state = {name: torch.empty(shape, dtype=dtypes[name], device=device) for name, shape in shapes.items()}
    model.load_state_dict(state, assign=True, strict=False)  # not strict: a tied head is no tensor of its own
    if report.config.tie_head:
        model.head.weight = model.embed.weight
    with tqdm(total=report.n_bytes, unit="B", unit_scale=True, desc="loading", disable=not progress) as bar:
        for name, slot, read in read_tensors(report, model):
            if slot is not read:
                slot.copy_(read)
            bar.update(len(read) * report.entries[name].nbytes // math.prod(report.entries[name].shape))
    return model, fitted(tokenizer, report.config)


def fitted(tokenizer: Tokenizer | None, config: ModelConfig) -> Tokenizer | None:
    """Return the tokenizer with the model's mask, which its own files may not tell."""
    known = tokenizer is None or tokenizer.mask_id == config.mask_id
    return tokenizer if known else Tokenizer(tokenizer.inner, {"mask": config.mask_id})


def check(
    path_or_hub_id: str | Path,
    deep: bool = False,
    revision: str | None = None,
    mask_id: int | None = None,
    tokenizer: Path | None = None,
    allow_unknown_keys: bool = False,
) -> Report:
    """Find out what a checkpoint is; if deep, look for NaN and infinity. Raises as `load`, except for memory."""
    look = lambda found: inspect(found, load_tokenizer(Path(tokenizer or found)), mask_id, allow_unknown_keys)
    report = reading(path_or_hub_id, look, revision)
    read = read_tensors(report, report.meta) if deep else []
    bad = dict.fromkeys(name for name, _, piece in read if not piece.isfinite().all())
    return replace(report, non_finite=tuple(bad))


def locate(path_or_hub_id: str | Path, revision: str | None = None, progress: bool = False) -> Path:
    """Return the directory of a checkpoint, or its GGUF file: what exists here, else a model that comes with the
    package, else one of the hub. Of a run it is the newest whole checkpoint; a warning names each newer one that is
    damaged."""
    path = Path(path_or_hub_id)
    if not str(path_or_hub_id) or not os.path.lexists(path):
        return shipped(str(path_or_hub_id)) or hub.fetch(str(path_or_hub_id), revision, progress)
    if revision is not None:
        raise BadInput(f"revision: expected none, since {path} is a directory here, got {revision!r}; leave it out")
    if is_gguf(path):
        return path
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


def reading(name: str | Path, use: Callable[[Path], T], revision: str | None = None, progress: bool = False) -> T:
    """Return use(directory) for what `locate` finds. A run that goes on training may drop the checkpoint meanwhile:
    then it is done again with its next one."""
    while True:
        directory = locate(name, revision, progress)
        try:
            return use(directory)
        except (BadInput, OSError):
            if directory.exists() or not (Path(name) / "run.json").is_file():
                raise


def load_tokenizer(path: Path) -> Tokenizer | None:
    """Return the tokenizer of a directory or a GGUF file, None if there is none."""
    with home_of(path) as directory:
        if not os.path.lexists(directory / "tokenizer.json"):
            return None
        confined(directory, "tokenizer.json")
        return Tokenizer.load(directory)


def expect_tokenizer(path: Path, name: str) -> None:
    with home_of(path) as directory:
        if (directory / "tokenizer.json").is_file():
            return
        fix = "give one with --tokenizer" if is_gguf(path) else "save the model with its tokenizer"
        raise BadInput(f"{name}: expected a tokenizer.json, got none; {fix}")


def inspect(
    directory: Path, tokenizer: Tokenizer | None, mask_id: int | None, allow_unknown_keys: bool = False
) -> Report:
    """Check everything that can be checked before memory is taken. Raises BadInput, BadLuck."""
    hashes, header = {}, gguf.read_header(directory) if is_gguf(directory) else None
    if header is not None:
        scheme, config = read_gguf_config(directory, header, tokenizer, mask_id)
    else:
        if os.path.lexists(directory / files.MANIFEST):
            hashes = files.verify_manifest(directory, sizes_only=".safetensors")
        scheme, config = read_config(directory, tokenizer, mask_id, allow_unknown_keys)
    size = getattr(tokenizer, "vocab_size", 0)
    expect(size <= config.embedding_size, "tokenizer.json", f"at most the model's {config.embedding_size} ids", size,
           "use the tokenizer that belongs to the model")  # fmt: skip
    entries = read_headers(directory) if header is None else header.tensors
    experts = 0 if header else 3 * config.n_expert * (config.n_layer - len(config.dense_layers))
    expect(len(entries) >= 5 * config.n_layer + experts, "tensors", f"those of {config.n_layer} layers", len(entries),
           "use a config.json and weights that belong together")  # fmt: skip
    meta = blank(config, read_vision(directory) if NAMES[scheme].seen else None)
    if wrong := mismatches(meta, NAMES[scheme], entries):
        raise BadInput(f"tensors: expected those of config.json, got {listed(wrong)}; use files that belong together")
    return Report(directory, scheme, config, entries, meta, hashes)


def blank(config: ModelConfig, vision: Vision | None) -> LLaDA:
    """Return a model without memory for its weights; vision: the tower of one that sees."""
    with torch.device("meta"):
        model = LLaDA(config)
        return model if vision is None else with_vision(model, vision)


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Return every tensor that a checkpoint holds, by its name in the module; a tied head is not one of them."""
    return {name: t.detach() for name, t in chain(model.named_parameters(), model.named_buffers())}


def plan_tensors(model: nn.Module, scheme: Scheme) -> Plan:
    """Say for each tensor of the files which parameters it is made of. In LLaDA2, `…query_key_value.weight` -> [q, k,
    v]; an expert's tensor -> [its part of the stacked parameter]."""
    plan: Plan = {}
    for ours, tensor in weights(model).items():
        name = scheme.name_of(ours)
        for e, part in enumerate(tensor) if "{e}" in name else [(None, tensor)]:
            plan.setdefault(name.format(e=e), []).append(part)
    return plan


def mismatches(meta: LLaDA, scheme: Scheme, entries: dict[str, Entry]) -> list[str]:
    """Describe each tensor that is missing, unexpected, or of another shape or dtype."""
    plan = plan_tensors(meta, scheme)
    wanted = {name: [sum(map(len, parts)), *parts[0].shape[1:]] for name, parts in plan.items()}
    found = {name: list(entry.shape) for name, entry in entries.items()}
    if wanted == found and isinstance(
        next(iter(entries.values())), Entry
    ):  # then compare dtypes: all have the embedding's, except routers, which are often wider
        routers = {scheme.name_of(ours) for ours in weights(meta) if ".router" in ours}
        found = {name: entry.dtype for name, entry in entries.items() if name not in routers}
        wanted = dict.fromkeys(found, found[scheme.name_of("embed.weight")])
    pairs = [(name, wanted.get(name, "none"), found.get(name, "none")) for name in wanted | found]
    return [f"{name!r} (expected {expected}, found {got})" for name, expected, got in pairs if expected != got]


def target_dtypes(report: Report, dtype: torch.dtype | None) -> dict[str, torch.dtype]:
    """Return the dtype of each weight: one for all; a router may stay wider, since rounding could change its choice."""
    expect(dtype is None or dtype in DTYPES.values(), "dtype", "a torch floating dtype", dtype, "use torch.bfloat16")
    main, held = dtype or report.dtype_of("embed.weight"), report.dtype_of
    return {ours: torch.promote_types(held(ours), main) if ".router" in ours else main for ours in weights(report.meta)}


def read_tensors(report: Report, model: LLaDA) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Read every file once, front to back; yield (name of the tensor, where it belongs in the model, what was read):
    flat pieces of equal length. What needs conversion is read into a buffer, so use each piece before asking for the
    next. Raises BadInput if a file that we saved has another SHA-256 now, or for a kind of GGUF tensor that is not
    unpacked here, BadLuck if it cannot be read."""
    # `safetensors.safe_open` maps a whole file, twice while it opens it: more memory than 1.2 times the weights.
    plan, buffer = plan_tensors(model, NAMES[report.scheme]), torch.empty(CHUNK, dtype=torch.uint8)
    if is_gguf(report.directory):
        for name, stored in report.entries.items():
            for slot, read in read_pieces(report.directory, name, stored, plan[name][0], report.config):
                yield name, slot, read
        return
    for file in report.files:
        path, digest, ours = confined(report.directory, file), hashlib.sha256(), file in report.hashes
        entries = sorted((e.offset, name, e.dtype) for name, e in report.entries.items() if e.file == file)
        with one_line(f"{file}: expected to read it", "check the disk"), open(path, "rb") as f:
            digest.update(f.read(entries[0][0]))  # the header
            for _, name, dtype in entries:
                for slot in chain.from_iterable(part.flatten().split(CHUNK // dtype.itemsize) for part in plan[name]):
                    straight = slot.device.type == "cpu" and slot.dtype == dtype
                    read = slot if straight else buffer[: len(slot) * dtype.itemsize].view(dtype)
                    data = memoryview(read.view(torch.uint8).numpy())
                    n = f.readinto(data)
                    expect(n == len(data), file, "the size it had", "less", "do not write to it while it loads")
                    if ours:
                        digest.update(data)
                    yield name, slot, read
        if ours:
            files.compare(file, report.hashes[file], {"sha256": digest.hexdigest()})


def read_parameter(report: Report, ours: str) -> Tensor:
    """Return one parameter of the module, read from a directory's files, so that no more is in memory. For schemes that
    fuse nothing. Raises BadLuck if it cannot be read."""
    name, wanted = SCHEMES[report.scheme].name_of(ours), weights(report.meta)[ours]
    found = [report.entries[name.format(e=e)] for e in range(len(wanted) if "{e}" in name else 1)]
    parts = []
    for entry in found:
        with one_line(f"{entry.file}: expected to read it", "check the disk"):
            path = confined(report.directory, entry.file)
            data = np.fromfile(path, np.uint8, entry.nbytes, offset=entry.offset)
        parts.append(torch.from_numpy(data).view(entry.dtype).view(entry.shape))
    return torch.stack(parts) if "{e}" in name else parts[0]


def save(model: LLaDA, directory: str | Path, tokenizer: Tokenizer | None = None, shard_bytes: int = 5 * 10**9) -> None:
    """Write a Hugging Face directory that the official code reads, in LLaDA's, LLaDA-MoE's, LLaDA2's, LLaDA-V's names.
    Fields that config.json has no key for go into minillada.json; manifest.json, the last file, has the SHA-256 of the
    others. A directory that cannot be finished is left as it was. Raises BadInput if it holds a model, BadLuck."""
    directory = Path(directory)
    check_whole("shard_bytes", shard_bytes, 1)
    vision = model.embed.vision if sees(model) else None
    scheme, raw, side = write_config(model.config, vision is not None)
    plan = plan_tensors(model, SCHEMES[scheme])
    for name, parts in plan.items():
        dtype = parts[0].dtype
        expect(dtype in DTYPES.values(), name, "a floating dtype", dtype, "save the model before quantising it")
    shards, total = group(plan, shard_bytes), sum(tensor.nbytes for tensor in weights(model).values())
    documents = {"config.json": raw} | ({SIDE: side} if side else {})
    if vision is not None:
        keys, tower = write_vision(vision)
        documents |= {"config.json": raw | keys} | ({TOWER: tower} if tower else {})
    if len(shards) > 1:
        index = {name: file for file, names in shards.items() for name in names}
        documents[INDEX] = {"metadata": {"total_size": total}, "weight_map": index}
    before = make_home(directory, total)
    try:
        for file, names in shards.items():
            whole = {name: torch.cat(plan[name]) if len(plan[name]) > 1 else plan[name][0] for name in names}
            with files.drafted(directory / file) as draft:
                save_file({name: t.contiguous() for name, t in whole.items()}, draft, {"format": "pt"})
        for name, document in documents.items():
            files.write_json(directory / name, document)
        if tokenizer is not None:
            tokenizer.save(directory)
        files.write_manifest(directory)
    except BaseException:
        for path in set(directory.iterdir()) - before:
            path.unlink(missing_ok=True)
        raise


def make_home(directory: Path, size: int) -> set[Path]:
    """Make the directory if need be; refuse it if it holds a model or lacks room. Return what it holds already."""
    with one_line(f"{directory}: expected to make it", "choose another directory"):
        directory.mkdir(parents=True, exist_ok=True)
        before = set(directory.iterdir())
    if held := sorted(path.name for path in before if path.name == "config.json" or path.suffix == ".safetensors"):
        raise BadInput(f"{directory}: expected no model there yet, got {listed(held)}; choose another directory")
    files.check_space(directory, size)
    return before


def group(plan: Plan, shard_bytes: int) -> dict[str, list[str]]:
    """Return the names of the files and the tensors in each: the model's order, a new file above shard_bytes."""
    shards, filled = [], math.inf
    for name, parts in plan.items():
        size = sum(part.nbytes for part in parts)
        if filled + size > shard_bytes:
            shards, filled = [*shards, []], 0
        shards[-1].append(name)
        filled += size
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    return dict(zip(names if len(shards) > 1 else [SINGLE], shards, strict=True))
