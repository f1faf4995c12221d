"""Supervised fine-tuning (SFT): pre-training on dialogues, in which the prompt is never masked (LLaDA, eq. 5).

    {"prompt": "12+34=", "answer": "46"}                                    a line of the JSONL file, or
    {"messages": [{"role": "user", "content": "12+34="}, {"role": "assistant", "content": "46"}, ...]}

A dialogue of n answers has n turns, (everything before an answer, the answer); every visit takes one of them at random.
A row is what the chat template makes of the prompt, the answer and an end of text. Rows are filled up to the longest of
their batch with more ends of text, which are part of the answer, masked and predicted: so a model learns how long
answers are. Or, with eos_padding off, with PADDING, which nobody sees and nobody predicts.

Shapes: B rows, T sequence.
"""

import json
from argparse import ArgumentParser
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, count, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..diffusion import PROCESSES, Noised, lengths, sample_t
from ..errors import BadInput, BadLuck
from ..files import write_file
from ..measure.likelihood import Pair, attention, log_likelihoods
from ..model import ModelConfig
from ..text.chat import MARKERS, ROLES, ChatTemplate, Message
from ..text.corpora import records
from ..text.ids import Tokens, digest_of
from ..text.tokenizer import Tokenizer
from .config import TrainConfig

PADDING = -1  # in a row: no token
# For tokenizers without a chat's markers: the texts as they are, an end of text behind every answer.
PLAIN = (
    "{% for message in messages %}{{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)
Turn = tuple[list[Message], str]  # what stands before an answer, the answer
Item = list[Pair]  # the turns of a dialogue, or two answers to the same prompt


# ---- from lines to rows


def objects(path: str | Path) -> Iterator[tuple[str, dict]]:
    """Where it stands, and the object, of every line that is not empty. Raises BadInput, BadLuck."""
    path = Path(path)
    if not path.is_file():
        raise BadLuck(f"data: expected a JSONL file, got {path}; give one")
    for where, record in records(path):
        if not isinstance(record, dict):
            raise BadInput(f"{where}: expected an object, got {type(record).__name__}; mend the line")
        yield where, record


def text_of(record: dict, key: str) -> str:
    """The text of a key, without the space around it, as templates have it. Raises BadInput for none."""
    text = record.get(key)
    if not isinstance(text, str) or not text.strip():
        got = "none" if text is None else "an empty one" if isinstance(text, str) else type(text).__name__
        raise BadInput(f'expected a text "{key}", got {got}; mend the line')
    return text.strip()


def dialogue(record: dict) -> list[Turn]:
    """Every answer of a dialogue, with what stands before it. Raises BadInput."""
    if "messages" not in record:
        return [([{"role": "user", "content": text_of(record, "prompt")}], text_of(record, "answer"))]
    found = record["messages"]
    if not isinstance(found, list) or not all(isinstance(m, dict) and m.get("role") in ROLES for m in found):
        raise BadInput(f'expected "messages" with a role of {", ".join(ROLES)} each, got others; mend the line')
    messages = [{"role": message["role"], "content": text_of(message, "content")} for message in found]
    turns = [(messages[:i], m["content"]) for i, m in enumerate(messages) if m["role"] == "assistant"]
    if not turns:
        raise BadInput("expected an answer of the assistant, got none; mend the line")
    return turns


def teach(directory: str | Path, tokenizer: Tokenizer) -> ChatTemplate:
    """The chat template to train with: the directory's, else LLaDA's, else, without its markers, PLAIN."""
    template = ChatTemplate.load(directory, tokenizer)
    if template.own or all(tokenizer.inner.token_to_id(marker) is not None for marker in MARKERS):
        return template
    return replace(template, source=PLAIN, own=True)


class Taught(NamedTuple):
    """A tokenizer with the template that answers were learned with: how a checkpoint remembers that it can answer."""

    tokenizer: Tokenizer
    template: ChatTemplate

    def save(self, directory: str | Path) -> None:
        self.tokenizer.save(directory)
        write_file(Path(directory) / "chat_template.jinja", [self.template.source.encode()])


@dataclass(frozen=True)
class Items(Tokens):
    """The lines of a file as ids; the last tenth of them validates."""

    learned: list[Item]
    held: list[Item]
    longest: int  # tokens of the longest row

    @property
    def prompt(self) -> list[int]:
        """One that is not trained on."""
        return self.held[0][0][0]


def encode(turns: Iterable[Turn], template: ChatTemplate, c: ModelConfig) -> Item:
    """The ids of some turns, an end of text behind every answer. Raises BadInput."""
    pairs = []
    for before, answer in turns:
        prompt, ids = template.encode_chat(before), [*template.tokenizer.encode(answer), c.eos_id]
        if (length := len(prompt) + len(ids)) > c.max_len:
            what = f"expected at most {c.max_len} tokens of prompt, answer and end of text, got {length}"
            raise BadInput(f"{what}; shorten it")
        pairs.append((prompt, ids))
    return pairs


def read_items(
    path: str | Path, template: ChatTemplate, c: ModelConfig, turns_of: Callable[[dict], list[Turn]] = dialogue
) -> Items:
    """Read a JSONL file for a model. Raises BadInput, which names the line, and BadLuck."""
    if c.eos_id is None:
        raise BadInput("model: expected one with an end of text, which answers end with, got none; use another")
    items, where = [], str(path)
    try:
        for where, record in objects(path):  # noqa: B007 named in the error
            items.append(encode(turns_of(record), template, c))
    except BadInput as error:
        raise BadInput(str(error) if str(error).startswith(str(path)) else f"{where}: {error}") from None
    if len(items) < 2:
        raise BadInput(f"{path}: expected two lines or more, to learn from and to validate, got {len(items)}; add some")
    held = max(1, len(items) // 10)
    learned, held = items[:-held], items[-held:]
    longest = max(len(prompt) + len(answer) for item in items for prompt, answer in item)
    flat = lambda part: np.fromiter((id for item in part for pair in item for ids in pair for id in ids), np.int64)
    answers = [answer for item in held for _, answer in item]
    texts, n = [template.tokenizer.decode(answer) for answer in answers], sum(map(len, answers))
    characters, size = sum(map(len, texts)) / n, sum(len(text.encode()) for text in texts) / n
    digest = digest_of(template.tokenizer)
    digest.update(json.dumps([template.source, items]).encode())
    val = np.resize(flat(held), max(longest, len(flat(held))))  # repeated where it is shorter than one row
    return Items(flat(learned), val, characters, size, digest.hexdigest(), learned, held, longest)


# ---- from rows to a loss


def visits(n: int, seed: int, start: int) -> Iterator[tuple[int, float]]:
    """For ever from visit number `start` (from 0): which of n items, and a number in [0,1) to choose a turn with.

    Visit k depends on the seed and on k alone. An epoch is every item once, in random order.
    """
    epoch, taken = divmod(start, n)
    for number in count(epoch):
        rng = np.random.default_rng((seed, number))
        yield from islice(zip(rng.permutation(n).tolist(), rng.random(n).tolist(), strict=True), taken, None)
        taken = 0


def stack(pairs: Sequence[Pair], fill: int) -> tuple[Tensor, Tensor]:
    """Rows (B,T) filled up to the longest, and which of their tokens may be masked: the answers, and what fills them
    up if that is a token."""
    x0 = pad_sequence([torch.tensor([*prompt, *answer]) for prompt, answer in pairs], True, fill)
    start = torch.tensor([len(prompt) for prompt, _ in pairs])
    return x0, (torch.arange(x0.shape[1]) >= start[:, None]) & (x0 != PADDING)


def per_answer(noised: Noised, maskable: Tensor) -> Noised:
    """The same noise, weighed so that `pretraining_loss` is SFT's: each token's cross-entropy over the length of its
    own answer, their sum over the number of rows."""
    return noised._replace(weight=noised.weight * maskable.shape[1] / lengths(maskable, maskable))


def hide_padding(model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """A hook before a model's evaluations: PADDING is hidden from attention, and stands for no id in the embedding."""
    valid = args[0] != PADDING
    if valid.all():
        return None
    return (args[0].clamp(min=0), *args[1:]), {**kwargs, "attn_mask": attention(valid)}


class SFT:
    """What training asks of its text: batches, the noise and weights of one, and a validation."""

    turns_of = staticmethod(dialogue)

    def __init__(self, items: Items, config: TrainConfig, c: ModelConfig) -> None:
        self.items, self.config, self.mask_id = items, config, c.mask_id
        self.fill = c.eos_id if config.eos_padding else PADDING

    def batches(self, start: int) -> Iterator[list[Pair]]:
        """For ever from batch number `start` (from 0); batch n depends on the seed and on n alone."""
        size = self.config.batch_size
        stream = visits(len(self.items.learned), self.config.seed, start * size)
        while True:
            yield [self.choose(self.items.learned[i], chance) for i, chance in islice(stream, size)]

    def choose(self, item: Item, chance: float) -> Pair:
        return item[int(chance * len(item))]

    def noise(self, model: nn.Module, batch: list[Pair], precision: str, rng: Generator) -> tuple[Tensor, Noised, dict]:
        """x0 (B,T), its noise, weighed so that `pretraining_loss` has the gradient that is wanted, and what to log."""
        x0, maskable = stack(batch, self.fill)
        noised = PROCESSES[self.config.process](x0, self.mask_id, sample_t(len(x0), rng), rng, maskable)
        return x0, per_answer(noised, maskable), {}

    def validate(self, model: nn.Module, items: Items, config: TrainConfig, precision: str) -> tuple[float, None]:
        """Upper bound of -log p of held-out answers with their end of text, in nats per character of them: 128 at most,
        2 masks each, always the same. (There is no curve by masking level.)"""
        pairs = list(islice(chain.from_iterable(items.held), 128))
        values, _ = log_likelihoods(model, pairs, n_samples=2)
        tokens = sum(len(answer) for _, answer in pairs)
        return -values.sum().item() / tokens / items.characters_per_token, None


# ---- options of train_tiny.py


def add_tuning(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("to go on from a trained model (docs/assistant.md)")
    group.add_argument("--sft", metavar="DATA", help="teach it to answer: JSONL with prompt and answer, or messages")
    group.add_argument("--prefer", metavar="DATA", help="VRPO: JSONL with prompt, chosen and rejected")
    group.add_argument("--from", dest="start", metavar="RUN", help="the run or model directory to begin with")
    group.add_argument("--lora", type=int, metavar="RANK", help="train adapters, which are merged when saved")
    switch = {"action": "store_false", "default": None}
    group.add_argument("--no-eos-padding", dest="eos_padding", help="SFT: one end of text per answer", **switch)
    group.add_argument("--samples", type=int, metavar="N", help="VRPO: masking levels for each bound (default: 8)")
    group.add_argument("--masks", type=int, metavar="N", help="VRPO: masks at each of them (default: 1)")
    group.add_argument("--no-shared", dest="shared", help="VRPO: other masks for the reference", **switch)
    group.add_argument("--beta", type=float, help="VRPO: of the preference loss (default: 0.2)")
    group.add_argument("--sft-share", type=float, help="VRPO: of SFT's loss on the chosen answers (default: 0.05)")


def tuned(args: dict) -> dict:
    """The options as fields of TrainConfig: what is learned, and from which data. Raises BadInput."""
    given = {name: args.pop(name) for name in ("sft", "prefer")}
    chosen = {name: data for name, data in given.items() if data is not None}
    if not chosen:
        data = args["data"] or ["docs"]
        return args | {"data": data[0] if len(data) == 1 else tuple(data), "objective": None}
    (objective, data), *others = chosen.items()
    if args["start"] is None:
        raise BadInput(f"from: expected a run or model directory to begin {objective} with, got none; add --from RUN")
    for name in (*(other for other, _ in others), "data", "preset", "tokenizer", "length"):
        if (chosen | args).get(name) is not None:
            raise BadInput(f"{name}: expected none with --{objective}, got {(chosen | args)[name]!r}; leave it out")
    return args | {"data": data, "objective": objective}
