"""Play with the models that come with the package: a story appears, gaps are filled, a board solves itself.

python -m minillada play           a story, then three of its words hidden, then a board
python -m minillada play run       what a model of your own can do: the newest run of train_tiny.py
"""

import json
import random
import re
import secrets
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from ..errors import BadInput, check_number, check_one_of, check_whole
from ..files import write_file
from ..measure.twin import twin_generate
from ..model import LLaDA
from ..sampler import Canvas, SampleConfig, Step, answer_of, stream
from ..show.board import watch_boards
from ..show.page import board_svg, check_apart, check_file, save, to_svg
from ..show.terminal import HOLE, watch
from ..show.trace import Trace
from ..text.chat import ChatTemplate
from ..text.tales import mistake, tales
from ..text.tasks import Example, make_task
from ..text.tokenizer import Tokenizer, display
from ..weights.checkpoint import load, reading
from .ask import begin_of, guide_of, quick_dtype
from .chat import lines_of_user
from .cli import Parser, newest_run, run, tell

EXAMPLES = """examples:
  python -m minillada play story --seed 7      the same story every time
  python -m minillada play sudoku --html board.html    a page to replay it
  python -m minillada play chat                ask about a story
"""
SPAN = r"\[\[(.+?)\]\]"  # a word that an example hides


class Player(NamedTuple):
    """A model, how it is decoded, and how one wants to see it."""

    model: LLaDA
    tokenizer: Tokenizer
    guide: dict  # see `guide_of`
    args: Namespace  # seed, pause, html, svg

    @classmethod
    def load(cls, name: str, args: Namespace) -> "Player":
        """Load a run, a model directory or a shipped model, with its guide."""
        how = lambda directory: {"dtype": quick_dtype(directory, "cpu")}
        return reading(name, lambda directory: cls(*load(directory, **how(directory)), guide_of(directory), args))

    @property
    def begin(self) -> list[int]:
        """The ids in front of every row."""
        return begin_of(self.guide, self.model.config.eos_id)

    @property
    def room(self) -> int:
        """How many tokens a row may have."""
        return self.model.config.max_len - len(self.begin)

    def steps(self, *rows: list[int], **more: object) -> Iterator[Step]:
        """Fill the holes of rows of equal length, one token a step, as the guide says unless `more` says otherwise. In
        the steps `begin` stands in front of the rows."""
        c, whole = self.model.config, [self.begin + row for row in rows]
        holes = [i for row in whole for i, token in enumerate(row) if token == c.mask_id]
        width = max(holes) + 1 - min(holes)
        how = {"block_len": width, **self.guide.get("sampling", {}), "gen_len": width, "steps": width, **more}
        if width % how["block_len"]:
            how["block_len"] = width
        return stream(self.model, Canvas.infill(whole, c), SampleConfig(**how), self.args.seed, rivals=5)

    def filled(self, *rows: list[int], **more: object) -> list[list[int]]:
        """Return the rows without holes."""
        *_, last = self.steps(*rows, **more)
        return last.x[:, len(self.begin) :].tolist()

    def watch(self, row: list[int], start: int = 0, **more: object) -> list[int]:
        """Draw the row while its holes are filled; return it. With --html, write the page too."""
        start += len(self.begin)
        steps = list(watch(self.steps(row, **more), self.tokenizer, start=start, pause=self.args.pause))
        self.keep(steps, start)
        return steps[-1].x[0, len(self.begin) :].tolist()

    def keep(self, steps: list[Step], start: int = 0, board: int = 0) -> None:
        """Write the steps to the files of --html and --svg; board: the side of the board that the row is, if it is."""
        trace = Trace.record(steps, self.tokenizer, start=start) if self.args.html or self.args.svg else None
        if self.args.html:
            save(trace, "html", self.args.html, **({"board": board} if board else {}))
        if self.args.svg:
            write_file(self.args.svg, [(board_svg(trace, board) if board else to_svg(trace, width=44)).encode()])
        for path in filter(None, (self.args.html, self.args.svg)):
            tell(f"written to {path}")

    def text(self, row: list[int]) -> str:
        """Return what a row says up to its end of text."""
        answer = answer_of(row, SampleConfig(), self.model.config)
        return display(self.tokenizer.decode(answer)).strip()


def title(text: str) -> None:
    print(f"\n{text}\n", flush=True)


def verdict(text: str) -> str:
    """Say whether the grammar of the training stories can tell a text, or where it stops being such a story."""
    at = mistake(text)
    if at is None:
        return "Flawless: hero, pronouns and things stay the same to the end."
    return f"Not flawless: after “…{text[max(0, at - 30) : at]}” no story of the training text goes on so."


def story(args: Namespace) -> str:
    """Tell a story out of nothing but masks; return it."""
    player = Player.load(args.model or "tales", args)
    kind = ", in bfloat16" if player.model.embed.weight.dtype == torch.bfloat16 else ""
    title(f"A story. {player.model.n_parameters() / 1e6:.1f} million parameters fill {player.room} masks{kind}.")
    text = player.text(player.watch([player.model.config.mask_id] * player.room))
    print(f"\n{verdict(text)}")
    return text


