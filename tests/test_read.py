"""`python -m minillada read`: the course as a page that is made of the sources, and of nothing else."""

import re
import sys
import webbrowser
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest

from minillada.commands.cli import run
from minillada.commands.read import main
from minillada.show.equations import EQUATIONS, mathml
from minillada.show.literate import COURSE, page

ROOT = Path(__file__).parents[1]


class Page(HTMLParser):
    """Collect what a page holds: `texts` by kind (code, prose), ids, links, tags."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.code, self.prose, self.ids, self.links, self.tags, self.inside = "", "", [], [], set(), []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.add(tag)
        self.inside.append((tag, attrs.get("class")))
        self.code += "\n" * (attrs.get("class") == "code")
        self.ids += [attrs["id"]] if "id" in attrs else []
        self.links += [attrs[name] for name in ("href", "src") if name in attrs]
        if tag == "meta":
            self.inside.pop()

    def handle_endtag(self, tag):
        assert self.inside.pop()[0] == tag  # everything is closed in order

    def handle_data(self, data):
        if ("pre", "code") in self.inside:
            self.code += "" if self.inside[-1] == ("a", "n") else data  # without the line numbers
        elif not {("figure", None), ("style", None)} & set(self.inside):
            self.prose += data


@pytest.fixture(scope="module")
def made():
    html = page()
    return html, Page(html)


def squeezed(text):
    """Letters and digits alone: what typesetting does not change."""
    return re.sub(r"[\W_]", "", text)


def test_the_page_in_docs_is_of_the_sources_as_they_are(made):
    there = (ROOT / "docs/read.html").read_text(encoding="utf-8")  # whatever ends its lines
    assert there == made[0], "it is out of date: python -m minillada read --out docs/read.html"


@pytest.mark.parametrize("name", COURSE)
def test_every_line_of_the_sources_is_on_the_page(made, name):
    code = {line.partition("  # ")[0] for line in made[1].code.splitlines()}  # letter by letter
    comments, prose = squeezed(made[1].code), squeezed(made[1].prose)
    lines = (ROOT / f"minillada/{name}.py").read_text(encoding="utf-8").splitlines()
    beside = [line for line in lines if line.partition("  # ")[0] not in code]
    assert not [line for line in beside if squeezed(line) not in prose]
    assert not [line for line in set(lines) - set(beside) if squeezed(line.partition("  # ")[2]) not in comments]
    assert 0 < len(beside) < len(lines) / 2


def test_every_equation_belongs_to_a_name_of_the_course_and_is_set(made):
    assert set(EQUATIONS) <= set(made[1].ids)
    assert made[0].count("<figure>") == len(EQUATIONS)
    for where, lines in EQUATIONS.values():
        assert where
        for formula in re.findall(r"\$(.+?)\$", " ".join(lines)):
            assert ET.fromstring(mathml(formula)).tag == "math"


def test_a_formula_becomes_mathml():
    small = "<msubsup><mi>x</mi><mn>0</mn><mi>i</mi></msubsup>"
    assert mathml("x_0^i") == mathml("x^i_0") == f"<math>{small}</math>"
    assert "<mfrac><mn>1</mn><mi>t</mi></mfrac>" in mathml(r"\frac{1}{t}").replace("<mrow>", "").replace("</mrow>", "")


def test_the_page_needs_no_network_and_no_script(made):
    html, found = made
    assert not {"script", "link", "img", "iframe"} & found.tags and "url(" not in html and "@import" not in html
    inside = {link[1:] for link in found.links if link.startswith("#")}
    assert inside <= set(found.ids) and len(found.ids) == len(set(found.ids))
    assert all(link.startswith(("#", "https://arxiv.org/abs/")) for link in found.links)
    assert len(html) < 500_000


@pytest.mark.parametrize("use", [
    '<a href="#model.KVCache">KVCache</a> | <b class="k">None</b>',  # imported
    'self.<a href="#model.MoE.route">route</a>(',  # a method
    'draft.<a href="#sampler.Draft.write">write</a>(',  # a method of an argument whose class is told
    'loss = <a href="#plain.bound">bound</a>(',  # of two files that define the name, this one
])  # fmt: skip
def test_names_lead_to_where_they_are_defined(made, use):
    assert use in made[0]


def test_a_field_with_the_name_of_a_function_does_not_lead_to_the_function(made):
    assert 'id="strategies.chance"' in made[0]
    assert "    chance: bool  <i>" in made[0]
    assert re.search(r'now\.<a href="#strategies-\d+">chance</a>', made[0])


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def call(monkeypatch, capsys):
    """call(*options) -> (exit code, what was opened in the browser, standard output, standard error)."""

    def call(*options):
        opened = []
        monkeypatch.setattr(webbrowser, "open", opened.append)
        monkeypatch.setattr(sys, "argv", ["read", *map(str, options)])
        code = 0
        try:
            run(main)
        except SystemExit as error:
            code = error.code
        return code, opened, *capsys.readouterr()

    return call


def test_it_writes_to_a_temporary_directory_and_opens_the_browser(call, made, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    code, opened, out, _ = call()
    path = Path(out.strip())
    assert code == 0 and opened == [path.as_uri()] and path.read_text(encoding="utf-8") == made[0]
    assert tmp_path in path.parents


def test_with_a_file_it_opens_nothing_and_replaces_only_its_own(call, tmp_path):
    path = tmp_path / "page.html"
    assert call("--out", path)[:2] == call("--out", path)[:2] == (0, [])
    assert call("--out", path, "--open")[1] == [path.as_uri()]
    path.write_text("mine")
    code, opened, out, err = call("--out", path)
    assert (code, opened, out, path.read_text()) == (2, [], "", "mine")
    assert err.startswith("error: out: expected a new file, got ") and err.count("\n") == 1


# ---- the glossary ----------------------------------------------------------------------------------------------------


def test_the_glossary_is_in_order_and_its_links_lead_somewhere():
    text = (ROOT / "docs/glossary.md").read_text(encoding="utf-8")
    words = re.findall(r"^## (.+)$", text, re.MULTILINE)
    anchors = {word.lower().replace(" ", "-") for word in words}
    assert words == sorted(words, key=str.lower) and len(words) > 45
    for target, anchor in re.findall(r"\]\(([^)#]*)#?([^)]*)\)", text):
        assert (ROOT / "docs" / target).exists()
        assert target or anchor in anchors
    for file, name in re.findall(r"\[\w+\.py\]\((.+?)\)\s`([\w.]+)`", text):
        assert re.search(rf"\b{name.split('.')[-1]}\b", (ROOT / "docs" / file).read_text(encoding="utf-8"))
