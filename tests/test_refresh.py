import math
from itertools import pairwise

import pytest
import torch
from oracles import tiny_model

from minillada.decoding.refresh import Refresh
from minillada.decoding.refresh import refresh as policy
from minillada.errors import BadInput
from minillada.model import LLaDA
from minillada.strategies import Ask, Guided, Whole

MASK, PROMPT, LENGTH = 15, 4, 16
EXPERTS = {"n_expert": 4, "n_expert_active": 2, "d_expert": 8}
VARIANTS = {
    "dense": {},
    "one layer": {"n_layer": 1},
    "grouped queries": {"n_head": 4, "n_kv_head": 2},
    "wide heads, biases, tied head": {"d_head": 24, "qkv_bias": True, "tie_head": True},
    "qk norm, partial rotary": {"qk_norm": True, "rotary_dim": 4},
    "experts": EXPERTS,
    "dense first": {**EXPERTS, "dense_layers": (0,), "d_shared_expert": 8, "router": "sigmoid"},
}
EVERY_CALL = {"both every call": (1, 1, 0.25), "share of one": (1, 7, 1.0), "nothing in between": (1, 1, 0.0)}


def prompts(batch: int = 2, prompt: int = PROMPT) -> tuple[torch.Tensor, torch.Tensor]:
    """A canvas of holes after a random prompt, and where the prompt is, (B,T) each."""
    x = torch.full((batch, LENGTH), MASK)
    x[:, :prompt] = torch.randint(0, 13, (batch, prompt), generator=torch.Generator().manual_seed(0))
    return x, x != MASK


def canvases(x: torch.Tensor, calls: int = 6) -> list[torch.Tensor]:
    """x, and again and again with one more hole filled in each row."""
    series, rng = [x], torch.Generator().manual_seed(1)
    for _ in range(calls - 1):
        place = (series[-1] == MASK).double().multinomial(1, generator=rng)
        series.append(series[-1].scatter(1, place, torch.randint(0, 13, place.shape, generator=rng)))
    return series


def make(model: LLaDA, given: torch.Tensor, *every) -> Refresh:
    return Refresh(Whole(model), given, *every)


def every(predict, x: torch.Tensor, attn_mask=None, positions=None, rows=None) -> torch.Tensor:
    """The logits of all places of x, (R,T,V)."""
    where = (x == x).nonzero(as_tuple=True)
    rows = torch.arange(len(x)) if rows is None else rows
    return predict(Ask(x, where, slice(0, x.shape[1]), rows, attn_mask, positions)).view(*x.shape, -1)


def some(predict, x: torch.Tensor, where: tuple) -> torch.Tensor:
    """The logits of some places, (N,V)."""
    return predict(Ask(x, where, slice(0, x.shape[1]), torch.arange(len(x))))


def renewed(refresh: Refresh, x: torch.Tensor) -> torch.Tensor:
    """Where one more call computed each layer's output again: (layers,B,T) bool."""
    refresh.change += 1000  # so that what is computed again differs, even where its value is the same
    before = refresh.change.clone()
    every(refresh, x)
    return (refresh.change != before).any(-1)


def rows_through(part: str, model: LLaDA) -> list[int]:
    """A list that grows by the number of rows whenever this part of a block is evaluated, from now on."""
    counts = []
    for layer in model.layers:
        layer.get_submodule(part).register_forward_hook(lambda _, args, out: counts.append(out.shape[:-1].numel()))
    return counts


# ---- refreshed in every call it is the model ------------------------------------------------------------------------


@pytest.mark.parametrize("ways", EVERY_CALL.values(), ids=EVERY_CALL.keys())
@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS.keys())
def test_refreshed_in_every_call_it_is_the_model(fields, ways):
    model, (x, given) = tiny_model(**fields), prompts()
    refresh = make(model, given, *ways)
    for canvas in canvases(x):
        where = (canvas == MASK).nonzero(as_tuple=True)
        assert torch.allclose(some(refresh, canvas, where), model(canvas, where=where), atol=1e-5)
        assert torch.allclose(every(refresh, canvas), model(canvas), atol=1e-5)


def test_half_precision_stays_close_to_the_model():
    model, (x, given) = tiny_model(**EXPERTS).bfloat16(), prompts()
    refresh = make(model, given, 1, 1)
    for canvas in canvases(x):
        assert every(refresh, canvas).dtype == torch.bfloat16
        assert torch.allclose(every(refresh, canvas).float().softmax(-1), model(canvas).float().softmax(-1), atol=0.05)


