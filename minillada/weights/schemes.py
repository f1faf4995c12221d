"""Translate names: five families of checkpoints name the config's fields and the tensors in their own ways.

`read_config` makes a ModelConfig of a config.json, by a table for the family; `write_config` goes the other way.
"""

import os
import re
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

from .. import files
from ..errors import BadInput, check_whole
from ..files import CONFIG_CAP, confined, listed, read_json
from ..model import ModelConfig
from ..text.tokenizer import Tokenizer

SIDE = "minillada.json"  # in our own saves: fields of ModelConfig for which config.json has no key
IDS = {"mask_id": "mask_token_id", "eos_id": "eos_token_id", "pad_id": "pad_token_id"}  # field -> key, in every scheme
expect = partial(files.expect, fix="change that value in config.json")


@dataclass(frozen=True)
class Scheme:
    """The names that one family of checkpoints uses."""

    marks: tuple[str, ...]  # a config.json with these keys is of this scheme; model_type is not reliable
    keys: dict[str, str]  # field of ModelConfig -> key of config.json
    fixed: dict[str, Any]  # keys of which the module implements only this value; null, false and no key mean off
    ignored: dict[str, Any]  # keys that cannot change what a loaded model answers, with the values that save writes
    tensors: dict[str, str]  # name in the module -> name in the file; i is the layer, e the expert
    absent: dict[str, Any]  # what a missing key means
    rare: dict[str, Any] = field(default_factory=dict)  # like fixed, for keys that save does not write
    spare: dict[str, str] = field(default_factory=dict)  # like keys, for keys that save does not write
    seen: tuple[str, ...] = ()  # keys about pictures, which `read_vision` reads
    derive: Callable[[dict, dict], dict] = lambda values, found: {}  # (keys, fields so far) -> further fields
    express: dict[str, Callable[[ModelConfig], Any]] = field(default_factory=dict)  # key -> its value, for save

    def name_of(self, ours: str) -> str:
        """Return what the files call a parameter of the module; {e} stands for the expert, if its rows are experts."""
        layer = re.search(r"\blayers\.(\d+)\.", ours)  # of the model or of its tower
        name = self.tensors.get(re.sub(r"\blayers\.\d+\.", "layers.{i}.", ours))
        files.expect(name is not None, ours, "a name for it in the scheme", "none", "make the model a plain LLaDA")
        return name.replace("{i}", layer[1]) if layer else name


def tensors(outer: dict[str, str], layer: str, inner: dict[str, str]) -> dict[str, str]:
    """Return the names of weights and biases from those of the modules outside of the layers and inside a layer."""
    modules = outer | {f"layers.{{i}}.{ours}": layer + theirs for ours, theirs in inner.items()}
    return {f"{ours}.{kind}": f"{modules[ours]}.{kind}" for ours in modules for kind in ("weight", "bias")}


LLADA = Scheme(  # LLaDA-8B, LLaDA-1.5, iLLaDA: the names of OLMo
    marks=("d_model", "n_heads", "n_layers"),
    keys={"vocab_size": "vocab_size", "embedding_size": "embedding_size", "n_layer": "n_layers", "n_head": "n_heads",
          "n_kv_head": "n_kv_heads", "d_model": "d_model", "d_ff": "mlp_hidden_size", "max_len": "max_sequence_length",
          "rope_theta": "rope_theta", "norm_eps": "rms_norm_eps", "tie_head": "weight_tying",
          "qkv_bias": "include_qkv_bias", **IDS},
    absent={"n_kv_heads": None, "embedding_size": None}, rare={"clip_qkv": None},
    fixed={"activation_type": "silu", "alibi": False, "attention_layer_norm": False, "bias_for_layer_norm": False,
           "block_group_size": 1, "block_type": "llama", "include_bias": False, "input_emb_norm": False,
           "layer_norm_type": "rms", "layer_norm_with_affine": True, "multi_query_attention": None, "rope": True,
           "rope_full_precision": True, "scale_logits": False},
    ignored={"alibi_bias_max": 8.0, "architectures": ["LLaDAModelLM"], "attention_dropout": 0.0,
             "attention_layer_norm_with_affine": True, "embedding_dropout": 0.0, "flash_attention": False,
             "init_cutoff_factor": None, "init_device": "meta", "init_fn": "mitchell", "init_std": 0.02, "mlp_ratio": 4,
             "model_type": "llada", "precision": "amp_bf16", "residual_dropout": 0.0, "transformers_version": "4.46.3",
             "use_cache": False},
    tensors=tensors(  # model.transformer.ff_out is no feed-forward: it is the head
        {"embed": "model.transformer.wte", "norm": "model.transformer.ln_f", "head": "model.transformer.ff_out"},
        "model.transformer.blocks.{i}.",
        {"attn_norm": "attn_norm", "attn.q": "q_proj", "attn.k": "k_proj", "attn.v": "v_proj", "attn.o": "attn_out",
         "ffn_norm": "ff_norm", "ffn.gate": "ff_proj", "ffn.up": "up_proj", "ffn.down": "ff_out"},
    ),
)  # fmt: skip

