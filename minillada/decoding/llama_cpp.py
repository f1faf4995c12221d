"""llama.cpp as a mask predictor: C++ kernels for a GGUF file, behind the same sampler.

The package `llama-cpp-python` (extra `cpp`) brings llama.cpp; of it only the C functions are used. Each row of the
canvas is a sequence of its own, without its padding. A dense model runs as llama.cpp's `llama` with attention in both
directions, which unlike its `llada` keeps keys and values and computes only the logits asked for. So there is the
prefix cache, and a block model is evaluated block by block with a cache that is exact, whatever `cache` says.
Shapes: R rows, T sequence, N holes asked about, V vocabulary.
"""

import weakref
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import BadInput, BadLuck
from ..model import KVCache, ModelConfig
from ..strategies import Ask
from ..weights import convert, gguf
from ..weights.checkpoint import inspect

VERSION = "0.3.36"  # of llama-cpp-python; others order the fields of its structures in another way
MOST = 256  # sequences in a batch, guidance included
HOW = "pip install 'minillada[cpp]' (it compiles for minutes; for prebuilt wheels see the README of llama-cpp-python)"


class LlamaCpp:
    """Predict what is behind the masks with llama.cpp: hand it to `stream` or `generate` in place of the model.

    threads: of the processor; None: as many as PyTorch uses. gpu_layers: how many layers a GPU computes, -1: all, if
    llama.cpp was built for one. exact: keep keys and values in float32 and attend in plain steps; None: if the file is
    in f32. config: if the file lacks ids. Raises BadInput for a file that does not fit, BadLuck without the package.
    """

    device = torch.device("cpu")  # where the logits are
    by_blocks = True  # it sees to the blocks of a block model itself

    def __init__(
        self,
        path: str | Path,
        threads: int | None = None,
        gpu_layers: int = -1,
        exact: bool | None = None,
        config: ModelConfig | None = None,
    ) -> None:
        path = Path(path)
        if not convert.is_gguf(path):
            raise BadInput(f"{path}: expected a GGUF file, got another; make one with python -m minillada gguf")
        report = inspect(path, None, config and config.mask_id)
        self.config, self.threads = config or report.config, threads or torch.get_num_threads()
        self.exact = set(report.dtypes) == {"f32"} if exact is None else exact
        self.keeps = "llama.block_count" in gguf.read_header(path).keys  # keys and values
        self.lib = library()
        self.handle = Handle(self.lib)  # shared by copies of this object
        params = self.lib.llama_model_default_params()
        overrides = architecture(self.lib, "llama" if self.keeps else report.scheme.split()[-1])
        fill(params, n_gpu_layers=gpu_layers, kv_overrides=overrides)
        self.handle.c["model"] = self.lib.llama_model_load_from_file(str(path).encode(), params)
        if not self.handle.c["model"]:
            raise BadLuck(f"{path}: expected llama.cpp to load it, got {told()}; convert it again, or free memory")

    def __call__(self, ask: Ask, cache: KVCache | None = None) -> Tensor:
        """Return the logits (N,V). With a cache, a question about the canvas from some column on takes what stands
        before it from the evaluation before. Raises BadInput for what llama.cpp cannot do, BadLuck."""
        n_row, width = ask.x.shape
        start = 0 if ask.positions is None else int(ask.positions[0])
        consecutive = ask.positions is None or torch.equal(ask.positions, torch.arange(start, start + width))
        if not consecutive or (ask.attn_mask is not None and ask.attn_mask.shape[-2] > 1):
            raise BadInput("llama.cpp: expected positions that all see the same, got others (wino); leave revise out")
        if (cache is not None or self.config.block) and not self.keeps:
            raise BadInput("cache: expected none, since llama.cpp keeps no keys of this file, got one; leave it out")
        if int(ask.rows.max()) >= MOST:
            raise BadInput(f"rows: expected at most {MOST} (half with guidance), got more; use smaller batches")
        valid = ask.x.new_ones(n_row, start + width, dtype=torch.bool)
        valid = valid if ask.attn_mask is None else ask.attn_mask[:, 0, 0]
        if self.config.block:
            spans = self.changed(ask, valid)
        else:
            spans = [(0, width)]
            self.whole(ask, valid, start, cache)
        said = torch.empty(len(ask.where[0]), self.config.embedding_size)
        for first, stop in spans:
            there, logits = self.evaluate(ask, valid, start, first, stop)
            said[there] = logits
        return said

    def whole(self, ask: Ask, valid: Tensor, start: int, cache: KVCache | None) -> None:
        """Make room for an evaluation of the canvas, or keep what stands before `start` of the one before."""
        if start == 0:
            self.begin(int(valid.sum()), len(ask.x) * (ask.window.stop - ask.window.start), int(ask.rows.max()) + 1)
            self.handle.c["held"] = cache
        elif self.handle.c.get("held") is not cache:
            raise BadInput("llama.cpp: expected the canvas of the evaluation before, got another; use one per stream")
        else:
            self.forget(ask, valid, start)

    def changed(self, ask: Ask, valid: Tensor) -> list[tuple[int, int]]:
        """Return the blocks to evaluate, up to the window's end: those with new tokens, what stands behind them, and
        the window. Keys and values of the blocks before them are held, and exact."""
        block, stop, n_row = self.config.block, ask.window.stop, int(ask.rows.max()) + 1
        known = self.handle.c.get("held")
        if not isinstance(known, Tensor) or known.shape[1] != valid.shape[1] or len(known) < n_row:
            self.begin(n_row * valid.shape[1], len(ask.x) * block, n_row)
            known = self.handle.c["held"] = valid.new_full((n_row, valid.shape[1]), -1, dtype=torch.long)
        now = ask.x.masked_fill(~valid, -2)  # (R,T)
        same = (now == known[ask.rows]).all(0).long().cumprod(0).sum()  # columns
        first = min(int(same), ask.window.start) // block * block
        self.forget(ask, valid, first)
        known[ask.rows, first:] = -1
        known[ask.rows, first:stop] = now[:, first:stop]
        return [(a, min(a + block, stop)) for a in range(first, stop, block) if valid[:, a : a + block].any()]

    def forget(self, ask: Ask, valid: Tensor, start: int) -> None:
        """Forget what is held of the columns from `start` on."""
        memory = self.lib.llama_get_memory(self.handle.c["context"])
        for row, n in zip(ask.rows.tolist(), valid[:, :start].sum(1).tolist(), strict=True):
            self.lib.llama_memory_seq_rm(memory, row, n, -1)

    def evaluate(self, ask: Ask, valid: Tensor, start: int, first: int, stop: int) -> tuple[Tensor, Tensor]:
        """Evaluate the columns from `first` to `stop` of the question, which begins at column `start` of the canvas.
        Return which of the places asked about stand there (N,), and their logits."""
        here, before = valid[:, start + first : start + stop], valid[:, : start + first].sum(1, keepdim=True)
        there = (ask.where[1] >= first) & (ask.where[1] < stop)
        where = ask.where[0][there], ask.where[1][there] - first
        wanted = torch.zeros_like(here).index_put(where, torch.tensor(True))
        row = ask.rows[:, None].expand_as(here)
        parts = (ask.x[:, first:stop], before + here.cumsum(1) - 1, row, wanted)
        self.decode(*(part[here].tolist() for part in parts))
        number = (here.flatten().cumsum(0) - 1).view_as(here)[where]  # of the token in the batch
        found = [self.lib.llama_get_logits_ith(self.handle.c["context"], i) for i in number.tolist()]
        logits = [np.ctypeslib.as_array(pointer, (self.config.embedding_size,)) for pointer in found]
        return there, torch.from_numpy(np.array(logits, np.float32).reshape(len(found), self.config.embedding_size))

    def logits(self, tokens: Tensor, valid: Tensor | None = None) -> Tensor:
        """Return the logits (R,T,V) of every token of tokens (R,T) long; 0 where valid (R,T) bool is False."""
        valid = torch.ones_like(tokens, dtype=torch.bool) if valid is None else valid.bool()
        where = valid.nonzero(as_tuple=True)
        ask = Ask(tokens, where, slice(0, tokens.shape[1]), torch.arange(len(tokens)), valid[:, None, None, :])
        return torch.zeros(*tokens.shape, self.config.embedding_size).index_put(where, self(ask))

    def begin(self, *need: int) -> None:
        """Forget what is held; make room for so many tokens, logits and rows. More room than that would cost memory."""
        c = self.handle.c
        if any(map(int.__gt__, need, c["room"])):
            if "context" in c:
                self.lib.llama_free(c.pop("context"))
            n_token, n_logits, n_row = room = tuple(map(max, need, c["room"]))
            params, c["room"] = self.lib.llama_context_default_params(), (0, 0, 0)
            fill(params, n_ctx=n_token, n_batch=n_token, n_ubatch=n_token, n_seq_max=n_row, kv_unified=True)
            fill(params, n_threads=self.threads, n_threads_batch=self.threads)
            fill(params, n_outputs_max=min(n_logits, n_token) if self.keeps else 0)
            if self.exact:
                fill(params, type_k=0, type_v=0, flash_attn_type=0)  # float32, float32, off
            context = self.lib.llama_init_from_model(c["model"], params)
            if not context:
                raise BadLuck(f"llama.cpp: expected room for {n_token} tokens, got {told()}; use fewer or shorter rows")
            c["context"], c["room"] = context, room
        elif self.keeps:
            self.lib.llama_memory_clear(self.lib.llama_get_memory(c["context"]), False)

    def decode(self, tokens: list[int], positions: list[int], rows: list[int], wanted: list[bool]) -> None:
        """Evaluate tokens, each at a position of its row; compute logits of those wanted. Raises BadLuck."""
        batch = self.lib.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, (token, position, row, flag) in enumerate(zip(tokens, positions, rows, wanted, strict=True)):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, flag
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, row
        code = self.lib.llama_decode(self.handle.c["context"], batch)
        self.lib.llama_batch_free(batch)
        if code:
            raise BadLuck(f"llama.cpp: expected it to evaluate {len(tokens)} tokens, got {told()}; use fewer")


