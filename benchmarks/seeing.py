"""A tiny model learns to see: what it answers about new pictures, and what it answers blind or about another picture.

python benchmarks/seeing.py --out runs/seeing              # coloured shapes; four minutes of one core
python benchmarks/seeing.py --out runs/digits --forms digits   # handwritten digits in colours; needs scikit-learn
"""

import argparse
import json
import random
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

import minillada
from minillada import Canvas, LLaDA, ModelConfig, SampleConfig, SFTConfig, Tokenizer
from minillada.text.chat import ChatTemplate
from minillada.text.scenes import CELL, COLOURS, Asked, Forms, caption, draw, questions, scene, shapes, write_scenes
from minillada.training.run import RunStep
from minillada.weights.tower import Vision
from minillada.weights.vision import with_vision

TINY = {"n_layer": 4, "n_head": 4, "d_model": 96, "d_ff": 256, "max_len": 64, "rope_theta": 100.0}
EYES = {"width": 96, "d_ff": 192, "n_layer": 2, "n_head": 4, "image_size": 3 * CELL, "patch_size": CELL}
RECIPE = {"lr": 0.01, "adam_lr": 0.003, "batch_size": 64, "precision": "float32", "keep": 1, "warmup": 0.05}
STEPS, PICTURES = 1700, 6000
LONGEST = 9  # tokens of the longest answer, with its end
Asking = tuple[np.ndarray, np.ndarray, Asked]  # a picture, another one, a question about the first


