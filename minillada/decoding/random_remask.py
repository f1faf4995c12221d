"""Random remasking, as popular write-ups describe it. It keeps no distribution and corrects by chance."""

from torch import Tensor

from ..strategies import REVISIONS, Guess, Method, Now, surest


class RandomRemask(Method):
    """In step i of n commit every score above 0.9 (1 - i/n) + 0.1, and always the surest; make a hole of every token
    that was committed in an earlier step with probability 0.1 (1 - i/n)."""

    def commit(self, now: Now, guess: Guess) -> Tensor:
        sure = guess.score > 0.9 * now.left / now.steps + 0.1
        return surest(guess.score, sure.sum(1).clamp(min=1))

    def revise(self, now: Now) -> Tensor:
        return (now.uniform() < 0.1 * now.left / now.steps) & ~now.held.isnan()


REVISIONS["random-remask"] = RandomRemask
