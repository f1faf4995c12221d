"""Learn to correct: predict wrong tokens among the given ones, like the masked (LLaDA2.1, arXiv:2602.08676).

A model that was only ever asked about masks says nothing of use about a token that stands there. Decoding that
overwrites tokens (`decoding/llada2.py`) needs a second stream of questions. Shapes: B rows, T sequence.
"""

import torch
from torch import Generator, Tensor

from ..diffusion import Noised


def with_errors(x0: Tensor, noised: Noised, share: float, vocab_size: int, mask_id: int, rng: Generator,
                maskable: Tensor | None = None) -> Noised:  # fmt: skip
    """Replace this share of the maskable tokens that are not masked by random ones, and ask about these and about as
    many right ones, so that what is right is learned to stay. Each counts once in the loss, beside the masked tokens
    with their weight: what is minimised is no bound of the likelihood any more.

    Returns noise whose `masked` are the places asked about and whose weight is that of each token, (B,T).
    """
    chance, words = torch.rand(x0.shape, generator=rng), torch.randint(0, vocab_size - 1, x0.shape, generator=rng)
    words += words >= mask_id  # any id but the mask's
    given = ~noised.masked if maskable is None else ~noised.masked & maskable
    wrong, asked = given & (chance < share), given & (chance < 2 * share)
    weight = noised.weight if noised.weight.dim() == 2 else noised.weight[:, None]
    weight = weight.expand_as(chance).masked_fill(asked, 1.0)
    return Noised(torch.where(wrong, words, noised.xt), noised.masked | asked, weight)
