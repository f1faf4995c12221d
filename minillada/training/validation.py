"""How well a model in training predicts the validation text: the bound, and what it is made of."""

import torch
from torch import Generator, nn

from ..diffusion import Noised, exact_count, model_bound, sample_t
from ..text.ids import Tokens, validation_batch
from .config import TrainConfig
from .distributed import reduce, share
from .optim import autocast

LEVELS = 10  # equal bins of (0,1]


@torch.no_grad()
def validate(
    model: nn.Module, text: Tokens, config: TrainConfig, precision: str
) -> tuple[float, list[tuple[float, float]]]:
    """Upper bound of -log p of the validation text in nats per character: 128 windows, 2 masks each, always the same.
    Each window is predicted without what stands before it.

    And the curve under which the bound is the area, up to characters per token: (t, nats per masked token) at the
    middle of ten bins of the masking level, those that no row fell into left out.
    """
    windows, rng = validation_batch(text.val, 128, config.length), Generator().manual_seed(0)
    pairs = [exact_count(row.expand(2, -1), model.config.mask_id, sample_t(2, rng), rng) for row in windows]
    noised = Noised(*map(torch.cat, zip(*pairs, strict=True)))
    x0 = windows.repeat_interleave(2, dim=0)  # (256,T)
    bounds = torch.full((len(x0),), -torch.inf)
    (mine,) = share(len(x0))
    for batch in mine.split(32):
        part = Noised(*(x[batch].to(config.device) for x in noised))
        with autocast(config, precision):
            bounds[batch] = model_bound(model, x0[batch].to(config.device), part).cpu()
    bounds = reduce(bounds).double()  # (256,), of all processes
    count = noised.masked.sum(1)
    bins = (count * LEVELS - 1) // config.length  # masking level (0, 0.1] is bin 0
    nats, tokens = (
        torch.zeros(LEVELS).double().index_add(0, bins, x.double()) for x in (bounds / noised.weight, count)
    )
    levels = [((i + 0.5) / LEVELS, (nats[i] / tokens[i]).item()) for i in range(LEVELS) if tokens[i]]
    return bounds.view(-1, 2).mean(1).mean().item() / config.length / text.characters_per_token, levels
