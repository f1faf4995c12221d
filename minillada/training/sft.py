"""Supervised fine-tuning (SFT): pre-training on dialogues, in which the prompt is never masked (LLaDA, eq. 5).

    {"prompt": "12+34=", "answer": "46"}                                    a line of the JSONL file, or
    {"messages": [{"role": "user", "content": "12+34="}, {"role": "assistant", "content": "46"}, ...]}

A line may have an "image" too, the name of a file beside the JSONL file or below it: a picture that stands in front of
what the user says first. The model must be one that sees (weights/vision.py), and its tower learns with it.

A dialogue of n answers has n turns, (everything before an answer, the answer); every visit takes one of them at random.
A row is what the chat template makes of the prompt, then the answer and an end of text. Rows are filled up to the
longest of their batch with more ends of text, which are part of the answer, masked and predicted: so a model learns how
long answers are. Without eos_padding they are filled up with PADDING, which is neither seen nor predicted.
Shapes: B rows, T sequence.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, count, islice
from pathlib import Path

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..diffusion import PROCESSES, Noised, lengths
from ..errors import BadInput, BadLuck
from ..files import confined, hash_file
from ..measure.blocks import attention, block_levels, bound, noise_blocks
from ..measure.likelihood import Pair, log_likelihoods
from ..model import ModelConfig
from ..text.chat import MARKERS, ROLES, ChatTemplate, Message
from ..text.corpora import records
from ..text.ids import Tokens, digest_of
from ..text.tokenizer import Tokenizer
from ..weights.pictures import Tiles, n_patches, open_picture, tile
from ..weights.tower import Vision
from .config import SFTConfig, TunedConfig
from .edits import with_errors
from .optim import evaluation
from .pretraining import losses_by_part

PADDING = -1  # in a row: no token
# For tokenizers without a chat's markers: the texts as they are, an end of text behind every answer.
PLAIN = "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
Turn = tuple[list[Message], str]  # what stands before an answer, the answer
Item = list[Pair]  # the turns of a dialogue, or two answers to the same prompt


def text_of(record: dict, key: str) -> str:
    """Return the text of a key, without the space around it, as chat templates do. Raises BadInput for none."""
    text = record.get(key)
    if not isinstance(text, str) or not text.strip():
        got = "none" if text is None else "an empty one" if isinstance(text, str) else type(text).__name__
        raise BadInput(f'expected a text "{key}", got {got}; add "{key}": "..." to that line')
    return text.strip()


def dialogue(record: dict) -> list[Turn]:
    """Return every answer of a dialogue, with what stands before it. Raises BadInput."""
    if "messages" not in record:
        return [([{"role": "user", "content": text_of(record, "prompt")}], text_of(record, "answer"))]
    found = record["messages"]
    if not isinstance(found, list) or not all(isinstance(m, dict) and m.get("role") in ROLES for m in found):
        raise BadInput(f'expected "messages" with a role of {", ".join(ROLES)} each, got others; change those roles')
    messages = [{"role": message["role"], "content": text_of(message, "content")} for message in found]
    turns = [(messages[:i], m["content"]) for i, m in enumerate(messages) if m["role"] == "assistant"]
    if not turns:
        raise BadInput("expected an answer of the assistant, got none; add one to that line")
    return turns


def teach(directory: str | Path, tokenizer: Tokenizer) -> ChatTemplate:
    """Return the chat template to train with: the directory's, else LLaDA's or, where its markers lack, PLAIN."""
    template = ChatTemplate.load(directory, tokenizer)
    if template.own or all(tokenizer.inner.token_to_id(marker) is not None for marker in MARKERS):
        return template
    return replace(template, source=PLAIN, own=True)


@dataclass(frozen=True)
class Items(Tokens):
    """Hold the lines of a file as ids; the last tenth of them validates."""

    learned: list[Item]
    held: list[Item]
    longest: int  # tokens of the longest row
    album: Sequence[Tiles] = ()  # the pictures that are part of prompts

    @property
    def prompt(self) -> list[int]:
        """Return the first prompt that is not trained on."""
        return self.held[0][0][0]


def encode(turns: Iterable[Turn], template: ChatTemplate, c: ModelConfig) -> Item:
    """Return the ids of some turns, an end of text behind every answer. Raises BadInput."""
    pairs = [(template.encode_chat(before), [*template.tokenizer.encode(answer), c.eos_id]) for before, answer in turns]
    if (size := max(len(prompt) + len(answer) for prompt, answer in pairs)) > c.max_len:
        raise BadInput(f"expected at most {c.max_len} tokens of prompt, answer and end of text, got {size}; shorten it")
    return pairs


class Album:
    """Collect the pictures of a JSONL file, each once, whatever number of lines it is in."""

    def __init__(self, directory: Path, c: ModelConfig, vision: Vision | None) -> None:
        self.directory, self.vision, self.end = directory, vision, c.embedding_size
        self.pictures: list[Tiles] = []
        self.ids: dict[Path, range] = {}  # of the patches of each
        self.hashes: list[dict] = []  # of the files

    def add(self, turns: list[Turn], name: str) -> list[Turn]:
        """Put a picture in front of what a user says first. Raises BadInput, BadLuck."""
        if self.vision is None:
            raise BadInput(f"image: expected none, as the model only reads, got {name!r:.60}; begin with one that sees")
        path = confined(self.directory, name, deep=True)
        if path not in self.ids:
            tiles = tile(open_picture(path), self.vision.image_size, self.vision.aspect, self.vision.grids)
            self.ids[path] = range(self.end, self.end + n_patches(tiles, self.vision.side))
            self.end = self.ids[path].stop
            self.pictures.append(tiles)
            self.hashes.append(hash_file(path))
        first = next((i for i, m in enumerate(turns[0][0]) if m["role"] == "user"), None)
        if first is None:
            raise BadInput("image: expected a message of the user before an answer, got none; add one to that line")
        picture = {"image": self.ids[path]}
        return [([*b[:first], b[first] | picture, *b[first + 1 :]], answer) for b, answer in turns]


def read_items(
    path: str | Path, template: ChatTemplate, c: ModelConfig, turns_of: Callable = dialogue,
    vision: Vision | None = None,
) -> Items:  # fmt: skip
    """Read a JSONL file for a model; vision: of one that sees. Raises BadInput, which names the line, and BadLuck."""
    if c.eos_id is None:
        raise BadInput("model: expected one with an end of text, got none; begin with a model that has an eos_id")
    if not Path(path).is_file():
        raise BadLuck(f"data: expected a JSONL file, got {path}; give the path of one")
    items, album = [], Album(Path(path).parent, c, vision)
    for where, record in records(Path(path)):
        try:
            if not isinstance(record, dict):
                raise BadInput(f"expected an object, got {type(record).__name__}; write {{...}} in that line")
            turns = turns_of(record)
            turns = album.add(turns, record["image"]) if "image" in record else turns
            items.append(encode(turns, template, c))
        except (BadInput, BadLuck) as error:  # noqa: PERF203
            raise type(error)(f"{where}: {error}") from None
    if len(items) < 2:
        raise BadInput(f"{path}: expected two lines or more, to learn from and to validate, got {len(items)}; add some")
    n_held = max(1, len(items) // 10)
    return gather(items[:-n_held], items[-n_held:], template, album.hashes, album=album.pictures)


def gather(
    learned: list[Item], held: list[Item], template: ChatTemplate, hashes: Sequence = (), kind: type[Items] = Items,
    **more,
) -> Items:  # fmt: skip
    """Return items as a run's text; hashes: of further files. `more` are further fields of this kind of Items."""
    items, tokenizer = learned + held, template.tokenizer
    longest = max(len(prompt) + len(answer) for item in items for prompt, answer in item)
    flat = lambda part: np.fromiter((id for item in part for pair in item for ids in pair for id in ids), np.int64)
    answers = [answer for item in held for _, answer in item]
    texts, n = [tokenizer.decode(answer) for answer in answers], sum(map(len, answers))
    characters, size = sum(map(len, texts)) / n, sum(len(text.encode()) for text in texts) / n
    digest = digest_of(tokenizer)
    digest.update(json.dumps([template.source, items, *hashes]).encode())
    held_in = (flat(learned), flat(held), characters, size, digest.hexdigest(), learned, held, longest)
    return kind(*held_in, **more)


