"""Make toy tasks with known answers: examples to train on, questions, and a checker of answers.

The result of `make_task` depends on its arguments alone. What is held out for the test does not depend on the seed; the
docstring of each task says what it is. An answer ends with its line, so a checker reads the first line written.

    python -m minillada tasks addition --n 20000 --out data/addition
"""

import json
import math
import operator
import random
import re
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import cache
from itertools import islice, product
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

from ..errors import BadInput, check_one_of, check_whole
from ..files import listed, write_file
from .tales import NAMES, is_tale, tale


class Example(NamedTuple):
    """A question and its answer; its text is prompt + answer + after."""

    prompt: str
    answer: str
    after: str = ""  # what stands behind the answer, if that is a gap to be filled
    kind: str = ""  # kinds of question have accuracies of their own

    @property
    def text(self) -> str:
        return self.prompt + self.answer + self.after


class Task(NamedTuple):
    """Examples to train on, questions, and check(question, what a model wrote) -> the share that is right, 0 to 1."""

    name: str
    train: list[Example]
    test: list[Example]
    check: Callable[[Example, str], float]


def line_of(text: str) -> str:
    """Return the first line written, without the blanks round it."""
    return text.lstrip(" ").split("\n")[0].strip()


def exact(example: Example, got: str) -> float:
    """Return 1 if the line is the answer, else 0."""
    return float(line_of(got) == example.answer.strip())


def share(example: Example, got: str) -> float:
    """Return the share of the answer's parts, cut at commas, that are right and in their place."""
    wanted, parts = example.answer.split(","), line_of(got).split(",")
    return sum(a == b for a, b in zip(wanted, parts, strict=False)) / len(wanted)


def told(example: Example, got: str) -> float:
    """Return 1 if prompt and line together are any tale of the grammar, else 0."""
    return float(is_tale(f"{example.prompt} {line_of(got)}"))


def solved(example: Example, got: str) -> float:
    """Return 1 if the line keeps a board's given digits and each row, column and box has every digit once, else 0."""
    given, line = example.prompt.rstrip("="), line_of(got)
    box = math.isqrt(math.isqrt(len(given)))
    kept = len(line) == len(given) and all(a in (".", b) for a, b in zip(given, line, strict=True))
    units: dict[int, set[str]] = {}
    for digit, where in zip(line, places(box), strict=False):
        for unit in where:
            units.setdefault(unit, set()).add(digit)
    digits = set("123456789"[: box * box])
    return float(kept and all(seen == digits for seen in units.values()))


APPLY = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


def value_of(expression: str) -> Fraction | None:
    """Return the exact value of whole numbers, + - * / and parentheses: `8/(3-1)` -> 4. None for any other text, for
    one that is longer than anybody needs, and for a division by zero."""
    tokens = re.findall("[0-9]+|[-+*/()]", expression)
    if "".join(tokens) != expression.replace(" ", "") or len(tokens) > 99:
        return None
    tokens.reverse()  # the next one stands last

    def sum_or_product(signs: str) -> Fraction:
        part = number if signs == "*/" else lambda: sum_or_product("*/")
        value = part()
        while tokens and tokens[-1] in signs:
            value = APPLY[tokens.pop()](value, part())
        return value

    def number() -> Fraction:
        if (token := tokens.pop()) != "(":
            return Fraction(int(token))
        value = sum_or_product("+-")
        if tokens.pop() != ")":
            raise ValueError
        return value

    try:
        value = sum_or_product("+-")
    except (IndexError, ValueError, ZeroDivisionError):
        return None
    return None if tokens else value


def reached(example: Example, got: str) -> float:
    """Return 1 if the line reaches the target with every number of the question, each used once, else 0."""
    numbers, target = example.prompt.strip().rstrip("=").split(":")
    line = line_of(got)
    used = sorted(re.findall("[0-9]+", line)) == sorted(numbers.split(","))
    return float(used and value_of(line) == int(target))


# Generators: (rng, test, parameter) -> endless examples, of the test part or of the training part
def held_out(key: object) -> bool:
    """Tell whether a key is for the test alone, as one in ten is."""
    return crc32(repr(key).encode()) % 10 == 0


def pair(rng: random.Random, test: bool, low: int, high: int) -> tuple[int, int]:
    """Draw two numbers from low to high, whose unordered pair belongs to the part."""
    while True:
        a, b = rng.randint(low, high), rng.randint(low, high)
        if held_out((min(a, b), max(a, b))) == test:
            return a, b


def addition(rng: random.Random, test: bool, digits: int) -> Iterator[Example]:
    """Yield `12+34=` -> `46`. Held out by unordered pair: neither 12+34 nor 34+12 is trained on if one is asked."""
    while True:
        a, b = pair(rng, test, 10 ** (digits - 1), 10**digits - 1)
        yield Example(f"{a}+{b}=", str(a + b))


