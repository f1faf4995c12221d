"""Run lm-evaluation-harness (0.4.13) over any model that `minillada.load` reads.

    python -m minillada lm_eval run --model minillada --model_args pretrained=RUN_OR_ID,mc_num=128
        --include_path examples/lm_eval --tasks toy_choices,toy_text,toy_sums

This is the harness's own command with our model. Log-likelihoods are lower bounds, so perplexities are upper bounds.
"""

from collections.abc import Sequence

from ..errors import BadInput, BadLuck

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
except ImportError as error:
    raise BadLuck(f"lm_eval: expected the package, got {error}; pip install 'minillada[eval]'") from None

from .adapter import Adapter, cut
from .evaluate import bar, encode_pair
from .likelihood import Pair


@register_model("minillada")
class MiniLLaDA(Adapter, LM):
    """A model with the methods that the harness calls."""

    def __init__(
        self,
        pretrained: str,
        is_check_greedy: bool = True,  # False saves time and tells the harness that no answer is greedy
        batch_size: int | str = 32,
        max_batch_size: int | None = None,  # the harness gives it; it is not used
        **options,  # of the Adapter
    ) -> None:
        LM.__init__(self)
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise BadInput(f"batch_size: expected a whole number >= 1, got {batch_size!r}; give a number, not auto")
        Adapter.__init__(self, pretrained, batch_size=int(batch_size), **options)
        self.is_check_greedy = is_check_greedy
        self.chats: dict[str, list[int]] = {}  # text of a chat -> its ids

    def pair(self, context: str, continuation: str) -> Pair:
        """Return the ids of a context and a continuation that fit the model."""
        if context in self.chats:
            return self.fit(self.chats[context], self.tokenizer.encode(continuation))
        return self.fit(*encode_pair(self.tokenizer, context, continuation))

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return (log p(continuation | context), whether greedy decoding would write it) for every request."""
        pairs = [self.pair(*request.args) for request in requests]
        values, greedy = self.log_likelihoods(pairs, self.is_check_greedy, disable_tqdm)
        return self.remember("loglikelihood", requests, list(zip(values.tolist(), greedy.tolist(), strict=True)))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return log p of every whole text, with nothing before it."""
        texts = bar([request.args[0] for request in requests], "Perplexity", disable_tqdm)
        return self.remember("loglikelihood_rolling", requests, [-self.perplexity(text).nats for text in texts])

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return what the model writes after each context, up to the first of the task's stop strings."""
        answers, groups = [""] * len(requests), {}
        for i, request in enumerate(requests):  # all rows of a batch are decoded in the same way
            groups.setdefault(self.config_of(request.args[1]), []).append(i)
        size = self.batch_size
        batches = [(c, group[i : i + size]) for c, group in groups.items() for i in range(0, len(group), size)]
        for config, batch in bar(batches, "Generation", disable_tqdm):
            prompts = [self.encode(requests[i].args[0]) for i in batch]
            for i, text in zip(batch, self.write(prompts, config, self.seed), strict=True):
                answers[i] = cut(text, requests[i].args[1].get("until"))
        return self.remember("generate_until", requests, answers)

    def encode(self, context: str) -> list[int]:
        """Return the ids of a context, which may be a chat."""
        return self.chats[context] if context in self.chats else self.tokenizer.encode(context)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return the chat as a text, and remember its ids: the text does not tell a marker from a typed imitation."""
        if not add_generation_prompt:
            raise BadInput("chat: expected an answer to be asked for, got one to be continued; use another gen_prefix")
        ids = self.template.encode_chat(chat_history)
        text = self.tokenizer.decode(ids, skip_special=False)
        self.chats[text], self.in_chat = ids, True
        return text

    @property
    def tokenizer_name(self) -> str:
        """The name under which the harness caches requests."""
        return str(self.name)

    def remember(self, kind: str, requests: Sequence[Instance], results: list) -> list:
        """Put the results into the harness's cache and return them."""
        for request, result in zip(requests, results, strict=True):
            self.cache_hook.add_partial(kind, request.args, result)
        return results


def main() -> None:
    """Run the harness's own command line."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
