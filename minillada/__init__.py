"""minillada: LLaDA, the masked-diffusion language model, small enough to read."""

from .canvas import Canvas
from .errors import BadInput, BadLuck
from .measure.likelihood import exact_bound, log_likelihood, log_likelihoods
from .model import LLaDA, ModelConfig
from .sampler import SampleConfig, Step, generate, stream
from .text.tokenizer import Tokenizer
from .training.config import TrainConfig
from .training.run import TrainStep, train
from .weights.checkpoint import load, save

__all__ = [
    "BadInput", "BadLuck", "Canvas", "LLaDA", "ModelConfig", "SampleConfig", "Step", "Tokenizer", "TrainConfig",
    "TrainStep", "exact_bound", "generate", "load", "log_likelihood", "log_likelihoods", "save", "stream", "train",
]  # fmt: skip
