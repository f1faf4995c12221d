"""Diffusion against autoregression: the same Transformer, batches, optimisers and schedule, and two things to learn.

    python benchmarks/versus.py text --corpus shakespeare --minutes 30     bits per character of held-out text
    python benchmarks/versus.py scaling --corpus shakespeare --minutes 1.25 2.5 5     the same by compute, three sizes
    python benchmarks/versus.py gap --corpus shakespeare --minutes 5       what the difference on a text is made of
    python benchmarks/versus.py tales          nats per character of a grammar whose entropy is known
    python benchmarks/versus.py reversal       facts told in one direction, asked in both
    python benchmarks/versus.py sudoku         boards solved in several orders
    python benchmarks/versus.py errors         the standard error of a likelihood, by how its masks are drawn

The autoregressive twin (twin.py) sees what stands before a token and learns to predict it: an exact likelihood, where
diffusion has an upper bound. With one thread, time is the processor's, so that what else runs on the machine does not
count; evaluations never do. Models are kept under --out, and one that is there is not trained again. docs/versus.json
has all results, an experiment each, docs/versus_*.png their pictures.
"""

import json
import math
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import torch
from curves import clock
from likelihood import ESTIMATORS, estimates
from likelihood import SIZES as SAMPLES
from torch import Generator, Tensor, nn

from minillada.commands.cli import Parser, run
from minillada.diffusion import Noised, exact_count, pretraining_loss, random_length, sample_t
from minillada.errors import BadInput, check_number, check_one_of, check_whole
from minillada.files import write_json
from minillada.measure.evaluate import answer_length, mean_of, measure_task
from minillada.measure.likelihood import Pair, exact_bound, log_likelihoods, strides
from minillada.measure.twin import causal, shifted, twin_generate, twin_log_likelihoods
from minillada.model import LLaDA
from minillada.sampler import SampleConfig
from minillada.text.corpora import cache_dir, make_tokenizer
from minillada.text.ids import Tokens, batches, tokenise
from minillada.text.tales import TALE, entropy_per_character, expected_length, tales
from minillada.text.tasks import TASKS, Example, Task, make_task
from minillada.text.tokenizer import Tokenizer
from minillada.train import Ways, learn
from minillada.training.config import PRESETS, TrainConfig
from minillada.training.making import make_model
from minillada.training.optim import choose_precision, evaluation, make_optimizers
from minillada.training.pretraining import above
from minillada.training.sft import stack
from minillada.weights.checkpoint import load, save

LOOKS = 25  # at the held-out text while a model learns
COLOURS = {"diffusion": "tab:blue", "twin": "tab:red"}
Rows = Iterator[tuple[Tensor, Tensor | None]]  # x0 (B,T), and which of its tokens are to be learned; None: all


# ---- two things to learn


class Causal(nn.Module):
    """The twin, called as training calls a model."""

    def __init__(self, model: LLaDA) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, attn_mask: None = None, where: tuple[Tensor, Tensor] | None = None) -> Tensor:
        return self.model(x, causal(x.shape[1], x.device), where=where)


def hide(x0: Tensor, mask_id: int, rng: Generator, maskable: Tensor | None = None, t_min: float = 0.0) -> Noised:
    """Diffusion: a random number of tokens is masked, and they are predicted from the others."""
    return above(t_min, exact_count)(x0, mask_id, sample_t(len(x0), rng), rng, maskable)


def shift(x0: Tensor, mask_id: int, rng: Generator, maskable: Tensor | None = None, t_min: float = 0.0) -> Noised:
    """Autoregression in the same terms: every token is asked for in the place of the one before it, and counts once."""
    return shifted(x0, mask_id, maskable)


def bound(model: LLaDA, pairs: Sequence[Pair], samples: int) -> tuple[Tensor, Tensor]:
    values, errors = log_likelihoods(model, pairs, samples)
    return -values, errors


def exact(model: LLaDA, pairs: Sequence[Pair], samples: int) -> tuple[Tensor, Tensor]:
    return -twin_log_likelihoods(model, pairs), torch.zeros(len(pairs))


class Way(NamedTuple):
    """A way to learn the distribution of a text."""

    called: Callable[[LLaDA], nn.Module]  # what training calls
    noise: Callable[..., Noised]  # what it is asked
    nats: Callable[..., tuple[Tensor, Tensor]]  # -log p of pairs (N,), or its upper bound; and standard errors


WAYS = {"diffusion": Way(lambda model: model, hide, bound), "twin": Way(Causal, shift, exact)}


