"""Send a run's numbers to TensorBoard or Weights & Biases too, each imported only if it is asked for. A logger is a
function that is given every record of `RUN/log.jsonl`, which is written in any case."""

from collections.abc import Callable, Iterator
from pathlib import Path

from ..errors import BadInput, check_one_of
from .config import CONFIGS

Log = Callable[[dict], None]


def scalars(record: dict) -> Iterator[tuple[str, float]]:
    """Yield (name, number) for the numbers of a record, without the step; the loss at level 0.5 is levels/0.50."""
    for name, value in record.items():
        if name != "step" and isinstance(value, (int, float)) and not isinstance(value, bool):
            yield name, value
    for t, nats in record.get("levels") or ():
        if nats is not None:
            yield f"levels/{t:.2f}", nats


def tensorboard(directory: Path, config: dict) -> Log:
    """Return a logger that writes event files for `tensorboard --logdir RUN`, flushed after every evaluation."""
    from torch.utils.tensorboard import SummaryWriter

    writer = None

    def log(record: dict) -> None:
        nonlocal writer
        if writer is None:  # hides what an interrupted run wrote of this step and of later ones
            writer = SummaryWriter(str(directory / "tensorboard"), purge_step=record["step"])
            writer.add_text("config", "\n".join(f"    {name}: {value}" for name, value in config.items()))
        for name, value in scalars(record):
            writer.add_scalar(name, value, record["step"])
        if any(record.get(kind.held_out) is not None for kind in CONFIGS.values()):
            writer.flush()

    return log


def wandb(directory: Path, config: dict) -> Log:
    """Return a logger for a run of Weights & Biases, named like the directory; a resumed one is a new one there.
    `wandb login` says who is logged in, $WANDB_MODE whether to send."""
    import wandb

    run = wandb.init(project="minillada", name=directory.name, dir=str(directory), config=config)
    return lambda record: run.log(dict(scalars(record)), step=record["step"])


LOGGERS: dict[str, Callable[[Path, dict], Log]] = {"tensorboard": tensorboard, "wandb": wandb}


def make(name: str, directory: str | Path, config: dict) -> Log:
    """Return the logger of that name, for the run in `directory`. Raises BadInput if it, or its package, is unknown."""
    check_one_of("logger", name, LOGGERS)
    try:
        return LOGGERS[name](Path(directory), config)
    except ImportError as error:
        raise BadInput(f"logger: expected the package {name}, got {error}; pip install 'minillada[{name}]'") from None
