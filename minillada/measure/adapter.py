"""Hold what the two harness adapters share: a model with its options, likelihoods, and answers up to a stop string."""

from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from ..errors import check_one_of, check_whole
from ..sampler import SampleConfig, generate
from ..text.chat import ChatTemplate
from ..weights.checkpoint import expect_tokenizer, load, reading
from ..weights.device import pick_device
from .evaluate import SCORINGS, bar
from .likelihood import Pair, Perplexity, confidence_scores, log_likelihoods, perplexity


class Adapter:
    """A model and how it is used. Options are named as in LLaDA's official adapter to lm-evaluation-harness."""

    in_chat = False  # an answer may also end where a turn does

    def __init__(
        self,
        pretrained: str,
        mc_num: int = 128,  # masks per log-likelihood
        cfg: float = 0.0,  # guidance, off at 0
        steps: int | None = None,  # one per token unless given
        gen_length: int | None = None,  # what the task says unless given, else 128
        block_length: int | None = None,  # gen_length unless given
        remasking: str = "low_confidence",
        scoring: str = "bound",  # of log-likelihoods; or confidence: see likelihood.confidence_scores
        window: int | None = None,  # for a text without a context: tokens seen at a time
        stride: int | None = None,  # tokens predicted at a time: see likelihood.perplexity
        max_length: int | None = None,  # the model's unless given
        seed: int = 0,
        dtype: str | None = None,  # the checkpoint's unless given
        batch_size: int = 32,
        device: str | None = None,
    ) -> None:
        check_one_of("scoring", scoring, SCORINGS)
        check_whole("mc_num", mc_num, 1)
        check_one_of("dtype", dtype or "float32", ("float32", "bfloat16", "float16"))
        self._device = torch.device(pick_device(device or "auto"))

        def read(directory: Path) -> tuple:
            expect_tokenizer(directory, pretrained)
            return directory, *load(directory, self._device, getattr(torch, dtype) if dtype else None)

        self.directory, self.model, self.tokenizer = reading(pretrained, read)
        check_whole("max_length", max_length or 1, 1, self.model.config.max_len)
        self.name = pretrained
        self.max_length = max_length or self.model.config.max_len
        self.mc_num, self.cfg, self.scoring = mc_num, cfg, scoring
        self.window, self.stride, self.seed, self.batch_size = window or self.max_length, stride, seed, batch_size
        self.sampling = {"steps": steps, "gen_len": gen_length, "block_len": block_length, "remasking": remasking}

    def fit(self, before: list[int], after: list[int]) -> Pair:
        """Return the pair; a context that is too long for the model loses its beginning."""
        return before[max(0, len(before) + len(after) - self.max_length) :], after

    def log_likelihoods(
        self, pairs: Sequence[Pair], check_greedy: bool = False, quiet: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Return log p (N,) of each answer in nats, by `scoring`, and whether it is greedy (N,), False if not asked."""
        options = {"batch_size": self.batch_size, "cfg_scale": self.cfg}
        values, greedy = torch.zeros(len(pairs), dtype=torch.double), torch.zeros(len(pairs), dtype=torch.bool)
        if check_greedy or self.scoring == "confidence":
            values, greedy = confidence_scores(self.model, bar(pairs, "Confidence", quiet), **options)
        if self.scoring == "bound":
            # The one token of a short answer is always masked, so one evaluation is exact.
            for single, n in ((True, 1), (False, self.mc_num)):
                chosen = [i for i, (_, after) in enumerate(pairs) if (len(after) == 1) == single]
                rows = bar([pairs[i] for i in chosen], "Likelihood", quiet)
                values[chosen] = log_likelihoods(self.model, rows, n, self.seed, **options)[0]
        return values, greedy

    def perplexity(self, text: str) -> Perplexity:
        """Return the perplexity of a whole text, with nothing before it."""
        options = {"n_samples": self.mc_num, "seed": self.seed, "batch_size": self.batch_size, "cfg_scale": self.cfg}
        return perplexity(self.model, text, self.tokenizer, self.window, self.stride, **options)

    def config_of(self, asked: dict) -> SampleConfig:
        """Return how to decode: the user's options come first, then what the task asks for. Raises BadInput."""
        chosen = {name: value for name, value in self.sampling.items() if value is not None}
        length = chosen.get("gen_len", int(asked.get("max_gen_toks", 128)))
        check_whole("gen_length", length, 1, self.max_length - 1)
        chosen = {"gen_len": length, "block_len": length, "steps": length} | chosen
        if asked.get("do_sample"):
            chosen |= {name: asked[name] for name in ("temperature", "top_k", "top_p") if name in asked}
        return SampleConfig(**chosen, cfg_scale=self.cfg, stop_ids=self.stop_ids())

    def stop_ids(self) -> tuple[int, ...]:
        """Return the ids that end an answer."""
        ends = {self.model.config.eos_id, *(self.template.stop_ids if self.in_chat else ())}
        return tuple(sorted(ends - {None}))

    def write(self, prompts: Iterable[list[int]], config: SampleConfig, seed: int) -> list[str]:
        """Return what the model writes after each prompt; a prompt that is too long loses its beginning."""
        room = self.max_length - config.gen_len
        written = generate(self.model, [prompt[-room:] for prompt in prompts], config, seed)
        return [self.tokenizer.decode(row) for row in written]

    @cached_property
    def template(self) -> ChatTemplate:
        return ChatTemplate.load(self.directory, self.tokenizer)


def cut(text: str, until: str | Sequence[str] | None) -> str:
    """Return the text before the first of the strings that end it."""
    ends = [until] if isinstance(until, str) else until or []
    return text[: min((at for end in ends if end and (at := text.find(end)) >= 0), default=len(text))]
