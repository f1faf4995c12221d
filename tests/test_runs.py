"""Run directories: what a kill, a full disk, a flipped bit or a second process may and may not do."""

import errno
import json
import multiprocessing
import os
import random
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from minillada import files
from minillada.errors import BadInput, BadLuck
from minillada.files import newest_checkpoint, verify_manifest
from minillada.model import LLaDA, ModelConfig
from minillada.text.tokenizer import Tokenizer
from minillada.training.distributed import load_optimizers, optimizer_state
from minillada.training.runs import Run, load_state, rng_state, set_rng_state, step_of
from minillada.weights import checkpoint

posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals and limits")
CONFIG = ModelConfig(vocab_size=11, mask_id=10, n_layer=1, n_head=2, d_model=8, d_ff=16)


def tiny(value: float | None = None) -> LLaDA:
    torch.manual_seed(0)
    model = LLaDA(CONFIG)
    if value is not None:
        for p in model.parameters():
            torch.nn.init.constant_(p, value)
    return model


def save_steps(run: Run, *steps: int, **options) -> None:
    for step in steps:
        run.log({"step": step, "loss": 1 / step})
        run.save(step, tiny(step), None, {"step": step, "ema": torch.full((3,), float(step))}, **options)


def names(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.iterdir())


def one_line_of(error: pytest.ExceptionInfo) -> str:
    line = str(error.value)
    assert "\n" not in line and ": expected " in line and ", got " in line and "; " in line, line
    return line


# ---- Beginning and going on ----


def test_a_run_starts_in_a_new_directory_and_goes_on_where_it_stopped(tmp_path):
    with Run.create(tmp_path / "a" / "run", {"lr": 0.1, "layers": [1, 2]}) as run:
        assert run.newest is None
        save_steps(run, 1, 2)
    with Run.resume(tmp_path / "a" / "run") as run:
        assert run.config == {"lr": 0.1, "layers": [1, 2]} and not run.notices
        assert run.newest.name == "step-00000002"
        assert load_state(run.newest)["step"] == 2
    expected = ["config.json", "manifest.json", "model.safetensors", "optimizer.safetensors", "state.json"]
    assert names(run.newest) == expected


def test_a_directory_with_anything_in_it_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(BadInput) as error:
        Run.create(tmp_path, {})
    assert "add --resume" in one_line_of(error) and names(tmp_path) == ["thesis.txt"]
    with pytest.raises(BadInput) as error:
        Run.create(tmp_path / "thesis.txt", {})
    one_line_of(error)


def test_a_run_that_came_and_went_during_create_is_not_overwritten(tmp_path, monkeypatch):
    def late(run, directory):
        (directory / "run.json").write_text('{"theirs": 1}')
        begin(run, directory)

    begin = Run.__init__
    monkeypatch.setattr(Run, "__init__", late)
    with pytest.raises(BadInput):
        Run.create(tmp_path, {"ours": 2})
    assert "theirs" in (tmp_path / "run.json").read_text()


def test_what_a_killed_create_left_does_not_stop_the_next_one(tmp_path):
    (tmp_path / ".lock").touch()
    (tmp_path / ".run.json.123.tmp").write_text("{")
    Run.create(tmp_path, {}).close()


def test_resume_refuses_what_is_no_run_or_has_no_checkpoint(tmp_path):
    with pytest.raises(BadInput) as error:
        Run.resume(tmp_path)
    assert "run.json" in one_line_of(error) and not names(tmp_path)
    Run.create(tmp_path, {}).close()
    with pytest.raises(BadInput) as error:
        Run.resume(tmp_path)
    assert "got none" in one_line_of(error)
    (tmp_path / "run.json").write_text('{"lr": ')
    with pytest.raises(BadInput) as error:
        Run.resume(tmp_path)
    one_line_of(error)


def test_a_refused_run_lets_go_of_its_lock(tmp_path):
    Run.create(tmp_path, {}).close()
    with pytest.raises(BadInput) as first:
        Run.resume(tmp_path)
    with pytest.raises(BadInput) as second:  # and not "another process"
        Run.resume(tmp_path)
    assert str(first.value) == str(second.value)


# ---- Checkpoints ----


def test_the_last_checkpoints_and_the_best_one_stay(tmp_path):
    with Run.create(tmp_path, {}) as run:
        save_steps(run, 1, 2, 3, 4, 5, keep=2, best=2)
        assert names(run.checkpoints) == ["step-00000002", "step-00000004", "step-00000005"]
        save_steps(run, 6, 7, keep=0)
        assert len(names(run.checkpoints)) == 5


