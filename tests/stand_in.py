"""A stand-in for llama.cpp: the C functions that minillada uses, evaluated with the module. It is as strict as they
are about what they are given: where llama.cpp would fail or end the process, an assertion fails."""

import ctypes
from types import SimpleNamespace

import numpy as np
import torch

import minillada
from minillada.decoding.llama_cpp import VERSION
from minillada.weights import gguf

__version__ = VERSION
LLAMA_KV_OVERRIDE_TYPE_STR = 3


class Value(ctypes.Union):
    _fields_ = [("val_str", ctypes.c_char * 128)]


class llama_model_kv_override(ctypes.Structure):
    _fields_ = [("tag", ctypes.c_int), ("key", ctypes.c_char * 128), ("value", Value)]


class Memory:
    """Keys and values of one sequence, as a KVCache: what is new stands behind what is held."""

    def __init__(self) -> None:
        self.layers, self.length = {}, 0

    def update(self, layer, positions, k, v):
        start = int(positions[0])
        if start:
            held_k, held_v = self.layers[layer]
            k, v = torch.cat([held_k[:, :, :start], k], 2), torch.cat([held_v[:, :, :start], v], 2)
        self.layers[layer] = k, v
        return k, v


def llama_log_callback(function):
    return function


def llama_log_set(callback, data):
    pass


def llama_backend_init():
    pass


def llama_model_default_params():
    return SimpleNamespace(n_gpu_layers=-1, kv_overrides=None)


def llama_model_load_from_file(path: bytes, params):
    entries = params.kv_overrides
    assert entries[0].key == b"general.architecture" and entries[1].key == b""
    name = entries[0].value.val_str.decode()
    keys = gguf.read_header(minillada.weights.convert.Path(path.decode())).keys
    assert f"{name}.block_count" in keys and keys[f"{name}.attention.causal"] is False
    module, _ = minillada.load(path.decode(), dtype=torch.float32)
    return SimpleNamespace(module=module, keeps=name == "llama")


def llama_model_free(model):
    model.module = None


def llama_context_default_params():
    names = "n_ctx n_batch n_ubatch n_seq_max n_threads n_threads_batch n_outputs_max type_k type_v flash_attn_type"
    return SimpleNamespace(**dict.fromkeys(names.split(), -1), kv_unified=False)


def llama_init_from_model(model, params):
    assert params.kv_unified and 0 < params.n_seq_max <= 256 and params.n_threads > 0
    return SimpleNamespace(model=model, params=params, memory={} if model.keeps else None, logits={})


def llama_free(context):
    context.model = None


def llama_get_memory(context):
    return context.memory


def llama_memory_clear(memory, data):
    memory.clear()


def llama_memory_seq_rm(memory, row, start, stop):
    held = memory.setdefault(row, Memory())
    assert stop == -1 and start <= held.length
    held.length = start
    return True


def llama_batch_init(n, embd, n_seq):
    assert (embd, n_seq) == (0, 1)
    return SimpleNamespace(n_tokens=0, seq_id=[[None] for _ in range(n)],
                           **{name: [None] * n for name in ("token", "pos", "n_seq_id", "logits")})  # fmt: skip


def llama_batch_free(batch):
    pass


@torch.no_grad()
def llama_decode(context, batch):
    params, module, memory = context.params, context.model.module, context.memory
    assert 0 < batch.n_tokens <= min(params.n_ctx, params.n_batch, params.n_ubatch)
    assert memory is None or sum(map(bool, batch.logits)) <= params.n_outputs_max
    context.logits = {}
    rows = np.array([row for (row,) in batch.seq_id])
    assert rows.max() < params.n_seq_max and set(batch.n_seq_id) == {1}
    for row in dict.fromkeys(rows.tolist()):
        index = np.flatnonzero(rows == row)
        held = Memory() if memory is None else memory.setdefault(row, Memory())
        positions = torch.tensor(batch.pos)[index]
        assert torch.equal(positions, torch.arange(held.length, held.length + len(index)))
        tokens = torch.tensor(batch.token)[index][None]
        logits = module(tokens, positions=positions, cache=held)[0]
        held.length += len(index)
        context.logits |= {int(i): one.numpy().copy() for i, one in zip(index, logits, strict=True) if batch.logits[i]}
    return 0


def llama_get_logits_ith(context, i):
    return context.logits[i].ctypes.data_as(ctypes.POINTER(ctypes.c_float))
