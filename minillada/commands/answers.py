"""Answer a file of prompts."""

import argparse
import json
import sys
from contextlib import nullcontext

from tqdm import tqdm

from ..sampler import generate
from .ask import Talker, read_prompts


def answer_file(args: argparse.Namespace, talker: Talker) -> None:
    """Write a line of JSON for every prompt in order, {"prompt": …, "answer": …}. Finished batches stay written."""
    texts = read_prompts(args.prompts)
    prompts = [talker.encode(text, f"{args.prompts}, prompt {i}") for i, text in enumerate(texts, start=1)]
    config = talker.config(args, max(map(len, prompts)))
    with open(args.out, "x", encoding="utf-8") if args.out else nullcontext(sys.stdout) as out:
        for first in tqdm(range(0, len(texts), args.batch_size), unit="batch", disable=None):
            now = slice(first, first + args.batch_size)
            answers = generate(talker.model, prompts[now], config, args.seed)
            for text, new in zip(texts[now], answers, strict=True):
                print(json.dumps({"prompt": text, "answer": talker.tokenizer.decode(new)}), file=out, flush=True)
