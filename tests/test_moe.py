"""The mixture of experts: the sorted, grouped layer equals the loop over experts, and its load can be balanced."""

import copy
import itertools
import json
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import tiny_model
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from minillada.diffusion import pretraining_loss
from minillada.errors import BadInput
from minillada.model import MoE
from minillada.train import Pretraining
from minillada.training.balance import (
    Balanced,
    Routing,
    auxiliary_loss,
    balance_loss,
    move_biases,
    routing_report,
    watch_routing,
    z_loss,
)
from minillada.training.config import TrainConfig

EXPERTS = {"n_expert": 6, "n_expert_active": 2, "d_expert": 8}
SIGMOID = {"router": "sigmoid", "router_renormalise": True, "router_scale": 2.5}
GROUPS = {"n_expert_group": 3, "n_expert_group_active": 2}

EMPTY = torch.tensor([], dtype=torch.long)


def make_moe(seed: int = 0, **fields) -> MoE:
    return tiny_model(seed, n_layer=1, **(EXPERTS | fields)).layers[0].ffn


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def chosen(moe: MoE, scores: list[float]) -> list[int]:
    """The experts of one token, from its scores (E,), by sorting."""
    c = moe.c
    values = [s + b for s, b in zip(scores, moe.router_bias.tolist(), strict=True)] if c.router == "sigmoid" else scores
    size = c.n_expert // c.n_expert_group
    groups = [range(g * size, (g + 1) * size) for g in range(c.n_expert_group)]
    groups.sort(key=lambda group: -sum(sorted((values[e] for e in group), reverse=True)[:2]))
    candidates = [e for group in groups[: c.n_expert_group_active] for e in group]
    return sorted(candidates, key=lambda e: -values[e])[: c.n_expert_active]


def loop(moe: MoE, x: Tensor) -> Tensor:
    """The layer on x (N,C) by its definition: the router of each token apart, then one expert after the other."""
    logits = x @ moe.router.weight.T
    scores = logits.softmax(-1) if moe.c.router == "softmax" else logits.sigmoid()
    rows = [chosen(moe, row) for row in scores.tolist()]
    y = torch.zeros_like(x) if moe.shared is None else moe.shared(x)
    for e in range(moe.c.n_expert):
        tokens = [n for n, experts in enumerate(rows) if e in experts]
        for n in tokens:
            total = scores[n, rows[n]].sum() if moe.c.router_renormalise else 1.0
            hidden = F.silu(moe.gate[e] @ x[n]) * (moe.up[e] @ x[n])
            out = moe.c.router_scale * scores[n, e] / total * (moe.down[e] @ hidden)
            y = y.index_add(0, torch.tensor([n]), out[None])
    return y


def same_answers_and_gradients(moe: MoE, x: Tensor) -> None:
    answers, gradient = [], random(*x.shape, seed=1)
    for layer in (moe, lambda x: loop(moe, x)):
        moe.zero_grad()
        given = x.clone().requires_grad_()
        y = layer(given)
        y.backward(gradient)
        parts = {name: p.grad for name, p in moe.named_parameters() if p.grad is not None}  # None: no weight depends
        answers.append({"y": y.detach(), "x": given.grad} | parts)
    for name in answers[0]:
        other = answers[1].get(name, torch.zeros_like(answers[0][name]))
        assert torch.allclose(answers[0][name], other, atol=1e-5, rtol=1e-5), name


@st.composite
def routers(draw) -> dict:
    groups = draw(st.integers(1, 3))
    per_group = draw(st.integers(1, 4))
    active_groups = draw(st.integers(1, groups))
    return {
        "n_expert": groups * per_group,
        "n_expert_active": draw(st.integers(1, active_groups * per_group)),
        "n_expert_group": groups,
        "n_expert_group_active": active_groups,
        "router": draw(st.sampled_from(["softmax", "sigmoid"])),
        "router_renormalise": draw(st.booleans()),
        "router_scale": draw(st.sampled_from([1.0, 2.5])),
        "d_expert": draw(st.sampled_from([8, 16, 24])),
        "d_shared_expert": draw(st.sampled_from([0, 6])),
    }


