"""llama.cpp behind the same sampler: with the package the real one, without it a stand-in that evaluates the module."""

import importlib.util
import io
import json
import runpy
import sys
from pathlib import Path

import pytest
import stand_in
import torch
from oracles import GOLDEN, tiny_model
from safetensors.torch import load_file
from talkers import write_talker

import minillada
from minillada.commands.cli import run
from minillada.decoding import llama_cpp
from minillada.decoding.llama_cpp import LlamaCpp
from minillada.errors import BadInput, BadLuck
from minillada.model import block_causal
from minillada.sampler import Canvas, SampleConfig, generate, stream
from minillada.strategies import Ask
from minillada.weights import convert

ROOT = Path(__file__).parents[1]
EXPRESSED = ["llada_dense", "llada_gqa_tied", "llada_qkv_bias", "llada_moe"]
CASES = json.loads((GOLDEN / "sampler_expected.json").read_text())["cases"]
THERE = importlib.util.find_spec("llama_cpp") is not None
ENGINES = ["stand-in", pytest.param("llama.cpp", marks=pytest.mark.skipif(not THERE, reason="it is not installed"))]
CLOSE = {"rtol": 0, "atol": 5e-5}


@pytest.fixture(params=ENGINES)
def engine(request, monkeypatch):
    if request.param == "stand-in":
        monkeypatch.setitem(sys.modules, "llama_cpp", stand_in)
        monkeypatch.setattr(llama_cpp, "CALLBACKS", [])
    return request.param


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """made(name, kind) -> (the module, its GGUF file); of a golden checkpoint, or the shipped `tales`."""
    folder, found = tmp_path_factory.mktemp("gguf"), {}

    def made(name="llada_dense", kind="f32"):
        if (name, kind) not in found:
            path = folder / f"{name}-{kind}.gguf"
            model = minillada.load(name)[0] if name == "tales" else minillada.load(GOLDEN / name, mask_id=255)[0]
            convert.write(path, model, kind)
            found[name, kind] = model, path
        return found[name, kind]

    return made


# ---- the same logits, the same tokens --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXPRESSED)
def test_a_golden_checkpoint_answers_like_the_reference_code(name, made, engine):
    expected = load_file(GOLDEN / name / "expected.safetensors")
    predict, valid = LlamaCpp(made(name)[1]), expected["attention_mask"].bool()
    assert torch.allclose(predict.logits(expected["input_ids"]), expected["logits"], **CLOSE)
    masked, wanted = predict.logits(expected["input_ids"], valid), expected["logits_with_attention_mask"]
    assert torch.allclose(masked[valid], wanted[valid], **CLOSE) and not masked[~valid].any()


def test_the_official_samplers_outputs_are_reproduced_token_for_token(made, engine):
    predict = LlamaCpp(made()[1])
    for case in CASES:
        kwargs, canvas = case["kwargs"], torch.tensor(case["prompt"])
        length = kwargs["gen_length"]
        holes = torch.full((len(canvas), length), 255)
        valid = torch.cat([torch.tensor(case["attention_mask"]).bool(), torch.ones_like(holes, dtype=torch.bool)], 1)
        config = SampleConfig(
            gen_len=length,
            steps=kwargs["steps"],
            block_len=kwargs["block_length"],
            cfg_scale=kwargs.get("cfg_scale", 0.0),
            ban_eos=kwargs.get("logits_eos_inf", False),
            stop_at_eos=False,
        )
        *_, step = stream(predict, Canvas(torch.cat([canvas, holes], 1), valid), config)
        assert step.x.tolist() == case["output"], kwargs


SETTINGS = [
    {}, {"steps": 8}, {"steps": 4, "block_len": 16}, {"remasking": "random"}, {"remasking": "margin"},
    {"remasking": "entropy"}, {"commit": "threshold:0.3"}, {"commit": "factor:1"}, {"commit": "entropy-bound:0.5"},
    {"commit": "klass:0.3,0.5"}, {"commit": "ancestral", "temperature": 1.0},
    {"commit": "first-hitting", "temperature": 1.0}, {"temperature": 0.7, "remasking": "random"},
    {"temperature": 0.7}, {"temperature": 1.0, "top_p": 0.8}, {"temperature": 1.0, "top_k": 5},
    {"revise": "remdm-cap:0.1", "temperature": 0.7}, {"revise": "remdm-rescale:0.1"}, {"revise": "remdm-conf"},
    {"revise": "random-remask"}, {"cfg_scale": 1.5}, {"cfg_scale": 0.5, "temperature": 0.7, "steps": 8},
    {"cache": "prefix"}, {"cache": "prefix", "steps": 8, "commit": "threshold:0.3"},
    {"cache": "prefix", "cfg_scale": 1.0}, {"cache": "prefix", "remasking": "random", "temperature": 0.7},
    {"ban_eos": True}, {"defer_eos": True}, {"banned_ids": (17, 154)},
]  # fmt: skip
PROMPTS = [[94, 184, 178, 164, 102, 38, 204, 17, 120], [221, 114, 173], [200, 234, 200, 79, 53, 1]]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_every_way_to_decode_gives_the_modules_tokens_single_and_batched(setting, made, engine):
    module, path = made()
    predict, config = LlamaCpp(path), SampleConfig(**{"gen_len": 16, "steps": 16, "block_len": 8, **setting})
    for prompts in (PROMPTS[:1], PROMPTS):
        assert generate(predict, prompts, config, seed=3) == generate(module, prompts, config, seed=3)


