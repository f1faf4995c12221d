"""A model as one GGUF file: it comes back, llama.cpp's own package agrees with the bytes, and no file is trusted."""

import json
import os
import struct
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from oracles import GOLDEN, tiny_model
from safetensors.torch import load_file
from talkers import write_random, write_template

import minillada
from minillada.commands.cli import run
from minillada.commands.gguf import main
from minillada.errors import BadInput, BadLuck
from minillada.sampler import SampleConfig, generate
from minillada.text.chat import ChatTemplate
from minillada.weights import checkpoint, convert, gguf

EXPRESSED = ["llada_dense", "llada_gqa_tied", "llada_qkv_bias", "llada_moe"]
PACKED = load_file(GOLDEN / "gguf_packed.safetensors")  # by the package gguf 0.19.0


def golden(name: str):
    return minillada.load(GOLDEN / name, mask_id=255)[0]


def logits(model, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens).float()


@pytest.fixture
def file(tmp_path):
    """A small dense model as a GGUF file, in f32."""
    path = tmp_path / "model.gguf"
    convert.write(path, tiny_model(d_model=32, d_ff=64), "f32")
    return path


# ---- numbers <-> bytes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0", "q4_0"])
def test_what_is_packed_has_the_bytes_of_the_gguf_package(kind):
    x = PACKED["x"].numpy()
    assert np.array_equal(gguf.pack(kind, x), PACKED[kind].numpy())


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0", "q4_0"])
def test_what_is_unpacked_and_packed_again_is_the_same(kind):
    packed = gguf.pack(kind, np.random.default_rng(0).standard_normal((3, 64)).astype(np.float32))
    assert np.array_equal(gguf.pack(kind, gguf.unpack(kind, packed, 64)), packed)


@pytest.mark.parametrize(("kind", "most"), [("f16", 2**-11), ("bf16", 2**-8), ("q8_0", 0.0045), ("q4_0", 1 / 8)])
def test_rounding_stays_within_the_step_of_its_kind(kind, most):
    x = np.random.default_rng(1).uniform(-1, 1, (50, 64)).astype(np.float32)
    found = gguf.unpack(kind, gguf.pack(kind, x), 64)
    assert 0 < np.abs(found - x).max() <= most * 1.001


def test_the_gguf_package_reads_and_packs_the_same(file):
    package = pytest.importorskip("gguf")
    reader = package.GGUFReader(file)
    model, _ = minillada.load(file)
    by_name = {tensor.name: tensor.data for tensor in reader.tensors}
    assert np.array_equal(by_name["blk.0.ffn_up.weight"], model.layers[0].ffn.up.weight.detach().numpy())
    x = np.random.default_rng(2).standard_normal((500, 256)).astype(np.float32)
    for kind in ("f16", "bf16", "q8_0", "q4_0"):
        theirs = package.quants.quantize(x, package.GGMLQuantizationType[kind.upper()])
        assert np.array_equal(gguf.pack(kind, x), theirs.view(np.uint8).reshape(500, -1))


# ---- a model <-> a file ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXPRESSED)
def test_a_golden_checkpoint_comes_back_bit_for_bit(name, tmp_path):
    model = golden(name)
    convert.write(tmp_path / "model.gguf", model, "f32")
    again, tokenizer = minillada.load(tmp_path / "model.gguf")
    assert tokenizer is None and again.config == model.config
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    tokens = load_file(GOLDEN / name / "expected.safetensors")["input_ids"]
    assert torch.equal(logits(model, tokens), logits(again, tokens))


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("f16", torch.float16), ("bf16", torch.bfloat16), ("q8_0", torch.float32), ("q4_0", torch.float32)],
)
def test_fewer_bits_are_those_of_each_matrix_and_norms_stay_exact(kind, dtype, tmp_path):
    model = tiny_model(d_model=64, d_ff=96)
    model.norm.weight.data += torch.randn(64) * 1e-4
    convert.write(tmp_path / "model.gguf", model, kind)
    found = checkpoint.check(tmp_path / "model.gguf", deep=True)
    assert found.dtypes == sorted({"f32", kind}) and found.n_bytes < model.n_parameters() * 2.2
    again, _ = minillada.load(tmp_path / "model.gguf")
    assert again.norm.weight.dtype == dtype
    assert torch.equal(again.norm.weight, model.norm.weight.to(dtype))
    up = model.layers[1].ffn.up.weight.detach().numpy()
    wanted = gguf.unpack(kind, gguf.pack(kind, up), 64)
    assert torch.equal(again.layers[1].ffn.up.weight.float(), torch.from_numpy(wanted.copy()))


