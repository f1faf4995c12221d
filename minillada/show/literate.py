"""Set the course as a page: prose on the left, code on the right, every line of the six files on it.

The page is made of the sources alone, by `ast` and `tokenize`. A file becomes rows: on the left a docstring or a
comment and the equation that it speaks of, on the right the code that follows. A name links to its definition.
"""

import ast
import io
import keyword
import re
import tokenize
from collections.abc import Iterator
from html import escape as escape_quotes
from itertools import count, takewhile
from pathlib import Path
from typing import NamedTuple

from .equations import EQUATIONS, mathml

HERE = Path(__file__).parent
COURSE = ("plain", "model", "diffusion", "strategies", "sampler", "train")  # in the order in which they are read
MARK = "<!-- Made by python -m minillada read."  # stands in the first lines of the page
HEADING = re.compile(r"# -+ (.+?) -+$")
INLINE = re.compile(  # what is set apart in prose, and what kind it is
    r"(?P<mask>`?\[MASK\]`?)|`(?P<code>[^`]+)`|(?P<paper>arXiv:\d{4}\.\d{5})|(?P<sign>->|<=|>=|(?<![\w-])-(?=\w))"
    r"|(?P<shape>\((?=[^)]*[A-Za-z])(?:[\w.|*/]+, ?)+[\w.|*/]*\))|(?P<value>\w*\[[^\[\]]+\])"
    r"|(?P<name>\b(?:[a-z]{3,}_[a-z_]+|[a-z]+_[a-z_]{2,})\b)"
)
SIGNS = {"->": "→", "<=": "≤", ">=": "≥", "-": "−"}
Definition = ast.FunctionDef | ast.ClassDef
Names = dict[str, str]  # what can be linked to -> its anchor: "MoE.route" -> "model.MoE.route"
Place = tuple[int, int]  # a line, from 1, and a column, from 0


def escape(text: str) -> str:
    return escape_quotes(text, quote=False)


class Row(NamedTuple):
    """Hold what stands side by side, from line `first` to the next row."""

    first: int
    name: str  # "MoE.route"; "" where a comment or a statement begins it
    text: str  # the prose
    hidden: range  # the lines of the file that are the prose


class Source:
    """Hold a file of the course, its rows, and the anchors of the names that it defines."""

    def __init__(self, name: str) -> None:
        self.name, text = name, (HERE.parent / f"{name}.py").read_text(encoding="utf-8")
        self.lines, self.tree = text.splitlines(), ast.parse(text)
        self.tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
        self.rows = sorted(self.cut(), key=lambda row: row.first)
        self.names: Names = {}
        for node in self.tree.body:
            self.define(node)
            for member in node.body if isinstance(node, ast.ClassDef) else []:
                self.define(member, f"{node.name}.")

    def cut(self) -> Iterator[Row]:
        """Yield a row for the file, each comment that has its line to itself, each definition, and what follows one.

        Methods belong to the row of their class until one of them has a docstring.
        """
        yield Row(1, "", *docstring(self.tree))
        comments = [(t.start, t.string) for t in self.tokens if t.type == tokenize.COMMENT]
        alone = {line: text for (line, column), text in comments if not self.lines[line - 1][:column].strip()}
        for line in alone.keys() - {line + 1 for line in alone}:  # the first of several comments
            lines = list(takewhile(alone.__contains__, count(line)))
            yield Row(line, "", "\n".join(alone[n] for n in lines), range(line, line + len(lines)))
        for before, node in zip([self.tree, *self.tree.body], self.tree.body, strict=False):
            if isinstance(node, Definition):
                yield row_of(node)
                methods = [child for child in node.body if isinstance(child, Definition)]
                told = [bool(ast.get_docstring(method)) for method in methods]
                if isinstance(node, ast.ClassDef) and any(told):
                    yield from (row_of(method, f"{node.name}.") for method in methods[told.index(True) :])
            elif isinstance(before, Definition) and node.lineno - 1 not in alone:
                yield Row(node.lineno, "", "", range(0))

    def define(self, node: ast.stmt, owner: str = "") -> None:
        """Note the names that a statement defines: a row is their anchor, or a line."""
        targets = [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [])
        for name in [node.name] if isinstance(node, Definition) else [t.id for t in targets if isinstance(t, ast.Name)]:
            has_row = any(row.name == owner + name for row in self.rows)
            self.names[owner + name] = f"{self.name}.{owner}{name}" if has_row else f"{self.name}-{node.lineno}"


def row_of(node: Definition, owner: str = "") -> Row:
    first = min(part.lineno for part in (node, *node.decorator_list))
    return Row(first, owner + node.name, *docstring(node))