@settings(max_examples=40, deadline=None)
@given(routers(), st.integers(1, 12), st.integers(0, 99), st.booleans())
def test_answers_and_gradients_equal_those_of_the_loop_over_experts(fields, n_tokens, seed, one_way):
    moe, x = make_moe(seed, **fields), random(n_tokens, 16, seed=seed)
    if moe.c.router == "sigmoid":
        moe.router_bias += 0.2 * random(moe.c.n_expert, seed=seed)
    if one_way:  # all tokens choose the same experts, and the others get none
        x = x.abs()
        moe.router.weight.data = torch.linspace(0.2, -0.2, moe.c.n_expert)[:, None].expand(-1, 16).contiguous()
    same_answers_and_gradients(moe, x)


@pytest.mark.parametrize("n_tokens", [1, 7])
@pytest.mark.parametrize("active", [1, 6])
def test_one_expert_or_all_of_them_equal_the_loop_too(n_tokens, active):
    same_answers_and_gradients(make_moe(n_expert_active=active), random(n_tokens, 16))


def test_an_expert_that_no_token_visits_gets_no_gradient_and_does_not_disturb():
    moe = make_moe(router="sigmoid")
    moe.router_bias[0], moe.router_bias[3] = -100.0, 100.0
    x = random(9, 16)
    same_answers_and_gradients(moe, x)
    assert (moe.gate.grad[0] == 0).all() and moe.gate.grad[3].abs().max() > 0


def test_no_tokens_at_all_are_an_empty_answer():
    model = tiny_model(**EXPERTS)
    assert model(torch.zeros(2, 5, dtype=torch.long), where=(EMPTY, EMPTY)).shape == (0, 16)


def test_rows_and_columns_of_tokens_do_not_matter():
    moe, x = make_moe(), random(3, 4, 16)
    assert torch.allclose(moe(x).flatten(0, 1), moe(x.flatten(0, 1)), atol=1e-6)


def test_under_autocast_experts_compute_in_bfloat16_and_the_router_does_not():
    moe, x, seen = make_moe(), random(50, 16), []
    moe.router.register_forward_hook(lambda router, inputs, logits: seen.append(logits))
    with torch.autocast("cpu", torch.bfloat16):
        y = moe(x)
    low = copy.deepcopy(moe).bfloat16()
    low.router.float()
    plain = moe(x)
    assert torch.equal(seen[0], seen[1]) and seen[0].dtype == torch.float32
    assert torch.allclose(y, low(x.bfloat16()).float(), atol=0.05) and not torch.equal(y, plain)
    assert torch.allclose(y, plain, atol=0.05)
    y.sum().backward()
    assert {p.grad.dtype for p in moe.parameters()} == {torch.float32}


def test_llada_moe_keeps_the_softmax_weights_of_its_experts_as_they_are():
    moe, logits = make_moe(), random(7, 6)
    weights, experts = moe.route(logits)
    best = logits.softmax(-1).topk(2)
    assert torch.equal(experts, best.indices) and torch.allclose(weights, best.values)
    assert weights.sum(-1).max() < 1


def test_the_textbooks_weights_are_a_softmax_over_the_two_best_of_eight():
    moe, logits = make_moe(n_expert=8, router_renormalise=True), random(7, 8)
    weights, experts = moe.route(logits)
    best = logits.topk(2)
    assert torch.equal(experts, best.indices) and torch.allclose(weights, best.values.softmax(-1))


def test_the_routers_bias_chooses_but_does_not_weigh():
    moe, logits = make_moe(router="sigmoid"), random(7, 6)
    moe.router_bias[3] = 100.0
    weights, experts = moe.route(logits)
    assert (experts[:, 0] == 3).all()
    assert torch.allclose(weights[:, 0], logits.sigmoid()[:, 3])


