"""Training passes in fewer operations compute what model.py does."""

import copy
import ctypes

import pytest
import torch
from torch.autograd import gradcheck

from minillada import LLaDA, ModelConfig
from minillada.diffusion import exact_count, pretraining_loss
from minillada.model import rotary_angles, rotate
from minillada.training import passes
from minillada.training.passes import Normed, Turned, hasten

SWITCHES = [{}, {"qk_norm": True, "n_kv_head": 1, "rotary_dim": 8}]


def double(*shape):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()


def test_the_derivatives_by_hand_are_right():
    assert gradcheck(lambda x, w: Normed.apply(x, w, 1e-5, torch.float64), (double(2, 3, 8), double(8)))
    angles = rotary_angles(torch.arange(3), ModelConfig(vocab_size=3, mask_id=0, n_head=1, d_model=8), torch.float64)
    assert gradcheck(lambda x: Turned.apply(x, *angles), double(2, 2, 3, 8))
    assert torch.allclose(Turned.apply(double(2, 2, 3, 10), *angles), rotate(double(2, 2, 3, 10), *angles))


def passed(model, precision):
    """The gradients of a training pass."""
    rng = torch.Generator().manual_seed(0)
    x0 = torch.randint(1, 50, (4, 16), generator=rng)
    with torch.autocast("cpu", torch.bfloat16, precision == "bfloat16"):
        loss = pretraining_loss(model, x0, exact_count(x0, 0, torch.rand(4, generator=rng), rng))
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("switches", SWITCHES)
def test_a_hastened_model_trains_as_exactly(switches):
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=50, mask_id=0, n_layer=2, n_head=2, d_model=32, d_ff=48, **switches)
    plain = LLaDA(config)
    hastened = hasten(copy.deepcopy(plain))
    exact = passed(plain, "float32")
    assert torch.equal(passed(hastened, "float32"), exact)
    ours, theirs = ((passed(model, "bfloat16") - exact).norm() for model in (hastened, plain))
    assert 0 < ours < 1.25 * theirs < 0.05 * exact.norm()


def test_without_gradients_it_computes_bit_for_bit_as_before():
    plain = LLaDA(ModelConfig(vocab_size=50, mask_id=0))
    hastened = hasten(copy.deepcopy(plain))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(plain(torch.arange(50)[None]), hastened(torch.arange(50)[None]))
    assert hastened.state_dict().keys() == plain.state_dict().keys()


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    passes.keep_memory()
