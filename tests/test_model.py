import json
import math
from dataclasses import asdict

import pytest
import torch
from oracles import tiny_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from minillada.diffusion import exact_count, pretraining_loss, sample_t
from minillada.errors import LIMITS, BadInput
from minillada.measure.cost import flops_per_token, n_active_parameters
from minillada.model import KVCache, LLaDA, ModelConfig, MoE, attend
from minillada.training.config import IDS, PRESETS

VARIANTS = {
    "dense": {},
    "grouped queries": {"n_head": 4, "n_kv_head": 2},
    "wide heads": {"d_head": 24},
    "tied head": {"tie_head": True},
    "biases": {"qkv_bias": True},
    "qk norm": {"qk_norm": True},
    "partial rotary": {"rotary_dim": 4},
    "padded embedding": {"embedding_size": 24},
    "experts": {"n_expert": 4, "n_expert_active": 2, "d_expert": 8},
    "dense first": {"n_expert": 4, "n_expert_active": 2, "d_expert": 8, "dense_layers": (0,), "d_shared_expert": 8},
    "sigmoid router": {"n_expert": 8, "n_expert_active": 2, "d_expert": 8, "router": "sigmoid", "n_expert_group": 4}
    | {"n_expert_group_active": 2, "router_renormalise": True, "router_scale": 2.5},
}  # fmt: skip


def tokens(batch=3, length=12, seed=0):
    return torch.randint(0, 13, (batch, length), generator=torch.Generator().manual_seed(seed))


def published(name: str) -> LLaDA:
    with torch.device("meta"):
        return LLaDA(ModelConfig(**IDS[name], **PRESETS[name]["model"]))


def test_the_8b_model_has_the_published_number_of_parameters():
    assert published("llada-8b").n_parameters() == 8_015_581_184


def test_the_1b_model_has_the_published_number_of_parameters():
    model = published("llada-1b")
    assert round(model.n_parameters() / 1e9, 2) == 1.49
    assert round((n_active_parameters(model) - model.head.weight.numel()) / 1e9, 2) == 0.97


def test_the_moe_model_has_the_published_numbers_of_parameters():
    model = published("llada-moe-7b-a1b")
    assert round(model.n_parameters() / 1e9, 2) == 7.36
    assert round(n_active_parameters(model) / 1e9, 2) == 1.40


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS.keys())
def test_every_variant_answers_with_logits_for_every_position(fields):
    model = tiny_model(**fields)
    logits = model(tokens())
    assert logits.shape == (3, 12, model.config.embedding_size)
    assert logits.isfinite().all()


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS.keys())
def test_a_later_token_changes_an_earlier_logit(fields):
    model, x = tiny_model(**fields), tokens()
    y = x.clone()
    y[:, -1] = (y[:, -1] + 1) % 13
    assert (model(x)[:, 0] - model(y)[:, 0]).abs().max() > 1e-4


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS.keys())
@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
def test_padding_never_changes_the_logits_of_valid_tokens(fields, left):
    model, x = tiny_model(**fields), tokens()
    padding = torch.full((3, 5), 13)
    padded = torch.cat([padding, x] if left else [x, padding], dim=1)
    valid = torch.cat([padding == 0, x >= 0] if left else [x >= 0, padding == 0], dim=1)
    logits = model(padded, attn_mask=valid[:, None, None, :])
    assert torch.allclose(logits[:, 5:] if left else logits[:, :12], model(x), atol=1e-5)


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS.keys())
def test_the_logits_of_some_places_are_those_of_the_full_answer(fields):
    model, x = tiny_model(**fields), tokens()
    where = torch.tensor([0, 0, 1, 2]), torch.tensor([0, 7, 1, 11])
    assert torch.allclose(model(x, where=where), model(x)[where], atol=1e-5)


def test_only_differences_of_positions_matter():
    model, x = tiny_model(), tokens()
    shifted = torch.arange(12) + torch.tensor([[0], [5], [100]])
    assert torch.allclose(model(x, positions=shifted), model(x), atol=1e-4)
    assert not torch.allclose(model(x, positions=2 * torch.arange(12)), model(x), atol=1e-2)


def test_a_cache_that_is_wholly_renewed_changes_nothing():
    model, cache = tiny_model(), KVCache()
    model(tokens(seed=1), cache=cache)
    positions = torch.arange(12)
    assert torch.allclose(model(tokens(), positions=positions, cache=cache), model(tokens()), atol=1e-6)


def test_a_cache_is_exact_for_one_layer_and_only_an_approximation_for_two():
    window = torch.arange(4, 8)
    for n_layer, exact in ((1, True), (2, False)):
        model, before, after, cache = tiny_model(n_layer=n_layer), tokens(), tokens(), KVCache()
        after[:, window] = (after[:, window] + 3) % 13
        model(before, cache=cache)
        logits = model(after[:, window], positions=window, cache=cache)
        assert torch.allclose(logits, model(after)[:, window], atol=1e-5) == exact


