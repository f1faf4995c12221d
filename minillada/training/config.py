"""Configs of training runs, one class for each objective, and sizes by name. A config says everything that a run is
made of; a field left at None gets its value from the preset or from the objective."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, get_args, get_origin, get_type_hints

from ..diffusion import PROCESSES
from ..errors import TINY, BadInput, check_number, check_one_of, check_whole
from ..text.corpora import corpus
from ..text.tasks import make_task
from ..train import LearnConfig

# `model` are fields of ModelConfig, `train` of TrainConfig; the published models have no recipe for one machine.
SMALL = {"rope_theta": 100.0}
MOE = {"n_expert": 8, "n_expert_active": 2, "d_expert": 176}  # with as many active parameters as `tiny`
PRESETS: dict[str, dict[str, dict]] = {  # seconds, three minutes, and that on two cores; an hour on a laptop's GPU
    "nano": {"model": {"n_layer": 2, "n_head": 2, "d_model": 64, "d_ff": 176, **SMALL},
             "train": {"steps": 300, "batch_size": 8, "length": 64, "tokenizer": "bpe:512"}},
    "tiny": {"model": {"n_layer": 4, "n_head": 2, "d_model": 128, "d_ff": 352, **SMALL},
             "train": {"steps": 2000, "batch_size": 8, "length": 128, "tokenizer": "bpe:4096"}},
    "tiny-moe": {"model": {"n_layer": 4, "n_head": 2, "d_model": 128, "d_ff": 352, **SMALL, **MOE},
                 "train": {"steps": 2000, "batch_size": 8, "length": 128, "tokenizer": "bpe:4096"}},
    "small": {"model": {"n_layer": 6, "n_head": 6, "d_model": 384, "d_ff": 1024, **SMALL},
              "train": {"steps": 10_000, "batch_size": 64, "length": 256, "tokenizer": "bpe:2048"}},
    # LLaDA, arXiv:2502.09992, table 5
    "llada-1b": {"model": {"n_layer": 22, "n_head": 32, "n_kv_head": 4, "d_model": 2048, "d_ff": 5634}},
    "llada-8b": {"model": {"n_layer": 32, "n_head": 32, "d_model": 4096, "d_ff": 12288}},
    "llada-moe-7b-a1b": {"model": {"n_layer": 16, "n_head": 16, "d_model": 2048, "d_ff": 8192, "rope_theta": 50_000.0,
                         "qk_norm": True, "max_len": 8192, "n_expert": 64, "n_expert_active": 8, "d_expert": 1024}},
}  # fmt: skip

# The published models' ids, for building one of that shape without its tokenizer.
LLADA = {"vocab_size": 126464, "mask_id": 126336, "eos_id": 126081, "pad_id": 126081}
IDS: dict[str, dict[str, int]] = {"llada-1b": LLADA, "llada-8b": LLADA}
IDS["llada-moe-7b-a1b"] = {"vocab_size": 157184, "mask_id": 156895, "eos_id": 156892, "pad_id": 156892}

VERSION = 2  # of run.json and of the state beside a checkpoint's model

# What the fields of configs may be: a check, the fields that it is for, and its limits.
CHECKS = (
    (check_whole, ("batch_size", "eval_every", "checkpoint_every", "accumulate", "length", "samples", "masks"), (1,)),
    (check_whole, ("rollout_steps", "group", "inner"), (1,)),
    (check_whole, ("keep", "lora"), (0,)),
    (check_whole, ("seed",), (0, 2**63 - 1)),
    (check_number, ("balance", "z_loss", "bias_rate", "sft_share", "temperature", "certainty", "consistency"), (0,)),
    (check_number, ("lr", "adam_lr", "clip", "beta", "ratio_clip"), (TINY,)),
    (check_number, ("warmup", "decay", "weight_decay", "errors", "prompt_mask", "ema"), (0, 1)),
    (check_number, ("twin", "t_min", "bpe_dropout"), (0, 1)),
    (check_one_of, ("optimizer",), (("muon", "adamw"),)),
    (check_one_of, ("process",), (PROCESSES,)),
    (check_one_of, ("precision",), (("auto", "float32", "bfloat16"),)),
    (check_one_of, ("rows",), (("windows", "documents"),)),
    (check_one_of, ("algorithm",), (("rejection", "diffu-grpo", "wd1", "just-grpo"),)),
)


@dataclass(frozen=True, kw_only=True)
class RunConfig(LearnConfig):
    """Hold what every run has, whatever its objective. Raises BadInput for a value that a field cannot have."""

    objective: ClassVar[str]  # its name in run.json
    held_out: ClassVar[str] = "bound"  # the figure of held-out data that training lowers, by its name in the log
    recipe: ClassVar[Callable[["RunConfig"], dict]]  # a method that returns values for fields that are None

    minutes: float | None = None  # instead of steps: then the result depends on the machine's speed
    batch_size: int | None = None
    optimizer: str | None = None  # of the matrices inside the layers: muon | adamw
    lr: float | None = None  # of that
    adam_lr: float | None = None  # of AdamW for the rest: embedding, head, norms
    weight_decay: float = 0.1  # of the matrices
    balance: float = 0.01  # of the loss that evens out the load of experts; LLaDA-MoE's, like the next
    z_loss: float = 0.001  # of the loss that keeps the router's logits small
    process: str = "exact-count"  # exact-count | bernoulli-mean | bernoulli | bernoulli-cosine
    precision: str = "auto"  # auto | float32 | bfloat16
    eval_every: int | None = None  # steps; an eighth of the training unless given
    checkpoint_every: int | None = None  # steps; with every evaluation unless given
    keep: int = 3  # last checkpoints; that of the best held-out figure stays too (0: all)
    out: str | None = None  # run directory; nothing is written without one
    seed: int = 0
    device: str = "cpu"
    accumulate: int = 1  # passes that a batch is split into: less memory, the same result
    recompute: bool = False  # layers in the backward pass: less memory, more time
    compile: bool = False  # the training passes, by torch.compile
    sampling: dict | None = None  # fields of SampleConfig: how the model is decoded unless told otherwise
    shard: bool = False  # weights, gradients and optimisers over all processes, with more than one

    def __post_init__(self) -> None:
        recipe = self.recipe()
        evaluate = self.eval_every if self.eval_every is not None else max(1, (self.steps or recipe["steps"]) // 8)
        for name, value in {**recipe, "eval_every": evaluate, "checkpoint_every": evaluate}.items():
            if getattr(self, name) is None and not (name == "steps" and self.minutes is not None):
                object.__setattr__(self, name, value)
        if self.minutes is None or self.steps is not None:
            check_whole("steps", self.steps, 1)
        if self.minutes is not None:
            check_number("minutes", self.minutes, TINY)
        for check, names, limits in CHECKS:
            for name in (name for name in names if hasattr(self, name)):
                check(name, getattr(self, name), *limits)

    def units(self, nats: float, characters_per_token: float = 1.0) -> str:
        """Say what a held-out figure means, or a training loss, which is in nats per token."""
        nats /= characters_per_token
        return f"<= {nats:.3f} nats/char, {nats / math.log(2):.3f} bits/char"


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RunConfig):
    """Hold a pre-training run: a text, and a new model that learns it."""

    objective: ClassVar[str] = "pretrain"

    data: str | tuple[str, ...] = "docs"  # a name (docs, tales, shakespeare) or paths
    preset: str = "tiny"
    model: dict | None = None  # fields of ModelConfig
    tokenizer: str | None = None  # characters | bytes | bpe:SIZE
    length: int | None = None  # tokens of context
    rows: str | None = None  # windows (of the whole text) | documents (one in each row, with its end of text)
    block: int | None = None  # tokens of a block of a block-causal model; None: that of `start`, or 0: no blocks
    start: str | None = None  # the run or model directory to go on from, with its tokenizer; None: a new model
    twin: float | None = None  # share of the training that goes from left to right; None: a fifth, or 0 with `start`
    t_min: float = 0.2  # masking levels above it are trained, unless in blocks
    bpe_dropout: float | None = None  # of merges, in windows (`spelling.py`); None: 0.02, or 0 with `start`
    errors: float = 0.0  # share of the given tokens that are replaced by random ones and predicted too (LLaDA2.1)
    bias_rate: float = 0.0  # what a sigmoid router's biases move by in each step; then leave balance out

    def recipe(self) -> dict:
        check_one_of("preset", self.preset, [name for name in PRESETS if "train" in PRESETS[name]])
        preset, known = PRESETS[self.preset], corpus(self.data)
        common = {"optimizer": "muon", "lr": 0.01, "adam_lr": 0.003, "rows": "windows", "sampling": known.sampling,
                  "twin": 0.2, "bpe_dropout": 0.02}  # fmt: skip
        if self.start:  # a trained model brings its tokenizer and its sizes, and needs smaller steps
            if self.tokenizer or self.model:
                given = self.tokenizer or self.model
                raise BadInput(
                    f"tokenizer, model: expected none beside a model to begin with, got {given}; leave it out"
                )
            common |= {"lr": 0.003, "adam_lr": 0.0009, "twin": 0.0, "bpe_dropout": 0.0}
        own = known.train if (self.preset, self.tokenizer, self.length) == ("tiny", None, None) else {}
        found = {**common, "model": preset["model"], **preset["train"], **own}
        return {**found, "model": None, "tokenizer": None} if self.start else found

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.data, str):
            object.__setattr__(self, "data", tuple(map(str, self.data)))
        if self.block is not None:
            check_whole("block", self.block, 0, self.length)
            if self.block and self.length % self.block:
                raise BadInput(
                    f"block: expected a divisor of the length {self.length}, got {self.block}; change either"
                )
        if self.bias_rate and (self.model or {}).get("router") != "sigmoid":
            raise BadInput(f"bias_rate: expected 0 without a sigmoid router, got {self.bias_rate}; use balance")


@dataclass(frozen=True, kw_only=True)
class TunedConfig(RunConfig):
    """Hold what runs have in common that go on from a trained model, with its tokenizer. The rates are for tiny models:
    LLaDA's own are 2.5e-5 for SFT and, in LLaDA 1.5, 5e-7 for VRPO."""

    defaults: ClassVar[dict]  # the recipe without lora
    keeps_start: ClassVar[bool] = False  # whether it needs the model that it began with for as long as it lasts

    data: str  # one JSONL file; of rewards, a task
    start: str  # the run or model directory to begin with
    lora: int = 0  # rank of adapters that are trained in place of the weights; 0: none

    def recipe(self) -> dict:
        return {"sampling": {}, **self.defaults, **({"optimizer": "adamw", "lr": 0.001} if self.lora else {})}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.data, str):
            raise BadInput(f"data: expected one JSONL file, got {self.data!r}; give the path of one")
        if self.shard and (self.lora or self.keeps_start):
            raise BadInput("shard: expected False with adapters or a reference, got True; leave out shard")


