"""The app as a person uses it, in a real browser, and what it refuses."""

import gc
import importlib.util
import json
import re
import sys
import time
import weakref
from itertools import zip_longest
from pathlib import Path

import pytest
from browser import Browser, free_port, needed
from oracles import tiny_model
from talkers import write_talker

import minillada
from minillada.commands import app
from minillada.errors import BadInput, BadLuck

NAMES = ["writer", "writer-instruct", "boards"]
gradio = pytest.mark.skipif(not importlib.util.find_spec("gradio"), reason="Gradio is not installed (extra `app`)")


def write_boards(directory):
    """A random model that solves 2x2 boards, as far as its files tell."""
    tokenizer = minillada.Tokenizer.characters(["123456789.="])
    ids = {"mask_id": tokenizer.mask_id, "eos_id": tokenizer.eos_id, "pad_id": tokenizer.pad_id}
    minillada.save(tiny_model(vocab_size=tokenizer.vocab_size, max_len=48, **ids), directory, tokenizer)
    guide = {"sampling": {"temperature": 0.5}, "examples": {"prompt": ["12343412....4321="]}}
    (directory / "generation_config.json").write_text(json.dumps({"minillada": guide}))
    return directory


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A model that goes on writing, one that was taught to answer, and one for boards."""
    home = tmp_path_factory.mktemp("models")
    write_talker(home / "writer")
    write_talker(home / "writer-instruct")
    write_boards(home / "boards")
    return home


@pytest.fixture(scope="module")
def get(home):
    get = app.models("cpu", False)
    return lambda name: get(str(home / name))


@pytest.fixture(scope="module")
def model(get):
    return get("writer")


def values(model, **chosen):
    return tuple(({**model.initial(), **chosen}).values())


def asked(model, task, text, **chosen):
    asked, seed = app.start(model, task, text, values(model, **chosen))
    return asked.canvas, asked.config, list(app.denoise(model.talker, asked, seed))


# ---- what it computes -----------------------------------------------------------------------------------------------


def holes(frame):
    return frame[0].count(255)


def test_it_writes_what_the_library_writes(model, monkeypatch):
    monkeypatch.setattr(app, "PACE", 0)
    canvas, config, shown = asked(model, "write", "Hello", gen_len=16, temperature=0, seed=3)
    assert config == minillada.SampleConfig(gen_len=16, steps=16, block_len=16, stop_ids=(254, 253))
    expected = list(minillada.stream(model.talker.model, canvas, config, 3))
    assert len(shown) == len(expected) + 1 and [trace for _, trace in shown[:-1]] == [None] * len(expected)
    for (frame, _), step in zip(shown, expected, strict=False):
        assert frame[0] == step.x[0].tolist()
    assert shown[-1][1].final.tolist() == expected[-1].x[0].tolist()
    assert shown[-1][0][0] == shown[-2][0][0]


def test_settings_are_those_of_the_scripts_and_what_is_untouched_is_left_to_them(model, get):
    chosen = {"gen_len": 8, "block_len": 4, "steps": 4, "top_p": 0.5, "commit": "threshold:0.9", "ban_eos": True}
    _, config, _ = asked(model, "write", "Hello", remasking="margin", **chosen)
    assert {name: getattr(config, name) for name in chosen} == chosen
    assert not config.defer_eos and config.remasking == "margin"
    assert set(vars(app.options(model, values(model))).values()) == {None, 0}  # 0: the seed
    assert set(model.initial()) == {*app.TYPES, *app.SWITCHES} == set(app.FIELDS)
    assert get("boards").initial()["temperature"] == 0.5
    assert vars(app.options(get("boards"), values(get("boards"))))["temperature"] is None


def test_masks_are_filled_and_the_rest_is_kept(model):
    for task in ("fill", "either"):
        _, _, shown = asked(model, task, "a[MASK][MASK]b[MASK]", gen_len=16, block_len=8)  # the holes decide
        text = "".join(text for text, _ in app.view(shown[-1][0], model.talker.tokenizer))
        assert re.fullmatch(r"a.{0,2}b.{0,1}", text, re.DOTALL)  # some ids of this model are no token


def test_a_board_keeps_its_digits_and_its_holes_are_filled(get):
    boards = get("boards")
    assert (boards.side, boards.examples["Board"][0], len(boards.examples["Board"])) == (4, "12343412....4321", 5)
    canvas, _, shown = asked(boards, "board", "1234\n3412\n....\n4321")
    assert canvas.x.shape == (1, 33)
    page = app.board(shown[-1][0], boards.talker.tokenizer)
    cells = re.findall('<span class="([^"]*)">([^<]*)</span>', page)
    assert len(cells) == 16 and [kind.split()[0] for kind, _ in cells].count("given") == 12
    assert [text for kind, text in cells if "given" in kind] == list("123434124321")
    assert "░" not in page and "░" in app.board(shown[0][0], boards.talker.tokenizer)


def test_a_model_is_read_once_and_few_stay_in_memory(home):
    get = app.models("cpu", False)
    first = get(str(home / "writer"))
    assert get(str(home / "writer")) is first
    gone = weakref.ref(first.talker.model)
    del first
    for other in ("boards", "writer-instruct"):
        get(str(home / other))
    gc.collect()
    assert gone() is None


def test_models_to_choose_from_are_the_one_asked_for_the_runs_and_the_shipped_but_the_twin(monkeypatch, tmp_path):
    monkeypatch.setattr(app, "runs", lambda: ["runs/a", "runs/b"])
    monkeypatch.setattr(app, "shipped", lambda name: tmp_path)
    assert app.names("runs/b") == ["runs/b", "runs/a", *(name for name in app.SHIPPED if name != "tales-ar")]
    monkeypatch.setattr(app, "runs", lambda: [])
    monkeypatch.setattr(app, "shipped", lambda name: None)
    with pytest.raises(BadLuck, match="app: expected a model, got none"):
        app.names(None)


@pytest.mark.parametrize(
    ("name", "task", "text", "chosen", "reason"),
    [
        ("writer", "write", "x" * 20_001, {}, "text: expected at most 20000 characters"),
        ("writer", "write", "a", {"gen_len": 1025}, "gen_len: expected a whole number from 1 to 1024"),
        ("writer", "write", "a", {"steps": 5000}, "steps: expected a whole number from 1 to 4096"),
        ("writer", "write", "a", {"gen_len": "x"}, "gen_len: expected int, got 'x'"),
        ("writer", "write", "a", {"temperature": "nan"}, "temperature: expected a finite number"),
        ("writer", "write", "a", {"temperature": None}, "temperature: expected float, got None"),
        ("writer", "write", "a", {"seed": -1}, "seed: expected a whole number"),
        ("writer", "write", "a", {"commit": "os.system"}, "commit: expected one of"),
        ("writer", "fill", "no hole", {}, "fill: expected at least one [MASK]"),
        ("writer", "write", "é", {}, "text: expected"),
        ("writer", "write", "\udcff", {}, "lone surrogate"),
        ("boards", "board", "12", {}, "board: expected 16 cells, each 1 to 4 or a dot for a hole"),
        ("boards", "board", "5" + "." * 15, {}, "board: expected 16 cells"),
        ("boards", "board", "1234341221434321", {}, "board: expected 16 cells"),
    ],
)
def test_what_cannot_be_computed_is_refused_in_one_line(get, name, task, text, chosen, reason):
    with pytest.raises(BadInput, match=re.escape(reason)) as fault:
        asked(get(name), task, text, **chosen)
    assert "\n" not in str(fault.value)


def test_two_runs_can_take_turns(model, monkeypatch):
    """As the comparison does: each hears its own logits."""
    monkeypatch.setattr(app, "PACE", 0)
    settings = [values(model, gen_len=12, temperature=1), values(model, gen_len=12, remasking="random")]
    begun = [app.start(model, "write", "Hi", each) for each in settings]
    alone = [list(app.denoise(model.talker, *each))[-1][1] for each in begun]
    runs = [app.denoise(model.talker, *each) for each in begun]
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

    def selected(self) -> str:
        return self.visible("[role=tab]", "return found.find(x => x.ariaSelected === 'true')?.textContent.trim()")

    def write(self, text: str, button: str = "Write") -> None:
        self.visible(".ask textarea", "found[0].focus(); found[0].select()")
        self.press(*text)
        self.click(button)

    def choose(self, model: str) -> None:
        """Choose a model in the menu; its tabs then are there."""
        self.visible("input[aria-label=Model]", "found[0].focus(); found[0].click()")
        press = "one?.dispatchEvent(new MouseEvent('mousedown', {bubbles: true})); return !!one"
        find = f"const one = found.find(x => x.textContent.replace('✓', '').trim() === '{model}');"
        self.until(lambda: self.visible("[role=option]", find + press))

    def click(self, name: str) -> None:
        press = f"const b = found.findLast(x => x.textContent.trim() === '{name}'); b?.click(); return !!b"
        self.until(lambda: self.visible("button", press))  # the last one: a tab may have the same name

    def text(self, screen: int = 0) -> str:
        return self.visible(".canvas", f"return found[{screen}]?.innerText ?? ''")

    def holes(self, screen: int = 0) -> int:
        return self.text(screen).count("░")


@pytest.fixture(scope="module")
def visitor(get):
    """A browser at the app, whose models take their time so that one can watch."""
    if not importlib.util.find_spec("gradio"):
        pytest.skip("Gradio is not installed (extra `app`)")
    calls = []

    def slowly(*_):
        calls.append(1)
        time.sleep(0.03)

    hooks = [get(name).talker.model.register_forward_hook(slowly) for name in NAMES]
    page = app.build(get, NAMES)
    app.launch(page, "127.0.0.1", free_port())
    with Visitor() as visitor:
        visitor.calls = calls
        visitor.url = page.local_url
        visitor.open(page.local_url)
        visitor.until(lambda: visitor.visible(".ask textarea", "return found.length"))
        yield visitor
    page.close()
    for hook in hooks:
        hook.remove()


@needed
@gradio
def test_a_prompt_is_typed_and_its_masks_resolve_and_can_be_replayed(visitor):
    visitor.tab("Write")
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
    visitor.write("a[MASK][MASK]b[MASK]c", "Fill")
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
    visitor.tab("Write")
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
    visitor.tab("Write")
    visitor.write("Good bye")
    visitor.until(visitor.holes)
    visitor.open("about:blank")
    assert_rest(visitor)
    visitor.open(visitor.url)
    visitor.until(lambda: visitor.visible(".ask textarea", "return found.length"))


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
    visitor.write("nothing to fill", "Fill")
    visitor.until(lambda: "expected at least one [MASK]" in visitor.run("return document.body.innerText"))
    visitor.write("a[MASK]", "Fill")
    visitor.until(lambda: not visitor.holes() and "a" in visitor.text())


@needed
@gradio
def test_one_can_chat_and_markup_is_only_text(visitor):
    visitor.choose("writer-instruct")
    visitor.until(lambda: visitor.selected() == "Chat")
    for message in ("Hi", "<b>y</b><script>"):
        visitor.write(message, "Send")
        said = lambda: visitor.visible("[data-testid=user]", "return found.map(x => x.innerText.trim())")
        visitor.until(lambda: said()[-1:] == [message])  # noqa: B023
        visitor.until(visitor.holes)
        visitor.until(lambda: not visitor.holes())
        time.sleep(0.5)  # the answer moves up into the chat
    assert visitor.visible(".ask textarea", "return found[0].value") == ""


@needed
@gradio
def test_a_board_is_solved_at_a_click_on_an_example(visitor):
    visitor.choose("boards")
    visitor.until(lambda: visitor.selected() == "Board")
    cells = lambda kind="": visitor.visible(f".board span{kind}", "return found.map(x => x.textContent)")
    assert len(cells()) == 16 and len(cells(".hole")) == 4  # before anything is computed
    visitor.click("1234 3412 .... 4321")
    visitor.until(lambda: cells(".new"))
    visitor.until(lambda: len(cells()) == 16 and not cells(".hole"))
    assert cells(".given") == list("123434124321")


@needed
@gradio
def test_nothing_is_loaded_from_elsewhere(visitor):
    urls = visitor.run("return performance.getEntriesByType('resource').map(x => x.name)")
    assert urls and all(url.startswith((visitor.url.rstrip("/"), "data:", "blob:")) for url in urls)
    assert Path(app.__file__).read_text(encoding="utf-8").count("share=False") == 1
