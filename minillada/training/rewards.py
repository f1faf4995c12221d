"""Learning from rewards: the model answers a toy task's questions, and the task's own checker says which are right.

    python train_tiny.py --reward open4 --from RUN --rollout-steps 4

A rollout asks some questions, a group of answers to each, written by `stream` in `rollout_steps` evaluations; `inner`
optimiser steps then learn from it. Every algorithm is SFT of the answers, each with a weight: it lowers the mean of
-weight * log p(answer) / tokens. They differ in the weight, in what stands for log p, and in the ratio:

    rejection   reward r >= 0                   the bound, as in SFT                   (rejection sampling; the default)
    diffu-grpo  r - mean of its group           mean field, ratio clipped              (d1, arXiv:2504.12216)
    wd1         softmax(A) - softmax(-A)        mean field; A = r - mean of its group  (arXiv:2507.08838)
    just-grpo   r - mean of its group           exact, left to right, ratio clipped    (JustGRPO, arXiv:2601.15165)

The mean field predicts all tokens from one evaluation in which the whole answer is hidden: what they say of each other
is lost. A group's mean as a baseline takes the own reward along, so the gradient is (1 - 1/G) of the true one. Neither
a reference model nor d1's penalty for leaving it is kept.
Shapes: P questions of a rollout, G answers to each, A = P * G, L tokens of an answer, T sequence, N tokens that count.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count, islice
from typing import NamedTuple
from warnings import warn

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from ..diffusion import PROCESSES, Noised
from ..errors import BadInput
from ..measure.blocks import Beside, attention, block_levels, noise_blocks
from ..model import ModelConfig
from ..sampler import Canvas, SampleConfig, stream
from ..text.chat import ChatTemplate
from ..text.tasks import Task, make_task
from ..text.tokenizer import Tokenizer
from .config import RewardConfig
from .distributed import shares
from .optim import evaluation
from .pretraining import part_of
from .sft import PADDING, Item, Items, dialogue, encode, gather, per_answer, visits

ASKED, HELD = 2000, 100  # questions to learn from, and to validate with
RISK = "an ablation; weights of both signs can ruin a model, at SFT's rates they do; rejection is the default"


@dataclass(frozen=True, kw_only=True, eq=False)
class Questions(Items):
    """Hold a task's questions as ids, with what judges the answers."""

    task: Task
    tokenizer: Tokenizer
    gen_len: int  # tokens of the longest answer, its end of text included


def ask(config: RewardConfig, template: ChatTemplate, c: ModelConfig) -> Questions:
    """Make a task's questions for a model. Raises BadInput if it cannot read them, or for too many rollout_steps."""
    if c.eos_id is None:
        raise BadInput("model: expected one with an end of text, got none; begin with a model that has an eos_id")
    task = make_task(config.data, ASKED, config.seed, HELD)
    task = task._replace(test=[example for example in task.test if not example.after])
    try:
        items = [encode(dialogue(example._asdict()), template, c) for example in task.train + task.test]
    except BadInput as error:
        raise type(error)(f"reward {config.data}: {error}") from None
    gen_len = max(len(answer) for item in items for _, answer in item)
    gen_len = min(gen_len, c.max_len - max(len(prompt) for item in items for prompt, _ in item))
    if config.rollout_steps > gen_len:
        what = f"rollout_steps: expected at most {gen_len}, the tokens of the longest answer, got"
        raise BadInput(f"{what} {config.rollout_steps}; lower it")
    more = {"task": task, "tokenizer": template.tokenizer, "gen_len": gen_len}
    return gather(items[:ASKED], items[ASKED:], template, kind=Questions, **more)


# ---- weights: rewards (P,G) -> (P,G)


def advantages(rewards: Tensor) -> Tensor:
    """Return how much better each answer is than its group, without dividing by a deviation: [1, 0] -> [.5, -.5]."""
    return rewards - rewards.mean(1, keepdim=True)


def two_sided(rewards: Tensor) -> Tensor:
    """Return wd1's weights: above zero for the better half of a group, below for the worse."""
    return advantages(rewards).softmax(1) - (-advantages(rewards)).softmax(1)


# ---- states: what the model sees when it predicts the answers, and which tokens count there


class Written(NamedTuple):
    """Hold a rollout's answers behind their questions."""

    x0: Tensor  # (A,T) with PADDING
    answer: Tensor  # (A,T) bool, what was to be written
    said: Tensor  # (A,T) bool, of that what was: up to the end of text


