"""Show how far a training has come and how long it will take, steadily, on a terminal."""

import time

from tqdm import tqdm

from ..errors import in_a_line
from ..training.config import RunConfig


class TimeLeft:
    """Estimate how many seconds of a training are left. Steps that evaluate are timed apart from the others, and what
    was said before is corrected slowly, so that the estimate counts down instead of jumping."""

    def __init__(self, config: RunConfig) -> None:
        self.config, self.elapsed = config, 0.0
        self.plain, self.n_plain = 0.0, 0  # mean seconds of a step that does not evaluate, and how many there were
        self.extra, self.n_extra = 0.0, 0  # mean seconds that an evaluation adds
        self.told = 0.0

    def __call__(self, step: int, seconds: float, evaluated: bool) -> float:
        """Take into account a step that took so many seconds, the script's own work included; return the estimate."""
        if evaluated and self.n_plain:
            self.n_extra += 1
            self.extra += (seconds - self.plain - self.extra) / self.n_extra
        elif seconds and not evaluated:
            self.n_plain += 1
            self.plain += (seconds - self.plain) / min(self.n_plain, 200)
        self.elapsed += seconds or 1e-9
        extra = self.extra if self.n_extra else 10 * self.plain  # a guess, before the first evaluation
        left = self.config.steps - step
        estimate = left * self.plain + -(-left // self.config.eval_every) * extra
        counted, pace = self.told - seconds, min(10.0, self.elapsed)  # seconds in which it corrects itself
        self.told = max(0.0, counted + (estimate - counted) * min(1.0, min(seconds, self.plain or seconds) / pace))
        return self.told


class TrainingBar:
    """Draw one line: `42% |████    | 830 steps, 1:23 left, <= 1.402 nats/char, 12,000 tok/s`. With config.minutes the
    share is that of the time, else that of the steps. shown: False draws nothing anywhere."""

    def __init__(self, config: RunConfig, shown: bool = True) -> None:
        self.config, self.left, self.seen, self.drawn = config, TimeLeft(config), None, 0.0
        form = {"bar_format": "{percentage:3.0f}% |{bar}| {desc}", "dynamic_ncols": True}
        self.bar = tqdm(total=1.0, disable=None if shown else True, **form)

    def show(self, step: int, trained: float, evaluated: bool, figures: str) -> None:
        """Take into account a step, after `trained` seconds of training; draw at most twice a second."""
        now, steps, minutes = time.perf_counter(), self.config.steps, self.config.minutes
        shares, lefts = [], []
        if steps:
            took = 0.0 if self.seen is None else now - self.seen  # not the first, which began before there was a bar
            shares, lefts = [step / steps], [self.left(step, took, evaluated)]
        if minutes:
            shares, lefts = [*shares, trained / 60 / minutes], [*lefts, 60 * minutes - trained]
        self.seen = now
        if now - self.drawn >= 0.5 or max(shares) >= 1:
            self.drawn, self.bar.n = now, min(1.0, max(shares))
            self.bar.set_description_str(f"{step:,} steps, {clock(min(lefts))} left, {figures}")

    def write(self, text: str) -> None:
        """Print a line on standard output, above the bar."""
        self.bar.write(in_a_line(text))

    def close(self) -> None:
        self.bar.close()


def clock(seconds: float) -> str:
    """Return a time: 83 -> 1:23, 3661 -> 1:01:01."""
    return tqdm.format_interval(max(0, round(seconds))).removeprefix("0")
