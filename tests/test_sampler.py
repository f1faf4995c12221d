import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import GOLDEN, Oracle, random_order_distribution, table_model, tiny_model

import minillada
from minillada.errors import BadInput
from minillada.model import ModelConfig
from minillada.sampler import CACHES, Canvas, SampleConfig, generate, stream
from minillada.strategies import COMMITS, SCORES, draw, quota

MASK = 15
CASES = json.loads((GOLDEN / "sampler_expected.json").read_text())["cases"]


def last(steps):
    for step in steps:  # noqa: B007
        pass
    return step


def knows(text: list[int]) -> Oracle:
    """A model that is sure of one text, the surer the further left."""
    config = ModelConfig(vocab_size=16, mask_id=MASK, eos_id=14, pad_id=13, n_layer=1, max_len=64)

    def logits(tokens):
        sure = 9 - torch.arange(tokens.shape[1]) / 10
        right = torch.nn.functional.one_hot(torch.tensor(text)[-tokens.shape[1] :], 16)
        return (right * sure[:, None]).expand(len(tokens), -1, -1)

    return Oracle(config, logits)


# ---- against the official loop --------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=[str(case["kwargs"]) for case in CASES])
@pytest.mark.parametrize("batched", [True, False], ids=["batched", "one by one"])
def test_the_official_samplers_outputs_are_reproduced_token_for_token(case, batched):
    model, _ = minillada.load(GOLDEN / "llada_dense")
    rows = zip(case["prompt"], case["attention_mask"], strict=True)
    prompts = [[token for token, valid in zip(row, mask, strict=True) if valid] for row, mask in rows]
    options = case["kwargs"]
    config = SampleConfig(
        gen_len=options["gen_length"],
        steps=options["steps"],
        block_len=options["block_length"],
        cfg_scale=options.get("cfg_scale", 0.0),
        ban_eos=options.get("logits_eos_inf", False),
        stop_at_eos=False,
    )
    if batched:
        answers = generate(model, prompts, config)
    else:
        answers = [generate(model, [prompt], config)[0] for prompt in prompts]
    assert answers == [row[-options["gen_length"] :] for row in case["output"]]


# ---- what is always true --------------------------------------------------------------------------------------------

options = st.fixed_dictionaries(
    {
        "gen_len": st.sampled_from([4, 8, 12]),
        "block_len": st.sampled_from([1, 2, 4]),
        "steps": st.sampled_from([24, 48]),
        "temperature": st.sampled_from([0.0, 1e-6, 0.7, 1e6]),
        "remasking": st.sampled_from(sorted(SCORES)),
        "commit": st.sampled_from([*COMMITS, "threshold:0", "threshold:2", "factor:0.5", "entropy-bound:0"]),
        "cfg_scale": st.sampled_from([0.0, 1.5]),
        "cache": st.sampled_from(sorted(CACHES)),
        "top_k": st.sampled_from([0, 1, 3]),
        "top_p": st.sampled_from([1.0, 0.5]),
        "ban_eos": st.booleans(),
        "defer_eos": st.booleans(),
        "stop_at_eos": st.booleans(),
    }
)
prompts = st.lists(st.lists(st.integers(0, 12), max_size=6), min_size=1, max_size=3)


@settings(max_examples=150, deadline=None)
@given(options, prompts, st.integers(0, 2**31))
def test_the_prompt_never_changes_and_no_hole_is_left(options, prompts, seed):
    model, config = tiny_model(), SampleConfig(**options)
    canvas = Canvas.continuation(prompts, config.gen_len, model.config)
    before = canvas.x.clone()
    given_tokens = before != MASK
    committed = torch.zeros_like(given_tokens)
    for step in stream(model, canvas, config, seed):
        assert torch.equal(step.x[given_tokens], before[given_tokens])
        assert not (step.committed & (given_tokens | committed)).any()
        committed |= step.committed
    assert torch.equal(canvas.x, before)
    assert not (step.x == MASK).any()
    if options["ban_eos"]:
        assert not (step.x[~given_tokens] == 14).any()
    assert len(generate(model, prompts, config, seed)) == len(prompts)


@settings(max_examples=50, deadline=None)
@given(options, prompts, st.integers(0, 2**31))
def test_a_batch_gives_what_its_rows_give_alone_at_temperature_zero(options, prompts, seed):
    config = SampleConfig(**{**options, "temperature": 0.0, "remasking": "low_confidence", "commit": "quota"})
    model = tiny_model().double()
    alone = [generate(model, [prompt], config, seed)[0] for prompt in prompts]
    assert generate(model, prompts, config, seed) == alone