def noised_answers(w: Written, c: ModelConfig, config: RewardConfig, rng: Generator) -> Noised:
    """Noise answers as SFT does: then the weighted sum estimates the bound."""
    t, process = block_levels(w.x0, c.block, rng), PROCESSES[config.process]
    return per_answer(noise_blocks(w.x0, c.mask_id, t, rng, c.block, w.answer, process), w.answer)


def mean_field(w: Written, c: ModelConfig, config: RewardConfig, rng: Generator) -> Noised:
    """Hide the answers whole, and each token of a question with a small probability, as d1 does."""
    hidden = w.answer | (torch.rand(w.x0.shape, generator=rng) < config.prompt_mask) & (w.x0 != PADDING)
    return per_answer(Noised(w.x0.masked_fill(hidden, c.mask_id), w.said, torch.ones(len(hidden))), w.said)


def left_to_right(w: Written, c: ModelConfig, config: RewardConfig, rng: Generator) -> Noised:
    """Return L rows for each answer, one for each token: it and all behind it are hidden, and it alone counts. The sum
    of their log p is that with which a token-by-token rollout wrote the answer."""
    place, turn = w.answer.cumsum(1)[:, None], torch.arange(1, w.answer.sum(1).max() + 1)[:, None]  # (A,1,T), (L,1)
    xt = w.x0[:, None].masked_fill(w.answer[:, None] & (place >= turn), c.mask_id).flatten(0, 1)  # (A*L,T)
    counts = (w.said[:, None] & (place == turn)).flatten(0, 1)
    return per_answer(Noised(xt, counts, torch.ones(len(xt))), w.said.repeat_interleave(len(turn), 0))


class Algorithm(NamedTuple):
    """Say what an answer weighs, what stands for its log p, and whether the ratio to the old policy is clipped."""

    weigh: Callable[[Tensor], Tensor]
    states: Callable[..., Noised]
    clipped: bool = False


ALGORITHMS = {
    "rejection": Algorithm(lambda rewards: rewards, noised_answers),
    "diffu-grpo": Algorithm(advantages, mean_field, clipped=True),
    "wd1": Algorithm(two_sided, mean_field),
    "just-grpo": Algorithm(advantages, left_to_right, clipped=True),
}


def token_log_p(model: nn.Module, x0: Tensor, noised: Noised, block: int = 0) -> Tensor:
    """Return log p of the tokens that count, (N,) in reading order."""
    where, clean = noised.masked.nonzero(as_tuple=True), x0.clamp(min=0)
    asked = Beside(model, clean, block) if block else model
    logits = asked(noised.xt.clamp(min=0), attn_mask=attention(x0 != PADDING), where=where)
    wide = torch.promote_types(logits.dtype, torch.float32)
    return -F.cross_entropy(logits.to(wide), clean[where], reduction="none")


def gains(log_p: Tensor, old: Tensor, weight: Tensor, clip: float) -> Tensor:
    """Return PPO's clipped ratio times weight, (N,), whose gradient at ratio 1 is that of weight * log p."""
    ratio = (log_p - old).exp()
    return torch.minimum(ratio * weight, ratio.clamp(1 - clip, 1 + clip) * weight)


def told(rewards: Tensor, texts: list[str]) -> dict:
    """Return what the log has of rewards (P,G) and the answers: the mean `reward`; the share of `mixed` groups, which
    have better and worse answers and without which signed weights are zero; how many `distinct` answers a group has;
    `agreement`, the share of a group that its most frequent answer has (self-consistency's vote, arXiv:2203.11171)."""
    size = rewards.shape[1]
    groups = [Counter(texts[i : i + size]) for i in range(0, len(texts), size)]
    mean = lambda values: sum(values) / len(groups)
    return {
        "reward": rewards.mean().item(), "mixed": (rewards.amax(1) > rewards.amin(1)).float().mean().item(),
        "distinct": mean(map(len, groups)), "agreement": mean(max(g.values()) / size for g in groups),
    }  # fmt: skip


