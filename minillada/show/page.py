"""Turn a trace into something to look at: a self-contained HTML page, an animated SVG or GIF, a picture of the order.

What a model or a user wrote gets into a file as data: the page sets text, never markup, and runs its own script alone.
"""

import base64
import hashlib
import html
import io
import json
import os
import re
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..errors import BadInput, BadLuck
from ..files import write_file
from ..text.tokenizer import display
from .terminal import columns
from .trace import COMMITTED, REVISED, Trace

HERE = Path(__file__).parent
UNKNOWN = 255  # where there is no probability; others are 0 to 254


def pack(numbers: Sequence[int] | np.ndarray) -> list[str]:
    """Encode whole numbers as [type, base64], in as few bytes each as the largest needs."""
    numbers = np.asarray(numbers, dtype=np.uint32)
    size = np.min_scalar_type(numbers.max(initial=0)).itemsize
    return [f"u{size}", base64.b64encode(numbers.astype(f"<u{size}").tobytes()).decode()]


def level(probability: Sequence[float] | np.ndarray) -> np.ndarray:
    """Turn probabilities into whole numbers, 0 to 254 for 0 to 1, and UNKNOWN for NaN."""
    p = np.asarray(probability, dtype=np.float64)
    return np.where(np.isnan(p), UNKNOWN, np.round(254 * np.nan_to_num(p))).astype(int)


def document(trace: Trace) -> dict:
    """Collect what the page is told. Columns: the canvas before, the number of events per position, events, rivals."""
    there = trace.kind == COMMITTED
    found = zip(trace.step[there].tolist(), trace.position[there].tolist(), strict=True)
    rivals = [trace.rivals.get(place, ([], [])) for place in found]
    top = min((len(ids) for ids, _ in rivals), default=0)
    flat = [np.array([row[i][:top] for row in rivals]).reshape(-1) for i in (0, 1)]
    parts = [trace.given, trace.final, trace.token, flat[0]]
    known, index = np.unique(np.concatenate(parts).astype(int), return_inverse=True)
    given, _, token, rival = np.split(index, np.cumsum([len(part) for part in parts[:3]]))
    count = np.bincount(trace.position, minlength=len(trace.given))
    number, final = {id: i for i, id in enumerate(known.tolist())}, trace.final.tolist()
    packed = [given, count, trace.step, trace.kind, token, level(trace.probability), rival, level(flat[1])]
    return {
        "steps": trace.n_steps,
        "top": top,
        "words": trace.texts(known),
        "special": [i for i, id in enumerate(known.tolist()) if id in trace.tokenizer.special_ids],
        "mask": number.get(trace.tokenizer.mask_id, -1),
        "joined": [[at, n, text, *map(number.get, final[at : at + n])] for at, n, text in trace.joined()],
        "columns": [pack(column) for column in packed],
    }


def to_html(trace: Trace, title: str = "minillada") -> str:
    """Make one page that needs nothing else: a slider, a player, and for each token how it came about."""
    page, script = ((HERE / name).read_text(encoding="utf-8") for name in ("page.html", "page.js"))
    allowed = {"script": script, "style": re.search("<style>(.*)</style>", page, re.DOTALL)[1]}
    hashes = {k: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for k, text in allowed.items()}
    parts = {
        "POLICY": "default-src 'none'; " + "; ".join(f"{kind}-src 'sha256-{hash}'" for kind, hash in hashes.items()),
        "TITLE": html.escape(" ".join(display(title).split())),
        "DATA": json.dumps(document(trace), separators=(",", ":")).replace("<", "\\u003c"),  # ASCII, and ends no script
        "SCRIPT": script,
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], page)


# ---- Pictures: the final text on a grid, every token at its place from the beginning ---------------------------------


class Cell(NamedTuple):  # a piece of a token on one line
    line: int
    column: int
    width: int
    text: str


def cells(trace: Trace, width: int = 80) -> tuple[list[list[Cell]], int]:
    """Lay the final text out: return the cells of each position, and how many lines there are."""
    texts = trace.texts(trace.final)
    for at, n, text in trace.joined():
        texts[at : at + n] = [text] + [""] * (n - 1)
    line, column, found = 0, 0, []
    for text in texts:
        mine = []
        for i, piece in enumerate(text.expandtabs(4).split("\n")):
            if i:
                line, column = line + 1, 0
            while piece or not mine:
                if column and column + max(sum(map(columns, piece)), 1) > width:
                    line, column = line + 1, 0
                cut = next((k for k in range(len(piece)) if sum(map(columns, piece[: k + 1])) > width), len(piece))
                mine.append(Cell(line, column, sum(map(columns, piece[:cut])), piece[:cut]))
                column, piece = column + mine[-1].width, piece[cut:]
        found.append(mine)
    return found, line + 1


