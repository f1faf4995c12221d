"""Learning from preferences (VRPO, LLaDA 1.5, arXiv:2505.19223): DPO with likelihood bounds in place of likelihoods.

    {"prompt": "Tell me of Ada.", "chosen": "She lost a kite.", "rejected": "There was once ..."}

    loss = -log sigmoid(beta * score),    score = [B(chosen) - B_ref(chosen)] - [B(rejected) - B_ref(rejected)]

B is a lower bound of log p(answer | prompt), B_ref that of the frozen model where training began. Both are estimates,
and log-sigmoid is no straight line, so their noise also biases the loss. Three things reduce it: the budget
(`samples`), a masking level of its own for every mask (`masks` = 1), and the same levels and masks for the model and
the reference (`shared`). Subtracting a baseline from B and B_ref does nothing: it cancels.
Shapes: P pairs, N = samples * masks estimates of each bound, B = P * 2 * N rows, T sequence.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.distributed import ReduceOp

from ..diffusion import PROCESSES, Noised, sample_t
from ..measure.blocks import noise_blocks
from .config import VRPOConfig
from .distributed import reduce, share, shares
from .lora import without_adapters
from .optim import evaluation
from .pretraining import part_of
from .sft import PADDING, Item, Items, Turn, item_batches, row_bounds, stack, text_of


def compared(record: dict) -> list[Turn]:
    """Return the better and the worse answer to a prompt. Raises BadInput."""
    prompt = [{"role": "user", "content": text_of(record, "prompt")}]
    return [(prompt, text_of(record, key)) for key in ("chosen", "rejected")]


def scores(policy: Tensor, reference: Tensor) -> Tensor:
    """Return how many nats more the model has gained on the chosen answer than on the rejected one, (P,), by estimates
    policy, reference (P,2,N) of upper bounds of -log p, the chosen answer's first."""
    gained = (reference - policy).mean(-1)  # (P,2): first the difference, so that what is shared cancels exactly
    return gained[:, 0] - gained[:, 1]


def preference_loss(policy: Tensor, reference: Tensor, beta: float = 0.2) -> Tensor:
    """Return DPO's loss on bounds, averaged over pairs: ln 2 where the model is the reference."""
    return -F.logsigmoid(beta * scores(policy, reference)).mean()


def vrpo_loss(policy: Tensor, reference: Tensor, length: Tensor, beta: float = 0.2, sft: float = 0.05) -> Tensor:
    """Return `preference_loss` with a little of SFT's loss on the chosen answers, of `length` (P,) tokens each."""
    return preference_loss(policy, reference, beta) + sft * (policy[:, 0].mean(-1) / length).mean()


class Drawn(NamedTuple):
    """Hold a batch of pairs as rows with their noise: 2 N rows for each pair, its chosen answer's first."""

    x0: Tensor  # (B,T)
    noised: Noised  # for the model
    theirs: Noised  # for the reference
    length: Tensor  # (P,) tokens of the chosen answers


class VRPO:
    """Prefer the chosen answer of each pair to the rejected one. reference: the model where training began, frozen;
    None: the trained model without its adapters. stratified: an answer's masking levels are from equal slices of (0,1];
    False: independent, as LLaDA 1.5 has them."""

    def __init__(
        self, items: Items, config: VRPOConfig, mask_id: int, reference: nn.Module | None, stratified: bool = True,
        block: int = 0,
    ) -> None:  # fmt: skip
        self.items, self.config, self.mask_id, self.block = items, config, mask_id, block
        self.reference, self.stratified = reference, stratified
        self.numbers: dict = {}

    def batches(self, start: int) -> Iterator[list[Item]]:
        """Yield batches of pairs for ever, from number `start`."""
        for batch in item_batches(self.items, self.config, start):
            yield [item for item, _ in batch]

    def draw(self, batch: list[Item], rng: Generator) -> Drawn:
        """Draw the noise of a whole batch, however its rows are dealt out. Every answer comes N times, with PADDING."""
        config, n = self.config, self.config.samples * self.config.masks
        rows, answers = stack([pair for item in batch for pair in item], PADDING)
        x0, maskable = (x.repeat_interleave(n, 0) for x in (rows, answers))

        def noise() -> Noised:
            t = torch.stack([sample_t(config.samples, rng, self.stratified) for _ in rows])
            t = t.repeat_interleave(config.masks, 1).flatten()  # (B,)
            return noise_blocks(x0, self.mask_id, t[:, None], rng, self.block, maskable, PROCESSES[config.process])

        noised = noise()
        return Drawn(x0, noised, noised if config.shared else noise(), answers.sum(1)[::2])

    def bounds(self, model: nn.Module, drawn: Drawn, pairs: Tensor) -> tuple[Tensor, Tensor]:
        """Return the bounds of these pairs (p,) by the model and, without gradient, by the reference: (p,2,N) each."""
        n = self.config.samples * self.config.masks
        rows = (pairs[:, None] * 2 * n + torch.arange(2 * n)).flatten()
        own = without_adapters(model) if self.reference is None else nullcontext()
        with torch.no_grad(), own, evaluation(self.config):
            theirs = row_bounds(
                self.reference or model, *part_of(drawn.x0, drawn.theirs, rows, self.config), self.block
            )
        with evaluation(self.config):
            ours = row_bounds(model, *part_of(drawn.x0, drawn.noised, rows, self.config), self.block)
        return ours.view(-1, 2, n), theirs.view(-1, 2, n)

    def losses(self, model: nn.Module, batch: list[Item], rng: Generator) -> Iterator[Tensor]:
        """Yield `vrpo_loss` of this process's pairs, in `accumulate` parts; then set `numbers`: the mean score of the
        batch, and the share of pairs whose chosen answer is preferred."""
        drawn, config, told = self.draw(batch, rng), self.config, []
        for pairs in shares(model, len(batch), config.accumulate):
            policy, reference = self.bounds(model, drawn, pairs)
            told.append(scores(policy.detach(), reference).cpu())
            length = drawn.length[pairs].to(config.device)
            yield vrpo_loss(policy, reference, length, config.beta, config.sft_share) / config.accumulate
        score = torch.cat(told)
        sums = reduce(torch.stack([score.sum(), (score > 0).sum().float()]), ReduceOp.SUM)
        self.numbers = dict(zip(("score", "preferred"), (sums / len(batch)).tolist(), strict=True))

    @torch.no_grad()
    def validate(self, model: nn.Module) -> dict:
        """Return the preference loss of held-out pairs, 128 at most, with noise that is always the same."""
        rng, config, held, total = Generator().manual_seed(0), self.config, self.items.held[:128], 0.0
        for first in range(0, len(held), config.batch_size):
            batch = held[first : first + config.batch_size]
            drawn, score = self.draw(batch, rng), torch.full((len(batch),), -torch.inf)
            for pairs in share(len(batch), config.accumulate):
                score[pairs] = scores(*self.bounds(model, drawn, pairs)).cpu()
            total -= F.logsigmoid(config.beta * reduce(score)).sum().item()
        return {"preference_loss": total / len(held)}
