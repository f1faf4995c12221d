"""minillada: LLaDA, the masked-diffusion language model, small enough to read."""

from . import decoding  # noqa: F401 whose files register their methods
from .errors import BadInput, BadLuck
from .measure.likelihood import exact_bound, log_likelihood, log_likelihoods
from .model import LLaDA, ModelConfig
from .sampler import Canvas, SampleConfig, Step, generate, stream
from .text.tokenizer import Tokenizer
from .train import TrainStep
from .training.config import SFTConfig, TrainConfig, VRPOConfig
from .training.run import train
from .weights.checkpoint import load, save
from .weights.vision import see

__all__ = [
    "BadInput", "BadLuck", "Canvas", "LLaDA", "ModelConfig", "SFTConfig", "SampleConfig", "Step", "Tokenizer",
    "TrainConfig", "TrainStep", "VRPOConfig", "exact_bound", "generate", "load", "log_likelihood", "log_likelihoods",
    "save", "see", "stream", "train",
]  # fmt: skip