def visits(n: int, seed: int, start: int) -> Iterator[tuple[int, float]]:
    """Yield for ever, from visit number `start` on: which of n items, and a number in [0,1) to choose a turn with.
    Visit k depends on the seed and on k alone. An epoch is every item once, in random order."""
    epoch, taken = divmod(start, n)
    for number in count(epoch):
        rng = np.random.default_rng((seed, number))
        yield from islice(zip(rng.permutation(n).tolist(), rng.random(n).tolist(), strict=True), taken, None)
        taken = 0


def stack(pairs: Sequence[Pair], fill: int) -> tuple[Tensor, Tensor]:
    """Return rows x0 (B,T) filled up to the longest, and maskable (B,T): their answers, and `fill` unless PADDING.
    ([1], [2]) and ([3, 4], [5]) with fill 9 -> [[1, 2, 9], [3, 4, 5]], [[F, T, T], [F, F, T]]."""
    x0 = pad_sequence([torch.tensor([*prompt, *answer]) for prompt, answer in pairs], True, fill)
    start = torch.tensor([len(prompt) for prompt, _ in pairs])
    return x0, (torch.arange(x0.shape[1]) >= start[:, None]) & (x0 != PADDING)


def per_answer(noised: Noised, maskable: Tensor) -> Noised:
    """Return noise with weights that make `row_loss` SFT's loss: a mean over rows, of sums over an answer's length."""
    length = lengths(maskable, maskable)
    length = length if noised.weight.dim() == 1 else length[:, None]
    return noised._replace(weight=noised.weight * maskable.shape[1] / length)