def fill(args: Namespace, text: str | None = None) -> None:
    """Hide three words of a story and fill them again; print old beside new."""
    player = Player.load(args.model or "tales", args)
    text = text or next(tales(args.seed, 1))
    title("Three words of it are hidden and filled again, from both sides at once.")
    c, ids = player.model.config, player.tokenizer.encode(text)
    words = [i for i, id in enumerate(ids) if re.fullmatch(r" [a-z]{4,}", player.tokenizer.token(id))]
    hidden = sorted(random.Random(args.seed).sample(words, min(3, len(words))))
    row = [c.mask_id if i in hidden else id for i, id in enumerate(ids)]
    new = player.watch(row, stop_at_eos=False, ban_eos=True, **player.guide.get("filling", {}))
    print()
    for i in hidden:
        old, now = (display(player.tokenizer.token(id)).strip() for id in (ids[i], new[i]))
        print(f"  {old:>12} → {now:<12} {'the same' if old == now else 'another word'}")


def board_row(player: Player, puzzle: Example) -> list[int]:
    """Return a canvas row: the puzzle, `=`, and the board once more with a hole in each empty cell."""
    clues = player.tokenizer.encode_with_masks(puzzle.prompt[:-1].replace(".", "[MASK]"))
    return player.tokenizer.encode(puzzle.prompt) + clues


NO_END = {"ban_eos": True}  # rarely, it would write an end of text into a cell
ORDERS: dict[str, dict] = {"surest cell first": NO_END, "in reading order": {**NO_END, "block_len": 1}}


def solutions(player: Player, puzzles: list[Example], **more: object) -> list[bool]:
    """Tell which puzzles are solved, all of them filled side by side."""
    rows = player.filled(*(board_row(player, puzzle) for puzzle in puzzles), **more)
    return [player.tokenizer.decode(row[-16:]) == puzzle.answer for row, puzzle in zip(rows, puzzles, strict=True)]


def telling(player: Player) -> tuple[Example, str]:
    """Return one of some unseen boards that one order solves and the other does not, and a line about it."""
    puzzles = make_task("sudoku4", 0, player.args.seed, 40).test
    first, second = (solutions(player, puzzles, **more) for more in ORDERS.values())
    differ = [puzzle for puzzle, a, b in zip(puzzles, first, second, strict=True) if a != b]
    why = f"Of {len(puzzles)} unseen boards it solves {sum(first)} surest cell first and {sum(second)} in reading order"
    why += "; on this one the order matters." if differ else "; this is one of them."
    return (differ or puzzles)[0], why


def sudoku(args: Namespace) -> None:
    """Fill one board twice: the surest cell first, and in reading order."""
    player = Player.load(args.model or "sudoku4", args)
    puzzle, why = telling(player)
    title(f"A board: every row, column and box needs 1 to 4 once.\n{why}")
    runs = [player.steps(board_row(player, puzzle), **more) for more in ORDERS.values()]
    start = len(player.begin) + len(puzzle.prompt)
    kept = watch_boards(runs, list(ORDERS), player.tokenizer, start, pause=8 * args.pause)
    for order, steps in zip(ORDERS, kept, strict=True):
        got = player.tokenizer.decode(steps[-1].x[0, start:].tolist())
        wrong = sum(a != b for a, b in zip(got, puzzle.answer, strict=True))
        print(f"  {order}: {f'{wrong} of 16 cells wrong' if wrong else 'solved'}")
    player.keep(kept[0], start, board=4)


def reverse(args: Namespace) -> None:
    """Give the last sentence of a story, and let the model write what comes before it."""
    player = Player.load(args.model or "tales", args)
    c, tokenizer = player.model.config, player.tokenizer
    head, _, ending = next(tales(args.seed, 1)).rpartition(". ")
    title(f"The ending is given: “{ending}” What came before it?")
    before = len(tokenizer.encode(f"{head}."))
    row = [c.mask_id] * before + tokenizer.encode(f" {ending}\n") + [c.eos_id]
    row = player.watch(row + [c.eos_id] * (player.room - len(row)), stop_at_eos=False, ban_eos=True)
    print(f"\n{verdict(player.text(row))}")
    twin = Player.load("tales-ar", args)
    (told,) = twin_generate(twin.model, [twin.begin], twin.room - 1, 0.7, args.seed, (c.eos_id,))
    told = display(tokenizer.decode(told)).strip()
    print("\nIts autoregressive twin reads from left to right, so it cannot look at an ending. It tells another story:")
    print(f"\n{told}")