def test_the_best_expert_is_left_out_when_its_group_is_not_among_the_best():
    moe = make_moe(**SIGMOID, **(GROUPS | {"n_expert_group_active": 1}))
    logits = torch.tensor([[3.0, -9.0, 2.0, 2.0, -9.0, -9.0]])  # groups score .95 + 0, .88 + .88 and nearly nothing
    weights, experts = moe.route(logits)
    assert sorted(experts[0].tolist()) == [2, 3]
    assert torch.allclose(weights, torch.full((1, 2), 1.25))  # equal, and 2.5 together


def test_dense_layers_keep_their_feed_forward():
    model = tiny_model(**EXPERTS, n_layer=3, dense_layers=(0, 2))
    assert [isinstance(layer.ffn, MoE) for layer in model.layers] == [False, True, False]


# ---- balance


def routing_of(logits: Tensor, experts: Tensor | None = None, **fields) -> Routing:
    moe = make_moe(**({"n_expert": logits.shape[-1]} | fields))
    return Routing(moe, logits, moe.route(logits)[1] if experts is None else experts)


@pytest.mark.parametrize("fields", [{}, SIGMOID], ids=["softmax", "sigmoid"])
def test_balanced_routing_has_a_loss_of_k(fields):
    even = (torch.arange(12)[:, None] + torch.arange(2)) % 6
    assert balance_loss(routing_of(random(12, 6), even, **fields)).item() == pytest.approx(2)
    assert balance_loss(routing_of(torch.zeros(12, 6), **fields)).item() == pytest.approx(2)  # probabilities are even


def test_collapsed_routing_has_the_largest_loss_e():
    collapsed = routing_of(torch.tensor([[50.0, 50.0, 0.0, 0.0, 0.0, 0.0]]).repeat(9, 1))
    assert balance_loss(collapsed).item() == pytest.approx(6)
    assert all(balance_loss(routing_of(5 * random(9, 6, seed=seed))) < 6 for seed in range(20))


def test_the_balancing_gradient_flows_through_the_probabilities_alone():
    logits = random(9, 6).requires_grad_()
    routing = routing_of(logits)
    found = torch.autograd.grad(balance_loss(routing), logits)[0]
    visits = torch.tensor([(routing.experts == e).sum() for e in range(6)])
    by_hand = 6 * (visits / 9 * logits.softmax(-1)).sum(-1).mean()
    assert torch.allclose(found, torch.autograd.grad(by_hand, logits)[0], atol=1e-6)


def test_the_z_loss_is_the_mean_square_of_the_log_partition():
    logits = random(2, 6)
    by_hand = sum(math.log(sum(math.exp(v) for v in row)) ** 2 for row in logits.tolist()) / 2
    assert z_loss(routing_of(logits)).item() == pytest.approx(by_hand, rel=1e-5)


def skewed(**fields) -> tuple[MoE, Tensor]:
    """A layer whose router sends most tokens to the first experts."""
    moe, x = make_moe(**fields), random(200, 16) + 1
    with torch.no_grad():
        moe.router.weight += torch.linspace(0.1, -0.1, 6)[:, None]
    return moe, x


def watched(moe: MoE, x: Tensor) -> list[Routing]:
    with watch_routing(moe) as routings:
        moe(x)
    return routings


@pytest.mark.parametrize("fields", [{}, {"router_renormalise": True}, SIGMOID], ids=["softmax", "textbook", "sigmoid"])
def test_the_loss_evens_out_a_skewed_router(fields):
    moe, x = skewed(**fields)
    optimizer = torch.optim.Adam([moe.router.weight], lr=0.02)
    before = routing_report(watched(moe, x))
    for _ in range(60):
        auxiliary_loss(watched(moe, x), 1.0, 0.0).backward()
        optimizer.step()
        optimizer.zero_grad()
    after = routing_report(watched(moe, x))
    assert before["imbalance"] > 2 and after["imbalance"] < 1.4
    assert after["balance_loss"] < before["balance_loss"]


