import copy

import pytest
import torch
from oracles import GOLDEN, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

import minillada
from minillada.errors import BadInput
from minillada.model import LLaDA, ModelConfig
from minillada.training.config import IDS, PRESETS
from minillada.weights.quantize import (
    Float8,
    Int4,
    Int8,
    Packed,
    PackedInt4,
    PackedInt8,
    kinds,
    matrices,
    memory,
    quantize,
    to_fp8,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(5, 64), (3, 4, 128)], ids=["matrix", "experts"])
def test_a_weight_comes_back_within_half_a_step(shape, dtype):
    w = random(*shape, dtype=dtype)
    rounding = torch.finfo(dtype).eps * 4 * w.abs().max().float()
    q, scale = Int8().right_inverse(w)
    assert q.dtype == torch.int8
    assert ((Int8().forward(q, scale) - w).abs().float() <= scale.float() / 2 + rounding).all()
    packed, scale, low = Int4(32).right_inverse(w)
    assert packed.nbytes == w.numel() // 2
    step = scale.expand(*scale.shape[:-1], 32).flatten(-2).float()
    assert ((Int4(32).forward(packed, scale, low) - w).abs().float() <= step / 2 + rounding).all()


@pytest.mark.parametrize("kind", [Int8(), Int4(16)], ids=["int8", "int4"])
@pytest.mark.parametrize("value", [0.0, 3.0, -1e-3])
def test_constant_weights_come_back_exactly(kind, value):
    w = torch.full((2, 32), value)
    torch.testing.assert_close(kind.forward(*kind.right_inverse(w)), w, rtol=1e-6, atol=0)


def test_each_row_and_each_group_has_its_own_scale():
    w = random(2, 64)
    w[1] *= 1000  # a wild row costs the other nothing
    assert (Int8().forward(*Int8().right_inverse(w)) - w)[0].abs().max() < 0.02
    w = random(1, 64)
    w[0, 40] = 1000  # nor a wild weight the other groups
    assert (Int4(32).forward(*Int4(32).right_inverse(w)) - w)[0, :32].abs().max() < 0.2


@pytest.mark.parametrize("name", ["llada_dense", "llada_gqa_tied", "llada_qkv_bias", "llada_moe", "llada2_moe"])
@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_every_kind_of_model_computes_with_the_weights_that_come_back(name, bits):
    model, _ = minillada.load(GOLDEN / name, mask_id=255)
    small = quantize(copy.deepcopy(model), bits)
    assert memory(small) < memory(model)
    assert (small.head.weight is small.embed.weight) == model.config.tie_head
    tokens = torch.arange(24).view(2, 12)
    with torch.no_grad():
        before = model(tokens)
        changed = 0
        for module, weight in matrices(model):
            path = next(path for path, other in model.named_modules() if other is module)
            back = getattr(small.get_submodule(path), weight)
            assert 0 < (back - getattr(module, weight)).abs().max() < 0.2 * back.abs().max()
            getattr(module, weight).copy_(back)
            changed += 1
        assert changed >= 7 * model.config.n_layer
        torch.testing.assert_close(small(tokens), model(tokens))
        assert not torch.allclose(small(tokens), before)


def test_embedding_norms_and_routers_are_left_alone():
    model, _ = minillada.load(GOLDEN / "llada_moe", mask_id=255)
    small = quantize(copy.deepcopy(model), "int4")
    kept = {name: p for name, p in small.named_parameters() if "original" not in name}
    assert {name.split(".")[-2] for name in kept} == {
        "embed",
        "norm",
        "attn_norm",
        "ffn_norm",
        "q_norm",
        "k_norm",
        "router",
    }
    for name, p in kept.items():
        assert p.equal(model.get_parameter(name))


def test_a_width_that_no_group_divides_takes_8_bits():
    model = quantize(tiny_model(d_model=48, d_ff=30), "int4")
    gate, down = (
        model.layers[0].ffn.gate.parametrizations.weight[0],
        model.layers[0].ffn.down.parametrizations.weight[0],
    )
    assert (type(gate), gate.group, type(down)) == (Int4, 16, Int8)


