"""Likelihoods of pairs and texts, against enumeration."""

import itertools
import json
import math

import pytest
import torch
from oracles import GOLDEN, Oracle, any_order_nll, table_model, tiny_model

import minillada
from minillada.errors import BadInput
from minillada.measure.likelihood import (
    confidence_scores,
    exact_bound,
    log_likelihood,
    log_likelihoods,
    perplexity,
    standard_error,
    strides,
)
from minillada.model import ModelConfig
from minillada.sampler import SampleConfig, generate
from minillada.text.tokenizer import Tokenizer

PAIRS = [([1, 2, 3], [4, 7, 0]), ([], [5, 6, 7, 8, 9]), ([1], [2, 3]), ([4, 4], [11])]


def guided_by_hand(model, prompt, scale):
    """The guided model as a model of its own: logits of two evaluations, of the row and of the row without prompt."""

    def logits(tokens):
        blank = tokens.clone()
        blank[:, : len(prompt)] = model.config.mask_id
        return (1 + scale) * model(tokens) - scale * model(blank)

    return Oracle(model.config, logits)


@pytest.mark.parametrize("case", json.loads((GOLDEN / "likelihood_expected.json").read_text())["cases"])
def test_the_estimate_lies_within_four_standard_errors_of_the_reference_for_every_seed(case):
    model, _ = minillada.load(GOLDEN / "llada_dense")
    for seed in range(5):
        (value,), (error,) = log_likelihoods(model, [(case["prompt"], case["answer"])], 64, seed)
        assert abs(-value - case["exact_nelbo_nats"]) < 4 * error + 1e-4


@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_the_bound_with_guidance_is_that_of_the_guided_model(scale):
    model = tiny_model()
    for prompt, answer in PAIRS:
        exact = exact_bound(guided_by_hand(model, prompt, scale), prompt, answer)
        assert exact_bound(model, prompt, answer, cfg_scale=scale) == pytest.approx(exact, rel=1e-5)
        (value,), (error,) = log_likelihoods(model, [(prompt, answer)], 256, cfg_scale=scale)
        assert abs(-value - exact) < 4 * error + 1e-4


def test_guidance_does_not_depend_on_the_batch_and_without_a_prompt_it_does_nothing():
    model = tiny_model()
    alone = torch.cat([log_likelihoods(model, [pair], 8, cfg_scale=1.5)[0] for pair in PAIRS[:1]])
    assert torch.allclose(log_likelihoods(model, PAIRS, 8, batch_size=7, cfg_scale=1.5)[0][:1], alone, atol=1e-4)
    many = log_likelihoods(model, PAIRS, 8, batch_size=1, cfg_scale=1.5)[0]
    assert torch.allclose(log_likelihoods(model, PAIRS, 8, batch_size=32, cfg_scale=1.5)[0], many, atol=1e-4)
    assert log_likelihood(model, [], [1, 2], 4, cfg_scale=3.0) == pytest.approx(log_likelihood(model, [], [1, 2], 4))
    assert log_likelihood(model, [3], [1, 2], 4, cfg_scale=3.0) != pytest.approx(log_likelihood(model, [3], [1, 2], 4))


def test_the_standard_error_is_the_spread_of_the_estimates():
    model = tiny_model()
    for pair, n in itertools.product(PAIRS[:2], (2, 8, 32)):
        values, errors = log_likelihoods(model, [pair] * 200, n, batch_size=512)  # 200 estimates, masks of their own
        spread, claimed = values.std(), errors.square().mean().sqrt()
        # where strata are few their means differ by more than chance: the claim is then on the safe side
        assert 0.85 * spread < claimed < (1.25 if n > 2 else 3) * spread


