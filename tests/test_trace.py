"""A trace holds what the steps said, and the terminal shows it whatever was written."""

import io
import re
import unicodedata

import numpy as np
import pytest
import torch
from oracles import tiny_model
from wild import WILD, by_hand, wild_tokenizer

from minillada.errors import BadInput
from minillada.sampler import Canvas, SampleConfig, predictor_of, stream
from minillada.show import terminal
from minillada.show.terminal import columns, layout, pieces, watch
from minillada.show.trace import COMMITTED, ENDED, PROPOSED, REVISED, Trace
from minillada.text.tokenizer import Tokenizer

MASK, WORDS = 15, 12
WAYS = [
    {},
    {"temperature": 1.0, "remasking": "random"},
    {"remasking": "entropy", "commit": "entropy-bound:2"},
    {"temperature": 1.0, "revise": "remdm-conf"},
    {"temperature": 1.0, "revise": "random-remask"},
    {"revise": "wino:0.1,0.9"},
    {"cfg_scale": 1.0, "remasking": "margin"},
    {"cache": "dual", "block_len": 6},
    {"cache": "refresh:3,2,0.5"},
    {"temperature": 1.0, "defer_eos": True},
]


def letters() -> Tokenizer:
    """Ids 0 to 11 are letters, 13 to 15 [PAD], [EOS] and [MASK] of the tiny model."""
    return Tokenizer(Tokenizer.characters("abcdefghijk").inner, {"mask": MASK, "eos": 14, "pad": 13})


def run(seed=0, prompts=((1, 2, 3),), model=None, rivals=0, **options):
    """A model and all the steps of one sampling."""
    model = model or tiny_model(seed)
    config = SampleConfig(**{"gen_len": 12, "steps": 12, "block_len": 12, **options})
    return model, stream(model, Canvas.continuation(prompts, config.gen_len, model.config), config, seed, rivals)


def replayed(trace: Trace):
    """The canvas after each step, from the events alone."""
    canvas = trace.given.copy()
    for step in range(trace.n_steps):
        for kind in (REVISED, COMMITTED, ENDED):
            there = (trace.step == step) & (trace.kind == kind)
            canvas[trace.position[there]] = trace.token[there]
        yield canvas.tolist()


@pytest.mark.parametrize("options", WAYS, ids=lambda options: " ".join(map(str, options.values())) or "defaults")
def test_the_events_replay_every_step(options):
    for seed in range(4):
        steps = list(run(seed, **options)[1])
        trace = Trace.record(steps, letters())
        assert list(replayed(trace)) == [step.x[0].tolist() for step in steps]
        assert trace.given.tolist() == [1, 2, 3] + [MASK] * 12 and trace.final.tolist() == steps[-1].x[0].tolist()


def test_a_row_of_a_batch_is_traced_alone_and_from_any_column():
    steps = list(run(prompts=[[1, 2, 3, 4, 5], [6, 7]], temperature=1.0, revise="remdm-conf")[1])
    for row in (0, 1):
        trace = Trace.record(iter(steps), letters(), row, start=4)
        assert list(replayed(trace)) == [step.x[row, 4:].tolist() for step in steps]


def test_a_text_that_ends_early_is_ended_and_not_committed():
    model = tiny_model(3)
    with torch.no_grad():
        model.head.weight[14] += 2 * model.head.weight.abs().max()
    for seed in range(8):
        steps = list(run(seed, model=model, temperature=3.0)[1])
        trace = Trace.record(steps, letters())
        assert list(replayed(trace)) == [step.x[0].tolist() for step in steps]
        if (trace.kind == ENDED).any():
            assert set(trace.token[trace.kind == ENDED]) == {14}
            assert np.isnan(trace.probability[trace.kind == ENDED]).all()
            return
    raise AssertionError("no text ended early")


def test_events_say_when_and_how_surely_and_proposals_only_what_changed():
    steps = by_hand([3, 4, 5], [[1], [0], [2]])
    trace = Trace.record(steps, wild_tokenizer())
    told = list(zip(trace.position, trace.step, trace.kind, trace.token, strict=True))
    assert told == [
        (0, 0, PROPOSED, 3), (0, 1, COMMITTED, 3), (1, 0, COMMITTED, 4),
        (2, 0, PROPOSED, 5), (2, 1, PROPOSED, 6), (2, 2, COMMITTED, 5),
    ]  # fmt: skip
    assert (trace.probability == 0.25).all()
    same = [step._replace(proposed=steps[0].proposed) for step in steps[:2]]
    assert (Trace.record(same, wild_tokenizer()).step[-1], len(Trace.record(same, wild_tokenizer()).step)) == (0, 4)