@settings(max_examples=50, deadline=None)
@given(options, st.integers(0, 2**31))
def test_a_seed_makes_the_answer_a_function_of_its_inputs(options, seed):
    config = SampleConfig(**options)
    assert generate(tiny_model(), [[1, 2]], config, seed) == generate(tiny_model(), [[1, 2]], config, seed)


@pytest.mark.parametrize("remasking", SCORES)
@pytest.mark.parametrize("commit", COMMITS)
def test_every_sampler_reproduces_a_text_that_the_model_is_sure_of(remasking, commit):
    text = [3, 1, 4, 1, 5, 9, 2, 6]
    config = SampleConfig(gen_len=8, steps=8, block_len=4, remasking=remasking, commit=commit)
    assert generate(knows(text), [[]], config) == [text]


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 200), st.integers(1, 200))
def test_the_stateless_quota_equals_the_papers_table(holes, steps):
    table = [holes // steps + (i < holes % steps) for i in range(steps)]
    left = holes
    for i, due in enumerate(table):
        confidence = torch.full((1, holes), -torch.inf)
        confidence[:, :left] = 0.5
        assert quota()(confidence, steps - i, steps, None).item() == due
        left -= due
    assert left == 0


def test_no_evaluation_is_spent_once_a_window_is_full():
    model = knows([1] * 8)
    step = last(stream(model, Canvas.continuation([[]], 8, model.config), SampleConfig(8, 32, 4)))
    assert model.calls == step.nfe == 8


# ---- distributions --------------------------------------------------------------------------------------------------


def sampled(model, config, n=20_000):
    """How often each text was written, in the order of itertools.product."""
    canvas = Canvas.infill([[3] * 4] * n, model.config)
    x = last(stream(model, canvas, config, seed=1)).x
    return (x * 3 ** torch.arange(3, -1, -1)).sum(1).bincount(minlength=81).double() / n


def distance(p, q):
    return (p - q).abs().sum().item() / 2


def noise(p, n=20_000):
    """The expected total variation of a sample of n from p."""
    return (2 * p * (1 - p) / (math.pi * n)).sqrt().sum().item() / 2


def test_first_hitting_samples_the_random_order_distribution():
    model = table_model()
    exact = random_order_distribution(model, 4)
    config = SampleConfig(4, 4, 4, temperature=1.0, remasking="random", commit="first-hitting")
    assert distance(sampled(model, config), exact) < 1.5 * noise(exact)


def test_ancestral_sampling_approaches_it_as_the_steps_grow():
    model = table_model()
    exact = random_order_distribution(model, 4)
    found = {}
    for steps in (1, 4, 64):
        config = SampleConfig(4, steps, 4, temperature=1.0, remasking="random", commit="ancestral")
        found[steps] = distance(sampled(model, config), exact)
    assert found[1] > 2 * found[4] > 2 * found[64]
    assert found[64] < 0.03


@pytest.mark.parametrize(("steps", "illegal"), [(1, 0.5), (2, 0.0)])
def test_two_tokens_at_once_come_from_the_product_of_their_marginals(steps, illegal):
    """The pair is 00 or 11, each half of the time: drawn together, half of the pairs are neither."""

    def logits(tokens):
        seen = tokens.flip(1)  # the other token of the pair
        right = torch.nn.functional.one_hot(seen.clamp(max=1), 3).double().log()
        return torch.where((seen == 2)[..., None], torch.tensor([0.0, 0.0, -torch.inf]).double(), right)

    model = Oracle(ModelConfig(vocab_size=3, mask_id=2), logits)
    config = SampleConfig(2, steps, 2, temperature=1.0, remasking="random")
    x = last(stream(model, Canvas.infill([[2, 2]] * 4000, model.config), config)).x
    assert (x[:, 0] != x[:, 1]).double().mean().item() == pytest.approx(illegal, abs=0.04)


def test_drawing_follows_the_tempered_softmax():
    logits = torch.tensor([0.0, 1.0, 2.0, -torch.inf])
    tokens = draw(logits.expand(40_000, -1), 0.5, 0, 1.0, torch.Generator().manual_seed(0))
    found = tokens.bincount(minlength=4) / 40_000
    assert torch.allclose(found, (logits / 0.5).softmax(0), atol=0.01)


@pytest.mark.parametrize(
    ("top_k", "top_p", "kept"), [(2, 1.0, {2, 3}), (0, 0.6, {3}), (0, 0.65, {2, 3}), (1, 1.0, {3})]
)
def test_top_k_and_top_p_cut_the_tail(top_k, top_p, kept):
    logits = torch.tensor([0.0, 1.0, 2.0, 3.0])  # softmax: 0.03, 0.09, 0.24, 0.64
    tokens = draw(logits.expand(2000, -1), 1.0, top_k, top_p, torch.Generator().manual_seed(0))
    assert set(tokens.tolist()) == kept


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_temperature_near_zero_is_the_argmax(scale):
    logits = scale * torch.randn(500, 16, generator=torch.Generator().manual_seed(0))
    tokens = draw(logits, 1e-6, 0, 0.9, torch.Generator().manual_seed(0))
    assert torch.equal(tokens, logits.argmax(-1))


# ---- scores and rules, by hand --------------------------------------------------------------------------------------


def test_scores_by_hand():
    p = torch.tensor([[0.5, 0.3, 0.2]])
    rng, token = torch.Generator().manual_seed(0), torch.tensor([1])
    assert SCORES["low_confidence"](p.log(), token, rng).item() == pytest.approx(0.3)
    assert SCORES["margin"](p.log(), token, rng).item() == pytest.approx(0.2)
    assert SCORES["entropy"](p.log(), token, rng).item() == pytest.approx(-1.0297, abs=1e-4)


@pytest.mark.parametrize(
    ("rule", "due"),
    [
        (COMMITS["quota"](), 2),  # 5 holes, 3 steps left
        (COMMITS["threshold"](0.9), 2),
        (COMMITS["threshold"](0.99), 1),  # always the surest
        (COMMITS["factor"](0.3), 2),  # 1 - .3/2 = .85, 1 - .3/3 = .9, 1 - .3/4 = .925 > .8
        (COMMITS["first-hitting"](), 1),
    ],
)
def test_commit_rules_by_hand(rule, due):
    confidence = torch.tensor([[0.95, 0.92, 0.8, 0.5, 0.1, -torch.inf]])
    assert rule(confidence, 3, 10, None).tolist() == [due]


def test_the_entropy_bound_adds_up_all_entropies_but_the_largest():
    confidence = -torch.tensor([[0.02, 0.03, 0.04, 0.9, torch.inf], [0.5, 0.6, 0.7, torch.inf, torch.inf]])
    assert COMMITS["entropy-bound"](0.1)(confidence, 3, 10, None).tolist() == [4, 1]
    assert COMMITS["entropy-bound"](0.06)(confidence, 3, 10, None).tolist() == [3, 1]


# ---- the end of a text ----------------------------------------------------------------------------------------------


def test_an_answer_is_cut_before_its_first_stop_id():
    text = [3, 1, 14, 5, 9, 2, 6, 5]
    assert generate(knows(text), [[]], SampleConfig(8, 8, 8)) == [[3, 1]]
    assert generate(knows(text), [[]], SampleConfig(8, 8, 8, stop_at_eos=False)) == [text]
    assert generate(knows(text), [[]], SampleConfig(8, 8, 8, stop_ids=(9, 5))) == [[3, 1, 14]]


def test_what_follows_a_stop_id_is_not_computed():
    model = knows([3, 1, 14, 5, 9, 2, 6, 5])
    generate(model, [[]], SampleConfig(8, 8, 4))
    assert model.calls == 3


def test_a_stop_id_in_the_prompt_does_not_end_the_answer():
    assert generate(knows([14, 3, 1, 4, 1]), [[14]], SampleConfig(4, 4, 4)) == [[3, 1, 4, 1]]


def test_deferred_stop_ids_are_committed_last():
    text = [14, 1, 4, 14, 5, 9]
    model, config = knows(text), SampleConfig(6, 6, 6, defer_eos=True, stop_at_eos=False)
    steps = stream(model, Canvas.infill([[MASK] * 6], model.config), config)
    order = [step.committed[0].nonzero().item() for step in steps]
    assert sorted(order[-2:]) == [0, 3]


@pytest.mark.parametrize("temperature", [0.0, 0.5, 10.0, 1e6])
def test_banned_stop_ids_are_never_written_at_any_temperature(temperature):
    config = SampleConfig(8, 8, 8, temperature=temperature, ban_eos=True)
    assert all(14 not in generate(knows([14] * 8), [[]], config, seed)[0] for seed in range(10))


# ---- infilling, guidance, caches ------------------------------------------------------------------------------------


def test_holes_anywhere_are_filled_and_the_rest_is_kept():
    text = [3, 1, 4, 1, 5, 9]
    canvas = Canvas.infill([[MASK, 1, 4, MASK, 5, MASK]], knows(text).config)
    assert last(stream(knows(text), canvas, SampleConfig(3, 3, 3))).x.tolist() == [text]


def test_guidance_moves_the_logits_away_from_those_without_the_prompt():
    model, prompt = tiny_model(), [1, 2, 3]
    x = torch.tensor([[*prompt, MASK]])
    conditional = model(x)[0, -1]
    unconditional = model(torch.full_like(x, MASK))[0, -1]
    expected = conditional + 1.5 * (conditional - unconditional)
    expected[MASK] = -torch.inf
    assert generate(model, [prompt], SampleConfig(1, 1, 1, cfg_scale=1.5)) == [[expected.argmax().item()]]


@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize("cfg_scale", [0.0, 1.0])
def test_caches_are_exact_for_one_layer(cache, cfg_scale):
    model = tiny_model(n_layer=1)
    plain = SampleConfig(16, 16, 4, cfg_scale=cfg_scale)
    cached = SampleConfig(16, 16, 4, cfg_scale=cfg_scale, cache=cache)
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
    assert generate(model, prompts, cached) == generate(model, prompts, plain)


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_a_cache_renewed_at_every_step_changes_nothing(cache):
    model = tiny_model()
    prompts = [[1, 2, 3], [4]]
    one_step_windows = SampleConfig(16, 4, 4, cache=cache)
    assert generate(model, prompts, one_step_windows) == generate(model, prompts, SampleConfig(16, 4, 4))


def test_steps_may_be_kept_and_the_stream_left_early():
    model = tiny_model()
    steps = stream(model, Canvas.continuation([[1]], 8, model.config), SampleConfig(8, 8, 8))
    first = next(steps)
    copy = first.x.clone()
    next(steps)
    assert torch.equal(first.x, copy)
    steps.close()


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"gen_len": 0}, {"steps": -1}, {"block_len": 2.0}, {"gen_len": True}, {"block_len": 24}, {"steps": 30},
        {"temperature": -0.1}, {"temperature": math.nan}, {"temperature": math.inf}, {"cfg_scale": -1.0},
        {"top_p": 0.0}, {"top_p": 1.5}, {"top_k": -1}, {"remasking": "best"}, {"commit": "all"}, {"cache": "full"},
        {"commit": "threshold:x"}, {"commit": "threshold:-1"}, {"commit": "threshold:nan"}, {"commit": "threshold:inf"},
        {"commit": "quota:3"}, {"revise": "maybe"},
    ],
)  # fmt: skip
def test_a_bad_option_is_refused_by_name(options):
    (name,) = options
    with pytest.raises(BadInput, match=rf"^{name}.*: expected .*, got .*; "):
        SampleConfig(**options)


