"""Write a model as one GGUF file, which llama.cpp runs: it needs less memory than here, and is faster on a laptop."""

import argparse
import os
import time
from pathlib import Path

from ..errors import BadInput, check_one_of
from ..files import verify_manifest
from ..weights.checkpoint import check, locate, read_parameter
from ..weights.convert import FILE_TYPES, is_gguf, write
from .cli import Parser, here, on_hub, tell

EXAMPLES = """examples:
  python -m minillada gguf tales tales.gguf
  python -m minillada gguf GSAI-ML/LLaDA-8B-Instruct llada.gguf --type q4_0
"""


def main() -> None:
    """Read the options, check the model, write the file, say how large it is."""
    args = options()
    name = here(args.model, on_hub(args.model), fix="choose one, or give OWNER/NAME of the hub")
    directory = locate(name, args.revision, progress=True)
    if is_gguf(directory):
        raise BadInput(f"{directory}: expected a model directory, got a GGUF file; give what it was made from")
    report = check(directory, mask_id=args.mask_id)
    if report.hashes:
        verify_manifest(directory)
    start = time.perf_counter()
    write(args.out, report.meta, args.type, lambda ours: read_parameter(report, ours), directory)
    size, seconds = args.out.stat().st_size, time.perf_counter() - start
    tell(f"{args.out}: {size / 1e9:.3f} GB of {args.type}, from {report.n_bytes / 1e9:.3f} GB, in {seconds:.1f} s")


def options() -> argparse.Namespace:
    p = Parser(__doc__, EXAMPLES)
    p.add_argument("model", help="a run, a model directory, a shipped model, or OWNER/NAME on the Hugging Face hub")
    p.add_argument("out", type=Path, metavar="out.gguf", help="a new file")
    p.add_argument("--type", default="f16", help=f"{', '.join(FILE_TYPES)}: how the matrices are stored (default: f16)")
    p.add_argument("--mask-id", type=int, help="the id of [MASK], if neither config.json nor the tokenizer tells it")
    p.add_argument("--revision", help="branch, tag or commit on the hub")
    args = p.parse_args()
    check_one_of("type", args.type, FILE_TYPES)
    if not is_gguf(args.out) or os.path.lexists(args.out):
        got = "one that exists" if is_gguf(args.out) else str(args.out)
        raise BadInput(f"out: expected a new file that ends in .gguf, got {got}; choose another name")
    return args
