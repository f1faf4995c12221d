"""Measurements of models whose answers are known."""

import json
import math
import sys

import pytest
import torch
from oracles import Oracle, tiny_model

import minillada
from minillada.commands.evaluate import main
from minillada.errors import BadInput
from minillada.measure import evaluate
from minillada.measure.evaluate import (
    encode_pair,
    mean_of,
    measure_choices,
    measure_infilling,
    measure_task,
    measure_text,
    read_choices,
)
from minillada.measure.likelihood import confidence_scores, log_likelihoods, perplexity
from minillada.model import ModelConfig
from minillada.sampler import SampleConfig
from minillada.text.tasks import Example, Task, exact, make_task
from minillada.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer.characters(["".join(map(chr, range(32, 127))) + "\n"])
CONFIG = ModelConfig(vocab_size=TOKENIZER.vocab_size, mask_id=TOKENIZER.mask_id, eos_id=TOKENIZER.eos_id, max_len=64)


def knows(*lines: str) -> Oracle:
    """A model that completes any of these lines, wherever it stands, and after its end says nothing but line ends."""

    def logits(tokens):
        out = torch.zeros(*tokens.shape, CONFIG.vocab_size)
        end = TOKENIZER.encode("\n")[0]
        out[..., end] = 1.0
        for row, tokens_of_row in enumerate(tokens):
            for line in lines:
                ids = torch.tensor(TOKENIZER.encode(line))
                for at in range(len(tokens_of_row) - len(ids) + 1):
                    here = tokens_of_row[at : at + len(ids)]
                    seen = here != CONFIG.mask_id
                    if seen.any() and torch.equal(here[seen], ids[seen]) and 2 * seen.sum() >= len(ids):
                        out[row, torch.arange(at, at + len(ids)), ids] = 20.0
        return out

    return Oracle(CONFIG, logits)


def test_a_mean_comes_with_its_standard_error():
    found = mean_of([0.0, 1.0, 1.0, 0.0])
    assert found == {"accuracy": 0.5, "standard_error": pytest.approx((1 / 3) ** 0.5 / 2), "n": 4}
    assert mean_of([1.0])["standard_error"] == 0


def test_a_text_costs_what_its_perplexity_says():
    model, text = (
        tiny_model(vocab_size=CONFIG.vocab_size, mask_id=CONFIG.mask_id, pad_id=1, max_len=16),
        "so it is " * 9,
    )
    found = measure_text(model, TOKENIZER, text, stride=4, n_samples=2)
    ours = perplexity(model, text, TOKENIZER, stride=4, n_samples=2)
    assert (found["nats"], found["standard_error"], found["tokens"]) == (ours.nats, ours.standard_error, 81)
    assert (found["window"], found["stride"]) == (16, 4)
    assert found["bits_per_character"] == pytest.approx(found["nats"] / math.log(2) / 81)
    one = measure_text(model, TOKENIZER, text, n_samples=1)
    assert one["standard_error"] is None
    json.dumps([found, one], allow_nan=False)


def test_who_knows_the_text_fills_all_its_gaps_and_who_does_not_fills_few():
    line = "the quick brown fox jumps over a"
    tokens, config = TOKENIZER.encode(line), SampleConfig(32, 32, 32, ban_eos=True, stop_at_eos=False)
    known = measure_infilling(knows(line), tokens, config, 32, n=3, hide=0.25)
    assert (known["accuracy"], known["hidden"], known["evaluations"], known["n"]) == (1.0, 8, 8, 3)
    assert measure_infilling(knows("nothing of this"), tokens, config, 32, n=3, hide=0.25)["accuracy"] < 0.3


def test_hidden_tokens_are_counted_one_by_one():
    tokens = TOKENIZER.encode("ab" * 8)
    always_a = Oracle(
        CONFIG, lambda tokens_: torch.nn.functional.one_hot(tokens_ * 0 + tokens[0], CONFIG.vocab_size).float()
    )
    config = SampleConfig(16, 16, 16, ban_eos=True, stop_at_eos=False)
    assert measure_infilling(always_a, tokens, config, 16, n=1, hide=1.0)["accuracy"] == 0.5


