"""A model as a GGUF file and back: its keys, the names of its tensors, the order of their rows, its tokenizer.

The file is a whole model. It has what llama.cpp asks for, and for us the config as JSON and the texts of the directory.
llama.cpp computes two architectures of the family: `llada` (dense) and `llada-moe`. What neither can express is refused
here, because llama.cpp would end the process, or compute something else.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..files import CONFIG_CAP, expect, one_line, parse_json
from ..model import ModelConfig
from ..text.chat import ChatTemplate
from ..text.tokenizer import Tokenizer
from . import gguf
from .gguf import KINDS, Header, Stored
from .schemes import IDS, Scheme, check_types, complete, known_keys, read_fields, tensors

CHUNK = 1 << 18  # numbers that are packed or unpacked at a time: what a processor's cache holds
FILE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 7, "bf16": 32}  # general.file_type
LARGEST = {"f16": 65504, "q8_0": 127 * 65504, "q4_0": 8 * 65504}  # what a kind can hold
TEXTS = {  # key -> the file of a model directory that it holds
    "tokenizer.huggingface.json": "tokenizer.json", "tokenizer.chat_template": "chat_template.jinja",
    "minillada.tokenizer_config": "tokenizer_config.json", "minillada.generation_config": "generation_config.json",
}  # fmt: skip
TOLD = {"mask_id": "mask_token_id", "eos_id": "eos_token_id", "pad_id": "padding_token_id"}  # under tokenizer.ggml.


def derive(values: dict, found: dict) -> dict:
    """Return what the keys tell indirectly: that with experts there is a norm of queries and keys."""
    told, width = values["attention.value_length"], found.get("d_head")
    expect(told in (None, width), "attention.value_length", f"key_length {width}", told, "use another model")
    return {"qk_norm": True} if "n_expert" in found else {}


OUTER = {"embed": "token_embd", "norm": "output_norm", "head": "output"}
INNER = {"attn_norm": "attn_norm", "attn.q": "attn_q", "attn.k": "attn_k", "attn.v": "attn_v", "attn.o": "attn_output",
         "ffn_norm": "ffn_norm", "ffn.gate": "ffn_gate", "ffn.up": "ffn_up", "ffn.down": "ffn_down"}  # fmt: skip
LLADA = Scheme(
    marks=(), ignored={},
    keys={"max_len": "context_length", "d_model": "embedding_length", "n_layer": "block_count",
          "d_ff": "feed_forward_length", "n_head": "attention.head_count", "n_kv_head": "attention.head_count_kv",
          "d_head": "attention.key_length", "norm_eps": "attention.layer_norm_rms_epsilon",
          "rope_theta": "rope.freq_base", "rotary_dim": "rope.dimension_count", "embedding_size": "vocab_size",
          "tie_head": "(no output)", "qkv_bias": "(a bias)", **IDS},
    absent={"attention.head_count_kv": None, "attention.key_length": None, "attention.value_length": None,
            "rope.dimension_count": None, "rope.freq_base": 10_000.0},
    fixed={"attention.causal": False, "diffusion.shift_logits": False}, rare={"rope.scaling.type": "none"},
    tensors=tensors(OUTER, "blk.{i}.", INNER), derive=derive, express={"attention.value_length": lambda c: c.d_head},
)  # fmt: skip
LLADA_MOE = Scheme(
    marks=(), ignored={}, absent=LLADA.absent, fixed=LLADA.fixed, derive=derive, express=LLADA.express,
    keys={**LLADA.keys, "n_expert": "expert_count", "n_expert_active": "expert_used_count",
          "d_expert": "expert_feed_forward_length"},
    rare={**LLADA.rare, "expert_gating_func": 1, "expert_shared_count": 0, "expert_weights_norm": False,
          "expert_weights_scale": 1.0},
    tensors=tensors(OUTER, "blk.{i}.", {**INNER, "attn.q_norm": "attn_q_norm", "attn.k_norm": "attn_k_norm",
                                        "ffn.router": "ffn_gate_inp"})
    | {f"layers.{{i}}.ffn.{matrix}": f"blk.{{i}}.ffn_{matrix}_exps.weight" for matrix in ("gate", "up", "down")},
)  # fmt: skip
GGUF = {"GGUF llada": LLADA, "GGUF llada-moe": LLADA_MOE}


def architecture(c: ModelConfig) -> str:
    """Return which architecture of llama.cpp computes what such a model does. Raises BadInput if none does."""
    only = {"rotary_dim": c.d_head}  # field -> the one value that can be expressed
    if c.n_expert:
        only |= {"dense_layers": (), "router": "softmax", "router_renormalise": False, "router_scale": 1,
                 "n_expert_group": 1, "d_shared_expert": 0, "qk_norm": True, "qkv_bias": False, "tie_head": False,
                 "d_head": c.d_model // c.n_head, "block": 0}  # fmt: skip
    else:
        only |= {"qk_norm": False}
    for name, value in only.items():
        expect(getattr(c, name) == value, f"GGUF, {name}", value, getattr(c, name), "keep this model as safetensors")
    for name, most in {"n_layer": 512, "n_expert": 512}.items():  # above, llama.cpp ends the process
        expect(getattr(c, name) <= most, f"GGUF, {name}", f"at most {most}", getattr(c, name), "use a smaller model")
    return "llada-moe" if c.n_expert else "llada"


# ---- A model -> a file -----------------------------------------------------------------------------------------------


def write(
    path: Path, model: nn.Module, kind: str, read: Callable[[str], Tensor] | None = None, home: Path | None = None
) -> None:
    """Write a model as a GGUF file, whole or not at all, with its matrices in `kind`, a name of KINDS.
    read: returns a parameter by its name, if the model has no memory of its own ("meta"). home: a directory that may
    hold tokenizer, chat template and generation config. Raises BadInput for what GGUF cannot express, BadLuck."""
    c, parameters = model.config, dict(model.named_parameters())
    scheme = GGUF[f"GGUF {architecture(c)}"]
    plan = {scheme.name_of(ours): ours for ours in parameters}
    kinds = {name: kind_of(ours, tuple(parameters[ours].shape), kind) for name, ours in plan.items()}

    def pieces(name: str) -> Iterator[np.ndarray]:
        x = (read or parameters.__getitem__)(plan[name]).detach()
        for part in x.flatten(0, -2).split(step_of(x.shape[-1], c)) if x.dim() > 1 else [x]:
            numbers = np.ascontiguousarray(turn(name, part.float().cpu().numpy(), c)).reshape(-1, x.shape[-1])
            most = LARGEST.get(kinds[name][0], 3e38)
            fits = np.abs(numbers).max() <= most  # false for NaN
            expect(fits, f"{plan[name]}", f"numbers up to {most:g}", "larger ones or NaN", "choose another --type")
            yield gguf.pack(kinds[name][0], numbers)

    gguf.write(path, keys_of(c, kind, home), kinds, pieces)


def kind_of(ours: str, shape: tuple[int, ...], kind: str) -> tuple[str, tuple[int, ...]]:
    """Return how a parameter is stored, and its shape. What is small stays exact: norms, biases, routers."""
    if len(shape) == 1 or ".router" in ours:
        return "f32", shape
    return ("f16" if shape[-1] % KINDS[kind].block else kind), shape


def step_of(n: int, c: ModelConfig) -> int:
    """Return how many rows of n numbers are converted at a time: whole heads, since a head's rows change places."""
    return max(1, CHUNK // n // c.d_head) * c.d_head


def turn(name: str, x: np.ndarray, c: ModelConfig, back: bool = False) -> np.ndarray:
    """Put the rows of queries and keys into the order of `llada`, which turns dim 2i with 2i+1 where we turn i with
    i + D/2: of a head with D = 4, rows [0,1,2,3] -> [0,2,1,3]. back: the other way."""
    if c.n_expert or not name.endswith(("attn_q.weight", "attn_k.weight", "attn_q.bias", "attn_k.bias")):
        return x
    pairs = (c.d_head // 2, 2) if back else (2, c.d_head // 2)
    return x.reshape(-1, *pairs, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


def keys_of(c: ModelConfig, kind: str, home: Path | None) -> dict[str, Any]:
    """Return the keys of a model's file, in their order."""
    name = architecture(c)
    scheme = GGUF[f"GGUF {name}"]
    values = {key: getattr(c, ours) for ours, key in scheme.keys.items() if key not in IDS.values() and key[0] != "("}
    values |= {key: value(c) for key, value in scheme.express.items()} | {"attention.causal": False}
    values |= {key: float(values[key]) for key in ("rope.freq_base", "attention.layer_norm_rms_epsilon")}
    values |= {"expert_weights_scale": 1.0} if c.n_expert else {}
    keys: dict[str, Any] = {"general.architecture": name, "general.file_type": FILE_TYPES[kind]}
    keys |= {"general.quantization_version": 2}
    for prefix in [name] if c.n_expert else [name, "llama"]:  # as `llama`, it keeps keys and values (llama_cpp.py)
        keys |= {f"{prefix}.{key}": value for key, value in values.items()}
    keys |= {"diffusion.shift_logits": False, "minillada.config": json.dumps(asdict(c))}
    keys |= {f"tokenizer.ggml.{key}": id for ours, key in TOLD.items() if (id := getattr(c, ours)) is not None}
    return keys | words(home, c.embedding_size)


def words(home: Path | None, size: int) -> dict[str, Any]:
    """Return the tokenizer for us, and also, if it is a byte-level BPE, for llama.cpp's own programs."""
    if home is None or not (home / "tokenizer.json").is_file():
        return {"tokenizer.ggml.model": "none"}
    tokenizer = Tokenizer.load(home)
    template = ChatTemplate.load(home, tokenizer)
    found = {key: (home / file).read_bytes().decode() for key, file in TEXTS.items() if (home / file).is_file()}
    found |= {"tokenizer.chat_template": template.source} if template.own else {}
    inner = json.loads(tokenizer.to_json())
    if inner["model"]["type"] != "BPE" or (inner["decoder"] or {}).get("type") != "ByteLevel":
        return found | {"tokenizer.ggml.model": "none"}
    tokens = [tokenizer.inner.id_to_token(id) for id in range(size)]
    special = {id: 3 if id in tokenizer.special_ids else 4 for id in tokenizer.inner.get_added_tokens_decoder()}
    types = [5 if token is None else special.get(id, 1) for id, token in enumerate(tokens)]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in inner["model"]["merges"]]
    simple = (inner["pre_tokenizer"] or {}).get("type") == "ByteLevel"
    bos = {} if tokenizer.bos_id is None else {"tokenizer.ggml.bos_token_id": tokenizer.bos_id}
    return found | bos | {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2" if simple else "bailingmoe",
        "tokenizer.ggml.tokens": [f"[PAD{id}]" if token is None else token for id, token in enumerate(tokens)],
        "tokenizer.ggml.token_type": types, "tokenizer.ggml.merges": merges, "tokenizer.ggml.add_bos_token": False,
    }  # fmt: skip


# ---- A file -> a model -----------------------------------------------------------------------------------------------


def read_config(
    path: Path, header: Header, tokenizer: Tokenizer | None, mask_id: int | None
) -> tuple[str, ModelConfig]:
    """Return the scheme's name and the config. Raises BadInput for keys that are missing, wrong, unknown, or that say
    otherwise than `minillada.config`."""
    keys, tensors = header
    name = keys.get("general.architecture")
    scheme = GGUF.get(f"GGUF {name}")
    fix = "use a model of the LLaDA family in one file"
    expect(scheme is not None, f"general.architecture in {path.name}", "llada or llada-moe", name, fix)
    expect(keys.get("split.count", 1) == 1, path.name, "one file", "a part of several", "join them (llama-gguf-split)")
    embed = tensors.get("token_embd.weight")
    expect(embed is not None and len(embed.shape) == 2, path.name, "token_embd.weight", "none", fix)
    raw = {key.removeprefix(f"{name}."): value for key, value in keys.items() if key.startswith(f"{name}.")}
    told = raw.setdefault("vocab_size", embed.shape[0])
    expect(told == embed.shape[0], f"{name}.vocab_size", f"the {embed.shape[0]} rows of token_embd.weight", told, fix)
    raw |= {"(no output)": "output.weight" not in tensors, "(a bias)": "blk.0.attn_q.bias" in tensors}
    raw["diffusion.shift_logits"] = keys.get("diffusion.shift_logits", False)
    ids = {IDS[ours]: keys.get(f"tokenizer.ggml.{key}") for ours, key in TOLD.items()}
    raw |= {key: id for key, id in ids.items() if id is not None}
    found = read_fields(known_keys(raw, scheme, path.name), scheme, {}, path.name)
    side = parse_side(keys.get("minillada.config"))
    for field in found.keys() & side.keys():
        theirs, ours = found[field], side[field]
        same = np.float32(theirs) == np.float32(ours) if isinstance(theirs, float) else theirs in (None, ours)
        expect(same or field == "vocab_size", f"minillada.config in {path.name}", f"{field} {theirs}", ours, fix)
    for key, value in keys.items():  # its twin, by which llama.cpp goes where it keeps keys and values
        if key.startswith("llama."):
            twin = keys.get(f"{name}.{key[6:]}")
            expect(type(value) is type(twin) and value == twin, f"{key} in {path.name}", f"that of {name}", value, fix)
    config = complete(found | side, raw, tokenizer, mask_id)
    architecture(config)
    return f"GGUF {name}", config


def parse_side(text: object) -> dict[str, Any]:
    """Return the fields in `minillada.config`; {} if there is none. Raises BadInput."""
    if text is None:
        return {}
    holds = isinstance(text, str) and len(text) <= CONFIG_CAP
    expect(holds, "minillada.config", "JSON of at most 1 MB", text, "convert the model again")
    side = parse_json(text.encode(), "minillada.config")
    check_types(side, "minillada.config")
    return side


def read_pieces(path: Path, name: str, stored: Stored, slot: Tensor, c: ModelConfig) -> Iterator[tuple[Tensor, Tensor]]:
    """Read a tensor; yield (a part of the flat parameter, what belongs there). Raises BadInput, BadLuck."""
    known = ", ".join(KINDS)
    expect(stored.kind in KINDS, name, f"one of {known}", stored.kind, "let load_8b.py run it, on llama.cpp")
    n, flat = stored.shape[-1], len(stored.shape) == 1
    with one_line(f"{path.name}: expected to read it", "check the disk"), open(path, "rb") as f:
        f.seek(stored.offset)
        for part in slot.flatten().split(n if flat else step_of(n, c) * n):
            data = np.empty((len(part) // n, gguf.size_of(stored.kind, (n,))), np.uint8)
            expect(f.readinto(data) == data.nbytes, path.name, "the size it had", "less", "do not write to it now")
            numbers = gguf.unpack(stored.kind, data, n)
            numbers = turn(name, numbers[0] if flat else numbers, c, back=True)
            yield part, torch.from_numpy(np.ascontiguousarray(numbers)).flatten()


@contextmanager
def home_of(path: Path, instead: Path | None = None) -> Iterator[Path]:
    """Give the directory that holds a model's tokenizer, template and generation config: `instead`, or the model's own,
    or for a GGUF file a temporary one with the texts that it carries."""
    if instead is not None or not is_gguf(path):
        yield instead or path
        return
    with TemporaryDirectory(prefix="minillada-") as directory:
        told = gguf.read_header(path).keys
        for key in TEXTS.keys() & told.keys():
            expect(isinstance(told[key], str), f"{key} in {path.name}", "a text", told[key], "convert the model again")
            (Path(directory) / TEXTS[key]).write_bytes(told[key].encode())
        yield Path(directory)


def is_gguf(path: str | Path) -> bool:
    """Return whether a path names a GGUF file."""
    return Path(path).suffix.lower() == ".gguf"
