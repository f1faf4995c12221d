"""Hugging Face directories ↔ the module: `load`, `save`, `check`. Safetensors and JSON only, and no code of theirs.

A checkpoint is data from a stranger. Everything about it (files, headers, config, names, shapes) is checked before one
weight is read or allocated; what does not fit exactly is refused in one line, BadInput, or BadLuck where the machine is
to blame. The three parts of this file: the naming schemes, which are tables; loading and saving; the files themselves.
"""

import hashlib
import json
import math
import os
import re
import reprlib
import shutil
import stat
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from itertools import chain
from pathlib import Path, PureWindowsPath
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from . import hub
from .errors import BadInput, BadLuck, check_whole
from .model import LLaDA, ModelConfig
from .tokenizer import Tokenizer

# ---- Naming schemes: one architecture, four ways to write it down ----


@dataclass(frozen=True)
class Scheme:
    """What config.json calls the fields of ModelConfig, and what the files call its tensors."""

    marks: tuple[str, ...]  # a config.json with these keys is of this scheme; model_type does not tell
    keys: dict[str, str]  # field of ModelConfig -> key of config.json
    fixed: dict[str, Any]  # keys for which the module implements just this value; null, false or no key all mean off
    ignored: dict[str, Any]  # keys that cannot change what a loaded model answers; the values are what save writes
    tensors: dict[str, str]  # name in the module -> name in the file; i is the layer, e the expert
    absent: dict[str, Any] = field(default_factory=dict)  # what it means if one of these keys is not there
    rare: dict[str, Any] = field(default_factory=dict)  # like fixed, for keys that save does not write
    spare: dict[str, str] = field(default_factory=dict)  # like keys, for keys that save does not write
    derived: tuple[str, ...] = ()  # keys that are no field as they stand, but
    derive: Callable[[dict, dict], dict] = lambda values, found: {}  # (keys, fields so far) -> further fields
    express: Callable[[ModelConfig], dict] = lambda config: {}  # the way back: the keys of those fields


LLADA = Scheme(  # LLaDA-8B, LLaDA-1.5, iLLaDA: the names of OLMo
    marks=("d_model", "n_heads", "n_layers"),
    keys={
        "vocab_size": "vocab_size", "embedding_size": "embedding_size", "n_layer": "n_layers", "n_head": "n_heads",
        "n_kv_head": "n_kv_heads", "d_model": "d_model", "d_ff": "mlp_hidden_size", "max_len": "max_sequence_length",
        "rope_theta": "rope_theta", "norm_eps": "rms_norm_eps", "tie_head": "weight_tying",
        "qkv_bias": "include_qkv_bias", "mask_id": "mask_token_id", "eos_id": "eos_token_id", "pad_id": "pad_token_id",
    },
    absent={"n_kv_heads": None, "embedding_size": None, "mask_token_id": None},
    fixed={
        "activation_type": "silu", "alibi": False, "attention_layer_norm": False, "bias_for_layer_norm": False,
        "block_group_size": 1, "block_type": "llama", "include_bias": False, "input_emb_norm": False,
        "layer_norm_type": "rms", "layer_norm_with_affine": True, "multi_query_attention": None, "rope": True,
        "rope_full_precision": True, "scale_logits": False,
    },
    rare={"clip_qkv": None},
    ignored={
        "alibi_bias_max": 8.0, "architectures": ["LLaDAModelLM"], "attention_dropout": 0.0,
        "attention_layer_norm_with_affine": True, "embedding_dropout": 0.0, "flash_attention": False,
        "init_cutoff_factor": None, "init_device": "meta", "init_fn": "mitchell", "init_std": 0.02, "mlp_ratio": 4,
        "model_type": "llada", "precision": "amp_bf16", "residual_dropout": 0.0, "transformers_version": "4.46.3",
        "use_cache": False,
    },
    tensors={
        "embed.weight": "model.transformer.wte.weight",
        "blocks.{i}.attn_norm.weight": "model.transformer.blocks.{i}.attn_norm.weight",
        "blocks.{i}.attn.q.weight": "model.transformer.blocks.{i}.q_proj.weight",
        "blocks.{i}.attn.k.weight": "model.transformer.blocks.{i}.k_proj.weight",
        "blocks.{i}.attn.v.weight": "model.transformer.blocks.{i}.v_proj.weight",
        "blocks.{i}.attn.q.bias": "model.transformer.blocks.{i}.q_proj.bias",
        "blocks.{i}.attn.k.bias": "model.transformer.blocks.{i}.k_proj.bias",
        "blocks.{i}.attn.v.bias": "model.transformer.blocks.{i}.v_proj.bias",
        "blocks.{i}.attn.o.weight": "model.transformer.blocks.{i}.attn_out.weight",
        "blocks.{i}.ffn_norm.weight": "model.transformer.blocks.{i}.ff_norm.weight",
        "blocks.{i}.ffn.gate.weight": "model.transformer.blocks.{i}.ff_proj.weight",
        "blocks.{i}.ffn.up.weight": "model.transformer.blocks.{i}.up_proj.weight",
        "blocks.{i}.ffn.down.weight": "model.transformer.blocks.{i}.ff_out.weight",
        "norm.weight": "model.transformer.ln_f.weight",
        "head.weight": "model.transformer.ff_out.weight",  # not a feed-forward: the head
    },
)  # fmt: skip

