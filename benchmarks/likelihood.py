"""The standard error of a likelihood at equal cost: how the masks are drawn, against how many there are.

    python benchmarks/likelihood.py                        a golden checkpoint, half a minute
    python benchmarks/likelihood.py RUN --text book.txt    a model of your own, on the beginning of a text

Every estimate costs n evaluations. Its standard error is the spread over many repetitions; its bias is held against
the exact bound, every mask enumerated.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Generator, Tensor

from minillada.commands.cli import Parser, run
from minillada.diffusion import Noised, bernoulli, exact_count, model_bound, sample_t
from minillada.errors import BadInput
from minillada.measure.likelihood import exact_bound
from minillada.model import LLaDA
from minillada.text.corpora import plain_text
from minillada.weights.checkpoint import load

GOLDEN = Path(__file__).parents[1] / "tests/golden/llada_dense"
SIZES = (8, 32, 128)


def stratified(x0: Tensor, mask_id: int, rng: Generator) -> Noised:
    """Ours: counts of masks from n equal strata."""
    return exact_count(x0, mask_id, sample_t(len(x0), rng), rng)


def independent(x0: Tensor, mask_id: int, rng: Generator) -> Noised:
    """Counts drawn apart from each other (LLaDA, eq. 14)."""
    return exact_count(x0, mask_id, sample_t(len(x0), rng, stratified=False), rng)


def official_counts(first: int, length: int, size: int) -> Tensor:
    """The counts of a batch (size,): a regular step apart, from the first on, rounded half to even."""
    return (torch.linspace(first, first + (size - 1) * length / size, size).round().long() - 1) % length + 1


def rounded(x0: Tensor, mask_id: int, rng: Generator, batch: int = 16) -> Noised:
    """As the official code draws them: in batches of 16, each with a random first count."""
    length, sizes = x0.shape[1], [min(batch, len(x0) - at) for at in range(0, len(x0), batch)]
    firsts = [torch.randint(1, length + 1, (), generator=rng).item() for _ in sizes]
    count = torch.cat([official_counts(first, length, size) for first, size in zip(firsts, sizes, strict=True)])
    masked = torch.rand(x0.shape, generator=rng).argsort(1).argsort(1) < count[:, None]
    return Noised(x0.masked_fill(masked, mask_id), masked, length / count)


def plain(x0: Tensor, mask_id: int, rng: Generator) -> Noised:
    """Every token by itself with probability t, weight 1/t (LLaDA, eq. 12), t apart from each other."""
    return bernoulli(x0, mask_id, sample_t(len(x0), rng, stratified=False), rng)


ESTIMATORS: dict[str, Callable[[Tensor, int, Generator], Noised]] = {
    "exact count, stratified": stratified,
    "exact count, independent": independent,
    "exact count, official rounding": rounded,
    "Bernoulli, 1/t": plain,
}


@torch.no_grad()
def estimates(model: LLaDA, answer: list[int], draw: Callable, n: int, repetitions: int) -> Tensor:
    """(repetitions,) estimates of the bound, each the mean over n masks."""
    rng, x0 = Generator().manual_seed(n), torch.tensor([answer])
    drawn = [draw(x0.expand(n, -1), model.config.mask_id, rng) for _ in range(repetitions)]
    noised = Noised(*map(torch.cat, zip(*drawn, strict=True)))
    parts = torch.arange(len(noised.xt)).split(512)
    bounds = [model_bound(model, x0.expand(len(p), -1), Noised(*(field[p] for field in noised))) for p in parts]
    return torch.cat(bounds).double().view(repetitions, n).mean(1)


def main() -> None:
    p = Parser(__doc__.split("\n")[0], "\n".join(__doc__.split("\n")[2:4]))
    p.add_argument(
        "run", nargs="?", default=str(GOLDEN), help="a run or model directory (default: a golden checkpoint)"
    )
    p.add_argument("--text", type=Path, help="where the answer is taken from (default: random tokens)")
    p.add_argument("--length", type=int, default=10, help="tokens of the answer, at most 16 (default: 10)")
    p.add_argument("--repetitions", type=int, default=400, help="estimates of each kind (default: 400)")
    args = p.parse_args()
    model, tokenizer = load(args.run)
    if args.text is None:
        answer = torch.randint(0, 250, (args.length,), generator=Generator().manual_seed(0)) % model.config.mask_id
        answer = answer.tolist()
    elif tokenizer is None:
        raise BadInput(f"{args.run}: expected a tokenizer for the text, got none; leave out --text")
    else:
        answer = tokenizer.encode("".join(plain_text(args.text))[:1000])[: args.length]
    exact = exact_bound(model, [], answer)
    print(f"exact bound of {len(answer)} tokens: {exact:.4f} nats; {args.repetitions} estimates of each kind\n")
    print("| Masks | " + " | ".join(f"n = {n}" for n in SIZES) + " | times the first, n = 128 | bias, n = 8 |")
    print("|---" * (len(SIZES) + 3) + "|")
    least = None
    for name, draw in ESTIMATORS.items():
        found = {n: estimates(model, answer, draw, n, args.repetitions) for n in SIZES}
        errors = [found[n].std().item() for n in SIZES]
        least = least or errors[-1]
        bias, noise = found[8].mean().item() - exact, errors[0] / args.repetitions**0.5
        row = " | ".join(f"{error:.3f}" for error in errors)
        print(f"| {name} | {row} | {errors[-1] / least:.1f} | {bias:+.3f} ± {noise:.3f} |")
    drawn = torch.cat([official_counts(first, len(answer), 8) for first in range(1, len(answer) + 1)])
    often = drawn.bincount(minlength=len(answer) + 1)[1:] / len(drawn)
    print(f"\nofficial rounding, n = 8: a count is drawn {often.min():.1%} to {often.max():.1%} of the time, ", end="")
    print(f"not {1 / len(answer):.1%} each")


if __name__ == "__main__":
    run(main)