HF_KEYS = {"embedding_size": "vocab_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
           "n_kv_head": "num_key_value_heads", "d_model": "hidden_size", "max_len": "max_position_embeddings",
           "rope_theta": "rope_theta", "norm_eps": "rms_norm_eps", "tie_head": "tie_word_embeddings",
           "eos_id": "eos_token_id", "pad_id": "pad_token_id"}  # fmt: skip
HF_TENSORS = tensors(
    {"embed": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}, "model.layers.{i}.",
    {"attn_norm": "input_layernorm", "attn.q": "self_attn.q_proj", "attn.k": "self_attn.k_proj",
     "attn.v": "self_attn.v_proj", "attn.q_norm": "self_attn.q_norm", "attn.k_norm": "self_attn.k_norm",
     "attn.o": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm", "ffn.router": "mlp.gate",
     "ffn.gate": "mlp.gate_proj", "ffn.up": "mlp.up_proj", "ffn.down": "mlp.down_proj"},
) | {f"layers.{{i}}.ffn.{matrix}": f"model.layers.{{i}}.mlp.experts.{{e}}.{matrix}_proj.weight"
    for matrix in ("gate", "up", "down")  # here one tensor holds all experts
}  # fmt: skip

LLAMA = Scheme(
    marks=("hidden_size", "intermediate_size", "num_hidden_layers"),
    keys=HF_KEYS | {"d_ff": "intermediate_size", "qkv_bias": "attention_bias"},
    spare={"mask_id": "mask_token_id", "d_head": "head_dim"},
    absent={"num_key_value_heads": None, "attention_bias": False, "tie_word_embeddings": False},
    fixed={"hidden_act": "silu", "mlp_bias": False, "rope_scaling": None},
    ignored={"attention_dropout": 0.0, "initializer_range": 0.02, "pretraining_tp": 1, "use_cache": False},
    tensors=HF_TENSORS,
)


def derive_llava(values: dict, found: dict) -> dict:
    """Return the length of a LLaDA-V, the longer one of two that its config.json tells: pictures take many tokens."""
    told = values["tokenizer_model_max_length"]
    check_whole("tokenizer_model_max_length", told or 1, 1)
    return {"max_len": max(found["max_len"], told or 1)}


TOWER = "model.vision_tower.vision_tower.vision_model."
TOWER_NAMES = {"patch": "embeddings.patch_embedding", "positions": "embeddings.position_embedding",
               "post_norm": "post_layernorm"}  # fmt: skip
TOWER_LAYER = {"norm1": "layer_norm1", "norm2": "layer_norm2", "q": "self_attn.q_proj", "k": "self_attn.k_proj",
               "v": "self_attn.v_proj", "o": "self_attn.out_proj", "up": "mlp.fc1", "down": "mlp.fc2"}  # fmt: skip
TOWER_NAMES |= {f"layers.{{i}}.{ours}": f"encoder.layers.{{i}}.{theirs}" for ours, theirs in TOWER_LAYER.items()}

