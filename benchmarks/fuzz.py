"""Fuzz what a stranger's checkpoint is read with: `python benchmarks/fuzz.py TARGET --minutes 10`. Needs atheris.

Targets: header and index (of safetensors files), config, template, gguf (a whole small file), image. Each input becomes
that file of a small checkpoint that is sound otherwise, or a file of its own. Only an error of ours may come out of it,
one line, after less than 2 s of computing; the process may take 1 GB at most. Anything else ends the run, with the
input in a file `crash-…`.
"""

import io
import json
import os
import shutil
import struct
import sys
import tempfile
import time
import warnings
from argparse import ArgumentParser
from pathlib import Path

import atheris
import torch

with atheris.instrument_imports(include=["minillada.files", "minillada.text", "minillada.weights"]):
    from minillada.errors import BadInput, BadLuck
    from minillada.model import LLaDA, ModelConfig
    from minillada.text.chat import ChatTemplate
    from minillada.weights import checkpoint, convert, pictures

TESTS = Path(__file__).parents[1] / "tests"
sys.path.insert(0, str(TESTS))
from talkers import write_talker  # noqa: E402

SHARD, INDEX = "model-00002-of-00003.safetensors", "model.safetensors.index.json"
TARGETS = ("header", "index", "config", "template", "gguf", "image")
SMALL = ModelConfig(vocab_size=16, n_layer=1, n_head=1, d_model=32, d_ff=32, max_len=8, mask_id=0, eos_id=1)
MOST = 2.0  # seconds of computing
TEMPLATES = [
    b"{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}{% endfor %}{{ raise_exception('no') }}",
    b"{{ bos_token }}{%- set x = namespace(a=1) %}{% macro f(y) %}{{ y|tojson }}{% endmacro %}{{ f(messages) }}",
    b"{% for i in range(9) %}{% if i > 3 %}{% continue %}{% endif %}{{ 'a' * i ~ messages[-1].content }}{% endfor %}",
]


def seeds_of(target: str, home: Path) -> list[bytes]:
    """Return sound inputs to begin with."""
    if target == "template":
        return TEMPLATES
    if target == "header":
        data = (home / SHARD).read_bytes()
        return [data[8 : 8 + struct.unpack("<Q", data[:8])[0]]]
    if target == "index":
        return [(home / INDEX).read_bytes()]
    if target == "gguf":
        torch.manual_seed(0)
        convert.write(home / "model.gguf", LLaDA(SMALL), "q8_0")
        return [(home / "model.gguf").read_bytes()]
    if target == "image":
        return [picture(kind) for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP")]
    return [path.read_bytes() for path in sorted((TESTS / "golden").glob("*/config.json"))]


def picture(kind: str) -> bytes:
    """Return a picture of 12 x 9 pixels as a file of a format of Pillow's."""
    written = io.BytesIO()
    pictures.pillow().effect_noise((12, 9), 50).convert("RGB").save(written, kind)
    return written.getvalue()


def reader_of(target: str, home: Path):
    """Return what reads an input."""
    whole = (home / SHARD).read_bytes()
    body = whole[8 + struct.unpack("<Q", whole[:8])[0] :]

    def read(data: bytes) -> None:
        if target == "template":
            (home / "chat_template.jinja").write_bytes(data)
            ChatTemplate.load(home).encode_chat([{"role": "user", "content": "Hi"}])
        elif target == "header":
            (home / SHARD).write_bytes(struct.pack("<Q", len(data)) + data + body)
            checkpoint.check(home)
        elif target == "gguf":
            (home / "model.gguf").write_bytes(data)
            checkpoint.load(home / "model.gguf")
        elif target == "image":
            (home / "image").write_bytes(data)
            pictures.open_picture(home / "image").convert("RGB")
        else:
            (home / {"index": INDEX, "config": "config.json"}[target]).write_bytes(data)
            checkpoint.check(home, mask_id=255)

    return read


def main() -> None:
    p = ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("target", choices=TARGETS)
    p.add_argument("--minutes", type=float, default=10.0)
    args = p.parse_args()
    warnings.simplefilter("ignore")  # of keys that are left out
    place = Path(tempfile.mkdtemp(prefix="fuzz-"))
    home, corpus = write_talker(place / "model"), place / "corpus"
    corpus.mkdir()
    for i, seed in enumerate(seeds_of(args.target, home)):
        (corpus / str(i)).write_bytes(seed)
    read, told = reader_of(args.target, home), {"accepted": 0, "refused": 0}
    slowest, end = [0.0], time.monotonic() + 60 * args.minutes

    def one(data: bytes) -> None:
        start = time.process_time()
        try:
            read(data)
            told["accepted"] += 1
        except (BadInput, BadLuck) as error:
            told["refused"] += 1
            line = str(error)
            if "\n" in line or "\x1b" in line or ": expected " not in line or "; " not in line:
                raise RuntimeError(f"no line of ours: {line!r}") from error
        took = time.process_time() - start
        slowest[0] = max(slowest[0], took)
        if took > MOST:
            raise RuntimeError(f"it took {took:.1f} s")
        if time.monotonic() > end:
            print(json.dumps({"target": args.target, "slowest": round(slowest[0], 3), **told}), flush=True)
            shutil.rmtree(place)
            os._exit(0)  # libFuzzer takes any other end for a crash

    limits = ["-rss_limit_mb=1024", "-timeout=60", "-max_len=20000", "-verbosity=0", "-print_final_stats=0"]
    atheris.Setup([sys.argv[0], str(corpus), *limits, f"-max_total_time={int(60 * args.minutes) + 60}"], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
