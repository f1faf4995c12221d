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
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

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


def document(trace: Trace, board: int = 0) -> dict:
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
        "board": trace.board(board) if board else [],
    }


def to_html(trace: Trace, title: str = "How this text appeared", board: int = 0) -> str:
    """Make one page that needs nothing else: a slider, a player, and for each token how it came about. board: the side
    of a board, as 4, if the text is one (see `Trace.board`); it is drawn as a board then."""
    page, script = ((HERE / name).read_text(encoding="utf-8") for name in ("page.html", "page.js"))
    allowed = {"script": script, "style": re.search("<style>(.*)</style>", page, re.DOTALL)[1]}
    hashes = {k: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for k, text in allowed.items()}
    sources = [f"{kind}-src 'sha256-{hash}'" for kind, hash in hashes.items()] + ["img-src data:"] * bool(trace.picture)
    small = ' class="small"' * trace.picture.startswith("data:image/png")  # see `data_url`
    parts = {
        "POLICY": "; ".join(["default-src 'none'", *sources]),
        "PICTURE": f'<img{small} alt="the picture" src="{html.escape(trace.picture)}">' * bool(trace.picture),
        "TITLE": html.escape(" ".join(display(title).split())),
        "DATA": json.dumps(document(trace, board), separators=(",", ":")).replace("<", "\\u003c"),  # ends no script
        "SCRIPT": script,
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], page)


# ---- Pictures: every hole is equally wide, so that it does not tell which word will come -----------------------------

Life = tuple[int, int, str, int]  # a token at its place: first step, step in which it was gone, text, level


class Piece(NamedTuple):  # of a token, on one line
    position: int
    text: str
    gap: int  # columns while it is a hole; 0 if the token began on the line before


def span(text: str) -> int:
    """Return how many columns a text takes."""
    return sum(map(columns, text))


def lines(trace: Trace, width: int) -> list[list[Piece]]:
    """Break the final text at spaces into lines of at most `width` columns, in which its holes alone have room too. A
    hole is as wide as the mean token. Special tokens, as the end of the text, show nothing."""
    special, mask_id = trace.tokenizer.special_ids, trace.tokenizer.mask_id
    texts = [text * (token not in special) for text, token in zip(trace.texts(trace.final), trace.final, strict=True)]
    for at, n, text in trace.joined():
        texts[at : at + n] = [text] + [""] * (n - 1)
    ours = [text for text, token in zip(texts, trace.given, strict=True) if text and token == mask_id]
    hole = max(1, round(span("".join(ours)) / max(1, len(ours))))
    full = lambda parts: max(span("".join(text for _, text in parts)), hole * len({at for at, _ in parts})) > width
    words: list[list[tuple[int, str]]] = []  # (position, text): what no line break divides
    for position, text in enumerate(texts):
        for part in re.findall(rf"\n|[^\S\n]+|\S{{1,{width // 2}}}", text.expandtabs(4)) or [""]:
            apart = not words or part.isspace() or words[-1][-1][1].isspace() or full([*words[-1], (position, part)])
            words += [[]] * apart
            words[-1] = [*words[-1], (position, part)]
    found: list[list[tuple[int, str]]] = [[]]
    for word in words:
        position, text = word[0]
        if text == "\n":
            found[-1:] = [[*found[-1], (position, "")], []]
        elif text.isspace() or not full(found[-1] + word):  # a space may stand beyond the end of the line
            found[-1] = found[-1] + word
        else:
            brought = found[-1][-1:] and found[-1][-1][0] == position and found[-1][-1][1].isspace()
            found[-1:] = [found[-1][: -1 if brought else None], word]  # a token's own space does not begin a line
    heads = {at: number for number, line in reversed(list(enumerate(found))) for at, _ in line}
    rows = [[(at, "".join(text for _, text in parts)) for at, parts in groupby(line, itemgetter(0))] for line in found]
    return [[Piece(at, text, hole * (heads[at] == n)) for at, text in row] for n, row in enumerate(rows)]


def states(trace: Trace) -> list[list[Life]]:
    """Return for each position the tokens written there; special ones show nothing."""
    found: list[list[Life]] = [[] for _ in trace.given]
    for position, token, begin, gone, sure in trace.spans():
        text = "" if token in trace.tokenizer.special_ids else trace.texts([token])[0].replace("\n", "⏎")
        found[position].append((begin, gone, text.expandtabs(4), int(level([sure])[0])))
    return found