LLADA_V = replace(  # LLaDA-V: Llama names, and those of LLaVA-NeXT for what makes patches of pictures
    LLAMA, marks=(*LLAMA.marks, "mm_vision_tower"),
    seen=("mm_hidden_size", "image_aspect_ratio", "image_grid_pinpoints"),
    fixed=LLAMA.fixed | {
        "image_crop_resolution": None, "image_split_resolution": None, "mm_newline_position": "grid",
        "mm_patch_merge_type": "spatial_unpad", "mm_projector_type": "mlp2x_gelu", "mm_resampler_type": None,
        "mm_use_im_patch_token": False, "mm_use_im_start_end": False, "mm_vision_select_feature": "patch"},
    ignored=LLAMA.ignored | {  # the official code ignores mm_vision_select_layer too; the others are of training
        "add_faster_video": False, "add_time_instruction": False, "architectures": ["LlavaLLaDAModelLM"],
        "faster_token_stride": 10, "force_sample": False, "mm_pooler_ratio": 2, "mm_projector_lr": None,
        "mm_spatial_pool_mode": "bilinear", "mm_spatial_pool_stride": None,
        "mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter,mm_language_model", "mm_vision_select_layer": -2,
        "mm_vision_tower": "google/siglip2-so400m-patch14-384", "mm_vision_tower_lr": 2e-6, "model_type": "llava_llada",
        "tokenizer_padding_side": "right", "use_mm_proj": True, "vision_tower_pretrained": None},
    absent=LLAMA.absent | {"tokenizer_model_max_length": None}, derive=derive_llava,
    express={"tokenizer_model_max_length": lambda c: c.max_len},
    tensors=HF_TENSORS | {"embed.newline": "model.image_newline"} | tensors(
        {f"embed.tower.{ours}": TOWER + theirs for ours, theirs in TOWER_NAMES.items()} |
        {f"embed.projector.{i}": f"model.mm_projector.{i}" for i in (0, 2)}, "", {}),
)  # fmt: skip


def derive_moe(values: dict, found: dict) -> dict:
    """Return the fields that LLaDA-MoE's config.json tells indirectly."""
    layers, wanted = values["moe_layer_freq"], found["n_layer"]
    holds = isinstance(layers, list) and len(layers) == wanted and all(type(x) is int and x in (0, 1) for x in layers)
    expect(holds, "moe_layer_freq", f"{wanted} times 0 or 1", layers)
    dense = [i for i, moe in enumerate(layers) if not moe] if found["n_expert"] else []
    return {"dense_layers": dense, "rotary_dim": partial_rotary(values, found)}


def partial_rotary(values: dict, found: dict) -> int:
    """Return how many dims of a head rotate. If `found` has no head width, it is C / H."""
    factor, d_head = values["partial_rotary_factor"], found.get("d_head") or found["d_model"] // max(found["n_head"], 1)
    holds = type(factor) in (int, float) and 0 < factor <= 1
    expect(holds, "partial_rotary_factor", "a number above 0 and at most 1", factor)
    return round(d_head * factor)


LLADA_MOE = Scheme(  # LLaDA-MoE-7B-A1B
    marks=("hidden_size", "num_experts", "expert_intermediate_size"),
    keys=HF_KEYS | {"d_ff": "dense_intermediate_size", "qkv_bias": "attention_bias", "qk_norm": "qk_layernorm",
                    "n_expert": "num_experts", "n_expert_active": "num_experts_per_tok",
                    "d_expert": "expert_intermediate_size"}, spare={"mask_id": "mask_token_id", "d_head": "head_dim"},
    absent={"attention_bias": False, "tie_word_embeddings": False, "partial_rotary_factor": 1},
    fixed={"clip_qkv": None, "hidden_act": "silu", "moe_router_enable_expert_bias": False,
           "moe_router_score_function": "softmax", "norm_topk_prob": None, "rope_scaling": None,
           "routed_scaling_factor": 1, "router_num_group": None, "router_topk_group": None,
           "shared_expert_intermediate_size": None},
    ignored={"architectures": ["LLaDAMoEModelLM"], "attention_dropout": 0.0, "initializer_range": 0.02,
             "model_type": "llada", "output_router_logits": False, "router_aux_loss_coef": 0.01, "use_cache": False},
    tensors=HF_TENSORS, derive=derive_moe,
    express={"partial_rotary_factor": lambda c: c.rotary_dim / c.d_head,
             "moe_layer_freq": lambda c: [int(c.n_expert > 0 and i not in c.dense_layers) for i in range(c.n_layer)]},
)  # fmt: skip


