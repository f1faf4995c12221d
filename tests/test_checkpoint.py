"""Hugging Face directories ↔ the module: what is loaded answers like the original, what is saved is the same again."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from minillada.errors import BadInput, BadLuck
from minillada.model import LLaDA, ModelConfig
from minillada.text.tokenizer import Tokenizer
from minillada.weights import checkpoint
from minillada.weights.schemes import LLAMA, SCHEMES, read_config, write_config

GOLDEN = Path(__file__).parent / "golden"
NAMES = ["llada_dense", "llada_gqa_tied", "llada_qkv_bias", "llada_moe", "llada_moe_dense_first_gqa", "llada2_moe"]
MASK = 255  # the mixtures' config.json does not tell it

SMALL = dict(vocab_size=40, mask_id=39, eos_id=38, n_layer=2, n_head=4, d_model=16, d_ff=24, max_len=32)
EXPERTS = dict(n_expert=4, n_expert_active=2, d_expert=8)
KINDS = {
    "dense": {},
    "grouped": {"n_kv_head": 2},
    "tied and padded": {"tie_head": True, "embedding_size": 48},
    "biased": {"qkv_bias": True},
    "qk_norm without experts": {"qk_norm": True},
    "a head width of its own": {"d_head": 6},
    "half-rotary": {"rotary_dim": 2},
    "experts": {**EXPERTS, "qk_norm": True},
    "experts, padded, no QK-norm": {**EXPERTS, "embedding_size": 64},
    "second layer dense": {**EXPERTS, "dense_layers": (1,)},
    "sigmoid": {**EXPERTS, "router": "sigmoid", "router_renormalise": True, "router_scale": 2.5},
    "sigmoid, grouped experts": {**EXPERTS, "router": "sigmoid", "n_expert_group": 2, "dense_layers": (0,)},
    "shared expert and biases": {**EXPERTS, "d_shared_expert": 16, "qkv_bias": True, "qk_norm": True},
    "shared expert of odd width": {**EXPERTS, "d_shared_expert": 12, "dense_layers": (1,)},
    "softmax, made to sum to one": {**EXPERTS, "router_renormalise": True},
}


def make(seed: int = 0, dtype: torch.dtype = torch.float32, **kind) -> LLaDA:
    """A random model; norms and biases are random too, so that exchanging two of them shows."""
    torch.manual_seed(seed)
    model = LLaDA(ModelConfig(**(SMALL | kind)))
    with torch.no_grad():
        for tensor in checkpoint.weights(model).values():
            if tensor.dim() == 1:
                tensor.uniform_(0.5, 1.5)
    return model.to(dtype)


def same_weights(a: LLaDA, b: LLaDA) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a directory, as the safetensors library reads it."""
    index = directory / "model.safetensors.index.json"
    files = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
    return {name: tensor for file in files for name, tensor in load_file(directory / file).items()}


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_a_golden_checkpoint_answers_like_the_reference_code(name):
    model, tokenizer = checkpoint.load(GOLDEN / name, mask_id=MASK)
    expected = load_file(GOLDEN / name / "expected.safetensors")
    tokens = expected["input_ids"]
    assert tokenizer is None and model.config.mask_id == MASK and not model.training
    torch.testing.assert_close(model(tokens), expected["logits"], atol=2e-4, rtol=0)
    if name == "llada2_moe":
        block = torch.arange(tokens.shape[1]) // 8
        logits = model(tokens, attn_mask=(block[:, None] >= block)[None, None])
        torch.testing.assert_close(logits, expected["logits_block_causal_8"], atol=2e-4, rtol=0)
    else:
        valid = expected["attention_mask"].bool()
        logits = model(tokens, attn_mask=valid[:, None, None, :])
        torch.testing.assert_close(logits[valid], expected["logits_with_attention_mask"][valid], atol=2e-4, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_a_golden_checkpoint_saved_again_is_the_original(name, tmp_path):
    model, _ = checkpoint.load(GOLDEN / name, mask_id=MASK)
    checkpoint.save(model, tmp_path / "again")
    original, again = tensors_of(GOLDEN / name), tensors_of(tmp_path / "again")
    assert original.keys() == again.keys()
    assert all(torch.equal(original[key], again[key]) for key in original)
    configs = [json.loads((d / "config.json").read_text()) for d in (GOLDEN / name, tmp_path / "again")]
    assert configs[0] == configs[1]
    loaded, _ = checkpoint.load(tmp_path / "again")  # now without being told the mask
    assert loaded.config == model.config and same_weights(loaded, model)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_kind_of_model_comes_back_bit_for_bit(kind, dtype, tmp_path):
    model = make(dtype=dtype, **kind)
    checkpoint.save(model, tmp_path / "saved")
    loaded, _ = checkpoint.load(tmp_path / "saved")
    assert loaded.config == model.config and same_weights(loaded, model)
    assert (loaded.head.weight is loaded.embed.weight) == model.config.tie_head
    assert all(p.requires_grad for p in loaded.parameters())


def test_a_sharded_checkpoint_loads_like_a_single_file(tmp_path):
    model = make(**KINDS["sigmoid"])
    checkpoint.save(model, tmp_path / "one")
    checkpoint.save(model, tmp_path / "many", shard_bytes=4000)
    files = {p.name for p in (tmp_path / "many").glob("*.safetensors")}
    assert len(files) > 5 and f"model-00001-of-{len(files):05d}.safetensors" in files
    sizes = [sum(t.nbytes for t in load_file(tmp_path / "many" / file).values()) for file in files]
    assert max(sizes) <= 4000
    index = json.loads((tmp_path / "many" / checkpoint.INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(sizes)
    assert same_weights(checkpoint.load(tmp_path / "one")[0], checkpoint.load(tmp_path / "many")[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_dtype_asked_for_is_the_one_given(dtype, tmp_path):
    model = make()
    checkpoint.save(model, tmp_path / "saved")
    loaded, _ = checkpoint.load(tmp_path / "saved", dtype=dtype)
    assert same_weights(loaded, model.to(dtype))


def test_a_wide_router_stays_wide(tmp_path):
    model = make(**KINDS["sigmoid"]).bfloat16()
    for layer in model.layers:
        layer.ffn.router_bias = torch.randn(4)
    checkpoint.save(model, tmp_path / "saved")
    assert same_weights(checkpoint.load(tmp_path / "saved")[0], model)
    lowered, _ = checkpoint.load(tmp_path / "saved", dtype=torch.float16)
    assert lowered.embed.weight.dtype == torch.float16 and lowered.layers[0].ffn.router_bias.dtype == torch.float32


def test_llama_style_names_are_read(tmp_path):
    model = make(n_kv_head=2)
    keys = {"hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    keys |= {"intermediate_size": 24, "tie_word_embeddings": False, "max_position_embeddings": 32, "vocab_size": 40}
    keys |= {"rope_theta": 500000.0, "rms_norm_eps": 1e-5, "hidden_act": "silu", "eos_token_id": 38}
    (tmp_path / "config.json").write_text(json.dumps(keys))
    plan = checkpoint.plan_tensors(model, LLAMA)
    assert "model.layers.1.self_attn.o_proj.weight" in plan
    save_file({name: part.contiguous() for name, [part] in plan.items()}, tmp_path / "model.safetensors")
    with pytest.raises(BadInput, match="mask_id"):
        checkpoint.load(tmp_path)
    loaded, _ = checkpoint.load(tmp_path, mask_id=39)
    assert loaded.config == model.config and same_weights(loaded, model)


@pytest.mark.parametrize(
    ("size", "mask_id", "eos_id"), [(126464, 126336, 126081), (157184, 156895, 156892), (155136, 5, None)]
)
def test_published_models_without_ids_get_the_published_ones(size, mask_id, eos_id, tmp_path):
    keys = {**read(GOLDEN / "llada_dense" / "config.json"), "vocab_size": size, "embedding_size": size}
    for key in ("mask_token_id", "eos_token_id", "pad_token_id"):
        del keys[key]
    (tmp_path / "config.json").write_text(json.dumps(keys))
    _, config = read_config(tmp_path, None, None)
    assert (config.mask_id, config.eos_id) == (mask_id, eos_id)


PUBLISHED = {  # tensors, parameters and scheme of the real models
    "LLaDA-8B": (291, 8_015_581_184, "LLaDA", dict(vocab_size=126464, n_layer=32, n_head=32, d_model=4096, d_ff=12288)),
    "LLaDA-MoE-7B-A1B": (3219, 7_357_000_000, "LLaDA-MoE", dict(
        vocab_size=157184, n_layer=16, n_head=16, d_model=2048, d_ff=8192, qk_norm=True, n_expert=64,
        n_expert_active=8, d_expert=1024)),
    "LLaDA2.0-mini": (14813, 16_260_000_000, "LLaDA2", dict(
        vocab_size=157184, n_layer=20, n_head=16, n_kv_head=4, d_model=2048, d_ff=5120, qk_norm=True, n_expert=256,
        n_expert_active=8, d_expert=512, d_shared_expert=512, dense_layers=(0,), router="sigmoid", rotary_dim=64,
        router_renormalise=True, router_scale=2.5, n_expert_group=8, n_expert_group_active=4)),
}  # fmt: skip


@pytest.mark.parametrize(("tensors", "parameters", "scheme", "config"), PUBLISHED.values(), ids=PUBLISHED)
def test_the_published_models_have_as_many_tensors_and_parameters(tensors, parameters, scheme, config):
    with torch.device("meta"):
        model = LLaDA(ModelConfig(mask_id=5, **config))
    name, _, _ = write_config(model.config)
    assert name == scheme and len(checkpoint.plan_tensors(model, SCHEMES[name])) == tensors
    assert model.n_parameters() == pytest.approx(parameters, rel=3e-4)


def test_the_tokenizer_comes_along_and_tells_the_mask(tmp_path):
    tokenizer = Tokenizer.characters(["hello"])
    model = make(vocab_size=tokenizer.vocab_size, mask_id=tokenizer.mask_id, eos_id=tokenizer.eos_id)
    checkpoint.save(model, tmp_path / "saved", tokenizer)
    loaded, again = checkpoint.load(tmp_path / "saved")
    assert again.decode(again.encode("hello")) == "hello" and loaded.config == model.config
    keys = read(tmp_path / "saved" / "config.json")
    keys["mask_token_id"] = None
    (tmp_path / "saved" / "config.json").write_text(json.dumps(keys))
    (tmp_path / "saved" / "manifest.json").unlink()
    assert checkpoint.load(tmp_path / "saved")[0].config.mask_id == tokenizer.mask_id


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path):
    checkpoint.save(make(), tmp_path / "saved", Tokenizer.bytes())
    with pytest.raises(BadInput, match=r"tokenizer.json: expected at most the model's 40 ids, got 260"):
        checkpoint.load(tmp_path / "saved")


def test_remote_code_is_neither_needed_nor_run(tmp_path):
    checkpoint.save(make(), tmp_path / "saved")
    (tmp_path / "saved" / "manifest.json").unlink()
    keys = read(tmp_path / "saved" / "config.json")
    keys["auto_map"] = {"AutoModel": "evil.Model", "AutoConfig": "../evil.Config"}
    (tmp_path / "saved" / "config.json").write_text(json.dumps(keys))
    (tmp_path / "saved" / "evil.py").write_text("raise SystemExit('executed')")
    checkpoint.load(tmp_path / "saved")
    assert "evil" not in sys.modules


def test_check_tells_what_is_there_without_reading_weights(tmp_path):
    model = make(**KINDS["experts"]).bfloat16()
    checkpoint.save(model, tmp_path / "saved")
    report = checkpoint.check(tmp_path / "saved")
    assert (report.scheme, report.config, report.dtypes) == ("LLaDA-MoE", model.config, ["bfloat16"])
    assert report.n_bytes == 2 * model.n_parameters() and report.files == ["model.safetensors"]
    assert checkpoint.check(tmp_path / "saved", deep=True).non_finite == ()


def test_a_deep_check_names_the_tensors_that_are_not_finite(tmp_path):
    model = make(**KINDS["experts"])
    with torch.no_grad():
        model.layers[1].ffn.up[2, 3, 4] = torch.inf
        model.norm.weight[0] = torch.nan
    checkpoint.save(model, tmp_path / "saved")
    found = checkpoint.check(tmp_path / "saved", deep=True).non_finite
    assert sorted(found) == ["model.layers.1.mlp.experts.2.up_proj.weight", "model.norm.weight"]


def test_saving_over_a_model_is_refused(tmp_path):
    checkpoint.save(make(seed=1), tmp_path / "saved")
    with pytest.raises(BadInput, match="expected no model there yet"):
        checkpoint.save(make(seed=2), tmp_path / "saved")
    assert same_weights(checkpoint.load(tmp_path / "saved")[0], make(seed=1))


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX modes")
def test_whoever_may_read_the_config_may_read_the_weights(tmp_path):
    before = os.umask(0o027)
    try:
        checkpoint.save(make(), tmp_path / "saved")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "saved").iterdir()} == {0o640}


@pytest.mark.parametrize("fails_at", range(4))
def test_a_save_that_fails_leaves_no_debris(fails_at, tmp_path, monkeypatch):
    (tmp_path / "note.txt").write_text("mine")
    calls, replace = [], os.replace

    def full(*paths):
        calls.append(paths)
        if len(calls) > fails_at:
            raise OSError(28, "No space left on device")
        replace(*paths)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(BadLuck, match="No space left on device"):
        checkpoint.save(make(), tmp_path, shard_bytes=6000)
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]


def test_every_file_is_flushed_before_it_gets_its_name(tmp_path, monkeypatch):
    events, flushed, fsync, replace = [], [], os.fsync, os.replace

    def flush(fd):
        events.append("flush")
        flushed.append(os.fstat(fd).st_ino)
        fsync(fd)

    def rename(a, b):
        events.append(Path(b).name)
        assert os.stat(a).st_ino == flushed[-1]  # this very file, and not one that has since been replaced
        replace(a, b)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(os, "replace", rename)
    checkpoint.save(make(), tmp_path / "saved")
    files = ["model.safetensors", "config.json", "manifest.json"]
    assert events[:6] == [event for file in files for event in ("flush", file)]
    if sys.platform != "win32":
        assert events[6:] == ["flush"]  # of the directory


def test_a_run_gives_its_newest_whole_checkpoint(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    for step in (10, 20, 30):
        checkpoint.save(make(seed=step), tmp_path / "checkpoints" / f"step-{step:08d}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same_weights(checkpoint.load(tmp_path)[0], make(seed=30))
    weights = tmp_path / "checkpoints" / "step-00000030" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    (tmp_path / "checkpoints" / "step-00000020" / "manifest.json").unlink()
    with pytest.warns(UserWarning, match=r"step-000000[23]0 is left out") as told:
        assert same_weights(checkpoint.load(tmp_path)[0], make(seed=10))
    assert len(told) == 2
    (tmp_path / "checkpoints" / "step-00000010" / "config.json").unlink()
    with pytest.warns(UserWarning), pytest.raises(BadInput, match="expected a run with a whole checkpoint"):
        checkpoint.load(tmp_path)


def test_the_bar_counts_the_bytes(tmp_path, capsys):
    checkpoint.save(make(), tmp_path / "saved")
    checkpoint.load(tmp_path / "saved")
    assert capsys.readouterr().err == ""
    checkpoint.load(tmp_path / "saved", progress=True)
    assert "loading: 100%" in capsys.readouterr().err


MEMORY = """
import resource, sys, torch
from minillada.weights import checkpoint

large, small = sys.argv[1:]
checkpoint.load(small)  # what the interpreter and its threads take is not the weights'
status = lambda key: next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith(key))
virtual, resident, size = status("VmSize"), status("VmRSS"), checkpoint.check(large).n_bytes
resource.setrlimit(resource.RLIMIT_AS, (virtual + int(1.2 * size),) * 2)
try:
    checkpoint.load(large, dtype=torch.float32)  # twice the bytes
except OSError as e:
    print(e)
checkpoint.load(large)
print((status("VmHWM") - resident) / size)
"""


def test_loading_needs_little_more_memory_than_the_weights_and_refuses_what_there_is_not(tmp_path):
    """Under a limit of 1.2 x the weights: 200 MB in three files, as they are and (refused) in float32."""
    pytest.importorskip("resource", reason="memory limits are a matter of POSIX")
    if not Path("/proc/self/status").exists():
        pytest.skip("memory is measured with Linux's /proc")
    config = ModelConfig(**SMALL | dict(vocab_size=50_000, d_model=768, d_ff=2048, n_layer=3, n_head=12))
    with torch.device("meta"):
        model = LLaDA(config)
    model.load_state_dict({k: torch.zeros(v.shape).bfloat16() for k, v in model.state_dict().items()}, assign=True)
    checkpoint.save(model, tmp_path / "large", shard_bytes=80 * 10**6)
    checkpoint.save(make(), tmp_path / "small")
    command = [sys.executable, "-c", MEMORY, str(tmp_path / "large"), str(tmp_path / "small")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], timeout=120)
    assert done.returncode == 0, done.stderr
    refused, peak = done.stdout.splitlines()
    assert refused.startswith("memory on cpu: expected 0.39 GB free for the weights, got 0.2")
    assert float(peak) < 1.15


def read(path: Path) -> dict:
    return json.loads(path.read_text())
