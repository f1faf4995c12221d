"""minillada: LLaDA, the masked-diffusion language model, small enough to read."""

import os
import signal
import sys

if sys.argv[:1] == ["-m"] and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # `python -m minillada …`: importing PyTorch takes seconds, in which Ctrl-C ends it at once; then `cli.run` listens.
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

from . import decoding  # noqa: F401 whose files register their methods
from .errors import BadInput, BadLuck
from .measure.likelihood import exact_bound, log_likelihood, log_likelihoods
from .model import LLaDA, ModelConfig
from .sampler import Canvas, SampleConfig, Step, generate, stream
from .text.tokenizer import Tokenizer
from .train import TrainStep
from .training.config import DistilConfig, RewardConfig, SFTConfig, TrainConfig, VRPOConfig
from .training.run import train
from .weights.checkpoint import load, save
from .weights.vision import see

__all__ = [
    "BadInput", "BadLuck", "Canvas", "DistilConfig", "LLaDA", "ModelConfig", "RewardConfig", "SFTConfig",
    "SampleConfig", "Step", "Tokenizer", "TrainConfig", "TrainStep", "VRPOConfig", "exact_bound", "generate", "load",
    "log_likelihood", "log_likelihoods", "save", "see", "stream", "train",
]  # fmt: skip
