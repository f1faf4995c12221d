import io
import json
import math
import re
import sys
from functools import partial
from itertools import chain, islice
from pathlib import Path

import pytest
import torch
from oracles import Oracle, tiny_model
from pseudo_terminal import chat, last_picture, with_terminals
from runs_compared import assert_an_interruption_changes_nothing
from talkers import write_talker

import minillada
import sample
import train_tiny
from minillada import BadInput, BadLuck, SFTConfig, Tokenizer, TrainConfig, train
from minillada.commands import cli
from minillada.diffusion import PROCESSES, Noised
from minillada.model import ModelConfig
from minillada.text.chat import ChatTemplate
from minillada.text.tasks import make_task, write_task
from minillada.training.sft import (
    PADDING,
    SFT,
    Items,
    dialogue,
    per_answer,
    read_items,
    records,
    row_loss,
    stack,
    teach,
    visits,
)

C = tiny_model().config  # vocabulary 16, mask 15, eos 14
EOS = C.eos_id
PAIRS = [([1, 2, 3], [4, EOS]), ([5], [6, 7, 8, 9, EOS]), ([2, 2], [3, EOS]), ([7, 1, 0, 3], [5, 5, 5, EOS])]
QUICK = {"steps": 6, "batch_size": 4, "eval_every": 3, "precision": "float32"}