def test_moving_the_biases_evens_out_the_load_and_touches_no_weight():
    moe, x = skewed(**SIGMOID, **GROUPS)
    before, weights = routing_report(watched(moe, x)), copy.deepcopy(dict(moe.named_parameters()))
    for _ in range(300):
        move_biases(watched(moe, x), 0.005)
    after = routing_report(watched(moe, x))
    assert before["imbalance"] > 1.8 and after["imbalance"] < 1.2
    assert all(torch.equal(p, weights[name]) for name, p in moe.named_parameters())


def test_a_router_without_a_bias_refuses_to_be_balanced_by_one():
    with pytest.raises(BadInput, match=r"^bias_rate: expected 0 for a softmax router.*, got 0.1; "):
        move_biases([routing_of(random(9, 6))], 0.1)


def test_every_layer_with_experts_is_watched_until_the_block_ends():
    model = tiny_model(**EXPERTS, n_layer=3, dense_layers=(0,))
    x, first, last = torch.arange(12).view(2, 6), model.layers[1].ffn, model.layers[2].ffn
    with watch_routing(model) as routings:
        model(x, where=(torch.tensor([0, 0, 1]), torch.tensor([0, 4, 1])))
        model(x)
    model(x)
    assert [(r.moe, len(r.logits)) for r in routings] == [(first, 12), (last, 3), (first, 12), (last, 12)]
    assert not first.router._forward_hooks


def test_no_kept_position_gives_the_last_layer_nothing_to_balance():
    model = tiny_model(**EXPERTS)
    with watch_routing(model) as routings:
        model(torch.arange(12).view(2, 6), where=(EMPTY, EMPTY))
    assert balance_loss(routings[1]) == z_loss(routings[1]) == 0
    assert sum(routing_report(routings)["load"][1]) == 0
    (auxiliary_loss(routings, 1.0, 1.0)).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_several_evaluations_count_as_one_in_a_report_and_for_the_biases():
    moe, x = skewed(**SIGMOID)
    halves = watched(moe, x[:100]) + watched(moe, x[100:])
    assert routing_report(halves)["load"] == routing_report(watched(moe, x))["load"]
    move_biases(halves, 0.1)
    assert moe.router_bias.abs().max().item() == pytest.approx(0.1)


def test_an_evaluation_that_cannot_be_watched_is_refused():
    with (
        pytest.raises(BadInput, match=r"^routing: expected an evaluation to watch, got none"),
        watch_routing(make_moe()),
    ):
        pass


def test_padding_does_not_count():
    model, x = tiny_model(**EXPERTS), torch.arange(12).view(2, 6)
    padded = torch.cat([x, torch.full((2, 5), 13)], dim=1)
    valid = padded != 13
    with watch_routing(model) as plain:
        model(x)
    with watch_routing(model, valid) as routings:
        model(padded, attn_mask=valid[:, None, None])
    for counted, expected in zip(routings, plain, strict=True):
        assert torch.equal(counted.experts, expected.experts)
        assert torch.allclose(counted.logits, expected.logits, atol=1e-5)


def test_a_dense_model_has_nothing_to_balance():
    with watch_routing(tiny_model()) as routings:
        tiny_model()(torch.zeros(1, 4, dtype=torch.long))
    assert auxiliary_loss(routings, 1.0, 1.0) == 0
    assert routing_report(routings) == {}


def gradients(model, x: Tensor) -> dict[str, Tensor]:
    with watch_routing(model) as routings:
        logits = model(x)
    (logits.logsumexp(-1).mean() + auxiliary_loss(routings, 1.0, 0.1)).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def test_activation_checkpointing_changes_no_gradient():
    x, plain, saving = torch.arange(12).view(2, 6), tiny_model(**EXPERTS), tiny_model(**EXPERTS)
    for layer in saving.layers:
        forward = layer.forward
        layer.forward = lambda *args, forward=forward: checkpoint(forward, *args, use_reentrant=False)
    expected = gradients(plain, x)
    for name, gradient in gradients(saving, x).items():
        assert torch.allclose(gradient, expected[name], atol=1e-6), name


