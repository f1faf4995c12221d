import json
import math
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import minillada
import sample
import train_tiny
from minillada import BadInput, BadLuck, TrainConfig, cli, train
from minillada.optim import rate
from minillada.presets import PRESETS

SCRIPT = Path(__file__).parents[1] / "train_tiny.py"
QUICK = {"preset": "nano", "steps": 6, "batch_size": 4, "length": 16, "eval_every": 3, "precision": "float32"}
QUICK |= {"data": "tales", "tokenizer": "characters"}


@pytest.fixture(autouse=True)
def private_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("MINILLADA_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def weights(run: Path) -> dict[str, torch.Tensor]:
    (newest,) = sorted((run / "checkpoints").iterdir())[-1:]
    return load_file(newest / "model.safetensors")


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]


def fail(script, monkeypatch, capsys, *options) -> str:
    """Run a script that must end with exit code 2 and one line on stderr; that line."""
    monkeypatch.setattr(sys, "argv", [script.__file__, *map(str, options)])
    with pytest.raises(SystemExit) as stopped:
        cli.run(script.main)
    lines = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2
    assert len(lines) == 1 and lines[0].startswith("error: ") and ": expected " in lines[0], lines
    return lines[0]


@pytest.mark.parametrize("preset", [name for name in PRESETS if "train" in PRESETS[name] and name != "small"])
def test_training_lowers_the_bound(preset):
    steps = list(train(TrainConfig(**{**QUICK, "preset": preset, "steps": 30, "eval_every": 10})))
    bounds = [step.bound for step in steps if step.bound is not None]
    assert bounds[-1] < bounds[0] < math.log(60)
    assert [step.step for step in steps] == list(range(1, 31))


def test_the_same_seed_gives_the_same_numbers_and_another_seed_others():
    first, again, other = ([s.loss for s in train(TrainConfig(**QUICK, seed=seed))] for seed in (1, 1, 2))
    assert first == again != other


def test_an_interrupted_run_ends_with_the_weights_and_losses_of_an_uninterrupted_one(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    list(train(TrainConfig(**QUICK, out=str(whole))))
    calls = iter([False, False, True])
    assert len(list(train(TrainConfig(**QUICK, out=str(parts)), stop=lambda: next(calls)))) == 3
    torch.rand(7)  # whatever else the program did in between
    assert [step.step for step in train(resume=parts)] == [4, 5, 6]
    assert losses(parts) == losses(whole)
    expected = weights(whole)
    for name, tensor in weights(parts).items():
        assert torch.equal(tensor, expected[name]), name


def test_a_run_is_loaded_with_its_tokenizer(tmp_path):
    out = tmp_path / "run"
    (*_, last) = train(TrainConfig(**QUICK, out=str(out)))
    model, tokenizer = minillada.load(out)
    x = torch.tensor([tokenizer.encode("Once upon a time")])
    assert torch.equal(model(x), last.model(x))


def test_resuming_with_another_text_is_refused(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("abc " * 1000)
    config = TrainConfig(**{**QUICK, "data": str(text)}, out=str(tmp_path / "run"))
    list(train(config))
    text.write_text("abc " * 1000 + "cab " * 10)
    with pytest.raises(BadInput, match=r"^data: expected the text this run began with"):
        next(train(resume=tmp_path / "run"))


def test_a_loss_that_is_not_finite_never_reaches_a_checkpoint(tmp_path):
    steps = train(TrainConfig(**QUICK, out=str(tmp_path / "run"), checkpoint_every=1))
    next(steps).model.head.weight.data[0, 0] = torch.nan
    with pytest.raises(BadLuck, match=r"^loss: expected a finite one, got nan"):
        next(steps)
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "run").values())


def test_automatic_precision_says_what_it_measured():
    step = next(train(TrainConfig(**{**QUICK, "precision": "auto"})))
    assert "float32" in step.notices[0] and "bfloat16" in step.notices[0]


def test_a_training_counted_in_minutes_ends_in_time():
    (*_, last) = train(TrainConfig(**{**QUICK, "steps": None}, minutes=0.02))
    assert 1.0 < last.seconds < 10