@pytest.fixture(autouse=True)
def private_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("MINILLADA_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A run that has seen some additions, and files to go on with."""
    home = tmp_path_factory.mktemp("sft")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINILLADA_CACHE", str(home / "cache"))
        write_task(make_task("addition", 200), home / "task")
        (home / "pre.txt").write_text("Hi!\n" + (home / "task" / "train.txt").read_text())
        more = {"preset": "nano", "length": 32, "tokenizer": "characters", "data": str(home / "pre.txt")}
        list(train(TrainConfig(**QUICK, **more, out=str(home / "pre"))))
    return home


def config(home: Path, **changes) -> SFTConfig:
    given = {"start": str(home / "pre"), "data": str(home / "task" / "train.jsonl")}
    return SFTConfig(**{**QUICK, **given, **changes})


def lesson(**changes) -> SFT:
    """SFT as training has it, without any items."""
    return SFT(None, SFTConfig(start="somewhere", data="some.jsonl", precision="float32", **changes), C)


def noised(pairs=PAIRS, seed: int = 0, **changes):
    return lesson(**changes).noise(pairs, torch.Generator().manual_seed(seed))


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


# ---- the loss


@pytest.mark.parametrize("eos_padding", [True, False])
@pytest.mark.parametrize("process", PROCESSES)
def test_no_prompt_token_is_ever_masked(process, eos_padding):
    seen = torch.zeros(4, 8, dtype=torch.bool)
    for seed in range(100):
        x0, noise = noised(seed=seed, process=process, eos_padding=eos_padding)
        for row, (prompt, answer) in enumerate(PAIRS):
            assert noise.xt[row, : len(prompt)].tolist() == prompt
            assert not noise.masked[row, : len(prompt)].any()
            end = len(prompt) + len(answer)
            assert eos_padding or (not noise.masked[row, end:].any() and (x0[row, end:] == PADDING).all())
        assert torch.equal(noise.xt == C.mask_id, noise.masked)
        seen |= noise.masked
    assert all(seen[row, len(prompt) :].all() == eos_padding or len(prompt + answer) == 8
               for row, (prompt, answer) in enumerate(PAIRS))  # fmt: skip


def test_the_loss_is_each_tokens_over_its_own_answers_length_over_the_rows():
    model = tiny_model()
    x0, noise = noised()
    logits, total = model(noise.xt).log_softmax(-1), 0.0
    for row, (prompt, _) in enumerate(PAIRS):
        length = x0.shape[1] - len(prompt)  # what fills it up is part of the answer
        hidden = [i for i in range(x0.shape[1]) if noise.xt[row, i] == C.mask_id]
        for i in hidden:
            total += -logits[row, i, x0[row, i]].item() * (length / len(hidden)) / length / len(PAIRS)
    assert row_loss(model, x0, noise).item() == pytest.approx(total, rel=1e-5)


def test_permuting_or_duplicating_rows_leaves_the_loss_unchanged():
    model = tiny_model().double()
    x0, noise = noised()
    loss = lambda rows: row_loss(model, x0[rows], Noised(*(x[rows] for x in noise))).item()
    once = loss([0, 1, 2, 3])
    assert loss([2, 0, 3, 1]) == pytest.approx(once, rel=1e-6)
    assert loss([0, 1, 2, 3, 0, 1, 2, 3]) == pytest.approx(once, rel=1e-6)
    assert loss([0, 1, 2, 2]) != pytest.approx(once, rel=1e-6)


@pytest.mark.parametrize(("padding", "fill"), [(0, EOS), (1, EOS), (7, EOS), (7, PADDING)])
def test_padding_ends_of_text_change_the_loss_by_the_length_of_the_answer(padding, fill):
    """A model that is certain of every end of text, and knows nothing else: what it predicts free dilutes the rest."""

    def logits(tokens):
        found = torch.zeros(*tokens.shape, C.vocab_size)
        found[:, 4:, EOS] = 1e4  # prompt of two, answer of two
        return found

    model = Oracle(C, logits)
    pairs = [([1, 2], [3, 4, EOS]), ([1] * (3 + padding), [2, EOS])]
    x0, maskable = stack(pairs, fill)
    masked = maskable & (torch.arange(2) == 0)[:, None]  # the first row alone, all of it
    noise = per_answer(Noised(x0.masked_fill(masked, C.mask_id), masked, torch.ones(2)), maskable)
    length = 3 + (padding if fill == EOS else 0)
    assert row_loss(model, x0, noise).item() == pytest.approx(2 * math.log(16) / length / 2, rel=1e-5)


def test_without_eos_padding_a_row_does_not_notice_the_others():
    model = tiny_model().double()
    x0, noise = noised(eos_padding=False)
    together = row_loss(model, x0, noise).item()
    alone = 0.0
    for row, (prompt, answer) in enumerate(PAIRS):
        n = len(prompt) + len(answer)
        xt, masked, weight = (x[row : row + 1] for x in noise)
        part = Noised(xt[:, :n], masked[:, :n], weight * n / x0.shape[1])
        alone += row_loss(model, x0[row : row + 1, :n], part).item() / len(PAIRS)
    assert together == pytest.approx(alone, rel=1e-6)


# ---- which rows


def test_batch_n_is_a_function_of_the_seed_and_of_n_alone():
    whole = list(islice(visits(7, 3, 0), 40))
    for start in (0, 1, 6, 7, 8, 30):
        assert list(islice(visits(7, 3, start), 10)) == whole[start : start + 10]
    for epoch in range(5):
        assert sorted(i for i, _ in whole[7 * epoch : 7 * epoch + 7]) == list(range(7))
    assert list(islice(visits(7, 4, 0), 40)) != whole


def test_every_visit_takes_one_turn_of_a_dialogue_at_random():
    item = [([1], [2, EOS]), ([1, 2, EOS, 3], [4, EOS]), ([1, 2, EOS, 3, 4, EOS, 5], [6, EOS])]
    learner = lesson()
    learner.items = Items(None, None, 1.0, 1.0, "", [item] * 5, [item], 7)
    taken = [answer[0] for batch in islice(learner.batches(0), 94) for _, answer in batch][:3000]
    assert all(taken.count(answer) == pytest.approx(1000, abs=100) for answer in (2, 4, 6))


def test_an_answer_sees_everything_that_was_said_before_it(tmp_path):
    tokenizer = Tokenizer.characters(["abcdefg? "])
    taught, c = teach(tmp_path, tokenizer), ModelConfig(tokenizer.vocab_size, tokenizer.mask_id, tokenizer.eos_id)
    talk = [{"role": r, "content": t} for r, t in
            (("system", "g"), ("user", " a? "), ("assistant", "b"), ("user", "c?"), ("assistant", "de"))]  # fmt: skip
    path = write(tmp_path / "talk.jsonl", {"messages": talk}, {"prompt": "a?", "answer": "b"})
    (first, second), ((prompt, answer),) = read_items(path, taught, c).learned + read_items(path, taught, c).held
    read = lambda ids: tokenizer.decode(ids, skip_special=False)
    assert [read(first[0]), read(first[1])] == ["ga?", "b[EOS]"]
    assert [read(second[0]), read(second[1])] == ["ga?b[EOS]c?", "de[EOS]"]
    assert [read(prompt), read(answer)] == ["a?", "b[EOS]"]


def test_a_tokenizer_with_the_markers_of_a_chat_gets_its_template(tmp_path):
    directory = write_talker(tmp_path / "talker")
    tokenizer = Tokenizer.load(directory)
    template = ChatTemplate.load(directory, tokenizer)
    item = read_items(write(tmp_path / "a.jsonl", *[{"prompt": "Hi", "answer": "Yo"}] * 2),
                      teach(directory, tokenizer), minillada.load(directory)[0].config).held[0]  # fmt: skip
    assert item[0][0] == template.encode_chat([{"role": "user", "content": "Hi"}])
    assert item[0][1] == [*tokenizer.encode("Yo"), 254]


FAULTY = {  # lines -> what is said of the second
    '{"prompt": "12+34="}': 'expected a text "answer", got none',
    '{"answer": "46"}': 'expected a text "prompt", got none',
    '{"prompt": "12+34=", "answer": ""}': 'expected a text "answer", got an empty one',
    '{"prompt": "12+34=", "answer": " \\n"}': 'expected a text "answer", got an empty one',
    '{"prompt": "12+34=", "answer": 46}': 'expected a text "answer", got int',
    '{"prompt": "1", "answer": "1234567890123456789012345678901"}': "expected at most 32 tokens of prompt, answer and",
    '{"messages": []}': "expected an answer of the assistant, got none",
    '{"messages": [{"role": "user", "content": "1"}]}': "expected an answer of the assistant, got none",
    '{"messages": [{"role": "robot", "content": "1"}]}': 'expected "messages" with a role of system, user, assistant',
    '{"messages": [{"role": "assistant"}]}': 'expected a text "content", got none',
    '{"messages": "hello"}': 'expected "messages" with a role of',
    '{"prompt": "\\ud800", "answer": "1"}': "surrogate",
    '{"prompt": "x", "answer": "1"}': "U+0078",
    "[1, 2]": "expected an object, got list",
    "{": "expected JSON in UTF-8",
}


@pytest.mark.parametrize("line", FAULTY)
def test_a_faulty_line_is_named(home, tmp_path, line):
    data = write(tmp_path / "data.jsonl", {"prompt": "12+34=", "answer": "46"}, line)
    with pytest.raises(BadInput) as refused:
        next(train(config(home, data=str(data), out=str(tmp_path / "run"))))
    assert str(refused.value).startswith(f"{data}, line 2: ") and FAULTY[line] in str(refused.value)
    assert str(refused.value).count("data.jsonl") == 1 and not (tmp_path / "run").exists()


def test_files_that_cannot_be_used_get_one_line(home, tmp_path):
    with pytest.raises(BadLuck, match=r"^data: expected a JSONL file, got .*nowhere"):
        next(train(config(home, data=str(tmp_path / "nowhere"))))
    for lines, got in (([], 0), ([{"prompt": "1", "answer": "2"}], 1)):
        with pytest.raises(BadInput, match=rf"expected two lines or more, .*got {got}; "):
            next(train(config(home, data=str(write(tmp_path / "short.jsonl", *lines)))))
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "é"}'.encode("latin-1"))
    with pytest.raises(BadInput, match=r"latin.jsonl, line 1: expected JSON in UTF-8, got .*0xe9"):
        next(train(config(home, data=str(tmp_path / "latin.jsonl"))))


