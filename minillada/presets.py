"""What a training run is made of, and sizes by name: from one that trains in seconds to the published models."""

from dataclasses import dataclass

from .diffusion import PROCESSES
from .errors import TINY, check_number, check_one_of, check_whole

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


@dataclass(frozen=True)
class TrainConfig:
    """A training run. Fields left at None come from the preset."""

    data: str | tuple[str, ...] = "docs"  # a name (docs, tales, shakespeare) or paths
    preset: str = "tiny"
    model: dict | None = None  # fields of ModelConfig
    tokenizer: str | None = None  # characters | bytes | bpe:SIZE
    steps: int | None = None
    minutes: float | None = None  # instead of steps: then the result depends on the machine's speed
    batch_size: int | None = None
    length: int | None = None  # tokens of context
    optimizer: str = "muon"  # of the matrices inside the blocks: muon | adamw
    lr: float = 0.01  # of that
    adam_lr: float = 0.003  # of AdamW for the rest: embedding, head, norms
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
    recompute: bool = False  # blocks in the backward pass: less memory, more time
    compile: bool = False  # the training passes, by torch.compile
    shard: bool = False  # weights, gradients and optimisers over all processes, with more than one

    def __post_init__(self) -> None:
        check_one_of("preset", self.preset, [name for name in PRESETS if "train" in PRESETS[name]])
        preset = PRESETS[self.preset]
        derived = {**preset["train"], "model": preset["model"]}
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
        for name in ("lr", "adam_lr", "clip"):
            check_number(name, getattr(self, name), TINY)
        for name in ("warmup", "decay", "weight_decay"):
            check_number(name, getattr(self, name), 0, 1)
        check_one_of("optimizer", self.optimizer, ("muon", "adamw"))
        check_one_of("process", self.process, PROCESSES)
        check_one_of("precision", self.precision, ("auto", "float32", "bfloat16"))
