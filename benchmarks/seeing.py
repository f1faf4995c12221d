"""A tiny model learns to see: what it answers about new pictures, and what it answers blind or about another picture.

python benchmarks/seeing.py --out runs/seeing            # five minutes on two cores; --forms digits needs scikit-learn
"""

import argparse
import json
import random
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

import minillada
from minillada import SampleConfig, SFTConfig
from minillada.text.chat import ChatTemplate
from minillada.text.scenes import CELL, COLOURS, Forms, draw, questions, scene, shapes, write_scenes
from minillada.training.run import RunStep
from minillada.training.sft import teach
from minillada.weights.tower import Vision
from minillada.weights.vision import with_vision

TINY = {"n_layer": 4, "n_head": 4, "d_model": 96, "d_ff": 256, "max_len": 64, "rope_theta": 100.0}
EYES = {"width": 96, "d_ff": 192, "n_layer": 2, "n_head": 4, "image_size": 48, "patch_size": CELL}
RECIPE = {"lr": 0.01, "adam_lr": 0.003, "batch_size": 64, "precision": "float32", "keep": 1, "warmup": 0.05}
GEN = 9  # tokens of the longest answer, with its end


def digits(test: bool) -> dict[str, list[np.ndarray]]:
    """Return scikit-learn's handwritten digits as masks, the last fifth of them for the test."""
    from sklearn.datasets import load_digits

    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    data = load_digits()
    cut = len(data.images) * 4 // 5
    found = zip(data.images[cut:] if test else data.images[:cut], data.target[cut:] if test else data.target[:cut])  # noqa: B905
    masks = defaultdict(list)
    for image, target in found:
        masks[names[target]].append(np.kron(image / 16, np.ones((2, 2))))
    return dict(masks)


def newborn(directory: Path, texts: list[str], seed: int = 0) -> Path:
    """Save a model with random weights that could see, and words for these texts."""
    tokenizer = minillada.Tokenizer.bpe(texts, 512)
    ids = {"mask_id": tokenizer.mask_id, "eos_id": tokenizer.eos_id, "pad_id": tokenizer.pad_id}
    model = minillada.LLaDA(minillada.ModelConfig(vocab_size=tokenizer.vocab_size, **ids, **TINY))
    rng = torch.Generator().manual_seed(seed)
    model.init_weights(rng)
    minillada.save(with_vision(model, Vision(**EYES), rng), directory, tokenizer)
    return directory


