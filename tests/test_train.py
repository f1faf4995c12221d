import copy
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from oracles import tiny_model
from runs_compared import weights
from safetensors.torch import load_file
from torch.utils._pytree import tree_flatten

import minillada
import sample
import train_tiny
from minillada import BadInput, BadLuck, SFTConfig, TrainConfig, VRPOConfig, train
from minillada.commands import cli
from minillada.commands.progress import TimeLeft, TrainingBar
from minillada.diffusion import PROCESSES as NOISES
from minillada.diffusion import exact_count, model_bound, pretraining_loss, sample_t
from minillada.files import newest_checkpoint
from minillada.measure.likelihood import log_likelihoods
from minillada.measure.twin import twin_nll
from minillada.text.ids import validation_batch
from minillada.text.tales import is_tale
from minillada.train import LearnConfig, Pretraining, Ways, learn, rate
from minillada.training import optim, pretraining
from minillada.training.config import PRESETS, config_of
from minillada.training.making import begin_objective, make
from minillada.training.optim import make_optimizers, restore, snapshot
from minillada.training.pretraining import TextPretraining
from minillada.training.runs import load_state, step_of

SCRIPT = Path(__file__).parents[1] / "train_tiny.py"
QUICK = {"preset": "nano", "steps": 6, "batch_size": 4, "length": 16, "eval_every": 3, "precision": "float32"}
QUICK |= {"data": "tales", "tokenizer": "characters", "twin": 0.0}
LOSS = pretraining.pretraining_loss