def test_spans_tell_how_long_a_token_stayed():
    steps = by_hand([3, 4], [[0], [1]])
    back = torch.tensor([[True, False]])
    again = steps[1]._replace(
        revised=back, committed=torch.tensor([[True, True]]), probability=torch.full((1, 2), 0.5),
        proposed=torch.tensor([[7, 4]]), x=torch.tensor([[7, 4]]),
    )  # fmt: skip
    trace = Trace.record([steps[0], again], wild_tokenizer())
    assert list(trace.spans()) == [(0, 3, 0, 1, 0.25), (0, 7, 1, 2, 0.5), (1, 4, 1, 2, 0.5)]
    assert list(replayed(trace)) == [[3, 0], [7, 4]]


def test_a_canvas_without_holes_has_no_trace():
    with pytest.raises(BadInput, match="trace: expected at least one step, got none"):
        Trace.record([], letters())


@pytest.mark.parametrize("options", WAYS[:4], ids=str)
def test_a_frame_is_what_the_step_was(options):
    steps = list(run(1, **options)[1])
    trace, held = Trace.record(steps, letters()), torch.full((15,), torch.nan)
    assert trace.frame(0)[0] == [1, 2, 3] + [MASK] * 12
    for n, step in enumerate(steps, start=1):
        tokens, sure, new, back = trace.frame(n)
        held = torch.where(step.committed[0], step.probability[0], held).masked_fill(step.x[0] == MASK, torch.nan)
        assert (tokens, new, back) == (step.x[0].tolist(), step.committed[0].tolist(), step.revised[0].tolist())
        assert torch.equal(torch.tensor(sure).nan_to_num(-1), held.nan_to_num(-1))


def test_a_character_of_several_tokens_is_joined():
    tokenizer = Tokenizer.bytes()
    text = [*tokenizer.encode("é漢👩x"), tokenizer.encode("é")[0]]
    steps = by_hand(text, [list(range(len(text)))], tokenizer.mask_id)
    assert Trace.record(steps, tokenizer).joined() == [(0, 2, "é"), (2, 3, "漢"), (5, 4, "👩")]


# ---- what steps say of their probabilities --------------------------------------------------------------------------


@pytest.mark.parametrize("options", WAYS, ids=lambda options: " ".join(map(str, options.values())) or "defaults")
def test_to_ask_for_rivals_changes_no_token(options):
    for prompts in ([[1, 2, 3]], [[1, 2, 3], [4]]):
        plain = [step.x for step in run(prompts=prompts, **options)[1]]
        told = list(run(prompts=prompts, rivals=3, **options)[1])
        assert len(told) == len(plain)
        assert all(torch.equal(step.x, x) for step, x in zip(told, plain, strict=True))


class Listener:
    """A mask predictor that notes the canvas of every question."""

    def __init__(self, model) -> None:
        self.predict, self.canvases = predictor_of(model), []
        self.config, self.device = self.predict.config, self.predict.device

    def __call__(self, ask):
        self.canvases.append(ask.x)
        return self.predict(ask)


@pytest.mark.parametrize("options", [way for way in WAYS if "cache" not in way], ids=str)
def test_a_step_has_the_mask_predictors_own_probability_of_what_was_proposed(options):
    model, prompts = tiny_model(), [[1, 2, 3], [4]]
    listener, checked = Listener(model), 0
    config = SampleConfig(**{"gen_len": 12, "steps": 12, "block_len": 12, **options})
    start = Canvas.continuation(prompts, 12, model.config)
    mask, given = start.valid[:, None, None, :], start.x != MASK
    for step in stream(listener, start, config, rivals=5):
        asked, canvas = ~step.probability.isnan(), listener.canvases[-1][:2, :15]  # without guidance's rows and shadows
        logits = model(canvas, mask)
        if config.cfg_scale:
            logits = logits + config.cfg_scale * (logits - model(canvas.masked_fill(given, MASK), mask))
        p = logits.softmax(-1)
        expected = p.gather(-1, step.proposed[..., None])[..., 0]
        assert torch.allclose(step.probability[asked], expected[asked], atol=1e-5)
        best = p[step.committed].topk(5)
        assert torch.allclose(step.rivals[1], best.values, atol=1e-5)
        assert torch.allclose(p[step.committed].gather(-1, step.rivals[0]), best.values, atol=1e-5)
        checked += len(best.values)
    assert checked