def lessons(out: Path, forms: Forms, n: int) -> list[Path]:
    """Write the pictures of the first lessons, of one thing each, and of the later ones, of one to three."""
    return [
        write_scenes(out / "alone", forms, {1: n // 4}, each=6),
        write_scenes(out / "together", forms, {1: n // 8, 2: n * 5 // 8, 3: n // 4}, seed=1, each=7),
    ]


def learn(out: Path, data: list[Path], start: Path, steps: int):
    """Train on single things for a quarter of the steps, then on all; yield the steps of both runs."""
    for name, file, part in zip(("first", "then"), data, (steps // 4, steps - steps // 4), strict=True):
        rest = {"decay": 0.1 if name == "first" else 0.5, "eval_every": max(1, part // 3)}
        config = SFTConfig(data=str(file), start=str(start), out=str(out / name), steps=part, **RECIPE, **rest)
        yield from minillada.train(config)
        start = out / name


def test_set(forms: Forms, of: str, n: int = 200, seed: int = 7) -> list[tuple]:
    """Return (pixels, another picture's pixels, question) of new scenes, two in five with one thing or three."""
    rng, found = random.Random(f"test {seed} {of}"), []
    for number in range(n):
        things = scene(rng, list(forms), (2, 2, 2, 1, 3)[number % 5], of)
        other = scene(rng, list(forms), len(things), of)
        pixels, others = draw(things, forms, rng), draw(other, forms, rng)
        found += [(pixels, others, asked) for asked in questions(things, rng)]
    return found


def accuracy(model, template: ChatTemplate, asked: list[tuple], eyes: str = "open") -> dict[str, float]:
    """Return the share of right answers by kind and in all. eyes: open; closed (a grey picture); or wrong (another)."""
    from PIL import Image

    seeing, shown, prompts, right = model, {}, [], defaultdict(list)
    for pixels, others, question in asked:
        image = {"open": pixels, "wrong": others, "closed": np.full_like(pixels, 128)}[eyes]
        if image.tobytes() not in shown:
            seeing, shown[image.tobytes()] = minillada.see(seeing, Image.fromarray(image))
        picture = {"role": "user", "content": question.prompt, "image": shown[image.tobytes()]}
        prompts.append(template.encode_chat([picture]))
    config = SampleConfig(gen_len=GEN, steps=GEN, block_len=GEN)
    for first in range(0, len(prompts), 256):
        answers = minillada.generate(seeing, prompts[first : first + 256], config)
        for answer, (_, _, question) in zip(answers, asked[first : first + 256], strict=True):
            right[question.kind].append(template.tokenizer.decode(answer).strip() == question.answer)
    every = [held for kind in right.values() for held in kind]
    return {kind: sum(held) / len(held) for kind, held in sorted(right.items())} | {"all": sum(every) / len(every)}


def filled(model, template: ChatTemplate, forms: Forms, n: int = 100) -> float:
    """Return how often both colours of `a [MASK] circle left of a [MASK] square` are filled in rightly."""
    from PIL import Image

    from minillada.text.scenes import caption

    rng, rows, wanted, seeing = random.Random("fill"), [], [], model
    for _ in range(n):
        things = scene(rng, list(forms), 2)
        seeing, picture = minillada.see(seeing, Image.fromarray(draw(things, forms, rng)))
        text = caption(things)
        holes = " ".join("[MASK]" if word in COLOURS else word for word in text.split()).replace(" [MASK]", "[MASK]")
        prompt = template.encode_chat([{"role": "user", "content": "describe:", "image": picture}])
        rows.append([*prompt, *template.tokenizer.encode_with_masks(holes)])
        wanted.append(text)
    canvas = minillada.Canvas.infill(rows, model.config)
    config = SampleConfig(gen_len=2, steps=2, block_len=2, ban_eos=True, stop_at_eos=False)
    config = SampleConfig(gen_len=64, steps=64, block_len=64, ban_eos=True, stop_at_eos=False)
    *_, last = minillada.stream(seeing, canvas, config)
    got = [
        template.tokenizer.decode([id for id in row[-len(ids) :] if id < model.config.embedding_size])
        for row, ids in zip(last.x.tolist(), rows, strict=True)
    ]
    return sum(text.split("describe:")[-1].strip().startswith(want) for text, want in zip(got, wanted, strict=True)) / n


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--out", type=Path, default=Path("runs/seeing"))
    p.add_argument("--forms", choices=("shapes", "digits"), default="shapes")
    p.add_argument("--steps", type=int, default=1600)
    p.add_argument("--pictures", type=int, default=6000)
    args = p.parse_args()
    begin = time.perf_counter(), time.process_time()
    forms, new = (shapes(),) * 2 if args.forms == "shapes" else (digits(False), digits(True))
    data = lessons(args.out / "data", forms, args.pictures)
    lines = [json.loads(line) for file in data for line in file.read_text().splitlines()]
    texts = ["\n{prompt} {answer}".format_map(line) for line in lines]
    start = newborn(args.out / "newborn", texts)
    told = 0.0
    step: RunStep
    for step in learn(args.out, data, start, args.steps):
        told = step.loss if not told else 0.98 * told + 0.02 * step.loss
        if step.step % 100 == 0:
            spent = time.process_time() - begin[1]
            print(f"{step.step}: loss {told:.4f}, {spent:.0f} s of processor time", flush=True)
    took = {"seconds": time.perf_counter() - begin[0], "processor": time.process_time() - begin[1]}
    model = minillada.load(args.out / "then")[0]
    template = teach(args.out / "then", step.tokenizer)
    asked = test_set(new, "seen")
    found = {
        "forms": args.forms, "steps": args.steps, "parameters": model.n_parameters(), **took,
        "open": accuracy(model, template, asked), "closed": accuracy(model, template, asked, "closed"),
        "wrong": accuracy(model, template, asked, "wrong"), "filled": filled(model, template, new),
        "never drawn": accuracy(model, template, test_set(new, "unseen")),
    }  # fmt: skip
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