def digits(test: bool) -> dict[str, list[np.ndarray]]:
    """Return scikit-learn's handwritten digits as masks, the last fifth of them for the test."""
    from sklearn.datasets import load_digits

    data, masks = load_digits(), defaultdict(list)
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    part = slice(len(data.images) * 4 // 5, None) if test else slice(len(data.images) * 4 // 5)
    for image, target in zip(data.images[part], data.target[part], strict=True):
        masks[names[target]].append(np.kron(image / 16, np.ones((2, 2))))
    return {name: masks[name] for name in names}


def lessons(out: Path, forms: Forms, n: int = PICTURES) -> list[Path]:
    """Write the pictures of the first lessons, of one thing each, and of the later ones, of one to three."""
    first = write_scenes(out / "alone", forms, {1: n // 4}, each=6)
    return [first, write_scenes(out / "together", forms, {1: n // 8, 2: n * 5 // 8, 3: n // 4}, seed=1, each=8)]


def newborn(out: Path, data: list[Path], seed: int = 0) -> Path:
    """Save a model with random weights, which could see, and with words for these lessons."""
    lines = [json.loads(line) for file in data for line in file.read_text().splitlines()]
    tokenizer = Tokenizer.bpe(["\n{prompt} {answer}".format_map(line) for line in lines], 512)
    ids = {"mask_id": tokenizer.mask_id, "eos_id": tokenizer.eos_id, "pad_id": tokenizer.pad_id}
    model, rng = LLaDA(ModelConfig(vocab_size=tokenizer.vocab_size, **ids, **TINY)), torch.Generator().manual_seed(seed)
    model.init_weights(rng)
    minillada.save(with_vision(model, Vision(**EYES), rng), out, tokenizer)
    return out


def learn(out: Path, data: list[Path], start: Path, steps: int = STEPS) -> Iterator[RunStep]:
    """Learn single things for a fifth of the steps, then all; yield the steps of both runs."""
    for name, file, part in zip(("first", "then"), data, (steps // 5, steps - steps // 5), strict=True):
        rest = {"decay": 0.1 if name == "first" else 0.5, "eval_every": part}
        where = {"data": str(file), "start": str(start), "out": str(out / name)}
        yield from minillada.train(SFTConfig(**where, steps=part, **RECIPE, **rest))
        start = out / name


def test_set(forms: Forms, of: str = "seen", n: int = 200) -> list[Asking]:
    """Return questions about new scenes of one to three things, most of them two."""
    rng, found = random.Random(f"test {of}"), []
    for number in range(n):
        things = scene(rng, list(forms), (2, 2, 2, 1, 3)[number % 5], of)
        other = draw(scene(rng, list(forms), len(things), of), forms, rng)
        picture = draw(things, forms, rng)
        found += [(picture, other, asked) for asked in questions(things, rng)]
    return found


def accuracy(model: LLaDA, template: ChatTemplate, asked: list[Asking], eyes: str = "open") -> dict[str, float]:
    """Return the share of right answers by kind and in all. eyes: open; closed, grey alone; wrong, another picture."""
    from PIL import Image

    prompts, held, seeing, ids = [], defaultdict(list), model, {}
    for picture, other, question in asked:
        image = {"open": picture, "wrong": other, "closed": np.full_like(picture, 128)}[eyes]
        if (key := image.tobytes()) not in ids:
            seeing, ids[key] = minillada.see(seeing, Image.fromarray(image))
        prompts.append(template.encode_chat([{"role": "user", "content": question.prompt, "image": ids[key]}]))
    config = SampleConfig(gen_len=LONGEST, steps=LONGEST, block_len=LONGEST)
    for part in (slice(first, first + 256) for first in range(0, len(prompts), 256)):
        answers = minillada.generate(seeing, prompts[part], config)
        for answer, (*_, question) in zip(answers, asked[part], strict=True):
            held[question.kind].append(template.tokenizer.decode(answer).strip() == question.answer)
    every = [right for kind in held.values() for right in kind]
    return {kind: sum(right) / len(right) for kind, right in sorted(held.items())} | {"all": sum(every) / len(every)}


def masked(text: str) -> str:
    """Hide the colours: `a red circle` -> `a[MASK] circle`; a hole brings its own space."""
    return " ".join("[MASK]" if word in COLOURS else word for word in text.split()).replace(" [MASK]", "[MASK]")


def filled(model: LLaDA, template: ChatTemplate, forms: Forms, n: int = 100) -> float:
    """Return how often both colours of `a [MASK] circle left of a [MASK] square` are filled in rightly."""
    from PIL import Image

    rng, rows, wanted, seeing, tokenizer = random.Random("fill"), [], [], model, template.tokenizer
    for _ in range(n):
        things = scene(rng, list(forms), 2)
        seeing, picture = minillada.see(seeing, Image.fromarray(draw(things, forms, rng)))
        prompt = template.encode_chat([{"role": "user", "content": "describe:", "image": picture}])
        wanted.append((len(prompt), caption(things)))
        rows.append(prompt + tokenizer.encode_with_masks(masked(caption(things))))
    config = SampleConfig(gen_len=64, steps=64, block_len=64, ban_eos=True, stop_at_eos=False)
    *_, last = minillada.stream(seeing, Canvas.infill(rows, seeing.config), config)
    got = [x[: len(row)] for x, row in zip(last.x.tolist(), rows, strict=True)]
    return sum(tokenizer.decode(x[start:]) == want for x, (start, want) in zip(got, wanted, strict=True)) / n


def results(where: Path, forms: Forms) -> dict:
    """Return all figures of a trained model."""
    model, _ = minillada.load(where)
    template = ChatTemplate.load(next((where / "checkpoints").glob("step-*")))
    found = {eyes: accuracy(model, template, test_set(forms), eyes) for eyes in ("open", "closed", "wrong")}
    return found | {
        "never drawn": accuracy(model, template, test_set(forms, "unseen")),
        "colours filled": filled(model, template, forms),
        "parameters": model.n_parameters(),
    }


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--forms", choices=("shapes", "digits"), default="shapes")
    p.add_argument("--steps", type=int, default=STEPS)
    p.add_argument("--pictures", type=int, default=PICTURES)
    args = p.parse_args()
    seconds, spent, loss = time.perf_counter(), time.process_time(), 0.0
    forms, new = (shapes(),) * 2 if args.forms == "shapes" else (digits(False), digits(True))
    data = lessons(args.out / "data", forms, args.pictures)
    start = newborn(args.out / "newborn", data)
    for number, step in enumerate(learn(args.out, data, start, args.steps), 1):
        loss = 0.98 * loss + 0.02 * step.loss
        if number % 100 == 0:
            print(f"{number}: loss {loss:.4f}, {time.process_time() - spent:.0f} s of processor time", flush=True)
    took = {"seconds": time.perf_counter() - seconds, "processor seconds": time.process_time() - spent}
    found = {"forms": args.forms, "steps": args.steps, "pictures": args.pictures, **took}
    found |= results(args.out / "then", new)
    (args.out / "results.json").write_text(json.dumps(found, indent=1))
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
