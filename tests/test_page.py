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
from test_trace import letters, run
from wild import WILD, by_hand, wild_tokenizer

from minillada.errors import BadInput, BadLuck
from minillada.sampler import Step
from minillada.show.page import (
    UNKNOWN,
    cells,
    check_file,
    document,
    level,
    pack,
    save,
    to_gif,
    to_html,
    to_order,
    to_svg,
)
from minillada.show.terminal import columns
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

    def show(trace, wishes=""):
        file = tmp_path / "page.html"
        file.write_text(to_html(trace), encoding="utf-8")
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


def svg_of(trace, **options):
    return ElementTree.fromstring(to_svg(trace, **options).encode())


def states_at(root, share):
    """Opacity of every animated element at a share of the time."""
    found = []
    for animation in root.iter("{http://www.w3.org/2000/svg}animate"):
        times, values = ([float(x) for x in animation.get(name).split(";")] for name in ("keyTimes", "values"))
        assert times[0] == 0 and times == sorted(set(times)) and times[-1] < 1 and len(values) == len(times)
        found.append(values[sum(at <= share for at in times) - 1])
    return found


def test_the_animation_is_whole_xml_whatever_was_written():
    root = svg_of(wild_trace(), width=60)
    texts = "".join(root.itertext())
    assert "<script>alert(1)</script>" in texts and not list(root.iter("{http://www.w3.org/2000/svg}script"))


def test_the_animation_begins_with_holes_and_ends_with_the_text():
    trace = Trace.record(by_hand([21, 3], [[0], [1]]), wild_tokenizer())
    boxes = [box.get("class") for box in svg_of(trace).iter("{http://www.w3.org/2000/svg}rect")]
    assert boxes.count("h") == 2
    first, last = states_at(svg_of(trace), 0), states_at(svg_of(trace), 0.999)
    assert (sum(first), sum(last)) == (2, 2)  # the two holes; the two tokens
    assert all(a != b for a, b in zip(first, last, strict=True) if a or b)


def test_a_revised_token_is_gone_for_as_long_as_it_was():
    _, trace = revising_trace()
    root = svg_of(trace)
    groups = list(root.iter("{http://www.w3.org/2000/svg}g"))
    assert len(groups) == len(list(trace.spans())) > len(trace.given) - 3
    assert sum(g.get("opacity") == "1" for g in groups) == 12  # without animation: the final text


def test_cells_follow_one_another_and_stay_in_the_picture():
    for width in (10, 33, 80):
        places, n_lines = cells(wild_trace(), width)
        end = (0, 0)
        for cell in (cell for place in places for cell in place):
            assert (cell.line, cell.column) >= end and cell.width == sum(map(columns, cell.text))
            assert cell.column + cell.width <= width and cell.line < n_lines
            end = (cell.line, cell.column + cell.width)
        shown = "".join(cell.text for place in places for cell in place)
        whole = "".join(wild_trace().texts(wild_trace().final))
        assert shown.replace(" ", "") == re.sub("[\n\t ]", "", whole)


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