def test_positions_turn_queries_and_keys_as_in_the_model():
    model, (x, given) = tiny_model(), prompts()
    positions = 3 * torch.arange(LENGTH)
    refresh = make(model, given, 1, 1)
    assert torch.allclose(every(refresh, x, positions=positions), model(x, positions=positions), atol=1e-5)
    assert not torch.allclose(every(refresh, x), model(x, positions=positions), atol=1e-2)


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
def test_padding_is_never_looked_at(left):
    model, (x, given) = tiny_model(), prompts()
    wide = torch.full((2, 3), 13)
    padded = [torch.cat([wide, x] if left else [x, wide], 1) for x in canvases(x)]
    valid = torch.cat([wide == 0, given | True] if left else [given | True, wide == 0], 1)
    valid[1] = True  # but the second row's padding is part of it
    mask = valid[:, None, None, :]
    refresh = make(model, torch.cat([wide > 0, given] if left else [given, wide > 0], 1), 1, 1)
    for x in padded:
        assert torch.allclose(every(refresh, x, mask)[valid], model(x, mask)[valid], atol=1e-5)
        assert torch.allclose(every(refresh, x, mask[1:])[1], model(x)[1], atol=1e-5)  # one mask for all rows


def test_guidance_remembers_the_rows_without_their_prompt_apart():
    model, (x, given) = tiny_model(), prompts()
    plain, reused = Guided(Whole(model), 1.5, given), Guided(make(model, given, 1, 1), 1.5, given)
    for canvas in canvases(x):
        where = (canvas == MASK).nonzero(as_tuple=True)
        assert torch.allclose(some(reused, canvas, where), some(plain, canvas, where), atol=1e-5)


def decode(predict, x: torch.Tensor) -> torch.Tensor:
    """One row's holes filled with their likeliest token, the surest hole first."""
    x = x.clone()
    while (x == MASK).any():
        place = (x[0] == MASK).nonzero().flatten()
        logits = some(predict, x, (torch.zeros_like(place), place))
        logits[:, MASK] = -torch.inf
        sure, token = logits.softmax(-1).max(-1)
        x[0, place[sure.argmax()]] = token[sure.argmax()]
    return x


@pytest.mark.parametrize("fields", [{}, EXPERTS], ids=["dense", "experts"])
def test_a_whole_answer_is_the_models_own_when_refreshed_in_every_call(fields):
    model = tiny_model(**fields)
    x, given = prompts(batch=1)
    answer = decode(Whole(model), x)
    assert torch.equal(decode(make(model, given, 1, 1), x), answer)
    assert torch.equal(decode(make(model, given, 1, 9, 1.0), x), answer)


# ---- what is exact in between ---------------------------------------------------------------------------------------


def test_in_one_layer_what_is_renewed_is_exact_and_the_rest_is_what_it_was():
    model, (x, given) = tiny_model(n_layer=1), prompts()  # keys and values are functions of their own token
    refresh = make(model, given, 50, 50, 0.0)
    held = every(refresh, x)
    for before, after in pairwise(canvases(x)):
        logits, exact, new = every(refresh, after), model(after), before != after
        assert torch.allclose(logits[new], exact[new], atol=1e-5)
        assert torch.equal(logits[~new], held[~new])
        assert not torch.allclose(logits[~new], exact[~new], atol=1e-2)
        held = logits


def test_in_one_layer_a_refreshed_answer_is_exact_though_the_prompt_is_not():
    model, (x, given) = tiny_model(n_layer=1), prompts()
    refresh = make(model, given, 50, 2, 0.0)
    for call, canvas in enumerate(canvases(x)):
        logits, exact = every(refresh, canvas), model(canvas)
        assert torch.allclose(logits[~given], exact[~given], atol=1e-5) == (call % 2 == 0)
        assert torch.allclose(logits[given], exact[given], atol=1e-5) == (call == 0)


def test_in_one_layer_a_share_keeps_the_whole_answer_exact():
    model, (x, given) = tiny_model(n_layer=1), prompts()
    refresh = make(model, given, 50, 50, 0.1)
    for canvas in canvases(x):
        assert torch.allclose(every(refresh, canvas)[~given], model(canvas)[~given], atol=1e-5)


def test_in_three_layers_reuse_is_an_approximation():
    model, (x, given) = tiny_model(n_layer=3), prompts()
    refresh, (first, second, *_) = make(model, given), canvases(x)
    assert torch.allclose(every(refresh, first), model(first), atol=1e-5)
    logits, new = every(refresh, second), first != second
    assert not torch.allclose(logits, model(second), atol=1e-3)
    assert not torch.allclose(logits[new], model(second)[new], atol=1e-4)


def test_prompt_and_answer_are_refreshed_each_in_its_own_calls():
    x, given = prompts()
    refresh = make(tiny_model(), given, 3, 2, 0.0)
    every(refresh, x)
    for call in range(1, 7):
        places = renewed(refresh, x)
        assert (places[:, given] == (call % 3 == 0)).all()
        assert (places[:, ~given] == (call % 2 == 0)).all()


# ---- what is computed -----------------------------------------------------------------------------------------------


