"""The app as a person uses it, in a real browser, and what it refuses."""

import importlib.util
import re
import sys
import time
from argparse import Namespace
from itertools import zip_longest
from pathlib import Path

import pytest
from browser import Browser, free_port, needed
from talkers import write_talker

import minillada
from minillada.commands import app
from minillada.commands.ask import make_talker
from minillada.commands.cli import SWITCHES
from minillada.errors import BadInput

N = len(app.TYPES)
gradio = pytest.mark.skipif(not importlib.util.find_spec("gradio"), reason="Gradio is not installed (extra `app`)")


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    home = write_talker(tmp_path_factory.mktemp("talker"))
    model, tokenizer = minillada.load(home)
    return make_talker(home, str(home), model, tokenizer, Namespace(raw=False, chat=False))


def values(*switches, **texts):
    return [texts.get(name, "") for name in app.TYPES] + [name in switches for name in SWITCHES]


def asked(talker, task, text, *switches, **texts):
    asked, seed = app.start(talker, task, text, tuple(values(*switches, **texts)))
    return asked.canvas, asked.config, list(app.denoise(talker, asked, seed))


# ---- what it computes -----------------------------------------------------------------------------------------------


def test_it_writes_what_the_library_writes(talker, monkeypatch):
    monkeypatch.setattr(app, "PACE", 0)
    canvas, config, shown = asked(talker, "write", "Hello", gen_len="16", temperature="0", seed="3")
    assert config == minillada.SampleConfig(gen_len=16, steps=16, block_len=16, stop_ids=(254, 253))
    expected = list(minillada.stream(talker.model, canvas, config, 3))
    assert len(shown) == len(expected) + 1 and [trace for _, trace in shown[:-1]] == [None] * len(expected)
    for (view, _), step in zip(shown, expected, strict=False):
        assert sum(text.count("░") for text, label in view if label == "hole") == (step.x == 255).sum()
    assert shown[-1][1].final.tolist() == expected[-1].x[0].tolist()
    assert shown[-1][0] == shown[-2][0]


def test_settings_are_those_of_the_scripts(talker):
    _, config, _ = asked(talker, "write", "Hello", "ban_eos", gen_len=" 8 ", block_len="4", steps="4", top_p="0.5",
                         commit="threshold:0.9", remasking="margin")  # fmt: skip
    expected = {"gen_len": 8, "block_len": 4, "steps": 4, "top_p": 0.5, "commit": "threshold:0.9"}
    assert {name: getattr(config, name) for name in expected} == expected
    assert config.ban_eos and not config.defer_eos and config.remasking == "margin"


def test_masks_are_filled_and_the_rest_is_kept(talker):
    for task in ("fill", "either"):
        _, _, shown = asked(talker, task, "a[MASK][MASK]b[MASK]")
        text = "".join(text for text, _ in shown[-1][0])
        assert re.fullmatch(r"a.{0,2}b.{0,1}", text, re.DOTALL)  # some ids of this model are no token


@pytest.mark.parametrize(
    ("task", "text", "texts", "reason"),
    [
        ("write", "x" * 20_001, {}, "text: expected at most 20000 characters"),
        ("write", "a", {"gen_len": "1025"}, "gen_len: expected a whole number from 1 to 1024"),
        ("write", "a", {"steps": "5000"}, "steps: expected a whole number from 1 to 4096"),
        ("write", "a", {"gen_len": "0"}, "gen_len: expected"),
        ("write", "a", {"gen_len": "x"}, "gen_len: expected int, got 'x'"),
        ("write", "a", {"temperature": "nan"}, "temperature: expected a finite number"),
        ("write", "a", {"seed": "-1"}, "seed: expected a whole number"),
        ("write", "a", {"commit": "os.system"}, "commit: expected one of"),
        ("fill", "no hole", {}, "fill: expected at least one [MASK]"),
        ("write", "é", {}, "text: expected"),
        ("write", "\udcff", {}, "lone surrogate"),
    ],
)
def test_what_cannot_be_computed_is_refused_in_one_line(talker, task, text, texts, reason):
    with pytest.raises(BadInput, match=re.escape(reason)) as fault:
        asked(talker, task, text, **texts)
    assert "\n" not in str(fault.value)


