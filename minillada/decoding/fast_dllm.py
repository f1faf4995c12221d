"""Fast-dLLM (arXiv:2505.22618): commit all that is sure enough, and compute again only the columns being decoded."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import BadInput
from ..model import KVCache
from ..strategies import CACHES, COMMITS, Ask, Guess, MaskPredictor, Method, Now, Whole, surest


class Threshold(Method):
    """Commit every hole with a score of at least tau, and always the surest (section 3.3): [.9,.2,.7] -> [T,F,T]."""

    def __init__(self, tau: float = 0.9) -> None:
        self.tau = tau

    def commit(self, now: Now, guess: Guess) -> Tensor:
        return surest(guess.score, (guess.score >= self.tau).sum(1).clamp(min=1))


class Factor(Method):
    """Commit the n surest, with the largest n whose n-th score is at least 1 - f / (n + 1) (from theorem 1).
    Scores [.9,.8,.5] and f 1: the bounds are 1/2, 2/3 and 3/4, so n = 2."""

    def __init__(self, f: float = 1.0) -> None:
        self.f = f

    def commit(self, now: Now, guess: Guess) -> Tensor:
        n = torch.arange(1, guess.score.shape[1] + 1, device=guess.score.device)
        ordered = guess.score.sort(dim=1, descending=True).values
        return surest(guess.score, ((ordered >= 1 - self.f / (n + 1)) * n).amax(1).clamp(min=1))


class WindowCache:
    """Evaluate the whole canvas when a window begins, and then only some columns, with the keys and values of the rest.
    Those go out of date as tokens are committed: an approximation, exact for a model of one layer."""

    def __init__(self, predict: Whole, columns: Callable[[slice, int], slice]) -> None:
        self.predict, self.columns = predict, columns  # (window, T) -> the columns computed again
        self.config, self.device = predict.config, predict.device
        self.window: slice | None = None  # whose keys and values are in the cache
        self.cache = KVCache()

    def __call__(self, ask: Ask) -> Tensor:
        columns = self.columns(ask.window, ask.x.shape[1])
        if ask.window != self.window:
            self.window, self.cache, columns = ask.window, KVCache(), slice(0, ask.x.shape[1])
        row, column = ask.where
        positions = torch.arange(columns.start, columns.stop, device=ask.x.device)
        window = slice(ask.window.start - columns.start, ask.window.stop - columns.start)
        part = ask._replace(x=ask.x[:, columns], where=(row, column - columns.start), window=window)
        return self.predict(part._replace(positions=positions), self.cache)


def of_module(cache: str, predict: MaskPredictor) -> Whole:
    """Return the predictor if it evaluates the module, of which any part can be computed again. Raises BadInput."""
    if not isinstance(predict, Whole):
        what = f"cache: expected none or prefix with {type(predict).__name__}, got {cache}"
        raise BadInput(f"{what}; leave it out, or load the model into the module")
    return predict


COMMITS |= {"threshold": Threshold, "factor": Factor}
CACHES |= {  # prefix reuses what stands before the window, dual also what stands behind it
    "prefix": lambda: lambda predict, given: WindowCache(predict, lambda window, length: slice(window.start, length)),
    "dual": lambda: lambda predict, given: WindowCache(of_module("dual", predict), lambda window, length: window),
}