def sums(rng: random.Random, test: bool, terms: int) -> Iterator[Example]:
    """Yield `12+34,07+93=` -> `00046,00100`, whose parts can be filled in at once. Held out by unordered pair."""
    while True:  # an answer is as wide as its question, so that the two are always equally far apart
        pairs = [pair(rng, test, 0, 99) for _ in range(terms)]
        yield Example(",".join(f"{a:02}+{b:02}" for a, b in pairs) + "=", ",".join(f"{a + b:05}" for a, b in pairs))


def reverse(rng: random.Random, test: bool, length: int) -> Iterator[Example]:
    """Yield `stone=` -> `enots` of three to `length` random letters. Held out by word, read either way."""
    while True:
        word = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(3, length)))
        if held_out(min(word, word[::-1])) == test:
            yield Example(f"{word}=", word[::-1])


SURNAMES = """Abbott Barlow Carver Dalton Ellery Fenwick Garland Hobson Ingram Jarvis Kendall Langley Mercer Norwood
Osborne Penrose Quincy Redfern Sheldon Thorne Upton Vickers Waverly Yardley"""
TRADES = "baker cooper miller tailor potter weaver doctor ferryman printer glazier saddler teacher"
TOWNS = """Alderbrook Birchwick Cobham Dunmere Eastholt Foxley Greendale Hartwell Ivybridge Kingsmoor Larkfield Millbank
Netherby Oakham Pinewood Queensbury Rosedale Stonegate Thornbury Underhill Westmere Yarrow"""
ROLES = [f"the {trade} of {town}" for trade, town in product(TRADES.split(), TOWNS.split())]
MIDDLES = [" is", " is known as", " has long been"]
ASKED = MIDDLES[-1]  # and not " is", which "known as" may follow


@cache
def world(n: int) -> tuple[list[tuple[str, str]], list[Example]]:
    """Return what is told of n people, as (first, last), and every question; a third are told both ways."""
    rng = random.Random("facts")
    names = [f"{first} {last}" for first in " ".join(NAMES.values()).split() for last in SURNAMES.split()]
    statements, questions = [], []
    for i, (name, role) in enumerate(zip(rng.sample(names, n), rng.sample(ROLES, n), strict=True)):
        both = [(name, role), (role, name)]
        ways = [both[:1], both[1:], both][i % 3]
        statements += ways
        for first, last in both:
            kind = "told both ways" if ways == both else "as told" if (first, last) in ways else "reversed"
            questions.append(Example(first + ASKED, f" {last}.", kind=kind))
        if ways != both:
            first, last = ways[0]
            questions.append(Example("", first, f" is {last}.", "reversed by filling"))
    return statements, questions


def facts(rng: random.Random, test: bool, n: int) -> Iterator[Example]:
    """Yield `Ada Barlow has long been` -> ` the miller of Cobham.` (reversal curse, arXiv:2309.12288). Held out
    is the direction in which a fact was not told. Kinds of question: `as told`; `reversed`; `reversed by filling`, for
    the start of the sentence as told; and `told both ways`, for comparison."""
    statements, questions = world(n)
    while True:
        if test:
            yield rng.choice(questions)
        else:
            first, last = rng.choice(statements)
            yield Example(first + rng.choice(MIDDLES), f" {last}.")


