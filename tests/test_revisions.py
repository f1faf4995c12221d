"""Rules that remember or take tokens back, each against a short trace computed by hand."""

import math

import pytest
import torch
from oracles import Oracle, tiny_model

from minillada.model import ModelConfig
from minillada.sampler import Canvas, SampleConfig, method_of, stream
from minillada.strategies import Ask, Now, Whole

MASK, WORDS = 3, 3


class Script(Oracle):
    """The n-th evaluation gives token 0 the n-th list of probabilities, by position; the other tokens share the rest.

    A shadow, which repeats a position past the end of the text, takes it from the n-th list of `beliefs`.
    """

    def __init__(self, *says: list[float], beliefs: tuple[list[float], ...] = ()) -> None:
        super().__init__(ModelConfig(vocab_size=WORDS + 1, mask_id=MASK, n_layer=1, max_len=64), None)
        self.says, self.beliefs = says, beliefs

    def forward(self, tokens, attn_mask=None, positions=None, where=None, cache=None):
        says, positions = self.says[self.calls], [] if positions is None else positions
        p = torch.tensor([*says, *(self.beliefs[self.calls][i] for i in positions[len(says) :])], dtype=torch.float64)
        rest = ((1 - p) / (WORDS - 1))[:, None].expand(-1, WORDS - 1)
        table = torch.cat([p[:, None], rest, torch.zeros(len(p), 1)], dim=1).log()  # [MASK] is never right
        self.logits = lambda x: table.expand(len(x), -1, -1)
        return super().forward(tokens, where=where)


def trace(model, steps, width, **options):
    """What each evaluation committed and what was taken back before the next one was yielded, as lists of positions."""
    config = SampleConfig(width, steps, width, **options)
    done = list(stream(model, Canvas.infill([[MASK] * width], model.config), config))
    assert not (done[-1].x == MASK).any()
    return [(s.committed[0].nonzero().flatten().tolist(), s.revised[0].nonzero().flatten().tolist()) for s in done]


def throw(monkeypatch, *dice: list[float]):
    """Chance by hand: what the rules draw, in the order in which they do."""
    throws = iter(dice)
    monkeypatch.setattr(Now, "uniform", lambda now: torch.tensor([next(throws)]))


# ---- KLASS ----------------------------------------------------------------------------------------------------------


def test_klass_commits_together_what_is_sure_and_has_been_steady_for_two_steps():
    model = Script(
        [0.96, 0.95, 0.90, 0.90, 0.50, 0.40],  # nothing seen before: the quota's one
        [0.96, 0.95, 0.90, 0.90, 0.50, 0.40],  # steady for one step: one
        [0.96, 0.95, 0.90, 0.90, 0.50, 0.99],  # 2 and 3 are sure and steady; 4 is not sure, 5 not steady
        [0.96, 0.95, 0.90, 0.90, 0.50, 0.99],  # 5 is steady for one step: the quota's one, the surest
        [0.96, 0.95, 0.90, 0.90, 0.50, 0.99],
    )
    committed = [c for c, _ in trace(model, 6, 6, commit="klass:0.6,0.01")]
    assert committed == [[0], [1], [2, 3], [5], [4]]


def test_klass_forgets_between_windows():
    model = Script(*[[0.9] * 4] * 4)
    config = SampleConfig(4, 4, 2, commit="klass:0.6,0.01")
    done = list(stream(model, Canvas.infill([[MASK] * 4], model.config), config))
    assert [step.committed[0].sum().item() for step in done] == [1, 1, 1, 1]


# ---- WINO -----------------------------------------------------------------------------------------------------------


def test_wino_takes_back_what_its_shadow_doubts_but_fewer_than_it_just_committed():
    model = Script(
        [0.95, 0.70, 0.65, 0.30],  # three above 0.6
        [0.95, 0.70, 0.65, 0.50],  # nothing above 0.6: the surest; 1 and 2 are doubted, and two may go back
        [0.95, 0.80, 0.70, 0.50],  # both above 0.6; 0 is doubted, but only one was committed before: none goes back
        [0.95, 0.80, 0.70, 0.50],
        beliefs=([], [0.95, 0.50, 0.60, math.nan], [0.10, math.nan, math.nan, 0.95], [1.0] * 4),
    )
    assert trace(model, 8, 4, revise="wino:0.6,0.9") == [([0, 1, 2], []), ([3], [1, 2]), ([1, 2], [])]


def watched(model, x, window, attn_mask=None):
    """The logits of x's holes beside the shadows, and what the shadows believe."""
    method = method_of(SampleConfig(revise="wino"))
    where = (x == model.config.mask_id).nonzero(as_tuple=True)
    logits = method.wrap(Whole(model))(Ask(x, where, window, torch.arange(len(x)), attn_mask))
    return logits, method.belief


def test_winos_shadows_are_seen_by_nobody_and_padding_is_seen_by_no_shadow():
    model = tiny_model().double()
    x = torch.tensor([[13, 1, 2, 3, 15, 5, 15], [4, 1, 2, 15, 6, 15, 15]])
    valid = torch.tensor([[False] + [True] * 6, [True] * 7])[:, None, None, :]
    logits, belief = watched(model, x, slice(3, 7), valid)
    assert torch.allclose(logits, model(x, valid)[x == 15])
    _, alone = watched(model, x[:1, 1:], slice(2, 6))
    assert torch.allclose(belief[0], alone[0], equal_nan=True)
    assert belief.isnan().tolist() == [[False, True, False, True], [True, False, True, True]]