def test_options_are_scored_by_bound_or_confidence_and_the_likeliest_is_chosen():
    items = [
        {"prompt": "2+2", "options": ["=5", "=4", "=3"], "answer": 1},
        {"prompt": "1+1", "options": ["=2", "=3"], "answer": 1},
        {"prompt": "1+2", "options": ["=3", "=9999"], "answer": 0},
    ]
    model = knows("2+2=4", "1+1=2", "1+2=3")
    for scoring in ("bound", "confidence"):
        found = measure_choices(model, TOKENIZER, items, scoring=scoring, n_samples=4, batch_size=3)
        assert found["accuracy"] == pytest.approx(2 / 3)
        assert found["accuracy_per_character"] == pytest.approx(2 / 3)
    with pytest.raises(BadInput, match=r"^scoring: expected one of bound, confidence"):
        measure_choices(model, TOKENIZER, items, scoring="best", batch_size=3)


def test_the_scores_of_options_are_those_of_the_library():
    model = tiny_model(vocab_size=CONFIG.vocab_size, mask_id=CONFIG.mask_id, pad_id=1)
    pairs = [encode_pair(TOKENIZER, "so", " it is"), encode_pair(TOKENIZER, "so ", "be it")]
    bounds = evaluate.score_options(model, pairs, "bound", 4, seed=3, batch_size=2)
    assert bounds == log_likelihoods(model, pairs, 4, 3)[0].tolist()
    assert evaluate.score_options(model, pairs, "confidence", 4, seed=3, batch_size=2) == pytest.approx(
        confidence_scores(model, pairs)[0].tolist()
    )


def test_two_texts_are_encoded_as_one_where_they_meet():
    tokenizer = Tokenizer.bpe(["an apple an apple an apple"] * 20, 300)
    before, after = encode_pair(tokenizer, "an ", "apple")
    assert [*before, *after] == tokenizer.encode("an apple")
    assert tokenizer.decode(before) == "an"
    assert encode_pair(tokenizer, "", "an apple") == ([], tokenizer.encode("an apple"))


def test_answers_are_counted_by_kind_and_gaps_are_filled_in_place():
    test = [
        Example("Ada is", " tall.", kind="as told"),
        Example("Ben is", " small.", kind="as told"),
        Example("Eve is", " old.", kind="as told"),
        Example("", "Ada", " is tall.", "filling"),
    ]
    model = knows("Ada is tall.", "Ben is tall.", "Eve is old.")
    config = SampleConfig(gen_len=8, steps=8, block_len=8)
    found, records = measure_task(model, TOKENIZER, Task("toy", [], test, exact), config, batch_size=2)
    assert found["accuracy"] == 0.75 and found["n"] == 4
    assert found["kinds"]["as told"]["accuracy"] == pytest.approx(2 / 3)
    assert found["kinds"]["filling"]["accuracy"] == 1.0
    assert [record["score"] for record in records] == [1.0, 0.0, 1.0, 1.0]
    assert records[1]["written"].startswith(" tall.") and records[3]["written"] == "Ada"


def test_a_prompt_begins_a_line_as_in_the_text_learned_from():
    seen = []

    def logits(tokens):
        seen.append(TOKENIZER.decode(tokens[0].tolist()))
        return torch.zeros(*tokens.shape, CONFIG.vocab_size)

    task = make_task("addition", 0, n_test=1)
    measure_task(Oracle(CONFIG, logits), TOKENIZER, task, SampleConfig(gen_len=4, steps=4, block_len=4))
    assert seen[0] == f"\n{task.test[0].prompt}"


# ---- the command


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    ids = {"mask_id": TOKENIZER.mask_id, "eos_id": TOKENIZER.eos_id, "pad_id": TOKENIZER.pad_id}
    path = tmp_path_factory.mktemp("model") / "model"
    minillada.save(tiny_model(vocab_size=TOKENIZER.vocab_size, max_len=64, **ids), path, TOKENIZER)
    return path