def row_bounds(model: nn.Module, x0: Tensor, noised: Noised, block: int = 0) -> Tensor:
    """Return the bound of every row (B,) in nats. PADDING is hidden from attention; any id stands in for it."""
    seen = noised._replace(xt=noised.xt.clamp(min=0))
    return bound(model, x0.clamp(min=0), seen, attention(x0 != PADDING), block)


def row_loss(model: nn.Module, x0: Tensor, noised: Noised, block: int = 0) -> Tensor:
    """Do what `pretraining_loss` does, for rows with PADDING."""
    return row_bounds(model, x0, noised, block).mean() / x0.shape[1]


def item_batches(items: Items, config: TunedConfig, start: int) -> Iterator[list[tuple[Item, float]]]:
    """Yield the items of batches for ever, from number `start` on, each with a number to choose a turn with."""
    stream = visits(len(items.learned), config.seed, start * config.batch_size)
    while True:
        yield [(items.learned[i], chance) for i, chance in islice(stream, config.batch_size)]


class SFT:
    """Predict the hidden tokens of answers."""

    def __init__(self, items: Items, config: SFTConfig, c: ModelConfig) -> None:
        self.items, self.config, self.mask_id, self.block = items, config, c.mask_id, c.block
        self.vocab_size = c.vocab_size
        self.fill = c.eos_id if config.eos_padding else PADDING
        self.numbers: dict = {}

    def batches(self, start: int) -> Iterator[list[Pair]]:
        """Yield batches of turns for ever, from number `start`."""
        for batch in item_batches(self.items, self.config, start):
            yield [item[int(chance * len(item))] for item, chance in batch]

    def noise(self, batch: list[Pair], rng: Generator) -> tuple[Tensor, Noised]:
        """Return x0 (B,T) and its noise, weighed for SFT."""
        x0, maskable = stack(batch, self.fill)
        t, process = block_levels(x0, self.block, rng), PROCESSES[self.config.process]
        noised = noise_blocks(x0, self.mask_id, t, rng, self.block, maskable, process)
        if self.config.errors:
            noised = with_errors(x0, noised, self.config.errors, self.vocab_size, self.mask_id, rng, maskable)
        return x0, per_answer(noised, maskable)

    def losses(self, model: nn.Module, batch: list[Pair], rng: Generator) -> Iterator[Tensor]:
        """Yield this process's parts of the bound, in nats per token of an answer."""
        loss = partial(row_loss, block=self.block)
        yield from losses_by_part(loss, model, *self.noise(batch, rng), self.config)

    def validate(self, model: nn.Module) -> dict:
        """Return {"bound": nats per character} of 128 held-out answers at most, with 2 masks each, always the same."""
        pairs = list(islice(chain.from_iterable(self.items.held), 128))
        with evaluation(self.config):
            values, _ = log_likelihoods(model, pairs, n_samples=2)
        tokens = sum(len(answer) for _, answer in pairs)
        return {"bound": -values.sum().item() / tokens / self.items.characters_per_token}
