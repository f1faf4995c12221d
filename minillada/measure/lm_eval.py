"""lm-evaluation-harness (0.4.13) over any model that `minillada.load` reads.

    python -m minillada lm_eval run --model minillada --model_args pretrained=RUN_OR_ID,mc_num=128
        --include_path examples/lm_eval --tasks toy_choices,toy_text,toy_sums

This is the harness's own command, which knows no models but its own, with ours added. Options have the names of LLaDA's
official adapter. Log-likelihoods are bounds from below, so perplexities are bounds from above.
"""

from collections.abc import Iterable, Sequence
from functools import partial

from ..errors import BadInput, BadLuck

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
except ImportError as error:
    raise BadLuck(f"lm_eval: expected the package, got {error}; pip install 'minillada[eval]'") from None

from tqdm import tqdm

from .adapter import Adapter, cut
from .evaluate import encode_pair
from .likelihood import Pair


@register_model("minillada")
class MiniLLaDA(Adapter, LM):
    """A model as the harness sees one."""

    def __init__(
        self,
        pretrained: str,
        is_check_greedy: bool = True,  # else the harness is told that no answer is the greedy one
        batch_size: int | str = 32,
        max_batch_size: int | None = None,  # of no use: the batch size is given
        **options,  # of the Adapter
    ) -> None:
        LM.__init__(self)
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise BadInput(f"batch_size: expected a whole number >= 1, got {batch_size!r}; auto is not known here")
        Adapter.__init__(self, pretrained, batch_size=int(batch_size), **options)
        self.is_check_greedy = is_check_greedy
        self.chats: dict[str, list[int]] = {}  # what a chat looks like as a text -> what it is

    # ---- likelihood

    def pair(self, context: str, continuation: str) -> Pair:
        if context in self.chats:
            return self.fit(self.chats[context], self.tokenizer.encode(continuation))
        return self.fit(*encode_pair(self.tokenizer, context, continuation))

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log p(continuation | context), is it what greedy decoding would write) of every request."""
        pairs = [self.pair(*request.args) for request in requests]
        values, greedy = self.log_likelihoods(pairs, self.is_check_greedy, partial(bar, disable=disable_tqdm))
        results = list(zip(values.tolist(), greedy.tolist(), strict=True))
        return self.remember("loglikelihood", requests, results)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """log p of every text, which is predicted whole: nothing stands before it."""
        texts = bar([request.args[0] for request in requests], "Perplexity", disable_tqdm)
        return self.remember("loglikelihood_rolling", requests, [-self.perplexity(text).nats for text in texts])

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
            prompts = [self.encode(requests[i].args[0]) for i in batch]
            for i, text in zip(batch, self.write(prompts, config, self.seed), strict=True):
                answers[i] = cut(text, requests[i].args[1].get("until"))
        return self.remember("generate_until", requests, answers)

    def encode(self, context: str) -> list[int]:
        return self.chats[context] if context in self.chats else self.tokenizer.encode(context)

    # ---- chat

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The chat as a text. Its ids are kept beside it, for in the text nothing tells a marker from its imitation."""
        if not add_generation_prompt:
            raise BadInput("chat: expected an answer to be asked for, got one to be continued; use another gen_prefix")
        ids = self.template.encode_chat(chat_history)
        text = self.tokenizer.decode(ids, skip_special=False)
        self.chats[text], self.in_chat = ids, True
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
    return tqdm(rows, desc=what, disable=disable or not rows or None)


def main() -> None:
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