@pytest.mark.parametrize(("bits", "card"), [("int8", 12e9), ("int4", 8e9)])
def test_the_8b_fits_cards_of_12_and_8_gb(bits, card):
    """All of it, its largest matrix once more as it is used, and a gigabyte to compute in."""
    with torch.device("meta"):
        model = LLaDA(ModelConfig(**PRESETS["llada-8b"]["model"], **IDS["llada-8b"])).bfloat16()
    largest = model.head.weight.nbytes
    assert memory(model) > 16e9
    assert memory(quantize(model, bits)) + largest + 1e9 < card


def test_generation_works_and_saving_is_refused(tmp_path):
    model = quantize(tiny_model(d_model=32), "int4")
    config = minillada.SampleConfig(gen_len=8, block_len=4, steps=8)
    assert minillada.generate(model, [[1, 2]], config) == minillada.generate(model, [[1, 2]], config)
    with pytest.raises(BadInput):
        minillada.save(model, tmp_path / "out")


def test_other_bits_are_refused():
    with pytest.raises(BadInput, match="quantize: expected one of int8, int4, got 'int2'"):
        quantize(tiny_model(), "int2")


@pytest.mark.parametrize("bits", ["int8", "int4"])
@pytest.mark.parametrize("fields", [{}, {"qkv_bias": True, "n_kv_head": 1}], ids=["plain", "biases"])
def test_in_bfloat16_a_cpu_multiplies_packed_weights_to_the_same_result(bits, fields, monkeypatch):
    model = tiny_model(d_model=64, d_ff=64, vocab_size=32, mask_id=31, **fields).bfloat16()
    small = quantize(copy.deepcopy(model), bits)
    assert sum(isinstance(module, Packed) for module in small.modules()) == len(matrices(model))
    assert memory(small) < memory(model)
    monkeypatch.setattr(minillada.weights.quantize, "packed", lambda linear, bits: None)
    slow, tokens = quantize(copy.deepcopy(model), bits), torch.arange(24).view(2, 12)
    with torch.no_grad():
        one, other = small(tokens).float(), slow(tokens).float()
    assert (one - other).norm() < 0.05 * other.norm()


@pytest.mark.parametrize("shape", [(2, 64), (16, 64), (5, 3, 64)], ids=str)
def test_a_packed_product_is_that_with_the_weights_that_come_back(shape):
    linear = torch.nn.Linear(64, 48, bias=True).bfloat16().requires_grad_(False)
    x = random(*shape, dtype=torch.bfloat16)
    for product, w in (
        (PackedInt4(linear, 32), Int4(32)(*Int4(32).right_inverse(linear.weight))),
        (PackedInt8(linear), Int8()(*Int8().right_inverse(linear.weight))),
    ):
        torch.testing.assert_close(product(x), torch.nn.functional.linear(x, w, linear.bias), rtol=0.02, atol=0.02)


def test_fp8_is_a_product_of_rounded_rows():
    linear = torch.nn.Linear(64, 48, bias=True).requires_grad_(False)
    x = random(7, 64)
    try:
        y = Float8(linear)(x)
    except (RuntimeError, NotImplementedError) as error:
        pytest.skip(f"this PyTorch has no product in fp8 on a CPU: {error}")
    (q, scale), (p, size) = to_fp8(x), to_fp8(linear.weight)
    expected = (q.float() * scale) @ (p.float() * size).T + linear.bias
    torch.testing.assert_close(y, expected, rtol=0.02, atol=0.02)
    assert (y - linear(x)).norm() < 0.1 * linear(x).norm()


def test_fp8_is_refused_where_no_gpu_multiplies_it(monkeypatch):
    with pytest.raises(BadInput, match="quantize: expected one of int8, int4, got 'fp8'"):
        quantize(tiny_model(), "fp8")
    for able, there in (((8, 9), True), ((9, 0), True), ((8, 6), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, able=able: able)
        assert ("fp8" in kinds("cuda")) == there


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_the_head_is_computed_again_in_pieces(bits, monkeypatch):
    monkeypatch.setattr(minillada.weights.quantize, "PIECE", 100)
    model = quantize(tiny_model(d_model=32, vocab_size=450, mask_id=449), bits)
    x, largest = random(3, 32), []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            largest.extend(
                t.numel() for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, torch.Tensor)
            )
            return out

    whole = x @ model.head.weight.T
    with torch.no_grad(), Sizes():
        y = model.head(x)
    torch.testing.assert_close(y, whole)
    assert max(largest) <= 100 * 32
