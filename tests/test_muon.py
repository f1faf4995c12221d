"""Our Muon is PyTorch's with other polynomials, in the dtype that the device is quick in."""

import pytest
import torch

from minillada.training import muon
from minillada.training.muon import Muon

SHAPES = [(8, 8), (8, 8), (24, 8), (8, 24)]


def stepped(make, steps=4):
    """The matrices after some steps with random gradients."""
    rng = torch.Generator().manual_seed(0)
    matrices = [torch.nn.Parameter(torch.randn(shape, generator=rng)) for shape in SHAPES]
    optimizer = make([{"params": matrices}])
    for _ in range(steps):
        for p in matrices:
            p.grad = torch.randn(p.shape, generator=rng)
        optimizer.step()
    return [p.detach() for p in matrices]


@pytest.mark.parametrize(("dtype", "error"), [(torch.bfloat16, 1e-6), (torch.float32, 2e-3)])
def test_with_pytorchs_polynomial_it_steps_as_pytorchs_does(dtype, error, monkeypatch):
    monkeypatch.setattr(muon, "POLYNOMIALS", [(3.4445, -4.7750, 2.0315)] * 5)
    theirs = stepped(lambda groups: torch.optim.Muon(groups, lr=0.02, weight_decay=0.1))
    ours = stepped(lambda groups: Muon(groups, 0.02, 0.1, dtype))
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, atol=error)


def test_each_polynomial_is_the_best_for_where_the_one_before_leaves_singular_values():
    low, high = 0.01, 1.0
    for a, b, c in muon.POLYNOMIALS:
        s = torch.linspace(low, high, 100_001, dtype=torch.double)
        away = a * s + b * s**3 + c * s**5 - 1
        turns = away[1:-1][(away[1:-1] - away[:-2]) * (away[2:] - away[1:-1]) <= 0]
        extremes = torch.cat([away[:1], turns, away[-1:]])
        signs = torch.tensor([-1.0, 1.0, -1.0, 1.0])  # four equal errors in turn: no other quintic has smaller ones
        torch.testing.assert_close(extremes, signs * away.abs().max(), atol=2e-3, rtol=0, check_dtype=False)
        low, high = 1 - away.abs().max().item(), 1 + away.abs().max().item()
    assert (low, high) == pytest.approx((0.73, 1.27), abs=0.005)


def test_an_update_has_singular_values_near_one():
    before, after = (stepped(lambda groups: Muon(groups, 1.0, 0.0, torch.float32), steps) for steps in (0, 1))
    for p, q, (rows, columns) in zip(before, after, SHAPES, strict=True):
        values = torch.linalg.svdvals((p - q) / max(1, rows / columns) ** 0.5)
        assert values.min() > 0.3 and values.max() < 1.3


def test_a_matrix_without_gradient_stays_as_it_is():
    p = torch.nn.Parameter(torch.ones(2, 2))
    Muon([{"params": [p]}], 1.0, 0.1, torch.float32).step()
    assert torch.equal(p, torch.ones(2, 2))