def docstring(node: ast.Module | Definition) -> tuple[str, range]:
    """Return a docstring and its lines."""
    text = ast.get_docstring(node) or ""
    return text, range(node.body[0].lineno, node.body[0].end_lineno + 1) if text else range(0)


class Linker(ast.NodeVisitor):
    """Find where a file uses what the course defines: `found` has a place -> an anchor."""

    def __init__(self, source: Source, course: dict[str, Source]) -> None:
        self.found: dict[Place, str] = {}
        self.lines, self.kinds = source.lines, {}  # kinds: a variable -> the class that it is of
        self.names: Names = {name: at for other in course.values() for name, at in other.names.items() if "." in name}
        for node in source.tree.body:
            if isinstance(node, ast.ImportFrom) and node.level and node.module in course:
                there = course[node.module].names
                self.names |= {alias.name: there[alias.name] for alias in node.names if alias.name in there}
        self.names |= source.names
        self.visit(source.tree)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self.kinds = {"self": node.name, "cls": node.name}
        self.generic_visit(node)
        self.kinds = {}

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        """Look inside, where arguments and variables hide what has the same name outside."""
        names, kinds, parts = self.names, self.kinds, list(ast.walk(node))
        arguments = {part.arg: part.annotation for part in parts if isinstance(part, ast.arg)}
        stored = {part.id for part in parts if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)}
        self.names = {name: at for name, at in names.items() if name not in arguments.keys() | stored}
        self.kinds = kinds | {name: kind.id for name, kind in arguments.items() if isinstance(kind, ast.Name)}
        self.generic_visit(node)
        self.names, self.kinds = names, kinds

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Load):
            self.link(node.id, node.lineno, node.col_offset)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.visit(node.value)
        if isinstance(node.value, ast.Name):
            owner = self.kinds.get(node.value.id, node.value.id)
            self.link(f"{owner}.{node.attr}", node.end_lineno, node.end_col_offset - len(node.attr.encode()))

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        """Leave f-strings alone: before Python 3.12 the places of what is in them are wrong."""

    def link(self, name: str, line: int, column: int) -> None:
        if name in self.names:
            text = self.lines[line - 1].encode()[:column].decode()  # ast counts bytes
            self.found[line, len(text)] = self.names[name]


# ---- the right side --------------------------------------------------------------------------------------------------


def spans(tokens: list[tokenize.TokenInfo]) -> Iterator[tuple[Place, Place, str]]:
    """Yield where a piece of code begins and ends, and what it is: an f-string is one piece, whatever the Python."""
    kinds = {"STRING": "s", "NUMBER": "m", "COMMENT": "c", "NAME": "n"}
    opened, before = [], ""
    for token in tokens:
        kind = tokenize.tok_name[token.type]
        if kind == "FSTRING_START":  # since Python 3.12
            opened.append(token.start)
        elif kind == "FSTRING_END":
            begin = opened.pop()
            if not opened:
                yield begin, token.end, "s"
        elif not opened and kind in kinds:
            name = "k" if keyword.iskeyword(token.string) else "d" if before in ("def", "class") else "n"
            yield token.start, token.end, name if kind == "NAME" else kinds[kind]
        before = token.string


def painted(source: Source, links: dict[Place, str]) -> list[str]:
    """Return the lines of a file as HTML, each with its number."""
    ids = [f"{source.name}-{n}" for n in range(1, len(source.lines) + 1)]
    done, at = [f'<a class="n" id="{id}" href="#{id}">{n}</a>' for n, id in enumerate(ids, 1)], [0] * len(ids)
    for (first, begin), (last, end), kind in spans(source.tokens):
        for i in range(first - 1, last):  # a string may have several lines
            line, start = source.lines[i], begin if i == first - 1 else 0
            text = line[start : end if i == last - 1 else None]
            anchor, plain = links.get((first, begin)), escape(text)
            name = f'<a href="#{anchor}">{plain}</a>' if anchor else plain
            piece = {"n": name, "c": f"<i>{inline(text, {})}</i>"}.get(kind) or f'<b class="{kind}">{plain}</b>'
            done[i] += escape(line[at[i] : start]) + piece
            at[i] = start + len(text)
    return [html + escape(line[end:]) for html, line, end in zip(done, source.lines, at, strict=True)]


# ---- the left side ---------------------------------------------------------------------------------------------------