# ---- What llama.cpp says and wants -----------------------------------------------------------------------------------

LINES: list[str] = []  # what it complained about, the last few
CALLBACKS: list[Any] = []  # that C code holds, so they must stay


def library() -> ModuleType:
    """Return the package with llama.cpp's C functions, which now keeps its messages for `told`. Raises BadLuck."""
    try:
        import llama_cpp as lib
    except (ImportError, OSError, RuntimeError) as error:  # not there, or its C++ part does not load
        what = "the package llama-cpp-python" if isinstance(error, ImportError) else f"one that loads ({error})"
        raise BadLuck(f"llama.cpp: expected {what}, got none; {HOW}") from None
    if lib.__version__ != VERSION:
        raise BadLuck(f"llama-cpp-python: expected version {VERSION}, got {lib.__version__}; {HOW}")
    if not CALLBACKS:
        CALLBACKS.append(lib.llama_log_callback(note))
        lib.llama_log_set(CALLBACKS[0], None)
        lib.llama_backend_init()
    return lib


def note(level: int, text: bytes, data: object) -> None:
    if level == 4:  # an error
        LINES[:] = [*LINES[-3:], text.decode(errors="replace")]


def told() -> str:
    """Return the last errors that llama.cpp reported, in one line."""
    return " ".join(" ".join(LINES).split())[-300:] or "an error without a message"


def fill(params: Any, **values: object) -> None:
    for name, value in values.items():
        setattr(params, name, value)


def architecture(lib: ModuleType, name: str) -> Any:
    """Return what makes llama.cpp take a file for one of this architecture: a list that ends with an empty entry."""
    entries = (lib.llama_model_kv_override * 2)()
    entries[0].tag, entries[0].key = lib.LLAMA_KV_OVERRIDE_TYPE_STR, b"general.architecture"
    entries[0].value.val_str = name.encode()
    return entries


class Handle:
    """Own what llama.cpp holds, its model and its context, and free it when nobody needs it any more."""

    def __init__(self, lib: ModuleType) -> None:
        self.c: dict[str, Any] = {"room": (0, 0, 0)}  # and "held": whose keys and values are in memory
        weakref.finalize(self, release, lib, self.c)


def release(lib: ModuleType, c: dict[str, Any]) -> None:
    for name, free in (("context", lib.llama_free), ("model", lib.llama_model_free)):
        if c.get(name):
            free(c.pop(name))