@pytest.fixture(autouse=True)
def private_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("MINILLADA_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def assert_same(a: object, b: object) -> None:
    """Equal in structure and, where there are tensors, bit for bit."""
    a, b = (tree_flatten(value) for value in (a, b))
    assert a[1] == b[1]
    for x, y in zip(a[0], b[0], strict=True):
        assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y


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


# ---- The loop of the course


def course(steps: int = 40) -> tuple[torch.nn.Module, Pretraining, LearnConfig]:
    """A tiny model, and one row to learn by heart."""
    rows = torch.arange(6).expand(8, -1)
    return tiny_model(), Pretraining(lambda start: itertools.repeat(rows), rows[:2], 15), LearnConfig(steps=steps)


def test_the_course_learns_a_row_by_heart():
    model, objective, config = course(40)
    before = objective.validate(model)["bound"]
    steps = list(learn(model, [torch.optim.AdamW(model.parameters(), 0.01)], objective, config, torch.Generator()))
    assert [s.step for s in steps] == list(range(1, 41)) and objective.validate(model)["bound"] < before / 2
    assert steps[0].lr == pytest.approx(0.01 * rate(1 / 41, config)) and steps[-1].loss < steps[0].loss / 2


def test_a_step_is_noise_loss_backward_clip_and_step():
    (model, objective, config), (twin, _, _) = course(3), course(3)
    rng, optimizer = torch.Generator().manual_seed(1), torch.optim.SGD(twin.parameters(), 0.1)
    for step in learn(model, [torch.optim.SGD(model.parameters(), 0.1)], objective, config,
                      torch.Generator().manual_seed(1)):  # fmt: skip
        loss = pretraining_loss(twin, *objective.noise(next(objective.batches(0)), rng))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = 0.1 * rate(step.step / 4, config)
        optimizer.step()
        optimizer.zero_grad()
        assert (step.loss, step.grad_norm) == (loss.item(), norm.item())
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


def test_the_gradients_of_several_parts_add_up_to_that_of_their_sum():
    class Halves(Pretraining):
        def losses(self, model, batch, rng):
            x0, noised = self.noise(batch, rng)
            for rows in (slice(0, 4), slice(4, 8)):
                yield pretraining_loss(model, x0[rows], type(noised)(*(x[rows] for x in noised))) / 2

    (model, objective, config), (other, _, _) = course(1), course(1)
    halves = Halves(objective.batches, objective.held, 15)
    (whole,), (sum_,) = (list(learn(m, [torch.optim.SGD(m.parameters(), 0.1)], o, config, torch.Generator()))
                         for m, o in ((model, objective), (other, halves)))  # fmt: skip
    assert sum_.loss == pytest.approx(whole.loss, rel=1e-6) and sum_.grad_norm == pytest.approx(whole.grad_norm)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_step_that_is_not_finite_changes_nothing(broken):
    model, objective, config = course(2)
    before = copy.deepcopy(model.state_dict())
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    mean = iter([broken, 1.0])
    steps = learn(model, [sgd], objective, config, torch.Generator(), ways=Ways(mean=lambda loss: next(mean)))
    next(steps)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    next(steps)
    assert any(not torch.equal(p, before[name]) for name, p in model.state_dict().items())


def test_learn_tells_an_objective_how_far_the_training_is():
    model, objective, config = course(3)
    steps = learn(model, [torch.optim.SGD(model.parameters(), 0.1)], objective, config, torch.Generator())
    assert [objective.progress for _ in steps] == [0.25, 0.5, 0.75]


def test_a_run_has_the_loss_and_the_bound_of_the_course():
    made = make(TrainConfig(**QUICK, t_min=0.0))
    plain = Pretraining(made.objective.batches, made.objective.held, made.objective.mask_id)
    batch, rng = next(plain.batches(0)), lambda: torch.Generator().manual_seed(3)
    (ours,), (theirs,) = (list(o.losses(made.model, batch, rng())) for o in (made.objective, plain))
    assert torch.equal(ours, theirs)
    per_token = made.objective.validate(made.model)["bound"] * made.text.characters_per_token
    assert per_token == pytest.approx(plain.validate(made.model)["bound"], rel=1e-6)
    x0, noised = plain.held_noise()
    assert per_token == pytest.approx(model_bound(made.model, x0, noised).mean().item() / x0.shape[1], rel=1e-5)


@pytest.mark.parametrize("rows", ["windows", "documents"])
@pytest.mark.parametrize("block", [0, 4])
def test_a_training_begins_as_the_twin_and_goes_on_as_diffusion(block, rows):
    whole = {"rows": rows, "tokenizer": "bpe:1024", "length": 136}
    made = make(TrainConfig(**{**QUICK, **whole, "twin": 0.25}, block=block))
    batch, rng = next(made.objective.batches(0)), lambda: torch.Generator().manual_seed(3)
    loss = lambda config: next(begin_objective(config, made.text, made.model.config).losses(made.model, batch, rng()))
    given = int(rows == "documents")  # the end of text in front is not learned
    made.objective.progress = 0.24
    (ours,) = made.objective.losses(made.model, batch, rng())
    assert ours.item() == pytest.approx(twin_nll(made.model, batch)[:, given:].sum().item() / batch.numel(), rel=1e-6)
    made.objective.progress = 0.25
    assert torch.equal(next(made.objective.losses(made.model, batch, rng())), loss(replace(made.config, twin=0.0)))


def test_levels_above_the_least_are_trained_and_all_levels_measured():
    objective = make(TrainConfig(**QUICK, t_min=0.5)).objective
    hidden = [objective.noise(batch, torch.Generator().manual_seed(i))[1].masked.float().mean(1)
              for i, batch in zip(range(20), objective.batches(0), strict=False)]  # fmt: skip
    assert torch.cat(hidden).min() > 0.5 and torch.cat(hidden).max() == 1
    assert objective.held_noise()[1].masked.sum(1).min() == 1


def test_the_twin_comes_first_only_in_a_new_model_and_not_in_older_runs():
    assert (TrainConfig().twin, TrainConfig().t_min, TrainConfig(start="somewhere").twin) == (0.2, 0.2, 0.0)
    older = {name: value for name, value in asdict(TrainConfig(**QUICK)).items() if name not in ("twin", "t_min")}
    found = config_of({"version": 2, "objective": "pretrain", **older})
    assert (found.twin, found.t_min) == (0.0, 0.0)


@pytest.mark.parametrize("process", NOISES)
def test_every_process_of_noise_can_be_trained_with(process):
    (step,) = train(TrainConfig(**{**QUICK, "steps": 1}, process=process))
    assert math.isfinite(step.loss) and step.bound < math.log(60)


# ---- Runs


@pytest.mark.parametrize("preset", [name for name in PRESETS if "train" in PRESETS[name] and name != "small"])
def test_training_lowers_the_bound(preset):
    steps = list(train(TrainConfig(**{**QUICK, "preset": preset, "steps": 30, "eval_every": 10, "twin": 0.2})))
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


def test_run_json_says_what_is_learned_and_in_which_version(tmp_path):
    list(train(TrainConfig(**{**QUICK, "steps": 1}, out=str(tmp_path / "run"))))
    document = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (document["objective"], document["version"], document["steps"]) == ("pretrain", 2, 1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": None}, r"expected version 2 .*; resume with the minillada that began the run, or begin another"),
        (
            {"objective": "pray"},
            r"expected version 2 and an objective of pretrain, sft, prefer, reward, distil, got .*'pray'",
        ),
        ({"beta": 1.0}, r"expected the fields of TrainConfig, got one more or less, 'beta'; "),
        ({"lr": 0.5}, r"expected what the run in .* began with, got an edited one; "),
    ],
)
def test_an_old_or_edited_run_json_is_refused_before_anything_changes_and_the_run_still_loads(tmp_path, change, said):
    out = tmp_path / "run"
    list(train(TrainConfig(**QUICK, out=str(out)), stop=iter([False, True]).__next__))
    document = json.loads((out / "run.json").read_text()) | change
    if document["version"] is None:
        del document["version"]  # as before there were versions
    (out / "run.json").write_text(json.dumps(document))
    before = sorted(path for path in out.rglob("*"))
    with pytest.raises(BadInput, match=rf"^run.json: {said}") as refused:
        next(train(resume=out))
    assert "\n" not in str(refused.value) and sorted(path for path in out.rglob("*")) == before
    minillada.load(out)


