"""Measure a model: what a text costs it, what it writes into gaps, which option it prefers, which tasks it solves."""

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path

from ..errors import BadInput, check_one_of, check_whole
from ..files import write_json
from ..measure import evaluate
from ..text.corpora import read_text, training_part
from ..text.tasks import TASKS, make_task
from ..weights.checkpoint import load, reading
from ..weights.device import pick_device
from .ask import Talker, make_talker
from .cli import Parser, add_sampling, here, on_hub

EXAMPLES = """examples:
  python -m minillada evaluate runs/docs-tiny-1 --file docs --held-out
                                      nats and bits of the validation text
  python -m minillada evaluate tales --infill book.txt --hide 0.3
  python -m minillada evaluate sudoku4 --task sudoku4 --n 100
  python -m minillada evaluate runs/add-1 --task addition --remasking margin
  python -m minillada evaluate GSAI-ML/LLaDA-8B-Base --scoring confidence \\
                                      --choices questions.jsonl
"""


def options() -> Parser:
    """Return the parser of the command's options."""
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
    """Read the text, or the part of it that the options ask for."""
    text = "".join(read_text(source))
    text = text[training_part(len(text)) :] if args.held_out else text
    return text if args.limit is None else text[: args.limit]


def measure(args: argparse.Namespace, talker: Talker) -> dict:
    """Take the measurement that the options ask for; return a dictionary for JSON."""
    model, tokenizer = talker.model, talker.tokenizer
    draws = {"seed": args.seed, "batch_size": args.batch_size}
    if args.file is not None or args.choices is not None:
        draws |= {"cfg_scale": args.cfg_scale or 0.0} | ({} if args.samples is None else {"n_samples": args.samples})
    if args.file is not None:
        text = text_of(args, args.file)
        return evaluate.measure_text(model, tokenizer, text, window=args.window, stride=args.stride, **draws)
    if args.choices is not None:
        items = evaluate.read_choices(args.choices)
        return evaluate.measure_choices(model, tokenizer, items, scoring=args.scoring, **draws)
    if args.infill is not None:
        length = min(model.config.max_len, 128) if args.window is None else args.window
        check_whole("window", length, 1, model.config.max_len)
        if args.gen_len or args.block_len:
            raise BadInput(
                "infill: expected neither --gen-len nor --block-len, got one; the holes decide, so leave it out"
            )
        config = talker.config(args, 0, gen_len=length, block_len=length, ban_eos=True, stop_at_eos=False)
        tokens = tokenizer.encode(text_of(args, args.infill))
        return evaluate.measure_infilling(model, tokens, config, length, args.n, args.hide, **draws)
    task, encode = make_task(args.task, 0, args.seed, args.n), talker.encode if talker.instruct else None
    longest = max(len(talker.encode(e.prompt or "\n")) for e in task.test) + 1
    config = talker.config(args, longest, gen_len=evaluate.answer_length(tokenizer, task))
    result, records = evaluate.measure_task(model, tokenizer, task, config, encode, **draws)
    return {**result, "sampler": asdict(config), "answers": records}


def main() -> None:
    """Read the options, load the model, measure, and print the result as JSON."""
    args = options().parse_args()
    for name in ("batch_size", "n") if args.limit is None else ("batch_size", "n", "limit"):
        check_whole(name, getattr(args, name), 1)
    check_whole("seed", args.seed, 0, 2**63 - 1)
    check_one_of("scoring", args.scoring, evaluate.SCORINGS)
    if args.out is not None and args.out.exists():
        raise BadInput(f"out: expected a new file, got {args.out}, which exists; give another")
    device = pick_device(args.device)
    name = here(args.run, on_hub(args.run or ""))
    talker = reading(name, lambda directory: make_talker(directory, name, *load(directory, device), args))
    begin = time.perf_counter()
    result = {"model": name, "what": args.file or args.infill or str(args.choices or args.task)}
    result |= measure(args, talker) | {"seed": args.seed, "seconds": round(time.perf_counter() - begin, 2)}
    if args.out is not None:
        write_json(args.out, result)
    print(json.dumps({key: value for key, value in result.items() if key != "answers"}, indent=2))
