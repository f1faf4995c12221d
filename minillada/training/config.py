"""What a training run is made of, and sizes by name: from one that trains in seconds to the published models."""

import math
from dataclasses import dataclass

from ..diffusion import PROCESSES
from ..errors import TINY, BadInput, check_number, check_one_of, check_whole

# `model` are fields of ModelConfig, `train` of TrainConfig; the published models have no recipe for one machine.

PRESETS: dict[str, dict[str, dict]] = {
    "nano": {  # seconds on two cores
        "model": {"n_layer": 2, "n_head": 2, "d_model": 64, "d_ff": 176, "rope_theta": 100.0},
        "train": {"steps": 300, "batch_size": 8, "length": 64, "tokenizer": "bpe:512"},
    },
    "tiny": {  # three minutes on two cores
        "model": {"n_layer": 4, "n_head": 2, "d_model": 128, "d_ff": 352, "rope_theta": 100.0},
        "train": {"steps": 2000, "batch_size": 8, "length": 128, "tokenizer": "bpe:4096"},
    },
    "tiny-moe": {  # as many active parameters as `tiny`
        "model": {"n_layer": 4, "n_head": 2, "d_model": 128, "d_ff": 352, "rope_theta": 100.0}
        | {"n_expert": 8, "n_expert_active": 2, "d_expert": 176},
        "train": {"steps": 2000, "batch_size": 8, "length": 128, "tokenizer": "bpe:4096"},
    },
    "small": {  # an hour on a laptop's GPU
        "model": {"n_layer": 6, "n_head": 6, "d_model": 384, "d_ff": 1024, "rope_theta": 100.0},
        "train": {"steps": 10_000, "batch_size": 64, "length": 256, "tokenizer": "bpe:2048"},
    },
    # LLaDA, arXiv:2502.09992, table 5
    "llada-1b": {"model": {"n_layer": 22, "n_head": 32, "n_kv_head": 4, "d_model": 2048, "d_ff": 5634}},
    "llada-8b": {"model": {"n_layer": 32, "n_head": 32, "d_model": 4096, "d_ff": 12288}},
    "llada-moe-7b-a1b": {
        "model": {"n_layer": 16, "n_head": 16, "d_model": 2048, "d_ff": 8192, "rope_theta": 50_000.0, "qk_norm": True}
        | {"max_len": 8192, "n_expert": 64, "n_expert_active": 8, "d_expert": 1024},
    },
}

# The published models' ids, for building one of that shape without its tokenizer.
IDS: dict[str, dict[str, int]] = {
    "llada-1b": {"vocab_size": 126464, "mask_id": 126336, "eos_id": 126081, "pad_id": 126081},
    "llada-8b": {"vocab_size": 126464, "mask_id": 126336, "eos_id": 126081, "pad_id": 126081},
    "llada-moe-7b-a1b": {"vocab_size": 157184, "mask_id": 156895, "eos_id": 156892, "pad_id": 156892},
}

# What is learned, and what that changes in a preset. The rates are for tiny models: LLaDA's own are 2.5e-5 for SFT and,
# in LLaDA 1.5, 5e-7 for VRPO. Adapters have AdamW's.
OBJECTIVES: dict[str, dict] = {
    "pretrain": {"optimizer": "muon", "lr": 0.01, "adam_lr": 0.003},
    "sft": {"optimizer": "muon", "lr": 0.003, "adam_lr": 0.001, "steps": 1000, "batch_size": 32},
    "prefer": {"optimizer": "muon", "lr": 0.0003, "adam_lr": 0.0001, "steps": 200, "batch_size": 8},
}
ADAPTERS = {"optimizer": "adamw", "lr": 0.001}


