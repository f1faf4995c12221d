"""A checkpoint is data from a stranger: each fault gets its own line, before memory is taken or time is lost."""

import json
import os
import random
import shutil
import socket
import struct
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from minillada.errors import BadInput, BadLuck
from minillada.model import LLaDA, ModelConfig
from minillada.weights import checkpoint

GOLDEN = Path(__file__).parent / "golden"
INDEX, SHARD = "model.safetensors.index.json", "model-00002-of-00003.safetensors"
TENSOR = "model.transformer.blocks.1.ff_out.weight"  # in that shard


@pytest.fixture
def home(tmp_path):
    """A golden checkpoint of three shards, ours to break."""
    return Path(shutil.copytree(GOLDEN / "llada_dense", tmp_path / "model", ignore=lambda *_: ["expected.safetensors"]))


def keys(**changes):
    """Change keys of config.json; ... removes one."""

    def damage(home: Path) -> None:
        raw = json.loads((home / "config.json").read_text()) | changes
        text = json.dumps({key: value for key, value in raw.items() if value is not ...})
        (home / "config.json").write_text(text)

    return damage


def text(content: str | bytes, name: str = "config.json"):
    content = content if isinstance(content, bytes) else content.encode()
    return lambda home: (home / name).write_bytes(content)


def index(**changes):
    """Change entries of the weight_map."""

    def damage(home: Path) -> None:
        found = json.loads((home / INDEX).read_text())
        found["weight_map"] = {k: v for k, v in (found["weight_map"] | changes).items() if v is not ...}
        (home / INDEX).write_text(json.dumps(found))

    return damage


def header(change):
    """Change the parsed header of the second shard, or give the text of a new one."""

    def damage(home: Path) -> None:
        data = (home / SHARD).read_bytes()
        length = struct.unpack("<Q", data[:8])[0]
        found = json.loads(data[8 : 8 + length])
        new = change(found)
        new = new if isinstance(new, bytes) else json.dumps(found if new is None else new).encode()
        (home / SHARD).write_bytes(struct.pack("<Q", len(new)) + new + data[8 + length :])

    return damage


def entry(**changes):
    return header(lambda found: found[TENSOR].update(changes))


def tensors(change):
    """Change what the second shard holds, in a file that is sound."""

    def damage(home: Path) -> None:
        found = load_file(home / SHARD)
        change(found)
        save_file(found, home / SHARD)

    return damage


def replaced(name: str, make):
    """Put something else in the place of a file."""

    def damage(home: Path) -> None:
        os.replace(home / name, home.parent / "elsewhere")
        make(home / name)

    return damage


def in_turn(*damages):
    return lambda home: [damage(home) for damage in damages]