def test_saving_a_step_twice_changes_nothing(tmp_path):
    with Run.create(tmp_path, {}) as run:
        first = run.save(1, tiny(1.0), None, {"a": 1})
        assert run.save(1, tiny(2.0), None, {"a": 2}) == first
        assert load_state(first) == {"a": 1}


def test_a_state_comes_back_bit_for_bit(tmp_path):
    odd = torch.tensor([0.0, -0.0, torch.nan, torch.inf, 1e-45])
    state = {
        "none": None, "yes": True, "third": 1 / 3, "big": 2**70, "text": "ü\u2028\n", "list": [0.9, [0.999, None], []],
        "ids": {"0": {"a": 1}, "7": {}}, "a": odd, "a.b": odd + 1, "scalar": torch.tensor(3.0), "half": odd.bfloat16(),
        "bytes": torch.ones(5, dtype=torch.uint8), "strided": torch.arange(6).view(2, 3).T, "empty": torch.empty(0, 4),
    }  # fmt: skip
    with Run.create(tmp_path, {}) as run:
        back = load_state(run.save(1, tiny(), None, state))
        assert load_state(run.save(2, tiny(), None, {"no tensors": 1})) == {"no tensors": 1}
    assert_same(dict(sorted(back.items())), dict(sorted(state.items())))


def assert_same(a, b):
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert list(a) == list(b)
        a, b = list(a.values()), list(b.values())
    if isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert a.contiguous().view(-1).view(torch.uint8).equal(b.contiguous().view(-1).view(torch.uint8))
    else:
        assert a == b


def test_everything_is_flushed_before_the_rename_and_the_name_after_it(tmp_path, monkeypatch):
    events, fsync, replace = [], os.fsync, os.replace

    def note_fsync(fd):
        events.append(os.fstat(fd).st_ino)
        fsync(fd)

    def note_replace(source, target):
        if Path(target).name == "step-00000001":
            files = {p.name: p.stat().st_ino for p in Path(source).iterdir()}
            order = [events.index(i) for i in files.values()]  # ValueError: renamed before it was flushed
            assert max(order) == events.index(files["manifest.json"]), "the manifest comes last"
            if os.name == "posix":
                assert Path(source).stat().st_ino in events[max(order) :], "the draft's names were not flushed"
            events.append("rename")
        replace(source, target)

    with Run.create(tmp_path, {}) as run:
        run.log({"step": 1})
        monkeypatch.setattr(os, "fsync", note_fsync)
        monkeypatch.setattr(os, "replace", note_replace)
        assert (run.save(1, tiny(), Tokenizer.bytes(), {"ema": torch.ones(2)}) / "tokenizer.json").exists()
        assert run.log_file.stat().st_ino in events[: events.index("rename")]
        if os.name == "posix":
            assert events[events.index("rename") + 1 :] == [run.checkpoints.stat().st_ino]


@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("fault", [errno.ENOSPC, errno.EROFS, errno.EFBIG])
def test_a_failing_disk_leaves_the_old_checkpoint_and_no_debris(tmp_path, monkeypatch, call, fault):
    real = getattr(os, call)
    with Run.create(tmp_path, {}) as run:
        save_steps(run, 1)
        for survivable in range(100):  # let so many calls succeed, then fail
            left = [survivable]

            def failing(*args, left=left):
                left[0] -= 1
                if left[0] == -1:
                    raise OSError(fault, os.strerror(fault))
                return real(*args)

            monkeypatch.setattr(os, call, failing)
            try:
                run.save(2, tiny(), Tokenizer.bytes(), {"ema": torch.ones(2)})
                break
            except BadLuck as error:
                assert "\n" not in str(error) and os.strerror(fault) in str(error)
            finally:
                monkeypatch.setattr(os, call, real)
            if names(run.checkpoints) != ["step-00000001"]:  # only the last flush may fail after the rename
                verify_manifest(run.checkpoints / "step-00000002")
                assert names(run.checkpoints) == ["step-00000001", "step-00000002"] and call == "fsync"
                shutil.rmtree(run.checkpoints / "step-00000002")
        assert survivable > 2, "no call was ever made to fail"
    assert Run.resume(tmp_path).newest.name == "step-00000002"


def test_too_little_space_is_noticed_before_anything_is_written(tmp_path, monkeypatch):
    with Run.create(tmp_path, {}) as run:
        size = sum(p.nbytes for p in tiny().parameters()) + 4000
        usage = lambda free: lambda _: shutil._ntuple_diskusage(10**9, 0, int(free))
        monkeypatch.setattr(shutil, "disk_usage", usage(1.19 * size))
        with pytest.raises(BadLuck) as error:
            run.save(1, tiny(), None, {"ema": torch.ones(1000)})
        assert "MB free" in one_line_of(error) and not names(run.checkpoints)
        monkeypatch.setattr(shutil, "disk_usage", usage(1.21 * size))
        run.save(1, tiny(), None, {"ema": torch.ones(1000)})