@dataclass(frozen=True, kw_only=True)
class SFTConfig(TunedConfig):
    """Hold a run of supervised fine-tuning: dialogues whose answers are learned."""

    objective: ClassVar[str] = "sft"
    defaults: ClassVar[dict] = {"optimizer": "muon", "lr": 0.003, "adam_lr": 0.001, "steps": 1000, "batch_size": 32}

    errors: float = 0.0  # share of the given tokens that are replaced by random ones and predicted too (LLaDA2.1)
    eos_padding: bool = True  # ends of text that fill a row up are part of the answer


@dataclass(frozen=True, kw_only=True)
class VRPOConfig(TunedConfig):
    """Hold a run of VRPO: pairs of a better and a worse answer."""

    objective: ClassVar[str] = "prefer"
    held_out: ClassVar[str] = "preference_loss"
    keeps_start: ClassVar[bool] = True
    defaults: ClassVar[dict] = {"optimizer": "muon", "lr": 0.0003, "adam_lr": 0.0001, "steps": 200, "batch_size": 8}

    samples: int = 8  # masking levels for each bound
    masks: int = 1  # masks at each level
    shared: bool = True  # the same levels and masks for the model and the reference
    beta: float = 0.2  # of the preference loss
    sft_share: float = 0.05  # of SFT's loss on the chosen answers

    def units(self, loss: float, characters_per_token: float = 1.0) -> str:
        """Say what a held-out figure means, or a training loss, which includes SFT's share."""
        return f"loss {loss:.4f}"