def test_between_refreshes_a_quarter_of_the_answer_is_computed_past_the_first_layer():
    model, (x, given) = tiny_model(n_layer=3), prompts()
    refresh, (first, second, *_) = make(model, given, 50, 7, 0.25), canvases(x)
    counts = rows_through("ffn", model)
    every(refresh, first)
    every(refresh, second)
    answer = 2 * (LENGTH - PROMPT)
    assert counts == 3 * [2 * LENGTH] + [answer, answer // 4, answer // 4]


@pytest.mark.parametrize(("part", "rows"), [("attn.q", 6), ("attn.k", 6), ("attn.o", 6), ("attn.v", 24)])
def test_only_values_are_computed_for_places_that_are_not_renewed(part, rows):
    model, (x, given) = tiny_model(n_layer=3), prompts()
    refresh = make(model, given)
    every(refresh, x)
    counts = rows_through(part, model)
    every(refresh, x)
    assert counts == [24, rows, rows]


def test_without_share_only_the_changed_tokens_values_are_computed():
    model, (x, given) = tiny_model(), prompts(batch=1)
    refresh, (first, second, *_) = make(model, given, 50, 7, 0.0), canvases(x)
    every(refresh, first)
    counts = rows_through("attn.v", model)
    every(refresh, second)
    assert counts == [1, 1]


def test_rows_of_unequal_length_renew_each_their_own_share():
    x, given = prompts(batch=3)
    given[1, :7], given[2] = True, True
    refresh = make(tiny_model(), given, 50, 7, 0.3)
    every(refresh, x)
    places = renewed(refresh, x)
    assert places.sum(-1).tolist() == [[12, 9, 0], [math.ceil(0.3 * 12), math.ceil(0.3 * 9), 0]]
    assert not places[:, given].any()


@pytest.mark.parametrize("share", [0.0, 0.1])
def test_changed_tokens_are_renewed_in_every_layer_even_beyond_the_share(share):
    x, given = prompts()
    refresh = make(tiny_model(n_layer=3), given, 50, 7, share)
    every(refresh, x)
    after = x.clone()
    after[0, [5, 8, 11]], after[1, 2] = 3, 14  # the last in the prompt
    places = renewed(refresh, after)
    assert places[:, after != x].all()
    first, above = ([3, 1], [3, 1]) if share == 0 else ([12, 13], [3, 1 + math.ceil(0.1 * 12)])
    assert places.sum(-1).tolist() == [first, above, above]


def test_a_token_changed_in_place_is_noticed():
    x, given = prompts()
    refresh = make(tiny_model(), given, 50, 7, 0.0)
    before = every(refresh, x)
    x[0, 9] = 3
    assert not torch.equal(every(refresh, x)[0, 9], before[0, 9])


def test_without_share_and_change_nothing_is_computed_but_the_head():
    model, (x, given) = tiny_model(), prompts()
    refresh = make(model, given, 50, 7, 0.0)
    before = every(refresh, x)
    counts = rows_through("attn_norm", model)
    assert torch.equal(every(refresh, x), before) and not counts


def test_the_places_whose_values_changed_most_are_renewed():
    model, (x, given) = tiny_model(n_layer=3), prompts()
    refresh = make(model, given, 50, 50, 0.25)
    every(refresh, x)
    for before, after in pairwise(canvases(x)):
        held, old = refresh.v.clone(), refresh.change.clone()
        every(refresh, after)
        stream = model.embed(after)
        for layer, block in enumerate(model.layers):
            value = block.attn.v(block.attn_norm(stream))
            alike = torch.nn.functional.cosine_similarity(value, held[layer], dim=-1)
            alike[given], alike[before != after] = 2, -2
            places = (refresh.change[layer] != old[layer]).any(-1)
            for row in range(2):
                assert places[row].sum() == (3 if layer else 12)
                assert alike[row, places[row]].max() <= alike[row, ~places[row]].min() + 1e-6
            stream = stream + refresh.change[layer]


def test_rows_do_not_depend_on_their_neighbours():
    model, (x, given) = tiny_model(n_layer=3).double(), prompts(batch=3)
    given[1, :9] = True
    together = make(model, given, 4, 3)
    alone = [make(model, given[i : i + 1], 4, 3) for i in range(3)]
    for canvas in canvases(x, calls=8):
        rows = torch.cat([every(refresh, canvas[i : i + 1]) for i, refresh in enumerate(alone)])
        assert torch.allclose(every(together, canvas), rows, atol=1e-8)


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("prompt_every", 0), ("prompt_every", 2.0), ("answer_every", -1), ("answer_every", True), ("share", -0.1),
        ("share", 1.1), ("share", math.nan), ("share", "0.25"),
    ],
)  # fmt: skip
def test_parameters_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(BadInput, match=rf"^cache refresh, {name}: expected .*, got .*; "):
        policy(**{name: value})


def test_a_row_that_is_left_out_is_as_it_was_when_it_comes_back():
    model, (x, given) = tiny_model(n_layer=3).double(), prompts(batch=3)
    together, alone = make(model, given, 4, 3), make(model, given[1:2], 4, 3)
    for call, canvas in enumerate(canvases(x, calls=8)):
        if call % 3 == 2:
            every(together, canvas[[0, 2]], rows=torch.tensor([0, 2]))
        else:
            logits = every(together, canvas)[1:2]
            assert torch.allclose(logits, every(alone, canvas[1:2]), atol=1e-8)


def test_part_of_the_canvas_is_refused():
    x, given = prompts()
    with pytest.raises(BadInput, match=r"^refresh: expected whole rows of 16 tokens, got 8; "):
        every(make(tiny_model(), given), x[:, :8])
