"""How good is a model? What a text costs it, what it writes into gaps, which option it prefers, which tasks it solves.

Each measurement is a function that gives a dictionary for JSON; the command prints it.
"""

import argparse
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import partial
from math import sqrt
from pathlib import Path
from statistics import fmean, pstdev

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from .ask import Talker, make_talker
from .canvas import Canvas
from .checkpoint import check, load
from .cli import Parser, add_sampling, newest_run, pick_device, run
from .data import opened, read_text, training_part, validation_batch
from .errors import BadInput, check_number, check_one_of, check_whole
from .files import parse_json, write_json
from .likelihood import Pair, confidence_scores, log_likelihoods, perplexity
from .sampler import SampleConfig, answer_of, stream
from .tasks import TASKS, Example, Task, make_task
from .tokenizer import Tokenizer

EXAMPLES = """examples:
  python -m minillada.evaluate runs/docs-tiny-1 --file docs --held-out       nats and bits of the validation text
  python -m minillada.evaluate runs/docs-tiny-1 --infill book.txt --hide 0.3
  python -m minillada.evaluate runs/add-1 --task addition --n 500 --remasking margin
  python -m minillada.evaluate GSAI-ML/LLaDA-8B-Base --choices questions.jsonl --scoring confidence
"""
SCORINGS = ("bound", "confidence")


def mean_of(values: Sequence[float]) -> dict:
    """Their mean with its standard error, as of independent values."""
    error = pstdev(values) / sqrt(max(len(values) - 1, 1))
    return {"accuracy": fmean(values), "standard_error": error, "n": len(values)}


def bar(rows: Iterable, what: str) -> Iterable:
    """The rows, with a progress bar on a terminal."""
    return tqdm(rows, desc=what, disable=None)


def batches(rows: Sequence, size: int, what: str) -> Iterable[Sequence]:
    return bar([rows[first : first + size] for first in range(0, len(rows), size)], what)


def complete(model: nn.Module, canvas: Canvas, config: SampleConfig, seed: int) -> tuple[torch.Tensor, int]:
    """The filled canvas (B,T) and how many evaluations that took."""
    nfe, x = 0, canvas.x
    for step in stream(model, canvas, config, seed):
        x, nfe = step.x, step.nfe
    return x, nfe


# ---- a text


def measure_text(model: nn.Module, tokenizer: Tokenizer, text: str, **options) -> dict:
    """`perplexity` of a text, with its options; every figure is an upper bound."""
    found = perplexity(model, text, tokenizer, progress=partial(bar, what="perplexity"), **options)
    derived = {name: getattr(found, name) for name in ("perplexity", "bits_per_character", "bits_per_byte")}
    unknown = {} if options.get("n_samples") != 1 else {"standard_error": None}
    return {**found._asdict(), **derived, **unknown}


# ---- gaps


def measure_infilling(
    model: nn.Module,
    tokens: Sequence[int],
    config: SampleConfig,
    length: int,
    n: int = 100,
    hide: float = 0.15,
    seed: int = 0,
    batch_size: int = 8,
) -> dict:
    """Of n evenly spaced windows of the text this share of the tokens is hidden, at random: how many are written as
    they were? Nothing but the window is seen."""
    check_number("hide", hide, 1e-9, 1.0)
    check_whole("n", n, 1)
    x0 = validation_batch(np.array(tokens), n, length)  # (n,T)
    holes = max(1, round(hide * length))
    order = torch.rand(x0.shape, generator=torch.Generator().manual_seed(seed)).argsort(1).argsort(1)
    hidden, right, evaluations = order < holes, [], []
    for rows in batches(torch.arange(n), batch_size, "infilling"):
        clean, holes_here = x0[rows], hidden[rows]
        masked = clean.masked_fill(holes_here, model.config.mask_id).tolist()
        canvas = Canvas.infill(masked, model.config, next(model.parameters()).device)
        x, nfe = complete(model, canvas, config, seed)
        right += ((x.cpu() == clean) & holes_here).sum(1).tolist()
        evaluations.append(nfe)
    result = mean_of([count / holes for count in right])
    return {**result, "hidden": holes, "length": length, "evaluations": fmean(evaluations)}


# ---- options


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> Pair:
    """The ids of two texts that follow each other, encoded as one; blanks between them belong to the continuation."""
    text, context = context + continuation, context.rstrip()
    before, whole = tokenizer.encode_batch([context, text])
    return before, whole[len(before) :]