def test_rows_that_are_no_multiple_of_32_stay_f16(tmp_path):
    convert.write(tmp_path / "model.gguf", tiny_model(d_model=32, d_ff=48), "q4_0")
    kinds = {name: entry.kind for name, entry in gguf.read_header(tmp_path / "model.gguf").tensors.items()}
    assert kinds["blk.0.ffn_down.weight"] == "f16"
    assert kinds["blk.0.ffn_up.weight"] == "q4_0" and kinds["blk.0.attn_norm.weight"] == "f32"


def test_queries_and_keys_stand_in_the_order_of_llama_cpp_and_those_of_a_mixture_do_not(file, tmp_path):
    def stored(path: Path, name: str) -> np.ndarray:
        entry = gguf.read_header(path).tensors[name]
        return np.fromfile(path, "<f4", entry.nbytes // 4, offset=entry.offset).reshape(entry.shape)

    ours = minillada.load(file)[0].layers[0].attn.q.weight.detach().numpy()  # two heads of 16 rows
    theirs = stored(file, "blk.0.attn_q.weight")
    assert np.array_equal(theirs[:4], ours[[0, 8, 1, 9]]) and np.array_equal(theirs[16:18], ours[[16, 24]])
    mixture = golden("llada_moe")
    convert.write(tmp_path / "moe.gguf", mixture, "f32")
    ours = mixture.layers[0].attn.q.weight.detach().numpy()
    assert np.array_equal(stored(tmp_path / "moe.gguf", "blk.0.attn_q.weight"), ours)


def test_the_keys_are_those_that_llama_cpp_asks_for(file):
    keys = gguf.read_header(file).keys
    assert keys["general.architecture"] == "llada" and keys["diffusion.shift_logits"] is False
    for prefix in ("llada", "llama"):
        assert keys[f"{prefix}.block_count"] == 2 and keys[f"{prefix}.attention.causal"] is False
        assert keys[f"{prefix}.rope.freq_base"] == 500000.0 and keys[f"{prefix}.vocab_size"] == 16
    assert keys["tokenizer.ggml.mask_token_id"] == 15 and keys["tokenizer.ggml.model"] == "none"
    assert json.loads(keys["minillada.config"])["mask_id"] == 15


def test_a_file_of_others_is_read_by_its_keys(file, tmp_path):
    """Without our config, as llama.cpp's own converter writes it."""
    model, _ = minillada.load(file)
    other = tmp_path / "other.gguf"
    rewrite(file, other, lambda keys: [keys.pop(key) for key in list(keys) if key.startswith(("minillada", "llama."))])
    again, _ = minillada.load(other)
    assert again.config == model.config
    rewrite(file, other, lambda keys: [keys.pop(k) for k in list(keys) if k.startswith(("minillada", "tokenizer"))])
    with pytest.raises(BadInput, match="mask_id: expected one"):
        minillada.load(other)
    assert minillada.load(other, mask_id=7)[0].config.mask_id == 7


def rewrite(source: Path, target: Path, change) -> None:
    """Write the file again with other keys."""
    keys, tensors = gguf.read_header(source)
    keys = {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in keys.items()}
    change(keys)
    data = source.read_bytes()
    kinds = {name: (entry.kind, entry.shape) for name, entry in tensors.items()}
    gguf.write(target, keys, kinds, lambda name: [data[tensors[name].offset :][: tensors[name].nbytes]])


@pytest.mark.parametrize("kind", ["bpe", "bytes", "characters"])
def test_tokenizer_template_and_way_to_decode_travel_along(kind, tmp_path):
    text = ["the cat sat on the mat and the cat ran " * 20]
    makes = {"bpe": lambda: minillada.Tokenizer.bpe(text, 300), "bytes": minillada.Tokenizer.bytes,
             "characters": lambda: minillada.Tokenizer.characters(text)}  # fmt: skip
    tokenizer = makes[kind]()
    size = tokenizer.vocab_size + 5
    ids = {"mask_id": tokenizer.mask_id, "eos_id": tokenizer.eos_id, "pad_id": tokenizer.pad_id}
    home = tmp_path / "home"
    minillada.save(tiny_model(vocab_size=size, **ids), home, tokenizer)
    write_template(home, "{% for m in messages %}[BOS]{{ m.content }}{% endfor %}")
    (home / "generation_config.json").write_text('{"minillada": {"sampling": {"steps": 4}}}')
    convert.write(tmp_path / "model.gguf", minillada.load(home)[0], "q8_0", home=home)
    model, again = minillada.load(tmp_path / "model.gguf")
    assert again.to_json() == tokenizer.to_json() and model.config.vocab_size == size
    with convert.home_of(tmp_path / "model.gguf") as texts:
        asked = [{"role": "user", "content": "the cat"}]
        template = ChatTemplate.load(texts)
        assert template.own and template.encode_chat(asked) == ChatTemplate.load(home).encode_chat(asked)
        assert json.loads((texts / "generation_config.json").read_text())["minillada"]["sampling"] == {"steps": 4}
    keys = gguf.read_header(tmp_path / "model.gguf").keys
    if kind == "characters":
        assert keys["tokenizer.ggml.model"] == "none"
    else:
        assert keys["tokenizer.ggml.model"] == "gpt2" and keys["tokenizer.ggml.pre"] == "gpt-2"
        assert keys["tokenizer.ggml.tokens"][-1] == f"[PAD{size - 1}]" and len(keys["tokenizer.ggml.tokens"]) == size
        assert keys["tokenizer.ggml.token_type"][[0, 4, size - 1]].tolist() == [3, 1, 5]
        assert len(keys["tokenizer.ggml.merges"]) == size - 5 - 260


REFUSED = {
    "half-rotary": ({"rotary_dim": 4}, "rotary_dim"),
    "norms of queries without experts": ({"qk_norm": True}, "qk_norm"),
    "a router with a bias": ({"router": "sigmoid"}, "router"),
    "a dense layer among mixtures": ({"dense_layers": (0,)}, "dense_layers"),
    "an expert that all visit": ({"d_shared_expert": 8}, "d_shared_expert"),
    "a tied head with experts": ({"tie_head": True}, "tie_head"),
    "wide heads with experts": ({"d_head": 16}, "d_head"),
}


@pytest.mark.parametrize(("fields", "name"), REFUSED.values(), ids=REFUSED)
def test_what_llama_cpp_cannot_compute_is_refused_in_one_line(fields, name, tmp_path):
    experts = {"n_expert": 4, "n_expert_active": 2, "d_expert": 8, "qk_norm": True}
    fields = fields if name in ("rotary_dim", "qk_norm") else {**experts, **fields}
    with pytest.raises(BadInput, match=f"GGUF, {name}: expected .*; keep this model as safetensors"):
        convert.write(tmp_path / "model.gguf", tiny_model(**fields), "f32")
    assert not list(tmp_path.iterdir())


def test_numbers_that_a_kind_cannot_hold_are_refused_and_leave_no_file(tmp_path):
    model = tiny_model(d_model=32)
    model.layers[1].ffn.up.weight.data[3, 3] = 1e5
    with pytest.raises(BadInput, match=r"layers\.1\.ffn\.up\.weight: expected numbers up to 65504"):
        convert.write(tmp_path / "model.gguf", model, "f16")
    model.layers[1].ffn.up.weight.data[3, 3] = torch.nan
    with pytest.raises(BadInput, match="larger ones or NaN"):
        convert.write(tmp_path / "model.gguf", model, "q8_0")
    assert not list(tmp_path.iterdir())


# ---- a file from a stranger ------------------------------------------------------------------------------------------


def at(place: int, form: str, *values):
    """Overwrite a part of the file."""
    return lambda data: data[:place] + struct.pack(f"<{form}", *values) + data[place + struct.calcsize(f"<{form}") :]


def behind(name: str, skip: int, form: str, *values):
    """Overwrite what stands so many bytes behind a name in the header."""
    return lambda data: at(data.index(name.encode()) + len(name) + skip, form, *values)(data)


def swap(old: str, new: str, times: int = 1):
    return lambda data: data.replace(old.encode(), new.encode(), times)


LAYERS, WIDTH, ARCHITECTURE = "llada.block_count", "llada.embedding_length", "general.architecture"
TENSOR, CAUSAL = "blk.0.attn_q.weight", "llada.attention.causal"  # behind a tensor: u32 2, u64 32, u64 32, kind, place
DAMAGED = {
    "empty": (lambda data: b"", "which begins with"),
    "another format": (at(0, "4s", b"GGML"), "which begins with"),
    "four bytes": (lambda data: data[:4], "a header within 4 bytes"),
    "an old version": (at(4, "I", 1), "version 2 or 3"),
    "the other byte order": (at(4, ">I".strip("<>"), 3 << 24), "version 2 or 3"),
    "no tensors": (at(8, "Q", 0), "1 to 65,536 tensors"),
    "too many tensors": (at(8, "Q", 2**60), "1 to 65,536 tensors"),
    "one tensor more": (lambda data: at(8, "Q", struct.unpack_from("<Q", data, 8)[0] + 1)(data), "expected"),
    "too many keys": (at(16, "Q", 2**40), "at most 65,536 keys"),
    "one key less": (lambda data: at(16, "Q", struct.unpack_from("<Q", data, 16)[0] - 1)(data), "expected"),
    "an endless key": (at(24, "Q", 2**62), "a header within"),
    "not UTF-8": (at(32, "B", 0xFF), "UTF-8"),
    "an unknown type": (behind(LAYERS, 0, "I", 13), "a type of"),
    "a list of lists": (behind(ARCHITECTURE, 0, "IIQ", 9, 9, 1), "a type of"),
    "an endless list": (behind(ARCHITECTURE, 0, "IIQ", 9, 8, 2**50), "lists of at most"),
    "a bool that is neither": (behind(CAUSAL, 4, "B", 2), "0 or 1 for a bool"),
    "a key twice": (swap(LAYERS, "llama.block_count"), "every key once"),
    "a tensor twice": (swap(TENSOR, "blk.0.attn_k.weight"), "every tensor once"),
    "another tensor": (swap(TENSOR, "blk.0.attn_z.weight"), "expected those of"),
    "no sizes": (behind(TENSOR, 0, "I", 0), "1 to 4 sizes"),
    "many sizes": (behind(TENSOR, 0, "I", 5), "1 to 4 sizes"),
    "a size of nothing": (behind(TENSOR, 4, "Q", 0), "sizes of 1 to"),
    "a size without end": (behind(TENSOR, 4, "Q", 2**50), "sizes of 1 to"),
    "another size": (behind(TENSOR, 4, "QQ", 16, 64), "expected those of"),
    "an unknown kind": (behind(TENSOR, 20, "I", 99), "a kind of f32"),
    "rows of another multiple": (behind(TENSOR, 4, "QQI", 16, 64, 2), "a multiple of 32"),
    "another place": (behind(TENSOR, 24, "Q", 64), "to start at byte"),
    "cut in the header": (lambda data: data[:500], "a header within 500 bytes"),
    "cut in the tensors": (lambda data: data[:-100], "bytes"),
    "a rest": (lambda data: data + bytes(40), "bytes"),
    "no architecture": (swap(ARCHITECTURE, "general.architektur?"), "expected llada or llada-moe"),
    "another architecture": (swap("\x05\0\0\0\0\0\0\0llada", "\x05\0\0\0\0\0\0\0mamba"), "got 'mamba'"),
    "a key less": (swap(LAYERS, "other.block_count"), "expected the keys of its scheme"),
    "an unknown key": (
        swap(f"{CAUSAL}", "llada.attention.kausal"),
        "llama.attention.causal in .*: expected that of llada",
    ),
    "causal": (behind(CAUSAL, 4, "?", True), "attention.causal: expected False"),
    "of another type": (behind(LAYERS, 0, "If", 6, 2.0), "block_count|n_layer"),
    "other layers than the config": (behind(LAYERS, 4, "I", 3), "minillada.config .*: expected n_layer 3"),
    "an absurd width": (swap('"d_model": 32', '"d_model": 3_'), "minillada.config: expected JSON"),
    "shifted": (behind("diffusion.shift_logits", 4, "?", True), "shift_logits: expected False"),
    "a mask outside": (behind("tokenizer.ggml.mask_token_id", 4, "I", 99), "expected mask_id 99"),
}


@pytest.mark.parametrize(("damage", "line"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_costs_one_line(damage, line, file, monkeypatch):
    sound = file.read_bytes()
    file.write_bytes(damage(sound))
    assert file.read_bytes() != sound
    monkeypatch.setattr(checkpoint, "check_memory", lambda *_: pytest.fail("memory was taken"))
    for use in (minillada.load, checkpoint.check):
        start = time.monotonic()
        with pytest.raises((BadInput, BadLuck), match=line) as told:
            use(file)
        assert time.monotonic() - start < 2
        message = str(told.value)
        assert "\n" not in message and len(message) < 1500 and ": expected " in message and ";" in message


def test_what_is_no_file_is_named(tmp_path):
    with pytest.raises((BadInput, BadLuck), match="expected"):
        minillada.load(tmp_path / "nothing.gguf")
    (tmp_path / "folder.gguf").mkdir()
    with pytest.raises(BadInput, match="expected a regular file"):
        minillada.load(tmp_path / "folder.gguf")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.gguf")
        with pytest.raises(BadInput, match="expected a regular file"):
            minillada.load(tmp_path / "pipe.gguf")


def test_a_kind_that_is_not_unpacked_here_is_looked_at_but_not_loaded(file, tmp_path, monkeypatch):
    keys, tensors = gguf.read_header(file)
    kinds = {name: (entry.kind, entry.shape) for name, entry in tensors.items()}
    kinds["blk.1.ffn_down.weight"] = "q5_0", (32, 64)
    sizes = {name: gguf.size_of(*kind) for name, kind in kinds.items()}
    with monkeypatch.context() as patch:
        patch.setitem(gguf.KINDS, "q5_0", gguf.OTHERS["q5_0"])
        gguf.write(tmp_path / "other.gguf", keys, kinds, lambda name: [bytes(sizes[name])])
    assert "q5_0" in checkpoint.check(tmp_path / "other.gguf").dtypes
    with pytest.raises(BadInput, match=r"ffn_down\.weight: expected one of f32, .*got 'q5_0'; let load_8b"):
        minillada.load(tmp_path / "other.gguf")


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def command(monkeypatch, capsys):
    """command(*arguments) -> (exit code, the last line of stderr)."""

    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["gguf", *map(str, arguments)])
        try:
            run(main)
        except SystemExit as error:
            return error.code, capsys.readouterr().err.splitlines()[-1]
        return 0, capsys.readouterr().err.splitlines()[-1]

    return command


def test_the_command_writes_a_model_that_writes_the_same_text(command, tmp_path):
    home = write_random(tmp_path / "home")
    code, told = command(home, tmp_path / "model.gguf", "--type", "f32")
    assert code == 0 and "GB of f32" in told
    ours, tokenizer = minillada.load(home)
    theirs, _ = minillada.load(tmp_path / "model.gguf")
    config = SampleConfig(gen_len=16, steps=8, block_len=8)
    assert generate(ours, [tokenizer.encode("Hi")], config) == generate(theirs, [tokenizer.encode("Hi")], config)


def test_the_command_overwrites_nothing_and_says_what_it_needs(command, tmp_path):
    home = write_random(tmp_path / "home")
    made = tmp_path / "model.gguf"
    assert command(home, made)[0] == 0
    before = made.read_bytes()
    assert command(home, made) == (2, "error: out: expected a new file that ends in .gguf, got one that exists; "
                                   "choose another name")  # fmt: skip
    assert made.read_bytes() == before
    for arguments, line in [
        ((home, tmp_path / "model.bin"), "a new file that ends in .gguf"),
        ((made, tmp_path / "other.gguf"), "a model directory, got a GGUF file"),
        ((home, tmp_path / "other.gguf", "--type", "q3_k"), "type: expected one of f32"),
        ((GOLDEN / "llada_moe", tmp_path / "other.gguf"), "mask_id: expected one"),
    ]:
        code, told = command(*arguments)
        assert code == 2 and line in told
    assert command(GOLDEN / "llada_moe", tmp_path / "other.gguf", "--mask-id", 255)[0] == 0
    assert minillada.load(tmp_path / "other.gguf")[0].config.mask_id == 255


def test_a_flipped_bit_in_a_save_of_ours_is_not_converted(command, tmp_path):
    home = write_random(tmp_path / "home")
    weights = home / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-9] ^= 1
    weights.write_bytes(data)
    code, told = command(home, tmp_path / "model.gguf")
    assert code == 2 and "model.safetensors: expected sha256" in told and not (tmp_path / "model.gguf").exists()


def test_a_parameter_is_read_alone_from_every_layout():
    for name in EXPRESSED:
        report, model = checkpoint.check(GOLDEN / name, mask_id=255), golden(name)
        for ours, tensor in model.named_parameters():
            assert torch.equal(checkpoint.read_parameter(report, ours), tensor)
