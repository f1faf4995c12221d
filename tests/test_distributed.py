"""Two processes on one machine (gloo, CPU) against one: the same losses, the same checkpoints, one voice.

Two workers go through all of `work` together, once; the tests look at what they wrote down.
"""

import json
import math
import os
import socket
import subprocess
import sys
from itertools import count
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import minillada
from minillada import BadInput, TrainConfig, train
from minillada.training import pretraining
from minillada.training.distributed import agree, check_same, in_turn, optimizer_state, processes, rank, share, together
from minillada.training.making import make

ROOT = Path(__file__).parents[1]
QUICK = {"preset": "nano", "steps": 6, "batch_size": 4, "length": 16, "eval_every": 3, "precision": "float32"}
QUICK |= {"data": "tales", "tokenizer": "characters"}
CLOSE = {"rel": 2e-4}  # float32 sums in another order, through Muon's bfloat16
LOSS = pretraining.pretraining_loss

gloo = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available() or sys.platform == "win32",
    reason="needs PyTorch's gloo and torchrun's way to start processes",
)


def crash(*calls: int) -> None:
    """Give rank 1, or the only process, a NaN for a loss in these of its steps after the first, the twin's."""
    numbers = count(1)
    here = int(os.environ.get("RANK", "1")) == 1
    pretraining.pretraining_loss = lambda *a: LOSS(*a) * (math.nan if here and next(numbers) in calls else 1.0)


def told(out: Path | None = None, resume: Path | None = None, stop_after: int | None = None, **changes) -> list[list]:
    """Train: [loss, bound, gradient's norm, rate, step of the best bound] of every step. The last process may stop."""
    seen = count(1)
    stop = lambda: next(seen) == stop_after and rank() == int(os.environ.get("WORLD_SIZE", "1")) - 1
    if resume:
        steps = train(resume=resume, **changes)
    else:
        steps = train(TrainConfig(**{**QUICK, **changes}, out=out and str(out)), stop=stop)
    return [[s.loss, s.bound or 0.0, s.grad_norm, s.lr, s.best] for s in steps]


def endings() -> dict:
    """How each process leaves `together` when one or both fail in it."""

    def ending(*failing: int) -> str:
        try:
            with together():
                if rank() in failing:
                    raise BadInput(f"thing: expected none, got {rank()}; mend it")
        except (BadInput, SystemExit) as end:
            return f"{type(end).__name__} {end}"
        return "none"

    def same(what: str) -> str:
        try:
            check_same("data", what)
        except BadInput as end:
            return str(end)
        return "none"

    return {
        "none": ending(), "first": ending(0), "second": ending(1), "both": ending(0, 1),
        "same": same("0123456789ab"), "different": same(f"{rank()}123456789ab"), "agree": agree(rank(), -rank()),
        "share": [rows.tolist() for rows in share(8, 2)], "uneven": [rows.tolist() for rows in share(5)],
    }  # fmt: skip


def gather_of_half_a_state() -> bool:
    """Whether what a sharded optimiser's state is gathered to is whole in rank 0 and nothing elsewhere."""
    for optimizer in make(TrainConfig(**QUICK, shard=True)).optimizers:
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            p.grad = torch.ones_like(p)
        optimizer.step()
        for name, tensor in optimizer_state([optimizer]).items():
            if name == "rates" or name.endswith(".step"):
                continue
            p = optimizer.param_groups[0]["params"][int(name.split(".")[2])]
            assert p.to_local().shape != p.shape or len(p) == 1
            if tensor.shape != p.shape if rank() == 0 else tensor is not None:
                return False
    return True


def work(directory: Path) -> None:
    """What one of two workers does; the results of each go to a file of its own."""
    torch.set_num_threads(1)
    results = {}
    with processes():
        results["files"] = in_turn(lambda: sorted(path.name for path in directory.glob("*.tmp")))
        for name, how in {"ddp": {}, "fsdp": {"shard": True}}.items():
            results[name] = told(directory / name, **how)
            results[f"{name} accumulating"] = told(accumulate=2, recompute=True, **how)
            crash(4)
            results[f"{name} crashed"] = told(directory / f"{name} crashed", **how)
            crash()
            results[f"{name} stopped"] = told(directory / f"{name} stopped", stop_after=3, **how)
            results[f"{name} resumed"] = told(resume=directory / f"for {name}", **how)
            results[f"{name} adamw"] = told(optimizer="adamw", lr=0.003, **how)
        results["endings"] = endings()
        results["gathered"] = gather_of_half_a_state()
        results["printed"] = sys.stdout is sys.__stdout__
    (directory / f"results-{os.environ['RANK']}.json").write_text(json.dumps(results))


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """Where one process and then two have worked."""
    directory = tmp_path_factory.mktemp("two")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINILLADA_CACHE", str(directory / "cache"))
        alone = {"whole": told(directory / "alone"), "adamw": told(optimizer="adamw", lr=0.003)}
        crash(4)
        alone["crashed"] = told()
        pretraining.pretraining_loss = LOSS
        for name in ("for ddp", "for fsdp"):
            told(directory / name, stop_after=3)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        script = "import sys, pathlib; sys.path[:0] = sys.argv[2:]; import test_distributed; "
        script += "test_distributed.work(pathlib.Path(sys.argv[1]))"
        command = [sys.executable, "-X", "faulthandler", "-c", script, directory, ROOT, ROOT / "tests"]
        common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        workers = [
            subprocess.Popen(command, env=os.environ | common | {"RANK": str(r), "LOCAL_RANK": str(r)}) for r in (0, 1)
        ]
        try:
            assert [worker.wait(timeout=600) for worker in workers] == [0, 0]
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()
    (directory / "alone.json").write_text(json.dumps(alone))
    return directory


