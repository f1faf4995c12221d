"""The autoregressive twin: causal, exact, and trained by the same module."""

import itertools

import pytest
import torch
from oracles import tiny_model

from minillada.errors import BadInput
from minillada.measure.twin import causal, twin_generate, twin_log_likelihoods, twin_loss, twin_nll


def next_log_p(model, before):
    """log p of the next token after a list of tokens, (V,)."""
    tokens = torch.tensor([[model.config.mask_id, *before]])
    return model(tokens, attn_mask=causal(tokens.shape[1]))[0, -1].log_softmax(-1)


def test_a_token_sees_only_what_stands_before_it():
    model, x0 = tiny_model(), torch.randint(0, 13, (1, 9), generator=torch.Generator().manual_seed(0))
    nats = twin_nll(model, x0)
    for i in range(9):
        changed = x0.clone()
        changed[0, i] = (x0[0, i] + 1) % 13
        found = twin_nll(model, changed)
        assert torch.allclose(found[0, :i], nats[0, :i], atol=1e-6)
        assert not torch.allclose(found[0, i:], nats[0, i:], atol=1e-4)


def test_the_likelihood_is_the_chain_rule():
    model, x0 = tiny_model(), [3, 1, 4, 1, 5]
    by_hand = sum(-next_log_p(model, x0[:i])[token].item() for i, token in enumerate(x0))
    assert twin_nll(model, torch.tensor([x0])).sum().item() == pytest.approx(by_hand, rel=1e-5)
    assert twin_loss(model, torch.tensor([x0])).item() == pytest.approx(by_hand / 5, rel=1e-5)


def test_the_probabilities_of_all_sequences_add_up_to_one():
    model = tiny_model(vocab_size=4, mask_id=3, eos_id=None, pad_id=None)
    every = torch.tensor(list(itertools.product(range(4), repeat=3)))
    assert (-twin_nll(model, every).sum(1)).exp().sum().item() == pytest.approx(1, abs=1e-5)


def test_likelihoods_of_unequal_pairs_do_not_depend_on_the_batch():
    model = tiny_model()
    pairs = [([1, 2, 3], [4]), ([], [5, 6, 7, 8]), ([1], [2, 3])]
    alone = [sum(next_log_p(model, [*p, *a[:i]])[t].item() for i, t in enumerate(a)) for p, a in pairs]
    for batch_size in (1, 2, 8):
        assert twin_log_likelihoods(model, pairs, batch_size).tolist() == pytest.approx(alone, rel=1e-5)


def test_a_greedy_text_takes_the_most_probable_token_each_time_whatever_the_batch():
    model, prompts = tiny_model(), [[1, 2, 3], [4], []]
    for prompt, written in zip(prompts, twin_generate(model, prompts, 6), strict=True):
        assert twin_generate(model, [prompt], 6) == [written]
        for i, token in enumerate(written):
            log_p = next_log_p(model, [*prompt, *written[:i]])
            log_p[15] = -torch.inf
            assert token == log_p.argmax()


def test_samples_at_temperature_one_have_the_models_probabilities():
    model, n = tiny_model(), 4000
    written = twin_generate(model, [[1, 2]] * n, 2, temperature=1.0, seed=3)
    first = torch.tensor([row[0] for row in written]).bincount(minlength=16) / n
    p = next_log_p(model, [1, 2]).exp()
    p = p.index_fill(0, torch.tensor(15), 0) / (1 - p[15])
    assert (first - p).abs().max() < 4 * (0.25 / n) ** 0.5
    assert first[15] == 0
    assert twin_generate(model, [[1, 2]] * 9, 2, 1.0, seed=3) != twin_generate(model, [[1, 2]] * 9, 2, 1.0, seed=4)


def test_an_answer_ends_before_the_first_stop_id():
    model = tiny_model()
    (whole,) = twin_generate(model, [[1, 2]], 6)
    stop = whole[3]
    assert twin_generate(model, [[1, 2]], 6, stop_ids=[stop]) == [whole[: whole.index(stop)]]


def test_a_few_steps_teach_the_twin_a_repetition():
    torch.manual_seed(0)
    model, x0 = tiny_model(), torch.tensor([[1, 2, 3, 4] * 3])
    optimizer, before = torch.optim.AdamW(model.parameters(), lr=0.01), twin_loss(model, x0).item()
    for _ in range(60):
        optimizer.zero_grad()
        twin_loss(model, x0).backward()
        optimizer.step()
    assert twin_loss(model, x0).item() < before / 5
    assert twin_generate(model, [[1, 2, 3]], 5) == [[4, 1, 2, 3, 4]]


@pytest.mark.parametrize(("prompts", "gen_len"), [([], 3), ([[1] * 10], 7)])
def test_prompts_that_leave_no_room_are_refused(prompts, gen_len):
    with pytest.raises(BadInput, match=r"^prompts: expected"):
        twin_generate(tiny_model(max_len=16), prompts, gen_len)