@posix
def test_a_file_size_limit_leaves_the_old_checkpoint_and_no_debris(tmp_path):
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Run.create(tmp_path, {}) as run:
        save_steps(run, 1)
        try:
            for limit in (100, 1500, 4000):  # bytes: config.json, the model, the optimizer
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
                with pytest.raises(BadLuck) as error:
                    run.save(2, tiny(), None, {"ema": torch.ones(5000)})
                assert names(run.checkpoints) == ["step-00000001"]
                assert "\n" not in str(error.value)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)


def fill_at_every_64_kb(disk: Path) -> None:
    """Save to a disk with 0, 64, 128, … KB left, until it fits. Prints how often it did not."""
    files.check_space = lambda *_: None  # it would notice, and nothing would ever fill
    state = {"ema": torch.ones(2**18)}  # 1 MB
    with Run.create(disk / "run", {}) as run:
        run.save(1, tiny(), None, state)
        for tries in range(1000):
            with open(disk / "filler", "wb") as filler:
                filler.write(bytes(max(0, shutil.disk_usage(disk).free - tries * 2**16)))
            try:
                run.save(2, tiny(), None, state)
                break
            except BadLuck as error:
                assert "\n" not in str(error)
            assert names(run.checkpoints) == ["step-00000001"]
            verify_manifest(run.newest)
    print("full", tries, "times")


@posix
@pytest.mark.soak
def test_a_disk_that_fills_at_every_64_kb_leaves_the_old_checkpoint_and_no_debris(tmp_path):
    script = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import pathlib, test_runs; "
    script += f"test_runs.fill_at_every_64_kb(pathlib.Path({str(tmp_path)!r}))"
    mount = f"mount -t tmpfs -o size=8m tmpfs {shlex.quote(str(tmp_path))}"
    if not shutil.which("unshare") or subprocess.run(["unshare", "-rm", "sh", "-c", mount]).returncode:
        pytest.skip("needs Linux and the right to mount a tmpfs of one's own")
    command = ["unshare", "-rm", "sh", "-c", f'{mount} && exec "$0" -c "$1"', sys.executable, script]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    print(result.stdout)
    assert int(result.stdout.split()[1]) >= 16


