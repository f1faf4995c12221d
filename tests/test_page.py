"""The page, driven in a real browser, and the pictures: they show what the steps said, whatever was written."""

import base64
import importlib.util
import io
import json
import re
import time
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from browser import Browser, needed
from test_trace import MASK, letters, run
from wild import WILD, by_hand, wild_tokenizer

from minillada.errors import BadInput, BadLuck
from minillada.sampler import Step
from minillada.show.page import (
    LEAD,
    UNKNOWN,
    Film,
    board_svg,
    check_file,
    document,
    level,
    lines,
    pack,
    save,
    span,
    to_gif,
    to_html,
    to_order,
    to_svg,
)
from minillada.show.trace import Trace
from minillada.text.tokenizer import Tokenizer, display

ALL = list(range(1, len(WILD)))
ORDER = [[i] for i in sorted(range(len(ALL)), key=lambda i: i * 7 % len(ALL))]
plotting = pytest.mark.skipif(not importlib.util.find_spec("matplotlib"), reason="matplotlib is not installed")


def wild_trace():
    return Trace.record(by_hand(ALL, ORDER), wild_tokenizer())


def revising_trace(seed=1):
    steps = list(run(seed, rivals=5, temperature=1.0, revise="remdm-conf")[1])
    return steps, Trace.record(steps, letters())


def unpacked(column):
    kind, text = column
    return np.frombuffer(base64.b64decode(text), f"<{kind}").tolist()


def data_of(page):
    return json.loads(re.search(r'<script type="application/json" id="trace">(.*?)</script>', page, re.DOTALL)[1])


# ---- what the page is told ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("most", "kind"), [(0, "u1"), (255, "u1"), (256, "u2"), (65535, "u2"), (65536, "u4")])
def test_numbers_are_packed_in_as_few_bytes_as_the_largest_needs(most, kind):
    packed = pack([0, most, 1])
    assert packed[0] == kind and unpacked(packed) == [0, most, 1]
    assert unpacked(pack([])) == []


def test_a_probability_becomes_a_level():
    assert level([0, 0.5, 1, float("nan")]).tolist() == [0, 127, 254, UNKNOWN]


def test_the_page_is_told_every_event_and_rival():
    _, trace = revising_trace()
    told = document(trace)
    given, count, step, kind, token, sure, rival, p = map(unpacked, told["columns"])
    words = told["words"]
    assert [words[i] for i in given] == trace.texts(trace.given)
    assert count == np.bincount(trace.position, minlength=15).tolist() and sum(count) == len(step)
    assert (step, kind) == (trace.step.tolist(), trace.kind.tolist())
    assert [words[i] for i in token] == trace.texts(trace.token)
    assert sure == level(trace.probability).tolist()
    expected = [trace.rivals[s, p] for p, s, k in zip(trace.position, trace.step, trace.kind, strict=True) if k == 2]
    assert told["top"] == 5 and [words[i] for i in rival] == [w for ids, _ in expected for w in trace.texts(ids)]
    assert p == [x for _, values in expected for x in level(values).tolist()]


def test_nothing_written_by_a_model_or_a_user_becomes_markup():
    page = to_html(wild_trace(), '</title><script>alert(1)</script>\x00"')
    assert page.count("<script") == 2 and page.count("</script") == 2 and page.count("</title") == 1
    assert data_of(page)["words"] == [display(wild_tokenizer().token(id)) for id in range(len(WILD))]
    assert not set(page) & {chr(code) for code in [*range(10), *range(11, 32), 127, 0x2028, 0x2029, 0x202E]}


def test_the_page_asks_for_nothing_from_elsewhere():
    page = to_html(Trace.record(by_hand([21, 11], [[0], [1]]), wild_tokenizer()))
    assert "default-src 'none'" in page
    assert not re.search(
        r"\b(?:src|href)=|url\(|@import|https?:|\bimport\b|fetch\(", page.replace(json.dumps(WILD), "")
    )