def score_options(
    model: nn.Module,
    pairs: Sequence[Pair],
    scoring: str = "bound",
    n_samples: int = 128,
    seed: int = 0,
    batch_size: int = 32,
    cfg_scale: float = 0.0,
) -> list[float]:
    """A number for each, the higher the likelier: the bound of its log-likelihood, or `confidence_scores`."""
    check_one_of("scoring", scoring, SCORINGS)
    rows = bar(pairs, "options")
    if scoring == "confidence":
        return confidence_scores(model, rows, batch_size, cfg_scale)[0].tolist()
    return log_likelihoods(model, rows, n_samples, seed, batch_size, cfg_scale)[0].tolist()


def measure_choices(model: nn.Module, tokenizer: Tokenizer, items: Sequence[dict], **options) -> dict:
    """How often the right one of several options is likeliest; also with each score divided by the option's characters.

    items: {"prompt", "options", "answer": the right one's number from 0}; options: of `score_options`.
    """
    pairs = [encode_pair(tokenizer, item["prompt"], option) for item in items for option in item["options"]]
    scores = iter(score_options(model, pairs, **options))
    plain, even = [], []
    for item in items:
        mine = [(next(scores), len(option)) for option in item["options"]]
        plain.append(float(max(range(len(mine)), key=lambda i: mine[i][0]) == item["answer"]))
        even.append(float(max(range(len(mine)), key=lambda i: mine[i][0] / mine[i][1]) == item["answer"]))
    return {**mean_of(plain), "accuracy_per_character": fmean(even)}


def read_choices(path: Path) -> list[dict]:
    """Raises BadInput with the number of the line, BadLuck."""
    items = []
    with opened(path) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            what = f"{path}, line {number}"
            item = parse_json(line, what)
            options, answer = item.get("options"), item.get("answer")
            texts = [item.get("prompt"), *(options if isinstance(options, list) else [None])]
            if not all(isinstance(text, str) for text in texts) or len(texts) < 3 or "" in texts[1:]:
                raise BadInput(f'{what}: expected a "prompt" and at least two "options", got others; mend the line')
            check_whole(f"{what}, answer", answer, 0, len(options) - 1)
            items.append(item)
    if not items:
        raise BadInput(f"{path}: expected a question in each line, got nothing; write some")
    return items


# ---- tasks


def canvas_of(talker: Talker, examples: Sequence[Example], gen_len: int) -> tuple[Canvas, list[slice]]:
    """The canvas of a few questions, all with gaps or none, and the columns of each answer.

    A prompt begins a line, as in the text it was learned from; to an instruct model it is a message. A gap has as many
    holes as the answer has tokens.
    """
    c, device = talker.model.config, next(talker.model.parameters()).device
    if not examples[0].after:
        prompts = [talker.encode(e.prompt if talker.instruct else f"\n{e.prompt}") for e in examples]
        return Canvas.continuation(prompts, gen_len, c, device), [slice(max(map(len, prompts)), None)] * len(prompts)
    texts = [talker.tokenizer.encode_batch([f"\n{e.prompt}", e.answer, e.after]) for e in examples]
    rows = [[*before, *[c.mask_id] * len(answer), *after] for before, answer, after in texts]
    spans = [slice(len(before), len(before) + len(answer)) for before, answer, _ in texts]
    return Canvas.infill(rows, c, device), spans


def measure_task(
    talker: Talker, task: Task, config: SampleConfig, seed: int = 0, batch_size: int = 8
) -> tuple[dict, list[dict]]:
    """How much of a task's test is answered rightly, by kind of question too; and all answers."""
    scores, records, evaluations = {}, [], []
    groups = [[e for e in task.test if bool(e.after) == gap] for gap in (False, True)]
    for batch in (batch for group in groups for batch in batches(group, batch_size, task.name)):
        canvas, spans = canvas_of(talker, batch, config.gen_len)
        x, nfe = complete(talker.model, canvas, config, seed)
        evaluations.append(nfe)
        for example, row, span in zip(batch, x.tolist(), spans, strict=True):
            written = talker.tokenizer.decode(answer_of(row[span], config, talker.model.config))
            score = task.check(example, written)
            scores.setdefault(example.kind, []).append(score)
            records.append({**example._asdict(), "written": written, "score": score})
    result = mean_of([score for kind in scores.values() for score in kind])
    if len(scores) > 1:
        result["kinds"] = {kind: mean_of(values) for kind, values in sorted(scores.items())}
    return {**result, "evaluations": fmean(evaluations)}, records


def answer_length(talker: Talker, task: Task) -> int:
    """Tokens of the longest answer with its line end."""
    return max(len(talker.tokenizer.encode(f"{example.answer}\n")) for example in task.test)


# ---- the command