def test_grouped_queries_equal_repeated_keys_and_values():
    few, many = tiny_model(n_head=4, n_kv_head=2), tiny_model(n_head=4)
    state = few.state_dict()
    for name in [name for name in state if ".attn.k." in name or ".attn.v." in name]:
        state[name] = state[name].view(2, 4, 16).repeat_interleave(2, dim=0).flatten(0, 1)
    many.load_state_dict(state)
    assert torch.allclose(few(tokens()), many(tokens()), atol=1e-6)


def test_a_tied_head_is_the_embedding_and_is_counted_once():
    tied, untied = tiny_model(tie_head=True), tiny_model()
    assert tied.head.weight is tied.embed.weight
    assert untied.n_parameters() - tied.n_parameters() == 16 * 16


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_plain_attention_equals_the_fused_kernel(kv_heads):
    q, k, v = torch.randn(2, 4, 10, 8), torch.randn(2, kv_heads, 10, 8), torch.randn(2, kv_heads, 10, 8)
    fused = attend(q, k, v, None)
    plain = attend(q.bfloat16().requires_grad_(), k.bfloat16(), v.bfloat16(), None)
    assert torch.allclose(plain.float(), fused, atol=0.03)


def all_experts(c: ModelConfig, moe: MoE, x: torch.Tensor) -> torch.Tensor:
    """The dense weighted sum over every expert, one at a time."""
    weights = torch.nn.functional.linear(x, moe.router.weight).softmax(-1)
    total = torch.zeros_like(x)
    for e in range(c.n_expert):
        hidden = torch.nn.functional.silu(x @ moe.gate[e].T) * (x @ moe.up[e].T)
        total += weights[..., e, None] * (hidden @ moe.down[e].T)
    return total


def test_experts_all_chosen_equal_the_dense_weighted_sum():
    c = tiny_model(n_expert=6, n_expert_active=6, d_expert=8).config
    moe = tiny_model(n_expert=6, n_expert_active=6, d_expert=8).layers[0].ffn
    x = torch.randn(2, 5, 16)
    assert torch.allclose(moe(x), all_experts(c, moe, x), atol=1e-5)


def test_a_two_layer_model_overfits_one_batch_to_a_bound_near_zero():
    rng = torch.Generator().manual_seed(0)
    model = LLaDA(ModelConfig(vocab_size=16, mask_id=15, n_layer=2, n_head=2, d_model=64, d_ff=128))
    model.init_weights(rng)
    x0 = tokens(batch=4, length=8)
    x0[:, 0] = torch.arange(4)  # told apart by one token; the rest must be remembered
    x0 = x0.repeat(16, 1)
    maskable = (torch.arange(8) > 0).expand_as(x0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(200):
        loss = pretraining_loss(model, x0, exact_count(x0, 15, sample_t(64, rng), rng, maskable))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.02


def test_before_training_all_tokens_are_nearly_equally_likely():
    torch.manual_seed(0)
    model = LLaDA(ModelConfig(vocab_size=500, mask_id=0, n_layer=8))
    x0, rng = torch.randint(1, 500, (8, 32)), torch.Generator().manual_seed(0)
    loss = pretraining_loss(model, x0, exact_count(x0, 0, sample_t(8, rng), rng))
    assert abs(loss.item() - math.log(500)) < 0.1


def test_counted_flops_are_those_that_pytorch_counts():
    model = tiny_model()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(tokens(batch=1, length=12))
    norms_and_biases = 2 * sum(p.numel() for p in model.parameters() if p.dim() == 1)
    assert counter.get_total_flops() == 12 * (flops_per_token(model, 12) - norms_and_biases)


def test_a_config_survives_json():
    config = tiny_model(n_expert=4, n_expert_active=2, d_expert=8, dense_layers=(0,)).config
    assert ModelConfig(**json.loads(json.dumps(asdict(config)))) == config


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n_layer", 0), ("n_head", -1), ("d_model", True), ("vocab_size", 2.0), ("max_len", 10**9), ("mask_id", 16),
        ("pad_id", 15), ("n_kv_head", 3), ("rotary_dim", 5), ("embedding_size", 15), ("norm_eps", 0.0),
        ("rope_theta", math.nan), ("router", "argmax"), ("n_expert", 4),
    ],
)  # fmt: skip
def test_a_config_that_describes_no_model_is_refused_by_name(field, value):
    with pytest.raises(BadInput, match=rf"^{field if field != 'n_expert' else 'd_expert'}: expected .*, got .*; "):
        tiny_model(**{field: value})


def test_absurd_sizes_are_refused_before_memory_is_taken():
    with pytest.raises(BadInput, match="n_layer"):
        ModelConfig(vocab_size=100, mask_id=0, n_layer=LIMITS["n_layer"] + 1)