def test_empty_lines_and_a_byte_order_mark_are_passed_over(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "a", "answer": "b"}\r\n\r\n{"prompt": "c"}\n')
    (_, first), (where, _) = records(tmp_path / "a.jsonl")
    assert dialogue(first) == [([{"role": "user", "content": "a"}], "b")] and where.endswith("line 3")


# ---- training


@pytest.mark.parametrize("changes", [{}, {"eos_padding": False}, {"lora": 2}, {"accumulate": 2, "recompute": True}])
def test_an_interrupted_run_ends_with_the_weights_and_losses_of_an_uninterrupted_one(home, tmp_path, changes):
    assert_an_interruption_changes_nothing(partial(config, home, **changes), tmp_path, "loss")


def test_training_lowers_the_bound_of_held_out_answers(home):
    bounds = [step.bound for step in train(config(home, steps=30, eval_every=10, batch_size=16)) if step.bound]
    assert bounds[-1] < bounds[0]


@with_terminals
def test_in_a_terminal_it_answers_what_it_was_taught_and_stops(home, tmp_path):
    taught = {"1+1=": "2", "50+51=": "101", "7+4=": "11", "9+0=": "9"}
    data = write(tmp_path / "data.jsonl", *[{"prompt": q, "answer": a} for q, a in taught.items() for _ in range(5)])
    list(train(config(home, data=str(data), steps=150, eval_every=150, batch_size=8, out=str(tmp_path / "run"))))
    with chat("sample.py", tmp_path / "run", "--gen-len", "4", "--temperature", "0", "--device", "cpu") as say:
        for question, answer in taught.items():
            assert re.sub(r"\x1b\[[\d;]*m", "", last_picture(say(question))).split("you> ")[0].strip() == answer
            say("/reset")


def test_resuming_with_other_data_is_refused(home, tmp_path):
    data = write(tmp_path / "data.jsonl", *[{"prompt": f"{i}+1=", "answer": f"{i + 1}"} for i in range(10, 30)])
    list(train(config(home, data=str(data), out=str(tmp_path / "run"))))
    write(data, *[{"prompt": f"{i}+1=", "answer": f"{i}"} for i in range(10, 30)])
    with pytest.raises(BadInput, match=r"^data: expected the text this run began with"):
        next(train(resume=tmp_path / "run"))


