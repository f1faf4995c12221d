"""Run the published models of the LLaDA family, from a directory or the hub, with the code you have just read."""

import os
import signal
import sys
import time
from argparse import Namespace
from pathlib import Path

if __name__ == "__main__":  # importing PyTorch takes seconds
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # Ctrl-C ends it at once; `run` listens later
    if sys.stderr and sys.stderr.isatty():
        print("loading…", end="\r", file=sys.stderr, flush=True)

import torch
from tqdm import tqdm

from minillada.commands.ask import (
    DTYPES,
    add_questions,
    answer_file,
    defaults_of,
    files_of,
    make_talker,
    on_llama_cpp,
    parse,
    question,
    show,
    usual_of,
)
from minillada.commands.chat import chat
from minillada.commands.cli import Parser, here, on_hub, run, tell
from minillada.errors import BadInput, check_one_of
from minillada.sampler import Model, stream
from minillada.text.chat import ChatTemplate
from minillada.text.tokenizer import Tokenizer
from minillada.weights.checkpoint import Report, check, expect_tokenizer, load
from minillada.weights.convert import home_of, is_gguf
from minillada.weights.device import pick_device, slow_experts
from minillada.weights.hub import fetch
from minillada.weights.quantize import kinds, memory, quantize
from minillada.weights.vision import sees

EXAMPLES = """examples:
  python load_8b.py tales --prompt "Once upon a time"      without a network
  python load_8b.py GSAI-ML/LLaDA-8B-Instruct --check
  python load_8b.py GSAI-ML/LLaDA-8B-Instruct --chat
  python load_8b.py GSAI-ML/LLaDA-8B-Instruct --chat --quantize int4
  python load_8b.py llada.gguf --chat --threads 4          on llama.cpp
  python load_8b.py GSAI-ML/LLaDA-8B-Base --prompt "The capital of France is"
  python load_8b.py path/to/LLaDA-V --image photo.jpg --prompt "What is this?"
  python load_8b.py path/to/model --prompts questions.jsonl --out answers.jsonl
"""


def options() -> Namespace:
    p = Parser(__doc__, EXAMPLES)
    p.add_argument("model", help="a directory, a shipped model, a GGUF file, or OWNER/NAME on the Hugging Face hub")
    what = add_questions(p, required=True)
    what.add_argument("--check", action="store_true", help="look at config, names, shapes and sizes, read no weights")
    p.add_argument("--deep", action="store_true", help="with --check: read the weights too, for NaN and infinity")
    p.add_argument("--revision", help="branch, tag or commit on the hub")
    p.add_argument("--dtype", help=f"{', '.join(DTYPES)} (default: the files')")
    p.add_argument(
        "--quantize", metavar="BITS", help="int8, int4 or (NVIDIA since Ada) fp8: keep the matrices in so few"
    )
    p.add_argument("--allow-unknown-keys", action="store_true", help="of config.json, even if they could change what "
                   "the model computes; they are named")  # fmt: skip
    p.add_argument("--mask-id", type=int, help="the id of [MASK], if neither config.json nor the tokenizer tells it")
    p.add_argument("--tokenizer", type=Path, metavar="DIR", help="take tokenizer and chat template from here")
    return parse(p)


def amount(number: float) -> str:
    return tqdm.format_sizeof(number)  # 16.0G


def taken(args: Namespace) -> dict:
    """Return how a checkpoint is to be taken, for `check` and `load`."""
    return {"mask_id": args.mask_id, "tokenizer": args.tokenizer, "allow_unknown_keys": args.allow_unknown_keys}


def look(args: Namespace) -> Report:
    """Find out what can be known without reading weights; a model that is not here is fetched first."""
    name = here(args.model, on_hub(args.model), fix="choose one, or give OWNER/NAME of the hub")
    how = taken(args)
    if on_hub(name) and not os.path.lexists(name):
        return check(fetch(name, args.revision, progress=sys.stderr.isatty()), args.deep, **how)
    return check(name, args.deep, args.revision, **how)