def test_banned_ids_change_the_score_and_not_the_probability_that_a_step_reports():
    (first, *_), (banned, *_) = run()[1], run(banned_ids=tuple(range(8)))[1]
    asked = ~first.probability.isnan()
    assert (banned.proposed[asked] >= 8).all() and (banned.score[asked] >= banned.probability[asked]).all()
    assert (banned.score[asked] > banned.probability[asked]).any()
    assert torch.equal(first.score, first.probability) or torch.allclose(first.score[asked], first.probability[asked])


def test_the_trace_has_the_rivals_of_its_own_row():
    steps = list(run(prompts=[[1, 2, 3], [4]], rivals=2, temperature=1.0, revise="random-remask")[1])
    for row in (0, 1):
        trace = Trace.record(iter(steps), letters(), row, start=2)
        places = {
            (s, p)
            for s, p in zip(
                trace.step[trace.kind == COMMITTED].tolist(),
                trace.position[trace.kind == COMMITTED].tolist(),
                strict=True,
            )
        }
        assert trace.rivals.keys() == places
        for (n, position), (ids, _) in trace.rivals.items():
            at = steps[n].committed.nonzero().tolist().index([row, position + 2])
            assert ids == steps[n].rivals[0][at].tolist()


# ---- the terminal ---------------------------------------------------------------------------------------------------


class Screen(io.StringIO):
    """A terminal of so many columns and lines."""

    def __init__(self, monkeypatch, width=40, height=12, live=True):
        super().__init__()
        self.live = live
        monkeypatch.setattr(terminal.shutil, "get_terminal_size", lambda: terminal.os.terminal_size((width, height)))
        monkeypatch.delenv("NO_COLOR", raising=False)
        monkeypatch.setenv("TERM", "xterm")

    def isatty(self):
        return self.live

    def frames(self):
        """Each picture, without what moves the cursor."""
        return re.split(r"(?:\x1b\[\d+F)?\x1b\[J", self.getvalue())[1:]


def plain(text):
    return re.sub(r"\x1b\[[\d;]*m", "", text)


def test_a_terminal_shows_new_sure_doubtful_and_revoked_tokens(monkeypatch):
    screen = Screen(monkeypatch)
    steps = by_hand([21, 11, 24], [[0], [1], [2]])
    steps[0] = steps[0]._replace(probability=steps[0].probability.masked_fill(steps[0].committed, 0.9))
    steps[1] = steps[1]._replace(probability=steps[1].probability.masked_fill(steps[1].committed, 0.5))
    steps[2] = steps[2]._replace(
        revised=torch.tensor([[True, False, False]]),
        x=torch.tensor([[0, 11, 24]]),
        proposed=torch.tensor([[0, 11, 24]]),
    )
    assert list(watch(iter(steps), wild_tokenizer(), screen)) == steps
    first, second, third, final = screen.frames()
    assert first == "\x1b[32m\x1b[1;7m the\x1b[0m\x1b[2m░░\x1b[0m\n"
    assert second == "\x1b[32m the\x1b[0m\x1b[33m\x1b[1;7m漢字\x1b[0m\x1b[2m░\x1b[0m\n"
    assert third == "\x1b[1;31m░\x1b[0m\x1b[33m漢字\x1b[0m\x1b[35m\x1b[1;7m]\x1b[0m\n"
    assert final.split("\n")[0] == "\x1b[1;31m░\x1b[0m\x1b[33m漢字\x1b[0m\x1b[35m]\x1b[0m"  # nothing is new any more