def test_a_crash_goes_back_to_the_last_checkpoint(home, monkeypatch):
    for changes in ({}, {"lora": 2}):
        steps = train(config(home, **changes))
        kept = [next(steps) for _ in range(3)][-1]
        before = {name: p.clone() for name, p in kept.model.state_dict().items()}
        next(steps)
        for p in kept.model.parameters():
            if p.requires_grad:
                p.data.fill_(torch.nan)
        assert not math.isfinite(next(steps).loss)
        assert all(torch.equal(p, before[name]) for name, p in kept.model.state_dict().items())
        assert math.isfinite(next(steps).loss)


# ---- the script, and talking with what it made


def script(module, monkeypatch, *options, stdin: str = "") -> int:
    monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, options)])
    monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
    try:
        cli.run(module.main)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_a_run_that_was_taught_to_answer_remembers_it(home, tmp_path, monkeypatch, capsys):
    out = tmp_path / "taught"
    data = ["--sft", home / "task" / "train.jsonl", "--from", home / "pre", "--steps", 4, "--device", "cpu"]
    assert script(train_tiny, monkeypatch, *data, "--out", out) == 0
    printed = capsys.readouterr()
    assert f"sample.py {out} --chat" in printed.out and "nats/char" in printed.out and not printed.err
    model, tokenizer = minillada.load(out)
    assert tokenizer.decode(tokenizer.encode("12+34=")) == "12+34="
    (newest,) = sorted((out / "checkpoints").iterdir())[-1:]
    template = ChatTemplate.load(newest)
    assert template.encode_chat([{"role": "user", "content": "12+34="}]) == tokenizer.encode("12+34=")
    assert model.config.eos_id in template.stop_ids
    asked = ["--device", "cpu", "--gen-len", 4, "--temperature", 0]
    assert script(sample, monkeypatch, out, "--prompt", "12+34=", "--quiet", *asked) == 0
    answer = capsys.readouterr().out.rstrip("\n")
    assert "12+34=" not in answer  # an answer alone, not the text with it
    assert script(sample, monkeypatch, out, "--chat", *asked, stdin="12+34=\n/quit\n") == 0
    assert capsys.readouterr().out.rstrip("\n") == answer


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sft", "a.jsonl"], "from: expected a run or model directory"),
        (["--sft", "a.jsonl", "--prefer", "b.jsonl", "--from", "."], "prefer: expected none with --sft"),
        (["--sft", "a.jsonl", "--from", ".", "--preset", "nano"], "preset: expected none with --sft"),
        (["--sft", "a.jsonl", "--from", ".", "--length", "3"], "length: expected none with --sft"),
        (["--from", "somewhere"], "from: expected none with pre-training"),
        (["--lora", "3"], "lora: expected none with pre-training"),
        (["--sft", "a.jsonl", "--from", ".", "--beta", "3"], "beta: expected none with --sft"),
        (["--sft", "a.jsonl", "--from", ".", "--lora", "-1"], "lora: expected a whole number"),
        (["--sft", "a.jsonl", "--from", ".", "--lora", "3", "--shard"], "shard: expected False"),
        (["--sft", "a.jsonl", "--from", "nowhere/at/all/there"], "expected"),
    ],
)
def test_options_that_do_not_go_together_get_one_line(options, message, tmp_path, monkeypatch, capsys):
    assert script(train_tiny, monkeypatch, *options, "--out", tmp_path / "run") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line and "; " in line
    assert not (tmp_path / "run").exists()


def test_a_model_without_tokenizer_cannot_be_taught(home, tmp_path):
    minillada.save(minillada.load(home / "pre")[0], tmp_path / "bare")
    with pytest.raises(BadInput, match=r"^from .*bare: expected a tokenizer.json, got none"):
        next(train(config(home, start=str(tmp_path / "bare"))))


def test_the_parts_of_a_batch_add_up_to_its_loss_and_each_row_is_in_one():
    model, x0_and_noise = tiny_model(), noised(seed=3)
    whole = row_loss(model, *x0_and_noise).item()
    for accumulate in (1, 2, 4):
        learner = lesson(accumulate=accumulate)
        parts = [part.item() for part in learner.losses(model, PAIRS, torch.Generator().manual_seed(3))]
        assert len(parts) == accumulate and sum(parts) == pytest.approx(whole, rel=1e-6)


def test_visits_of_every_batch_are_the_rows_of_the_file(home):
    (step, *_) = train(config(home, steps=1))
    made = SFT(step.text, step.config, step.model.config)
    rows = {(tuple(p), tuple(a)) for p, a in chain.from_iterable(islice(made.batches(0), 60))}
    assert rows == {(tuple(p), tuple(a)) for item in step.text.learned for p, a in item}