LIGHT = "--ink:#22252b;--paper:#fdfcf9;--hole:#d3d6da;--new:#7fdca4;--faint:#6a7079"
DARK = "--ink:#e4e6ea;--paper:#16181d;--hole:#3d434d;--new:#1d7a4a;--faint:#989fa9"
# --p: how far a token is there; --n: how new it is. Without animation all are there, and none is new.
STYLE = f"""@property --p{{syntax:"&lt;number>";inherits:true;initial-value:1}}
@property --n{{syntax:"&lt;number>";inherits:true;initial-value:0}}
${{--p:1;--n:0;{LIGHT}}}@media(prefers-color-scheme:dark){{${{{DARK}}}}}
$ text{{font:14px ui-monospace,"DejaVu Sans Mono",Menlo,Consolas,monospace;fill:var(--ink)}}$ .g{{fill:var(--faint)}}
$ .p{{fill:var(--paper)}}$ .h{{fill:var(--hole);opacity:calc(1 - var(--p))}}$ .w{{opacity:var(--p)}}$ .o{{--p:0}}
$ .d{{fill:#f08c1a;fill:color-mix(in srgb,var(--new) calc(100%*var(--n)),#f08c1a);fill-opacity:max(var(--n),var(--d))}}
@media(prefers-reduced-motion:reduce){{$ *{{animation:none!important}}}}
"""  # $: this picture alone, for pages that hold several
WIDE, HIGH, PAD, CELL = 8.4, 24.0, 14.0, 52  # pixels: a column, a line, the margin, a board's cell
SQUARE, BESIDE = 132.0, 150.0  # pixels: of a picture that the text is about, and of the room for it
LEAD, HOLD = 0.8, 4.0  # seconds: of holes alone, of the finished text
SLIDE, FRESH = 0.2, 0.8  # seconds: in which a new token makes itself room, that it stays marked


def seconds(trace: Trace) -> float:
    """Return how long to show one step, so that all take about eight seconds."""
    return min(0.5, max(0.02, 8 / trace.n_steps))


class Film:
    """The animations of a picture; equal ones are written once."""

    def __init__(self, trace: Trace, size: int) -> None:
        self.each, self.end, self.names = seconds(trace), trace.n_steps, {}
        self.id = f"m{crc32(trace.final.tobytes() + trace.step.tobytes() + str(size).encode()) % 65536:x}"
        self.hole = f'<use href="#{self.id}h" class="h" opacity="0"/>'
        self.total = LEAD + self.end * self.each + HOLD

    def play(self, lives: list[Life], widths: Sequence[float] = ()) -> str:
        """Return the style with which these tokens come and go at one place; widths: of each, if there are several."""
        moments, before = {0.0: "--p:0"}, -1
        for i, (begin, gone, *_) in enumerate(lives):
            own = f";--w:{widths[i]:.1f}px" if widths else ""
            start, stop = (LEAD + (n + 1) * self.each for n in (begin, gone if gone < self.end else 9 * self.end))
            moments[start] = f"--p:{int(before == begin)};--n:1{own}"
            moments[min(start + SLIDE, stop - 0.008)] = f"--p:1;--n:1{own}"
            moments[min(start + FRESH, stop - 0.004)] = f"--p:1;--n:0{own}"
            if gone < self.end:
                moments |= {stop - 0.002: f"--p:1;--n:0{own}", stop: "--p:0;--n:0"}
            before = gone
        moments[self.total] = [*moments.values()][-1]
        body = "".join(f"{100 * at / self.total:.3f}%{{{look}}}" for at, look in moments.items())
        return f"animation-name:{self.names.setdefault(body, f'{self.id}-{len(self.names)}')}"

    def word(self, drawn: str, life: Life, among: int) -> str:
        """Draw one of the `among` tokens that stand at a place in turn."""
        turn, gone = among > 1, life[1] < self.end
        look = f' style="{self.play([life])}"' * turn + ' opacity="0"' * gone
        return f'<g class="w{" t" * turn}{" o" * gone}"{look}>{drawn}</g>'

    def picture(self, width: float, height: float, inside: str, style: str = "") -> str:
        """Return the SVG with all that was played."""
        frames = "".join(f"@keyframes {name}{{{body}}}\n" for body, name in self.names.items())
        style = f"{STYLE}{style}$ .t{{animation:{self.total:.2f}s ease-out infinite}}\n".replace("$", f"#{self.id}")
        size = f'id="{self.id}" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}"'
        paper = '<rect class="p" width="100%" height="100%" rx="8"/>'
        return f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{style}{frames}</style>{paper}{inside}</svg>'