def states(trace: Trace) -> list[list[tuple[int, int, str, int]]]:
    """Return for each position the tokens written there: (first step, step in which it was gone, text, level)."""
    found: list[list] = [[] for _ in trace.given]
    for position, token, first, gone, sure in trace.spans():
        text = trace.texts([token])[0].replace("\n", "⏎")
        found[position].append((first, gone, text, int(level([sure])[0])))
    return found


STYLE = """text{font:14px ui-monospace,'DejaVu Sans Mono',Menlo,Consolas,monospace;white-space:pre;fill:#22252b}
.p{fill:#fdfcf9}.h{fill:#cfd2d6}.n{fill:#7fdca4}.g{fill:#6a7079}.d{fill:#f08c1a}
@media(prefers-color-scheme:dark){text{fill:#e4e6ea}.p{fill:#16181d}.h{fill:#454b55}.n{fill:#1d7a4a}.g{fill:#989fa9}}"""
WIDE, HIGH, PAD = 8.4, 22.0, 12.0  # pixels: a column, a line, the margin
LEAD, HOLD, FRESH = 0.6, 3.0, 0.5  # seconds: of masks, of the finished text, that a new token stays marked


def seconds(trace: Trace) -> float:
    """Return how long to show one step, so that all take about eight seconds."""
    return min(0.4, max(0.02, 8 / trace.n_steps))


def blink(shown: list[tuple[float, float]], total: float) -> str:
    """Return an SVG animation that shows its element in these (from, to) seconds of every `total` seconds."""
    moments = {0.0: 0}
    for start, stop in shown:
        moments |= {start: 1, stop: 0}
    moments = {at: value for at, value in sorted(moments.items()) if at < total}
    values, times = ";".join(map(str, moments.values())), ";".join(f"{at / total:.4f}" for at in moments)
    return (f'<animate attributeName="opacity" dur="{total:.2f}s" repeatCount="indefinite" calcMode="discrete" '
            f'values="{values}" keyTimes="{times}"/>')  # fmt: skip


def svg_text(cell: Cell, style: str = "") -> str:
    if not cell.text.strip():
        return ""
    text = html.escape(re.sub("[\ufffe\uffff]", "\ufffd", cell.text))  # the two that XML has no place for
    x, y = PAD + cell.column * WIDE, PAD + cell.line * HIGH + 16
    fitted = f'textLength="{cell.width * WIDE:.1f}" lengthAdjust="spacingAndGlyphs"'  # whatever the font
    return f'<text x="{x:.1f}" y="{y:.1f}" {fitted}{style}>{text}</text>'


def svg_box(cell: Cell, style: str, inside: str = "") -> str:
    x, y, width = PAD + cell.column * WIDE, PAD + cell.line * HIGH + 2, max(1, cell.width) * WIDE - 1
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="18" rx="3" {style}>{inside}</rect>'


def to_svg(trace: Trace, width: int = 80) -> str:
    """Draw the text appearing, over and over, light or dark as the reader's system is. It needs no script."""
    each, (places, n_lines) = seconds(trace), cells(trace, width)
    total = LEAD + trace.n_steps * each + HOLD
    when = lambda step: LEAD + (step + 1) * each if step < trace.n_steps else 2 * total
    out = []
    for place, life in zip(places, states(trace), strict=True):
        if not life:
            out += [svg_text(cell, ' class="g"') for cell in place]
            continue
        gaps = zip([0.0, *(when(gone) for _, gone, *_ in life)], [*(when(first) for first, *_ in life)], strict=False)
        hole = blink([(a, b) for a, b in gaps if a < b], total)
        out += [svg_box(cell, 'class="h" opacity="0"', hole) for cell in place]
        for first, gone, text, sure in life:
            last = gone == trace.n_steps
            mine = place if last else [place[0]._replace(text=text, width=max(1, min(place[0].width, len(text))))]
            doubt = "" if sure == UNKNOWN else f'class="d" fill-opacity="{(1 - sure / 254) * 0.5:.2f}"'
            new = blink([(when(first), min(when(gone), when(first) + max(each, FRESH)))], total)
            inside = [svg_box(cell, doubt) * bool(doubt) + svg_box(cell, 'class="n" opacity="0"', new)
                      + svg_text(cell) for cell in mine]  # fmt: skip
            out.append(f'<g opacity="{int(last)}">{"".join(inside)}{blink([(when(first), when(gone))], total)}</g>')
    w, h = 2 * PAD + width * WIDE, 2 * PAD + n_lines * HIGH
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {w:.0f} {h:.0f}" width="{w:.0f}" height="{h:.0f}">'
    return f'{head}<style>{STYLE}</style><rect class="p" width="100%" height="100%" rx="8"/>{"".join(out)}</svg>'