def test_an_interrupted_save_leaves_no_debris(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    with Run.create(tmp_path, {}) as run:
        monkeypatch.setattr(files, "write_manifest", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run.save(1, tiny(), None, {})
        assert not names(run.checkpoints)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("harm", ["flip", "truncate", "delete"])
def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(tmp_path, file, harm):
    with Run.create(tmp_path, {}) as run:
        save_steps(run, 1, 2, 3)
    victim = run.newest / file
    data = bytearray(victim.read_bytes())
    if harm == "flip":
        data[len(data) // 2] ^= 1
    victim.unlink() if harm == "delete" else victim.write_bytes(data[: -1 if harm == "truncate" else None])
    assert newest_checkpoint(tmp_path)[0].name == "step-00000002"
    with Run.resume(tmp_path) as run:
        (notice,) = run.notices
        assert "step-00000003" in notice and file in notice and "\n" not in notice
        assert run.newest.name == "step-00000002" and "corrupt-step-00000003" in names(run.checkpoints)
        assert [r["step"] for r in log_of(run)] == [1, 2]
        save_steps(run, 3)  # and the step can be saved anew
    with Run.resume(tmp_path) as run:
        assert run.newest.name == "step-00000003" and not run.notices
    checkpoint.load(tmp_path)  # without a warning


def test_with_every_checkpoint_damaged_nothing_restarts_and_nothing_is_touched(tmp_path):
    with Run.create(tmp_path, {}) as run:
        save_steps(run, 1, 2)
        for path in run.checkpoints.iterdir():
            (path / "state.json").write_text("{}")
    before = names(run.checkpoints), run.log_file.read_bytes()
    with pytest.raises(BadInput) as error:
        Run.resume(tmp_path)
    assert "state.json" in one_line_of(error)
    assert (names(run.checkpoints), run.log_file.read_bytes()) == before


def test_resume_sweeps_our_leftovers_and_nothing_else(tmp_path):
    with Run.create(tmp_path, {}) as run:
        save_steps(run, 1)
    (run.checkpoints / ".step-00000002.tmp").mkdir()
    (run.checkpoints / ".step-00000002.tmp" / "model.safetensors").touch()
    (tmp_path / ".run.json.7.tmp").touch()
    (tmp_path / "notes.tmp").touch()
    Run.resume(tmp_path).close()
    assert names(run.checkpoints) == ["step-00000001"]
    assert names(tmp_path) == [".lock", "checkpoints", "log.jsonl", "notes.tmp", "run.json"]


# ---- Other processes, and their sudden end ----

PROCESSES = multiprocessing.get_context("forkserver" if os.name == "posix" else "spawn")
if os.name == "posix":
    PROCESSES.set_forkserver_preload(["minillada.training.runs"])  # torch is imported once, not for every kill


def hold(directory: Path) -> None:
    with Run.resume(directory):
        (directory / "held").touch()
        time.sleep(60)


def save_forever(directory: Path) -> None:
    torch.set_num_threads(1)
    with Run.resume(directory) as run:
        (directory / "held").touch()
        for step in range(step_of(run.newest) + 1, 10**6):
            save_steps(run, step, keep=2)


def start(target, directory: Path) -> multiprocessing.Process:
    (directory / "held").unlink(missing_ok=True)
    process = PROCESSES.Process(target=target, args=(directory,), daemon=True)
    process.start()
    deadline = time.monotonic() + 60
    while not (directory / "held").exists():
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.001)
    return process


def end(process: multiprocessing.Process) -> None:
    process.kill()
    process.join()


def test_a_second_process_in_the_same_directory_is_refused(tmp_path):
    with Run.create(tmp_path, {}) as run:
        save_steps(run, 1)
        with pytest.raises(BadLuck) as error:  # a second Run in this process is as bad
            Run.resume(tmp_path)
        assert f"no other process in {tmp_path}, got one that holds its lock; wait for it" in one_line_of(error)
    other = start(hold, tmp_path)
    try:
        with pytest.raises(BadLuck) as error:
            Run.resume(tmp_path)
        assert f"no other process in {tmp_path}, got one that holds its lock; wait for it" in one_line_of(error)
    finally:
        end(other)
    Run.resume(tmp_path).close()  # a lock does not outlive its process


def survives(kills: int, directory: Path) -> None:
    """Kill a process that saves without pause, at random moments; every time the newest checkpoint must be whole."""
    dice = random.Random(kills)
    with Run.create(directory, {}) as run:
        save_steps(run, 1)
    last, mid_save = 1, 0
    for _ in range(kills):
        process = start(save_forever, directory)
        time.sleep(dice.uniform(0, 0.2))
        end(process)
        mid_save += any(name.startswith(".") for name in names(run.checkpoints))
        with Run.resume(directory) as run:
            step = step_of(run.newest)
            assert not run.notices and step >= last
            assert set(load_file(run.newest / "model.safetensors")["model.transformer.ln_f.weight"].tolist()) == {step}
            state = load_state(run.newest)
            assert state["step"] == step and state["ema"].tolist() == 3 * [step]
            assert [r["step"] for r in log_of(run)] == list(range(1, step + 1))
            assert not any(name.startswith(".") for name in names(run.checkpoints))
            last = step
    print(f"{kills} kills, {mid_save} of them in the middle of a save, {last} checkpoints")
    assert mid_save or kills < 20


@posix
def test_five_kills_lose_nothing(tmp_path):
    survives(5, tmp_path)


@posix
@pytest.mark.soak
def test_a_hundred_kills_lose_nothing(tmp_path):
    survives(100, tmp_path)


# ---- The log ----


def log_of(run: Run) -> list[dict]:
    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in run.log_file.read_text().splitlines()]


def test_the_log_is_strict_json_with_null_for_what_is_not_finite(tmp_path):
    with Run.create(tmp_path, {}) as run:
        run.log({"step": 1, "loss": float("nan"), "lr": 0.1, "note": "a\nb", "bound": float("-inf")})
        assert log_of(run) == [{"step": 1, "loss": None, "lr": 0.1, "note": "a\nb", "bound": None}]


@pytest.mark.parametrize("torn", ['{"step": 4, "lo', '{"step": 2}', "\0\0\0\n", "[]\n", '{"step": null}\n', ""])
def test_a_resumed_log_equals_an_uninterrupted_one(tmp_path, torn):
    with Run.create(tmp_path / "whole", {}) as whole:
        save_steps(whole, 1, 2, 3, 4)
    with Run.create(tmp_path / "cut", {}) as cut:
        save_steps(cut, 1, 2)
        if not torn:
            cut.log({"step": 3, "loss": 99.0})
        with open(cut.log_file, "ab") as file:
            file.write(torn.encode())  # the kill came here
    with Run.resume(tmp_path / "cut") as cut:
        save_steps(cut, 3, 4)
    assert cut.log_file.read_bytes() == whole.log_file.read_bytes()


def test_a_log_with_no_line_to_keep_is_emptied(tmp_path):
    with Run.create(tmp_path, {}) as run:
        run.save(0, tiny(), None, {})
        run.log({"step": 1})
    with Run.resume(tmp_path) as run:
        assert log_of(run) == []


# ---- Exact resume ----


def adamw(model: LLaDA) -> list[torch.optim.Optimizer]:
    groups = [{"params": model.parameters(), "initial_lr": 1e-2}]
    return [torch.optim.AdamW(groups, lr=1e-2, betas=(0.8, 0.95), foreach=None, amsgrad=True)]


def muon_and_adamw(model: LLaDA) -> list[torch.optim.Optimizer]:
    matrices = [p for p in model.layers.parameters() if p.dim() == 2]
    rest = [p for p in model.parameters() if all(p is not m for m in matrices)]
    first = [{"params": matrices, "initial_lr": 1e-2}]
    group = {"params": rest[:1], "lr": 3e-3, "initial_lr": 3e-3}
    groups = [group, {"params": rest[1:], "weight_decay": 0.0, "initial_lr": 1e-2}]
    return [torch.optim.Muon(first, lr=1e-2), torch.optim.AdamW(groups, lr=1e-2)]


@pytest.mark.parametrize("make", [adamw, muon_and_adamw])
def test_a_restored_optimizer_goes_on_bit_for_bit(tmp_path, make):
    def steps(model, optimizers, count):
        for _ in range(count):
            tokens = torch.randint(10, (2, 6))
            model(tokens).logsumexp(-1).square().mean().backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()

    model = tiny()
    optimizers = make(model)
    steps(model, optimizers, 3)
    with Run.create(tmp_path, {}) as run:
        path = run.save(3, model, None, optimizer_state(optimizers) | rng_state())
    steps(model, optimizers, 3)

    state, again = load_state(path), tiny(0.0)
    again.load_state_dict(checkpoint.load(path)[0].state_dict())
    restored = make(again)
    load_optimizers(restored, state)
    set_rng_state(state)
    steps(again, restored, 3)
    assert_same(dict(again.state_dict()), dict(model.state_dict()))
    assert_same(*(dict(sorted(optimizer_state(made).items())) for made in (restored, optimizers)))
    assert_same(*([o.state_dict()["param_groups"] for o in made] for made in (restored, optimizers)))


def test_every_random_state_comes_back(tmp_path):
    mine = torch.Generator().manual_seed(7)

    def draws():
        torch.randn(3), np.random.randn(3), random.gauss(0, 1)  # leaves a cached normal behind in NumPy and Python
        return [
            *torch.randn(3).tolist(), *torch.randn(3, generator=mine).tolist(), *np.random.randn(3), random.gauss(0, 1),
        ]  # fmt: skip

    draws()
    np.random.randn(), random.gauss(0, 1)
    with Run.create(tmp_path, {}) as run:
        path = run.save(1, tiny(), None, rng_state(mine=mine))
        save = rng_state(mine=mine)
    expected = draws()
    assert draws() != expected
    set_rng_state(load_state(path), mine=mine)
    assert_same(rng_state(mine=mine), {**save, "rng.torch": load_state(path)["rng.torch"]})
    assert draws() == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_run_on_cuda_goes_on_bit_for_bit(tmp_path):
    def steps(weight, optimizer, count):
        for _ in range(count):
            (
                weight @ torch.randn(8, 8, device="cuda", generator=mine) + torch.randn_like(weight)
            ).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    mine = torch.Generator("cuda").manual_seed(7)
    weight = torch.nn.Parameter(torch.randn(8, 8, device="cuda"))
    optimizer = torch.optim.AdamW([{"params": [weight], "initial_lr": 1e-3}], fused=True)
    steps(weight, optimizer, 3)
    with Run.create(tmp_path, {}) as run:
        state = {"weight": weight, **optimizer_state([optimizer]), **rng_state(mine=mine)}
        path = run.save(3, tiny(), None, state)
    steps(weight, optimizer, 3)

    state = load_state(path)
    again = torch.nn.Parameter(state["weight"].cuda())
    restored = torch.optim.AdamW([{"params": [again], "initial_lr": 0.0}], fused=True)
    load_optimizers([restored], state)
    set_rng_state(state, mine=mine)
    steps(again, restored, 3)
    assert again.equal(weight)
