"""Which recipe learns the most in three minutes? Trains each for the same time, one after the other, and draws them.

    python benchmarks/recipes.py --minutes 3            all of them: about 4 minutes each, on an otherwise idle machine
    python benchmarks/recipes.py --only default adamw   some of them
    python benchmarks/recipes.py --details --minutes 1 --threads 1      what is smaller: twenty minutes of a processor
    python benchmarks/recipes.py --search --steps 400 --threads 1       what was tried on the way to the default
    python benchmarks/recipes.py --table                                the last, from docs/recipe_search.json

Writes docs/recipes.json and docs/recipes.png; details are printed only; the search goes to docs/recipe_search.json.
The bound is in nats per character of the validation text, whatever the tokens are. With one thread, time is the
processor's.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from curves import Independent, draw, measure, read, write
from torch import Generator, Tensor, nn

from minillada.diffusion import Noised, exact_count, sample_t
from minillada.files import write_json
from minillada.measure.blocks import beside
from minillada.measure.twin import causal, twin_loss
from minillada.training.config import PRESETS, TrainConfig
from minillada.training.making import Made
from minillada.training.pretraining import TextPretraining

DOCS = Path(__file__).parents[1] / "docs"
SEARCHED = DOCS / "recipe_search.json"
TINY = PRESETS["tiny"]["model"]
W192 = {"model": {**TINY, "d_model": 192, "d_ff": 512, "n_head": 3}}

# name -> what differs from the default
RECIPES: dict[str, dict] = {
    "default": {},
    "6 layers": {"model": {**TINY, "n_layer": 6}},
    "width 192": W192,
    "width 256": {"model": {**TINY, "d_model": 256, "d_ff": 704, "n_head": 4}},
    "width 192, vocabulary 2048": {**W192, "tokenizer": "bpe:2048"},
    "width 192, vocabulary 2048, batch 16": {**W192, "tokenizer": "bpe:2048", "batch_size": 16},
    "width 192, adamw": {**W192, "optimizer": "adamw", "lr": 0.003},
    "adamw": {"optimizer": "adamw", "lr": 0.006},
    "adamw at 0.001": {"optimizer": "adamw", "lr": 0.001, "adam_lr": 0.001},
    "1/t of the guidelines": {"process": "bernoulli"},
    "float32": {"precision": "float32"},
    "characters": {"tokenizer": "characters", "length": 256},
}


def plainly(made: Made) -> None:
    """Begin with the same deviation everywhere, as GPT-2 does."""
    rng = torch.Generator().manual_seed(0)
    for p in made.model.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=0.02, generator=rng)


DETAILS: dict[str, dict] = {  # the same; `objective` and `begin` are of curves.measure
    "default": {},
    "another seed": {"seed": 1},
    "head tied to the embedding": {"model": {**TINY, "tie_head": True}},
    "initial deviation 0.02 everywhere": {"begin": plainly},
    "rotary base 10,000": {"model": {**TINY, "rope_theta": 10_000.0}},
    "4 × 128 tokens a step": {"batch_size": 4},
    "16 × 128 tokens a step": {"batch_size": 16},
    "16 × 64 tokens a step": {"batch_size": 16, "length": 64},
    "4 × 256 tokens a step": {"batch_size": 4, "length": 256},
    "no warm-up": {"warmup": 0.0},
    "the rate falls from the start": {"decay": 1.0},
    "the rate falls in the last tenth": {"decay": 0.1},
    "no clipping": {"clip": 1e6},
    "no weight decay": {"weight_decay": 0.0},
    "independent masking levels": {"objective": Independent},
    "Bernoulli masks, weight 1/t": {"process": "bernoulli"},
}


def randomly(made: Made) -> None:
    """Begin with embeddings that know nothing of spelling."""
    embedding = made.model.embed.weight
    nn.init.normal_(embedding, std=embedding.std().item(), generator=torch.Generator().manual_seed(0))


def zero_outputs(made: Made) -> None:
    """Begin with layers that add nothing to the stream."""
    for name, p in made.model.named_parameters():
        if name.endswith(("attn.o.weight", "down.weight")):
            nn.init.zeros_(p)


def soft_cap(made: Made) -> None:
    """Keep logits between -15 and 15, as Gemma 2 does. The official code cannot read such a model."""
    made.model.head.register_forward_hook(lambda head, x, logits: 15 * (logits / 15).tanh())


def squared_relu(made: Made) -> None:
    """Square a ReLU in place of SwiGLU. The official code cannot read such a model."""
    for layer in made.model.layers:
        layer.ffn.up.requires_grad_(False)
        layer.ffn.forward = lambda x, mlp=layer.ffn: mlp.down(F.relu(mlp.gate(x)).square())


def drop_embedding(made: Made) -> None:
    """Leave out a tenth of what embeds a token, in training."""
    made.model.embed.register_forward_hook(lambda embed, tokens, x: F.dropout(x, 0.1, torch.is_grad_enabled()))


def drop_outputs(made: Made) -> None:
    """Leave out a tenth of what attention and feed-forwards return, in training."""
    for part in (part for layer in made.model.layers for part in (layer.attn, layer.ffn)):
        part.register_forward_hook(lambda part, x, y: F.dropout(y, 0.1, torch.is_grad_enabled()))


def value_embeddings(made: Made) -> None:
    """Add a second embedding of the token to the values of every layer. The official code cannot read such a model."""
    c = made.model.config
    extra = nn.Embedding(c.embedding_size, c.n_kv_head * c.d_head)
    nn.init.zeros_(extra.weight)
    made.optimizers[1].add_param_group({"params": [extra.weight], "initial_lr": made.config.adam_lr})
    seen: list[Tensor] = []
    made.model.embed.register_forward_hook(lambda embed, tokens, x: seen.__setitem__(slice(None), [extra(tokens[0])]))
    for layer in made.model.layers:
        layer.attn.v.register_forward_hook(lambda v, x, values: values + seen[0])


def decay_rest(made: Made) -> None:
    """Let the embedding and the head decay too."""
    for group in made.optimizers[1].param_groups:
        group["weight_decay"] = made.config.weight_decay


def slower_attention(made: Made) -> None:
    """Give the matrices of attention half of the rate."""
    (group,) = made.optimizers[0].param_groups
    attention = {p for layer in made.model.layers for p in layer.attn.parameters()}
    of_attention = [p for p in group["params"] if p in attention]
    group["params"] = [p for p in group["params"] if p not in attention]
    made.optimizers[0].add_param_group({"params": of_attention, "initial_lr": made.config.lr / 2})


class Complementary(TextPretraining):
    """Hide half of the rows of a batch twice: a share of 0.1 to 0.9 of the tokens, and then all the others."""

    least = 0.1

    def noise(self, x0: Tensor, rng: Generator) -> tuple[Tensor, Noised]:
        half = x0[: len(x0) // 2]
        t = self.least + (1 - 2 * self.least) * sample_t(len(half), rng)
        hidden = exact_count(half, self.mask_id, t, rng).masked
        x0, masked = half.repeat(2, 1), torch.cat([hidden, ~hidden])
        return x0, Noised(x0.masked_fill(masked, self.mask_id), masked, x0.shape[1] / masked.sum(1).clamp(min=1))


class AllComplementary(Complementary):
    """Do so at all levels."""

    least = 0.0


class Wrong(TextPretraining):
    """Replace a twentieth of the given tokens by others."""

    def noise(self, x0: Tensor, rng: Generator) -> tuple[Tensor, Noised]:
        x0, noised = super().noise(x0, rng)
        wrong = (torch.rand(x0.shape, generator=rng) < 0.05) & ~noised.masked
        others = torch.randint(0, self.vocab_size - 4, x0.shape, generator=rng)
        return x0, noised._replace(xt=torch.where(wrong, others, noised.xt))


class Curriculum(TextPretraining):
    """Hide at most 0.3 of a row at first, and up to all of it from half of the training on."""

    def noise(self, x0: Tensor, rng: Generator) -> tuple[Tensor, Noised]:
        return x0, exact_count(x0, self.mask_id, min(1.0, 0.3 + 1.4 * self.progress) * sample_t(len(x0), rng), rng)


class Short(TextPretraining):
    """Cut rows in halves in the first half of the training."""

    def losses(self, model: nn.Module, batch: Tensor, rng: Generator) -> Iterator[Tensor]:
        return super().losses(model, batch.reshape(-1, batch.shape[1] // (1 + (self.progress < 0.5))), rng)


class Growing(TextPretraining):
    """Take a quarter of the rows of a batch at first, and all of them from half of the training on."""

    def losses(self, model: nn.Module, batch: Tensor, rng: Generator) -> Iterator[Tensor]:
        share = min(1.0, 0.25 + 1.5 * self.progress)
        return super().losses(model, batch[: max(1, round(share * len(batch)))], rng)


class Conversion(TextPretraining):
    """Go from left to right, then in blocks of 4, of 16, and at last with full attention."""

    def losses(self, model: nn.Module, batch: Tensor, rng: Generator) -> Iterator[Tensor]:
        self.block = 4 if self.progress < 0.3 else 16 if self.progress < 0.4 else 0
        yield from super().losses(model, batch, rng)
        self.block = 0


class AlsoTwin(TextPretraining):
    """After the beginning too, let an eighth of the rows go from left to right."""

    def losses(self, model: nn.Module, batch: Tensor, rng: Generator) -> Iterator[Tensor]:
        if self.progress >= self.config.twin:
            n = max(1, len(batch) // 8)
            yield twin_loss(model, batch[:n]) / 8
            batch = batch[n:]
        yield from super().losses(model, batch, rng)


class First(TextPretraining):
    """Begin with another loss, for as long as a training would begin as the twin."""

    first_loss: Callable[[nn.Module, Tensor, Generator], Tensor]

    def losses(self, model: nn.Module, batch: Tensor, rng: Generator) -> Iterator[Tensor]:
        first = self.progress < self.config.twin
        return iter([self.first_loss(model, batch, rng)]) if first else super().losses(model, batch, rng)


class BothWays(First):
    """Begin from left to right in half of the rows, and from right to left in the others."""

    def first_loss(self, model: nn.Module, x0: Tensor, rng: Generator) -> Tensor:
        (ahead, back), length = x0.chunk(2), x0.shape[1]
        seen = [F.pad(ahead[:, :-1], (1, 0), value=self.mask_id), F.pad(back[:, 1:], (0, 1), value=self.mask_id)]
        looks = [
            look.expand(len(rows), 1, -1, -1) for look, rows in ((causal(length), ahead), (causal(length).T, back))
        ]
        return F.cross_entropy(model(torch.cat(seen), torch.cat(looks)).transpose(1, 2), x0)


class AnyOrder(First):
    """Begin with one token after the other in a random order, each seeing those before it alone, as XLNet does."""

    def first_loss(self, model: nn.Module, x0: Tensor, rng: Generator) -> Tensor:
        length = x0.shape[1]
        order = torch.randperm(length, generator=rng)  # the rank of each place
        both = torch.cat([order, order + length])
        look = beside(length, 1)[both][:, both].expand(len(x0), 1, -1, -1)
        x, places = torch.cat([torch.full_like(x0, self.mask_id), x0], 1), torch.ones_like(x0).nonzero().unbind(1)
        logits = model(x, attn_mask=look, positions=torch.arange(length).repeat(2), where=places)
        return F.cross_entropy(logits, x0.flatten())


UNSPELLED = {"bpe_dropout": 0.0, "begin": randomly}  # the recipe before it used spelling
BEFORE = {**UNSPELLED, "twin": 0.0, "t_min": 0.0}  # and that before it began as the twin
SEARCH: dict[str, dict] = {  # the same; `objective` and `begin` are of curves.measure
    "the default": {},
    "random vectors at first": {"begin": randomly},
    "BPE-dropout 0": {"bpe_dropout": 0.0},
    "BPE-dropout 0.01": {"bpe_dropout": 0.01},
    "BPE-dropout 0.05": {"bpe_dropout": 0.05},
    "before": BEFORE,
    "before, outputs begin at zero": {**BEFORE, "begin": lambda made: (randomly(made), zero_outputs(made))},
    "before, complementary masks of all levels": {**BEFORE, "objective": AllComplementary},
    "before, rate 0.02": {**BEFORE, "lr": 0.02},
    "before, levels above 0.1": {**BEFORE, "t_min": 0.1},
    "before, a fifth from left to right": {**BEFORE, "twin": 0.2},
    "before, a third from left to right": {**BEFORE, "twin": 0.33},
    "before, half from left to right": {**BEFORE, "twin": 0.5},
    "before, a third from both sides": {**BEFORE, "twin": 0.33, "objective": BothWays},
    "before, a fifth in a random order": {**BEFORE, "twin": 0.2, "objective": AnyOrder},
}
ON_TOP: dict[str, dict] = {  # what differs from the default; and once more, from the recipe before spelling
    "a third from left to right, levels above 0.1": {"twin": 0.33, "t_min": 0.1},
    "a tenth from left to right, levels above 0.1": {"twin": 0.1, "t_min": 0.1},
    "levels above 0.1": {"t_min": 0.1},
    "levels above 0.1, rate 0.02": {"t_min": 0.1, "lr": 0.02},
    "levels above 0.1, 4 heads": {"t_min": 0.1, "model": {**TINY, "n_head": 4}},
    "levels above 0.3": {"t_min": 0.3},
    "complementary masks": {"objective": Complementary},
    "outputs begin at zero": {"begin": zero_outputs},
    "norms of queries and keys": {"model": {**TINY, "qk_norm": True}},
    "squared ReLU": {"begin": squared_relu, "model": {**TINY, "d_ff": 528}},
    "few masks first": {"objective": Curriculum},
    "soft cap of logits": {"begin": soft_cap},
    "tied head": {"model": {**TINY, "tie_head": True}},
    "short rows first": {"objective": Short},
    "16 rows a step": {"batch_size": 16},
    "embedding dropout 0.1": {"begin": drop_embedding},
    "dropout 0.1": {"begin": drop_outputs},
    "a twentieth of the given tokens wrong": {"objective": Wrong},
    "rate 0.02": {"lr": 0.02},
    "weight decay 0.3": {"weight_decay": 0.3},
    "weight decay 1": {"weight_decay": 1.0},
    "the embedding and the head decay too": {"begin": decay_rest},
    "half of the rate for attention": {"begin": slower_attention},
    "value embeddings": {"begin": value_embeddings},
    "4 heads": {"model": {**TINY, "n_head": 4}},
    "8 heads": {"model": {**TINY, "n_head": 8}},
    "8,192 merged tokens": {"tokenizer": "bpe:8192"},
    "2,048 merged tokens": {"tokenizer": "bpe:2048"},
    "4 × 256 tokens a step": {"batch_size": 4, "length": 256},
    "more and more rows, up to 16": {"batch_size": 16, "objective": Growing},
    "then blocks of 4 and of 16": {"objective": Conversion},
    "an eighth of the rows from left to right": {"objective": AlsoTwin},
    "the rate falls in the last seven tenths": {"decay": 0.7},
    "initial deviation 0.02 everywhere": {"begin": plainly},
}


def unspelled(changes: dict) -> dict:
    """Return the same changes, made to the recipe before spelling."""
    begin = changes.get("begin", lambda made: None)
    return {**changes, **UNSPELLED, "begin": lambda made: (randomly(made), begin(made))}


SEARCH |= ON_TOP | {f"unspelled, {name}": unspelled(changes) for name, changes in ON_TOP.items()}
SEARCH["unspelled"] = UNSPELLED


def table(rows: list[dict]) -> Iterator[str]:
    """Yield what was found as the lines of a Markdown table, by the length of the training and the bound."""
    yield "| What differs | Trained for | Seeds | Steps | Bound, nats/char | Of the training text |"
    yield "|---" * 6 + "|"
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["trained"], row["name"]), []).append(row)
    mean = lambda group, key: sum(row[key] for row in group) / len(group)
    for (trained, name), group in sorted(groups.items(), key=lambda item: (item[0][0], mean(item[1], "bound"))):
        bound = f"{mean(group, 'bound'):.3f}"
        if len(group) > 1:
            bound += " (" + ", ".join(f"{row['bound']:.3f}" for row in group) + ")"
        steps, seen = mean(group, "steps"), mean(group, "on_training_text")
        yield f"| {name} | {trained} | {len(group)} | {steps:,.0f} | {bound} | {seen:.3f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--only", nargs="+", metavar="RECIPE", help=f"of {', '.join(RECIPES)}; of the details: by name")
    parser.add_argument("--details", action="store_true", help="what makes less of a difference")
    parser.add_argument("--search", action="store_true", help="what was tried on the way to the default")
    parser.add_argument("--table", action="store_true", help="print what the search has found, and train nothing")
    parser.add_argument("--steps", type=int, help="in place of minutes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found_before = json.loads(SEARCHED.read_text()) if SEARCHED.exists() else []
    if args.table:
        print("\n".join(table(found_before)))
        return
    recipes = SEARCH if args.search else DETAILS if args.details else RECIPES
    limit = {"steps": args.steps} if args.steps else {"minutes": args.minutes}
    file = DOCS / "recipes.json"
    if strange := set(args.only or ()) - set(recipes):
        parser.error(f"only: expected {', '.join(recipes)}, got {', '.join(sorted(strange))}")
    for name in args.only or recipes:
        changes = dict(recipes[name])
        how = {key: changes.pop(key) for key in ("objective", "begin") if key in changes}
        precision = "auto" if args.search else "bfloat16"
        config = TrainConfig(**{"precision": precision, "seed": args.seed, **changes, **limit})
        found = measure(name, config, **how)
        if args.search:
            trained = f"{args.steps} steps" if args.steps else f"{args.minutes:g} minutes"
            trained += f", {args.threads} cores" if args.threads > 1 else ""
            row = {"name": name, "trained": trained, "seed": args.seed}
            found_before.append(row | {key: found[key] for key in ("steps", "bound", "on_training_text", "precision")})
            write_json(SEARCHED, found_before)
        elif not args.details:
            results = read(file) | {name: found | {"changes": changes}}
            write(results, file, minutes=args.minutes)
            draw(results, DOCS / "recipes.png")


if __name__ == "__main__":
    main()