def test_a_legend_says_what_the_colours_mean_and_stays_where_it_is(monkeypatch):
    screen = Screen(monkeypatch, width=80)
    (step,) = by_hand([20] * 3, [[0, 1, 2]])  # words of 200 letters, and then nothing but holes
    list(watch([step, step._replace(x=torch.zeros_like(step.x), revised=step.x > 0)], wild_tokenizer(), screen))
    *live, final = [plain(frame).split("\n")[:-1] for frame in screen.frames()]
    assert [lines[-1] for lines in live] == ["how sure:  ≥ 80%  ≥ 40%  less  ░ to come  new  ░ taken back"] * 2
    assert [len(lines) for lines in live] == [9, 9] and final == ["░░░", "how sure:  ≥ 80%  ≥ 40%  less"]
    narrow = Screen(monkeypatch, width=20)
    list(watch([step], wild_tokenizer(), narrow))
    assert "how sure" not in narrow.getvalue()


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("a fox and a", ["a fox ", "and a"]),
        ("a fo\u2591\u2591\u2591\u2591and a", ["a fo\u2591\u2591", "\u2591\u2591and ", "a"]),  # holes fill a line
        ("a elephants", ["a elep", "hants"]),  # longer than a line
        ("漢字漢字 a", ["漢字漢", "字 a"]),
        ("a fox \n b", ["a fox ", " b"]),
        ("a foxy b", ["a foxy", "b"]),
    ],
)
def test_lines_are_broken_between_words(text, lines):
    assert layout([(("given", False), text)], 6, True) == lines


def test_no_color_is_honoured_and_a_dumb_terminal_gets_stages(monkeypatch):
    steps = by_hand([21, 24], [[0], [1]])
    screen = Screen(monkeypatch)
    monkeypatch.setenv("NO_COLOR", "1")
    list(watch(steps, wild_tokenizer(), screen))
    assert screen.frames() == [" the░\n", " the]\n", " the]\n"]
    screen = Screen(monkeypatch)
    monkeypatch.setenv("TERM", "dumb")
    list(watch(steps, wild_tokenizer(), screen))
    assert screen.getvalue() == "--- step 1, 50% written\n the░\n--- step 2, 100% written\n the]\n"


@pytest.mark.parametrize("live", [True, False], ids=["terminal", "pipe"])
def test_no_vocabulary_reaches_the_terminal_raw(monkeypatch, live):
    screen = Screen(monkeypatch, live=live)
    text = [*range(1, len(WILD)), *range(1, len(WILD))]
    list(watch(by_hand(text, [[i] for i in range(len(text))]), wild_tokenizer(), screen))
    shown = "".join(screen.frames()) if live else screen.getvalue()
    bad = {c for c in plain(shown) if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") and c != "\n"}
    bad |= {c for c in plain(shown) if unicodedata.bidirectional(c) in ("RLO", "LRI", "LRO", "RLE", "PDF")}
    assert not bad
    assert "<script>" in shown


def test_no_line_is_wider_than_the_terminal_and_no_picture_higher(monkeypatch):
    text = list(range(1, len(WILD)))
    for width, height in ((20, 6), (33, 40), (2, 3)):
        screen = Screen(monkeypatch, width, height)
        list(watch(by_hand(text, [[i] for i in [*text[:-1], 0]]), wild_tokenizer(), screen))
        for frame in screen.frames()[:-1]:
            lines = plain(frame).split("\n")[:-1]
            assert len(lines) <= max(1, height - 2)
            assert all(sum(map(columns, line)) < max(3, width) for line in lines)


def test_a_window_that_is_resized_is_drawn_to_its_new_width(monkeypatch):
    screen, sizes = Screen(monkeypatch), iter([(30, 9), (10, 9), (10, 9)])
    monkeypatch.setattr(terminal.shutil, "get_terminal_size", lambda: terminal.os.terminal_size(next(sizes)))
    list(watch(by_hand([20, 1], [[0], [1]])[:1] * 2, wild_tokenizer(), screen))
    wide, narrow, _ = (max(map(len, plain(frame).split("\n"))) for frame in screen.frames())
    assert (wide, narrow) == (29, 9)


@pytest.mark.parametrize(
    ("text", "width"), [("a", 1), ("漢", 2), ("e\u0301", 1), ("\u200d", 0), ("\xad", 1), ("한", 2)]
)
def test_characters_take_as_many_columns_as_terminals_give_them(text, width):
    assert sum(map(columns, text)) == width


def test_half_letters_are_drawn_once_they_are_whole():
    tokenizer = Tokenizer.bytes()
    text = tokenizer.encode("é")
    assert layout(pieces(text, [0.9, 0.8], [True, True], [False, False], tokenizer), 10, False) == ["é"]