def derive_llada2(values: dict, found: dict) -> dict:
    """Return the fields that LLaDA2's config.json tells indirectly."""
    dense, shared = values["first_k_dense_replace"], values["num_shared_experts"]
    check_whole("first_k_dense_replace", dense, 0, found["n_layer"])
    check_whole("num_shared_experts", shared, 0, 64)
    turned, told = partial_rotary(values, found), values["rotary_dim"]
    expect(told in (None, turned), "rotary_dim", f"the {turned} of partial_rotary_factor", told)
    experts = {"router": "sigmoid", "dense_layers": list(range(dense)), "d_shared_expert": shared * found["d_expert"]}
    return {**experts, "rotary_dim": turned, "block": 32}  # no key tells it; all published ones have this


LLADA2 = Scheme(  # LLaDA2.x: fused query, key and value; a router with a bias; an expert that every token visits
    marks=("hidden_size", "num_experts", "moe_intermediate_size"),
    keys=HF_KEYS | {"d_ff": "intermediate_size", "d_head": "head_dim", "qkv_bias": "use_qkv_bias",
                    "qk_norm": "use_qk_norm", "n_expert": "num_experts", "n_expert_active": "num_experts_per_tok",
                    "d_expert": "moe_intermediate_size", "router_renormalise": "norm_topk_prob",
                    "router_scale": "routed_scaling_factor", "n_expert_group": "n_group",
                    "n_expert_group_active": "topk_group"}, spare={"mask_id": "mask_token_id"},
    absent={"head_dim": None, "use_qk_norm": True, "use_qkv_bias": False, "tie_word_embeddings": False,
            "rotary_dim": None, "router_dtype": "fp32"},
    fixed={"hidden_act": "silu", "norm_head": False, "rope_scaling": None, "router_dtype": "fp32",
           "score_function": "sigmoid", "use_bias": False},
    rare={"moe_router_enable_expert_bias": True, "norm_softmax": False, "use_rmsnorm": True,
          "use_sliding_window": False, "using_split_qkv_in_self_attention": False},
    ignored={"architectures": ["LLaDA2MoeModelLM"], "attention_dropout": 0.0, "embedding_dropout": 0.0,
             "initializer_range": 0.02, "model_type": "llada2_moe", "output_dropout": 0.0, "use_cache": False},
    tensors=HF_TENSORS | tensors(
        {"embed": "model.word_embeddings"}, "model.layers.{i}.",
        {**dict.fromkeys(("attn.q", "attn.k", "attn.v"), "attention.query_key_value"),  # rows of q, of k, of v
         "attn.q_norm": "attention.query_layernorm", "attn.k_norm": "attention.key_layernorm",
         "attn.o": "attention.dense", "ffn.shared.gate": "mlp.shared_experts.gate_proj",
         "ffn.shared.up": "mlp.shared_experts.up_proj", "ffn.shared.down": "mlp.shared_experts.down_proj"},
    ) | {"layers.{i}.ffn.router_bias": "model.layers.{i}.mlp.gate.expert_bias"}, derive=derive_llada2,
    express={"first_k_dense_replace": lambda c: len(c.dense_layers), "rotary_dim": lambda c: c.rotary_dim,
             "num_shared_experts": lambda c: c.d_shared_expert // max(c.d_expert, 1),
             "partial_rotary_factor": lambda c: c.rotary_dim / c.d_head},
)  # fmt: skip

SCHEMES = {"LLaDA": LLADA, "LLaDA-MoE": LLADA_MOE, "LLaDA2": LLADA2, "LLaDA-V": LLADA_V, "Llama": LLAMA}  # tried so
# Keys of any Hugging Face config that say nothing about the model. auto_map names code and is never used.
COMMON = {"_attn_implementation", "_attn_implementation_autoset", "_commit_hash", "_name_or_path", "architectures",
          "attn_implementation", "auto_map", "bos_token_id", "dtype", "max_window_layers", "model_type",
          "output_router_logits", "tokenizer_class", "torch_dtype", "transformers_version", "use_cache"}  # fmt: skip