def to_gif(trace: Trace, width: int = 80, most: int = 150) -> bytes:
    """Draw the same as a dark GIF of at most `most` frames. Needs the extra `plot`: matplotlib's font and Pillow."""
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSansMono.ttf", 14)
    (places, n_lines), lives, n = cells(trace, width), states(trace), trace.n_steps
    moments = np.unique(np.linspace(0, n, min(n, most) + 1).round().astype(int)).tolist()
    size, frames = (round(2 * PAD + width * WIDE), round(2 * PAD + n_lines * HIGH)), []
    for before, done in zip([-1, *moments], moments, strict=False):
        frame = Image.new("RGB", size, "#16181d")
        pen = ImageDraw.Draw(frame)
        for place, life in zip(places, lives, strict=True):
            now = next((state for state in life if state[0] < done and (state[1] >= done or state[1] == n)), None)
            for cell in place:
                x, y = PAD + cell.column * WIDE, PAD + cell.line * HIGH
                box = (x, y + 2, x + max(1, cell.width) * WIDE - 1, y + 20)
                text = cell.text if now is None or now[1] == n else now[2][: max(1, cell.width)] * (cell is place[0])
                hole = life and now is None
                if hole or (now and now[0] >= before):
                    pen.rectangle(box, "#454b55" if hole else "#1d7a4a")
                if not hole:
                    pen.text((x, y + 3), text, "#e4e6ea" if life else "#989fa9", font)
        frames.append(frame)
    palette = frames[len(frames) // 2].quantize(32)
    small = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    each, buffer = max(20, round(1000 * seconds(trace) * n / len(frames))), io.BytesIO()
    durations = [round(1000 * LEAD), *[each] * (len(small) - 2), round(1000 * HOLD)][-len(small) :]
    small[0].save(buffer, "GIF", save_all=True, append_images=small[1:], duration=durations, loop=0)
    return buffer.getvalue()


def to_order(trace: Trace) -> bytes:
    """Draw the order of commitment as a PNG: position against step, coloured by probability. Needs matplotlib."""
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    figure, buffer = Figure(figsize=(8, 4.5), layout="constrained"), io.BytesIO()
    axes = figure.add_subplot()
    there, back = (trace.kind == COMMITTED) & ~np.isnan(trace.probability), trace.kind == REVISED
    colours = LinearSegmentedColormap.from_list("", ["#f08c1a", "#2a62c9"])
    dots = axes.scatter(trace.position[there], trace.step[there] + 1, s=14, c=trace.probability[there],
                        cmap=colours, vmin=0, vmax=1, linewidths=0)  # fmt: skip
    if back.any():
        axes.scatter(trace.position[back], trace.step[back] + 1, s=26, marker="x", c="tab:red", linewidths=1,
                     label="taken back")  # fmt: skip
        axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1))
    axes.set(xlabel="position", ylabel="step", xlim=(-1, len(trace.given)), ylim=(trace.n_steps + 1, 0))
    axes.spines[["top", "right"]].set_visible(False)
    figure.colorbar(dots, label="probability when committed")
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


FORMS: dict[str, tuple[Callable[[Trace], str | bytes], str]] = {
    "html": (to_html, "a page to replay the run step by step, in any browser"),
    "svg": (to_svg, "an animation of the text appearing, light and dark"),
    "gif": (to_gif, "the same as a GIF (needs the extra `plot`)"),
    "order": (to_order, "a PNG of the order of commitment (needs the extra `plot`)"),
}


def check_file(form: str, path: Path) -> None:
    """Refuse, before anything is computed, a file that is there or could not be written. Raises BadInput, BadLuck."""
    if os.path.lexists(path):
        raise BadInput(f"{form}: expected a new file, got {path}, which exists; give another name")
    if not path.parent.is_dir():
        raise BadLuck(f"{form}: expected a directory {path.parent} to write in, got none; make it")
    if form in ("gif", "order") and not find_spec("matplotlib"):
        raise BadLuck(f"{form}: expected matplotlib, got none; pip install 'minillada[plot]'")


def save(trace: Trace, form: str, path: Path) -> None:
    """Write one of the forms, whole or not at all. Raises BadLuck."""
    made = FORMS[form][0](trace)
    write_file(path, [made.encode() if isinstance(made, str) else made])