@dataclass(frozen=True, kw_only=True)
class RewardConfig(TunedConfig):
    """Hold a run that learns from rewards: `data` is a task, whose checker judges the model's own answers. Steps,
    evaluations and checkpoints end with a rollout's last inner step, so that a run resumes bit for bit."""

    objective: ClassVar[str] = "reward"
    held_out: ClassVar[str] = "wrong"
    defaults: ClassVar[dict] = {"optimizer": "muon", "lr": 0.003, "adam_lr": 0.001, "steps": 150, "batch_size": 128}
    defaults |= {"group": 1, "temperature": 0.0}  # as it will be asked to write; then a group would be copies
    signed: ClassVar[dict] = {"group": 8, "temperature": 1.0, "lr": 0.0003, "adam_lr": 0.0001}  # weights of both signs

    algorithm: str = "rejection"  # rejection | diffu-grpo | wd1 | just-grpo
    rollout_steps: int = 4  # evaluations in which an answer is written
    group: int | None = None  # answers to the same question
    inner: int = 4  # steps that learn from one rollout
    temperature: float | None = None  # of rollouts
    prompt_mask: float = 0.15  # diffu-grpo, wd1: share of a question that is hidden
    ratio_clip: float = 0.5  # diffu-grpo, just-grpo: how far from 1 a ratio counts

    def recipe(self) -> dict:
        return {**super().recipe(), **(self.signed if self.algorithm != "rejection" else {})}

    def __post_init__(self) -> None:
        super().__post_init__()
        make_task(self.data, 0, n_test=0)
        if self.batch_size % self.group:
            what = f"batch_size: expected a multiple of the group's {self.group} answers, got {self.batch_size}"
            raise BadInput(f"{what}; change either")
        if self.algorithm != "rejection" and self.group < 2:
            what = f"group: expected 2 answers or more with {self.algorithm}, got 1"
            raise BadInput(f"{what}; they are compared with each other")

    def units(self, loss: float, characters_per_token: float = 1.0) -> str:
        """Say what a training loss means, or the held-out figure, which is the share of wrong answers."""
        return f"loss {loss:.4f}"


