"""Every record reaches the logger that was asked for, and a missing package is one line."""

import sys
from types import ModuleType

import pytest

from minillada.errors import BadInput
from minillada.training import loggers

RECORDS = [
    {"step": 7, "loss": 2.5, "bound": None, "levels": None, "precision": "bfloat16", "notices": ["one"]},
    {"step": 8, "loss": 2.25, "bound": 1.5, "levels": [[0.05, 0.5], [0.5, 1.25], [0.95, None]], "best": True},
]


class Recorder:
    """Stands in for a SummaryWriter and for a run of Weights & Biases: `calls` is what it was told."""

    def __init__(self, *args, **options):
        self.calls = [("made", args, options)]

    def __getattr__(self, name):
        return lambda *args, **options: self.calls.append((name, args, options))

    def told(self, name):
        return [args for called, args, _ in self.calls if called == name]


@pytest.fixture
def made(monkeypatch):
    """Every Recorder made by the stand-in packages."""
    found = []

    def make(*args, **options):
        found.append(Recorder(*args, **options))
        return found[-1]

    board, wandb = ModuleType("torch.utils.tensorboard"), ModuleType("wandb")
    board.SummaryWriter, wandb.init = make, make
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    return found


def test_tensorboard_gets_every_number_and_the_loss_by_level(made, tmp_path):
    log = loggers.make("tensorboard", tmp_path, {"lr": 0.01})
    assert not made  # nothing is written before the first step
    for record in RECORDS:
        log(record)
    (writer,) = made
    assert writer.calls[0] == ("made", (str(tmp_path / "tensorboard"),), {"purge_step": 7})
    assert writer.told("add_scalar") == [
        ("loss", 2.5, 7),
        ("loss", 2.25, 8),
        ("bound", 1.5, 8),
        ("levels/0.05", 0.5, 8),
        ("levels/0.50", 1.25, 8),
    ]
    assert "lr: 0.01" in writer.told("add_text")[0][1]
    assert [name for name, *_ in writer.calls][-1] == "flush" and len(writer.told("flush")) == 1


@pytest.mark.parametrize("name", ["preference_loss", "jump_loss", "wrong"])
def test_an_evaluation_of_other_objectives_is_flushed_too(made, tmp_path, name):
    log = loggers.make("tensorboard", tmp_path, {})
    for loss in (None, 0.5):
        log({"step": 1, "loss": 2.5, name: loss})
    assert len(made[0].told("flush")) == 1


def test_weights_and_biases_gets_every_number_under_its_step(made, tmp_path):
    log = loggers.make("wandb", tmp_path / "docs-1", {"lr": 0.01})
    for record in RECORDS:
        log(record)
    (run,) = made
    _, _, options = run.calls[0]
    assert options["config"] == {"lr": 0.01} and options["name"] == "docs-1" and options["dir"].endswith("docs-1")
    assert run.calls[1] == ("log", ({"loss": 2.5},), {"step": 7})
    assert run.calls[2][1][0]["levels/0.50"] == 1.25 and run.calls[2][2] == {"step": 8}


@pytest.mark.parametrize("name", loggers.LOGGERS)
def test_a_missing_package_is_one_line_that_says_what_to_install(name, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, {"tensorboard": "torch.utils.tensorboard"}.get(name, name), None)
    with pytest.raises(BadInput, match=rf"pip install 'minillada\[{name}\]'") as error:
        loggers.make(name, tmp_path, {})
    assert "\n" not in str(error.value) and list(tmp_path.iterdir()) == []


def test_an_unknown_logger_is_refused_with_the_known_ones(tmp_path):
    with pytest.raises(BadInput, match="tensorboard, wandb"):
        loggers.make("printer", tmp_path, {})


def test_the_real_tensorboard_writes_what_can_be_read_again(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = loggers.make("tensorboard", tmp_path, {"lr": 0.01})
    for record in RECORDS:
        log(record)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(7, 2.5), (8, 2.25)]