def test_the_rate_warms_up_stays_and_decays():
    config = TrainConfig(warmup=0.1, decay=0.5)
    assert [rate(p, config) for p in (0, 0.05, 0.1, 0.5, 0.75, 1)] == [0, 0.5, 1, 1, 0.5, 0]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("preset", "huge"), ("preset", "llada-8b"), ("steps", 0), ("batch_size", 1.5), ("length", -1), ("lr", math.nan),
        ("minutes", 0), ("process", "noise"), ("precision", "int8"), ("optimizer", "sgd"), ("tokenizer", "words"),
        ("tokenizer", "bpe:10"),
    ],
)  # fmt: skip
def test_a_bad_option_is_refused_by_name(field, value):
    with pytest.raises(BadInput, match=r": expected .*, got .*; ") as refused:
        next(train(TrainConfig(**{**QUICK, field: value})))
    assert str(refused.value).startswith((field, "vocab_size"))


FAULTY = {  # name -> content of the text, what the error names
    "missing.txt": (None, "data: expected"),
    "empty.txt": (b"", "data: expected"),
    "short.txt": (b"too short", "data: expected at least"),
    "binary.bin": (b"\x7fELF\0\0\0" * 100, "NUL"),
    "latin1.txt": ("caf\u00e9 ".encode("latin-1") * 100, "byte 0xE9 at offset 3"),
}


@pytest.mark.parametrize("name", FAULTY)
def test_a_text_that_cannot_be_used_gets_one_line(name, tmp_path, monkeypatch, capsys):
    content, message = FAULTY[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    line = fail(
        train_tiny, monkeypatch, capsys, "--data", tmp_path / name, "--out", tmp_path / "run", "--preset", "nano"
    )
    assert message in line
    assert not (tmp_path / "run").exists()


def test_faulty_options_and_directories_get_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("precious")
    for options in (
        ["--preset", "giant"], ["--steps", "many"], ["--frobnicate"], ["--device", "abacus"],
        ["--resume", tmp_path / "full"], ["--resume", tmp_path / "nowhere"],
        ["--preset", "nano", "--steps", 1, "--out", tmp_path / "full"],
    ):  # fmt: skip
        fail(train_tiny, monkeypatch, capsys, *options)
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.tex"]


def test_a_used_run_directory_is_refused_and_kept(tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    list(train(TrainConfig(**QUICK, out=str(out))))
    before = weights(out)
    assert "--resume" in fail(train_tiny, monkeypatch, capsys, "--preset", "nano", "--out", out)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(out).items())


def test_sampling_faults_get_one_line(tmp_path, monkeypatch, capsys):
    list(train(TrainConfig(**QUICK, out=str(tmp_path / "run"))))
    (tmp_path / "other").mkdir()
    for options, message in (
        ([tmp_path / "other"], "expected"),
        ([tmp_path / "run", "--prompt", "\u732b"], "U+732B"),
        ([tmp_path / "run", "--fill", "no holes"], "[MASK]"),
        ([tmp_path / "run", "--gen-len", "7", "--block-len", "2"], "block_len"),
    ):
        assert message in fail(sample, monkeypatch, capsys, *options)


def test_a_first_run_prints_what_one_needs_and_sample_shows_masks_resolving(tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    options = ["--preset", "nano", "--data", "tales", "--steps", "8", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["train_tiny.py", *options])
    with pytest.raises(SystemExit) as stopped:
        cli.run(train_tiny.main)
    printed = capsys.readouterr()
    assert stopped.value.code == 0
    assert "nats/char" in printed.err and "bits/char" in printed.err and "tok/s" in printed.err
    assert f"saved in {out}" in printed.out
    monkeypatch.setattr(sys, "argv", ["sample.py", str(out), "--prompt", "Once", "--gen-len", "32"])
    cli.run(sample.main)
    printed = capsys.readouterr().out
    assert "\u2591" in printed.splitlines()[1] and "\u2591" not in printed.splitlines()[-1]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for a child process")
def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, SCRIPT, "--preset", "nano", "--data", "tales", "--steps", "100000", "--out", out]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not (out / "log.jsonl").exists():
            pass
        process.send_signal(signal.SIGINT)
        printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"--resume {out}" in printed
    assert next(train(resume=out)).step == len(losses(out))