# What transformers' PretrainedConfig (4.48, configuration_utils.py) gives to keys that nobody sets, apart from false,
# null and empty values. They concern its own training and generation.
USUAL = {"chunk_size_feed_forward": 0, "diversity_penalty": 0.0, "encoder_no_repeat_ngram_size": 0,
         "id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "label2id": {"LABEL_0": 0, "LABEL_1": 1}, "length_penalty": 1.0,
         "max_length": 20, "min_length": 0, "no_repeat_ngram_size": 0, "num_beam_groups": 1, "num_beams": 1,
         "num_return_sequences": 1, "repetition_penalty": 1.0, "return_dict": True, "temperature": 1.0, "top_k": 50,
         "top_p": 1.0, "typical_p": 1.0}  # fmt: skip
KNOWN_IDS = {  # of published models whose config.json lacks them, by rows of the embedding
    126464: {"mask_id": 126336, "eos_id": 126081, "pad_id": 126081},  # LLaDA-8B, LLaDA-1.5, LLaDA-V
    157184: {"mask_id": 156895, "eos_id": 156892, "pad_id": 156892},  # LLaDA-MoE, LLaDA2
    155136: {"mask_id": 5},  # iLLaDA
}


def read_config(
    directory: Path, tokenizer: Tokenizer | None, mask_id: int | None, allow_unknown_keys: bool = False
) -> tuple[str, ModelConfig]:
    """Return the scheme's name and the config; ids that it lacks are the tokenizer's or KNOWN_IDS. A warning names keys
    that are left out; see `known_keys`. Raises BadInput."""
    raw = in_older_form(read_json(confined(directory, "config.json"), CONFIG_CAP))
    side = read_json(confined(directory, SIDE), CONFIG_CAP) if os.path.lexists(directory / SIDE) else {}
    scheme = recognise(raw)
    raw = known_keys(raw, SCHEMES[scheme], "config.json", allow_unknown_keys)
    return scheme, complete(read_fields(raw, SCHEMES[scheme], side), raw, tokenizer, mask_id)


def complete(found: dict[str, Any], raw: dict, tokenizer: Tokenizer | None, mask_id: int | None) -> ModelConfig:
    """Make a config of the fields found; ids that the keys of `raw` do not tell are the tokenizer's or KNOWN_IDS."""
    known = KNOWN_IDS.get(found.get("embedding_size") or found["vocab_size"], {})
    for name, key in IDS.items():
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
    # This bounds the list of tensor names that is made next.
    expect(config.n_layer * max(config.n_expert, 1) <= 2**15, "experts", "at most 32768 in all layers", config.n_expert)
    return config


def recognise(raw: dict) -> str:
    """Return the name of the first scheme whose marks are all in a config.json. Raises BadInput."""
    for name, scheme in SCHEMES.items():
        if all(mark in raw for mark in scheme.marks):
            return name
    known = "; ".join(f"{name}: {', '.join(scheme.marks)}" for name, scheme in SCHEMES.items())
    raise BadInput(f"config.json: expected the keys of one scheme ({known}), got none of them; use a LLaDA checkpoint")


def in_older_form(raw: dict) -> dict:
    """Return a config.json as transformers' versions before 5 write it, without what is off in it or changes nothing:
    {"rope_parameters": {"rope_type": "default", "rope_theta": 6e5}} -> {"rope_theta": 6e5}. Raises BadInput."""
    raw = dict(raw)
    kinds = ("type", "rope_type")
    for key in ("rope_scaling", "rope_parameters"):
        plain = isinstance(raw.get(key), dict) and raw[key].keys() <= {*kinds, "rope_theta", "partial_rotary_factor"}
        if plain and all(raw[key].get(kind, "default") == "default" for kind in kinds):
            for name, value in raw.pop(key).items():
                spare = name == "rope_theta" and name in raw and value == 10_000.0  # which version 5.0 fills in itself
                if name not in kinds and not spare:
                    expect(raw.setdefault(name, value) == value, name, f"the {value!r} of {key}", raw[name])
    if raw.get("use_sliding_window") is False:
        raw.pop("sliding_window", None)
    if isinstance(kinds := raw.get("layer_types"), list) and all(kind == "full_attention" for kind in kinds):
        del raw["layer_types"]
    ends = raw.get("eos_token_id")
    if isinstance(ends, list) and ends:  # the first; `ChatTemplate` ends answers at the others too
        raw["eos_token_id"] = ends[0]
    return raw


