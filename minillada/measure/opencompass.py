"""Run OpenCompass (0.5.4) over any model that `minillada.load` reads: `opencompass examples/opencompass/toy.py`.

In its configs `MiniLLaDA` is the type of a model and `Choices` that of a data set. OpenCompass calls the mean of -log p
over tokens, in nats, a perplexity; here it is an upper bound.
"""

from collections.abc import Sequence
from itertools import count, groupby
from operator import itemgetter
from pathlib import Path

from ..errors import BadInput, BadLuck, check_one_of

try:
    from datasets import Dataset
    from opencompass.datasets.base import BaseDataset
    from opencompass.models.base import BaseModel, LMTemplateParser
    from opencompass.models.base_api import APITemplateParser
except ImportError as error:
    raise BadLuck(f"opencompass: expected the package, got {error}; pip install 'minillada[opencompass]'") from None

import numpy as np

from ..text.chat import Message
from .adapter import Adapter, cut
from .evaluate import encode_pair, read_choices
from .likelihood import Pair

ROLES = {"HUMAN": "user", "SYSTEM": "system", "BOT": "assistant"}  # OpenCompass's -> those of a chat template
CHAT = {
    "round": [{"role": "HUMAN", "api_role": "HUMAN"}, {"role": "BOT", "api_role": "BOT", "generate": True}],
    "reserved_roles": [{"role": "SYSTEM", "api_role": "SYSTEM"}],
}
DRAWING = ("do_sample", "temperature", "top_k", "top_p")
Template = str | list  # a prompt in OpenCompass's terms
Prompt = str | list[dict[str, str]]  # what its parser makes of a template: a text, or the rounds of a chat


class MiniLLaDA(Adapter, BaseModel):
    """A model with the methods that OpenCompass calls. OpenCompass keeps `batch_size` and `max_out_len` to itself."""

    def __init__(
        self,
        path: str,
        max_seq_len: int | None = None,  # the model's unless given
        meta_template: dict | None = None,
        generation_kwargs: dict | None = None,  # how to draw: DRAWING
        stop_words: Sequence[str] = (),  # in addition to those of the task
        chat: bool = False,  # use the model's chat template instead of a meta template of strings
        rows: int = 32,  # of one evaluation of the model; batch_size is how many texts come at a time
        **options,  # of the Adapter
    ) -> None:
        Adapter.__init__(self, path, max_length=max_seq_len, batch_size=rows, **options)
        BaseModel.__init__(self, path, self.max_length, generation_kwargs=generation_kwargs or {})
        self.template_parser = APITemplateParser(meta_template or CHAT) if chat else LMTemplateParser(meta_template)
        self.in_chat, self.stop_words, self.seeds = chat, list(stop_words), count(self.seed)

    def encode(self, prompt: Prompt) -> list[int]:
        """Return the ids of a text or of a chat."""
        return self.template.encode_chat(messages(prompt)) if self.in_chat else self.tokenizer.encode(prompt)

    def get_token_len(self, prompt: Prompt) -> int:
        """Return the number of tokens of a prompt."""
        return len(self.encode(prompt))

    def get_ppl_from_template(self, templates: list[Template], mask_length: list[int] | None = None) -> np.ndarray:
        """Return nats per token (N,) of the last words of the role that the meta template lets generate, given what
        comes before them; without such a role, of the whole text."""
        whole, given = (self.parse_template(templates, mode=mode) for mode in ("ppl", "gen"))
        if mask_length is not None or whole == given:
            return self.get_ppl(whole, mask_length)
        return self.per_token([self.pair(*prompts) for prompts in zip(given, whole, strict=True)])

    def get_ppl(self, inputs: list[str], mask_length: list[int] | None = None) -> np.ndarray:
        """Return nats per token (N,) of whole texts, or of what follows the first mask_length[i] tokens of each."""
        if self.in_chat:
            raise BadInput("chat: expected an answer to predict, got none; let a role of the template generate")
        if mask_length is None:
            return np.array([found.nats / found.tokens for found in map(self.perplexity, inputs)])
        rows = zip(self.tokenizer.encode_batch(inputs), mask_length, strict=True)
        return self.per_token([self.fit(ids[:given], ids[given:]) for ids, given in rows])

    def get_loglikelihood(self, inputs: list[str], conts: list[str]) -> np.ndarray:
        """Return log p (N,) in nats of the end of each text, given what stands before it. Raises BadInput."""
        pairs = []
        for text, end in zip(inputs, conts, strict=True):
            if not end or not text.endswith(end):
                raise BadInput(f"cont: expected the end of the prompt, got {end!r}; let the template end with it")
            pairs.append(self.pair(text.removesuffix(end), text))
        return self.log_likelihoods(pairs)[0].numpy()

    def pair(self, given: Prompt, whole: Prompt) -> Pair:
        """Return the ids of what is given and of what follows it in the whole prompt."""
        if not self.in_chat:
            return self.fit(*encode_pair(self.tokenizer, given, whole[len(given) :]))
        return self.fit(self.encode(given), self.tokenizer.encode(whole[-1]["prompt"]))

    def per_token(self, pairs: list[Pair]) -> np.ndarray:
        """Return the nats per token (N,) of each answer."""
        return -self.log_likelihoods(pairs)[0].numpy() / [len(after) for _, after in pairs]

    def generate(
        self, inputs: list[Prompt], max_out_len: int, stopping_criteria: Sequence[str] = (), **drawing
    ) -> list[str]:
        """Return what the model writes after each prompt, up to the first stop string; every call has another seed."""
        asked = {**self.generation_kwargs, **drawing}
        for name in asked:
            check_one_of("generation_kwargs", name, DRAWING)
        config = self.config_of({"max_gen_toks": max_out_len, **asked})
        texts = self.write([self.encode(prompt) for prompt in inputs], config, next(self.seeds))
        return [cut(text, [*stopping_criteria, *self.stop_words]) for text in texts]


def messages(prompt: Prompt) -> list[Message]:
    """Return the rounds of a prompt as messages; neighbouring rounds of one role become one message."""
    rounds = [{"role": "HUMAN", "prompt": prompt}] if isinstance(prompt, str) else [r for r in prompt if r["prompt"]]
    turns = groupby(rounds, key=itemgetter("role"))
    return [{"role": ROLES[role], "content": "\n".join(r["prompt"] for r in same)} for role, same in turns]


class Choices(BaseDataset):
    """Questions in the format of `python -m minillada evaluate --choices`."""

    @staticmethod
    def load(path: str) -> Dataset:
        """Read the questions; each option is also a column of its own: option0, option1, … Raises BadInput."""
        items = read_choices(Path(path))
        if len({len(item["options"]) for item in items}) > 1:
            raise BadInput(f"{path}: expected as many options in every line, got different numbers; use several files")
        rows = [item | {f"option{i}": text for i, text in enumerate(item["options"])} for item in items]
        return Dataset.from_list(rows)
