import itertools
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import GOLDEN, Oracle, any_order_nll, random_order_distribution, table_model, tiny_model

import minillada
from minillada.diffusion import (
    PROCESSES,
    Noised,
    bernoulli,
    exact_count,
    model_bound,
    nll_bound,
    pretraining_loss,
    random_length,
    sample_t,
)
from minillada.errors import BadInput
from minillada.measure.likelihood import exact_bound, log_likelihood, log_likelihoods
from minillada.model import ModelConfig
from minillada.training.cosine import cosine

X0 = [0, 2, 1, 1]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def cross_entropy_of_sets(model, x0):
    """CE(S) in nats for every non-empty set S of masked positions."""
    sums = {}
    for size in range(1, len(x0) + 1):
        for s in itertools.combinations(range(len(x0)), size):
            xt = [model.config.mask_id if i in s else token for i, token in enumerate(x0)]
            log_p = model(torch.tensor([xt]))[0].log_softmax(-1)
            sums[s] = -sum(log_p[i, x0[i]].item() for i in s)
    return sums


def test_the_four_forms_of_the_bound_agree():
    model, length = table_model(), 4
    ce = cross_entropy_of_sets(model, X0)
    # 1. Bernoulli masks with weight 1/t: the integral over t of t^(m-1) (1-t)^(L-m) is a beta function.
    beta = {m: math.gamma(m) * math.gamma(length - m + 1) / math.gamma(length + 1) for m in range(1, length + 1)}
    continuous = sum(beta[len(s)] * value for s, value in ce.items())
    # 2. The count first, l uniform, weight L/l.
    counted = 0.0
    for size in range(1, length + 1):
        values = [value for s, value in ce.items() if len(s) == size]
        counted += length / size * sum(values) / len(values) / length
    # 3. The mean over all orders of the autoregressive loss.
    orders = any_order_nll(model, X0)
    # 4. The closed form.
    closed = exact_bound(model, [], X0)
    for value in (continuous, counted, sum(orders) / len(orders)):
        assert value == pytest.approx(closed, abs=1e-6)


def test_the_bound_lies_above_the_likelihood_of_a_model_that_sums_to_one():
    model = table_model()
    p = random_order_distribution(model, 4)
    assert p.sum().item() == pytest.approx(1.0, abs=1e-6)
    for x, value in zip(itertools.product(range(3), repeat=4), p, strict=True):
        assert exact_bound(model, [], list(x)) >= -math.log(value) - 1e-9


def test_uniform_predictions_give_exactly_length_times_log_vocabulary():
    model = Oracle(ModelConfig(vocab_size=9, mask_id=8), lambda tokens: torch.zeros(*tokens.shape, 9))
    assert exact_bound(model, [1, 2], [3, 4, 5]) == pytest.approx(3 * math.log(9), rel=1e-6)
    assert log_likelihood(model, [1, 2], [3, 4, 5], n_samples=8) == pytest.approx(-3 * math.log(9), rel=1e-6)


@pytest.mark.parametrize("case", json.loads((GOLDEN / "likelihood_expected.json").read_text())["cases"])
def test_exact_bound_equals_the_reference(case):
    model, _ = minillada.load(GOLDEN / "llada_dense")
    bound = exact_bound(model, case["prompt"], case["answer"])
    assert bound == pytest.approx(case["exact_nelbo_nats"], rel=1e-4)
    values, errors = log_likelihoods(model, [(case["prompt"], case["answer"])], n_samples=512)
    assert abs(-values.item() - bound) < 4 * errors.item()


@pytest.mark.parametrize("process", PROCESSES)
def test_every_process_converges_to_the_exact_bound(process):
    model, n = table_model(), 40_000
    rng, x0 = generator(), torch.tensor([X0]).expand(40_000, -1)
    samples = model_bound(model, x0, PROCESSES[process](x0, 3, sample_t(n, rng, stratified=False), rng)).double()
    error = samples.std().item() / n**0.5
    assert abs(samples.mean().item() - exact_bound(model, [], X0)) < 4 * error + 0.005  # 1/t is cut off at 1/1000


def test_counting_first_has_the_least_variance_and_one_over_t_the_most():
    model, n = table_model(), 20_000
    rng, x0 = generator(), torch.tensor([X0]).expand(20_000, -1)
    t = sample_t(n, rng, stratified=False)
    variance = {name: model_bound(model, x0, f(x0, 3, t, rng)).var().item() for name, f in PROCESSES.items()}
    assert variance["exact-count"] < variance["bernoulli-mean"] < variance["bernoulli"] / 2


def test_the_mean_over_seeds_converges_and_its_error_falls_with_the_root():
    model = tiny_model()
    exact = exact_bound(model, [1, 2], [3, 4, 5, 6])
    estimates = torch.tensor([-log_likelihood(model, [1, 2], [3, 4, 5, 6], 16, seed) for seed in range(60)])
    assert abs(estimates.mean().item() - exact) < 4 * estimates.std().item() / 60**0.5
    (few,), (many,) = (log_likelihoods(model, [([1, 2], [3, 4, 5, 6])], n)[1] for n in (100, 1600))
    assert few / many == pytest.approx(4, rel=0.25)


def test_likelihoods_do_not_depend_on_the_batch():
    model = tiny_model()
    pairs = [([1, 2, 3], [4]), ([], [5, 6, 7, 8, 9, 10]), ([1], [2, 3])]
    alone = log_likelihoods(model, pairs, 8, batch_size=1)[0]
    assert torch.allclose(log_likelihoods(model, pairs, 8, batch_size=5)[0], alone, atol=1e-5)