HF_KEYS = {
    "embedding_size": "vocab_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
    "n_kv_head": "num_key_value_heads", "d_model": "hidden_size", "max_len": "max_position_embeddings",
    "rope_theta": "rope_theta", "norm_eps": "rms_norm_eps", "tie_head": "tie_word_embeddings",
    "eos_id": "eos_token_id", "pad_id": "pad_token_id",
}  # fmt: skip
HF_TENSORS = {
    "embed.weight": "model.embed_tokens.weight",
    "blocks.{i}.attn_norm.weight": "model.layers.{i}.input_layernorm.weight",
    "blocks.{i}.attn.q.weight": "model.layers.{i}.self_attn.q_proj.weight",
    "blocks.{i}.attn.k.weight": "model.layers.{i}.self_attn.k_proj.weight",
    "blocks.{i}.attn.v.weight": "model.layers.{i}.self_attn.v_proj.weight",
    "blocks.{i}.attn.q.bias": "model.layers.{i}.self_attn.q_proj.bias",
    "blocks.{i}.attn.k.bias": "model.layers.{i}.self_attn.k_proj.bias",
    "blocks.{i}.attn.v.bias": "model.layers.{i}.self_attn.v_proj.bias",
    "blocks.{i}.attn.q_norm.weight": "model.layers.{i}.self_attn.q_norm.weight",
    "blocks.{i}.attn.k_norm.weight": "model.layers.{i}.self_attn.k_norm.weight",
    "blocks.{i}.attn.o.weight": "model.layers.{i}.self_attn.o_proj.weight",
    "blocks.{i}.ffn_norm.weight": "model.layers.{i}.post_attention_layernorm.weight",
    "blocks.{i}.ffn.gate.weight": "model.layers.{i}.mlp.gate_proj.weight",
    "blocks.{i}.ffn.up.weight": "model.layers.{i}.mlp.up_proj.weight",
    "blocks.{i}.ffn.down.weight": "model.layers.{i}.mlp.down_proj.weight",
    "blocks.{i}.ffn.router.weight": "model.layers.{i}.mlp.gate.weight",
    "blocks.{i}.ffn.gate": "model.layers.{i}.mlp.experts.{e}.gate_proj.weight",
    "blocks.{i}.ffn.up": "model.layers.{i}.mlp.experts.{e}.up_proj.weight",
    "blocks.{i}.ffn.down": "model.layers.{i}.mlp.experts.{e}.down_proj.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}

LLAMA = Scheme(  # LLaDA-V's language tower
    marks=("hidden_size", "intermediate_size", "num_hidden_layers"),
    keys=HF_KEYS | {"d_ff": "intermediate_size", "qkv_bias": "attention_bias"},
    spare={"mask_id": "mask_token_id", "d_head": "head_dim"},
    absent={"num_key_value_heads": None, "attention_bias": False, "tie_word_embeddings": False},
    fixed={"hidden_act": "silu", "mlp_bias": False, "rope_scaling": None},
    ignored={"attention_dropout": 0.0, "initializer_range": 0.02, "pretraining_tp": 1, "use_cache": False},
    tensors=HF_TENSORS,
)


def derive_moe(values: dict, found: dict) -> dict:
    layers, wanted = values["moe_layer_freq"], found["n_layer"]
    holds = isinstance(layers, list) and len(layers) == wanted and all(type(x) is int and x in (0, 1) for x in layers)
    expect(holds, "moe_layer_freq", f"{wanted} times 0 or 1", layers)
    dense = [i for i, moe in enumerate(layers) if not moe] if found["n_expert"] else []
    return {"dense_layers": dense, "rotary_dim": partial_rotary(values, found)}


def partial_rotary(values: dict, found: dict) -> int:
    """How many dims of a head turn. Found may still lack a head width, which then is C / H."""
    factor, d_head = values["partial_rotary_factor"], found.get("d_head") or found["d_model"] // max(found["n_head"], 1)
    holds = type(factor) in (int, float) and 0 < factor <= 1
    expect(holds, "partial_rotary_factor", "a number above 0 and at most 1", factor)
    return round(d_head * factor)


LLADA_MOE = Scheme(  # LLaDA-MoE-7B-A1B
    marks=("hidden_size", "num_experts", "expert_intermediate_size"),
    keys=HF_KEYS | {
        "d_ff": "dense_intermediate_size", "qkv_bias": "attention_bias", "qk_norm": "qk_layernorm",
        "n_expert": "num_experts", "n_expert_active": "num_experts_per_tok", "d_expert": "expert_intermediate_size",
    },
    spare={"mask_id": "mask_token_id", "d_head": "head_dim"},
    absent={"attention_bias": False, "tie_word_embeddings": False, "partial_rotary_factor": 1},
    fixed={
        "clip_qkv": None, "hidden_act": "silu", "moe_router_enable_expert_bias": False,
        "moe_router_score_function": "softmax", "norm_topk_prob": None, "rope_scaling": None,
        "routed_scaling_factor": 1, "router_num_group": None, "router_topk_group": None,
        "shared_expert_intermediate_size": None,
    },
    ignored={
        "architectures": ["LLaDAMoEModelLM"], "attention_dropout": 0.0, "initializer_range": 0.02,
        "model_type": "llada", "output_router_logits": False, "router_aux_loss_coef": 0.01, "use_cache": False,
    },
    tensors=HF_TENSORS,
    derived=("moe_layer_freq", "partial_rotary_factor"),
    derive=derive_moe,
    express=lambda c: {
        "moe_layer_freq": [int(c.n_expert > 0 and i not in c.dense_layers) for i in range(c.n_layer)],
        "partial_rotary_factor": c.rotary_dim / c.d_head,
    },
)  # fmt: skip


def derive_llada2(values: dict, found: dict) -> dict:
    dense, shared = values["first_k_dense_replace"], values["num_shared_experts"]
    check_whole("first_k_dense_replace", dense, 0, found["n_layer"])
    check_whole("num_shared_experts", shared, 0, 64)
    rotary_dim = partial_rotary(values, found)
    expect(values["rotary_dim"] in (None, rotary_dim), "rotary_dim", f"the {rotary_dim} of partial_rotary_factor",
           values["rotary_dim"])  # fmt: skip
    experts = {"router": "sigmoid", "dense_layers": list(range(dense)), "d_shared_expert": shared * found["d_expert"]}
    return {**experts, "rotary_dim": rotary_dim}


LLADA2 = Scheme(  # LLaDA2.x: fused query, key and value; a router with a bias; an expert that every token visits
    marks=("hidden_size", "num_experts", "moe_intermediate_size"),
    keys=HF_KEYS | {
        "d_ff": "intermediate_size", "d_head": "head_dim", "qkv_bias": "use_qkv_bias", "qk_norm": "use_qk_norm",
        "n_expert": "num_experts", "n_expert_active": "num_experts_per_tok", "d_expert": "moe_intermediate_size",
        "router_renormalise": "norm_topk_prob", "router_scale": "routed_scaling_factor", "n_expert_group": "n_group",
        "n_expert_group_active": "topk_group",
    },
    spare={"mask_id": "mask_token_id"},
    absent={
        "head_dim": None, "use_qk_norm": True, "use_qkv_bias": False, "tie_word_embeddings": False, "rotary_dim": None,
    },
    fixed={
        "hidden_act": "silu", "norm_head": False, "rope_scaling": None, "router_dtype": "fp32",
        "score_function": "sigmoid", "use_bias": False,
    },
    rare={
        "moe_router_enable_expert_bias": True, "norm_softmax": False, "use_rmsnorm": True, "use_sliding_window": False,
        "using_split_qkv_in_self_attention": False,
    },
    ignored={
        "architectures": ["LLaDA2MoeModelLM"], "attention_dropout": 0.0, "embedding_dropout": 0.0,
        "initializer_range": 0.02, "model_type": "llada2_moe", "output_dropout": 0.0, "use_cache": False,
    },
    tensors=HF_TENSORS | {
        "embed.weight": "model.word_embeddings.weight",
        "blocks.{i}.attn.q.weight": "model.layers.{i}.attention.query_key_value.weight",  # rows of q, of k, of v
        "blocks.{i}.attn.k.weight": "model.layers.{i}.attention.query_key_value.weight",
        "blocks.{i}.attn.v.weight": "model.layers.{i}.attention.query_key_value.weight",
        "blocks.{i}.attn.q.bias": "model.layers.{i}.attention.query_key_value.bias",
        "blocks.{i}.attn.k.bias": "model.layers.{i}.attention.query_key_value.bias",
        "blocks.{i}.attn.v.bias": "model.layers.{i}.attention.query_key_value.bias",
        "blocks.{i}.attn.q_norm.weight": "model.layers.{i}.attention.query_layernorm.weight",
        "blocks.{i}.attn.k_norm.weight": "model.layers.{i}.attention.key_layernorm.weight",
        "blocks.{i}.attn.o.weight": "model.layers.{i}.attention.dense.weight",
        "blocks.{i}.ffn.router_bias": "model.layers.{i}.mlp.gate.expert_bias",
        "blocks.{i}.ffn.shared.gate.weight": "model.layers.{i}.mlp.shared_experts.gate_proj.weight",
        "blocks.{i}.ffn.shared.up.weight": "model.layers.{i}.mlp.shared_experts.up_proj.weight",
        "blocks.{i}.ffn.shared.down.weight": "model.layers.{i}.mlp.shared_experts.down_proj.weight",
    },
    derived=("first_k_dense_replace", "num_shared_experts", "partial_rotary_factor", "rotary_dim"),
    derive=derive_llada2,
    express=lambda c: {
        "first_k_dense_replace": len(c.dense_layers),
        "num_shared_experts": c.d_shared_expert // max(c.d_expert, 1),
        "partial_rotary_factor": c.rotary_dim / c.d_head,
        "rotary_dim": c.rotary_dim,
    },
)  # fmt: skip

SCHEMES = {"LLaDA": LLADA, "LLaDA-MoE": LLADA_MOE, "LLaDA2": LLADA2, "Llama": LLAMA}  # in the order they are tried
# Keys of any Hugging Face config that say nothing about the model. auto_map names code: it is never looked at.
COMMON = {
    "_name_or_path", "architectures", "auto_map", "bos_token_id", "dtype", "max_window_layers", "model_type",
    "output_router_logits", "tokenizer_class", "torch_dtype", "transformers_version", "use_cache",
}  # fmt: skip
# The ids of published models whose config.json does not give them, by rows of the embedding.
KNOWN_IDS = {
    126464: {"mask_id": 126336, "eos_id": 126081, "pad_id": 126081},  # LLaDA-8B, LLaDA-1.5, LLaDA-V
    157184: {"mask_id": 156895, "eos_id": 156892, "pad_id": 156892},  # LLaDA-MoE, LLaDA2
    155136: {"mask_id": 5},  # iLLaDA
}
SIDE = "minillada.json"  # in our own saves: fields of ModelConfig for which config.json has no key


def expect(holds: bool, what: str, expected: object, got: object, fix: str = "mend config.json") -> None:
    if not holds:
        raise BadInput(f"{what}: expected {expected}, got {reprlib.repr(got)}; {fix}")


def listed(items: list, most: int = 6) -> str:
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(str(item)[:200] for item in items[:most]) + more


def same(value: Any, wanted: Any) -> bool:
    """Equal, where null and false both mean off, and true is not 1."""
    if wanted is None or wanted is False:
        return value is None or value is False
    return value == wanted and (value is True) == (wanted is True)


def recognise(raw: dict) -> str:
    for name, scheme in SCHEMES.items():
        if all(mark in raw for mark in scheme.marks):
            return name
    known = "; ".join(f"{name}: {', '.join(scheme.marks)}" for name, scheme in SCHEMES.items())
    raise BadInput(f"config.json: expected the keys of one scheme ({known}), got none of them; use a LLaDA checkpoint")


def read_fields(raw: dict, scheme: Scheme, side: dict) -> dict[str, Any]:
    """The fields of ModelConfig in a config.json, each of the right type; ids may still be missing.

    An unknown key is refused unless it is null, since nobody can tell that it would not change the model.
    """
    keys = [*scheme.keys.values(), *scheme.derived]
    known = {*COMMON, *keys, *scheme.spare.values(), *scheme.fixed, *scheme.rare, *scheme.ignored}
    unknown = [repr(key) for key, value in raw.items() if key not in known and value is not None]
    if unknown:
        fix = "remove one only if it cannot change the model"
        raise BadInput(f"config.json: expected only keys that are implemented here, got {listed(unknown)}; {fix}")
    values = {"eos_token_id": None, "pad_token_id": None, **scheme.absent, **scheme.rare, **raw}
    for key, wanted in {**scheme.fixed, **scheme.rare}.items():
        expect(same(values.get(key), wanted), key, f"{wanted!r}, all that is implemented here", values.get(key))
    if absent := [key for key in keys if key not in values]:
        raise BadInput(f"config.json: expected the keys of its scheme, got no {listed(absent)}; mend config.json")
    found = {name: values[key] for name, key in scheme.keys.items()}
    found |= {name: values[key] for name, key in scheme.spare.items() if key in values}
    check_types(found, "config.json")
    found |= scheme.derive(values, found)
    check_types(side, SIDE)
    found |= side
    return {"vocab_size": found["embedding_size"]} | found


def check_types(found: dict[str, Any], source: str) -> None:
    """Every field of the type that ModelConfig declares; a bool is no int."""
    kinds = {f.name: f.type for f in fields(ModelConfig)}
    for name, value in found.items():
        expect(name in kinds, source, "fields of the model", name)
        kind = kinds[name]
        if kind is float:
            holds = type(value) in (int, float) and abs(value) < 1e300
        elif kind in (int, bool, str):
            holds = type(value) is kind or (name == "mask_id" and value is None)  # it may be told elsewhere
        elif name == "dense_layers":
            holds = isinstance(value, list) and all(type(i) is int for i in value)
        else:
            holds = value is None or type(value) is int
        kind = getattr(kind, "__name__", str(kind))
        expect(holds, f"{name} in {source}", kind, value, f"mend {source}")


def read_config(directory: Path, tokenizer: Tokenizer | None, mask_id: int | None) -> tuple[str, ModelConfig]:
    """The scheme's name and the config. An id that config.json does not tell comes from mask_id, the tokenizer, or
    what is known of the published model with as many embedding rows."""
    raw = read_json(confined(directory, "config.json"), CONFIG_CAP)
    side = read_json(confined(directory, SIDE), CONFIG_CAP) if os.path.lexists(directory / SIDE) else {}
    scheme = recognise(raw)
    found = read_fields(raw, SCHEMES[scheme], side)
    known = KNOWN_IDS.get(found.get("embedding_size") or found["vocab_size"], {})
    for name, key in {"mask_id": "mask_token_id", "eos_id": "eos_token_id", "pad_id": "pad_token_id"}.items():
        if found.get(name) is None and (key not in raw or name == "mask_id"):
            told = getattr(tokenizer, name, None)
            found[name] = known.get(name) if told is None else told
    found["mask_id"] = found["mask_id"] if mask_id is None else mask_id
    if found["mask_id"] is None:
        raise BadInput("mask_id: expected one in config.json or a tokenizer with a mask, got neither; give mask_id")
    divides = found.get("d_head") is not None or found["d_model"] % max(found["n_head"], 1) == 0
    expect(divides, "n_head", f"a divisor of the width {found['d_model']}", found["n_head"])
    check_whole("d_shared_expert", found.get("d_shared_expert", 0), 0, 2**20)
    config = ModelConfig(**found)
    # Each layer of any scheme has five tensors besides the experts, so this bounds the list of names to come.
    expect(config.n_layer * max(config.n_expert, 1) <= 2**15, "experts", "at most 32768 in all layers", config.n_expert)
    return scheme, config


def write_config(config: ModelConfig) -> tuple[str, dict, dict]:
    """The scheme that suits best, its config.json, and the fields that it cannot tell (for minillada.json)."""
    c = config
    sigmoid = c.router == "sigmoid" or c.router_renormalise or c.router_scale != 1 or c.n_expert_group > 1
    if c.n_expert and (sigmoid or c.d_shared_expert):
        name = "LLaDA2"
    else:
        name = "LLaDA-MoE" if c.n_expert or c.qk_norm or c.rotary_dim != c.d_head else "LLaDA"
    scheme = SCHEMES[name]
    raw = {key: getattr(c, field_) for field_, key in scheme.keys.items()}
    raw |= scheme.fixed | scheme.ignored | scheme.express(c)
    side = c.to_dict()
    found = read_fields(raw, scheme, {})
    for field_ in list(side):  # leave out what config.json tells, or what follows from it
        rest = {key: value for key, value in side.items() if key != field_}
        with suppress(BadInput, TypeError):  # TypeError: mask_id has no default
            side = rest if ModelConfig(**(found | rest)) == c else side
    return name, raw, side


# ---- Loading and saving ----

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CHUNK = 1 << 24  # bytes read at a time
READERS = 4  # threads, since handing out fresh memory takes as long as the disk


class Entry(NamedTuple):
    """A tensor in a file, from byte `offset` on."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class Report:
    """What a checkpoint is, as far as its headers tell; `non_finite` names tensors, after a deep check."""

    directory: Path
    scheme: str
    config: ModelConfig
    entries: dict[str, Entry] = field(repr=False)  # every tensor of the files
    plan: dict[str, list[tuple[str, int | None]]] = field(repr=False)  # tensor -> what it fills: (parameter, expert)
    meta: LLaDA = field(repr=False)  # the module, without memory
    hashes: dict[str, dict] = field(repr=False)  # the manifest, if the checkpoint is ours
    non_finite: tuple[str, ...] = ()

    @property
    def n_bytes(self) -> int:
        return sum(math.prod(e.shape) * e.dtype.itemsize for e in self.entries.values())

    @property
    def files(self) -> list[str]:
        return list(dict.fromkeys(e.file for e in self.entries.values()))

    @property
    def dtypes(self) -> list[str]:
        return sorted({str(e.dtype).removeprefix("torch.") for e in self.entries.values()})


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
    device = usable(device)
    directory = locate(path_or_hub_id, revision, progress)
    tokenizer = load_tokenizer(directory)
    report = inspect(directory, tokenizer, mask_id)
    kinds = target_dtypes(report, dtype)
    shapes = {name: p.shape for name, p in weights(report.meta).items()}
    check_memory(sum(math.prod(shape) * kinds[name].itemsize for name, shape in shapes.items()), device)
    state = {name: allocate(shape, kinds[name], device) for name, shape in shapes.items()}
    with tqdm(total=report.n_bytes, unit="B", unit_scale=True, desc="loading", disable=not progress) as bar:
        for _, slot, read in chain.from_iterable(read_shard(report, file, state) for file in report.files):
            if slot is not read:
                slot.copy_(read)
            bar.update(read.nbytes)
    model = report.meta.eval()
    model.load_state_dict(state, assign=True, strict=False)  # not strict: a tied head is no tensor of its own
    if report.config.tie_head:
        model.head.weight = model.embed.weight
    return model, tokenizer


def check(
    path_or_hub_id: str | Path, deep: bool = False, revision: str | None = None, mask_id: int | None = None
) -> Report:
    """What a checkpoint is, found without reading its weights; deep: read them once, for NaN and infinity.

    Raises whatever `load` would raise, except for want of memory.
    """
    directory = locate(path_or_hub_id, revision)
    report = inspect(directory, load_tokenizer(directory), mask_id)
    bad: dict[str, None] = {}
    for file in report.files if deep else []:
        for name, _, read in read_shard(report, file, weights(report.meta)):
            if not read.isfinite().all():
                bad[name] = None
    return replace(report, non_finite=tuple(bad))


def locate(path_or_hub_id: str | Path, revision: str | None = None, progress: bool = False) -> Path:
    """The directory of a checkpoint. What exists here is never looked for on the hub."""
    path = Path(path_or_hub_id)
    if not str(path_or_hub_id) or not os.path.lexists(path):
        return hub.fetch(str(path_or_hub_id), revision, progress)
    if revision is not None:
        raise BadInput(f"revision: expected none, since {path} is a directory here, got {revision!r}; leave it out")
    if not path.is_dir():
        raise BadInput(f"{path}: expected a directory with config.json, got something else; give its directory")
    return newest(path) if (path / "run.json").exists() else path


def newest(run: Path) -> Path:
    """The newest checkpoint of a run whose manifest matches; a warning names each damaged one."""
    found = sorted((run / "checkpoints").glob("step-*"), reverse=True)
    for path in found:
        try:
            verify_manifest(path)
            return path
        except (BadInput, BadLuck) as damage:  # noqa: PERF203
            warnings.warn(f"{path} is left out: {damage}", stacklevel=4)
    raise BadInput(f"{run}: expected a run with a whole checkpoint, got {len(found)} damaged; train it again")


def load_tokenizer(directory: Path) -> Tokenizer | None:
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        if os.path.lexists(directory / name):
            confined(directory, name)
    return Tokenizer.load(directory) if os.path.lexists(directory / "tokenizer.json") else None


def inspect(directory: Path, tokenizer: Tokenizer | None, mask_id: int | None) -> Report:
    """Everything that can be found out without reading a weight or taking memory for one. Raises BadInput, BadLuck."""
    ours = os.path.lexists(directory / MANIFEST)
    hashes = verify_manifest(directory, skip_suffix=".safetensors") if ours else {}
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
    plan = plan_tensors(meta, SCHEMES[scheme])
    if wrong := mismatches(plan, weights(meta), entries):
        raise BadInput(f"tensors: expected those of config.json, got {listed(wrong)}; use files that belong together")
    return Report(directory, scheme, config, entries, plan, meta, hashes)


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Everything a checkpoint holds, by its name in the module; a tied head is no tensor of its own."""
    return {name: t.detach() for name, t in chain(model.named_parameters(), model.named_buffers())}


def plan_tensors(model: nn.Module, scheme: Scheme) -> dict[str, list[tuple[str, int | None]]]:
    """Each tensor of the file -> the parameters it fills, row after row: name, and which expert's part of it."""
    plan: dict[str, list[tuple[str, int | None]]] = {}
    for ours, tensor in weights(model).items():
        layer = re.match(r"blocks\.(\d+)\.", ours)
        template = scheme.tensors.get(re.sub(r"^blocks\.\d+\.", "blocks.{i}.", ours))
        expect(template is not None, ours, "a name for it in the scheme", "none", "make the model a plain LLaDA")
        for e in range(len(tensor)) if "{e}" in template else [None]:
            plan.setdefault(template.format(i=layer and layer[1], e=e), []).append((ours, e))
    return plan


def file_shape(pieces: list[tuple[str, int | None]], state: dict[str, Tensor]) -> tuple[int, ...]:
    shapes = [state[ours].shape if e is None else state[ours].shape[1:] for ours, e in pieces]
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def mismatches(plan: dict, state: dict[str, Tensor], entries: dict[str, Entry]) -> list[str]:
    """Each tensor that is missing, not expected, or of another shape or dtype: name, expected, found."""
    wanted = {name: list(file_shape(pieces, state)) for name, pieces in plan.items()}
    main = entries.get(next(iter(plan)))  # the embedding: all have its dtype, but for routers, which are often wider
    wrong = [f"{name!r} (expected {shape}, found none)" for name, shape in wanted.items() if name not in entries]
    for name, entry in entries.items():
        if name not in wanted:
            wrong.append(f"{name!r} (expected none, found {list(entry.shape)})")
        elif list(entry.shape) != wanted[name]:
            wrong.append(f"{name!r} (expected {wanted[name]}, found {list(entry.shape)})")
        elif main and entry.dtype != main.dtype and ".router" not in plan[name][0][0]:
            wrong.append(f"{name!r} (expected {main.dtype}, found {entry.dtype})")
    return wrong


def target_dtypes(report: Report, dtype: torch.dtype | None) -> dict[str, torch.dtype]:
    """One dtype for all; a router may be wider, since rounding it would send tokens to other experts."""
    expect(dtype is None or dtype in DTYPES.values(), "dtype", "a torch floating dtype", dtype, "use torch.bfloat16")
    found = {ours: report.entries[name].dtype for name, pieces in report.plan.items() for ours, _ in pieces}
    main = dtype or found["embed.weight"]
    return {ours: torch.promote_types(kind, main) if ".router" in ours else main for ours, kind in found.items()}


def usable(device: str | torch.device) -> torch.device:
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        got = str(e).splitlines()[0]
        raise BadInput(f"device: expected one of this machine, got {str(device)!r} ({got}); use cpu") from None


def allocate(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised memory. NumPy asks Linux for huge pages: first touching small ones costs more than the reading."""
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64  # aligned as torch would
    return torch.from_numpy(raw[start : start + size]).view(dtype).view(shape)


def check_memory(need: int, device: torch.device) -> None:
    free = free_memory(device)
    if free is not None and need > free:
        what = f"memory on {device}: expected {need / 1e9:.2f} GB free for the weights, got {free / 1e9:.2f} GB"
        raise BadLuck(f"{what}; use a smaller dtype or another device")


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be had, as far as this system tells; a tighter limit on the process counts."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    limits = []
    with suppress(OSError, AttributeError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        limits.append(1024 * int(next(line.split()[1] for line in lines if line.startswith("MemAvailable"))))
    with suppress(OSError, ImportError):
        import resource

        soft, _ = resource.getrlimit(resource.RLIMIT_AS)
        if soft != resource.RLIM_INFINITY:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limits.append(soft - pages * resource.getpagesize())
    return min(limits, default=None)


def read_shard(report: Report, file: str, state: dict[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Read a file front to back into the parameters of state, a few chunks ahead of the consumer.

    Yields (tensor, slot, read), flat: `read` is the slot itself where the bytes can go straight into it, else a small
    buffer on the host. Raises BadInput at the end if the file is ours and its SHA-256 is not the recorded one.
    """
    path, digest = confined(report.directory, file), hashlib.sha256()
    recorded = report.hashes.get(file)
    entries = sorted((e.offset, name) for name, e in report.entries.items() if e.file == file)
    with open(path, "rb") as f:
        digest.update(f.read(entries[0][0]))  # the header
    queue: deque = deque()
    with ThreadPoolExecutor(READERS) as pool:
        for job in chain(slots(report, entries, state), [None] * READERS):
            if job:
                name, at, slot = job
                dtype = report.entries[name].dtype
                straight = slot.device.type == "cpu" and slot.dtype == dtype
                read = slot if straight else torch.empty(len(slot), dtype=dtype, pin_memory=slot.is_cuda)
                job = (name, slot, read, pool.submit(read_at, path, at, read))
            queue.append(job)
            if len(queue) > READERS:
                name, slot, read, done = queue.popleft()
                done.result()
                if recorded:
                    digest.update(as_bytes(read))
                yield name, slot, read
    if recorded and digest.hexdigest() != recorded["sha256"]:
        damaged(file, recorded, {**recorded, "sha256": digest.hexdigest()})


def slots(
    report: Report, entries: list[tuple[int, str]], state: dict[str, Tensor]
) -> Iterator[tuple[str, int, Tensor]]:
    """(tensor, offset into the file, flat part of a parameter), at most a chunk each, in the order of the file."""
    for at, name in entries:
        itemsize = report.entries[name].dtype.itemsize
        for ours, e in report.plan[name]:
            slot = state[ours] if e is None else state[ours][e]
            for part in slot.flatten().split(CHUNK // itemsize):
                yield name, at, part
                at += len(part) * itemsize


def as_bytes(flat: Tensor) -> memoryview:
    return memoryview(flat.view(torch.uint8).numpy())


def read_at(path: Path, offset: int, into: Tensor) -> None:
    """Fill a flat tensor with the bytes of a file from offset on."""
    view = as_bytes(into)
    try:
        with open(path, "rb", buffering=0) as f:
            f.seek(offset)
            while view:
                n = f.readinto(view)
                expect(n > 0, path.name, "the size it had", "less", "do not write while it loads")
                view = view[n:]
    except OSError as e:
        raise BadLuck(f"{path.name}: expected to read it, got {e.strerror}; check the disk") from None


def save(model: LLaDA, directory: str | Path, tokenizer: Tokenizer | None = None, shard_bytes: int = 5 * 10**9) -> None:
    """Write a Hugging Face directory that the official code reads: LLaDA's names, LLaDA-MoE's for experts or QK-norm,
    LLaDA2's for its router or a shared expert. What their config.json has no key for goes into minillada.json.

    A directory that already holds a model is refused; one that cannot be finished is left as it was. Every file is
    there whole or not at all; the last, manifest.json, has the SHA-256 of the others. Raises BadInput, BadLuck.
    """
    directory = Path(directory)
    check_whole("shard_bytes", shard_bytes, 1)
    scheme, raw, side = write_config(model.config)
    plan, state = plan_tensors(model, SCHEMES[scheme]), weights(model)
    shards = group(plan, state, shard_bytes)
    total = sum(t.nbytes for t in state.values())
    documents = {"config.json": raw} | ({SIDE: side} if side else {})
    if len(shards) > 1:
        index = {name: file for file, names in shards.items() for name in names}
        documents[INDEX] = {"metadata": {"total_size": total}, "weight_map": index}
    before = make_home(directory, total)
    try:
        entries = {file: write_file(directory / file, shard(names, plan, state)) for file, names in shards.items()}
        for name, document in documents.items():
            text = json.dumps(document, indent=2, sort_keys=True, allow_nan=False)
            entries[name] = write_file(directory / name, [text.encode()])
        if tokenizer is not None:
            tokenizer.save(directory)
        write_manifest(directory, entries)
    except BaseException:
        for path in set(directory.iterdir()) - before:
            path.unlink(missing_ok=True)
        raise


def make_home(directory: Path, size: int) -> set[Path]:
    """Make the directory and see that it holds no model and has room; return what it does hold."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        before, free = set(directory.iterdir()), shutil.disk_usage(directory).free
    except OSError as e:
        raise BadLuck(f"{directory}: expected to make it, got {e.strerror or e}; choose another directory") from None
    if held := sorted(path.name for path in before if path.name == "config.json" or path.suffix == ".safetensors"):
        raise BadInput(f"{directory}: expected no model there yet, got {listed(held)}; choose another directory")
    if free < size:
        got = f"{free / 1e9:.2f} GB"
        raise BadLuck(f"{directory}: expected {size / 1e9:.2f} GB of free disk, got {got}; make room")
    return before


def group(plan: dict, state: dict[str, Tensor], shard_bytes: int) -> dict[str, list[str]]:
    """File names -> the tensors in each, in the module's order, a new file where shard_bytes would be exceeded."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, pieces in plan.items():
        size = math.prod(file_shape(pieces, state)) * state[pieces[0][0]].dtype.itemsize
        if filled and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": names for i, names in enumerate(shards, 1)}


def shard(names: list[str], plan: dict, state: dict[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file: length of the header, header, tensors one after the other without a gap."""
    codes = {dtype: code for code, dtype in DTYPES.items()}
    names = sorted(names, key=lambda name: -state[plan[name][0][0]].dtype.itemsize)  # so that each is aligned
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        dtype, shape = state[plan[name][0][0]].dtype, file_shape(plan[name], state)
        expect(dtype in codes, name, "a floating dtype", dtype, "save the model before quantising it")
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": codes[dtype], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in names:
        for ours, e in plan[name]:
            yield as_bytes((state[ours] if e is None else state[ours][e]).contiguous().cpu().flatten())


def read_headers(directory: Path) -> dict[str, Entry]:
    """Every tensor of a checkpoint, from the headers of its files alone."""
    if not os.path.lexists(directory / INDEX):
        if not os.path.lexists(directory / SINGLE):
            pickles = sorted(p.name for p in directory.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
            got = f"{listed(pickles)}: pickle is not supported" if pickles else "none"
            raise BadInput(f"weights: expected {SINGLE} or {INDEX}, got {got}; convert or fetch them")
        return read_header(directory, SINGLE)
    where = read_json(confined(directory, INDEX), INDEX_CAP).get("weight_map")
    expect(isinstance(where, dict) and len(where) > 0, f"weight_map in {INDEX}", "an object", where, "fetch it again")
    for file in where.values():
        holds = isinstance(file, str) and file.endswith(".safetensors")
        expect(holds, f"weight_map in {INDEX}", "names that end in .safetensors", file, "fetch it again")
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
    path = confined(directory, file)
    size, fix = path.stat().st_size, "fetch the file again"
    with open(path, "rb") as f:
        length = int.from_bytes(f.read(8), "little")
        cap = min(HEADER_CAP, size - 8)
        expect(0 < length <= cap, file, f"a header of 1 to {cap:,} bytes", length, fix)
        header = parse_json(f.read(length), f"header of {file}")
    metadata = header.pop("__metadata__", {})
    expect(isinstance(metadata, dict), file, "an object as __metadata__", metadata, fix)
    expect(len(header) > 0, file, "at least one tensor", "none", fix)
    entries, spans = {}, []
    for name, value in header.items():
        what = f"{name!r:.200} in {file}"
        expect(isinstance(value, dict) and value.keys() == {"dtype", "shape", "data_offsets"}, what,
               "dtype, shape and data_offsets", value, fix)  # fmt: skip
        code, shape, span = value["dtype"], value["shape"], value["data_offsets"]
        expect(isinstance(code, str) and code in DTYPES, what, f"a dtype of {', '.join(DTYPES)}", code, fix)
        expect(whole(shape, 1, 8), what, "a shape of 1 to 8 whole numbers", shape, fix)
        expect(whole(span, 2, 2), what, "two offsets", span, fix)
        nbytes = math.prod(shape) * DTYPES[code].itemsize
        expect(span[1] - span[0] == nbytes, what, f"{nbytes} bytes", span, fix)
        entries[name] = Entry(file, DTYPES[code], tuple(shape), 8 + length + span[0])
        spans.append((span[0], span[1], name))
    end = 0
    for begin, stop, name in sorted(spans):
        expect(begin == end, f"{name!r:.200} in {file}", f"to start at byte {end}", begin, fix)
        end = stop
    expect(8 + length + end == size, file, f"{8 + length + end} bytes", size, fix)
    return entries


def whole(values: Any, least: int, most: int) -> bool:
    """A list of least to most whole numbers, none beyond what a disk could hold."""
    listed_right = isinstance(values, list) and least <= len(values) <= most
    return listed_right and all(type(value) is int and 0 <= value < 2**48 for value in values)


# ---- Files: nothing outside the directory is opened, nothing is half-written, nothing unbounded is parsed ----

MANIFEST = "manifest.json"
CONFIG_CAP, HEADER_CAP, INDEX_CAP = 1 << 20, 10 << 20, 20 << 20  # bytes


def confined(directory: Path, name: str) -> Path:
    """The regular file `name` of a directory, which may be a link into the hub cache's own blobs and nowhere else."""
    where = f"{directory.name or directory}/{name!r:.200}"
    if not isinstance(name, str) or name in ("", "..") or PureWindowsPath(name).name != name:
        raise BadInput(f"{where}: expected the plain name of a file in this directory; mend the file that names it")
    root = Path(os.path.realpath(directory))
    try:
        real = Path(os.path.realpath(directory / name, strict=True))
        mode = real.stat().st_mode
    except FileNotFoundError:
        raise BadLuck(f"{where}: expected a file, found nothing; fetch the checkpoint again") from None
    except (OSError, ValueError) as e:
        raise BadLuck(f"{where}: expected a readable file, got {e}; fetch the checkpoint again") from None
    homes = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    if real.parent not in homes:
        raise BadInput(f"{where}: expected a file of this directory, got a link that leaves it; copy the file here")
    if not os.access(real, os.R_OK):
        raise BadLuck(f"{where}: expected a readable file, got one without permission; change its mode")
    if not stat.S_ISREG(mode):
        raise BadInput(f"{where}: expected a regular file, got {stat.filemode(mode)}; put the file there")
    return real


def read_json(path: Path, cap: int) -> dict:
    """A JSON object of at most cap bytes, in UTF-8, without NaN and without repeated keys."""
    size = path.stat().st_size
    if size > cap:
        raise BadInput(f"{path.name}: expected at most {cap:,} bytes, got {size:,}; fetch it again")
    return parse_json(path.read_bytes(), path.name)


def parse_json(data: bytes, what: str) -> dict:
    def unique(pairs: list) -> dict:
        if len(found := dict(pairs)) < len(pairs):
            raise ValueError("a key that occurs twice")
        return found

    def refuse(word: str) -> None:
        raise ValueError(word)

    try:
        found = json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as e:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise BadInput(f"{what}: expected JSON in UTF-8, got {str(e)[:200]}; fetch it again") from None
    if not isinstance(found, dict):
        raise BadInput(f"{what}: expected a JSON object, got {type(found).__name__}; fetch it again")
    return found


def write_file(path: Path, chunks: Iterable[bytes | memoryview]) -> dict:
    """Write a file that is there completely or not at all; return its manifest entry, {"bytes": n, "sha256": hex}."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    digest, size = hashlib.sha256(), 0
    try:
        with open(temporary, "wb") as f:
            for chunk in chunks:
                f.write(chunk)
                digest.update(chunk)
                size += len(chunk)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as e:
        raise BadLuck(f"{path}: expected to write it, got {e.strerror or e}; free the disk or choose another") from None
    finally:
        temporary.unlink(missing_ok=True)
    return {"bytes": size, "sha256": digest.hexdigest()}


def hash_file(path: Path) -> dict:
    """The manifest entry of a file."""
    digest, size, buffer = hashlib.sha256(), 0, memoryview(bytearray(1 << 20))
    with open(path, "rb", buffering=0) as f:
        while n := f.readinto(buffer):
            digest.update(buffer[:n])
            size += n
    return {"bytes": size, "sha256": digest.hexdigest()}


def write_manifest(directory: str | Path, known: dict[str, dict] | None = None) -> None:
    """Record size and SHA-256 of every file in directory: {"files": {"name": {"bytes": n, "sha256": hex}}}.

    The last file that a save writes. known: entries that `write_file` gave, which need not be read again.
    """
    directory, files = Path(directory), dict(known or {})
    for path in sorted(directory.iterdir()):
        if path.is_file() and path.name != MANIFEST and not path.name.startswith("."):
            files.setdefault(path.name, hash_file(path))
    # No newline at the end: the file has not one byte that could be lost unnoticed.
    write_file(directory / MANIFEST, [json.dumps({"files": files}, indent=1, sort_keys=True).encode()])
    sync_directory(directory)


def sync_directory(directory: str | Path) -> None:
    """Flush the names in a directory to disk, where the system can."""
    if os.name == "posix":
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def verify_manifest(directory: str | Path, skip_suffix: str | None = None) -> dict[str, dict]:
    """Compare every file that manifest.json lists, by size and SHA-256; return the entries. BadInput, BadLuck.

    skip_suffix: of files that end so only the size is compared (the caller hashes them while it reads them).
    """
    directory = Path(directory)
    files = read_json(confined(directory, MANIFEST), CONFIG_CAP).get("files")
    if not isinstance(files, dict) or not all(
        isinstance(entry, dict) and set(entry) == {"bytes", "sha256"} for entry in files.values()
    ):
        raise BadInput(f"{MANIFEST}: expected files with bytes and sha256 each; use another checkpoint")
    for name, entry in files.items():
        path = confined(directory, name)
        found = {**entry, "bytes": path.stat().st_size}
        if found == entry and not (skip_suffix and name.endswith(skip_suffix)):
            found = hash_file(path)
        if found != entry:
            damaged(name, entry, found)
    return files


def damaged(name: str, entry: dict, found: dict) -> None:
    what = next(key for key in entry if entry[key] != found[key])
    raise BadInput(
        f"{name}: expected {what} {entry[what]!r:.80} as in {MANIFEST}, got {found[what]!r}; use another checkpoint"
    )
