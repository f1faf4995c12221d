"""Diffusion against autoregression: that the two differ in nothing but what they are asked."""

import json
import sys
from pathlib import Path

import pytest
import torch
from oracles import tiny_model
from torch import Generator

from minillada.diffusion import model_bound, pretraining_loss
from minillada.errors import BadInput
from minillada.measure.twin import twin_log_likelihoods, twin_loss
from minillada.text.tasks import Example
from minillada.text.tokenizer import Tokenizer
from minillada.training.config import TrainConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import versus

TOKENIZER = Tokenizer.characters(["\n=abc"])
EXAMPLES = [Example("a=", "bc"), Example("ab=", "cab"), Example("c=", "a")]


def test_what_training_asks_of_the_twin_is_its_loss():
    model, x0 = tiny_model(), torch.randint(0, 13, (3, 9), generator=Generator().manual_seed(0))
    noised = versus.shift(x0, model.config.mask_id, Generator())
    assert torch.allclose(pretraining_loss(versus.Causal(model), x0, noised), twin_loss(model, x0))


def test_a_given_prompt_costs_the_twin_nothing():
    model = tiny_model()
    (pair,) = versus.pairs_of(EXAMPLES[1:2], TOKENIZER, given=True)
    x0, maskable = versus.stack([pair], 0)
    noised = versus.shift(x0, model.config.mask_id, Generator(), maskable)
    found = model_bound(versus.Causal(model), x0, noised).item()
    assert found == pytest.approx(-twin_log_likelihoods(model, [pair]).item(), rel=1e-5)


def test_both_learn_the_same_batches_and_all_of_an_example_but_what_is_given():
    config = TrainConfig(batch_size=4, length=16)
    text = lambda ids: TOKENIZER.decode(ids.tolist())
    for given, learned in ((True, {"bc\n", "cab\n", "a\n"}), (False, {"a=bc\n", "ab=cab\n", "c=a\n"})):
        rows = [versus.task_rows(versus.pairs_of(EXAMPLES, TOKENIZER, given), config) for _ in range(2)]
        for (x0, _), (same, _) in zip(*([next(r), next(r)] for r in rows), strict=True):
            assert torch.equal(x0, same)
        x0, maskable = next(rows[0])
        for row, chosen in zip(x0, maskable, strict=True):
            assert text(row[chosen]).rstrip("\n") + "\n" in learned
            assert not chosen[0]


def test_a_power_law_is_found():
    a, b = versus.power_law([(x, 3 * x**-0.5) for x in (1.0, 10.0, 100.0)])
    assert (a, b) == pytest.approx((3, -0.5))


def test_a_model_that_is_there_is_not_trained_again(tmp_path):
    model = {"n_layer": 1, "n_head": 1, "d_model": 8, "d_ff": 8}
    config = TrainConfig(model=model, length=16, batch_size=2, steps=2, precision="float32")
    rows = lambda: versus.task_rows(versus.pairs_of(EXAMPLES, TOKENIZER, False), config)
    first, record = versus.learned(tmp_path, "abc-twin", "twin", TOKENIZER, rows, config)
    again, same = versus.learned(tmp_path, "abc-twin", "twin", TOKENIZER, pytest.fail, config)
    assert record == same
    assert record["steps"] == 2
    assert torch.equal(first.head.weight, again.head.weight)
    with pytest.raises(BadInput, match=r"^out: expected .*abc-twin"):
        versus.learned(tmp_path, "abc-twin", "twin", TOKENIZER, rows, TrainConfig(model=model, length=16, steps=3))


def test_texts_are_compared_from_end_to_end(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    corpus = tmp_path / "abc.txt"
    corpus.write_text("abcabcabc\n" * 300)
    monkeypatch.setenv("MINILLADA_CACHE", str(tmp_path / "cache"))
    options = ["--minutes", "0.005", "--samples", "2", "--length", "32", "--preset", "nano", "--precision", "float32"]
    paths = ["--out", str(tmp_path / "out"), "--json", str(tmp_path / "versus.json"), "--corpus", str(corpus)]
    monkeypatch.setattr(sys, "argv", ["versus.py", "text", *options, *paths])
    versus.main()
    runs = json.loads((tmp_path / "versus.json").read_text())["text"]["runs"]
    assert set(runs) == {"diffusion", "twin, rates × 1", "twin, as many tokens"}
    assert runs["twin, as many tokens"]["steps"] == runs["diffusion"]["steps"]
    assert all(0 < found["bits"] < 6 for found in runs.values())
    assert (tmp_path / "versus_text.png").exists()