def test_all_logits_and_only_the_masked_ones_give_the_same_bound():
    model, x0, rng = tiny_model(), torch.randint(0, 13, (4, 9)), generator()
    noised = exact_count(x0, 15, sample_t(4, rng), rng)
    assert torch.allclose(nll_bound(model(noised.xt), x0, noised), model_bound(model, x0, noised), atol=1e-5)


def test_a_row_without_masks_costs_nothing_and_is_not_nan():
    model, x0 = tiny_model(), torch.randint(0, 13, (2, 5))
    noised = Noised(x0, torch.zeros_like(x0, dtype=torch.bool), torch.ones(2))
    assert torch.equal(model_bound(model, x0, noised), torch.zeros(2))


def test_the_per_sequence_mean_over_masked_tokens_is_the_bound_and_the_pooled_mean_is_not():
    model, n = table_model(), 40_000
    rng, x0 = generator(), torch.tensor([X0]).expand(40_000, -1)
    noised = exact_count(x0, 3, sample_t(n, rng, stratified=False), rng)
    row, column = noised.masked.nonzero(as_tuple=True)
    ce = torch.nn.functional.cross_entropy(model(noised.xt)[row, column], x0[row, column], reduction="none")
    per_row = torch.zeros(n, dtype=ce.dtype).index_add(0, row, ce) / noised.masked.sum(1)
    exact = exact_bound(model, [], X0) / 4
    assert per_row.mean().item() == pytest.approx(exact, rel=0.01)
    assert abs(ce.mean().item() - exact) > 0.03 * exact


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 20), st.integers(1, 8), st.integers(0, 2**31), st.sampled_from(sorted(PROCESSES)))
def test_only_maskable_tokens_are_ever_masked(length, batch, seed, process):
    rng = generator(seed)
    x0 = torch.randint(0, 13, (batch, length), generator=rng)
    maskable = torch.rand(batch, length, generator=rng) < 0.5
    noised = PROCESSES[process](x0, 15, sample_t(batch, rng), rng, maskable)
    assert not (noised.masked & ~maskable).any()
    assert torch.equal(noised.xt == 15, noised.masked)
    assert torch.equal(noised.xt[~noised.masked], x0[~noised.masked])
    assert noised.weight.isfinite().all()


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 64), st.integers(0, 2**31))
def test_stratified_levels_have_one_in_each_slice(n, seed):
    t = sample_t(n, generator(seed))
    assert ((t > 0) & (t <= 1)).all()
    inside = ((1 - t) * n).sort().values - torch.arange(n)  # where each stands in its slice, but for rounding
    assert ((inside >= -1e-4) & (inside <= 1 + 1e-4)).all()


def test_bernoulli_masks_the_share_that_t_says():
    x0 = torch.zeros(4, 50_000, dtype=torch.long)
    t = torch.tensor([0.1, 0.5, 0.9, 1.0])
    assert torch.allclose(bernoulli(x0, 15, t, generator()).masked.float().mean(1), t, atol=0.01)


@pytest.mark.parametrize("length", [1, 7, 40])
def test_exact_counts_are_uniform_when_stratified(length):
    n = 4 * length
    x0 = torch.zeros(n, length, dtype=torch.long)
    counts = exact_count(x0, 15, sample_t(n, generator()), generator()).masked.sum(1)
    assert counts.bincount(minlength=length + 1).tolist() == [0] + [4] * length


def test_the_cosine_schedules_weight_is_its_slope_over_what_is_masked():
    t = torch.linspace(0.01, 0.99, 50, dtype=torch.float64, requires_grad=True)
    p_mask, weight = cosine(t)
    (slope,) = torch.autograd.grad(p_mask.sum(), t)
    assert torch.allclose(weight, slope / p_mask)


def test_the_bound_is_the_same_for_every_schedule():
    model, n = table_model(), 60_000
    x0, rng = torch.tensor([X0]).expand(n, -1), generator()
    noised = [PROCESSES[name](x0, 3, sample_t(n, rng), rng) for name in ("bernoulli", "bernoulli-cosine")]
    values = [model_bound(model, x0, noise).mean() for noise in noised]
    assert values[0].item() == pytest.approx(values[1].item(), rel=0.02)


def test_the_order_of_the_rows_does_not_change_the_loss():
    model, x0, rng = tiny_model(), torch.randint(0, 13, (6, 9)), generator()
    noised = exact_count(x0, 15, sample_t(6, rng), rng)
    order = torch.randperm(6)
    shuffled = Noised(*(field[order] for field in noised))
    assert pretraining_loss(model, x0, noised).item() == pytest.approx(
        pretraining_loss(model, x0[order], shuffled).item(), rel=1e-6
    )


def test_one_batch_in_a_hundred_is_cut_to_a_random_length():
    rng, x0 = generator(), torch.zeros(2, 64, dtype=torch.long)
    lengths = [random_length(x0, rng).shape[1] for _ in range(10_000)]
    cut = [n for n in lengths if n < 64]
    assert 60 < len(cut) < 140
    assert min(cut) < 8 and max(cut) > 56


@pytest.mark.parametrize(
    ("prompt", "answer", "what"),
    [
        ([1], [], "answer"),
        ([1], [15], "token"),
        ([-1], [2], "token"),
        ([16], [2], "token"),
        ([1] * 5000, [2], "prompt"),
    ],
)
def test_a_pair_without_a_likelihood_is_refused(prompt, answer, what):
    with pytest.raises(BadInput, match=f"^{what}.*expected"):
        log_likelihood(tiny_model(), prompt, answer)


def test_too_long_an_answer_to_enumerate_is_refused():
    with pytest.raises(BadInput, match="log_likelihood"):
        exact_bound(tiny_model(), [], [1] * 17)