@dataclass(frozen=True)
class TrainConfig:
    """A training run. Fields left at None come from the preset and from the objective."""

    data: str | tuple[str, ...] = "docs"  # a name (docs, tales, shakespeare) or paths; but for pre-training one JSONL
    preset: str = "tiny"
    model: dict | None = None  # fields of ModelConfig
    tokenizer: str | None = None  # characters | bytes | bpe:SIZE
    steps: int | None = None
    minutes: float | None = None  # instead of steps: then the result depends on the machine's speed
    batch_size: int | None = None
    length: int | None = None  # tokens of context
    optimizer: str | None = None  # of the matrices inside the layers: muon | adamw
    lr: float | None = None  # of that
    adam_lr: float | None = None  # of AdamW for the rest: embedding, head, norms
    weight_decay: float = 0.1  # of the matrices
    warmup: float = 0.02  # share of the training over which the rate rises
    decay: float = 0.4  # share over which it falls to zero at the end
    clip: float = 1.0  # the gradient's largest norm
    balance: float = 0.01  # of the loss that evens out the load of experts; LLaDA-MoE's, like the next
    z_loss: float = 0.001  # of the loss that keeps the router's logits small
    bias_rate: float = 0.0  # what a sigmoid router's biases move by in each step; then leave balance out
    process: str = "exact-count"  # exact-count | bernoulli-mean | bernoulli
    precision: str = "auto"  # auto | float32 | bfloat16
    eval_every: int | None = None  # steps; an eighth of the training unless given
    checkpoint_every: int | None = None  # steps; with every evaluation unless given
    keep: int = 3  # last checkpoints; that of the best bound stays too (0: all)
    out: str | None = None  # run directory; nothing is written without one
    seed: int = 0
    device: str = "cpu"
    accumulate: int = 1  # passes that a batch is split into: less memory, the same result
    recompute: bool = False  # layers in the backward pass: less memory, more time
    compile: bool = False  # the training passes, by torch.compile
    shard: bool = False  # weights, gradients and optimisers over all processes, with more than one
    objective: str = "pretrain"  # pretrain | sft | prefer; the last two begin with
    start: str | None = None  # a run or model directory, whose tokenizer and model they take
    eos_padding: bool = True  # in SFT: ends of text that fill a row up are part of the answer
    lora: int = 0  # rank of adapters that are trained in place of the weights; 0: none
    samples: int = 8  # in VRPO: masking levels for each bound
    masks: int = 1  # masks at each level
    shared: bool = True  # the same levels and masks for the model and the reference
    beta: float = 0.2  # of the preference loss
    sft_share: float = 0.05  # of SFT's loss on the chosen answers

    def __post_init__(self) -> None:
        check_one_of("preset", self.preset, [name for name in PRESETS if "train" in PRESETS[name]])
        preset = PRESETS[self.preset]
        check_one_of("objective", self.objective, OBJECTIVES)
        derived = {**preset["train"], "model": preset["model"], **OBJECTIVES[self.objective]}
        if self.objective != "pretrain":  # what begins elsewhere has its model and its length from there
            derived |= {"model": {}, "tokenizer": None, "length": 1, **(ADAPTERS if self.lora else {})}
        derived["eval_every"] = max(1, (self.steps or derived["steps"]) // 8)
        for name, value in derived.items():
            if getattr(self, name) is None and not (name == "steps" and self.minutes):
                object.__setattr__(self, name, value)
        if self.checkpoint_every is None:
            object.__setattr__(self, "checkpoint_every", self.eval_every)
        if not isinstance(self.data, str):
            object.__setattr__(self, "data", tuple(map(str, self.data)))
        for name in ("batch_size", "length", "eval_every", "checkpoint_every", "accumulate"):
            check_whole(name, getattr(self, name), 1)
        check_whole("keep", self.keep, 0)
        check_whole("seed", self.seed, 0, 2**63 - 1)
        check_whole("steps", self.steps, 1) if self.minutes is None else check_number("minutes", self.minutes, TINY)
        for name in ("balance", "z_loss", "bias_rate"):
            check_number(name, getattr(self, name), 0)
        if self.bias_rate and self.model.get("router") != "sigmoid":
            what = "bias_rate: expected 0 without a sigmoid router, whose biases it moves"
            raise BadInput(f"{what}, got {self.bias_rate}; use balance")
        check_tuning(self)
        for name in ("lr", "adam_lr", "clip", "beta"):
            check_number(name, getattr(self, name), TINY)
        for name in ("warmup", "decay", "weight_decay"):
            check_number(name, getattr(self, name), 0, 1)
        check_one_of("optimizer", self.optimizer, ("muon", "adamw"))
        check_one_of("process", self.process, PROCESSES)
        check_one_of("precision", self.precision, ("auto", "float32", "bfloat16"))

    def units(self, nats: float) -> str:
        """What a loss or bound of such a run says."""
        if self.objective == "prefer":
            return f"preference loss {nats:.4f}"
        return f"<= {nats:.3f} nats/char, {nats / math.log(2):.3f} bits/char"


def check_tuning(c: TrainConfig) -> None:
    """Raise BadInput for what SFT and VRPO cannot be asked for, or pre-training cannot."""
    tuned = c.objective != "pretrain"
    rules = [
        ("start", tuned == (c.start is not None), "a run to begin with for SFT and VRPO, and none for pre-training"),
        ("lora", tuned or not c.lora, "0 in pre-training"),
        ("shard", not c.shard or not (c.lora or c.objective == "prefer"), "False with adapters or a reference"),
        ("data", not tuned or isinstance(c.data, str), "one JSONL file for SFT and VRPO"),
    ]
    for name, holds, expected in rules:
        if not holds:
            raise BadInput(f"{name}: expected {expected}, got {getattr(c, name)!r}; mend it")
    check_whole("lora", c.lora, 0)
    check_whole("samples", c.samples, 1)
    check_whole("masks", c.masks, 1)
    check_number("sft_share", c.sft_share, 0)
