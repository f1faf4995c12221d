"""What a real run needs around the loop of `train.py`: configs, runs that resume, and the other objectives."""

from . import cosine  # noqa: F401 adds its process to `diffusion.PROCESSES`