@dataclass(frozen=True, kw_only=True)
class DistilConfig(TunedConfig):
    """Hold a run of few-step distillation: prompts, whose answers the model itself writes, and learns to write in fewer
    steps. Of the answers in the data only the lengths are used."""

    objective: ClassVar[str] = "distil"
    held_out: ClassVar[str] = "jump_loss"
    keeps_start: ClassVar[bool] = True
    defaults: ClassVar[dict] = {"optimizer": "muon", "lr": 0.003, "adam_lr": 0.001, "steps": 400, "batch_size": 64}

    certainty: float = 0.0  # of the loss on the entropy of predictions that are right (dParallel: 2)
    consistency: float = 0.0  # of the loss against the moving average of the model, nearer to the path's end
    ema: float = 0.99  # what of that average stays in each step

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lora and self.consistency:
            raise BadInput(f"consistency: expected 0 with adapters, got {self.consistency}; leave out either")

    def units(self, loss: float, characters_per_token: float = 1.0) -> str:
        """Say what a held-out figure means, or a training loss, in nats per hole."""
        return f"loss {loss:.4f}"


KINDS = (TrainConfig, SFTConfig, VRPOConfig, RewardConfig, DistilConfig)
CONFIGS: dict[str, type[RunConfig]] = {kind.objective: kind for kind in KINDS}


def config_of(document: dict) -> RunConfig:
    """Return the config that run.json holds. Raises BadInput for a file of another version, or a faulty one."""
    version, objective, fields = document.get("version"), document.get("objective"), dict(document)
    if version != VERSION or objective not in list(CONFIGS):
        what = f"run.json: expected version {VERSION} and an objective of {', '.join(CONFIGS)}"
        fix = "resume with the minillada that began the run, or begin another run"
        raise BadInput(f"{what}, got version {version!r} and {objective!r}; {fix}")
    kind = CONFIGS[objective]
    del fields["version"], fields["objective"]
    hints = get_type_hints(kind)
    for name in fields.keys() & hints.keys():
        kinds = [get_origin(hint) or hint for hint in get_args(hints[name]) or (hints[name],)]  # a tuple is a list here
        accepted = {list if k is tuple else k for k in kinds} | ({int} if float in kinds else set())
        if type(fields[name]) not in accepted:
            kind_told = getattr(hints[name], "__name__", hints[name])
            what = f"run.json: expected {name} to be {kind_told}, got {fields[name]!r:.80}"
            raise BadInput(f"{what}; undo that change, or begin another run")
    later = {"sampling": {}} | ({"errors": 0.0} if hasattr(kind, "errors") else {})  # what older runs do not have
    if kind is TrainConfig:
        later |= {"rows": "windows", "block": None, "start": None, "twin": 0.0, "t_min": 0.0, "bpe_dropout": 0.0}
    fields = later | fields
    if others := fields.keys() ^ {field.name for field in dataclasses.fields(kind)}:
        what = f"run.json: expected the fields of {kind.__name__}"
        raise BadInput(f"{what}, got one more or less, {min(others)!r}; begin another run")
    return kind(**fields)