def describe(found: Report) -> None:
    c, size = found.config, found.meta.n_parameters()
    experts = f", {c.n_expert_active} of {c.n_expert} experts" if c.n_expert else ""
    tell(f"{found.directory}: {found.scheme} names, {len(found.entries)} tensors in {len(found.files)} files, "
         f"{amount(found.n_bytes)}B of {' and '.join(found.dtypes)}")  # fmt: skip
    tell(f"{amount(size)} parameters: {c.n_layer} layers of width {c.d_model}{experts}, "
         f"{c.embedding_size} tokens, length {c.max_len}, mask {c.mask_id}, end of text {c.eos_id}")  # fmt: skip
    if sees(found.meta):
        v = found.meta.embed.vision
        tell(f"sees: a tower of {v.n_layer} layers of width {v.width}, tiles of {v.image_size} pixels, {v.aspect}")
    tell("weights take " + ", ".join(f"{amount(size * kind.itemsize)}B in {name}" for name, kind in DTYPES.items()))
    if found.non_finite:
        few = ", ".join(found.non_finite[:6])
        raise BadInput(f"weights: expected finite numbers, got NaN or infinity in {few}; fetch the checkpoint again")


def describe_template(home: Path) -> None:
    """Say which chat template there is, after trying it."""
    if (home / "tokenizer.json").is_file():
        template = ChatTemplate.load(home)
        if template.own:
            template.encode_chat([{"role": "user", "content": "Hi"}])
        tell(f"chat template: {'its own' if template.own else 'none of its own'}; answers end at {template.stop_ids}")


def load_model(args: Namespace, found: Report, device: str) -> tuple[Model, Tokenizer | None]:
    """Load onto the device; if few bits are wanted, onto the host first and from there matrix by matrix. A GGUF file is
    left to llama.cpp, unless --dtype or --quantize ask for the module."""
    start = time.perf_counter()
    if is_gguf(found.directory) and not (args.dtype or args.quantize):
        model, tokenizer = on_llama_cpp(found, args.tokenizer or found.directory, args.device)
        tell(f"loaded in {time.perf_counter() - start:.1f} s; llama.cpp computes, in {model.threads} threads")
        return model, tokenizer
    first = "cpu" if args.quantize else device
    model, tokenizer = load(found.directory, first, DTYPES.get(args.dtype), progress=sys.stderr.isatty(), **taken(args))
    if args.quantize:
        quantize(model, args.quantize, device)
    for line in slow_experts(model.config, device, model.embed.weight.dtype):
        tell(line)
    seconds = time.perf_counter() - start
    peak = f", {amount(torch.cuda.max_memory_allocated())}B at its peak" if device.startswith("cuda") else ""
    tell(f"loaded in {seconds:.1f} s, {amount(found.n_bytes / seconds)}B/s; "
         f"takes {amount(memory(model))}B on {device}{peak}")  # fmt: skip
    return model, tokenizer


def main() -> None:
    args = options()
    device = pick_device(args.device)
    if args.quantize is not None:
        check_one_of("quantize", args.quantize, kinds(device))
    found = look(args)
    describe(found)
    home = args.tokenizer or found.directory
    if args.check:
        with home_of(home) as texts:
            describe_template(texts)
        tell("all well" + ("" if args.deep else "; the weights were not read (--deep does)"))
        return
    expect_tokenizer(home, args.model)  # before gigabytes are read
    model, tokenizer = load_model(args, found, device)
    defaults = {**usual_of(found.scheme, args.model), **defaults_of(home)}
    talker = make_talker(home, args.model, model, tokenizer, args, **defaults)
    tell(f"prompts are {'messages in the chat template' if talker.instruct else 'texts to go on with'}")
    if args.chat:
        chat(args, talker)
    elif args.prompts is not None:
        answer_file(args, talker)
    else:
        asked = question(args, talker)  # a canvas with holes, and how to decode it
        steps = stream(talker.writer, asked.canvas, asked.config, args.seed, rivals=5 if files_of(args) else 0)
        show(args, talker, asked, steps)


if __name__ == "__main__":
    run(main)
