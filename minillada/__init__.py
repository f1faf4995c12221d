"""minillada: LLaDA, the masked-diffusion language model, small enough to read."""

from .canvas import Canvas
from .checkpoint import load, save
from .errors import BadInput, BadLuck
from .likelihood import exact_bound, log_likelihood, log_likelihoods
from .model import LLaDA, ModelConfig
from .presets import TrainConfig
from .sampler import SampleConfig, Step, generate, stream
from .tokenizer import Tokenizer
from .train import TrainStep, train

__all__ = [
    "BadInput", "BadLuck", "Canvas", "LLaDA", "ModelConfig", "SampleConfig", "Step", "Tokenizer", "TrainConfig",
    "TrainStep", "exact_bound", "generate", "load", "log_likelihood", "log_likelihoods", "save", "stream", "train",
]  # fmt: skip
