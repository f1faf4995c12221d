"""What was tried on the way to the default recipe can be tried again."""

import math
import sys
from pathlib import Path

import pytest
import torch
from torch import Generator

from minillada.train import learn
from minillada.training.config import TrainConfig
from minillada.training.making import make

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import recipes

QUICK = {"preset": "nano", "steps": 4, "batch_size": 4, "length": 16, "precision": "float32", "twin": 0.5}
QUICK |= {"data": "tales", "rows": "windows", "tokenizer": "characters"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINILLADA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield make(TrainConfig(**QUICK))


OBJECTIVES = {name: changes["objective"] for name, changes in recipes.SEARCH.items() if "objective" in changes}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_that_was_tried_has_a_loss_from_beginning_to_end(made, name):
    c = made.model.config
    objective = OBJECTIVES[name](made.text, made.config, c.mask_id, vocab_size=c.vocab_size)
    for progress, batch in zip((0.1, 0.9), objective.batches(0), strict=False):
        objective.progress = progress
        loss = sum(objective.losses(made.model, batch, Generator().manual_seed(0)))
        assert 0 < loss.item() < 2 * math.log(c.vocab_size)


def test_complementary_masks_hide_every_token_once(made):
    objective = recipes.Complementary(made.text, made.config, made.model.config.mask_id)
    x0, noised = objective.noise(next(objective.batches(0)), Generator().manual_seed(0))
    assert torch.equal(x0[:2], x0[2:]) and (noised.masked[:2] ^ noised.masked[2:]).all()


@pytest.mark.parametrize("begin", [changes["begin"] for changes in recipes.SEARCH.values() if "begin" in changes])
def test_what_begins_otherwise_learns(made, begin):
    made = make(made.config)
    begin(made)
    before = made.objective.validate(made.model)["bound"]
    *_, _ = learn(made.model, made.optimizers, made.objective, made.config, made.rng)
    assert made.objective.validate(made.model)["bound"] < before < 2 * math.log(made.model.config.vocab_size)


def test_the_table_has_the_mean_over_seeds():
    rows = [{"name": "the default", "trained": "2 steps", "seed": seed, "steps": 2, "bound": bound,
             "on_training_text": 1.0} for seed, bound in ((0, 1.0), (1, 2.0))]  # fmt: skip
    assert [*recipes.table(rows)][2] == "| the default | 2 steps | 2 | 2 | 1.500 (1.000, 2.000) | 1.000 |"
