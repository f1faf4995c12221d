"""What a real run needs around the loop of `train.py`: configs, runs that resume, and the other objectives."""

from . import bernoulli_mean, cosine  # noqa: F401 they add their processes to `diffusion.PROCESSES`