def test_a_mixture_decodes_like_the_module(made, engine):
    module, path = made("llada_moe")
    predict = LlamaCpp(path)
    for setting in ({}, {"cfg_scale": 1.0, "steps": 8}, {"temperature": 0.7, "remasking": "random"}):
        config = SampleConfig(**{"gen_len": 16, "steps": 16, "block_len": 8, **setting})
        assert generate(predict, PROMPTS, config) == generate(module, PROMPTS, config)


def test_a_model_trained_with_its_own_bpe_tells_the_same_tale(made, engine):
    module, path = made("tales")
    config = SampleConfig(gen_len=48, steps=24, block_len=16, temperature=0.5, remasking="random")
    assert generate(LlamaCpp(path), [[1], [1, 40, 50]], config) == generate(module, [[1], [1, 40, 50]], config)


def test_steps_have_all_that_a_viewer_needs(made, engine):
    module, path = made()
    config = SampleConfig(gen_len=8, steps=4, block_len=8)
    ours, theirs = (
        list(stream(model, Canvas.continuation(PROMPTS, 8, module.config), config, rivals=3))
        for model in (module, LlamaCpp(path))
    )
    for one, other in zip(ours, theirs, strict=True):
        assert torch.allclose(one.probability, other.probability, equal_nan=True, **CLOSE)
        assert torch.equal(one.rivals[0], other.rivals[0]) and torch.allclose(one.rivals[1], other.rivals[1], **CLOSE)