def only_pickle(home: Path) -> None:
    for path in home.glob("*.safetensors*"):
        path.unlink()
    (home / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n.")


def sized(n: int):
    return lambda home: (home / SHARD).write_bytes((home / SHARD).read_bytes()[:n])


def longer(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"x")


def long_header(home: Path) -> None:
    with open(home / SHARD, "wb") as f:  # sparse
        f.write(struct.pack("<Q", (10 << 20) + 1))
        f.truncate(20 << 20)


def make_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # names of sockets are short
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(path.name)
    os.chdir(here)


LAYERS = "model.transformer.blocks."
WIDE = {"d_model": 8192, "n_heads": 64, "n_kv_heads": 64, "mlp_hidden_size": 32768, "n_layers": 100}

FAULTS = {
    # config.json
    "no config": (lambda home: (home / "config.json").unlink(), "config.json.*expected a file, got nothing"),
    "empty config": (text(""), "config.json: expected JSON"),
    "half a config": (text('{"d_model": 32,'), "config.json: expected JSON"),
    "a config that is a list": (text("[1]"), "config.json: expected a JSON object, got list"),
    "UTF-16": (text('{"d_model": 32}'.encode("utf-16")), "config.json: expected JSON in UTF-8"),
    "NaN": (text('{"rope_theta": NaN}'), "config.json: .* got NaN"),
    "a key twice": (text('{"d_model": 32, "d_model": 64}'), "config.json: .* occurs twice"),
    "nested too deep": (text("[" * 200_000), "config.json: expected JSON"),
    "over 1 MB": (text(b" " * (1 << 20) + b"{}"), "config.json: expected at most 1,048,576 bytes, got 1,048,578"),
    "a number of 5000 digits": (text('{"d_model": ' + "9" * 5000 + "}"), "config.json: expected JSON"),
    "no scheme": (text('{"hidden": 3}'), "config.json: expected the keys of one scheme"),
    "a layer count that is text": (keys(n_layers="3"), "n_layer in config.json: expected int, got '3'"),
    "a layer count that is true": (keys(n_layers=True), "n_layer in config.json: expected int, got True"),
    "a layer count with a fraction": (keys(n_layers=3.0), "n_layer in config.json: expected int, got 3.0"),
    "a flag that is a number": (keys(weight_tying=1), "tie_head in config.json: expected bool, got 1"),
    "an id that is a list of none": (keys(eos_token_id=[]), r"eos_id in config.json: .* got \[\]"),
    "an id that is a list of texts": (keys(eos_token_id=["254", 253]), r"eos_id in config.json: .* got '254'"),
    "no layers": (keys(n_layers=0), "n_layer: expected a whole number from 1"),
    "negative heads": (keys(n_heads=-4), "n_head: expected a whole number from 1"),
    "no vocabulary": (keys(vocab_size=0), "vocab_size: expected a whole number from 1"),
    "an absurd width": (keys(d_model=10**12), "d_model: expected a whole number from 1 to"),
    "absurdly many layers": (keys(n_layers=10**9), "n_layer: expected a whole number from 1 to"),
    "more layers than tensors": (keys(n_layers=1000), "tensors: expected those of 1000 layers, got 30"),
    "an absurd vocabulary": (keys(embedding_size=10**15), "embedding_size: expected a whole number"),
    "heads that do not divide the width": (
        keys(n_heads=5, n_kv_heads=5),
        "n_head: expected a divisor of the width 32, got 5",
    ),
    "heads that do not share": (keys(n_kv_heads=3), "n_kv_head: expected a divisor of n_head 4, got 3"),
    "eps of zero": (keys(rms_norm_eps=0), "norm_eps: expected a finite number > 0"),
    "an infinite theta": (text('{"d_model":1,"n_heads":1,"n_layers":1,"rope_theta":1e999}'), "expected"),
    "a negative theta": (keys(rope_theta=-1.0), "rope_theta: expected a finite number > 0"),
    "a mask outside the vocabulary": (
        keys(mask_token_id=256),
        "mask_id: expected a whole number from 0 to 255, got 256",
    ),
    "a mask that pads": (keys(pad_token_id=255), "pad_id: expected an id other than mask_id 255"),
    "no mask at all": (keys(mask_token_id=None), "mask_id: .* got neither; give mask_id"),
    "a missing key": (keys(rope_theta=...), "config.json: expected the keys of its scheme, got no rope_theta"),
    "alibi": (keys(alibi=True), "alibi: expected False, all that is implemented here, got True"),
    "clipping": (keys(clip_qkv=8.0), "clip_qkv: expected None, all that is implemented here, got 8.0"),
    "scaled logits": (keys(scale_logits=True), "scale_logits: expected False"),
    "another activation": (keys(activation_type="gelu"), "activation_type: expected 'silu'"),
    "no rotation": (keys(rope=False), "rope: expected True"),
    "another norm": (keys(layer_norm_type="default"), "layer_norm_type: expected 'rms'"),
    "true written as 1": (keys(rope=1), "rope: expected True, .* got 1"),
    "an unknown key": (keys(sliding_window=512), "config.json: .* got 'sliding_window'; remove one only if"),
    "quantised": (keys(quantization_config={"bits": 4}), "config.json: .* got 'quantization_config'"),
    # the index
    "an index that is no object": (text("[]", INDEX), "index.json: expected a JSON object, got list"),
    "an index without a map": (text('{"metadata": {}}', INDEX), "weight_map in .*: expected an object, got None"),
    "an empty map": (text('{"weight_map": {}}', INDEX), "weight_map in .*: expected an object"),
    "a map to a number": (index(**{TENSOR: 2}), "weight_map in .*: expected names that end in .safetensors, got 2"),
    "a map to a pickle": (index(**{TENSOR: "model.bin"}), "expected names that end in .safetensors, got 'model.bin'"),
    "an absolute path": (index(**{TENSOR: "/etc/x.safetensors"}), "expected the plain name of a file"),
    "a path upwards": (index(**{TENSOR: "../x.safetensors"}), "expected the plain name of a file"),
    "a backslash": (index(**{TENSOR: "..\\x.safetensors"}), "expected the plain name of a file"),
    "a drive": (index(**{TENSOR: "C:x.safetensors"}), "expected the plain name of a file"),
    "a null character": (index(**{TENSOR: "x\0.safetensors"}), "expected a readable file"),
    "a shard that is missing": (lambda home: (home / SHARD).unlink(), SHARD + ".*expected a file, got nothing"),
    "a tensor in another file": (index(**{TENSOR: "model-00001-of-00003.safetensors"}), "got another place for"),
    "a tensor not in the index": (index(**{TENSOR: ...}), "got another place for '" + TENSOR),
    "a tensor only in the index": (index(ghost=SHARD), "got another place for 'ghost'"),
    "an index over 20 MB": (text(b" " * (20 << 20) + b"{}", INDEX), "expected at most 20,971,520 bytes"),
    # what a name leads to
    "a directory for a file": (replaced(SHARD, Path.mkdir), SHARD + ".*expected a regular file"),
    "only pickle": (only_pickle, r"weights: .* \(?pytorch_model.bin\)?: pickle is not supported"),
    "nothing": (lambda home: [p.unlink() for p in home.glob("*.safetensors*")], "weights: expected .* got none"),
    # headers
    "an empty shard": (sized(0), SHARD + ": expected a header"),
    "a shard of 7 bytes": (sized(7), SHARD + ": expected a header"),
    "half a header": (sized(500), SHARD + ": expected a header of 1 to 492 bytes"),
    "a header over 10 MB": (long_header, SHARD + ": expected a header of 1 to 10,485,760 bytes"),
    "a truncated shard": (lambda home: sized((home / SHARD).stat().st_size - 1)(home), SHARD + ": expected .* bytes"),
    "bytes behind the data": (lambda home: longer(home / SHARD), SHARD + ": expected .* bytes"),
    "a header that is no JSON": (header(lambda _: b"{'a': 1}"), f"header of {SHARD}: expected JSON"),
    "a header of no tensors": (header(lambda _: {}), "expected at least one tensor"),
    "a tensor twice": (header(lambda h: json.dumps(h).encode()[:-1] + b',"' + TENSOR.encode() + b'": {}}'), "twice"),
    "an entry that is a list": (header(lambda h: h.update({TENSOR: []})), "expected dtype, shape and data_offsets"),
    "an entry with more": (entry(strides=[1]), "expected dtype, shape and data_offsets"),
    "a dtype of integers": (entry(dtype="I32"), "expected a dtype of F64, F32, F16, BF16, got 'I32'"),
    "a dtype that is a list": (entry(dtype=[]), "expected a dtype of"),
    "a negative shape": (entry(shape=[-32, -80]), "expected a shape of 1 to 8 whole numbers"),
    "a shape of truths": (entry(shape=[True, True]), "expected a shape of 1 to 8 whole numbers"),
    "a shape that overflows": (entry(shape=[2**62, 2**62]), "expected a shape of 1 to 8 whole numbers"),
    "a shape without end": (entry(shape=[1] * 1000), "expected a shape of 1 to 8 whole numbers"),
    "offsets of text": (entry(data_offsets=["0", "1"]), "expected two offsets"),
    "offsets beyond the file": (entry(data_offsets=[10**9, 10**9 + 10240]), "expected to start at byte"),
    "offsets the wrong way round": (entry(data_offsets=[10240, 0]), "expected 10240 bytes"),
    "offsets that overlap": (entry(data_offsets=[0, 10240]), "expected to start at byte"),
    # tensors that do not fit the config
    "a tensor missing": (
        in_turn(tensors(lambda t: t.pop(TENSOR)), index(**{TENSOR: ...})),
        rf"tensors: .* '{TENSOR}' \(expected \[32, 80\], found none\)",
    ),
    "a tensor too many": (
        in_turn(tensors(lambda t: t.update(extra=torch.zeros(3))), index(extra=SHARD)),
        r"'extra' \(expected none, found \[3\]\)",
    ),
    "a tensor of another shape": (
        tensors(lambda t: t.update({TENSOR: torch.zeros(80, 32)})),
        rf"'{TENSOR}' \(expected \[32, 80\], found \[80, 32\]\)",
    ),
    "a tensor of another dtype": (
        tensors(lambda t: t.update({TENSOR: torch.zeros(32, 80).bfloat16()})),
        r"\(expected torch.float32, found torch.bfloat16\)",
    ),
    "a tensor in two files": (
        tensors(lambda t: t.update({"model.transformer.ln_f.weight": torch.zeros(32)})),
        "'model.transformer.ln_f.weight': expected in one file, got model-00001.* and model-00002",
    ),
    "a larger model than the files": (keys(**WIDE), "tensors: expected those of 100 layers"),
    "one layer too many": (keys(n_layers=4), rf"'{LAYERS}3.attn_norm.weight' \(expected \[32\], found none\) and|more"),
    "one layer too few": (keys(n_layers=2), rf"'{LAYERS}2.* \(expected none, found"),
    "a wrong width": (keys(mlp_hidden_size=81), r"\(expected \[32, 81\], found \[32, 80\]\)"),
    "an untied head that is not there": (keys(weight_tying=True), "ff_out.weight' .expected none"),
    # what only a save of ours can have
    "a foreign manifest": (text('{"name": "app"}', "manifest.json"), "manifest.json: expected"),
    "a manifest that leads away": (
        text('{"files": {"../elsewhere": {"bytes": 1, "sha256": ""}}}', "manifest.json"),
        "expected the plain name of a file",
    ),
    "a field that does not exist": (text('{"n_wheels": 4}', "minillada.json"), "expected fields of the model"),
    "a field of the wrong type": (text('{"d_head": "8"}', "minillada.json"), "d_head in minillada.json: expected"),
    "a negative expert": (text('{"n_expert": -1}', "minillada.json"), "n_expert: expected a whole number"),
    "layers that are text": (text('{"dense_layers": ["a"]}', "minillada.json"), "dense_layers in minillada.json"),
    "a field the scheme has no name for": (text('{"qk_norm": true}', "minillada.json"), "a name for it in the scheme"),
    "an empty tokenizer": (text("", "tokenizer.json"), "tokenizer.json: expected"),
}
if sys.platform != "win32":
    FAULTS |= {
        "a FIFO": (replaced("config.json", os.mkfifo), "config.json.*expected a regular file, got p"),
        "a socket": (replaced(SHARD, make_socket), SHARD + ".*expected a regular file, got s"),
        "a device": (replaced(SHARD, lambda path: path.symlink_to("/dev/zero")), "got a link that leaves it"),
        "a link that leaves": (replaced(SHARD, lambda path: path.symlink_to("../elsewhere")), "a link that leaves it"),
        "a config link that leaves": (
            replaced("config.json", lambda path: path.symlink_to("../elsewhere")),
            "a link that leaves it",
        ),
        "a loop of links": (replaced(SHARD, lambda path: path.symlink_to(SHARD)), SHARD + ".*expected a readable file"),
        "a link to nothing": (replaced(SHARD, lambda path: path.symlink_to("gone")), SHARD + ".*got nothing"),
        "a tokenizer link that leaves": (
            lambda home: (home / "tokenizer.json").symlink_to("/etc/passwd"),
            "tokenizer.json.*a link that leaves it",
        ),
    }


@pytest.mark.parametrize(("damage", "line"), FAULTS.values(), ids=FAULTS)
def test_a_fault_has_its_own_line(damage, line, home, monkeypatch):
    damage(home)
    monkeypatch.setattr(checkpoint, "check_memory", lambda *_: pytest.fail("memory was taken"))
    for use in (checkpoint.load, checkpoint.check):
        start = time.monotonic()
        with pytest.raises((BadInput, BadLuck), match=line) as told:
            use(home)
        assert time.monotonic() - start < 2
        message = str(told.value)
        assert "\n" not in message and len(message) < 1500 and ": expected " in message and ";" in message


MIXTURE_FAULTS = {
    "llada_moe": {
        "moe_router_enable_expert_bias": True, "moe_router_score_function": "sigmoid", "norm_topk_prob": True,
        "rope_scaling": {"type": "linear"}, "routed_scaling_factor": 2.5, "shared_expert_intermediate_size": 8,
        "router_num_group": 2, "clip_qkv": 1.0, "hidden_act": "relu", "moe_layer_freq": [1, 1],
        "partial_rotary_factor": 2, "num_experts_per_tok": 9, "num_experts": 10**9, "expert_intermediate_size": 0,
    },
    "llada2_moe": {
        "score_function": "softmax", "router_dtype": "bf16", "use_bias": True, "norm_head": True, "rotary_dim": 16,
        "first_k_dense_replace": 4, "num_shared_experts": -1, "n_group": 3, "topk_group": 5, "use_rmsnorm": False,
        "use_sliding_window": True, "moe_router_enable_expert_bias": False, "num_experts": 8000,
        "partial_rotary_factor": "half", "num_experts_per_tok": "4", "head_dim": 0,
    },
}  # fmt: skip


@pytest.mark.parametrize(("name", "key"), [(name, key) for name, found in MIXTURE_FAULTS.items() for key in found])
def test_a_flag_of_the_mixtures_that_is_not_implemented_is_refused(name, key, tmp_path):
    home = Path(shutil.copytree(GOLDEN / name, tmp_path / "model"))
    keys(**{key: MIXTURE_FAULTS[name][key]})(home)
    with pytest.raises(BadInput):
        checkpoint.load(home, mask_id=255)


@pytest.mark.parametrize("path", ["", "no/such/place/here", "./nothing", "C:\\model", "../x", "a b"])
def test_a_path_that_is_not_there_is_named(path):
    with pytest.raises((BadInput, BadLuck), match="expected a directory") as told:
        checkpoint.load(path)
    assert "\n" not in str(told.value)


def test_a_file_in_place_of_a_directory_is_refused(home):
    with pytest.raises(BadInput, match=r"expected a directory with config\.json"):
        checkpoint.load(home / SHARD)


def test_a_device_that_is_not_there_is_refused(home):
    for device in ("cuda:99", "toaster"):
        with pytest.raises(BadInput, match="device: expected one of this machine"):
            checkpoint.load(home, device=device)


def test_a_dtype_of_integers_is_refused(home):
    with pytest.raises(BadInput, match="dtype: expected a torch floating dtype"):
        checkpoint.load(home, dtype=torch.int8)


@pytest.mark.skipif(sys.platform == "win32", reason="the hub's cache has no links there")
def test_the_links_of_the_hub_cache_work_and_others_like_them_do_not(home, tmp_path):
    cache = tmp_path / "hub" / "models--a--b"
    (cache / "blobs").mkdir(parents=True)
    snapshot = cache / "snapshots" / "c0ffee"
    snapshot.mkdir(parents=True)
    for i, path in enumerate(home.iterdir()):
        shutil.copy(path, cache / "blobs" / str(i))
        (snapshot / path.name).symlink_to(f"../../blobs/{i}")
    assert checkpoint.load(snapshot)[0].config.n_layer == 3
    (tmp_path / "linked").symlink_to(snapshot)  # a link to the directory itself is the user's own
    assert checkpoint.load(tmp_path / "linked")[0].config.n_layer == 3
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to(home / "config.json")
    with pytest.raises(BadInput, match="a link that leaves it"):
        checkpoint.load(snapshot)
    plain = tmp_path / "plain" / "c0ffee"  # the same links, but not in a snapshots directory
    plain.parent.mkdir()
    shutil.copytree(snapshot, plain, symlinks=True)
    with pytest.raises((BadInput, BadLuck)):
        checkpoint.load(plain)


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """A small save of ours in several shards, and its files."""
    home = tmp_path_factory.mktemp("ours") / "model"
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=12, mask_id=11, n_layer=1, n_head=2, d_model=8, d_ff=8, qk_norm=True)
    checkpoint.save(LLaDA(config), home, shard_bytes=2000)
    files = {path: path.read_bytes() for path in sorted(home.iterdir())}
    assert len(files) >= 6 and sum(map(len, files.values())) < 16_000  # shards, index, config, side, manifest
    return home, files