def noise(n_steps, length, repeats, words=4096):
    """A run of one window as large, in which the proposals of every hole change every so many steps."""
    rng = torch.Generator().manual_seed(0)
    order = torch.randperm(length, generator=rng)
    draws = torch.randint(4, words, (n_steps // repeats + 1, length), generator=rng)
    x, steps, nothing = torch.zeros(1, length, dtype=torch.long), [], torch.zeros(1, length, dtype=torch.bool)
    for step in range(n_steps):
        hole, committed = x == 0, nothing.clone()
        committed[0, order[step * length // n_steps : (step + 1) * length // n_steps]] = True
        proposed = torch.where(hole, draws[step // repeats], x)
        p = torch.full(x.shape, torch.nan).masked_fill(hole, 0.3)
        x = torch.where(committed, proposed, x)
        steps.append(Step(x, proposed, p, p, committed, nothing, slice(0, length), step, step + 1))
    return steps


def large_trace(repeats=1):
    tokenizer = Tokenizer.bytes()
    return Trace.record(noise(1024, 1024, repeats, tokenizer.vocab_size), tokenizer)


def test_a_thousand_tokens_in_a_thousand_steps_stay_a_page_of_few_megabytes():
    start = time.perf_counter()
    trace = large_trace()  # every hole proposes another token at every step: half a million events, the most there are
    assert len(trace.step) > 520_000
    page = to_html(trace)
    assert len(page) < 6e6
    assert time.perf_counter() - start < 20
    assert len(to_html(large_trace(32))) < 0.5e6


# ---- in a browser ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    with Browser() as browser:
        yield browser


@pytest.fixture
def show(browser, tmp_path):
    """show(trace, wishes) opens its page and returns a function for the text of all tokens, by class if wanted."""

    def show(trace, wishes="", **options):
        file = tmp_path / "page.html"
        file.write_text(to_html(trace, **options), encoding="utf-8")
        browser.complaints()
        browser.open(f"{file.as_uri()}#{wishes}")

        def spans(kind=""):
            return browser.run(f"return [...document.querySelectorAll('#text span{kind}')].map(s => s.textContent)")

        return spans

    return show


def canvas(steps, n, tokenizer):
    """The texts of a row after n steps, as the page shows them; before the first, the given ones."""
    row = steps[n - 1].x[0] if n else torch.where(steps[0].probability.isnan(), steps[0].proposed, tokenizer.mask_id)[0]
    return ["░" if id == tokenizer.mask_id else display(tokenizer.token(id)) for id in row.tolist()]


@needed
def test_the_page_shows_the_canvas_of_every_step(browser, show):
    steps, trace = revising_trace()
    spans = show(trace, "step=0")
    for n in range(len(steps) + 1):
        browser.run("const s = document.getElementById('slider'); s.value = arguments[0]; s.oninput({target: s})", n)
        assert spans() == canvas(steps, n, letters()), n
        new = steps[n - 1].committed[0].sum().item() if n else 0
        assert len(spans(".new")) == new
        back = steps[n - 1].revised[0] & (steps[n - 1].x[0] == letters().mask_id) if n else torch.zeros(1)
        assert len(spans(".back")) == back.sum().item()
    assert browser.complaints() == []


@needed
def test_keys_and_buttons_move_through_the_steps(browser, show):
    spans = show(wild_trace(), "step=3")
    now = lambda: int(browser.run("return document.getElementById('slider').value"))
    for keys, step in [("", 3), (["ArrowRight"] * 2, 5), (["ArrowLeft"], 4), (["PageDown"], 14), (["Home"], 0)]:
        browser.press(*keys) if keys else None
        assert now() == step
    browser.press(" ")
    browser.until(lambda: now() > 2)
    browser.press(" ")
    at = now()
    time.sleep(0.4)
    assert now() == at < len(ORDER)
    browser.press("End")
    assert now() == len(ORDER) and len(spans(".hole")) == 0
    browser.run("document.getElementById('speed').value = 40")
    browser.point("#play", click=True)  # at the end it begins again
    browser.until(lambda: 0 < now() < len(ORDER))
    browser.until(lambda: now() == len(ORDER))
    assert browser.run("return document.getElementById('play').textContent") == "▶"


@needed
def test_pointing_at_a_token_tells_its_story(browser, show):
    _, trace = revising_trace()
    show(trace)
    position = int(np.bincount(trace.position[trace.kind == 0]).argmax())  # taken back most often
    browser.point(f"#text span[data-i='{position}']")
    told = browser.run("return document.getElementById('told').textContent")
    mine = trace.position == position
    last = int(trace.step[mine & (trace.kind == 2)][-1])
    assert f"position {position}" in told and f"step {last + 1}: committed" in told and "taken back" in told
    ids, p = trace.rivals[last, position]
    for word, value in zip(trace.texts(ids), p, strict=True):
        assert re.search(
            re.escape(f"“{word}” ") + f"(?:{value * 100 - 1:.0f}|{value * 100:.0f}|{value * 100 + 1:.0f}) %", told
        )
    browser.press(".")
    assert f"position {position + 1}" in browser.run("return document.getElementById('told').textContent")


@needed
def test_holes_show_what_was_proposed_if_wanted(browser, show):
    steps = by_hand(ALL, ORDER)
    spans = show(wild_trace(), "step=2&guesses")
    proposed = [display(wild_tokenizer().token(id)) for id in steps[1].proposed[0].tolist()]
    assert spans() == proposed
    browser.press("g")
    assert spans() == canvas(steps, 2, wild_tokenizer())


@needed
def test_no_vocabulary_breaks_the_page(browser, show):
    spans = show(wild_trace())
    assert spans() == canvas(by_hand(ALL, ORDER), len(ORDER), wild_tokenizer())
    assert browser.run("return [document.scripts.length, document.images.length]") == [2, 0]
    box = browser.run("return [document.documentElement.scrollWidth, innerWidth]")
    assert box[0] <= box[1], "a word of 200 letters scrolls nothing sideways"
    assert browser.complaints() == []


@needed
def test_letters_of_several_tokens_are_whole_as_soon_as_all_are_there(browser, show):
    tokenizer = Tokenizer.bytes()
    text = tokenizer.encode("漢")
    spans = show(Trace.record(by_hand(text, [[0], [2], [1]], tokenizer.mask_id), tokenizer), "step=2")
    assert spans() == ["\ufffd", "░", "\ufffd"]
    browser.press("End")
    assert spans() == ["漢", "", ""]


@needed
def test_the_page_is_light_or_dark(browser, show):
    show(wild_trace(), "light")
    paper = lambda: browser.run("return getComputedStyle(document.body).backgroundColor")
    light = paper()
    browser.press("t")
    assert light == "rgb(253, 252, 249)" and paper() == "rgb(22, 24, 29)"


@needed
def test_a_large_page_opens_and_moves_without_delay(browser, show):
    start = time.perf_counter()
    spans = show(large_trace(), "step=512")
    assert len(spans(".hole")) == 512
    assert time.perf_counter() - start < 20  # half of it is ours
    script = "const t = performance.now(); for (const n of [1, 1024, 300, 301, 302]) {slider.value = n; slider.oninput("
    took = browser.run(script + "{target: slider}); document.body.offsetHeight} return (performance.now() - t) / 5")
    assert took < 250  # milliseconds; a tenth of that on a free machine


# ---- pictures -------------------------------------------------------------------------------------------------------


SVG = "{http://www.w3.org/2000/svg}"


def svg_of(trace, **options):
    return ElementTree.fromstring(to_svg(trace, **options).encode())


def test_the_animation_is_whole_xml_whatever_was_written():
    root = svg_of(wild_trace(), width=60)
    texts = "".join(root.itertext())
    assert "<script>alert(1)</script>" in texts and not list(root.iter(f"{SVG}script"))


def pictured(root, kind, name):
    return [element.get(name) for element in root.iter(f"{SVG}{kind}") if element.get(name)]


def test_every_hole_looks_the_same_whatever_word_will_come():
    holes = [{**hole.attrib} for hole in svg_of(wild_trace()).iter(f"{SVG}use")]
    assert holes == [holes[0]] * len(ALL)


def test_a_picture_without_animation_is_the_whole_text():
    """As for a reader who wants no motion, or a program that knows no CSS: what is not the last is not opaque."""
    _, trace = revising_trace()
    root = svg_of(trace)
    words = [group for group in root.iter(f"{SVG}g") if "w" in group.get("class", "").split()]
    last = "".join("".join(group.itertext()) for group in words if group.get("opacity") != "0")
    given = "".join(text.text for text in root.iter(f"{SVG}text") if text.get("class") == "g")
    whole = [token for token in trace.final if token not in letters().special_ids]
    assert given + last == "".join(trace.texts(whole)).replace(" ", "")
    assert len(words) == len(list(trace.spans())) > len(trace.given) - 3


def test_animations_begin_with_holes_run_forward_and_end_with_the_last_token():
    _, trace = revising_trace()
    frames = re.findall(r"@keyframes m\w+-\d+{(.*)}", to_svg(trace))
    assert frames
    for frame in frames:
        moments = re.findall(r"([\d.]+)%{--p:([01])(?:;--n:([01]))?[^}]*}", frame)
        times = [float(at) for at, _, _ in moments]
        assert times[0] == 0 and times[-1] == 100 and times == sorted(set(times))
        assert moments[0][1] == "0" and moments[-1][2] == "0"


def test_pictures_on_one_page_share_no_name():
    first, second = (set(re.findall(r"(?:id=\"|keyframes )([\w-]+)", to_svg(trace))) for trace in
                     (wild_trace(), revising_trace()[1]))  # fmt: skip
    assert len(first) > 20 and not first & second


@needed
def test_in_a_browser_a_text_is_all_holes_then_all_words(browser, tmp_path):
    """The page's clock is set to one moment of the animation after another."""
    _, trace = revising_trace()
    (tmp_path / "a.svg").write_text(to_svg(trace), encoding="utf-8")
    browser.complaints()
    browser.open((tmp_path / "a.svg").as_uri())
    film = Film(trace, 80)
    script = """for (const a of document.getAnimations()) { a.pause(); a.currentTime = arguments[0] * 1000 }
        const seen = q => [...document.querySelectorAll(q)].filter(e => +getComputedStyle(e).opacity > .5).length;
        return [seen(".h"), seen(".w")]"""
    for n in (0, 1, trace.n_steps // 2, trace.n_steps):
        holes = trace.frame(n)[0].count(letters().mask_id)
        at = LEAD + (n + 1) * film.each - 0.011 if n < trace.n_steps else film.total - 0.1
        assert browser.run(script, at) == [holes, 12 - holes]
    assert browser.complaints() == []


def test_pieces_follow_one_another_and_lines_break_at_spaces():
    for width in (10, 33, 80):
        rows = lines(wild_trace(), width)
        assert all(span("".join(piece.text for piece in row)) <= width for row in rows)
        shown = "".join(piece.text for row in rows for piece in row)
        whole = "".join(wild_trace().texts(wild_trace().final))
        assert re.sub("[ \t]", "", shown) == re.sub("[\n\t ]", "", whole)
        assert [piece.position for row in rows for piece in row if piece.gap] == list(range(len(ALL)))
    words = Tokenizer.characters(["a bc"])
    text = words.encode("aa bb cc")
    broken = lines(Trace.record(by_hand(text, [[i] for i in range(8)], words.mask_id), words), 6)
    assert ["".join(piece.text for piece in row) for row in broken] == ["aa bb ", "cc"]


def test_what_stands_behind_the_end_of_the_text_is_not_drawn():
    tokenizer = letters()
    steps = by_hand([1, 2, 14, 14], [[3], [0], [1], [2]], MASK)
    assert "EOS" not in "".join(svg_of(Trace.record(steps, tokenizer)).itertext())


# ---- boards ---------------------------------------------------------------------------------------------------------


def board_trace(in_place=True):
    """A board of four cells, of which the first is given, as the model reads it: `1..1=1221`."""
    tokenizer = Tokenizer.characters(["12.="])
    text = tokenizer.encode("1..1=1221")
    given = [0, 1, 2, 3, 4] + [5, 8] * in_place
    order = [i for i in (7, 5, 8, 6) if i not in given]
    steps = by_hand(text, [given, *([i] for i in order)], tokenizer.mask_id)[1:]
    return Trace.record(steps, tokenizer)


@pytest.mark.parametrize("in_place", [True, False], ids=["clues stand in the answer", "clues are written again"])
def test_a_board_fills_and_keeps_its_clues(in_place):
    trace = board_trace(in_place)
    assert trace.board(2) == [(5, "1"), (6, ""), (7, ""), (8, "1")]
    root = ElementTree.fromstring(board_svg(trace, 2).encode())
    assert [text.text for text in root.iter(f"{SVG}text")] == list("1221")
    assert [text.get("class") for text in root.iter(f"{SVG}text")] == ["c", None, None, "c"]


def test_a_text_that_is_no_board_is_refused():
    with pytest.raises(BadInput, match="board: expected 16 cells, got 4 places"):
        to_html(board_trace(), board=4)


@needed
def test_the_page_draws_a_board(browser, show):
    spans = show(board_trace(), "step=1", board=2)
    assert spans() == ["1", "░", "2", "1"] and spans(".given") == ["1", "1"]
    browser.press("End")
    assert spans() == list("1221") and browser.complaints() == []


@plotting
def test_the_gif_plays_every_step_and_holds_the_last():
    from PIL import Image

    _, trace = revising_trace()
    image = Image.open(io.BytesIO(to_gif(trace, width=20)))
    assert image.format == "GIF" and image.info["loop"] == 0
    durations = []
    for i in range(image.n_frames):
        image.seek(i)
        durations.append(image.info["duration"])
    assert 3 <= image.n_frames <= trace.n_steps + 1
    assert durations[-1] >= 3000 > sum(durations[1:-1]) / trace.n_steps
    assert Image.open(io.BytesIO(to_gif(trace, width=20, most=4))).n_frames <= 5
    to_gif(wild_trace())


@plotting
def test_the_order_of_commitment_is_a_picture():
    for trace in (wild_trace(), revising_trace()[1]):
        assert to_order(trace)[:8] == b"\x89PNG\r\n\x1a\n"


# ---- files ----------------------------------------------------------------------------------------------------------


def test_a_file_that_is_there_is_refused_and_kept(tmp_path):
    file = tmp_path / "a.html"
    file.write_text("mine")
    with pytest.raises(BadInput, match="html: expected a new file"):
        check_file("html", file)
    with pytest.raises(BadLuck, match="svg: expected a directory"):
        check_file("svg", tmp_path / "none" / "a.svg")
    check_file("svg", tmp_path / "a.svg")
    save(wild_trace(), "svg", tmp_path / "a.svg")
    assert (tmp_path / "a.svg").read_text(encoding="utf-8") == to_svg(wild_trace())