class Learning:
    """What a way learns from rows, as `train.learn` asks for it."""

    def __init__(self, way: Way, rows: Rows, mask_id: int, config: TrainConfig) -> None:
        self.way, self.rows, self.mask_id, self.config, self.numbers = way, rows, mask_id, config, {}

    def batches(self, start: int) -> Rows:
        return self.rows

    def losses(self, model: nn.Module, batch: tuple[Tensor, Tensor | None], rng: Generator) -> Iterator[Tensor]:
        x0, maskable = batch
        self.numbers = {"tokens": x0.numel()}
        way = WAYS["twin"] if self.progress < self.config.twin else self.way
        with evaluation(self.config):
            yield pretraining_loss(way.called(model), x0, way.noise(x0, self.mask_id, rng, maskable, self.config.t_min))


def train(model: LLaDA, way: Way, rows: Rows, config: TrainConfig, look: Callable[[], float] | None = None) -> dict:
    """Train for the config's minutes, or steps; return the record, with the curve [[seconds, step, look()], ...]."""
    seconds, tokens, curve = 0.0, 0, []
    part = lambda step: seconds / 60 / config.minutes if config.minutes else step / config.steps
    ways = Ways(progress=lambda step: part(step - 1))
    objective, rng = Learning(way, rows, model.config.mask_id, config), Generator().manual_seed(config.seed)
    start = clock()
    for done in learn(model, make_optimizers(model, config), objective, config, rng, ways=ways):
        seconds, tokens = seconds + clock() - start, tokens + done.numbers["tokens"]
        if look and part(done.step) * LOOKS >= len(curve) + 1:
            curve.append([round(seconds, 2), done.step, round(look(), 4)])
        if part(done.step) >= 1:
            break
        start = clock()
    return {"seconds": round(seconds, 2), "steps": done.step, "tokens": tokens, "curve": curve}


def learned(
    out: Path, name: str, way: str, tokenizer: Tokenizer, rows: Callable[[], Rows], config: TrainConfig, look=None
) -> tuple[LLaDA, dict]:
    """The model out/name, and the record of its training; one that is there is not trained again. look: of a model."""
    record = out / f"{name}.json"
    if not record.exists():
        model = make_model(config, tokenizer, Generator().manual_seed(config.seed))
        found = train(model, WAYS[way], rows(), config, look and (lambda: look(way, model)))
        blocks = sum(p.numel() for p in model.layers.parameters())
        about = {"parameters": model.n_parameters(), "in_blocks": blocks, "threads": torch.get_num_threads()}
        save(model, out / name, tokenizer)
        write_json(record, {"config": asdict(config), **about, **found})
        print(f"{name}: {found['steps']:,} steps, {found['tokens'] / found['seconds']:,.0f} tokens/s", flush=True)
    found = json.loads(record.read_text())
    if found.pop("config") != json.loads(json.dumps(asdict(config))):
        raise BadInput(f"out: expected {out / name} to be trained as asked, got another; give another --out")
    return load(out / name)[0], found


# ---- results and pictures


def store(args: Namespace, experiment: str, found: dict) -> None:
    """Put an experiment's results among the others."""
    results = json.loads(args.json.read_text()) if args.json.exists() else {}
    write_json(args.json, results | {experiment: found})


