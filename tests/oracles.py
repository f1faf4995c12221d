"""Small models whose answers are known: what the tests compare with."""

import itertools
import math
from pathlib import Path

import torch
from torch import Tensor, nn

from minillada.model import LLaDA, ModelConfig

GOLDEN = Path(__file__).parent / "golden"


def tiny_model(seed: int = 0, **fields) -> LLaDA:
    """A small random LLaDA with predictions that are far from uniform."""
    defaults = {"vocab_size": 16, "mask_id": 15, "eos_id": 14, "pad_id": 13, "n_layer": 2, "n_head": 2, "d_model": 16}
    model = LLaDA(ModelConfig(**{**defaults, "d_ff": 32, **fields}))
    model.init_weights(torch.Generator().manual_seed(seed))
    with torch.no_grad():
        if not model.config.tie_head:
            model.head.weight *= 20
    return model


class Oracle(nn.Module):
    """A model given by a function of the tokens: (B,T) -> (B,T,V)."""

    def __init__(self, config: ModelConfig, logits) -> None:
        super().__init__()
        self.config, self.logits, self.calls = config, logits, 0
        self.anchor = nn.Parameter(torch.zeros(()))  # so that it has a device

    def forward(self, tokens, attn_mask=None, positions=None, where=None, cache=None) -> Tensor:
        self.calls += 1
        logits = self.logits(tokens)
        return logits if where is None else logits[where]


def table_model(seed: int = 0, length: int = 4, words: int = 3) -> Oracle:
    """Random conditional probabilities, looked up by the whole context: any-order consistency is not assumed."""
    base = words + 1
    table = torch.randn(base**length, length, base, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    table[..., words] = -torch.inf  # [MASK] is never right
    powers = base ** torch.arange(length)
    return Oracle(ModelConfig(vocab_size=base, mask_id=words), lambda tokens: table[(tokens * powers).sum(1)])


def any_order_nll(model: Oracle, x0: list[int]) -> list[float]:
    """-log p of x0 in nats by the chain rule, for each of the L! orders."""
    length, mask = len(x0), model.config.mask_id
    values = []
    for order in itertools.permutations(range(length)):
        x, nats = [mask] * length, 0.0
        for i in order:
            log_p = model(torch.tensor([x]))[0, i].log_softmax(-1)
            nats -= log_p[x0[i]].item()
            x[i] = x0[i]
        values.append(nats)
    return values


def random_order_distribution(model: Oracle, length: int) -> Tensor:
    """p(x) of decoding one token at a time in a random order: (words^L,), for x in the order of itertools.product."""
    words = model.config.vocab_size - 1
    xs = list(itertools.product(range(words), repeat=length))
    orders = math.factorial(length)
    return torch.tensor([sum(math.exp(-v) for v in any_order_nll(model, list(x))) / orders for x in xs])