def test_only_fields_of_the_config_can_move(tmp_path):
    list(train(TrainConfig(**QUICK, out=str(tmp_path / "run")), stop=iter([False, True]).__next__))
    with pytest.raises(BadInput, match=r"^resume: expected changes of TrainConfig's fields, got 'beta'; leave it out"):
        next(train(resume=tmp_path / "run", beta=1.0))


def test_a_used_directory_is_refused_before_data_are_read(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(BadInput, match=r"^run directory: expected a new or empty one"):
        next(train(TrainConfig(data=str(tmp_path / "missing.txt"), out=str(tmp_path))))


def test_a_config_has_no_field_of_another_objective():
    more = {"start": "somewhere", "data": "some.jsonl"}
    for kind, given, foreign in (
        (TrainConfig, {}, ("lora", "eos_padding", "beta")),
        (SFTConfig, more, ("preset", "model", "tokenizer", "length", "bias_rate", "beta", "samples")),
        (VRPOConfig, more, ("preset", "model", "tokenizer", "length", "bias_rate", "eos_padding")),
    ):
        kind(**given)
        for name in foreign:
            with pytest.raises(TypeError, match=name):
                kind(**given, **{name: 1})


def test_the_defaults_are_those_of_the_recipes():
    told = lambda c: (c.optimizer, c.lr, c.adam_lr, c.steps, c.batch_size, c.eval_every)
    more = {"start": "somewhere", "data": "some.jsonl"}
    assert told(TrainConfig()) == ("muon", 0.01, 0.003, 2000, 8, 250) and TrainConfig().length == 128
    assert told(SFTConfig(**more)) == ("muon", 0.003, 0.001, 1000, 32, 125)
    assert told(SFTConfig(**more, lora=4)) == ("adamw", 0.001, 0.001, 1000, 32, 125)
    assert told(VRPOConfig(**more)) == ("muon", 0.0003, 0.0001, 200, 8, 25)
    assert told(TrainConfig(minutes=1.0)) == ("muon", 0.01, 0.003, None, 8, 250)


def test_resuming_with_another_text_is_refused(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("abc " * 1000)
    config = TrainConfig(**{**QUICK, "data": str(text)}, out=str(tmp_path / "run"))
    list(train(config))
    text.write_text("abc " * 1000 + "cab " * 10)
    with pytest.raises(BadInput, match=r"^data: expected the text this run began with"):
        next(train(resume=tmp_path / "run"))


# ---- Crashes: a loss, gradient or weight that is not finite ----


def crash(monkeypatch, *calls: int, value: float = math.nan) -> None:
    """Give these steps, counted from now, a loss that is not finite."""
    count = itertools.count(1)
    monkeypatch.setattr(pretraining, "pretraining_loss", lambda *a: LOSS(*a) * (value if next(count) in calls else 1.0))


def all_finite(run: Path) -> bool:
    """Whether every tensor of every checkpoint is."""
    files = list((run / "checkpoints").glob("*/*.safetensors"))
    return bool(files) and all(t.isfinite().all() for file in files for t in load_file(file).values())


def test_a_finished_run_has_nothing_to_resume(tmp_path):
    list(train(TrainConfig(**QUICK, out=str(tmp_path / "run"))))
    with pytest.raises(BadInput, match=r"^resume: expected a run that is not finished, got .*run after all of its 6 "):
        next(train(resume=tmp_path / "run"))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_crash_goes_back_to_the_last_checkpoint_skips_the_batch_and_slows_down(tmp_path, monkeypatch, value):
    config = TrainConfig(**{**QUICK, "steps": 9}, out=str(tmp_path / "run"), keep=0)
    plain = list(train(TrainConfig(**{**QUICK, "steps": 9})))
    crash(monkeypatch, 5, value=value)
    states = [(step, copy.deepcopy(step.model.state_dict())) for step in train(config)]
    steps = [step for step, _ in states]
    assert [s.step for s in steps] == list(range(1, 10))  # steps and batches go on
    assert [math.isfinite(s.loss) for s in steps] == [True] * 4 + [False] + [True] * 4
    assert all(torch.equal(p, states[2][1][name]) for name, p in states[4][1].items())  # as after step 3
    assert [s.lr / p.lr for s, p in zip(steps, plain, strict=True)] == pytest.approx([1] * 5 + [1 / 4] * 4)
    assert any("step 5" in line and "quarter" in line for line in steps[4].notices)
    logged = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert logged[4]["loss"] is None and "step 5" in logged[4]["notices"][0]
    assert all_finite(tmp_path / "run")


def test_a_crash_before_the_first_checkpoint_goes_back_to_the_start(monkeypatch):
    start = next(train(TrainConfig(**{**QUICK, "steps": 1, "lr": 1e-290, "adam_lr": 1e-290}))).model.state_dict()
    crash(monkeypatch, 2)
    first, second = itertools.islice(train(TrainConfig(**QUICK)), 2)
    assert math.isnan(second.loss) and first.model is second.model
    assert all(torch.equal(p, start[name]) for name, p in second.model.state_dict().items())


def test_a_snapshot_can_be_put_back_more_than_once(monkeypatch):
    (*_, last) = train(TrainConfig(**QUICK))
    optimizers = make_optimizers(last.model, last.config)
    before = None
    for _ in range(3):
        for optimizer in optimizers:
            for p in (p for group in optimizer.param_groups for p in group["params"]):
                p.grad = torch.ones_like(p)
            optimizer.step()
        if before is None:
            before = snapshot(last.model, optimizers)
            expected = copy.deepcopy(before)
        else:
            restore(last.model, optimizers, before)
            assert_same(snapshot(last.model, optimizers), expected)


def test_a_crash_that_going_back_does_not_cure_ends_in_one_line(tmp_path, monkeypatch):
    crash(monkeypatch, 4, 5, 6, 7)
    steps = train(TrainConfig(**{**QUICK, "steps": 9}, out=str(tmp_path / "run")))
    assert [next(steps).step for _ in range(6)] == [1, 2, 3, 4, 5, 6]
    with pytest.raises(BadLuck, match=r"^loss: expected a finite one, got loss nan.* in step 7, .*; lower lr"):
        next(steps)
    assert all_finite(tmp_path / "run")


def test_progress_restores_the_patience(monkeypatch):
    crash(monkeypatch, 1, 2, 4, 5, 7, 8)  # each pair is cured by the next checkpoint
    (*_, last) = train(TrainConfig(**{**QUICK, "steps": 9}))
    assert last.step == 9 and math.isfinite(last.loss)


def test_a_weight_that_is_not_finite_never_reaches_a_checkpoint(tmp_path):
    steps = train(TrainConfig(**{**QUICK, "steps": 9}, out=str(tmp_path / "run"), checkpoint_every=1))
    next(steps).model.embed.weight.data[0, 0] = torch.inf  # of [MASK]: so is the loss
    assert not math.isfinite(next(steps).loss) and math.isfinite(next(steps).loss)
    for step in steps:
        if step.step == 4:  # of a token that no text has: the loss is finite
            step.model.embed.weight.data[step.tokenizer.pad_id] = torch.nan
    assert all_finite(tmp_path / "run")


def test_an_interrupted_run_that_had_crashed_ends_as_an_uninterrupted_one(tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    long = {**QUICK, "steps": 9, "eval_every": 4}
    crash(monkeypatch, 4, 6, 7)
    list(train(TrainConfig(**long, out=str(whole))))
    crash(monkeypatch, 4, 6, 7)
    calls = iter([False] * 3 + [True])
    assert len(list(train(TrainConfig(**long, out=str(parts)), stop=lambda: next(calls)))) == 4  # the crash is the last
    crash(monkeypatch, 2, 3)
    list(train(resume=parts))
    assert losses(parts) == losses(whole)
    assert_same(weights(parts), weights(whole))


def test_an_interruption_does_not_restore_the_patience(tmp_path, monkeypatch):
    crash(monkeypatch, 3)
    list(train(TrainConfig(**QUICK, out=str(tmp_path / "run")), stop=iter([False, False, True]).__next__))
    crash(monkeypatch, 1, 2, 3)
    with pytest.raises(BadLuck, match=r"in step 6, after going back 3 times"):
        list(train(resume=tmp_path / "run"))


# ---- What else a checkpoint has ----


def test_the_best_bound_its_step_and_its_checkpoint_survive_an_interruption(tmp_path):
    out = tmp_path / "run"
    config = TrainConfig(**{**QUICK, "steps": 9}, out=str(out), keep=1, checkpoint_every=1)
    for step in train(config, stop=iter([False] * 3 + [True]).__next__):
        if step.step == 3:
            assert step.best == 3
            step.model.head.weight.data.mul_(100)  # nothing later is as good
    assert [step.best for step in train(resume=out)] == [3] * 5
    assert [path.name for path in sorted((out / "checkpoints").iterdir())] == ["step-00000003", "step-00000009"]
    minillada.load(out / "checkpoints" / "step-00000003")


def test_a_best_bound_between_two_checkpoints_is_saved_too(tmp_path):
    list(train(TrainConfig(**QUICK, out=str(tmp_path / "run"), checkpoint_every=100)))
    assert [path.name for path in sorted((tmp_path / "run" / "checkpoints").iterdir())] == [
        "step-00000003",
        "step-00000006",
    ]


def test_time_precision_and_every_random_state_go_on_where_they_stopped(tmp_path, monkeypatch):
    draws = lambda: [random.random(), np.random.rand(), torch.rand(()).item()]
    config = TrainConfig(**{**QUICK, "precision": "auto"}, out=str(tmp_path / "run"))
    (*_, last) = train(config, stop=iter([False, True]).__next__)
    expected = draws()
    draws()
    other = "" if last.config.precision == "bfloat16" else "some"
    monkeypatch.setattr(optim, "bfloat16_instructions", lambda device: other)  # what a new run would choose by
    steps = train(resume=tmp_path / "run")
    step = next(steps)
    assert draws() == expected
    assert step.seconds > last.seconds and step.config.precision == last.config.precision and not step.notices


# ---- Validation ----


def test_the_loss_by_masking_level_adds_up_to_the_bound():
    (*_, last) = train(TrainConfig(**QUICK))
    assert [t for t, _ in last.levels] == pytest.approx([0.05 + 0.1 * i for i in range(10)])
    area = sum(nats for _, nats in last.levels) / 10
    assert area / last.text.characters_per_token == pytest.approx(last.bound, rel=0.05)


def test_each_masking_level_has_the_mean_loss_of_its_masked_tokens():
    (*_, last) = train(TrainConfig(**QUICK))
    c, text = last.config, last.text
    found = TextPretraining(text, c, last.model.config.mask_id).validate(last.model)
    bound, levels = found["bound"], found["levels"]
    rows = validation_batch(text.val, 128, c.length)
    values, _ = log_likelihoods(last.model, [([], row) for row in rows.tolist()], n_samples=2)
    assert bound == -values.mean().item() / c.length / text.characters_per_token
    rng, sums = torch.Generator().manual_seed(0), {}
    for row in rows:
        noised = exact_count(row.expand(2, -1), last.model.config.mask_id, sample_t(2, rng), rng)
        for xt, masked in zip(noised.xt, noised.masked, strict=True):
            with torch.no_grad():
                nats = torch.nn.functional.cross_entropy(last.model(xt[None])[0][masked], row[masked], reduction="none")
            sums.setdefault(math.ceil(10 * masked.float().mean().item() - 1e-6), []).extend(nats.tolist())
    expected = [x for i in sorted(sums) for x in ((i - 0.5) / 10, sum(sums[i]) / len(sums[i]))]
    assert [x for level in levels for x in level] == pytest.approx(expected, rel=1e-4)


# ---- A document in each row ----


def test_rows_are_whole_tales_whose_first_token_is_given_and_the_bound_counts_their_characters():
    made = make(TrainConfig(data="tales", steps=1, batch_size=4))
    c, objective, eos = made.config, made.objective, made.model.config.eos_id
    assert (c.rows, c.length, c.tokenizer) == ("documents", 136, "bpe:1024")
    batch, rng = next(objective.batches(0)), torch.Generator().manual_seed(0)
    for row in batch.tolist():
        assert row[0] == row[-1] == eos and is_tale(made.saves.decode(row).strip())
    for x0, noised in (objective.noise(batch, rng), objective.held_noise()):
        assert not noised.masked[:, 0].any() and noised.masked.any(1).all() and torch.equal(x0[:, 0], noised.xt[:, 0])
    bound = objective.validate(made.model)["bound"]
    texts = [made.saves.decode(row).strip() + "\n" for row in objective.held.tolist()]
    nats = model_bound(made.model, *objective.held_noise()).sum().item() / 2
    assert bound == pytest.approx(nats / sum(map(len, texts)), rel=0.02)


def test_who_asks_for_other_tokens_gets_windows_of_tales():
    assert TrainConfig(data="tales", tokenizer="characters").rows == "windows"
    assert TrainConfig(data="tales", preset="nano").rows == TrainConfig(data="docs").rows == "windows"
    with pytest.raises(BadInput, match="rows: expected"):
        TrainConfig(rows="lines")


# ---- Less memory, the same numbers ----


@pytest.mark.parametrize("option", [{"accumulate": 2}, {"accumulate": 4}, {"recompute": True}])
def test_less_memory_gives_the_same_losses(option):
    plain, less = (list(train(TrainConfig(**QUICK, **options))) for options in ({}, option))
    assert [s.loss for s in less] == pytest.approx([s.loss for s in plain], rel=1e-4)
    assert less[0].loss == pytest.approx(plain[0].loss, rel=1e-6) and less[0].grad_norm == pytest.approx(
        plain[0].grad_norm, rel=1e-5
    )


def test_a_recomputed_block_keeps_its_input_alone():
    kept = {False: 0, True: 0}  # bytes
    for recomputed in kept:
        config = TrainConfig(**QUICK, recompute=recomputed)
        now = make(config)
        x0 = validation_batch(now.text.val, 4, config.length)
        noised = exact_count(x0, now.model.config.mask_id, torch.full((4,), 0.5), torch.Generator())

        def note(x, recomputed=recomputed):
            kept[recomputed] += x.nbytes
            return x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            LOSS(now.called, x0, noised)
    assert kept[True] < kept[False] / 3


def test_a_model_that_cannot_be_compiled_gets_one_line(monkeypatch):
    def fails(graph, inputs):
        raise RuntimeError("no compiler\nanywhere")

    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: compile(model, backend=fails))
    with pytest.raises(
        BadInput, match=r"^compile: expected PyTorch to compile the model, got .*; leave the option out$"
    ):
        next(train(TrainConfig(**QUICK, compile=True)))


def test_a_compiled_model_learns_the_same(monkeypatch):
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: compile(model, backend="eager"))  # needs no compiler
    plain, fast = (list(train(TrainConfig(**{**QUICK, "steps": 3}, compile=on))) for on in (False, True))
    assert [s.loss for s in fast] == pytest.approx([s.loss for s in plain], rel=1e-5)


@pytest.mark.parametrize(
    ("able", "precision", "said"),
    [
        ({}, "float32", "no instructions"),
        ({"avx512_bf16": False, "amx_bf16": False}, "float32", "no instructions"),
        ({"avx512_bf16": True}, "bfloat16", "(avx512_bf16); --precision float32 turns it off"),
        ({"avx512_bf16": True, "amx_bf16": True}, "bfloat16", "(amx_bf16)"),
        ({"neon": True, "bf16": True}, "bfloat16", "(bf16)"),
    ],
)
def test_automatic_precision_is_what_the_processor_has_instructions_for(able, precision, said, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    monkeypatch.setattr(time, "perf_counter", lambda: pytest.fail("no default may depend on time"))
    found, (line,) = optim.choose_precision(TrainConfig())
    assert found == precision and line.startswith(f"precision {precision}: ") and said in line
    assert optim.choose_precision(TrainConfig(precision="float32")) == ("float32", [])
    assert not optim.bfloat16_instructions("mps")


def test_the_chosen_precision_is_said_once_and_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(optim, "bfloat16_instructions", lambda device: "some")
    steps = list(train(TrainConfig(**{**QUICK, "precision": "auto", "steps": 2}, out=str(tmp_path / "run"))))
    assert [step.config.precision for step in steps] == ["bfloat16"] * 2
    assert "bfloat16" in steps[0].notices[0] and not steps[1].notices
    assert json.loads((tmp_path / "run" / "run.json").read_text())["precision"] == "bfloat16"


def test_a_batch_that_cannot_be_split_evenly_is_refused():
    with pytest.raises(BadInput, match=r"^batch_size: expected a multiple of 3 .*, got 4; "):
        next(train(TrainConfig(**QUICK, accumulate=3)))


def test_a_training_counted_in_minutes_ends_in_time():
    (*_, last) = train(TrainConfig(**{**QUICK, "steps": None}, minutes=0.02))
    assert 1.0 < last.seconds < 10


def test_the_rate_warms_up_stays_and_decays():
    config = LearnConfig(warmup=0.1, decay=0.5)
    assert [rate(p, config) for p in (0, 0.05, 0.1, 0.5, 0.75, 1)] == [0, 0.5, 1, 1, 0.5, 0]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("preset", "huge"), ("preset", "llada-8b"), ("steps", 0), ("batch_size", 1.5), ("length", -1), ("lr", math.nan),
        ("minutes", 0), ("process", "noise"), ("precision", "int8"), ("optimizer", "sgd"), ("tokenizer", "words"),
        ("tokenizer", "bpe:10"), ("keep", -1), ("accumulate", 0),
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
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)  # else there is no bar
    with pytest.raises(SystemExit) as stopped:
        cli.run(train_tiny.main)
    printed = capsys.readouterr()
    assert stopped.value.code == 0
    assert printed.out.startswith(f"{out}: reading tales, making a vocabulary of bpe:")
    assert re.search(r"100% \|█+\| 8 steps, 0:00 left, <= \d\.\d{3} nats/char, [\d,]+ tok/s", printed.err)
    assert "bits/char" in printed.out
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
        while process.poll() is None and not ((out / "log.jsonl").exists() and (out / "log.jsonl").read_bytes()):
            pass
        process.send_signal(signal.SIGINT)
        printed, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == "\nsaving… (Ctrl-C again to kill)\n"
    assert f"--resume {out}" in printed
    assert next(train(resume=out)).step == len(losses(out))


def test_the_time_left_counts_down_steadily_whatever_an_evaluation_takes():
    config, told, seconds = TrainConfig(steps=1000, eval_every=100), [], []
    left = TimeLeft(config)
    for step in range(1, 1001):
        seconds.append(0.1 + 4 * (step % 100 == 0) + 0.02 * math.sin(step))
        told.append(left(step, seconds[-1], step % 100 == 0))
    assert told[20] == pytest.approx(sum(seconds[20:]), rel=0.4)  # before it knows what evaluations take
    assert all(t == pytest.approx(sum(seconds[step:]), rel=0.1, abs=1) for step, t in enumerate(told, 1) if step > 250)
    jumps = [abs(told[i] - (told[i - 1] - seconds[i])) for i in range(10, 1000)]
    assert max(jumps) < 1


def test_a_training_by_the_clock_shows_its_share_of_the_time(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    bar = TrainingBar(TrainConfig(minutes=2))
    bar.show(830, 50.4, False, "<= 1.402 nats/char")
    bar.close()
    assert " 42% |" in (shown := capsys.readouterr().err) and "830 steps, 1:10 left, <= 1.402 nats/char" in shown


# ---- Sudden ends ----

PROCESSES = multiprocessing.get_context("forkserver" if os.name == "posix" else "spawn")
if os.name == "posix":
    PROCESSES.set_forkserver_preload(["minillada.training.run"])  # torch is imported once, not for every kill


def go_on(out: Path) -> None:
    torch.set_num_threads(1)
    list(train(resume=out))


def ends_as_uninterrupted(kills: int, directory: Path) -> None:
    """Kill a training again and again, at random moments: its log and its weights must be those of one left alone."""
    dice, whole, out = random.Random(kills), directory / "whole", directory / "killed"
    quick = {**QUICK, "steps": 12 * kills, "eval_every": 50, "checkpoint_every": 2}
    list(train(TrainConfig(**quick, out=str(whole))))
    list(train(TrainConfig(**quick, out=str(out)), stop=lambda: True))  # from step 1 on there is a checkpoint
    newest, mid_save = 1, 0
    for _ in range(kills):
        process = PROCESSES.Process(target=go_on, args=(out,), daemon=True)
        process.start()
        target, deadline = newest + dice.randint(1, 6), time.monotonic() + 120
        while len((out / "log.jsonl").read_bytes().splitlines()) < target:
            assert process.is_alive() and time.monotonic() < deadline
        time.sleep(dice.uniform(0, 0.03))
        process.kill()
        process.join()
        mid_save += any(path.name.startswith(".") for path in (out / "checkpoints").iterdir())
        found, damaged = newest_checkpoint(out)
        assert not damaged and step_of(found) >= max(newest, target - 2), (
            "more is lost than what came after a checkpoint"
        )
        newest = step_of(found)
    print(f"{kills} kills, {mid_save} of them in the middle of a save, by step {newest} of {12 * kills}")
    list(train(resume=out))
    assert losses(out) == losses(whole)
    assert_same(weights(out), weights(whole))
    own = ("seconds", "config", "rng.python", "rng.numpy", "rng.torch")  # the config names the directory
    states = [load_state(newest_checkpoint(run)[0]) for run in (out, whole)]
    ours, theirs = ({name: value for name, value in state.items() if name not in own} for state in states)
    assert_same(ours, theirs)


@pytest.mark.skipif(os.name != "posix", reason="needs a kill that nothing survives")
def test_a_training_killed_five_times_ends_as_one_left_alone(tmp_path):
    ends_as_uninterrupted(5, tmp_path)


@pytest.mark.skipif(os.name != "posix", reason="needs a kill that nothing survives")
@pytest.mark.soak
def test_a_training_killed_a_hundred_times_ends_as_one_left_alone(tmp_path):
    ends_as_uninterrupted(100, tmp_path)
