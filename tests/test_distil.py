"""Few-step distillation: paths, their states, and what is learned from them."""

import itertools
import json
from functools import partial

import pytest
import torch
from oracles import Oracle, tiny_model
from runs_compared import assert_an_interruption_changes_nothing

from minillada import BadInput, DistilConfig, ModelConfig, SFTConfig, generate, save, train
from minillada.diffusion import Noised
from minillada.sampler import SampleConfig
from minillada.text.tasks import make_task, write_task
from minillada.text.tokenizer import Tokenizer
from minillada.training.distil import (
    Distil,
    Path,
    certainty_loss,
    consistency_loss,
    follow,
    jump_loss,
    predict,
    state,
    walk,
)
from minillada.training.sft import PADDING, Items

MASK = 15
PROMPTS = [[1, 2, 3], [4]]
QUICK = {"steps": 6, "batch_size": 4, "eval_every": 3, "precision": "float32"}
CONFIG = DistilConfig(start="somewhere", data="some.jsonl", precision="float32")


@pytest.fixture(autouse=True)
def private_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("MINILLADA_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def lesson(teacher, config=CONFIG, average=None) -> Distil:
    items = [[(prompt, [9, 9, 9, 14])] for prompt in PROMPTS]
    return Distil(Items(None, None, 1.0, 1.0, "", items, items, 7), config, teacher.config, teacher, average)


def certain_model() -> Oracle:
    """A model that is as good as sure of a token for each place, whatever stands elsewhere."""
    right = torch.arange(64) % 13

    def logits(tokens):
        return 60.0 * torch.nn.functional.one_hot(right[: tokens.shape[1]].expand_as(tokens), 16)

    return Oracle(ModelConfig(vocab_size=16, mask_id=MASK, eos_id=14, pad_id=13), logits)


# ---- paths and their states -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [0, 2])
def test_a_path_ends_in_what_the_model_writes_greedily_and_every_token_has_a_step_of_its_own(block):
    model = tiny_model(block=block)
    path = walk(model, PROMPTS, 4)
    how = SampleConfig(gen_len=4, steps=4, block_len=4, stop_at_eos=False)
    for row, written, prompt, answer in zip(*path, PROMPTS, generate(model, PROMPTS, how), strict=True):
        ids = [id for id in row.tolist() if id != PADDING]
        assert ids[: len(prompt) + 4] == prompt + answer
        steps = written[written >= 0].tolist()
        assert len(set(steps)) == len(steps) == len(ids) - len(prompt)
        assert (row[written < 0] == torch.tensor([PADDING] * (len(row) - len(ids)) + prompt)).all()


def test_the_holes_and_weights_of_a_state_by_hand():
    path = Path(torch.tensor([[7, 1, 2, 3], [8, 4, 5, 6]]), torch.tensor([[-1, 1, 0, 2], [-1, 0, 1, 2]]))
    found = state(path, torch.tensor([0.5, 1.0]), MASK)
    assert found.xt.tolist() == [[7, MASK, 2, MASK], [8, MASK, MASK, MASK]]
    assert found.masked.tolist() == [[False, True, False, True], [False, True, True, True]]
    assert torch.equal(found.weight, torch.tensor([4 / 2, 4 / 3]))
    assert state(path, torch.tensor([1e-6, 0.34]), MASK).masked.sum(1).tolist() == [1, 2]


def test_the_jump_loss_is_the_mean_over_holes_of_a_row_then_over_rows():
    model, path = tiny_model(), walk(tiny_model(1), PROMPTS, 4)
    now = state(path, torch.tensor([0.5, 1.0]), MASK)
    rows = []
    for number, prompt in enumerate(PROMPTS):  # each alone, without padding
        valid = path.x[number] != PADDING
        log_p = model(now.xt[number][valid][None])[0].log_softmax(-1)
        holes = now.masked[number][valid]
        rows.append(-log_p[holes].gather(1, path.x[number][valid][holes][:, None]).mean())
        assert holes.sum() == (2, 4)[number] and len(prompt) + 4 == valid.sum()
    found = jump_loss(predict(model, path.x, now), path.x, now)
    assert torch.allclose(found, torch.stack(rows).mean(), atol=1e-5)


def test_a_teacher_that_is_certain_has_nothing_to_teach_itself():
    model = certain_model()
    path = walk(model, PROMPTS, 4)
    for t in (0.01, 0.5, 1.0):
        now = state(path, torch.full((2,), t), MASK)
        logits = predict(model, path.x, now)
        assert jump_loss(logits, path.x, now) < 1e-9 and certainty_loss(logits, path.x, now) < 1e-9
        assert consistency_loss(logits, logits, now) == 0


def test_later_marginals_of_a_consistent_model_average_to_the_earlier_ones():
    joint = torch.rand(3, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    joint /= joint.sum()

    def logits(tokens):
        out = torch.full((*tokens.shape, 4), -torch.inf, dtype=torch.float64)
        for b, row in enumerate(tokens.tolist()):
            fits = joint.clone()
            for place, token in enumerate(row):
                if token < 3:
                    keep = torch.zeros(3, dtype=torch.float64)
                    keep[token] = 1
                    fits = fits * keep.view([3 if i == place else 1 for i in range(3)])
            for place in range(3):
                out[b, place, :3] = (fits.sum([i for i in range(3) if i != place]) / fits.sum()).log()
        return out

    model = Oracle(ModelConfig(vocab_size=4, mask_id=3), logits)
    p = lambda row: model(torch.tensor([row]))[0].softmax(-1)[:, :3]
    now = p([3, 3, 3])
    for place, other in itertools.permutations(range(3), 2):
        average = torch.zeros(3, dtype=torch.float64)
        for token in range(3):
            row = [3, 3, 3]
            row[place] = token
            average += now[place, token] * p(row)[other]
        assert torch.allclose(average, now[other], atol=1e-12)  # so cross-entropy with it has its minimum where it is


# ---- the terms that are options -------------------------------------------------------------------------------------


def test_certainty_counts_the_holes_that_are_right_and_has_no_gradient_on_the_others():
    logits = torch.randn(4, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    best = logits.argmax(-1)
    x = torch.tensor([[3, 0, 0], [4, 0, 0]])
    masked = x == 0
    x[masked] = torch.stack([best[0], (best[1] + 1) % 16, best[2], best[3]])  # the second is wrong
    noised = Noised(x.masked_fill(masked, MASK), masked, torch.tensor([3 / 2, 3 / 2]))
    loss = certainty_loss(logits, x, noised)
    loss.backward()
    entropy = torch.distributions.Categorical(logits=logits.detach() / 0.5).entropy()
    assert torch.allclose(loss, (entropy[0] / 2 + (entropy[2] + entropy[3]) / 2) / 2)
    assert (logits.grad[1] == 0).all() and all((logits.grad[i] != 0).any() for i in (0, 2, 3))


def test_consistency_is_the_divergence_from_the_other_model_and_teaches_ours_alone():
    ours, theirs = (torch.randn(3, 16, generator=torch.Generator().manual_seed(i)).requires_grad_() for i in (0, 1))
    masked = torch.tensor([[True, True, False], [True, False, False]])
    noised = Noised(masked.long(), masked, torch.tensor([3 / 2, 3.0]))
    each = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=theirs), torch.distributions.Categorical(logits=ours)
    )
    assert torch.allclose(consistency_loss(ours, theirs, noised), ((each[0] + each[1]) / 2 + each[2]) / 2, atol=1e-6)


def test_the_average_follows_the_model():
    average, model = tiny_model(0), tiny_model(1)
    before, there = average.head.weight.clone(), model.head.weight.clone()
    follow(average, model, 0.75)
    assert torch.allclose(average.head.weight, 0.75 * before + 0.25 * there) and torch.equal(model.head.weight, there)


def test_the_parts_of_a_batch_sum_to_its_loss_and_tell_the_agreement():
    teacher, student = tiny_model(), tiny_model(1)
    rng = lambda: torch.Generator().manual_seed(0)
    whole = list(lesson(teacher).losses(student, [0, 1], rng()))
    split = DistilConfig(start="s", data="d", precision="float32", accumulate=2)
    parts = list(lesson(teacher, split).losses(student, [0, 1], rng()))
    assert len(whole) == 1 and len(parts) == 2 and torch.allclose(whole[0], sum(parts), atol=1e-5)
    objective = lesson(teacher)
    list(objective.losses(teacher, [0], rng()))
    assert 0 <= objective.numbers["agreement"] <= 1
    more = DistilConfig(start="s", data="d", precision="float32", certainty=2.0, consistency=1.0)
    (loss,) = lesson(teacher, more, tiny_model(2)).losses(student, [0, 1], rng())
    assert loss > whole[0]


def test_a_prompt_has_the_same_path_whoever_is_asked_for_first():
    """Each group is answered once, whole; its shorter prompts have padding in front, and so have shorter groups."""
    items = [[([i % 13, i % 7] if i < 100 else [i % 13], [1, 14])] for i in range(150)]
    one, other = (
        Distil(Items(None, None, 1.0, 1.0, "", items, items, 4), CONFIG, m.config, m) for m in [tiny_model()] * 2
    )
    other.path([149])
    whole, turned = one.path(list(range(150))), other.path(list(range(149, -1, -1)))
    assert torch.equal(whole.x, turned.x.flip(0)) and torch.equal(whole.written, turned.written.flip(0))
    assert whole.x[5, :2].tolist() == [5, 5] and whole.x[149, :2].tolist() == [PADDING, 149 % 13]
    assert sorted(one.groups) == [0, 1, 2]


# ---- runs -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A directory with a model of boards and its questions."""
    directory = tmp_path_factory.mktemp("distil")
    tokenizer = Tokenizer.characters(["\n.=123456789"])
    ids = {"mask_id": tokenizer.mask_id, "eos_id": tokenizer.eos_id, "pad_id": tokenizer.pad_id}
    save(tiny_model(**ids, vocab_size=tokenizer.vocab_size, max_len=40), directory / "new", tokenizer)
    write_task(make_task("open4", 30, 0, 10), directory / "data")
    where = {"data": str(directory / "data/train.jsonl"), "start": str(directory / "new")}
    list(train(SFTConfig(**where, steps=1, batch_size=4, precision="float32", out=str(directory / "start"))))
    return directory


def config(home, **changes) -> DistilConfig:
    where = {"data": str(home / "data/train.jsonl"), "start": str(home / "start")}
    return DistilConfig(**{**QUICK, **where, **changes})


@pytest.mark.parametrize("changes", [{}, {"consistency": 1.0, "ema": 0.5}, {"lora": 2}])
def test_an_interruption_changes_nothing(home, tmp_path, changes):
    made = partial(config, home, **changes)
    assert_an_interruption_changes_nothing(made, tmp_path, "loss", "agreement")


def test_a_student_learns_to_jump(home):
    steps = list(train(config(home, steps=20, batch_size=8, eval_every=10, lr=0.01)))
    assert steps[-1].bound < 0.8 * steps[0].loss


@pytest.mark.parametrize(
    ("field", "value"),
    [("certainty", -1), ("consistency", -1), ("ema", 2), ("lora", -1), ("shard", True), ("process", "none")],
)
def test_a_field_that_cannot_be_is_named(home, field, value):
    with pytest.raises(BadInput, match=f"^{field}: expected "):
        config(home, **{field: value})


def test_an_average_beside_adapters_and_a_prompt_without_room_are_refused(home, tmp_path):
    with pytest.raises(BadInput, match=r"^consistency: expected 0 with adapters, got 1"):
        config(home, lora=2, consistency=1.0)
    data = tmp_path / "data.jsonl"
    rows = [{"prompt": "1" * 30, "answer": "1"}, {"prompt": "1", "answer": "1" * 30}]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(BadInput, match=r"^data: expected at most 40 tokens of the longest prompt and answer together"):
        next(train(config(home, data=str(data))))
