import json
import shutil
from pathlib import Path

import pytest
import torch
from oracles import GOLDEN, tiny_model
from talkers import write_tokenizer

import minillada
from minillada import BadInput, SFTConfig, VRPOConfig, train
from minillada.training.lora import LoRA, adapt, adapters, merged, without_adapters
from minillada.training.making import make
from minillada.training.run import Rescue
from minillada.weights.quantize import quantize

TOKENS = torch.arange(12).view(2, 6)


@pytest.fixture(autouse=True)
def private_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("MINILLADA_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def adapted(rank: int = 2, moved: float = 0.0, **fields) -> torch.nn.Module:
    """A tiny model with adapters; moved: how far they have learned."""
    rng = torch.Generator().manual_seed(0)
    model = adapt(tiny_model(**fields), rank, rng)
    for p in adapters(model):
        p.data += moved * torch.randn(p.shape, generator=rng)
    return model


EXPERTS = {"n_expert": 4, "n_expert_active": 2, "d_expert": 8}
MODELS = [{}, EXPERTS, {"n_kv_head": 1, "qkv_bias": True, "tie_head": True}]


@pytest.mark.parametrize("fields", MODELS)
def test_fresh_adapters_change_nothing(fields):
    assert torch.equal(adapted(**fields)(TOKENS), tiny_model(**fields)(TOKENS))


@pytest.mark.parametrize("fields", MODELS)
def test_the_merged_model_does_what_the_adapted_one_does(fields):
    model = adapted(moved=0.1, **fields)
    plain = merged(model)
    assert not any(isinstance(module, LoRA) for module in plain.modules())
    assert plain.state_dict().keys() == tiny_model(**fields).state_dict().keys()
    torch.testing.assert_close(plain(TOKENS), model(TOKENS), rtol=1e-4, atol=1e-4)
    assert (plain(TOKENS) - tiny_model(**fields)(TOKENS)).abs().max() > 0.1


def test_merging_copies_nothing_but_what_it_changes():
    model = adapted(moved=0.1)
    plain = dict(merged(model).named_parameters())
    shared = {name for name, p in model.named_parameters() if name in plain and p.data_ptr() == plain[name].data_ptr()}
    assert plain.keys() - shared == {f"layers.{i}.attn.{p}.weight" for i in range(2) for p in "qkvo"}


def test_without_its_adapters_a_model_is_what_it_was():
    model = adapted(moved=0.1)
    after = model(TOKENS)
    with without_adapters(model):
        assert torch.equal(model(TOKENS), tiny_model()(TOKENS))
    assert torch.equal(model(TOKENS), after) and not torch.equal(after, tiny_model()(TOKENS))
    with pytest.raises(ZeroDivisionError), without_adapters(model):
        raise ZeroDivisionError
    assert torch.equal(model(TOKENS), after)


@pytest.mark.parametrize("fields", MODELS)
def test_nothing_but_the_adapters_of_attention_learns(fields):
    model = adapted(moved=0.1, **fields)
    model(TOKENS).sum().backward()
    learning = {name for name, p in model.named_parameters() if p.grad is not None}
    assert learning == {f"layers.{i}.attn.{p}.{part}" for i in range(2) for p in "qkvo" for part in ("up", "down")}
    assert sum(p.numel() for p in adapters(model)) == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_a_bfloat16_model_computes_and_is_merged_in_bfloat16_with_float32_adapters():
    model = adapt(tiny_model().bfloat16(), 2, torch.Generator().manual_seed(0))
    assert {p.dtype for p in adapters(model)} == {torch.float32}
    for p in adapters(model):
        p.data += 0.1
    assert model(TOKENS).dtype == torch.bfloat16
    plain = merged(model)
    assert {p.dtype for p in plain.parameters()} == {torch.bfloat16}
    layer = model.layers[0].attn.q
    expected = layer.weight.double() + 2 * layer.up.double() @ layer.down.double()
    assert torch.equal(plain.layers[0].attn.q.weight, expected.bfloat16())


def test_an_adapted_or_quantized_model_is_refused():
    for model in (adapted(), quantize(tiny_model(d_model=32), "int8")):
        with pytest.raises(BadInput, match=r"^lora: expected a model as loaded, got an adapted or quantized one; "):
            adapt(model, 2, torch.Generator())
    with pytest.raises(BadInput, match=r"^lora: expected a whole number from 1 to 16, got 17"):
        adapted(17)


# ---- The published architectures, one step of each kind


@pytest.fixture(scope="module", params=["llada_dense", "llada_moe"])
def golden(request, tmp_path_factory) -> Path:
    """The golden checkpoint in bfloat16 with a tokenizer, and files to learn from."""
    home = tmp_path_factory.mktemp(request.param)
    shutil.copytree(GOLDEN / request.param, home / "float32")
    write_tokenizer(home / "float32")
    model, tokenizer = minillada.load(home / "float32", dtype=torch.bfloat16)
    minillada.save(model, home / "bfloat16", tokenizer)
    talk = [{"role": r, "content": t} for r, t in zip(["user", "assistant"] * 2, "abcd", strict=True)]
    lines = [{"prompt": "Who?", "answer": "Ada."}, {"messages": talk}]
    (home / "sft.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    pair = json.dumps({"prompt": "Who lost the kite?", "chosen": "Ada.", "rejected": "It was Ada who lost it."})
    (home / "prefer.jsonl").write_text(2 * (pair + "\n"))
    return home


@pytest.mark.parametrize("objective", ["sft", "prefer"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_golden_checkpoint_takes_a_step_with_adapters_and_its_merged_save_loads_again(
    golden, tmp_path, objective, dtype
):
    start, out = golden / dtype, tmp_path / "run"
    kind = {"sft": SFTConfig, "prefer": VRPOConfig}[objective]
    more = {"samples": 2} if objective == "prefer" else {}
    config = kind(
        start=str(start), data=str(golden / f"{objective}.jsonl"), out=str(out), lora=4, steps=2,
        batch_size=2, warmup=0.0, precision="float32", **more,
    )  # fmt: skip
    (*_, last) = train(config)
    before, _ = minillada.load(start)
    after, tokenizer = minillada.load(out)
    assert tokenizer.decode(tokenizer.encode("Who?")) == "Who?"
    held = lambda model: {name: p.dtype for name, p in model.state_dict().items()}
    assert held(after) == held(before) and after.embed.weight.dtype == getattr(torch, dtype)
    changed = {name for name, p in after.state_dict().items() if not torch.equal(p, before.state_dict()[name])}
    assert changed == {f"layers.{i}.attn.{p}.weight" for i in range(before.config.n_layer) for p in "qkvo"}
    tokens = torch.arange(20)[None]
    assert torch.equal(after(tokens), merged(last.model)(tokens))


def test_adapters_are_all_that_optimisers_and_going_back_remember(golden):
    config = SFTConfig(start=str(golden / "bfloat16"), data=str(golden / "sft.jsonl"), lora=4,
                         batch_size=2, steps=1, precision="float32")  # fmt: skip
    now = make(config)
    n = sum(p.numel() for p in adapters(now.model))
    weights, *_ = Rescue(now.trained, now.optimizers).good
    assert sum(t.numel() for t in weights.values()) == n < now.model.n_parameters() / 4
    assert all(t.dtype == torch.float32 for t in weights.values())
    (step,) = train(config)
    assert sum(p.grad is not None for p in step.model.parameters()) == 0  # nothing is left behind