def test_the_error_for_a_window_says_what_to_try():
    with pytest.raises(BadInput, match=r"^block_len: expected a divisor of gen_len 128, got 24; try 32$"):
        SampleConfig(block_len=24)


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "canvas"), ([[1, MASK]], {}, "prompt"), ([[1, 16]], {}, "token"), ([[-1]], {}, "token"),
        ([[1] * 4090], {}, "canvas"), ([[1]], {"stop_ids": (99,)}, "stop_ids"),
        ([[1]], {"stop_ids": (MASK,)}, "stop_ids"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_before_the_first_evaluation(prompts, options, message):
    model = tiny_model()
    model.forward = None  # would raise TypeError
    with pytest.raises(BadInput, match=rf"^{message}: expected"):
        generate(model, prompts, SampleConfig(8, 8, 8, **options))


@pytest.mark.parametrize(
    "x", [torch.zeros(4, dtype=torch.long), torch.zeros(1, 4), torch.zeros(0, 4, dtype=torch.long)]
)
def test_a_canvas_of_wrong_shape_or_type_is_refused(x):
    model = tiny_model()
    with pytest.raises(BadInput, match="canvas"):
        next(stream(model, Canvas(x, torch.ones(x.shape, dtype=torch.bool)), SampleConfig(4, 4, 4)))


def test_a_row_of_nothing_but_padding_is_refused():
    canvas = Canvas(torch.full((1, 4), MASK), torch.zeros(1, 4, dtype=torch.bool))
    with pytest.raises(BadInput, match="padding"):
        next(stream(tiny_model(), canvas, SampleConfig(4, 4, 4)))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_are_an_error_that_names_the_place(value):
    logits = lambda tokens: torch.full((*tokens.shape, 16), value)
    model = Oracle(ModelConfig(vocab_size=16, mask_id=MASK, n_layer=1), logits)
    with pytest.raises(BadInput, match=r"^logits at step 0, columns 0 on: expected finite"):
        generate(model, [[]], SampleConfig(4, 4, 4))