@pytest.fixture
def command(directory, monkeypatch, capsys):
    def run(*args):
        monkeypatch.setattr(sys, "argv", ["evaluate", str(directory), "--device", "cpu", *map(str, args)])
        main()
        return json.loads(capsys.readouterr().out)

    return run


def test_the_command_measures_a_text_or_its_held_out_tenth(command, directory, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("0123456789" * 20)
    model, _ = minillada.load(directory)
    assert (
        command("--file", path, "--samples", 2)["nats"]
        == perplexity(model, "0123456789" * 20, TOKENIZER, n_samples=2).nats
    )
    assert command("--file", path, "--held-out", "--samples", 1)["characters"] == 20
    assert command("--file", path, "--limit", 7, "--samples", 1)["characters"] == 7


def test_the_command_fills_gaps_and_asks_questions(command, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("so it is " * 40)
    found = command("--infill", path, "--n", 5, "--hide", 0.5, "--window", 20)
    assert (found["n"], found["hidden"], found["length"]) == (5, 10, 20) and 0 <= found["accuracy"] <= 1
    questions = tmp_path / "questions.jsonl"
    questions.write_text(json.dumps({"prompt": "a", "options": ["b", "cd"], "answer": 0}) + "\n")
    assert command("--choices", questions, "--scoring", "confidence")["n"] == 1


def test_the_command_asks_a_task_with_any_sampler_and_keeps_the_answers(command, tmp_path):
    out = tmp_path / "result.json"
    found = command("--task", "facts:12", "--n", 9, "--remasking", "margin", "--steps", 2, "--gen-len", 8, "--out", out)
    assert found["n"] == 9 and set(found["kinds"]) <= {"as told", "reversed", "reversed by filling", "told both ways"}
    assert found["sampler"]["remasking"] == "margin" and found["sampler"]["gen_len"] == 8 and "answers" not in found
    kept = json.loads(out.read_text())
    assert len(kept["answers"]) == 9 and kept["accuracy"] == found["accuracy"]
    assert {"prompt", "answer", "written", "score"} <= set(kept["answers"][0])
    with pytest.raises(BadInput, match=r"^out: expected a new file"):
        command("--task", "reverse", "--out", out)


@pytest.mark.parametrize(
    ("args", "what"),
    [
        (("--task", "nothing"), "task"),
        (("--task", "reverse", "--n", "0"), "n"),
        (("--task", "sums:32"), "gen_len"),
        (("--file", "tales", "--limit", "50", "--window", "99"), "window"),
        (("--file", "docs", "--limit", "0"), "limit"),
        (("--infill", "docs", "--gen-len", "8"), "infill"),
        (("--infill", "docs", "--limit", "500", "--hide", "0"), "hide"),
        (("--choices", "x.jsonl", "--scoring", "best"), "scoring"),
        (("--file", "docs", "--task", "reverse"), "options"),
        ((), "options"),
    ],
)
def test_a_measurement_that_cannot_be_made_is_refused(command, args, what):
    with pytest.raises(BadInput, match=f"^{what}.*: expected|^prompt"):
        command(*args)


@pytest.mark.parametrize(
    "line",
    [
        "[]",
        "{",
        '{"prompt": "a", "options": ["b"], "answer": 0}',
        '{"prompt": "a", "options": ["b", ""], "answer": 0}',
        '{"prompt": "a", "options": ["b", "c"], "answer": 2}',
        '{"prompt": "a", "options": ["b", "c"], "answer": true}',
        '{"options": ["b", "c"], "answer": 0}',
        "",
    ],
)
def test_a_question_without_its_parts_is_refused_by_its_line(line, tmp_path):
    path = tmp_path / "questions.jsonl"
    path.write_text("\n" + line)
    with pytest.raises(BadInput, match=r"questions\.jsonl(, line 2.*|): expected"):
        read_choices(path)