def is_detected(home: Path, path: Path, data: bytes, original: bytes) -> bool:
    try:
        path.write_bytes(data)
        checkpoint.load(home)
    except (BadInput, BadLuck) as error:
        return "\n" not in str(error)
    finally:
        path.write_bytes(original)
    return False


def truncations_are_detected(ours, step: int) -> None:
    home, files = ours
    for path, data in files.items():
        for n in [*range(0, len(data), step), len(data) - 1]:
            assert is_detected(home, path, data[:n], data), (path.name, n)
    checkpoint.load(home)


def flips_are_detected(ours, count: int) -> None:
    home, files = ours
    rng = random.Random(0)
    places = [(path, i) for path, data in files.items() for i in range(len(data))]
    for path, i in rng.sample(places, min(count, len(places))):
        data = bytearray(files[path])
        data[i] ^= 1 << rng.randrange(8)
        assert is_detected(home, path, bytes(data), files[path]), (path.name, i)
    checkpoint.load(home)


def test_a_truncated_save_of_ours_is_detected(ours):
    truncations_are_detected(ours, step=17)


def test_a_flipped_bit_in_a_save_of_ours_is_detected(ours):
    flips_are_detected(ours, 200)


@pytest.mark.soak
def test_every_truncation_and_a_thousand_flips_are_detected(ours):
    truncations_are_detected(ours, step=1)
    flips_are_detected(ours, 1000)


@settings(max_examples=150, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_mutated_config_or_header_gives_only_our_errors(data, tmp_path_factory):
    home = tmp_path_factory.mktemp("fuzz") / "model"
    shutil.copytree(GOLDEN / data.draw(st.sampled_from(["llada_dense", "llada2_moe", "llada_moe"])), home)
    value = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
        max_leaves=4,
    )
    path = home / "config.json"
    raw = json.loads(path.read_text())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.sampled_from(sorted(raw)))] = data.draw(value)
    path.write_text(json.dumps(raw))
    if shards := sorted(home.glob("model*.safetensors")):
        content = bytearray(shards[0].read_bytes())
        for _ in range(data.draw(st.integers(0, 3))):
            content[data.draw(st.integers(0, 2000))] = data.draw(st.integers(0, 255))
        shards[0].write_bytes(content)
    try:
        checkpoint.load(home, mask_id=255)
    except (BadInput, BadLuck) as error:
        assert "\n" not in str(error)
    finally:
        shutil.rmtree(home)
