import copy
import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from oracles import Oracle, tiny_model
from runs_compared import assert_an_interruption_changes_nothing

from minillada import BadInput, TrainConfig, VRPOConfig, exact_bound, load, save, train
from minillada.training.lora import adapt
from minillada.training.sft import PADDING, Items
from minillada.training.vrpo import VRPO, Drawn, preference_loss, scores, vrpo_loss

QUICK = {"steps": 6, "batch_size": 4, "eval_every": 3, "precision": "float32"}
# Two pairs: (prompt, chosen), (prompt, rejected); of unequal lengths, so that rows are filled up.
ITEMS = [
    [([1, 2, 3], [4, 14]), ([1, 2, 3], [5, 6, 7, 14])],
    [([8], [9, 9, 14]), ([8], [1, 14])],
]


@pytest.fixture(autouse=True)
def private_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("MINILLADA_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def made(seed: int = 0, double: bool = False) -> torch.nn.Module:
    return tiny_model(seed).double() if double else tiny_model(seed)


def lesson(reference: torch.nn.Module | None, **changes) -> VRPO:
    config = VRPOConfig(start="somewhere", data="some.jsonl", precision="float32", **changes)
    return VRPO(Items(None, None, 1.0, 1.0, "", ITEMS, ITEMS, 7), config, 15, reference)


@torch.no_grad()
def compared(model, reference, seed: int = 0, items=ITEMS, **changes) -> tuple[Drawn, torch.Tensor, torch.Tensor]:
    """What is drawn of a batch, and the bounds of the model and of the reference, (P,2,N) each."""
    learner = lesson(reference, **changes)
    drawn = learner.draw(items, torch.Generator().manual_seed(seed))
    return drawn, *learner.bounds(model, drawn, torch.arange(len(items)))


def sampled_scores(model, reference, items=ITEMS[:1], repetitions: int = 300, **changes) -> torch.Tensor:
    """(repetitions,) of one pair."""
    return scores(*compared(model, reference, items=items * repetitions, **changes)[1:])


# ---- the loss


@pytest.mark.parametrize("how", ["copy", "adapters"])
def test_a_model_that_is_the_reference_scores_exactly_zero_and_loses_ln_2_for_every_seed(how):
    model = made()
    reference = copy.deepcopy(model) if how == "copy" else None
    if how == "adapters":
        adapt(model, 2, torch.Generator())
    for seed in range(20):
        _, policy, theirs = compared(model, reference, seed)
        assert (scores(policy, theirs) == 0).all()
        assert preference_loss(policy, theirs).item() == torch.tensor(2.0).log().item()
        learner = lesson(reference, sft_share=0.0, batch_size=2)
        (loss,) = learner.losses(model, ITEMS, torch.Generator().manual_seed(seed))  # and with a gradient
        assert loss.item() == torch.tensor(2.0).log().item() and learner.numbers == {"score": 0, "preferred": 0}


def test_without_sharing_the_score_of_the_reference_itself_fluctuates():
    model = made()
    found = sampled_scores(model, copy.deepcopy(model), repetitions=50, shared=False)
    assert found.std() > 1 and (found != 0).all()


def test_a_constant_on_both_bounds_changes_neither_loss_nor_gradient():
    """A baseline that is subtracted from both cancels. Eighths, so that no float is rounded."""
    rng = torch.Generator().manual_seed(0)
    policy, reference = torch.randint(0, 400, (2, 5, 2, 8), generator=rng).float() / 8
    found = []
    for constant in (0.0, 3.5, -1024.0):
        leaf = (policy + constant).requires_grad_()
        loss = preference_loss(leaf, reference + constant)
        loss.backward()
        found.append((loss.item(), leaf.grad))
    assert all(loss == found[0][0] and torch.equal(grad, found[0][1]) for loss, grad in found)
    assert found[0][1].abs().max() > 0


def test_the_loss_is_dpos_with_bounds_summed_over_tokens():
    policy = torch.tensor([[[4.0, 6.0], [9.0, 9.0]], [[2.0, 2.0], [1.0, 3.0]]])  # upper bounds of -log p
    reference = torch.tensor([[[6.0, 8.0], [8.0, 8.0]], [[1.0, 1.0], [2.0, 2.0]]])
    assert scores(policy, reference).tolist() == [3.0, -1.0]  # (2 gained) - (-1 gained), (-1) - 0
    expected = [math.log(1 + math.exp(-0.2 * score)) for score in (3.0, -1.0)]
    assert preference_loss(policy, reference).item() == pytest.approx(sum(expected) / 2)
    length = torch.tensor([5, 2])
    whole = sum(expected) / 2 + 0.05 * (5 / 5 + 2 / 2) / 2
    assert vrpo_loss(policy, reference, length).item() == pytest.approx(whole)


@pytest.mark.parametrize("changes", [{}, {"shared": False}, {"samples": 2, "masks": 3}, {"accumulate": 2}])
def test_the_gradient_is_that_of_the_loss(changes):
    """Training takes the pairs in parts, and asks for masked positions alone; here is the loss in one piece."""
    model, reference = made(0), made(1)
    learner = lesson(reference, batch_size=2, sft_share=0.3, **changes)
    total = 0.0
    for part in learner.losses(model, ITEMS, torch.Generator().manual_seed(3)):
        part.backward()
        total += part.item()
    ours = [p.grad.clone() for p in model.parameters()]

    model.zero_grad()
    drawn, _, theirs = compared(model, reference, 3, sft_share=0.3, **changes)
    x0, noised, n = drawn.x0, drawn.noised, theirs.shape[-1]
    logits = model(noised.xt.clamp(min=0), attn_mask=(x0 != PADDING)[:, None, None]).log_softmax(-1)
    nats = -logits.gather(-1, x0.clamp(min=0)[..., None])[..., 0]
    policy = ((nats * noised.masked).sum(1) * noised.weight).view(-1, 2, n)
    loss = vrpo_loss(policy, theirs, drawn.length, sft=0.3)
    loss.backward()
    assert total == pytest.approx(loss.item(), rel=1e-5) and drawn.length.tolist() == [2, 3]
    assert learner.numbers["score"] == pytest.approx(scores(policy, theirs).mean().item(), rel=1e-4)
    assert learner.numbers["preferred"] == (scores(policy, theirs) > 0).float().mean().item()
    assert all(p.grad is None for p in reference.parameters())
    for mine, p in zip(ours, model.parameters(), strict=True):
        torch.testing.assert_close(mine, p.grad, rtol=1e-3, atol=1e-5)


def test_the_gradient_pulls_every_bound_by_the_slope_of_the_loss():
    model, reference = made(0), made(1)
    learner = lesson(reference, sft_share=0.0)
    drawn = learner.draw(ITEMS[:1], torch.Generator().manual_seed(1))
    policy, theirs = learner.bounds(model, drawn, torch.arange(1))
    assert policy.requires_grad and not theirs.requires_grad
    (found,) = torch.autograd.grad(preference_loss(policy, theirs), policy)
    slope = 0.2 * torch.sigmoid(-0.2 * scores(policy, theirs)).item() / 8  # chosen: bound down; rejected: bound up
    torch.testing.assert_close(found[0], slope * torch.tensor([[1.0] * 8, [-1.0] * 8]))


# ---- the estimate


def test_scores_average_to_the_score_of_the_exact_bounds():
    model, reference = made(0, double=True), made(1, double=True)
    found = sampled_scores(model, reference, repetitions=1500)
    chosen, rejected = (exact_bound(reference, *pair) - exact_bound(model, *pair) for pair in ITEMS[0])
    assert found.mean().item() == pytest.approx(chosen - rejected, abs=4 * found.std().item() / 1500**0.5)


def test_neighbours_in_a_batch_and_what_fills_rows_up_change_no_bound():
    model, reference = made(0, double=True), made(1, double=True)
    (x0, noised, _, _), policy, theirs = compared(model, reference)
    _, alone, _ = compared(model, reference, items=ITEMS[:1])
    n = policy.shape[-1]
    for row in (0, n, 2 * n, 3 * n):
        prompt, answer = ITEMS[row // (2 * n)][row // n % 2]
        length = len(prompt) + len(answer)
        logits = model(noised.xt[row : row + 1, :length]).log_softmax(-1)[0]
        hidden = noised.masked[row].nonzero().flatten().tolist()
        assert hidden and all(len(prompt) <= i < length for i in hidden)
        nats = -sum(logits[i, x0[row, i]].item() for i in hidden) * len(answer) / len(hidden)
        assert policy.flatten()[row].item() == pytest.approx(nats, rel=1e-5)
    assert alone.shape == (1, 2, n) and theirs.shape == (2, 2, n)


LONG = [[([1, 2], [4, 7, 9, 1, 0, 3, 2, 2, 14]), ([1, 2], [5, 6, 7, 8, 1, 1, 2, 9, 10, 11, 12, 3, 14])]]


def test_the_variance_of_the_score_falls_with_the_budget_and_with_sharing():
    model, reference, rng = made(0), made(0), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in reference.parameters():
            p += 0.02 * torch.randn(p.shape, generator=rng)
    variance = lambda **changes: sampled_scores(model, reference, LONG, **changes).var().item()
    one, four, eight = (variance(samples=n) for n in (1, 4, 8))
    assert 3 < one / four < 6 and 1.5 < four / eight < 3  # about 1/n
    assert variance(samples=4, shared=False) > 20 * four


def test_masks_at_one_level_share_its_luck_and_masks_at_many_do_not():
    """Of a model whose certainty depends on how many masks there are and on nothing else."""

    def logits(tokens):
        found = torch.zeros(*tokens.shape, 16)
        found[..., 0] = 8 * (tokens == 15).float().mean(1, keepdim=True)
        return found

    model, reference = Oracle(tiny_model().config, logits), made(1)
    reference.register_forward_hook(lambda module, args, found: 0 * found)
    items = [[([1], [0] * 12), ([1], [2] * 12)]]
    variance = lambda **changes: sampled_scores(model, reference, items, 600, **changes).var().item()
    one, pooled = variance(samples=1), variance(samples=1, masks=4)
    assert pooled == pytest.approx(one, rel=0.2)
    assert variance(samples=4) < variance(samples=2, masks=2) / 2 < pooled / 4


# ---- training


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A small run to begin with, and pairs in which the shorter answer is the better one."""
    home = tmp_path_factory.mktemp("prefer")
    pairs = [{"prompt": f"{i}=", "chosen": str(i), "rejected": f"{i}{i}"} for i in range(10, 50)]
    (home / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    (home / "text.txt").write_text("".join(f"{i}={i}\n" for i in range(100)) * 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINILLADA_CACHE", str(home / "cache"))
        more = {"preset": "nano", "length": 32, "tokenizer": "characters", "data": str(home / "text.txt")}
        list(train(TrainConfig(**QUICK, **more, out=str(home / "pre"))))
    return home


def config(home: Path, **changes) -> VRPOConfig:
    given = {"start": str(home / "pre"), "data": str(home / "pairs.jsonl"), "samples": 2}
    return VRPOConfig(**{**QUICK, **given, **changes})


@pytest.mark.parametrize("changes", [{}, {"lora": 2}, {"shared": False, "masks": 2}])
def test_an_interrupted_run_ends_with_the_weights_and_losses_of_an_uninterrupted_one(home, tmp_path, changes):
    assert_an_interruption_changes_nothing(partial(config, home, **changes), tmp_path, "loss", "score", "preferred")


def test_training_begins_at_the_reference_and_comes_to_prefer_the_chosen(home):
    steps = list(train(config(home, steps=40, eval_every=20, samples=4, lr=0.002)))
    assert steps[0].numbers["score"] == 0 and steps[0].loss > math.log(2)  # SFT's term is in it
    assert steps[-1].bound < math.log(2) - 0.02 and steps[-1].numbers["score"] > 0.2


def test_the_log_calls_the_held_out_figure_by_its_name(home):
    (step,) = train(config(home, steps=1))
    record = step.record()
    assert record["preference_loss"] == step.bound and "bound" not in record
    assert step.config.units(0.5) == "loss 0.5000"
    assert record["characters_per_token"] == step.text.characters_per_token != 1.0


def test_the_reference_stays_as_it_was(home):
    steps = train(config(home, sft_share=0.0))
    first = next(steps)
    before = {name: p.clone() for name, p in first.model.state_dict().items()}
    assert first.loss == pytest.approx(math.log(2))
    (*_, last) = steps
    assert any(not torch.equal(p, before[name]) for name, p in last.model.state_dict().items())
    assert last.loss != pytest.approx(math.log(2), abs=1e-6)


def test_a_run_whose_beginning_is_another_model_by_now_is_refused(home, tmp_path):
    begun = tmp_path / "begun"
    model, tokenizer = load(home / "pre")
    save(model, begun, tokenizer)
    for i, changes in enumerate(({}, {"lora": 2})):
        list(train(config(home, start=str(begun), out=str(tmp_path / f"run{i}"), **changes)))
    for path in begun.iterdir():
        path.unlink()
    with torch.no_grad():
        model.head.weight *= 2
    save(model, begun, tokenizer)
    for i in range(2):
        with pytest.raises(
            BadInput, match=r"^from: expected the model that this run began with, got another in .*; put that one there"
        ):
            next(train(resume=tmp_path / f"run{i}"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "1=", "chosen": "1"}', 'expected a text "rejected", got none'),
        ('{"prompt": "1=", "chosen": "", "rejected": "2"}', 'expected a text "chosen", got an empty one'),
        ('{"chosen": "1", "rejected": "2"}', 'expected a text "prompt", got none'),
        (
            '{"prompt": "1=", "chosen": "1", "rejected": "1234567890123456789012345678901"}',
            "expected at most 32 tokens",
        ),
    ],
)
def test_a_faulty_line_is_named(home, tmp_path, line, message):
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "1=", "chosen": "1", "rejected": "2"}\n' + line + "\n")
    with pytest.raises(BadInput) as refused:
        next(train(config(home, data=str(data))))
    assert str(refused.value).startswith(f"{data}, line 2: {message}")


@pytest.mark.parametrize(
    ("field", "value"),
    [("samples", 0), ("masks", 1.5), ("beta", 0), ("beta", math.nan), ("sft_share", -1), ("lora", -1)],
)
def test_a_bad_option_is_refused_by_name(home, field, value):
    with pytest.raises(BadInput, match=rf"^{field}: expected .*, got .*; "):
        config(home, **{field: value})