def test_two_runs_can_take_turns(talker, monkeypatch):
    """As the comparison does: each hears its own logits."""
    monkeypatch.setattr(app, "PACE", 0)
    settings = [values(gen_len="12", temperature="1"), values(gen_len="12", remasking="random")]
    begun = [app.start(talker, "write", "Hi", tuple(each)) for each in settings]
    alone = [list(app.denoise(talker, *each))[-1][1] for each in begun]
    runs = [app.denoise(talker, *each) for each in begun]
    shown = list(zip_longest(*runs, fillvalue=(None, None)))
    for side, expected in zip(zip(*shown, strict=True), alone, strict=True):
        (trace,) = [trace for _, trace in side if trace]
        assert trace.probability.tolist() == pytest.approx(expected.probability.tolist(), nan_ok=True)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--host", "0.0.0.0"], "host: expected 127.0.0.1 or --auth"),
        (["--auth", "me"], "auth: expected NAME:PASSWORD"),
        (["--port", "0"], "port: expected"),
    ],
)
def test_no_stranger_is_let_in_unasked(monkeypatch, options, reason):
    monkeypatch.setattr(sys, "argv", ["app", *options])
    with pytest.raises(BadInput, match=reason):
        app.main()


def test_without_gradio_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(app, "gr", None)
    monkeypatch.setattr(sys, "argv", ["app"])
    with pytest.raises(OSError, match=r"app: expected Gradio, got none; pip install 'minillada\[app\]'"):
        app.main()


# ---- in a browser ---------------------------------------------------------------------------------------------------


class Visitor(Browser):
    """Knows its way about the app. Of several elements, the visible one is meant."""

    def visible(self, selector: str, what: str = "return found"):
        script = "const found = [...document.querySelectorAll(arguments[0])].filter(x => x.offsetParent);"
        return self.run(script + what, selector)

    def tab(self, name: str) -> None:
        find = f"const tab = [...document.querySelectorAll('[role=tab]')].find(x => x.textContent.trim() === '{name}');"
        self.run(find + "tab.click()")
        self.until(lambda: self.run(find + "return tab.ariaSelected === 'true'"))
        time.sleep(0.5)  # the tab before is on its way out

    def write(self, text: str) -> None:
        self.visible(".ask textarea", "found[0].focus(); found[0].select()")
        self.press(*text)
        self.click("Write")

    def click(self, name: str) -> None:
        press = f"const b = found.find(x => x.textContent.trim() === '{name}'); b?.click(); return !!b"
        self.until(lambda: self.visible("button", press))

    def text(self, screen: int = 0) -> str:
        return self.visible(".canvas", f"return found[{screen}]?.innerText ?? ''")

    def holes(self, screen: int = 0) -> int:
        return self.text(screen).count("░")


@pytest.fixture(scope="module")
def visitor(talker):
    """A browser at the app, whose model takes its time so that one can watch."""
    if not importlib.util.find_spec("gradio"):
        pytest.skip("Gradio is not installed (extra `app`)")
    calls = []

    def slowly(*_):
        calls.append(1)
        time.sleep(0.03)

    hook = talker.model.register_forward_hook(slowly)
    page = app.build(talker, "test")
    app.launch(page, "127.0.0.1", free_port(), prevent_thread_lock=True)
    with Visitor() as visitor:
        visitor.calls = calls
        visitor.url = page.local_url
        visitor.open(page.local_url)
        visitor.until(lambda: visitor.visible(".ask textarea", "return found.length"))
        yield visitor
    page.close()
    hook.remove()