def test_a_shadow_of_a_one_layer_model_says_what_masking_its_token_would():
    model = tiny_model(n_layer=1).double()
    x = torch.tensor([[1, 2, 3, 15, 5]])
    _, belief = watched(model, x, slice(2, 5))
    for column in (2, 4):
        hidden = x.clone()
        hidden[0, column] = 15
        expected = model(hidden)[0, column].softmax(-1)[x[0, column]]
        assert belief[0, column - 2].item() == pytest.approx(expected.item())


# ---- ReMDM ----------------------------------------------------------------------------------------------------------


def test_remdm_cap_by_hand(monkeypatch):
    model = Script(*[[0.9, 0.8, 0.7, 0.6]] * 4)
    throw(
        monkeypatch,
        [0.1, 0.2, 0.3, 0.9],  # t = 1: each hole with (1 - 0.75) / 1 = 0.25: two are due, the surest
        [0.0, 0.0, 0.0, 0.0],  # nothing is held yet
        [0.9, 0.9, 0.41, 0.42],  # t = 0.75: (0.25 + 0.25 * 0.25) / 0.75 = 0.417 with sigma = 0.25: one
        [0.24, 0.25, 0.1, 0.1],  # below 0.25: position 0; 2 and 3 were holes
        [0.0, 0.7, 0.0, 0.7],  # t = 0.5: (0.25 + 0.25 * 0.5) / 0.5 = 0.75, of the holes 0 and 3: both
        [0.9, 0.24, 0.9, 0.9],  # position 1
    )
    expected = [([0, 1], []), ([2], [0]), ([0, 3], [1]), ([1], [])]
    assert trace(model, 4, 4, revise="remdm-cap:0.25") == expected


def test_remdm_rescale_by_hand(monkeypatch):
    model = Script(*[[0.9, 0.8]] * 4)
    throw(
        monkeypatch,
        [0.1, 0.9],  # t = 1: 0.25: one
        [0.0, 0.0],
        [0.9, 0.49],  # t = 0.75, sigma_max = 1, sigma = 0.5: (0.25 + 0.5 * 0.25) / 0.75 = 0.5: position 1
        [0.49, 0.0],  # position 0
        [0.74, 0.0],  # t = 0.5, sigma_max = 0.5, sigma = 0.25: (0.25 + 0.25 * 0.5) / 0.5 = 0.75: position 0
        [0.0, 0.24],  # position 1
    )
    assert trace(model, 4, 2, revise="remdm-rescale:0.5") == [([0], []), ([1], [0]), ([0], [1]), ([1], [])]


def test_remdm_conf_takes_back_the_least_sure_and_lets_the_holes_make_up_for_it(monkeypatch):
    model = Script(*[[0.9, 0.5, 0.4, 0.3]] * 4)
    share = 1 / (1 + math.exp(-0.4))  # softmax(-0.9, -0.5) gives this to position 1, committed with 0.5
    throw(
        monkeypatch,
        [0.1, 0.2, 0.3, 0.9],  # t = 1: 0.25, nothing held: two
        [0.0, 0.0, 0.0, 0.0],
        [0.9, 0.9, 0.8, 0.84],  # t = 0.75: sigma_max = 1, one token to give back: 1/3 + 1/2 = 0.833: one hole
        [1 - share, share - 0.01, 0.0, 0.0],  # position 1
        [0.9, 0.8, 0.9, 0.74],  # t = 0.5: sigma_max = 0.5 is given back: 1/2 + 0.5/2 = 0.75 of the holes 1 and 3: one
        [0.9, 0.0, 0.9, 0.9],  # position 1 was a hole
    )
    expected = [([0, 1], []), ([2], [1]), ([1], []), ([3], [])]
    assert trace(model, 4, 4, revise="remdm-conf") == expected


@pytest.mark.parametrize("revise", ["remdm-cap:0.3", "remdm-rescale:0.8", "remdm-conf", "remdm-cap:0"])
def test_remdm_keeps_the_share_of_holes_of_an_ancestral_sampler(revise):
    model = Oracle(ModelConfig(vocab_size=4, mask_id=3, n_layer=1), lambda x: torch.zeros(*x.shape, 4))
    rows, steps = 20_000, 8
    config = SampleConfig(4, steps, 4, temperature=1.0, remasking="random", revise=revise)
    taken_back = 0
    for step in stream(model, Canvas.infill([[3] * 4] * rows, model.config), config):
        share = (step.x == 3).double().mean().item()
        expected = 1 - (step.step + 1) / steps
        assert share == pytest.approx(expected, abs=4 * 0.5 / rows**0.5)
        taken_back += step.revised.sum().item()
    assert (taken_back > 0) == (revise != "remdm-cap:0")


# ---- random remasking -----------------------------------------------------------------------------------------------


def test_random_remasking_by_hand(monkeypatch):
    model = Script([0.9, 0.8, 0.7, 0.6], [0.9, 0.78, 0.77, 0.6], [0.9, 0.5, 0.56, 0.54], [0.3, 0.3, 0.3, 0.3])
    throw(
        monkeypatch,  # thrown before the step commits, for the tokens of earlier steps
        [0.0, 0.0, 0.0, 0.0],  # step 0 of 4: above 1.0 there is none: the surest
        [0.074, 0.0, 0.0, 0.0],  # step 1: above 0.775: position 1; below 0.075: position 0 goes back
        [0.0, 0.049, 0.0, 0.0],  # step 2: above 0.55: 0 and 2; below 0.05: position 1
    )
    assert trace(model, 4, 4, revise="random-remask") == [([0], []), ([1], [0]), ([0, 2], [1]), ([1, 3], [])]
