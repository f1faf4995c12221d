"""Write a report card of a model, one page: bound, flawless stories or solved boards, samples, speed, curve."""

import base64
import html
import json
import time
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean

from ..errors import BadInput
from ..files import write_file
from ..show.plots import loss_curve
from ..text.tales import entropy_per_character, flawless, is_tale, mistake
from ..text.tasks import make_task
from .cli import Parser, newest_run, run, say
from .play import NO_END, ORDERS, Player, solutions

FAST = {"commit": "threshold:0.9", "remasking": "low_confidence", "temperature": 0.0, "block_len": 32}
DECODINGS = {  # name -> fields of SampleConfig
    "one token a step": {},
    "all that is surer than 0.9 in a window of 32": FAST,
    "the same with a dual cache, which is an approximation": {**FAST, "cache": "dual", "block": 0},
}
STYLE = """:root{color-scheme:light dark}body{font:16px/1.5 system-ui,sans-serif;max-width:46rem;margin:2rem auto;
padding:0 1rem}table{border-collapse:collapse}td{padding:.2rem 1.5rem .2rem 0;border-bottom:1px solid #8884}
blockquote{margin:.6rem 0;padding:.1rem 1rem;border-left:3px solid #22a565;white-space:pre-wrap}
blockquote.flawed{border-color:#d03030}img{max-width:100%;background:#fff;border-radius:4px}"""


def written(player: Player, n: int, **more: object) -> tuple[list[str], float]:
    """Write n texts from nothing together; return them and the seconds that it took."""
    start, length = time.perf_counter(), player.room if "block_len" not in more else player.room // 32 * 32
    rows = player.filled(*[[player.model.config.mask_id] * length] * n, **more)
    return [player.text(row) for row in rows], time.perf_counter() - start


def solved(player: Player, n: int) -> dict[str, float]:
    """Return the share of unseen boards that are solved in each order."""
    puzzles = make_task("sudoku4", 0, player.args.seed, n).test
    orders = {**ORDERS, "in random order": {**NO_END, "remasking": "random"}}
    return {order: fmean(solutions(player, puzzles, **more)) for order, more in orders.items()}


def table(rows: Iterable[tuple[str, str]]) -> str:
    cells = ("".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows)
    return f"<table>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"


def facts(player: Player, name: str) -> list[tuple[str, str]]:
    """Return what there is to say of the model and its training."""
    c, log = player.model.config, Path(name) / "log.jsonl"
    found = [("model", f"{player.model.n_parameters():,} parameters, {c.n_layer} layers of width {c.d_model}")]
    if log.is_file():
        records = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
        bounds = [r for r in records if r.get("bound") is not None]
        found.append(("training", f"{records[-1]['step']:,} steps, {records[-1]['seconds']:.0f} s"))
        found += [("held-out bound", f"at most {r['bound']:.4f} nats per character") for r in bounds[-1:]]
    return found


def card(player: Player, name: str, n: int) -> str:
    """Return the page."""
    parts, rows = [f"<h1>{html.escape(name)}</h1>"], facts(player, name)
    if player.tokenizer.vocab_size < 32:  # digits: it solves boards
        rows += [
            (f"boards solved, {order}", f"{share:.1%} of {n} unseen") for order, share in solved(player, n).items()
        ]
    else:
        told, seconds = written(player, n)
        teller = any(at is None or at > 30 for at in map(mistake, told))  # a text of another kind fails at once
        if teller:
            rows.append(
                ("flawless stories", f"{flawless(told):.1%} of {n} written from nothing, {len(set(told))} distinct")
            )
            rows.append(("the stories' entropy", f"{entropy_per_character():.4f} nats per character"))
        for how, more in DECODINGS.items():
            many, took = written(player, n, **more) if more else (told, seconds)
            tokens = sum(map(len, player.tokenizer.encode_batch(many)))
            rows.append((f"speed, {how}", f"{tokens / took:,.0f} tokens/s, {n} texts at a time"))
        marks = [" class='flawed'" if teller and not is_tale(text) else "" for text in told]
        samples = [f"<blockquote{m}>{html.escape(t)}</blockquote>" for m, t in zip(marks, told[:5], strict=False)]
        parts += ["<h2>Samples</h2>", *samples]
    parts.insert(1, table(rows))
    if (Path(name) / "log.jsonl").is_file() and (png := loss_curve(Path(name))):
        parts += [
            "<h2>Curve</h2>",
            f'<img alt="curve" src="data:image/png;base64,{base64.b64encode(png.read_bytes()).decode()}">',
        ]
    head = f'<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>{html.escape(name)}</title>'
    return f"{head}<style>{STYLE}</style>{''.join(parts)}</html>\n"


def main() -> None:
    p = Parser(__doc__, "example: python -m minillada report runs/docs-tiny-1 --out card.html")
    p.add_argument("model", nargs="?", help="a run or a model directory (default: the newest run)")
    p.add_argument("--out", type=Path, default=Path("report.html"), help="a new file (default: report.html)")
    p.add_argument("--n", type=int, default=50, help="texts or boards to judge by (default: 50)")
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()
    if args.out.exists():
        raise BadInput(f"out: expected a new file, got {args.out}, which exists; give another name")
    name = args.model or newest_run()
    write_file(args.out, [card(Player.load(name, args), name, args.n).encode()])
    say(f"report written to {args.out}")


if __name__ == "__main__":
    run(main)