@contextmanager
def picture(args: Namespace, experiment: str, xlabel: str, ylabel: str) -> Iterator:
    """The axes of docs/versus_EXPERIMENT.png."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.add_subplot(xlabel=xlabel, ylabel=ylabel)
    yield axes
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(args.json.with_name(f"{args.json.stem}_{experiment}.png"), dpi=130)


def bars(args: Namespace, experiment: str, found: dict[str, dict[str, dict]]) -> None:
    """Accuracies, {group: {label: accuracy}}, a colour for each group."""
    with picture(args, experiment, "", "share answered rightly, %") as axes:
        labels = list(dict.fromkeys(label for group in found.values() for label in group))
        shared = set.intersection(*map(set, found.values()))  # side by side, others alone
        for i, (group, rows) in enumerate(found.items()):
            x = [labels.index(label) + 0.4 * (i - (len(found) - 1) / 2) * (label in shared) for label in rows]
            heights, errors = ([100 * row[key] for row in rows.values()] for key in ("accuracy", "standard_error"))
            axes.bar(x, heights, 0.38, yerr=errors, label=group, color=COLOURS[group])
        axes.set_xticks(range(len(labels)), labels)


# ---- a text


class Text(NamedTuple):
    """A corpus, cut for models of one length."""

    tokenizer: Tokenizer
    tokens: Tokens
    held_out: list[Pair]  # all of the validation text, side by side: nothing is known of what stands before a window
    characters: float  # of those
    config: TrainConfig


def read_text(args: Namespace) -> Text:
    """Raises BadInput, BadLuck."""
    common = {"data": args.corpus, "preset": args.preset, "tokenizer": args.tokenizer, "length": args.length}
    config = TrainConfig(**common, minutes=1, seed=args.seed, precision=args.precision)
    tokenizer = make_tokenizer(config.tokenizer, config.data)
    tokens = tokenise(config.data, tokenizer, cache_dir() / "tokens", config.length)
    config = replace(config, precision=choose_precision(config)[0])
    held_out = strides(tokens.val.tolist(), config.length, config.length)
    return Text(tokenizer, tokens, held_out, len(tokens.val) * tokens.characters_per_token, config)


def text_rows(text: Text) -> Rows:
    """The same batches for every model."""
    config, rng = text.config, Generator().manual_seed(text.config.seed)
    stream = batches(text.tokens.train, config.batch_size, config.length, config.seed)
    return ((random_length(x0, rng), None) for x0 in stream)


def bits(way: str, model: LLaDA, text: Text, samples: int, parts: int | None = None) -> tuple[float, float]:
    """Bits per character of the held-out text, or of so many parts of it, and their standard error."""
    chosen = text.held_out[:: max(1, len(text.held_out) // parts)] if parts else text.held_out
    nats, errors = WAYS[way].nats(model, chosen, samples)
    characters = text.characters * sum(len(part) for _, part in chosen) / len(text.tokens.val)
    return tuple(x / math.log(2) / characters for x in (nats.sum().item(), errors.square().sum().sqrt().item()))


def learn_text(args: Namespace, text: Text, way: str, rate: float = 1.0, curve: bool = True, **changes: object) -> dict:
    """A model of the text, its bits, and the record of its training, with the bits on the way there if so asked."""
    config = replace(text.config, **changes)
    config = replace(config, lr=rate * config.lr, adam_lr=rate * config.adam_lr)
    way, _, kind = way.partition(", ")
    long = (f"{config.minutes:g}min" if config.minutes else f"{config.steps}steps") + f"-rate{rate:g}" * (rate != 1)
    name = f"{args.what}-{Path(args.corpus).stem}-{way}{kind}-{config.model['d_model']}-{long}"
    look = (lambda way, model: bits(way, model, text, 2, 64)[0]) if curve else None
    model, record = learned(args.out, name, way, text.tokenizer, lambda: text_rows(text), config, look)
    value, error = bits(way, model, text, args.samples)
    print(f"{name}: {'<= ' * (way == 'diffusion')}{value:.4f} ± {error:.4f} bits per character", flush=True)
    return {"model": name, "way": way, "rate": rate, "bits": value, "standard_error": error, **record}


def measure_text(args: Namespace) -> None:
    """Diffusion at its own rates, the twin at each of --lr; then the best twin again, with as many tokens."""
    text, (minutes,) = read_text(args), args.minutes or [30.0]
    runs = {"diffusion": learn_text(args, text, "diffusion", minutes=minutes)}
    for rate in args.lr:
        runs[f"twin, rates × {rate:g}"] = learn_text(args, text, "twin", rate, minutes=minutes)
    best = min((r for r in runs.values() if r["way"] == "twin"), key=lambda r: r["bits"])
    steps = runs["diffusion"]["steps"]
    runs["twin, as many tokens"] = learn_text(args, text, "twin", best["rate"], minutes=None, steps=steps)
    about = {"corpus": Path(args.corpus).stem, "minutes": minutes, "samples": args.samples}
    store(args, "text", {**about, "precision": text.config.precision, "runs": runs})
    print("\n| | bits per character | steps | tokens | tokens/s |\n|---|---|---|---|---|")
    with picture(args, "text", "minutes of training", "bits per character, held-out") as axes:
        for (name, r), dash in zip(runs.items(), ("-", *["-"] * len(args.lr), ":"), strict=True):
            sign = f"≤ {r['bits']:.3f} ± {r['standard_error']:.3f}" if r["way"] == "diffusion" else f"{r['bits']:.3f}"
            print(f"| {name} | {sign} | {r['steps']:,} | {r['tokens']:,} | {r['tokens'] / r['seconds']:,.0f} |")
            seconds, _, values = zip(*r["curve"], strict=True)
            shade = 1 if r in (runs["diffusion"], best) or dash == ":" else 0.4
            axes.plot([s / 60 for s in seconds], values, dash, color=COLOURS[r["way"]], alpha=shade,
                      label=f"{name}: {sign}")  # fmt: skip
        axes.set_ylim(top=max(r["curve"][len(r["curve"]) // 8][2] for r in runs.values()))


# ---- what the gap is made of

DRAWN = 8  # random orders of each window
# way -> what differs from the default recipe; what stands behind the comma only gives the model a name
LEARNED = {"twin": {}, "diffusion, before": {"twin": 0.0, "t_min": 0.0}, "diffusion": {}}


@torch.no_grad()
def in_order(model: LLaDA, x0: Tensor, given: int, score: Callable[[Tensor], Tensor]) -> Tensor:
    """-log p of x0 (B,T) behind the first `given` tokens, (B,) nats, if they are written one at a time: next the hole
    of the highest score(log p (B,W,V)) -> (B,W). Exact for every order that looks at what is written alone."""
    x, rows, hole = x0.clone(), torch.arange(len(x0)), torch.ones_like(x0[:, given:], dtype=torch.bool)
    x[:, given:], nats = model.config.mask_id, torch.zeros(len(x0))
    columns = torch.arange(given, x0.shape[1]).repeat(len(x0))
    for _ in range(hole.shape[1]):
        log_p = model(x, where=(rows.repeat_interleave(hole.shape[1]), columns)).log_softmax(-1).view(*hole.shape, -1)
        place = score(log_p).masked_fill(~hole, -torch.inf).argmax(1)
        true = x0[rows, given + place]
        nats -= log_p[rows, place, true]
        hole[rows, place], x[rows, given + place] = False, true
    return nats


def by_blocks(shape: tuple[int, int], block: int, rng: Generator) -> Callable[[Tensor], Tensor]:
    """From left to right by blocks, and in a random order inside a block; with one token in a block, left to right."""
    score = torch.rand(shape, generator=rng) - torch.arange(shape[1]) // block
    return lambda log_p: score


def measure_orders(model: LLaDA, x0: Tensor, given: int, characters: float) -> dict[str, list[float]]:
    """Bits per character of each window's last tokens, by the order in which they are written."""
    shape, rng = (len(x0), x0.shape[1] - given), Generator().manual_seed(0)
    run = lambda score: in_order(model, x0, given, score)
    drawn = {block: torch.stack([run(by_blocks(shape, block, rng)) for _ in range(n)])
             for block, n in ((1, 1), (4, 2), (16, 2), (shape[1], DRAWN))}  # fmt: skip
    found = {f"blocks of {block}": nats.mean(0) for block, nats in drawn.items()}
    random = drawn[shape[1]]  # (orders, windows)
    found["mixture of random orders"] = math.log(len(random)) - (-random).logsumexp(0)
    found["surest first"] = run(lambda log_p: log_p.amax(-1))
    found["right to left"] = run(lambda log_p: torch.arange(shape[1]).expand(shape).float())
    return {order: [round(x, 4) for x in (nats / math.log(2) / characters).tolist()] for order, nats in found.items()}