def known_keys(raw: dict, scheme: Scheme, source: str, allow: bool = False) -> dict:
    """Return the keys that the scheme knows. Others are left out, and a warning names them, if they are off, empty or
    as transformers sets them; and, if the user allows it, those that could change what the model computes. Raises
    BadInput for such a key that is not allowed."""
    known = {*COMMON, *scheme.keys.values(), *scheme.spare.values(), *scheme.express}
    known |= {*scheme.fixed, *scheme.rare, *scheme.absent, *scheme.ignored, *scheme.seen}
    others = {key: value for key, value in raw.items() if key not in known and value is not None}
    harmless = lambda key, value: value is False or value in ("", [], {}) or (key in USUAL and same(value, USUAL[key]))
    harmful = [repr(key) for key, value in others.items() if not harmless(key, value)]
    if harmful and not allow:
        fix = "remove one only if it cannot change the model, or add --allow-unknown-keys"
        raise BadInput(f"{source}: expected only keys that are implemented here, got {listed(harmful)}; {fix}")
    if others:
        warnings.warn(f"{source}: ignored {listed(list(others), most=20)}", stacklevel=5)
    return {key: value for key, value in raw.items() if key in known}


def read_fields(raw: dict, scheme: Scheme, side: dict, source: str = "config.json") -> dict[str, Any]:
    """Return the fields of ModelConfig in a config.json, of the right types; ids may be missing. Raises BadInput."""
    keys, fixed = [*scheme.keys.values(), *scheme.express], scheme.fixed | scheme.rare
    values = {**dict.fromkeys(IDS.values()), **scheme.absent, **scheme.rare, **raw}
    for key, wanted in fixed.items():
        what = f"{wanted!r}, all that is implemented here"
        files.expect(same(values.get(key), wanted), key, what, values.get(key), f"change that value in {source}")
    if absent := [key for key in keys if key not in values]:
        raise BadInput(f"{source}: expected the keys of its scheme, got no {listed(absent)}; add them there")
    found = {name: values[key] for name, key in (scheme.keys | scheme.spare).items() if key in values}
    check_types(found, source)
    check_types(side, SIDE)
    return {"vocab_size": found["embedding_size"]} | found | scheme.derive(values, found) | side


def same(value: Any, wanted: Any) -> bool:
    """Tell whether two values are equal: null and false both mean off, and true is not 1."""
    if wanted is None or wanted is False:
        return value is None or value is False
    return value == wanted and (value is True) == (wanted is True)


def check_types(found: dict[str, Any], source: str) -> None:
    """Raise BadInput unless every field has the type that ModelConfig declares; a bool is no int."""
    kinds = {f.name: f.type for f in fields(ModelConfig)}
    for name, value in found.items():
        expect(name in kinds, source, "fields of the model", name)
        kind = kinds[name]
        if name == "dense_layers":
            holds = isinstance(value, list) and all(type(i) is int for i in value)
        else:
            accepted = (int, float) if kind is float else get_args(kind) or (kind,)
            holds = type(value) in accepted or (name == "mask_id" and value is None)  # it may come from elsewhere
        files.expect(holds, f"{name} in {source}", getattr(kind, "__name__", kind), value, f"change it in {source}")


def write_config(config: ModelConfig, sees: bool = False) -> tuple[str, dict, dict]:
    """Return the scheme's name, its config.json, and the fields that it has no key for (for minillada.json)."""
    c = ModelConfig(**{f.name: getattr(config, f.name) for f in fields(ModelConfig)})
    sigmoid = c.router == "sigmoid" or c.router_renormalise or c.router_scale != 1 or c.n_expert_group > 1
    name = "LLaDA-MoE" if c.n_expert or c.qk_norm or c.rotary_dim != c.d_head else "LLaDA"
    if c.n_expert and (sigmoid or c.d_shared_expert):
        name = "LLaDA2"
    name = "LLaDA-V" if sees else name
    scheme = SCHEMES[name]
    raw = {key: getattr(c, ours) for ours, key in scheme.keys.items()} | scheme.fixed | scheme.ignored
    raw |= {key: value(c) for key, value in scheme.express.items()}
    found, side = read_fields(raw, scheme, {}), asdict(c)
    for ours in list(side):  # leave out what config.json tells or implies
        rest = {key: value for key, value in side.items() if key != ours}
        with suppress(BadInput):
            side = rest if ModelConfig(**(found | rest)) == c else side
    return name, raw, side