def options() -> Parser:
    p = Parser(__doc__, EXAMPLES)
    p.add_argument("run", nargs="?", help="a run directory, or any model directory or id (default: the newest run)")
    what = p.add_mutually_exclusive_group(required=True)
    what.add_argument("--file", metavar="TEXT", help="perplexity of a text: a file, a directory, or docs, tales, ...")
    what.add_argument("--infill", metavar="TEXT", help="hide tokens of a text and write them again")
    what.add_argument("--choices", metavar="JSONL", type=Path, help="questions with prompt, options and answer")
    what.add_argument("--task", metavar="NAME", help=f"a toy task: {', '.join(TASKS)}; addition:3")
    p.add_argument("--held-out", action="store_true", help="only the last tenth of the text, on which none is trained")
    p.add_argument("--limit", type=int, help="only the first characters of the text, so many")
    p.add_argument("--window", type=int, help="tokens seen at a time (default: what the model can)")
    p.add_argument("--stride", type=int, help="tokens predicted at a time (default: half a window)")
    p.add_argument("--samples", type=int, help="masks per stride or option (default: 8 for a text, else 128)")
    p.add_argument("--hide", type=float, default=0.15, help="the share of tokens that --infill hides (default: 0.15)")
    p.add_argument("--scoring", default="bound", help="of options: bound or confidence (default: bound)")
    p.add_argument("--n", type=int, default=200, help="windows to fill or questions to ask (default: 200)")
    p.add_argument("--batch-size", type=int, default=16, help="rows at a time (default: 16)")
    p.add_argument("--raw", action="store_true", help="a prompt is plain text, even to an instruct model")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    p.add_argument("--out", type=Path, metavar="FILE", help="a new file for the result, and the answers to a task")
    p.set_defaults(chat=False)
    add_sampling(p)
    return p


def text_of(args: argparse.Namespace, source: str) -> str:
    text = "".join(read_text(source))
    text = text[training_part(len(text)) :] if args.held_out else text
    return text if args.limit is None else text[: args.limit]


def measure(args: argparse.Namespace, talker: Talker) -> dict:
    """Do what the options say."""
    model, tokenizer = talker.model, talker.tokenizer
    draws = {"seed": args.seed, "batch_size": args.batch_size}
    if args.file is not None or args.choices is not None:
        draws["cfg_scale"] = args.cfg_scale or 0.0
        draws |= {} if args.samples is None else {"n_samples": args.samples}
    if args.file is not None:
        text = text_of(args, args.file)
        return measure_text(model, tokenizer, text, window=args.window, stride=args.stride, **draws)
    if args.choices is not None:
        return measure_choices(model, tokenizer, read_choices(args.choices), scoring=args.scoring, **draws)
    if args.infill is not None:
        length = min(model.config.max_len, 128) if args.window is None else args.window
        check_whole("window", length, 1, model.config.max_len)
        if args.gen_len or args.block_len:
            raise BadInput("infill: expected neither --gen-len nor --block-len, the holes decide; leave them out")
        whole = {"gen_len": length, "block_len": length, "ban_eos": True, "stop_at_eos": False}
        config = talker.config(args, 0, **whole)
        tokens = tokenizer.encode(text_of(args, args.infill))
        return measure_infilling(model, tokens, config, length, args.n, args.hide, **draws)
    task = make_task(args.task, 0, args.seed, args.n)
    longest = max(len(talker.encode(e.prompt or "\n")) for e in task.test) + 1
    config = talker.config(args, longest, gen_len=answer_length(talker, task))
    result, records = measure_task(talker, task, config, **draws)
    return {**result, "sampler": asdict(config), "answers": records}


def main() -> None:
    args = options().parse_args()
    check_whole("batch_size", args.batch_size, 1)
    check_whole("n", args.n, 1)
    check_whole("seed", args.seed, 0, 2**63 - 1)
    if args.limit is not None:
        check_whole("limit", args.limit, 1)
    check_one_of("scoring", args.scoring, SCORINGS)
    if args.out is not None and args.out.exists():
        raise BadInput(f"out: expected a new file, got {args.out}, which exists; give another")
    device = pick_device(args.device)
    name = args.run or str(newest_run())
    found = check(name)
    model, tokenizer = load(found.directory, device)
    talker = make_talker(found.directory, name, model, tokenizer, args)
    begin = time.perf_counter()
    result = {"model": name, "what": args.file or args.infill or str(args.choices or args.task)}
    result |= measure(args, talker) | {"seed": args.seed, "seconds": round(time.perf_counter() - begin, 2)}
    if args.out is not None:
        write_json(args.out, result)
    print(json.dumps({key: value for key, value in result.items() if key != "answers"}, indent=2))


if __name__ == "__main__":
    run(main)