def test_half_precision_agrees_with_the_module_on_every_likeliest_token(made, engine):
    _, path = made(kind="f16")
    module, _ = minillada.load(path, dtype=torch.float32)
    tokens = torch.randint(0, 250, (4, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = module(tokens)
    assert torch.equal(LlamaCpp(path).logits(tokens).argmax(-1), logits.argmax(-1))


@pytest.mark.parametrize("kind", ["bf16", "q8_0", "q4_0"])
def test_few_bits_give_nearly_what_the_module_makes_of_the_same_file(kind, made, engine):
    _, path = made("tales", kind)
    module, _ = minillada.load(path, dtype=torch.float32)
    tokens = torch.randint(4, 1000, (2, 60), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        p = module(tokens).softmax(-1)
    assert (LlamaCpp(path).logits(tokens).softmax(-1) - p).abs().max() < 0.1


# ---- what it remembers -----------------------------------------------------------------------------------------------


def test_the_prefix_cache_has_the_modules_logits(made, engine):
    """With padding in front, and in a window after another."""
    module, path = made()
    canvas = Canvas.continuation(PROMPTS, 16, module.config)
    config = SampleConfig(gen_len=16, steps=16, block_len=8, cache="prefix")
    pairs = zip(stream(LlamaCpp(path), canvas, config), stream(module, canvas, config), strict=True)
    for theirs, ours in pairs:
        assert torch.allclose(theirs.probability, ours.probability, equal_nan=True, **CLOSE)


def test_another_stream_in_between_is_noticed(made, engine):
    module, path = made()
    predict, config = LlamaCpp(path), SampleConfig(gen_len=8, steps=8, block_len=8, cache="prefix")
    canvas = Canvas.continuation(PROMPTS, 8, module.config)
    first = stream(predict, canvas, config)
    next(first)
    next(stream(predict, canvas, config))
    with pytest.raises(BadInput, match="the canvas of the evaluation before, got another"):
        next(first)


def test_one_predictor_serves_canvases_of_any_size(made, engine):
    module, path = made()
    predict = LlamaCpp(path)
    for n_row, length in ((1, 5), (3, 40), (1, 4), (9, 100)):
        tokens = torch.randint(0, 250, (n_row, length), generator=torch.Generator().manual_seed(length))
        with torch.no_grad():
            assert torch.allclose(predict.logits(tokens), module(tokens), **CLOSE)


def test_places_may_be_asked_in_any_order(made, engine):
    module, path = made()
    tokens = torch.randint(0, 250, (2, 12), generator=torch.Generator().manual_seed(0))
    where = torch.tensor([1, 0, 1]), torch.tensor([7, 3, 2])
    ask = Ask(tokens, where, slice(0, 12), torch.arange(2))
    with torch.no_grad():
        assert torch.allclose(LlamaCpp(path)(ask), module(tokens)[where], **CLOSE)


# ---- block models ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def block_model(tmp_path_factory):
    """A random block model, blocks of 4, as the module and as a GGUF file."""
    model = tiny_model(d_model=32, d_ff=64, block=4)
    path = tmp_path_factory.mktemp("gguf") / "blocks.gguf"
    convert.write(path, model, "f32")
    return model, path


@pytest.mark.parametrize(
    "setting",
    [
        {}, {"cache": "block"}, {"cache": "block", "steps": 8}, {"commit": "threshold:0.3"}, {"cfg_scale": 1.0},
        {"temperature": 0.7, "remasking": "random"}, {"block": 8, "block_len": 8}, {"block": 0, "cache": "prefix"},
    ],
    ids=str,
)  # fmt: skip
def test_a_block_model_decodes_like_the_module(setting, block_model, engine):
    module, path = block_model
    predict, config = LlamaCpp(path), SampleConfig(**{"gen_len": 16, "steps": 16, "block_len": 4, **setting})
    assert predict.config.block == 4
    for prompts in ([[1, 2, 3, 4, 5]], [[1, 2, 3, 4, 5], [7], [3] * 9]):
        assert generate(predict, prompts, config, seed=1) == generate(module, prompts, config, seed=1)


def test_a_block_model_sees_its_own_block_and_those_before(block_model, engine):
    module, path = block_model
    tokens = torch.randint(0, 13, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = module(tokens, block_causal(torch.arange(12) // 4))
    assert torch.allclose(LlamaCpp(path).logits(tokens), wanted, **CLOSE)


def test_finished_blocks_are_not_evaluated_again(block_model, engine, monkeypatch):
    module, path = block_model
    predict, sizes = LlamaCpp(path), []
    decode = predict.decode
    monkeypatch.setattr(predict, "decode", lambda tokens, *more: (sizes.append(len(tokens)), decode(tokens, *more)))
    config = SampleConfig(gen_len=8, steps=8, block_len=4)
    for _ in stream(predict, Canvas.continuation([[1] * 8], 8, module.config), config):
        pass
    assert sizes == [4] * 11  # the prompt's two blocks, a block four times, it once more, the next one four times


# ---- the scripts -----------------------------------------------------------------------------------------------------

SCRIPTS = {script: runpy.run_path(str(ROOT / script))["main"] for script in ("load_8b.py", "sample.py")}


@pytest.fixture
def call(monkeypatch, capsys):
    """call(script, *arguments, typed=text) -> (exit code, standard output, standard error)."""

    def call(script, *arguments, typed=""):
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        code = 0
        try:
            run(SCRIPTS[script])
        except SystemExit as error:
            code = error.code
        return code, *capsys.readouterr()

    return call


@pytest.fixture
def talker(tmp_path):
    """A model directory with a tokenizer for its ids, and its GGUF file."""
    home = write_talker(tmp_path / "home")
    convert.write(tmp_path / "model.gguf", minillada.load(home)[0], "f32", home=home)
    return home, tmp_path / "model.gguf"


QUICK = ["--gen-len", "16", "--device", "cpu", "--quiet"]


def test_load_8b_runs_a_file_on_llama_cpp_and_answers_as_from_the_directory(call, talker, engine, tmp_path):
    home, file = talker
    for asked in (["--prompt", "Hello"], ["--fill", "a[MASK][MASK]b"], ["--prompt", "Hi", "--cfg-scale", "1"]):
        quick = QUICK[2:] if asked[0] == "--fill" else QUICK
        code, out, err = call("load_8b.py", file, *asked, *quick, "--threads", 1)
        assert (code, out) == (0, call("load_8b.py", home, *asked, *quick)[1]), err
        assert "llama.cpp computes, in 1 threads" in err
    chats = [call("load_8b.py", path, "--chat", *QUICK, typed="Hi\nand?\n") for path in talker]
    assert chats[0][:2] == chats[1][:2] and chats[0][1]
    (tmp_path / "prompts.txt").write_text("a\nbb\nccc\n")
    many = [call("load_8b.py", path, "--prompts", tmp_path / "prompts.txt", *QUICK) for path in talker]
    assert many[0][:2] == many[1][:2] and many[0][1].count("answer") == 3


def test_load_8b_shows_the_steps_of_llama_cpp_on_a_page(call, talker, engine, tmp_path):
    code, _, err = call("load_8b.py", talker[1], "--prompt", "Hi", *QUICK, "--html", tmp_path / "run.html")
    assert code == 0 and "html written" in err and (tmp_path / "run.html").stat().st_size > 1000


def test_without_the_package_the_scripts_say_what_to_install_or_use_the_module(call, talker, monkeypatch):
    home, file = talker
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    code, out, err = call("load_8b.py", file, "--prompt", "Hi", *QUICK)
    assert (code, out) == (2, "") and "llama-cpp-python, got none; pip install" in err.splitlines()[-1]
    wanted = call("load_8b.py", home, "--prompt", "Hi", *QUICK)[1]
    assert call("load_8b.py", file, "--prompt", "Hi", *QUICK, "--dtype", "float32")[:2] == (0, wanted)
    assert call("sample.py", file, "--prompt", "Hi", *QUICK)[:2] == (0, wanted)


def test_a_file_without_a_tokenizer_takes_that_of_a_directory(call, talker, tmp_path):
    home, _ = talker
    convert.write(tmp_path / "bare.gguf", minillada.load(home)[0], "f32")
    more = ["--prompt", "Hi", *QUICK, "--dtype", "float32"]
    code, _, err = call("load_8b.py", tmp_path / "bare.gguf", *more)
    assert code == 2 and "expected a tokenizer.json, got none; give one with --tokenizer" in err
    wanted = call("load_8b.py", home, *more)[1]
    assert call("load_8b.py", tmp_path / "bare.gguf", *more, "--tokenizer", home)[:2] == (0, wanted)
    _, tokenizer = minillada.load(tmp_path / "bare.gguf", tokenizer=home)
    assert tokenizer.mask_id == 255


def test_a_check_looks_at_a_file_and_its_template(call, talker):
    code, out, err = call("load_8b.py", talker[1], "--check", "--deep")
    assert (code, out) == (0, "") and "GGUF llada names, 30 tensors in 1 files" in err and "all well" in err
    code, _, err = call("load_8b.py", talker[1], "--check", "--threads", 0)
    assert code == 2 and "threads: expected a whole number from 1 to 1024, got 0" in err


# ---- refused in one line ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "setting", "line"),
    [
        ("llada_dense", {"cache": "dual"}, "cache: expected none or prefix with LlamaCpp, got dual"),
        ("llada_dense", {"cache": "refresh"}, "cache: expected none or prefix with LlamaCpp, got refresh"),
        ("llada_dense", {"revise": "wino"}, "expected positions that all see the same"),
        ("llada_moe", {"cache": "prefix"}, "cache: expected none, since llama.cpp keeps no keys"),
    ],
)
def test_what_llama_cpp_cannot_do_is_refused_before_a_step(name, setting, line, made, engine):
    predict = LlamaCpp(made(name)[1])
    canvas = Canvas.continuation(PROMPTS, 8, predict.config)
    with pytest.raises(BadInput, match=line):
        next(stream(predict, canvas, SampleConfig(gen_len=8, steps=8, block_len=8, **setting)))


def test_more_rows_than_sequences_are_refused(made, engine):
    predict = LlamaCpp(made()[1])
    with pytest.raises(BadInput, match="rows: expected at most 256"):
        predict.logits(torch.zeros(257, 3, dtype=torch.long))


def test_a_directory_is_no_file(engine):
    with pytest.raises(BadInput, match="expected a GGUF file"):
        LlamaCpp(GOLDEN / "llada_dense")


def test_a_file_that_llama_cpp_does_not_load_costs_one_line(made, engine, monkeypatch):
    if engine == "stand-in":
        monkeypatch.setattr(stand_in, "llama_model_load_from_file", lambda path, params: None)
    else:
        monkeypatch.setattr(llama_cpp, "architecture", lambda lib, name: override(lib, b"nothing"))
    with pytest.raises(BadLuck, match=r"expected llama\.cpp to load it") as told:
        LlamaCpp(made()[1])
    assert "\n" not in str(told.value)


def override(lib, name: bytes):
    entries = (lib.llama_model_kv_override * 2)()
    entries[0].tag, entries[0].key = lib.LLAMA_KV_OVERRIDE_TYPE_STR, b"general.architecture"
    entries[0].value.val_str = name
    return entries


def test_without_the_package_one_line_says_what_to_install(made, monkeypatch):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)  # importing it fails
    with pytest.raises(BadLuck, match=r"llama-cpp-python, got none; pip install 'minillada\[cpp\]' .*prebuilt wheels"):
        LlamaCpp(made()[1])


def test_another_version_of_the_package_is_refused(made, monkeypatch):
    monkeypatch.setitem(sys.modules, "llama_cpp", stand_in)
    monkeypatch.setattr(stand_in, "__version__", "0.2.0")
    with pytest.raises(BadLuck, match=r"llama-cpp-python: expected version \d.*, got 0\.2\.0; pip install"):
        LlamaCpp(made()[1])
