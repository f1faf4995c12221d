"""Diffusion against autoregression: that the two differ in nothing but what they are asked."""

import itertools
import json
import sys
from pathlib import Path

import pytest
import torch
from oracles import tiny_model
from torch import Generator

from minillada.diffusion import model_bound, pretraining_loss
from minillada.errors import BadInput
from minillada.measure.likelihood import exact_bound
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


def test_training_begins_as_the_twin_and_goes_on_as_diffusion_above_the_least_level():
    model, x0 = tiny_model(), torch.randint(0, 13, (3, 8), generator=Generator().manual_seed(0))
    config = TrainConfig(twin=0.5, t_min=0.25, precision="float32")
    learning = versus.Learning(versus.WAYS["diffusion"], iter(()), model.config.mask_id, config)
    loss = lambda: next(learning.losses(model, (x0, None), Generator().manual_seed(1)))
    learning.progress = 0.4
    assert torch.allclose(loss(), twin_loss(model, x0))
    learning.progress = 0.6
    noised = versus.hide(x0, model.config.mask_id, Generator().manual_seed(1), None, 0.25)
    assert torch.equal(loss(), pretraining_loss(model, x0, noised)) and noised.masked.sum(1).min() > 2


def test_the_mean_over_all_orders_is_the_bound_and_an_order_without_choice_is_autoregression():
    model = tiny_model()
    x0, given = torch.tensor([[3, 1, 4, 1, 5]]), 2
    orders = [torch.tensor([order]).float() for order in itertools.permutations(range(3))]
    nats = torch.cat([versus.in_order(model, x0, given, lambda _, score=score: score) for score in orders])
    assert nats.mean().item() == pytest.approx(exact_bound(model, [3, 1], [4, 1, 5]), rel=1e-5)
    one = versus.in_order(model, x0, given, versus.by_blocks((1, 3), 1, Generator()))
    assert one.item() == nats[-1].item()  # the scores 2, 1, 0: from left to right


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


@pytest.fixture
def found(tmp_path, monkeypatch):
    """What an experiment writes to versus.json, after seconds of training."""
    pytest.importorskip("matplotlib")

    def run(what: str) -> dict:
        (corpus := tmp_path / "abc.txt").write_text("abcabcabc\n" * 300)
        monkeypatch.setenv("MINILLADA_CACHE", str(tmp_path / "cache"))
        options = [
            "--minutes",
            "0.005",
            "--samples",
            "2",
            "--length",
            "32",
            "--preset",
            "nano",
            "--precision",
            "float32",
        ]
        paths = ["--out", str(tmp_path / "out"), "--json", str(tmp_path / "versus.json"), "--corpus", str(corpus)]
        monkeypatch.setattr(sys, "argv", ["versus.py", what, *options, *paths])
        versus.main()
        assert (tmp_path / f"versus_{what}.png").exists()
        return json.loads((tmp_path / "versus.json").read_text())[what]

    return run


def test_texts_are_compared_from_end_to_end(found):
    runs = found("text")["runs"]
    assert set(runs) == {"diffusion", "twin, rates × 1", "twin, as many tokens"}
    assert runs["twin, as many tokens"]["steps"] == runs["diffusion"]["steps"]
    assert all(0 < run["bits"] < 6 for run in runs.values())


def test_the_gap_is_taken_apart_from_end_to_end(found):
    bits = found("gap")["bits"]
    assert set(bits) == {"twin", "diffusion, before", "diffusion"} and len(bits["diffusion"]) == 7
    assert all(0 < x < 6 for orders in bits.values() for windows in orders.values() for x in windows)
    bound, mixture = (bits["diffusion"][order] for order in ("random order: the bound", "mixture of random orders"))
    assert all(m <= b for m, b in zip(mixture, bound, strict=True))  # a mean of probabilities, and of their logarithms