def mark(place: str, sure: int) -> str:
    """Draw what lies under a token: green while it is new, then orange, the deeper the less sure."""
    doubt = 0 if sure == UNKNOWN else (1 - sure / 254) * 0.5
    return f'<rect class="d" {place} style="--d:{doubt:.2f}" fill-opacity="{doubt:.2f}"/>'


def svg_text(text: str, sure: int | None = None) -> str:
    """Draw a piece of text, on its mark if it was written, and faint if it was given."""
    bare, x = text.strip(), WIDE * (len(text) - len(text.lstrip()))
    wide, inner = WIDE * span(bare), html.escape(re.sub("[\ufffe\uffff]", "\ufffd", bare))  # XML has no place for these
    under = "" if sure is None else mark(f'x="{x - 1:.1f}" y="-14" width="{wide + 2:.1f}" height="19" rx="3"', sure)
    fitted = f'x="{x:.1f}" textLength="{wide:.1f}" lengthAdjust="spacingAndGlyphs"'  # whatever the font
    style = ' class="g"' if sure is None else ""
    return f"{under}<text {fitted}{style}>{inner}</text>" if bare else ""


def to_svg(trace: Trace, width: int = 80) -> str:
    """Draw the text appearing, over and over, light or dark as the reader's system is. It needs no script. A token that
    comes pushes the rest of its line to where it then has room."""
    film, lives, rows, beside = Film(trace, width), states(trace), lines(trace, width), BESIDE * bool(trace.picture)
    hole = WIDE * max(piece.gap for row in rows for piece in row)
    out, widest = "", np.zeros(trace.n_steps + 1)
    for number, row in enumerate(rows):
        rest, used = "", np.zeros(trace.n_steps + 1)  # the rest of the line; how wide it is after each step
        for position, text, gap in reversed(row):
            end, mine = WIDE * span(text), lives[position] if gap else lives[position][-1:]
            if not lives[position]:
                rest = f'{svg_text(text)}<g transform="translate({end:.1f})">{rest}</g>'
                used += end
                continue
            texts = [*(life[2] for life in mine[:-1]), text]
            widths = [WIDE * span(each) for each in texts]
            used += WIDE * gap
            for (begin, gone, *_), wide in zip(mine, widths, strict=True):
                used[begin + 1 : gone + 1] += wide - WIDE * gap
            style = f"--w:{end:.1f}px;{film.play(mine, widths if len(mine) > 1 else ())}"
            words = [film.word(svg_text(t, life[3]), life, len(mine)) for t, life in zip(texts, mine, strict=True)]
            block = film.hole * (gap > 0)
            style_x = ' class="x"' * (gap > 0)
            after = f'<g{style_x} transform="translate({end:.1f})">{rest}</g>' if rest else ""
            rest = f'<g class="t" style="{style}">{block}{"".join(words)}{after}</g>'
        out += f'<g transform="translate({PAD + beside:.0f} {PAD + number * HIGH + 17:.0f})">{rest}</g>\n'
        widest = np.maximum(widest, used)
    shift = f"$ .x{{transform:translateX(calc({hole:.1f}px*(1 - var(--p)) + var(--w)*var(--p)))}}\n"
    block = f'<defs><rect id="{film.id}h" x="2" y="-14" width="{hole - 3:.1f}" height="19" rx="3"/></defs>'
    if beside:
        box = f'x="{PAD:.0f}" y="{PAD:.0f}" width="{SQUARE:.0f}" height="{SQUARE:.0f}"'
        out += f'<image {box} preserveAspectRatio="xMidYMin" href="{html.escape(trace.picture)}"/>'
        shift += "$ image{image-rendering:pixelated}\n" * trace.picture.startswith("data:image/png")
    high = max(len(rows) * HIGH, SQUARE * bool(beside))
    return film.picture(widest.max() + 2 * PAD + beside, high + 2 * PAD, block + out, shift)