def test_the_standard_error_of_independent_samples_is_the_usual_one():
    samples = torch.randn(500, 40, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    usual = samples.std(1) / 40**0.5
    assert standard_error(samples).mean().item() == pytest.approx(usual.mean().item(), rel=0.02)
    assert standard_error(samples[:, :1]).isnan().all()


def test_stratified_counts_beat_independent_one_over_t_at_equal_cost():
    model, n = tiny_model(), 32
    prompt, answer = PAIRS[1]
    estimates = [log_likelihood(model, prompt, answer, n, seed) for seed in range(60)]
    x0 = torch.tensor([answer]).expand(n, -1)
    plain = []
    for seed in range(60):
        rng = torch.Generator().manual_seed(seed)
        noised = minillada.diffusion.bernoulli(x0, 15, minillada.diffusion.sample_t(n, rng, stratified=False), rng)
        with torch.no_grad():
            plain.append(-minillada.diffusion.model_bound(model, x0, noised).mean().item())
    assert torch.tensor(estimates).std() < torch.tensor(plain).std() / 2


def test_no_pairs_give_no_values():
    values, errors = log_likelihoods(tiny_model(), [])
    assert values.shape == errors.shape == (0,)


# ---- texts


@pytest.mark.parametrize(("length", "window", "stride"), [(10, 4, 2), (9, 4, 4), (3, 8, 8), (7, 5, 1), (8, 4, 3)])
def test_every_token_is_predicted_once_after_as_much_as_fits_before_it(length, window, stride):
    tokens, at = list(range(length)), 0
    for prompt, answer in strides(tokens, window, stride):
        assert answer == tokens[at : at + stride] and len(answer) >= 1
        assert prompt == tokens[:at][-(window - stride) :] if window > stride else prompt == []
        at += len(answer)
    assert at == length


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_the_bound_of_a_text_is_the_sum_of_the_exact_bounds_of_its_parts(scale):
    model = tiny_model(max_len=6)
    tokens = torch.randint(0, 13, (23,), generator=torch.Generator().manual_seed(0)).tolist()
    exact = sum(exact_bound(model, *pair, cfg_scale=scale) for pair in strides(tokens, 6, 3))
    found = perplexity(model, tokens, n_samples=256, cfg_scale=scale)
    assert abs(found.nats - exact) < 4 * found.standard_error < 0.1 * exact
    assert found.tokens == 23 and found.characters is found.bytes is found.bits_per_character is None
    assert found.perplexity == pytest.approx(math.exp(found.nats / 23))


def test_a_uniform_model_costs_the_logarithm_of_its_vocabulary_per_token_with_any_window():
    config = ModelConfig(vocab_size=9, mask_id=8, max_len=16)
    model = Oracle(config, lambda tokens: torch.zeros(*tokens.shape, 9))
    for window, stride in ((16, 16), (16, 1), (5, 3), (1, 1)):
        found = perplexity(model, [3] * 40, window=window, stride=stride, n_samples=2)
        assert found.nats == pytest.approx(40 * math.log(9), rel=1e-5)
        assert found.perplexity == pytest.approx(9, rel=1e-5)


def test_characters_and_bytes_of_a_text_are_counted_apart():
    tokenizer = Tokenizer.bytes()
    config = ModelConfig(vocab_size=tokenizer.vocab_size, mask_id=tokenizer.mask_id, max_len=8)
    model = Oracle(config, lambda tokens: torch.zeros(*tokens.shape, tokenizer.vocab_size))
    found = perplexity(model, "ä→x" * 5, tokenizer)
    assert (found.tokens, found.characters, found.bytes) == (30, 15, 30)
    assert found.bits_per_byte == pytest.approx(math.log2(tokenizer.vocab_size), rel=1e-5)
    assert found.bits_per_character == pytest.approx(2 * found.bits_per_byte)


def test_the_parts_of_a_text_can_be_watched():
    shown = []

    def watch(parts):
        shown.append(len(parts))
        return parts

    perplexity(tiny_model(max_len=4), [1] * 10, n_samples=1, progress=watch)
    assert shown == [5]


@pytest.mark.parametrize(
    ("text", "options", "what"),
    [
        ("abc", {}, "text"),
        ([], {}, "text"),
        ([1], {"window": 5000}, "window"),
        ([1], {"window": 0}, "window"),
        ([1], {"window": 4, "stride": 5}, "stride"),
        ([1], {"stride": 0}, "stride"),
        ([1], {"n_samples": 0}, "n_samples"),
        ([15], {}, "token"),
    ],
)
def test_a_text_without_a_perplexity_is_refused(text, options, what):
    with pytest.raises(BadInput, match=f"^{what}.*expected"):
        perplexity(tiny_model(), text, **options)


# ---- confidence


def score_by_hand(model, x0):
    """Fill in where the answer's own token is likeliest, one after the other."""
    holes, total, mask = set(range(len(x0))), 0.0, model.config.mask_id
    while holes:
        x = [mask if i in holes else token for i, token in enumerate(x0)]
        log_p = model(torch.tensor([x]))[0].log_softmax(-1)
        best = max(holes, key=lambda i: log_p[i, x0[i]].item())
        total += log_p[best, x0[best]].item()
        holes.remove(best)
    return total


def test_confidence_adds_up_the_surest_steps_of_every_answer():
    model = table_model()
    answers = list(itertools.product(range(3), repeat=4))
    scores, _ = confidence_scores(model, [([], list(a)) for a in answers], batch_size=7)
    for answer, score in zip(answers, scores.tolist(), strict=True):
        assert score == pytest.approx(score_by_hand(model, list(answer)), abs=1e-5)
        assert any(score == pytest.approx(-nats, abs=1e-5) for nats in any_order_nll(model, list(answer)))


def test_confidence_does_not_depend_on_the_batch_and_knows_guidance():
    model = tiny_model()
    for scale in (0.0, 1.0):
        alone = [confidence_scores(model, [pair], cfg_scale=scale) for pair in PAIRS]
        scores, greedy = confidence_scores(model, PAIRS, cfg_scale=scale)
        assert torch.allclose(scores, torch.cat([s for s, _ in alone]), atol=1e-4)
        assert torch.equal(greedy, torch.cat([g for _, g in alone]))
    single = [([1, 2], [t]) for t in range(13)]  # of one token: the log-likelihood itself
    assert torch.allclose(confidence_scores(model, single)[0], log_likelihoods(model, single, 1)[0], atol=1e-5)
    prompt, answer = PAIRS[0]
    by_hand = confidence_scores(guided_by_hand(model, prompt, 1.0), [(prompt, answer)])[0]
    assert torch.allclose(confidence_scores(model, [(prompt, answer)], cfg_scale=1.0)[0], by_hand, atol=1e-4)


@pytest.mark.parametrize("seed", range(4))
def test_an_answer_is_greedy_exactly_if_the_sampler_writes_it(seed):
    model = tiny_model(seed)
    for prompt in ([], [1, 2, 3]):
        config = SampleConfig(gen_len=4, steps=4, block_len=4, stop_at_eos=False)
        (written,) = generate(model, [prompt], config)
        others = [[*written[:i], (written[i] + 1) % 15, *written[i + 1 :]] for i in range(4)]
        _, greedy = confidence_scores(model, [(prompt, answer) for answer in [written, *others]])
        assert greedy.tolist() == [True, False, False, False, False]