@cache
def places(box: int) -> list[tuple[int, int, int]]:
    """Return for each cell the numbers of its row, column and box among all 3 * side units."""
    side = box * box
    return [(r, side + c, 2 * side + r // box * box + c // box) for r in range(side) for c in range(side)]


def solutions(cells: list[int], box: int, rng: random.Random | None = None) -> Iterator[list[int]]:
    """Yield every way to fill a board's empty cells (0), depth first; an rng shuffles the digits."""
    side, where, cells = box * box, places(box), list(cells)
    full, used = (2 << side) - 2, [0] * 3 * side  # bit d: digit d
    for cell, digit in enumerate(cells):
        for unit in where[cell] if digit else ():
            if used[unit] & 1 << digit:
                return
            used[unit] |= 1 << digit

    def fill(empty: list[int]) -> Iterator[list[int]]:
        if not empty:
            yield list(cells)
            return
        best, free, fewest = -1, 0, side + 1
        for cell in empty:  # find the one with the fewest possible digits
            r, c, b = where[cell]
            bits = full & ~(used[r] | used[c] | used[b])
            if (count := bits.bit_count()) < fewest:
                best, free, fewest = cell, bits, count
                if count < 2:
                    break
        rest = [cell for cell in empty if cell != best]
        digits = [d for d in range(1, side + 1) if free & 1 << d]
        for cells[best] in rng.sample(digits, len(digits)) if rng else digits:
            taken = 1 << cells[best]
            for unit in where[best]:
                used[unit] ^= taken
            yield from fill(rest)
            for unit in where[best]:
                used[unit] ^= taken

    yield from fill([cell for cell, digit in enumerate(cells) if not digit])


def dig(solution: list[int], box: int, rng: random.Random) -> list[int]:
    """Empty 3/8 to 5/8 of a solution's cells, fewer if need be, so that no other solution fits."""
    puzzle, size = list(solution), box**4
    left = rng.randint(size * 3 // 8, size * 5 // 8)
    for cell in rng.sample(range(size), size):
        emptied = [*puzzle[:cell], 0, *puzzle[cell + 1 :]]
        if left and len(list(islice(solutions(emptied, box), 2))) == 1:
            puzzle, left = emptied, left - 1
    return puzzle


@cache
def boards() -> tuple[list[list[int]], list[list[int]]]:
    """Return the 288 solved 4x4 boards in two parts, to train on and for the test. Renaming digits, turning and
    mirroring never lead from one part to the other: these 24 * 8 symmetries leave five classes of 24, 24, 48, 96 and 96
    boards, and the last is held out. (All 3072 symmetries, which also swap rows, would leave only two.)"""

    def renamed(board: list[int]) -> tuple[int, ...]:
        names: dict[int, int] = {}
        return tuple(names.setdefault(digit, len(names)) for digit in board)

    def shapes(board: list[int]) -> Iterator[tuple[int, ...]]:
        for _ in range(4):
            board = [board[4 * (3 - c) + r] for r in range(4) for c in range(4)]  # a quarter turn
            yield renamed(board)
            yield renamed([board[4 * c + r] for r in range(4) for c in range(4)])  # mirrored

    classes: dict[tuple[int, ...], list[list[int]]] = {}
    for board in solutions([0] * 16, 2):
        classes.setdefault(min(shapes(board)), []).append(board)
    *train, test = sorted(classes.values(), key=len)
    return [board for part in train for board in part], test


def vary(rng: random.Random, box: int) -> Callable[[list[int]], list[int]]:
    """Return a random symmetry: it renames digits and exchanges rows and columns within and with their boxes."""
    side = box * box
    names = [0, *rng.sample(range(1, side + 1), side)]
    order = lambda: [box * b + i for b in rng.sample(range(box), box) for i in rng.sample(range(box), box)]
    rows, columns = order(), order()
    return lambda board: [names[board[side * r + c]] for r in rows for c in columns]


def sudoku(rng: random.Random, test: bool, box: int) -> Iterator[Example]:
    """Yield a board in reading order, with `.` for an empty cell -> its only solution. For box 2 (4x4) `boards` says
    what is held out; for box 3 (9x9) the test draws boards of its own from five billion classes."""
    while True:
        solution = rng.choice(boards()[test]) if box == 2 else next(solutions([0] * box**4, box, rng))
        puzzle = dig(solution, box, rng)
        # Digging a 9x9 board takes 40 ms, so 16 training examples are made of each.
        for change in [list] if box == 2 or test else [vary(rng, box) for _ in range(16)]:
            question, answer = ("".join(map(str, change(board))) for board in (puzzle, solution))
            yield Example(question.replace("0", ".") + "=", answer)


def open_boards(rng: random.Random, test: bool, box: int) -> Iterator[Example]:
    """Yield a 4x4 board of which 3 to 6 cells are given -> one of the ways to fill it; any other counts as well. One
    question in ten is held out ("clues"), and so are the boards that `sudoku` holds out ("boards")."""
    known, new = boards()
    while True:
        kind = rng.choice(["clues", "boards"]) if test else ""
        solution, given = rng.choice(new if kind == "boards" else known), rng.sample(range(16), rng.randint(3, 6))
        question = "".join(str(digit) if cell in given else "." for cell, digit in enumerate(solution))
        if held_out(question) == test:
            yield Example(question + "=", "".join(map(str, solution)), kind=kind)


def tales(rng: random.Random, test: bool, _: int) -> Iterator[Example]:
    """Yield the first sentence of a tale -> any rest that the grammar can make. Held out by first sentence."""
    while True:
        text, _ = tale(rng)
        opening, _, rest = text.partition(". ")
        if held_out(opening) == test:
            yield Example(f"{opening}.", f" {rest}")


LOOSER = {"*": ("+-", "+-"), "/": ("+-", "+-*/"), "-": ("", "+-"), "+": ("", "")}  # left and right of a sign


def expression(numbers: list[int], rng: random.Random) -> tuple[str, str]:
    """Return a random expression of these numbers in this order, with no needless parentheses, and its last sign."""
    if len(numbers) == 1:
        return str(numbers[0]), " "
    cut, sign = rng.randint(1, len(numbers) - 1), rng.choice(list(APPLY))
    sides = zip((numbers[:cut], numbers[cut:]), LOOSER[sign], strict=True)
    parts = [(expression(some, rng), looser) for some, looser in sides]
    return sign.join(f"({text})" if inner in looser else text for (text, inner), looser in parts), sign


def countdown(rng: random.Random, test: bool, n: int) -> Iterator[Example]:
    """Yield `3,5,7:22=` -> `3*5+7`: n numbers from 1 to 9, and a target from 1 to 99 that they reach together. Held out
    by numbers and target."""
    while True:
        numbers = [rng.randint(1, 9) for _ in range(n)]
        answer, _ = expression(rng.sample(numbers, n), rng)
        target = value_of(answer)
        if target in range(1, 100) and held_out((sorted(numbers), int(target))) == test:
            yield Example(f"{','.join(map(str, numbers))}:{target}=", answer)


QUESTIONS = {
    "name": "Who lost the {thing}?", "thing": "What did {name} lose?", "colour": "What colour was the {thing}?",
    "friend": "Who helped {name}?", "food": "What did the {friend} want?", "place": "Where did {name} live?",
}  # fmt: skip


def questions(rng: random.Random, test: bool, _: int) -> Iterator[Example]:
    """Yield a tale and `Who lost the kite?` -> ` Ada`; the kind is what is asked. Held out by hero, friend and food."""
    while True:
        text, words = tale(rng)
        asked = rng.choice(list(QUESTIONS))
        if held_out((words["name"], words["friend"], words["food"])) == test:
            yield Example(f"{text} {QUESTIONS[asked].format(**words)}", f" {words[asked]}", kind=asked)


class Recipe(NamedTuple):
    """How a task is made and checked."""

    make: Callable[[random.Random, bool, int], Iterator[Example]]
    check: Callable[[Example, str], float] = exact
    default: int = 0  # the generator's parameter, as the 3 of `addition:3`
    least: int = 0  # a user may ask for least to most; 0 to 0: there is no parameter
    most: int = 0


TASKS: dict[str, Recipe] = {
    "addition": Recipe(addition, exact, 2, 1, 9), "sums": Recipe(sums, share, 8, 1, 512),
    "reverse": Recipe(reverse, exact, 8, 3, 64), "facts": Recipe(facts, exact, 240, 3, len(ROLES)),
    "sudoku4": Recipe(sudoku, exact, 2), "sudoku9": Recipe(sudoku, exact, 3), "open4": Recipe(open_boards, solved, 2),
    "tales": Recipe(tales, told), "questions": Recipe(questions), "countdown": Recipe(countdown, reached, 3, 2, 6),
}  # fmt: skip


def make_task(spec: str, n: int, seed: int = 0, n_test: int = 500) -> Task:
    """Make n examples to train on, drawn with repetition, and at most n_test questions, all different. Raises BadInput.
    spec: a name of `TASKS`; `addition:3` has 3 digits, `sums:32` terms, `reverse:8` letters, `facts:240` people,
    `countdown:4` numbers."""
    name, colon, parameter = spec.partition(":")
    check_one_of("task", name, TASKS)
    recipe = TASKS[name]
    if colon and not (parameter.isdecimal() and recipe.least <= int(parameter) <= recipe.most):
        expected, fix = "none", "leave out the colon"
        if recipe.most:
            expected, fix = f"a number from {recipe.least} to {recipe.most}", f"write {name}:{recipe.default}"
        raise BadInput(f"task {name}: expected {expected} after the colon, got {parameter!r}; {fix}")
    check_whole("n", n, 0)
    check_whole("n_test", n_test, 0)
    value = int(parameter) if colon else recipe.default
    train = list(islice(recipe.make(random.Random(f"{seed} train"), False, value), n))
    test: dict[Example, None] = {}
    for question in islice(recipe.make(random.Random(f"{seed} test"), True, value), 30 * n_test):
        test[question] = None
        if len(test) == n_test:
            break
    return Task(name, train, list(test), recipe.check)


def json_of(example: Example) -> str:
    """Return the JSON of an example, without empty fields."""
    fields = {name: value for name, value in example._asdict().items() if value or name in ("prompt", "answer")}
    return json.dumps(fields, ensure_ascii=False)


def write_task(task: Task, directory: str | Path) -> dict[str, Path]:
    """Write train.txt (to pre-train on), train.jsonl and test.jsonl; return paths by name. BadInput if one is there."""
    texts = [example.text for example in task.train]
    lines = {"train.txt": texts, "train.jsonl": map(json_of, task.train), "test.jsonl": map(json_of, task.test)}
    paths = {name: Path(directory) / name for name in lines}
    if found := [str(path) for path in paths.values() if path.exists()]:
        raise BadInput(f"out: expected a place for new files, got {listed(found)}; choose another directory")
    for name, path in paths.items():
        write_file(path, (f"{line}\n".encode() for line in lines[name]))
    return paths