def board_svg(trace: Trace, side: int = 4) -> str:
    """Draw a board, as of a Sudoku, whose cells fill one after another, over and over. Given digits are bold."""
    film, lives, box, whole = Film(trace, side), states(trace), round(side**0.5), side * CELL
    out = f'<defs><rect id="{film.id}h" x="-12" y="-12" width="24" height="24" rx="4"/></defs>'
    for number, (position, clue) in enumerate(trace.board(side)):
        x, y = (PAD + (i + 0.5) * CELL for i in (number % side, number // side))
        digit = lambda text, style="": f'<text y="8" text-anchor="middle"{style}>{html.escape(text.strip())}</text>'
        under = f'x="{2 - CELL / 2}" y="{2 - CELL / 2}" width="{CELL - 4}" height="{CELL - 4}" rx="4"'
        mine = [] if clue else lives[position]
        words = [film.word(mark(under, life[3]) + digit(life[2]), life, len(mine)) for life in mine]
        hole = film.hole + "".join(words) if mine else digit(clue, ' class="c"')
        style = f' class="t" style="{film.play(mine)}"' if mine else ""
        out += f'<g{style} transform="translate({x:.0f} {y:.0f})">{hole}</g>\n'
    for i in range(side + 1):
        at, strong = PAD + i * CELL, ' class="b"' * (i % box == 0)
        out += f'<path{strong} d="M{at:.0f} {PAD:.0f}v{whole}M{PAD:.0f} {at:.0f}h{whole}"/>'
    style = "$ text{font-size:23px}$ .c{font-weight:700}$ path{stroke:var(--hole)}"
    style += "$ .b{stroke:var(--faint);stroke-width:2;stroke-linecap:square}\n"
    return film.picture(whole + 2 * PAD, whole + 2 * PAD, out, style)


def to_gif(trace: Trace, width: int = 80, most: int = 150) -> bytes:
    """Draw the same as a dark GIF of at most `most` frames. Needs the extra `plot`: matplotlib's font and Pillow."""
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSansMono.ttf", 14)
    rows, lives, n = lines(trace, width), states(trace), trace.n_steps
    moments = np.unique(np.linspace(0, n, min(n, most) + 1).round().astype(int)).tolist()
    pictures, widest = [], 1
    for before, done in zip([-1, *moments], moments, strict=False):
        pictures.append([])
        for number, row in enumerate(rows):
            x = 0
            for position, text, gap in row:
                now = next((life for life in lives[position] if life[0] < done <= life[1]), None)
                is_hole = bool(lives[position]) and now is None
                text = now[2] * (gap > 0) if now and now[1] < n else text
                wide = gap if is_hole else span(text)
                colour = "#454b55" if is_hole else "#1d7a4a" if now and now[0] >= before else None
                pictures[-1].append((number, x, wide, colour, "" if is_hole else text, bool(lives[position])))
                x += wide
            widest = max(widest, x)
    beside, high = BESIDE * bool(trace.picture), max(len(rows) * HIGH, SQUARE * bool(trace.picture))
    size, frames = (round(2 * PAD + widest * WIDE + beside), round(2 * PAD + high)), []
    for picture in pictures:
        frames.append(Image.new("RGB", size, "#16181d"))
        pen = ImageDraw.Draw(frames[-1])
        if beside:
            frames[-1].paste(thumbnail(trace.picture), (round(PAD), round(PAD)))
        for number, column, wide, colour, text, ours in picture:
            x, y = PAD + beside + column * WIDE, PAD + number * HIGH
            if colour and wide:
                pen.rectangle((x + 1, y + 2, x + wide * WIDE - 2, y + 20), colour)
            pen.text((x, y + 3), text, "#e4e6ea" if ours else "#989fa9", font)
    palette = frames[len(frames) // 2].quantize(128 if beside else 32)
    small = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    each, buffer = max(20, round(1000 * seconds(trace) * n / len(frames))), io.BytesIO()
    durations = [round(1000 * LEAD), *[each] * (len(small) - 2), round(1000 * HOLD)][-len(small) :]
    small[0].save(buffer, "GIF", save_all=True, append_images=small[1:], duration=durations, loop=0)
    return buffer.getvalue()


def thumbnail(url: str):
    """Return the picture of a `data:` URL as Pillow's, as large as fits beside a text."""
    from PIL import Image, ImageOps

    with Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) as picture:
        small = max(picture.size) <= SQUARE
        how = Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS
        return ImageOps.contain(picture.convert("RGB"), (round(SQUARE),) * 2, how)


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


FORMS: dict[str, tuple[Callable[..., str | bytes], str]] = {
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


def check_apart(outputs: dict[str, Path]) -> None:
    """Raise BadInput if two outputs, by the options that name them, are one file."""
    seen: dict[str, str] = {}
    for option, path in outputs.items():
        if (other := seen.setdefault(os.path.normcase(os.path.realpath(path)), option)) != option:
            raise BadInput(f"{option}: expected another file than that of {other}, got {path}; give it one of its own")


def save(trace: Trace, form: str, path: Path, **options: object) -> None:
    """Write one of the forms, whole or not at all; options: those of its function, as board=4. Raises BadLuck."""
    made = FORMS[form][0](trace, **options)
    write_file(path, [made.encode() if isinstance(made, str) else made])
