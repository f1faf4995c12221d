"""benchmarks/few_steps.py: its figure of merit by hand, and how it counts evaluations."""

import math
import sys
from pathlib import Path

import pytest
import torch
from oracles import Oracle

from minillada import ModelConfig
from minillada.text.tokenizer import Tokenizer

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import few_steps


def test_aup_is_the_area_under_accuracy_against_parallelism_where_what_is_lost_weighs_more():
    aup = few_steps.aup
    assert aup([(1, 80)], best=80) == 80
    assert aup([(1, 80), (4, 80)], best=80) == aup([(4, 80)], best=80) == 320  # nothing is lost
    low = 76 * math.exp(-3 * (1 - 76 / 80))
    assert aup([(3, 76), (1, 80)], best=80) == pytest.approx(80 + 2 * (80 + low) / 2)
    assert aup([(1, 80), (2, 79), (9, 74)], best=80) == aup([(1, 80), (2, 79)], best=80)  # more than 5 are lost
    assert aup([(1, 80), (2, 70), (3, 76)], best=80) == aup([(1, 80), (3, 76)], best=80)  # 70 is of no use


def test_the_evaluations_of_an_answer_are_those_that_wrote_a_token_of_it(monkeypatch):
    """Of a model that is sure of every place, unless the question is a 2."""
    tokenizer = Tokenizer.characters(["\n.=1234"])
    ids = {"mask_id": tokenizer.mask_id, "eos_id": tokenizer.eos_id, "pad_id": tokenizer.pad_id}
    config = ModelConfig(vocab_size=tokenizer.vocab_size, **ids)
    three, two = tokenizer.encode("32")

    def logits(tokens):
        found = torch.zeros(*tokens.shape, config.vocab_size)
        found[..., three] = torch.where((tokens == two).any(1, keepdim=True), 0.1, 30.0)
        return found

    monkeypatch.setattr(few_steps, "load", lambda where: (Oracle(config, logits), tokenizer))
    texts, evaluations = few_steps.write("run", ["1", "2"], commit="threshold:0.9")
    assert evaluations == (1 + 17) / 2 and texts == ["3" * 17] * 2
    assert few_steps.write("run", ["2"], steps=4)[1] == 4
