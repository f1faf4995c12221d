"""Measure a model on a text, gaps in a text, questions with options, and toy tasks; return dictionaries for JSON."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from math import sqrt
from pathlib import Path
from statistics import fmean, pstdev

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from ..errors import BadInput, check_number, check_one_of, check_whole
from ..sampler import Canvas, SampleConfig, answer_of, stream
from ..text.corpora import records
from ..text.ids import validation_batch
from ..text.tasks import Example, Task
from ..text.tokenizer import Tokenizer
from .likelihood import Ids, Pair, confidence_scores, log_likelihoods, perplexity

SCORINGS = ("bound", "confidence")
Encode = Callable[[str], Ids]  # turns a prompt into ids


def mean_of(values: Sequence[float]) -> dict:
    """Return the mean of independent values, its standard error and their number."""
    error = pstdev(values) / sqrt(max(len(values) - 1, 1))
    return {"accuracy": fmean(values), "standard_error": error, "n": len(values)}


def bar(rows: Sequence, what: str, disable: bool = False) -> Iterable:
    """Return the rows, with a progress bar on a terminal."""
    return tqdm(rows, desc=what, disable=disable or not len(rows) or None)


def batches(rows: Sequence, size: int, what: str) -> Iterable[Sequence]:
    """Cut the rows into batches of at most `size`, with a progress bar."""
    return bar([rows[first : first + size] for first in range(0, len(rows), size)], what)


def complete(model: nn.Module, canvas: Canvas, config: SampleConfig, seed: int) -> tuple[torch.Tensor, int]:
    """Return the filled canvas (B,T) and how many evaluations it took."""
    x, nfe = canvas.x, 0
    for step in stream(model, canvas, config, seed):
        x, nfe = step.x, step.nfe
    return x, nfe


def measure_text(model: nn.Module, tokenizer: Tokenizer, text: str, **options) -> dict:
    """Measure the `perplexity` of a text, with the options of that function; every figure is an upper bound."""
    found = perplexity(model, text, tokenizer, progress=partial(bar, what="perplexity"), **options)
    derived = {name: getattr(found, name) for name in ("perplexity", "bits_per_character", "bits_per_byte")}
    return found._asdict() | derived | ({"standard_error": None} if options.get("n_samples") == 1 else {})


def measure_infilling(
    model: nn.Module, tokens: Ids, config: SampleConfig, length: int,
    n: int = 100, hide: float = 0.15, seed: int = 0, batch_size: int = 8,
) -> dict:  # fmt: skip
    """Hide a random share of the tokens in n evenly spaced windows of a text, each `length` tokens and all that the
    model sees; measure how many are written right."""
    check_number("hide", hide, 1e-9, 1.0)
    check_whole("n", n, 1)
    x0 = validation_batch(np.array(tokens), n, length)  # (n,T)
    holes = max(1, round(hide * length))
    order = torch.rand(x0.shape, generator=torch.Generator().manual_seed(seed)).argsort(1).argsort(1)
    hidden, right, evaluations = order < holes, [], []
    xt = x0.masked_fill(hidden, model.config.mask_id)
    for rows in batches(torch.arange(n), batch_size, "infilling"):
        canvas = Canvas.infill(xt[rows].tolist(), model.config, next(model.parameters()).device)
        x, nfe = complete(model, canvas, config, seed)
        right += ((x.cpu() == x0[rows]) & hidden[rows]).sum(1).tolist()
        evaluations.append(nfe)
    found = {"hidden": holes, "length": length, "evaluations": fmean(evaluations)}
    return mean_of([count / holes for count in right]) | found


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> Pair:
    """Encode two texts as one and cut the ids where the first ends; blanks between them belong to the continuation."""
    text, context = context + continuation, context.rstrip()
    before, whole = tokenizer.encode_batch([context, text])
    return before, whole[len(before) :]


def score_options(
    model: nn.Module, pairs: Sequence[Pair], scoring: str = "bound", n_samples: int = 128, seed: int = 0, **options
) -> list[float]:
    """Return a score for each pair, higher for a likelier one: a bound of log p, or one of `confidence_scores`."""
    check_one_of("scoring", scoring, SCORINGS)
    rows = bar(pairs, "options")
    if scoring == "confidence":
        return confidence_scores(model, rows, **options)[0].tolist()
    return log_likelihoods(model, rows, n_samples, seed, **options)[0].tolist()


def measure_choices(model: nn.Module, tokenizer: Tokenizer, items: Sequence[dict], **options) -> dict:
    """Measure how often the right option is the likeliest, also with each score divided by the option's characters.
    items: {"prompt", "options", "answer": the number of the right one, from 0}. options: of `score_options`."""
    pairs = [encode_pair(tokenizer, item["prompt"], option) for item in items for option in item["options"]]
    scores = iter(score_options(model, pairs, **options))
    plain, even = [], []
    for item in items:
        mine = [next(scores) for _ in item["options"]]
        shared = [score / len(option) for score, option in zip(mine, item["options"], strict=True)]
        plain.append(float(mine.index(max(mine)) == item["answer"]))
        even.append(float(shared.index(max(shared)) == item["answer"]))
    return {**mean_of(plain), "accuracy_per_character": fmean(even)}


def read_choices(path: Path) -> list[dict]:
    """Read questions from JSON lines. Raises BadInput with the number of the line, BadLuck."""
    items = []
    for where, item in records(path):
        item = item if isinstance(item, dict) else {}
        options = item.get("options") if isinstance(item.get("options"), list) else []
        texts = [item.get("prompt"), *options]
        if not all(isinstance(text, str) for text in texts) or len(options) < 2 or "" in options:
            raise BadInput(f'{where}: expected a "prompt" and two or more "options", got others; add them')
        check_whole(f"{where}, answer", item.get("answer"), 0, len(options) - 1)
        items.append(item)
    if not items:
        raise BadInput(f"{path}: expected a question in each line, got nothing; write one JSON object in a line")
    return items


def canvas_of(
    model: nn.Module, tokenizer: Tokenizer, encode: Encode, examples: Sequence[Example], gen_len: int
) -> tuple[Canvas, list[slice]]:
    """Make the canvas of a few questions, all with gaps or none; return it with the columns of each answer. A gap has
    as many holes as the answer has tokens."""
    c, device = model.config, next(model.parameters()).device
    if not examples[0].after:
        prompts = [encode(example.prompt) for example in examples]
        canvas = Canvas.continuation(prompts, gen_len, c, device)
        starts = (canvas.x == c.mask_id).long().argmax(1).tolist()
        return canvas, [slice(start, start + gen_len) for start in starts]
    texts = [tokenizer.encode_batch([f"\n{e.prompt}", e.answer, e.after]) for e in examples]
    rows = [[*before, *[c.mask_id] * len(answer), *after] for before, answer, after in texts]
    spans = [slice(len(before), len(before) + len(answer)) for before, answer, _ in texts]
    return Canvas.infill(rows, c, device), spans


def measure_task(
    model: nn.Module, tokenizer: Tokenizer, task: Task, config: SampleConfig,
    encode: Encode | None = None, seed: int = 0, batch_size: int = 8,
) -> tuple[dict, list[dict]]:  # fmt: skip
    """Measure how much of a task's test is answered rightly, by kind of question too; return that and all answers.
    Unless there is an `encode`, a prompt begins a line, as in the text that a task is learned from."""
    encode = encode or (lambda prompt: tokenizer.encode(f"\n{prompt}"))
    scores, records, evaluations = {}, [], []
    groups = [[e for e in task.test if bool(e.after) == gap] for gap in (False, True)]
    for batch in (batch for group in groups for batch in batches(group, batch_size, task.name)):
        canvas, spans = canvas_of(model, tokenizer, encode, batch, config.gen_len)
        x, nfe = complete(model, canvas, config, seed)
        evaluations.append(nfe)
        for example, row, span in zip(batch, x.tolist(), spans, strict=True):
            written = tokenizer.decode(answer_of(row[span], config, model.config))
            score = task.check(example, written)
            scores.setdefault(example.kind, []).append(score)
            records.append({**example._asdict(), "written": written, "score": score})
    result = mean_of([score for kind in scores.values() for score in kind])
    if len(scores) > 1:
        result["kinds"] = {kind: mean_of(values) for kind, values in sorted(scores.items())}
    return {**result, "evaluations": fmean(evaluations)}, records


def answer_length(tokenizer: Tokenizer, task: Task) -> int:
    """Return the tokens of the longest answer with its line end."""
    return max(len(tokenizer.encode(f"{example.answer}\n")) for example in task.test)