def inline(text: str, names: Names) -> str:
    """Set a line of prose as HTML: names of code, papers, masks, shapes and worked values are set apart."""
    out, at = "", 0
    for match in INLINE.finditer(text):
        kind, found = match.lastgroup, match[match.lastgroup]
        anchor, plain = names.get(found.partition("(")[0]), escape(found)
        link = f'<a href="#{anchor}"><code>{plain}</code></a>' if anchor else f"<code>{plain}</code>"
        out += escape(text[at : match.start()])
        out += {
            "mask": "<mark>[MASK]</mark>",
            "paper": f'<a href="https://arxiv.org/abs/{found[6:]}">{found}</a>',
            "shape": f"<var>{plain}</var>",
            "sign": SIGNS.get(found, ""),
        }.get(kind, link)
        at = match.end()
    return out + escape(text[at:])


def prose(text: str, names: Names) -> str:
    """Set a docstring or a comment as HTML: paragraphs, indented examples, arguments, and the letters of shapes."""
    out = []
    for paragraph in re.sub("(?m)^# ?", "", text).split("\n\n"):
        if paragraph.startswith("    "):
            out.append(f"<pre>{escape(re.sub('(?m)^    ', '', paragraph))}</pre>")
            continue
        for part in re.split(r"\n(?=[a-z_]+: )|\s(?=Shapes: )", paragraph):
            whole = " ".join(part.split())
            if whole.startswith("Shapes: "):  # "B batch, T sequence"
                letters = re.sub(r"(?<=: )\w+|(?<=, )\w+", r"<var>\g<0></var>", whole)
                out.append(f"<p>{letters}</p>")
            else:
                told = re.sub(r"^([a-z_]+)(?=: )", r"`\1`", whole)  # an argument's name
                out.append(f"<p>{inline(told, names)}</p>" * bool(told))
    return "".join(out)


def equation(key: str) -> str:
    """Set the equation of "file.name" as HTML, or nothing if it has none."""
    where, lines = EQUATIONS.get(key, ("", []))
    set_apart = lambda line: lambda match: f"<span>{mathml(match[1], display=match[0] == line)}{match[2]}</span>"
    body = "".join(f"<div>{re.sub(r'[$](.+?)[$]([.,;:]?)', set_apart(line), line)}</div>" for line in lines)
    return f"<figure><figcaption>{where}</figcaption>{body}</figure>" if lines else ""


# ---- the page --------------------------------------------------------------------------------------------------------


def rows_of(source: Source, names: Names, lines: list[str]) -> Iterator[str]:
    """Yield the rows of a file as HTML; lines: the file's, as HTML."""
    for row, end in zip(source.rows, [*(row.first for row in source.rows[1:]), len(lines) + 1], strict=True):
        if heading := HEADING.match(row.text):
            yield f"<h3>{inline(heading[1], names)}</h3>"
            continue
        shown = [n for n in range(row.first, end) if n not in row.hidden]
        full = [n for n in shown if source.lines[n - 1].strip()] or [0]  # neither first nor last line is empty
        code = "\n".join(lines[n - 1] for n in shown if full[0] <= n <= full[-1])
        owner, dot, name = row.name.rpartition(".")
        key, title = f"{source.name}.{row.name}", f"<h4>{owner}{dot}<b>{name}</b></h4>" if name else ""
        title = title if row.first > 1 else f"<h2>{source.name}.py</h2>"
        left = f'<div class="prose"><div>{title}{prose(row.text, names)}{equation(key)}</div></div>'
        mark = f' id="{key}"' if name else ""
        yield f'<div class="row"{mark}>{left}\n<pre class="code">{code}</pre></div>'


def card(source: Source) -> str:
    """Return a file's place in the table of contents: its first sentence, and what it defines."""
    said = source.rows[0].text.split("\n\n")[0].replace("\n", " ").partition(". ")[0].rstrip(".")
    links = " ".join(f'<a href="#{source.name}.{r.name}">{r.name}</a>' for r in source.rows if r.name.isidentifier())
    title = f'<h2><a href="#{source.name}">{source.name}.py</a></h2>'
    return f'<li>{title}<p>{inline(said, {})}.</p><p class="names">{links}</p></li>'


def page() -> str:
    """Return the page as HTML that needs no other file."""
    course, files = {name: Source(name) for name in COURSE}, []
    for source in course.values():
        linker = Linker(source, course)
        tabs = [f'<a href="#{name}"{" aria-current=true" * (name == source.name)}>{name}.py</a>' for name in COURSE]
        body = "\n".join(rows_of(source, linker.names, painted(source, linker.found)))
        files.append(
            f'<section id="{source.name}"><nav><a href="#top">contents</a>{"".join(tabs)}</nav>\n{body}</section>'
        )
    template = (HERE / "literate.html").read_text(encoding="utf-8")
    filled = template.replace("{{CONTENTS}}", "\n".join(map(card, course.values())))
    return filled.replace("{{FILES}}", "\n".join(files))