@pytest.fixture
def alone(directory) -> dict:
    return json.loads((directory / "alone.json").read_text())


@pytest.fixture
def two(directory) -> tuple[dict, dict]:
    first, second = (json.loads((directory / f"results-{r}.json").read_text()) for r in (0, 1))
    return first, second


def assert_close(steps: list[list], expected: list[list]) -> None:
    assert len(steps) == len(expected)
    for step, other in zip(steps, expected, strict=True):
        assert step == pytest.approx(other, nan_ok=True, **CLOSE)


@gloo
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_two_processes_learn_what_one_does(how, alone, two):
    assert two[0][how] == two[1][how]
    assert_close(two[0][how], alone["whole"])
    assert_close(two[0][f"{how} adamw"], alone["adamw"])


@gloo
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_accumulating_and_recomputing_change_nothing(how, alone, two):
    assert_close(two[0][f"{how} accumulating"], alone["whole"])


@gloo
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_a_crash_of_one_process_takes_all_back(how, alone, two):
    assert math.isnan(two[0][f"{how} crashed"][4][0]) and math.isfinite(two[0][f"{how} crashed"][5][0])
    assert_close(two[0][f"{how} crashed"], alone["crashed"])
    assert_close(two[1][f"{how} crashed"], alone["crashed"])


@gloo
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_a_checkpoint_of_one_process_resumes_in_two(how, alone, two):
    assert_close(two[0][f"{how} resumed"], alone["whole"][3:])


@gloo
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_a_signal_to_one_process_stops_both_and_one_process_goes_on(how, alone, two, directory, monkeypatch):
    monkeypatch.setenv("MINILLADA_CACHE", str(directory / "cache"))
    assert len(two[0][f"{how} stopped"]) == len(two[1][f"{how} stopped"]) == 3
    assert_close(told(resume=directory / f"{how} stopped"), alone["whole"][3:])


@gloo
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_a_checkpoint_of_two_processes_is_that_of_one(how, directory):
    names = lambda run: sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.name != ".lock")
    assert names(directory / how) == names(directory / "alone")
    model, tokenizer = minillada.load(directory / how)
    expected, _ = minillada.load(directory / "alone")
    tokens = torch.tensor([tokenizer.encode("Once upon a time")])
    assert torch.allclose(model(tokens), expected(tokens), atol=5e-3)
    for file in ("model.safetensors", "optimizer.safetensors"):
        ours, theirs = (load_file(directory / run / "checkpoints/step-00000006" / file) for run in (how, "alone"))
        assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


@gloo
def test_what_is_sharded_is_gathered_in_the_first_process_alone(two):
    assert two[0]["gathered"] and two[1]["gathered"]


@gloo
def test_who_fails_ends_all_and_one_alone_says_why(two):
    said = "BadInput thing: expected none, got {}; mend it"
    silent = "SystemExit 2"
    expected = {"none": ["none"] * 2, "first": [said.format(0), silent], "second": [silent, said.format(1)]}
    expected |= {"both": [said.format(0), silent]}
    assert {name: [one["endings"][name] for one in two] for name in expected} == expected


@gloo
def test_different_data_are_refused(two):
    assert [one["endings"]["same"] for one in two] == ["none"] * 2
    assert all(one["endings"]["different"].startswith("data: expected the same in every process") for one in two)


@gloo
def test_rows_are_dealt_out_evenly(two):
    assert [one["endings"]["share"] for one in two] == [[[0, 4], [2, 6]], [[1, 5], [3, 7]]]
    assert [one["endings"]["uneven"] for one in two] == [[[0, 2, 4]], [[1, 3, 0]]]
    assert [one["endings"]["agree"] for one in two] == [[1, 0]] * 2


@gloo
def test_the_second_process_is_silent(two):
    assert [one["printed"] for one in two] == [True, False]


def torchrun(*options: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += map(str, [ROOT / "train_tiny.py", *options])
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)


@gloo
def test_torchrun_runs_the_script_unchanged_and_one_process_prints(tmp_path, monkeypatch):
    monkeypatch.setenv("MINILLADA_CACHE", str(tmp_path / "cache"))
    out = tmp_path / "script"
    options = ["--preset", "nano", "--data", "tales", "--steps", 2, "--length", 16, "--eval-every", 2]
    options += ["--precision", "float32"]
    ended = torchrun(*options, "--shard", "--out", out)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("step 2: validation <=") == 1 and ended.stdout.count(f"saved in {out}") == 1
    minillada.load(out)
    refused = torchrun("--batch-size", 3, *options, "--out", tmp_path / "other")
    errors = [line for line in refused.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "batch_size: expected a multiple of 2" in errors[0]
    assert "exitcode  : 2" in refused.stderr and refused.stderr.count("Traceback") == 1  # torchrun's own
    assert not (tmp_path / "other").exists()