def measure_gap(args: Namespace) -> None:
    """The same windows of held-out text, by recipe and by the order in which the trained models write."""
    text, minutes = read_text(args), (args.minutes or [5.0])[0]
    windows = torch.tensor([part for _, part in text.held_out if len(part) == text.config.length])
    length = windows.shape[1] // 2  # an evaluation for every token and order: halves of a few windows must do
    x0 = windows[:: max(1, len(windows) // args.windows), :length][: args.windows]
    given, size = length // 2, length - length // 2
    characters = size * text.tokens.characters_per_token
    bars, runs = {}, {}
    for name, changes in LEARNED.items():
        if name not in (args.models or LEARNED):
            continue
        runs[name] = learn_text(args, text, name, curve=False, minutes=minutes, **changes)
        model = load(args.out / runs[name]["model"])[0]
        if name == "twin":
            pairs = [(row[:given], row[given:]) for row in x0.tolist()]
            nats = -twin_log_likelihoods(model, pairs)
            bars["twin"] = {"left to right": (nats / math.log(2) / characters).tolist()}
        else:
            bars[name] = measure_orders(model, x0, given, characters)
    named = {"blocks of 1": "left to right", f"blocks of {size}": "random order: the bound"}
    bars = {name: {named.get(order, order): bits for order, bits in found.items()} for name, found in bars.items()}
    about = {"corpus": Path(args.corpus).stem, "minutes": minutes, "windows": len(x0), "given": given, "measured": size}
    store(args, "gap", {**about, "runs": runs, "bits": bars})
    show_gap(args, bars)


def show_gap(args: Namespace, bars: dict[str, dict[str, list[float]]]) -> None:
    """Print and draw {model: {order: bits of each window}}. Errors are those of the difference from the twin."""
    twin = torch.tensor(bars["twin"]["left to right"])
    print("\n| model | order | bits per character | more than the twin |\n|---|---|---|---|")
    with picture(args, "gap", "bits per character", "") as axes:
        for name, found in bars.items():
            means = [torch.tensor(bits).mean().item() for bits in found.values()]
            errors = [((more := torch.tensor(bits) - twin).std() / len(more) ** 0.5).item() for bits in found.values()]
            for order, mean, error in zip(found, means, errors, strict=True):
                print(f"| {name} | {order} | {mean:.3f} | {mean - twin.mean():.3f} ± {error:.3f} |")
            labels = [f"{name}: {order}" for order in found]
            axes.errorbar(means, labels, xerr=errors, fmt="o", label=name, color=COLOURS.get(name, "tab:gray"))
        axes.invert_yaxis()


# ---- compute

SIZES = [
    {"d_model": width, "n_layer": layers, "n_head": width // 64, "d_ff": width * 11 // 4}
    for width, layers in ((64, 3), (128, 4), (256, 6))
]


def power_law(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """(a, b) of y = a x^b, least squares in the logarithms."""
    x, y = (torch.tensor(values).double().log() for values in zip(*points, strict=True))
    b = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    return (y.mean() - b * x.mean()).exp().item(), b.item()


def measure_scaling(args: Namespace) -> None:
    """Every size for every time. Compute is 6 N floating-point operations a token, N the parameters in the blocks."""
    text, minutes = read_text(args), sorted(args.minutes or [1.25, 2.5, 5.0])
    runs = []
    for m in minutes:
        for size in SIZES:
            for way in WAYS:
                found = learn_text(args, text, way, curve=False, minutes=m, model={**text.config.model, **size})
                flops = 6 * found["in_blocks"] * found["tokens"]
                runs.append({"width": size["d_model"], "minutes": m, "flops": flops, **found})
    laws, least = {}, None
    if len(minutes) > 1:
        best = {way: [min((r for r in runs if (r["way"], r["minutes"]) == (way, m)), key=lambda r: r["bits"])
                      for m in minutes] for way in WAYS}  # fmt: skip
        laws = {way: power_law([(r["flops"], r["bits"]) for r in best[way]]) for way in WAYS}
        last = best["diffusion"][-1]
        as_good = [r["flops"] for r in runs if r["way"] == "twin" and r["bits"] <= last["bits"]]
        least = last["flops"] / min(as_good) if as_good else None  # no line is drawn beyond what was measured
    store(args, "scaling", {"corpus": Path(args.corpus).stem, "laws": laws, "least_factor": least, "runs": runs})
    print("\n| objective | width | minutes | tokens | FLOPs | bits per character |\n|---|---|---|---|---|---|")
    with picture(args, "scaling", "floating-point operations of training, 6 N D", "bits per character") as axes:
        for r in runs:
            print(f"| {r['way']} | {r['width']} | {r['minutes']:g} | {r['tokens']:,} | {r['flops']:.2e} ", end="")
            print(f"| {'≤ ' * (r['way'] == 'diffusion')}{r['bits']:.3f} ± {r['standard_error']:.3f} |")
        for way in WAYS:
            for size, marker in zip(SIZES, "os^", strict=True):
                mine = [r for r in runs if (r["way"], r["width"]) == (way, size["d_model"])]
                axes.plot([r["flops"] for r in mine], [r["bits"] for r in mine], marker + "-", color=COLOURS[way],
                          linewidth=0.8, label=f"{way}, width {size['d_model']}")  # fmt: skip
            if way in laws:
                a, b = laws[way]
                ends = [f(r["flops"] for r in runs) for f in (min, max)]
                axes.plot(ends, [a * x**b for x in ends], "--", color=COLOURS[way], label=f"{way}: {a:.3g} C^{b:.3f}")
        axes.set(xscale="log", yscale="log")
        axes.yaxis.set_minor_formatter("{x:.1f}")
    if least:
        print(f"\ndiffusion's last best took at least {least:.1f} times the compute of a twin as good")


# ---- tasks


def pairs_of(examples: Sequence[Example], tokenizer: Tokenizer, given: bool) -> list[Pair]:
    """A line each, behind a line end. What is not learned: its prompt if that is given, else the line end alone."""
    rows = [tokenizer.encode_batch([f"\n{e.prompt}", f"{e.answer}{e.after}\n"]) for e in examples]
    return [(prompt, answer) if given else (prompt[:1], prompt[1:] + answer) for prompt, answer in rows]


def task_rows(pairs: Sequence[Pair], config: TrainConfig) -> Rows:
    """Random ones for ever, filled up with line ends."""
    x0, maskable = stack(pairs, pairs[0][1][-1])
    rng = Generator().manual_seed(config.seed)
    while True:
        chosen = torch.randint(len(x0), (config.batch_size,), generator=rng)
        yield x0[chosen], maskable[chosen]


def learn_both(
    args: Namespace, name: str, task: Task, tokenizer: Tokenizer, config: TrainConfig, given: bool
) -> dict[str, tuple[LLaDA, dict]]:
    """way -> its model, under args.out as `name` and `name-twin`, and the record of its training, whose curve has the
    nats of an answer of the test."""
    rows = lambda: task_rows(pairs_of(task.train, tokenizer, given), config)
    asked = pairs_of([e for e in task.test if not e.after][:64], tokenizer, True)
    look = lambda way, model: WAYS[way].nats(model, asked, 2)[0].mean().item()
    names = {"diffusion": name, "twin": f"{name}-twin"}
    return {way: learned(args.out, names[way], way, tokenizer, rows, config, look) for way in WAYS}


def config_of(args: Namespace, tokenizer: str, size: dict, length: int, batch_size: int, minutes: float) -> TrainConfig:
    minutes = args.minutes[0] if args.minutes else minutes
    model = {**size, "rope_theta": 100.0}
    return TrainConfig(data=args.what, model=model, tokenizer=tokenizer, length=length, batch_size=batch_size,
                       minutes=minutes, seed=args.seed, precision="float32")  # fmt: skip


def diffusion_writes(model: LLaDA, tokenizer: Tokenizer, task: Task, **options: object) -> dict:
    """The task's accuracy, by kind of question, of one canvas a question, a token per step unless told otherwise."""
    length = answer_length(tokenizer, task)
    config = SampleConfig(**{"gen_len": length, "steps": length, "block_len": length, "stop_at_eos": False, **options})
    return measure_task(model, tokenizer, task, config, batch_size=100)[0]


def twin_writes(model: LLaDA, tokenizer: Tokenizer, task: Task) -> dict:
    """The same of the twin, from left to right. In front of a gap it cannot see what stands behind."""
    length, scores = answer_length(tokenizer, task), {}
    for first in range(0, len(task.test), 100):
        batch = task.test[first : first + 100]
        rows = twin_generate(model, [tokenizer.encode(f"\n{e.prompt}") for e in batch], length)
        for example, row in zip(batch, rows, strict=True):
            gap = len(tokenizer.encode(example.answer)) if example.after else length
            scores.setdefault(example.kind, []).append(task.check(example, tokenizer.decode(row[:gap])))
    total = mean_of([score for kind in scores.values() for score in kind])
    return {**total, "kinds": {kind: mean_of(values) for kind, values in sorted(scores.items())}}


def percent(found: dict) -> str:
    return f"{100 * found['accuracy']:.1f} ± {100 * found['standard_error']:.1f} %"


# ---- a grammar whose entropy is known


def measure_tales(args: Namespace) -> None:
    """All tales are equally probable, so a perfect model needs the same nats for each of them: H."""
    told = lambda seed, n: [Example("", tale) for tale in tales(seed, n)]
    tokenizer = Tokenizer.bpe((f"{e.text}\n" for e in told(1, 3000)), 1024)
    config = config_of(args, "bpe:1024", PRESETS["tiny"]["model"], 144, 8, 4.0)
    task = Task("tales", told(1, args.examples or 30_000), told(2, args.questions), TASKS["tales"].check)
    models = learn_both(args, "grammar", task, tokenizer, config, given=False)
    longest = max(len(answer) for _, answer in pairs_of(task.train, tokenizer, given=False))
    filled = lambda answer: answer + answer[-1:] * (longest - len(answer))  # with line ends, as the rows to learn from
    pairs = [(prompt, filled(answer)) for prompt, answer in pairs_of(task.test, tokenizer, given=False)]
    length = expected_length(TALE) + 1
    entropy, found = entropy_per_character() * length, {}
    print(f"exact entropy: {entropy:.3f} nats a tale, {entropy / length:.5f} per character\n")
    print("| | nats a tale | above the entropy | nats per character | share of the entropy |\n|---|---|---|---|---|")
    for way, (model, record) in models.items():
        nats, _ = WAYS[way].nats(model, pairs, args.samples)
        mean, error = nats.mean().item(), (nats.std() / len(nats) ** 0.5).item()
        found[way] = {"nats_per_tale": mean, "standard_error": error, "nats_per_character": mean / length, **record}
        sign = "≤ " * (way == "diffusion")
        print(f"| {way} | {sign}{mean:.2f} ± {error:.2f} | {mean - entropy:.2f} ", end="")
        print(f"| {sign}{mean / length:.5f} | {mean / entropy:.4f} |")
    store(args, "tales", {"entropy_per_tale": entropy, "entropy_per_character": entropy / length, "tales": len(pairs),
                         "samples": args.samples, "ways": found})  # fmt: skip


# ---- facts told in one direction


def rank(model: LLaDA, tokenizer: Tokenizer, task: Task, n: int) -> dict:
    """What the twin knows and cannot write: of n questions with a gap in front, how often is the sentence as it was
    told likeliest, of all answers to such questions?"""
    asked = [e for e in task.test if e.after]
    names = sorted({e.answer for e in asked})
    hits = []
    for example in asked[:n]:
        pairs = pairs_of([Example("", name + example.after) for name in names], tokenizer, given=False)
        hits.append(float(names[twin_log_likelihoods(model, pairs, 256).argmax()] == example.answer))
    return mean_of(hits)


def measure_reversal(args: Namespace) -> None:
    task = make_task("facts:120", args.examples or 20_000, n_test=args.questions)
    tokenizer = Tokenizer.bpe((f"{e.text}\n" for e in task.train), 2048)  # which makes a token of every word
    size = {"n_layer": 2, "n_head": 2, "d_model": 128, "d_ff": 352}
    config = config_of(args, "bpe:2048", size, 32, 128, 2.0)
    models = learn_both(args, "facts", task, tokenizer, config, given=False)
    found = {way: {"record": record} for way, (_, record) in models.items()}
    found["diffusion"] |= diffusion_writes(models["diffusion"][0], tokenizer, task)
    found["twin"] |= twin_writes(models["twin"][0], tokenizer, task)
    found["twin"]["ranked"] = rank(models["twin"][0], tokenizer, task, 50)
    store(args, "reversal", found)
    print("\n| Question | n | diffusion | twin |\n|---|---|---|---|")
    for kind, ours in found["diffusion"]["kinds"].items():
        print(f"| {kind} | {ours['n']} | {percent(ours)} | {percent(found['twin']['kinds'][kind])} |")
    print(f"| the same gaps, the twin ranks all names | 50 | | {percent(found['twin']['ranked'])} |")
    bars(args, "reversal", {way: found[way]["kinds"] for way in WAYS})


# ---- boards

ORDERS: dict[str, dict] = {  # in which diffusion fills the cells: fields of SampleConfig
    "all at once": {"steps": 1},
    "random": {"remasking": "random"},
    "left to right": {"block_len": 1},
    "low confidence": {"remasking": "low_confidence"},
    "margin": {"remasking": "margin"},
}


def measure_sudoku(args: Namespace) -> None:
    check_one_of("size", args.size, (4, 9))
    name, n = {4: ("sudoku4", 40_000), 9: ("sudoku9", 100_000)}[args.size]
    task = make_task(name, args.examples or n, n_test=args.questions)
    tokenizer = Tokenizer.characters(["\n.=123456789"])
    length = 2 * args.size**2 + 3
    size = {"n_layer": 3, "n_head": 4, "d_model": 96, "d_ff": 256}
    config = config_of(args, "characters", size, length, 64, 2.0)
    models = learn_both(args, "sudoku" if args.size == 4 else name, task, tokenizer, config, given=True)
    found = {way: {"record": record} for way, (_, record) in models.items()}
    found["diffusion"]["orders"] = {
        order: diffusion_writes(models["diffusion"][0], tokenizer, task, **options) for order, options in ORDERS.items()
    }
    found["twin"]["orders"] = {"left to right": twin_writes(models["twin"][0], tokenizer, task)}
    store(args, name, found)
    print("\n| | order | boards solved |\n|---|---|---|")
    for way in WAYS:
        for order, solved in found[way]["orders"].items():
            print(f"| {way} | {order} | {percent(solved)} |")
    bars(args, name, {way: found[way]["orders"] for way in WAYS})


# ---- standard errors


def measure_errors(args: Namespace) -> None:
    """Estimates of the same bound at the same cost: counts of masks from strata, and independent masks weighed 1/t."""
    model, tokenizer = load(args.run)
    if tokenizer is None:
        raise BadInput(f"{args.run}: expected a model with a tokenizer, got none; choose another --run")
    tokens = tokenise("docs", tokenizer, cache_dir() / "tokens")
    answer = tokens.val[:12].tolist()
    found = {"run": str(args.run), "exact_bound": exact_bound(model, [], answer), "repetitions": args.questions}
    print(f"exact bound of {len(answer)} tokens: {found['exact_bound']:.3f} nats\n")
    print("| masks | " + " | ".join(f"n = {n}" for n in SAMPLES) + " |\n" + "|---" * (len(SAMPLES) + 1) + "|")
    for name in ("exact count, stratified", "Bernoulli, 1/t"):
        drawn = {n: estimates(model, answer, ESTIMATORS[name], n, args.questions) for n in SAMPLES}
        found[name] = {n: values.std().item() for n, values in drawn.items()}
        print(f"| {name} | " + " | ".join(f"{error:.2f}" for error in found[name].values()) + " |", flush=True)
    store(args, "errors", found)


def main() -> None:
    p = Parser(__doc__.split("\n")[0], "\n".join(__doc__.split("\n")[2:8]))
    p.add_argument("what", help=", ".join(EXPERIMENTS))
    p.add_argument("--minutes", type=float, nargs="+", help="of training, each model; scaling: several")
    p.add_argument("--corpus", default="shakespeare", help="text, scaling: a name or path (default: shakespeare)")
    p.add_argument("--tokenizer", default="characters", help="text, scaling (default: characters)")
    p.add_argument("--preset", default="tiny", help="text, scaling: the model, batch and steps (default: tiny)")
    p.add_argument("--length", type=int, default=256, help="text, scaling: tokens of context (default: 256)")
    p.add_argument(
        "--precision", default="auto", help="text, scaling: auto, float32 or bfloat16, for both (default: auto)"
    )
    p.add_argument("--samples", type=int, default=16, help="masks of each window for the bound (default: 16)")
    p.add_argument(
        "--lr", type=float, nargs="+", default=[1.0], help="text: the twin's rates, as multiples (default: 1)"
    )
    p.add_argument("--windows", type=int, default=16, help="gap: of the text, written in every order (default: 16)")
    p.add_argument("--models", nargs="+", choices=LEARNED, help="gap: of these, the twin among them (default: all)")
    p.add_argument("--size", type=int, default=4, help="sudoku: 4 or 9 (default: 4)")
    p.add_argument("--questions", type=int, default=500, help="tales, reversal, sudoku: of the test; errors: estimates")
    p.add_argument("--run", type=Path, default=Path("runs/docs-tiny-1"), help="errors: of the data docs")
    p.add_argument("--examples", type=int, help="tales, reversal, sudoku: to learn from")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--threads", type=int, default=1, help="of the processor (default: 1)")
    p.add_argument("--out", type=Path, default=Path("runs/course"), help="where models are kept (default: runs/course)")
    p.add_argument("--json", type=Path, default=Path(__file__).parents[1] / "docs" / "versus.json",
                   help="results (default: docs/versus.json); pictures beside it")  # fmt: skip
    args = p.parse_args()
    check_one_of("what", args.what, EXPERIMENTS)
    for minutes in args.minutes or []:
        check_number("minutes", minutes, 1e-3)
    if args.what != "scaling" and len(args.minutes or [0]) > 1:
        raise BadInput(f"minutes: expected one number for {args.what}, got {len(args.minutes)}; give one")
    check_whole("samples", args.samples, 2)
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    EXPERIMENTS[args.what](args)


EXPERIMENTS: dict[str, Callable[[Namespace], None]] = {
    "text": measure_text,
    "gap": measure_gap,
    "scaling": measure_scaling,
    "tales": measure_tales,
    "reversal": measure_reversal,
    "sudoku": measure_sudoku,
    "errors": measure_errors,
}


if __name__ == "__main__":
    run(main)