def balanced(parts: int = 1, reference=None, **fields) -> Balanced:
    """Pre-training on one batch, in equal parts, balanced; before each part the reference is evaluated, if given."""

    class Parts(Pretraining):
        def losses(self, model, batch, rng):
            x0, noised = self.noise(batch, rng)
            for rows in torch.arange(len(x0)).chunk(parts):
                if reference is not None:
                    with torch.no_grad():
                        reference(x0)
                yield pretraining_loss(model, x0[rows], type(noised)(*(x[rows] for x in noised))) / parts

    rows = torch.arange(24).view(4, 6) % 13
    config = TrainConfig(**{"balance": 1.0, "z_loss": 0.1, "accumulate": parts} | fields)
    return Balanced(Parts(lambda start: itertools.repeat(rows), rows, 15), config)


def taken(model, objective, seed: int = 0) -> tuple[float, list[Tensor]]:
    """The loss of a batch, and its gradients."""
    model.zero_grad()
    loss = 0.0
    for part in objective.losses(model, next(objective.batches(0)), torch.Generator().manual_seed(seed)):
        part.backward()
        loss += part.item()
    return loss, [p.grad.clone() for p in model.parameters() if p.grad is not None]


def test_a_balanced_objective_reports_its_own_loss_and_adds_the_gradient_of_balancing():
    model, objective = tiny_model(**EXPERTS), balanced()
    loss, gradients = taken(model, objective)
    plain, expected = taken(model, objective.objective)
    assert loss == plain and any(not torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))
    model.zero_grad()
    with watch_routing(model) as routings:
        (part,) = objective.objective.losses(model, next(objective.batches(0)), torch.Generator().manual_seed(0))
    (part + auxiliary_loss(routings, 1.0, 0.1)).backward()
    for mine, p in zip(gradients, (p for p in model.parameters() if p.grad is not None), strict=True):
        assert torch.allclose(mine, p.grad, atol=1e-6)
    assert objective.numbers == routing_report(routings)


def test_every_part_of_a_batch_is_balanced_by_its_share_and_a_reference_is_not():
    model, objective = tiny_model(**EXPERTS), balanced(parts=2)
    loss, _ = taken(model, objective)
    assert loss == taken(model, objective.objective)[0] and len(objective.routings) == 4  # two parts, two layers
    assert sum(objective.numbers["load"][0]) == pytest.approx(1, abs=1e-3)
    model, with_reference = tiny_model(**EXPERTS), balanced(parts=2)
    seen = taken(model, with_reference)[1]
    for mine, theirs in zip(seen, taken(model, balanced(parts=2, reference=model))[1], strict=True):
        assert torch.equal(mine, theirs)


def test_biases_move_between_steps_and_only_at_a_rate():
    model, objective = tiny_model(**EXPERTS, **SIGMOID), balanced()
    taken(model, objective)
    move_biases(objective.routings, 0.0)
    assert not model.layers[0].ffn.router_bias.any()
    move_biases(objective.routings, 0.1)
    assert model.layers[0].ffn.router_bias.abs().max().item() == pytest.approx(0.1)


def test_a_report_is_json_and_every_visit_is_counted():
    model = tiny_model(**EXPERTS)
    with watch_routing(model) as routings:
        model(torch.arange(12).view(2, 6))
    report = json.loads(json.dumps(routing_report(routings)))
    assert [sum(load) for load in report["load"]] == pytest.approx([1, 1], abs=1e-3)
    assert all(0 < entropy <= math.log(6) for entropy in report["router_entropy"])
    assert 1 <= report["imbalance"] <= 3
    assert report["balance_loss"] == pytest.approx(sum(balance_loss(r).item() for r in routings) / 2)
