"""Tests of how tokens are spelled: vectors that are alike where spellings are, and BPE-dropout of single tokens."""

from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from random import Random

import pytest
import torch
import torch.nn.functional as F

from minillada.text.ids import batches
from minillada.text.tokenizer import Tokenizer
from minillada.training.config import TrainConfig, config_of
from minillada.training.making import make
from minillada.training.spelling import VARIANTS, Spellings, spelled

TEXT = "return returns returned; the reader returns the return of the other reader\n" * 30
BPE = Tokenizer.bpe([TEXT], 300)
QUICK = {"preset": "nano", "steps": 2, "batch_size": 4, "length": 32, "precision": "float32"}


def test_tokens_that_are_spelled_alike_have_like_vectors():
    vectors = spelled(BPE, 256, torch.Generator().manual_seed(0))
    assert vectors.shape == (BPE.vocab_size, 256)
    assert torch.allclose(vectors.std(1), torch.ones(len(vectors)), atol=1e-5)
    likeness = lambda a, b: F.cosine_similarity(vectors[BPE.encode(a)[0]], vectors[BPE.encode(b)[0]], dim=0).item()
    assert min(likeness(" return", " returns"), likeness("return", " return")) > 0.6
    assert likeness(" return", " the") < 0.35
    assert torch.equal(vectors, spelled(BPE, 256, torch.Generator().manual_seed(0)))


def test_vectors_of_single_characters_have_nothing_in_common():
    vectors = spelled(Tokenizer.bytes(), 512, torch.Generator().manual_seed(0))[4:]
    others = F.normalize(vectors) @ F.normalize(vectors).T - torch.eye(256)
    assert others.abs().max() < 0.3 and others.mean().abs() < 0.01


@pytest.mark.parametrize("tie_head", [False, True])
def test_a_new_model_begins_with_them_at_the_deviation_that_it_had(tie_head):
    model = {**TrainConfig(**QUICK).model, "tie_head": tie_head}
    made = make(TrainConfig(**QUICK, model=model))
    embedding = made.model.embed.weight.detach()
    assert embedding.std().item() == pytest.approx(embedding.shape[1] ** -0.5 if tie_head else 1.0, rel=0.05)
    vectors = F.normalize(embedding)
    (the,), (that,), (of,) = map(made.saves.encode, (" the", " that", " of"))
    assert vectors[the] @ vectors[that] > 0.2 + vectors[the] @ vectors[of]


def test_every_spelling_is_of_the_same_text():
    spellings = Spellings(BPE, 0.3, seed=0)
    for id in range(BPE.vocab_size):
        spellings.draw(id)
        assert {BPE.inner.decode(s, skip_special_tokens=False) for s in spellings.variants[id]} == {
            BPE.inner.decode([id], skip_special_tokens=False)
        }
    assert spellings.differs.any() and not spellings.differs[sorted(BPE.special_ids)].any()


def test_no_dropout_leaves_tokens_and_full_dropout_leaves_bytes():
    whole, apart = Spellings(BPE, 0.0, seed=0), Spellings(BPE, 1.0, seed=0)
    (id,) = BPE.encode(" return")
    for spellings in (whole, apart):
        spellings.draw(id)
    assert whole.variants[id] == [[id]] * VARIANTS
    assert apart.variants[id] == [[BPE.encode(c)[0] for c in " return"]] * VARIANTS


def test_a_token_of_one_merge_is_split_as_often_as_that_is_left_out():
    spellings = Spellings(Tokenizer.bpe(["ababab"], 261), 0.25, seed=0)
    rng = Random(0)
    split = sum(len(spellings.spell("ab", 0.25, rng)) == 2 for _ in range(4000)) / 4000
    assert split == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize("tokenizer", [Tokenizer.characters([TEXT]), Tokenizer.bytes()])
def test_tokens_that_no_merge_makes_stay(tokenizer):
    ids = torch.tensor([tokenizer.encode(TEXT)])
    (spelt,) = islice(Spellings(tokenizer, 0.5, seed=0).batches(lambda start: iter([ids]), 0), 1)
    assert torch.equal(spelt, ids)


def test_a_batch_is_the_same_text_cut_and_depends_on_its_number_alone():
    ids = make(TrainConfig(**QUICK)).text.train
    drawn = partial(batches, ids, 4, 32, 0)
    tokenizer = make(TrainConfig(**QUICK)).saves
    first = list(islice(Spellings(tokenizer, 0.2, seed=0).batches(drawn, 0), 6))
    later = list(islice(Spellings(tokenizer, 0.2, seed=0).batches(drawn, 3), 3))
    assert all(map(torch.equal, first[3:], later))
    for spelt, plain in zip(first, drawn(0), strict=False):
        assert spelt.shape == plain.shape and spelt.dtype == plain.dtype and not torch.equal(spelt, plain)
        for ours, theirs in zip(spelt.tolist(), plain.tolist(), strict=True):
            text = lambda row: "".join(tokenizer.inner.id_to_token(id) for id in row)
            assert text(theirs).startswith(text(ours))


def test_a_run_spells_its_windows_anew_and_no_held_out_text():
    varied, plain = (make(TrainConfig(**QUICK, bpe_dropout=share)).objective for share in (0.3, 0.0))
    assert not torch.equal(next(varied.batches(0)), next(plain.batches(0)))
    assert torch.equal(varied.held, plain.held)
    whole = [make(TrainConfig(**{**QUICK, "length": 256, "data": "tales", "rows": "documents"}, bpe_dropout=share))
             for share in (0.3, 0.0)]  # fmt: skip
    assert torch.equal(*(next(made.objective.batches(0)) for made in whole))


def test_dropout_is_for_new_models_and_not_for_older_runs():
    assert (TrainConfig().bpe_dropout, TrainConfig(start="somewhere").bpe_dropout) == (0.02, 0.0)
    older = asdict(replace(TrainConfig(**QUICK), bpe_dropout=0.5))
    del older["bpe_dropout"]
    assert config_of({"version": 2, "objective": "pretrain", **older}).bpe_dropout == 0.0
