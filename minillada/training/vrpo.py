"""Learning from preferences (VRPO, LLaDA 1.5, arXiv:2505.19223): DPO with likelihood bounds in place of likelihoods.

    {"prompt": "Tell me of Ada.", "chosen": "She lost a kite.", "rejected": "There was once ..."}

    loss = -log sigmoid(beta * score),    score = [B(chosen) - B_ref(chosen)] - [B(rejected) - B_ref(rejected)]

B is a lower bound of log p(answer | prompt), B_ref that of the frozen model where training began. Both are estimates,
and their noise is the whole difficulty: log-sigmoid is no straight line, so noise also biases. Three things reduce it,
each with a switch: the budget (`samples`), a masking level of its own for every mask (`masks` = 1), and the same levels
and masks for the model and the reference (`shared`). Subtracting a baseline from B and B_ref does nothing: it cancels,
in the value and in the gradient.

Shapes: P pairs, N = samples * masks estimates of each bound, B = P * 2 * N rows, T sequence.
"""

from contextlib import nullcontext
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from ..diffusion import PROCESSES, Noised, model_bound, sample_t
from ..model import ModelConfig
from .config import TrainConfig
from .distributed import reduce, share
from .lora import without_adapters
from .optim import autocast
from .sft import PADDING, SFT, Item, Items, Turn, stack, text_of


def compared(record: dict) -> list[Turn]:
    """The better and the worse answer to a prompt. Raises BadInput."""
    prompt = [{"role": "user", "content": text_of(record, "prompt")}]
    return [(prompt, text_of(record, key)) for key in ("chosen", "rejected")]


def scores(policy: Tensor, reference: Tensor) -> Tensor:
    """How many nats more the model has gained on the chosen answer than on the rejected, over the reference: (P,).

    policy, reference (P,2,N): estimates of the upper bounds of -log p, the chosen answer's first.
    """
    gained = (reference - policy).mean(-1)  # (P,2): first the difference, so that what is shared cancels exactly
    return gained[:, 0] - gained[:, 1]


def preference_loss(policy: Tensor, reference: Tensor, beta: float = 0.2) -> Tensor:
    """DPO's loss on bounds, averaged over pairs: ln 2 where the model is the reference."""
    return -F.logsigmoid(beta * scores(policy, reference)).mean()


def vrpo_loss(policy: Tensor, reference: Tensor, length: Tensor, beta: float = 0.2, sft: float = 0.05) -> Tensor:
    """With a little of SFT's loss on the chosen answers, of `length` (P,) tokens each."""
    return preference_loss(policy, reference, beta) + sft * (policy[:, 0].mean(-1) / length).mean()


def draw(
    x0: Tensor, maskable: Tensor, mask_id: int, rng: Generator, config: TrainConfig, stratified: bool = True
) -> Noised:
    """Noise for P * 2 answers, each N times in neighbouring rows of x0 (B,T).

    An answer's levels are from equal slices of (0,1] (`sample_t`), or independent, as LLaDA 1.5 has them.
    """
    answers = len(x0) // (config.samples * config.masks)
    t = torch.stack([sample_t(config.samples, rng, stratified) for _ in range(answers)])
    return PROCESSES[config.process](x0, mask_id, t.repeat_interleave(config.masks, 1).flatten(), rng, maskable)


@torch.no_grad()
def bounds(model: nn.Module, x0: Tensor, noised: Noised, config: TrainConfig, precision: str) -> Tensor:
    """The bound of every row (B,), on the CPU: each process computes its share, in `accumulate` passes."""
    found = torch.full((len(x0),), -torch.inf)
    for rows in share(len(x0), config.accumulate):
        mine = Noised(*(x[rows].to(config.device) for x in noised))
        with autocast(config, precision):
            found[rows] = model_bound(model, x0[rows].to(config.device), mine).cpu()
    return reduce(found)


class VRPO(SFT):
    """SFT with pairs of answers for items."""

    reference: nn.Module | None  # the frozen one; None: the model without its adapters

    turns_of = staticmethod(compared)

    def __init__(self, items: Items, config: TrainConfig, c: ModelConfig) -> None:
        super().__init__(replace(items, characters_per_token=1.0), config, c)  # the loss is of answers, not of tokens
        self.fill, self.reference = PADDING, None  # an end of text is learned, what fills a row is not

    def choose(self, item: Item, chance: float) -> Item:
        return item

    def compare(
        self, model: nn.Module, batch: list[Item], precision: str, rng: Generator
    ) -> tuple[Tensor, Noised, Tensor, Tensor, Tensor]:
        """x0 (B,T), its noise, the bounds (P,2,N) of the model and the reference, the chosen answers' lengths (P,)."""
        n = self.config.samples * self.config.masks
        x0, maskable = (x.repeat_interleave(n, 0) for x in stack([pair for item in batch for pair in item], self.fill))
        noised = draw(x0, maskable, self.mask_id, rng, self.config)
        theirs = noised if self.config.shared else draw(x0, maskable, self.mask_id, rng, self.config)
        policy = bounds(model, x0, noised, self.config, precision)
        with without_adapters(model) if self.reference is None else nullcontext():
            reference = bounds(self.reference or model, x0, theirs, self.config, precision)
        length = maskable.sum(1).view(-1, 2, n)[:, 0, 0]
        return x0, noised, policy.view(-1, 2, n), reference.view(-1, 2, n), length

    def noise(self, model: nn.Module, batch: list[Item], precision: str, rng: Generator) -> tuple[Tensor, Noised, dict]:
        """As in SFT. The bounds are evaluated twice: first without a gradient, to learn how much the loss depends on
        each row's bound; then, by whoever called, a few rows at a time, weighed by that. The gradient is that of the
        loss, and no more rows need be in memory at a time than in one pass.
        """
        x0, noised, policy, reference, length = self.compare(model, batch, precision, rng)
        policy.requires_grad_()
        loss = vrpo_loss(policy, reference, length, self.config.beta, self.config.sft_share)
        (slope,) = torch.autograd.grad(loss, policy)  # d loss / d bound
        score = scores(policy, reference)
        told = {"loss": loss.item(), "score": score.mean().item(), "preferred": (score > 0).float().mean().item()}
        return x0, noised._replace(weight=noised.weight * slope.flatten() * x0.numel()), told

    @torch.no_grad()
    def validate(self, model: nn.Module, items: Items, config: TrainConfig, precision: str) -> tuple[float, None]:
        """The preference loss of held-out pairs, 128 at most, with noise that is always the same."""
        rng, held, losses = Generator().manual_seed(0), items.held[:128], []
        for first in range(0, len(held), config.batch_size):
            batch = held[first : first + config.batch_size]
            _, _, policy, reference, _ = self.compare(model, batch, precision, rng)
            losses += [len(batch) * preference_loss(policy, reference, config.beta).item()]
        return sum(losses) / len(held), None
