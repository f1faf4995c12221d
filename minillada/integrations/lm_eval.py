"""lm-evaluation-harness (0.4.13) over any model that `minillada.load` reads.

    python -m minillada.integrations.lm_eval run --model minillada --model_args pretrained=RUN_OR_ID,mc_num=128
        --include_path examples/lm_eval --tasks toy_choices,toy_text,toy_sums

This is the harness's own command, which knows no models but its own, with ours added. Options have the names of LLaDA's
official adapter. Log-likelihoods are bounds from below, so perplexities are bounds from above.
"""

from collections.abc import Iterable, Sequence
from functools import cached_property

from ..cli import fail
from ..errors import BadInput, BadLuck, check_one_of, check_whole

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
except ImportError as error:
    missing = f"lm_eval: expected the package, got {error}; pip install 'minillada[eval]'"
    if __name__ == "__main__":
        fail(missing)
    raise BadLuck(missing) from None

import torch
from tqdm import tqdm

from ..chat import ChatTemplate
from ..checkpoint import check, load
from ..cli import pick_device
from ..evaluate import SCORINGS, encode_pair
from ..likelihood import Pair, confidence_scores, log_likelihoods, perplexity
from ..sampler import SampleConfig, generate
from ..tokenizer import Tokenizer


@register_model("minillada")
class MiniLLaDA(LM):
    """A model as the harness sees one."""

    def __init__(
        self,
        pretrained: str,
        mc_num: int = 128,  # masks per log-likelihood
        cfg: float = 0.0,  # guidance, off at 0
        steps: int | None = None,  # one per token unless given
        gen_length: int | None = None,  # what the task says unless given, else 128
        block_length: int | None = None,  # gen_length unless given
        remasking: str = "low_confidence",
        is_check_greedy: bool = True,  # else the harness is told that no answer is the greedy one
        scoring: str = "bound",  # of log-likelihoods; or confidence: see likelihood.confidence_scores
        window: int | None = None,  # of a rolling log-likelihood: tokens seen at a time, and
        stride: int | None = None,  # predicted at a time: see likelihood.perplexity
        max_length: int | None = None,  # the model's unless given
        seed: int = 0,
        dtype: str | None = None,  # the checkpoint's unless given
        batch_size: int | str = 32,
        max_batch_size: int | None = None,  # of no use: the batch size is given
        device: str | None = None,
    ) -> None:
        super().__init__()
        check_one_of("scoring", scoring, SCORINGS)
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise BadInput(f"batch_size: expected a whole number >= 1, got {batch_size!r}; auto is not known here")
        check_whole("mc_num", mc_num, 1)
        if dtype is not None:
            check_one_of("dtype", dtype, ("float32", "bfloat16", "float16"))
        found = check(pretrained)
        self._device = torch.device(pick_device(device or "auto"))
        self.model, tokenizer = load(found.directory, str(self._device), getattr(torch, dtype) if dtype else None)
        if tokenizer is None:
            raise BadInput(f"{pretrained}: expected a tokenizer.json, got none; save the model with its tokenizer")
        check_whole("max_length", max_length or 1, 1, self.model.config.max_len)
        if tokenizer.mask_id != self.model.config.mask_id:
            tokenizer = Tokenizer(tokenizer.inner, {"mask": self.model.config.mask_id})
        self.tokenizer, self.directory, self.name = tokenizer, found.directory, pretrained
        self.max_length = max_length or self.model.config.max_len
        self.mc_num, self.cfg, self.scoring, self.is_check_greedy = mc_num, cfg, scoring, is_check_greedy
        self.window, self.stride, self.seed, self.batch_size = window or self.max_length, stride, seed, int(batch_size)
        self.sampling = {"steps": steps, "gen_len": gen_length, "block_len": block_length, "remasking": remasking}
        self.chats: dict[str, list[int]] = {}  # what a chat looks like as a text -> what it is

    # ---- likelihood

    def pair(self, context: str, continuation: str) -> Pair:
        """The ids; a context that is too long loses its beginning."""
        if context in self.chats:
            before, after = self.chats[context], self.tokenizer.encode(continuation)
        else:
            before, after = encode_pair(self.tokenizer, context, continuation)
        return before[max(0, len(before) + len(after) - self.max_length) :], after

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log p(continuation | context), is it what greedy decoding would write) of every request."""
        pairs = [self.pair(*request.args) for request in requests]
        options = {"batch_size": self.batch_size, "cfg_scale": self.cfg}
        values, greedy = torch.zeros(len(pairs), dtype=torch.double), torch.zeros(len(pairs), dtype=torch.bool)
        if self.is_check_greedy or self.scoring == "confidence":
            values, greedy = confidence_scores(self.model, bar(pairs, "Confidence", disable_tqdm), **options)
        if self.scoring == "bound":
            # A single token is always masked: one evaluation tells all.
            for single, n in ((True, 1), (False, self.mc_num)):
                chosen = [i for i, (_, after) in enumerate(pairs) if (len(after) == 1) == single]
                rows = bar([pairs[i] for i in chosen], "Likelihood", disable_tqdm or not chosen)
                values[chosen] = log_likelihoods(self.model, rows, n, self.seed, **options)[0]
        results = list(zip(values.tolist(), greedy.tolist(), strict=True))
        return self.remember("loglikelihood", requests, results)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """log p of every text, which is predicted whole: nothing stands before it."""
        options = {"n_samples": self.mc_num, "seed": self.seed, "batch_size": self.batch_size, "cfg_scale": self.cfg}
        texts = bar([request.args[0] for request in requests], "Perplexity", disable_tqdm)
        found = [perplexity(self.model, text, self.tokenizer, self.window, self.stride, **options) for text in texts]
        return self.remember("loglikelihood_rolling", requests, [-one.nats for one in found])

    # ---- generation

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What is written after each context, up to the first of the task's stop strings."""
        answers, groups = [""] * len(requests), {}
        for i, request in enumerate(requests):  # one batch has one way to decode
            groups.setdefault(self.config_of(request.args[1]), []).append(i)
        batches = [
            (config, group[first : first + self.batch_size])
            for config, group in groups.items()
            for first in range(0, len(group), self.batch_size)
        ]
        for config, batch in bar(batches, "Generation", disable_tqdm):
            prompts = [self.encode(requests[i].args[0])[-(self.max_length - config.gen_len) :] for i in batch]
            for i, tokens in zip(batch, generate(self.model, prompts, config, self.seed), strict=True):
                answers[i] = cut(self.tokenizer.decode(tokens), requests[i].args[1].get("until"))
        return self.remember("generate_until", requests, answers)

    def config_of(self, asked: dict) -> SampleConfig:
        """How to decode: what the user says, then what the task says."""
        chosen = {name: value for name, value in self.sampling.items() if value is not None}
        chosen.setdefault("gen_len", int(asked.get("max_gen_toks", 128)))
        check_whole("gen_length", chosen["gen_len"], 1, self.max_length - 1)
        chosen.setdefault("block_len", chosen["gen_len"])
        chosen.setdefault("steps", chosen["gen_len"])
        if asked.get("do_sample"):
            chosen |= {name: asked[name] for name in ("temperature", "top_k", "top_p") if name in asked}
        return SampleConfig(**chosen, cfg_scale=self.cfg, stop_ids=self.stop_ids())

    def stop_ids(self) -> tuple[int, ...]:
        ends = {self.model.config.eos_id, *(self.template.stop_ids if self.chats else ())}
        return tuple(sorted(ends - {None}))

    def encode(self, context: str) -> list[int]:
        return self.chats[context] if context in self.chats else self.tokenizer.encode(context)

    # ---- chat

    @cached_property
    def template(self) -> ChatTemplate:
        return ChatTemplate.load(self.directory, self.tokenizer)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The chat as a text. Its ids are kept beside it, for in the text nothing tells a marker from its imitation."""
        if not add_generation_prompt:
            raise BadInput("chat: expected an answer to be asked for, got one to be continued; use another gen_prefix")
        ids = self.template.encode_chat(chat_history)
        text = self.tokenizer.decode(ids, skip_special=False)
        self.chats[text] = ids
        return text

    @property
    def tokenizer_name(self) -> str:
        return str(self.name)

    # ---- the harness's cache

    def remember(self, kind: str, requests: Sequence[Instance], results: list) -> list:
        for request, result in zip(requests, results, strict=True):
            self.cache_hook.add_partial(kind, request.args, result)
        return results


def bar(rows: Sequence, what: str, disable: bool) -> Iterable:
    return tqdm(rows, desc=what, disable=disable or None)


def cut(text: str, until: str | Sequence[str] | None) -> str:
    """The text before the first of the strings that end it."""
    ends = [until] if isinstance(until, str) else until or []
    return text[: min((at for end in ends if end and (at := text.find(end)) >= 0), default=len(text))]


def main() -> None:
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    from ..cli import run

    run(main)