def chat(args: Namespace) -> None:
    """Answer questions about a story, as the user types them."""
    player = Player.load(args.model or "questions", args)
    text = next(tales(args.seed, 1))
    title("A story, and a model that was taught to answer questions about it. /quit ends.")
    print(text + "\n")
    print("Ask who lost what, what colour it was, who helped, what they wanted, where the hero lived.\n")
    template = reading(args.model or "questions", lambda directory: ChatTemplate.load(directory, player.tokenizer))
    for asked in lines_of_user():
        if not asked.strip():
            continue
        prompt = template.encode_chat([{"role": "user", "content": f"{text} {asked.strip()}"}])
        if (room := player.room - len(prompt)) < 1:
            raise BadInput(f"question: expected room for an answer, got {len(prompt)} tokens; ask a shorter one")
        player.watch(prompt + [player.model.config.mask_id] * min(8, room), start=len(prompt))


def own(args: Namespace) -> None:
    """Show what a run of train_tiny.py can do: gaps of held-out sentences, a text continued, its bound."""
    name = args.model or newest_run()
    player = Player.load(name, args)
    tokenizer, c = player.tokenizer, player.model.config
    examples = player.guide.get("examples", {})
    for n, sentence in enumerate(examples.get("edit", [])[:3]):
        if n == 0:
            title(f"{name} fills gaps in sentences that it was not trained on.")
        row, old = tokenizer.encode_to_edit(sentence), re.findall(SPAN, sentence)
        (new,) = player.filled(row, stop_at_eos=False, ban_eos=True)
        words: list[list[int]] = []  # holes that stand together are one word
        for before, id, now in zip([0, *row], row, new, strict=False):
            if id == c.mask_id:
                words = words if before == c.mask_id else [*words, []]
                words[-1].append(now)
        got = [tokenizer.decode(word).strip() for word in words]
        print(f"  {re.sub(SPAN, HOLE, sentence)}")
        print("  " + ", ".join(f"{a} → {display(b)}" for a, b in zip(old, got, strict=False)) + "\n")
    for prompt in examples.get("prompt", [])[:1]:
        title(f"It goes on from “{prompt}”.")
        ids = tokenizer.encode(prompt)
        player.watch(ids + [c.mask_id] * min(48, player.room - len(ids)), block_len=16)
    log = Path(name) / "log.jsonl"
    if log.is_file():
        bounds = [r["bound"] for r in map(json.loads, log.read_text(encoding="utf-8").splitlines()) if r.get("bound")]
        print(f"\nHeld-out text costs it at most {bounds[-1]:.3f} nats per character.")
    what_next(name, examples)


def what_next(name: str, examples: dict) -> None:
    """Print commands that work as pasted."""
    quoted = lambda kind, other: json.dumps((examples.get(kind) or [other])[0], ensure_ascii=False)
    title("What next")
    for command, what in (
        (f"python sample.py {name} --prompt {quoted('prompt', 'The')}", "go on from there"),
        (f"python sample.py {name} --fill {quoted('fill', 'A[MASK] and a[MASK].')}", "fill gaps"),
        ("python -m minillada play chat", "ask a model about a story"),
        ("python -m minillada read", "read the code beside its equations"),
        ("python train_tiny.py --data my_novel.txt --minutes 10", "train on a text of yours"),
    ):
        print(f"  {command}\n      {what}")


ACTS = {"story": story, "fill": fill, "sudoku": sudoku, "reverse": reverse, "chat": chat, "run": own}


def main() -> None:
    p = Parser(__doc__.split("\n")[0], EXAMPLES)
    p.add_argument("act", nargs="?", help=f"{', '.join(ACTS)} (default: story, fill and sudoku)")
    p.add_argument("--model", metavar="NAME", help="a run or model directory in place of the one that comes along")
    p.add_argument("--seed", type=int, help="same seed, same play (default: another one each time)")
    p.add_argument("--pause", type=float, default=0.04, help="seconds to hold each step in a terminal (default: 0.04)")
    p.add_argument("--html", type=Path, metavar="FILE", help="a new file: a page to replay it")
    p.add_argument("--svg", type=Path, metavar="FILE", help="a new file: an animation of it")
    args = p.parse_args()
    if args.act is not None:
        check_one_of("act", args.act, ACTS)
    check_number("pause", args.pause, 0, 60)
    for form in (form for form in ("html", "svg") if getattr(args, form)):
        if args.act not in ("story", "fill", "sudoku", "reverse"):
            raise BadInput(f"{form}: expected story, fill, sudoku or reverse to be played, got {args.act}; name one")
        check_file(form, getattr(args, form))
    check_apart({form: path for form in ("html", "svg") if (path := getattr(args, form))})
    told = args.seed is None
    args.seed = secrets.randbelow(10_000) if told else args.seed
    check_whole("seed", args.seed, 0, 2**63 - 1)
    if args.act:
        ACTS[args.act](args)
    else:
        fill(args, story(args))
        sudoku(args)
    if told:
        print(f"\n(--seed {args.seed} plays the same again)")


if __name__ == "__main__":
    run(main)