class Rewards:
    """Write answers, and learn the better ones."""

    def __init__(self, questions: Questions, config: RewardConfig, c: ModelConfig) -> None:
        self.questions, self.config, self.c, self.how = questions, config, c, ALGORITHMS[config.algorithm]
        self.numbers: dict = {}
        self.rollout: tuple[Written, Tensor] | None = None  # with the weight of each answer, (A,)

    def batches(self, start: int) -> Iterator[tuple[int, list[int]]]:
        """Yield for ever, from number `start` on, an inner step and the questions of its rollout."""
        n = self.config.batch_size // self.config.group
        for number in count(start):
            rollout, inner = divmod(number, self.config.inner)
            chosen = visits(len(self.questions.learned), self.config.seed, rollout * n)
            yield inner, [which for which, _ in islice(chosen, n)]

    def write(
        self, model: nn.Module, items: list[Item], one_by_one: bool, temperature: float, seed: int
    ) -> tuple[Written, list[str]]:
        """Answer questions: in `rollout_steps`, or one token after the other from left to right."""
        length, c, tokenizer = self.questions.gen_len, self.c, self.questions.tokenizer
        steps, width = (length, 1) if one_by_one else (self.config.rollout_steps, length)
        how = SampleConfig(gen_len=length, steps=steps, block_len=width, temperature=temperature)
        model = getattr(model, "_orig_mod", model)  # what torch.compile wraps, which is to see no other shapes
        model = getattr(model, "module", model)  # what DDP wraps
        canvas = Canvas.continuation([prompt for ((prompt, _),) in items], length, c, self.config.device)
        with evaluation(self.config):
            *_, last = stream(model, canvas, how, seed)
        x0, answer = last.x.masked_fill(~canvas.valid, PADDING).cpu(), (canvas.x == c.mask_id).cpu()
        ends = answer & (x0 == c.eos_id)
        said = answer & (ends.cumsum(1) - ends.long() == 0)  # and the first end of text
        return Written(x0, answer, said), [tokenizer.decode(ids) for ids in canvas.answers(last.x, how, c)]

    def roll_out(self, model: nn.Module, which: list[int], rng: Generator) -> tuple[Written, Tensor]:
        """Write a group of answers to each of some questions, and weigh them; then set `numbers`."""
        questions, config = self.questions, self.config
        asked, seed = [i for i in which for _ in range(config.group)], int(torch.randint(2**62, (), generator=rng))
        items, one_by_one = [questions.learned[i] for i in asked], self.how.states is left_to_right
        written, texts = self.write(model, items, one_by_one, config.temperature, seed)
        judged = [questions.task.check(questions.task.train[i], text) for i, text in zip(asked, texts, strict=True)]
        rewards = torch.tensor(judged).view(-1, config.group)
        if not (any(judged) or self.numbers):
            what = f"reward: expected right answers, got none of the first {len(judged)}, and nothing to learn from"
            warn(f"{what}; begin with a model that knows some of {config.data}, or raise rollout_steps", stacklevel=2)
        self.numbers = told(rewards, texts)
        return written, self.how.weigh(rewards).flatten()

    def losses(self, model: nn.Module, batch: tuple[int, list[int]], rng: Generator) -> Iterator[Tensor]:
        """Yield this process's parts of the loss. The first inner step rolls out; in it the policy is the old one."""
        (inner, which), config, how = batch, self.config, self.how
        if inner == 0 or self.rollout is None:
            self.rollout, self.noised, self.old = self.roll_out(model, which, rng), None, []
        written, weight = self.rollout
        if self.noised is None or not how.clipped:  # a ratio compares log p in the same state
            self.noised = how.states(written, self.c, config, rng)
        each = len(self.noised.xt) // len(weight)  # rows of an answer
        x0, weight = (x.repeat_interleave(each, 0) for x in (written.x0, weight))
        weights = (self.noised.weight.view(len(x0), -1) * weight[:, None]).expand_as(x0)
        for number, rows in enumerate(shares(model, len(x0), config.accumulate)):
            live = rows[weight[rows] != 0] if weight[rows].any() else rows[:1]  # no time for what weighs nothing
            with evaluation(config):
                log_p = token_log_p(model, *part_of(x0, self.noised, live, config), self.c.block)
            if number == len(self.old):
                self.old.append(log_p.detach())
            scale = weights[live][self.noised.masked[live]].to(log_p)
            gain = gains(log_p, self.old[number], scale, config.ratio_clip) if how.clipped else scale * log_p
            yield -gain.sum() * each / (len(rows) * x0.shape[1] * config.accumulate)

    def validate(self, model: nn.Module) -> dict:
        """Return the share of held-out questions that are answered wrong, without noise and in `rollout_steps`."""
        size, held, task, right = self.config.batch_size, self.questions.held, self.questions.task, 0.0
        for first in range(0, len(held), size):
            _, texts = self.write(model, held[first : first + size], False, 0.0, 0)
            right += sum(map(task.check, task.test[first : first + size], texts))
        return {"wrong": 1 - right / len(held)}