@needed
@gradio
def test_a_prompt_is_typed_and_its_masks_resolve_and_can_be_replayed(visitor):
    visitor.tab("Complete")
    visitor.write("Hello")
    seen = {visitor.until(visitor.holes)}
    visitor.until(lambda: seen.add(visitor.holes()) or (visitor.text() and not visitor.holes()))
    assert len(seen) > 5
    whole = visitor.text()
    steps = visitor.until(lambda: visitor.visible("input[type=range]", "return +(found[0]?.max ?? 0)"))
    assert steps > 30
    move = "found[0].value = {}; found[0].dispatchEvent(new Event('input', {{bubbles: true}}));"
    visitor.visible("input[type=range]", move.format(steps // 2))
    visitor.until(lambda: visitor.holes() >= steps // 2 - 1)
    visitor.visible("input[type=range]", move.format(steps))
    visitor.until(lambda: visitor.text() == whole)


@needed
@gradio
def test_masks_that_are_typed_are_filled(visitor):
    visitor.tab("Fill")
    visitor.write("a[MASK][MASK]b[MASK]c")
    shown = visitor.until(lambda: not visitor.holes() and re.search(r"a.{0,2}b.{0,1}c", visitor.text(), re.DOTALL))
    assert "[MASK]" not in shown[0]


def assert_rest(visitor) -> None:
    time.sleep(0.5)
    at = len(visitor.calls)
    time.sleep(1)
    assert len(visitor.calls) == at


@needed
@gradio
def test_stop_stops_the_computation(visitor):
    visitor.tab("Complete")
    visitor.write("Stop me")
    visitor.until(visitor.holes)
    visitor.click("Stop")
    assert_rest(visitor)
    assert visitor.holes()


@needed
@gradio
def test_to_leave_the_page_stops_the_computation(visitor):
    visitor.open(visitor.url)
    visitor.until(lambda: visitor.visible(".ask textarea", "return found.length"))
    visitor.tab("Complete")
    visitor.write("Good bye")
    visitor.until(visitor.holes)
    visitor.open("about:blank")
    assert_rest(visitor)
    visitor.open(visitor.url)
    visitor.until(lambda: visitor.visible(".ask textarea", "return found.length"))


@needed
@gradio
def test_one_can_chat_and_markup_is_only_text(visitor):
    visitor.tab("Chat")
    for message in ("Hi", "<b>y</b><script>"):
        visitor.write(message)
        said = lambda: visitor.visible("[data-testid=user]", "return found.map(x => x.innerText.trim())")
        visitor.until(lambda: said()[-1:] == [message])  # noqa: B023
        visitor.until(visitor.holes)
        visitor.until(lambda: not visitor.holes())
        time.sleep(0.5)  # the answer moves up into the chat
    assert visitor.visible(".ask textarea", "return found[0].value") == ""


@needed
@gradio
def test_two_settings_are_compared_side_by_side(visitor):
    visitor.tab("Compare")
    visitor.write("a[MASK][MASK][MASK]b")
    visitor.until(lambda: all(re.search("a.*b", visitor.text(i), re.DOTALL) and not visitor.holes(i) for i in (0, 1)))
    told = lambda: visitor.visible("textarea, input", "return found.map(x => x.value)")
    visitor.until(lambda: told().count("3 evaluations") == 2)


@needed
@gradio
def test_a_fault_is_told_and_the_next_request_works(visitor):
    visitor.tab("Fill")
    visitor.write("nothing to fill")
    visitor.until(lambda: "expected at least one [MASK]" in visitor.run("return document.body.innerText"))
    visitor.write("a[MASK]")
    visitor.until(lambda: not visitor.holes() and "a" in visitor.text())


@needed
@gradio
def test_nothing_is_loaded_from_elsewhere(visitor):
    urls = visitor.run("return performance.getEntriesByType('resource').map(x => x.name)")
    assert urls and all(url.startswith((visitor.url.rstrip("/"), "data:", "blob:")) for url in urls)
    assert Path(app.__file__).read_text(encoding="utf-8").count("share=False") == 1
