import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import GOLDEN, Oracle, random_order_distribution, table_model, tiny_model

import minillada
from minillada.errors import BadInput
from minillada.model import ModelConfig
from minillada.sampler import Canvas, SampleConfig, generate, predictor_of, stream
from minillada.strategies import CACHES, COMMITS, REVISIONS, SCORES, Ask, Guess, Now, Whole, draw, gumbel_argmax, quick

MASK = 15
CASES = json.loads((GOLDEN / "sampler_expected.json").read_text())["cases"]


def last(steps):
    for step in steps:  # noqa: B007
        pass
    return step


class Knows(Oracle):
    """A model that is sure of one text, the surer the further left; it goes by the positions."""

    def __init__(self, text: list[int]) -> None:
        super().__init__(ModelConfig(vocab_size=16, mask_id=MASK, eos_id=14, pad_id=13, n_layer=1, max_len=64), None)
        self.text = torch.tensor(text)

    def forward(self, tokens, attn_mask=None, positions=None, where=None, cache=None):
        positions = torch.arange(tokens.shape[1]) if positions is None else positions
        right = torch.nn.functional.one_hot(self.text[positions], 16) * (9 - positions / 10)[:, None]
        self.logits = lambda tokens: right.expand(len(tokens), -1, -1)
        return super().forward(tokens, where=where)


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


# ---- against a plain loop -------------------------------------------------------------------------------------------


def plain_loop(model, prompt, config):
    """One row at a time, the whole canvas at every step, no cleverness."""
    c, width, answer_from = model.config, config.block_len, len(prompt)
    x = torch.tensor([*prompt, *[c.mask_id] * config.gen_len])
    name, _, parameter = config.commit.partition(":")
    for start in range(answer_from, len(x), width):
        steps = config.steps * width // config.gen_len
        for left in range(steps, 0, -1):
            holes = [i for i in range(start, start + width) if x[i] == c.mask_id]
            logits = model(x[None])[0]
            if config.cfg_scale:
                hidden = torch.where(torch.arange(len(x)) < answer_from, c.mask_id, x)
                logits = (1 + config.cfg_scale) * logits - config.cfg_scale * model(hidden[None])[0]
            if config.ban_eos:
                logits[:, c.eos_id] = -torch.inf
            p, token, sure = logits.softmax(-1), {}, {}
            for i in holes:
                token[i] = logits[i].masked_fill(torch.arange(16) == c.mask_id, -torch.inf).argmax().item()
                first, second = p[i].sort(descending=True).values[:2]
                sure[i] = {"low_confidence": p[i, token[i]], "margin": first - second,
                           "entropy": -torch.special.entr(p[i]).sum()}[config.remasking].item()  # fmt: skip
                if config.defer_eos and token[i] == c.eos_id:
                    sure[i] = -1e30
            order = sorted(holes, key=sure.get, reverse=True)
            due = {"quota": -(-len(holes) // left), "first-hitting": 1,
                   "threshold": sum(sure[i] >= float(parameter or 0.9) for i in holes),
                   "factor": max([n for n, i in enumerate(order, 1) if sure[i] >= 1 - 1 / (n + 1)], default=1),
                   "entropy-bound": sum(sum(-sure[j] for j in order[:k]) <= 0.1 for k in range(len(order)))
                   }  # fmt: skip
            due = max(due[name], 1) if left > 1 else len(order)
            for i in order[:due]:
                x[i] = token[i]
    return x[answer_from:].tolist()


@settings(max_examples=150, deadline=None)
@given(
    prompts=st.lists(st.lists(st.integers(0, 12), min_size=1, max_size=6), min_size=1, max_size=3),
    shape=st.sampled_from([(8, 8, 8), (8, 8, 4), (8, 4, 8), (12, 6, 4), (12, 3, 4), (6, 12, 3)]),
    remasking=st.sampled_from(["low_confidence", "margin", "entropy"]),
    commit=st.sampled_from(["quota", "threshold:0.9", "threshold:0.3", "factor", "entropy-bound", "first-hitting"]),
    cfg_scale=st.sampled_from([0.0, 0.7]),
    ban_eos=st.booleans(),
    defer_eos=st.booleans(),
    seed=st.integers(0, 9),
)
def test_the_fast_sampler_writes_what_a_plain_loop_writes(prompts, shape, remasking, commit, seed, **options):
    model = tiny_model(seed).double()
    config = SampleConfig(*shape, remasking=remasking, commit=commit, stop_at_eos=False, **options)
    by = replace(config, remasking="entropy") if commit == "entropy-bound" else config  # which brings its own score
    assert generate(model, prompts, config) == [plain_loop(model, prompt, by) for prompt in prompts]


# ---- what is always true --------------------------------------------------------------------------------------------

RULES = [*COMMITS, "threshold:0", "threshold:2", "factor:0.5", "entropy-bound:0", "klass:0.1,1", "klass:0,0"]


def together(options):
    """The options with whatever does not go together put right."""
    commit = options["commit"] if options["revise"] == "none" else "quota"
    cache = "none" if options["revise"].startswith("wino") else options["cache"]
    return {**options, "commit": commit, "cache": cache}


options = st.fixed_dictionaries(
    {
        "gen_len": st.sampled_from([4, 8, 12]),
        "block_len": st.sampled_from([1, 2, 4]),
        "steps": st.sampled_from([24, 48]),
        "temperature": st.sampled_from([0.0, 1e-6, 0.7, 1e6]),
        "remasking": st.sampled_from(sorted(SCORES)),
        "commit": st.sampled_from(RULES),
        "revise": st.sampled_from(["none", "none", "none", *REVISIONS, "remdm-cap:1", "remdm-rescale:1", "wino:0,1"]),
        "cfg_scale": st.sampled_from([0.0, 1.5]),
        "cache": st.sampled_from([*CACHES, "refresh:2,3,0", "refresh:1,1"]),
        "top_k": st.sampled_from([0, 1, 3]),
        "top_p": st.sampled_from([1.0, 0.5]),
        "ban_eos": st.booleans(),
        "defer_eos": st.booleans(),
        "stop_at_eos": st.booleans(),
    }
).map(together)
prompts = st.lists(st.lists(st.integers(0, 12), max_size=6), min_size=1, max_size=3)


def check_what_is_always_true(options, prompts, seed):
    model, config = tiny_model(), SampleConfig(**options)
    canvas = Canvas.continuation(prompts, config.gen_len, model.config)
    before = canvas.x.clone()
    given_tokens = before != MASK
    committed = torch.zeros_like(given_tokens)
    for step in stream(model, canvas, config, seed):
        assert torch.equal(step.x[given_tokens], before[given_tokens])
        assert not (step.revised & ~committed).any()
        committed &= ~step.revised
        assert not (step.committed & (given_tokens | committed)).any()
        committed |= step.committed
    assert torch.equal(canvas.x, before)
    assert not (step.x == MASK).any()
    if options["ban_eos"]:
        assert not (step.x[~given_tokens] == 14).any()
    assert len(generate(model, prompts, config, seed)) == len(prompts)


@settings(max_examples=100, deadline=None)
@given(options, prompts, st.integers(0, 2**31))
def test_the_prompt_never_changes_and_no_hole_is_left(options, prompts, seed):
    check_what_is_always_true(options, prompts, seed)


@pytest.mark.soak
@settings(max_examples=2000, deadline=None)
@given(options, prompts, st.integers(0, 2**31))
def test_the_same_holds_for_two_thousand_examples(options, prompts, seed):
    check_what_is_always_true(options, prompts, seed)


@settings(max_examples=50, deadline=None)
@given(options, prompts, st.integers(0, 2**31))
def test_a_batch_gives_what_its_rows_give_alone_at_temperature_zero(options, prompts, seed):
    certain = {"temperature": 0.0, "remasking": "low_confidence", "commit": "quota", "revise": "none"}
    config = SampleConfig(**{**options, **certain})
    model = tiny_model().double()
    alone = [generate(model, [prompt], config, seed)[0] for prompt in prompts]
    assert generate(model, prompts, config, seed) == alone


@settings(max_examples=50, deadline=None)
@given(options, st.integers(0, 2**31))
def test_a_seed_makes_the_answer_a_function_of_its_inputs(options, seed):
    config = SampleConfig(**options)
    assert generate(tiny_model(), [[1, 2]], config, seed) == generate(tiny_model(), [[1, 2]], config, seed)


@pytest.mark.parametrize("remasking", SCORES)
@pytest.mark.parametrize(
    ("commit", "revise"), [*((rule, "none") for rule in COMMITS), *(("quota", r) for r in REVISIONS)]
)
def test_every_sampler_reproduces_a_text_that_the_model_is_sure_of(remasking, commit, revise):
    text = [3, 1, 4, 1, 5, 9, 2, 6]
    options = together({"remasking": remasking, "commit": commit, "revise": revise, "cache": "none"})
    assert generate(Knows(text), [[]], SampleConfig(gen_len=8, steps=8, block_len=4, **options)) == [text]


def now(hole, left=3, steps=10, held=None, seed=0):
    """What a rule is told; hole (R,W) as a list of 0 and 1."""
    hole = torch.tensor(hole, dtype=torch.bool)
    held = torch.full(hole.shape, math.nan) if held is None else torch.tensor(held)
    x = torch.where(hole, MASK, 1)
    return Now(x, hole, torch.zeros_like(hole), held, left, steps, False, torch.Generator().manual_seed(seed))


def committed(rule, score, here):
    """The places that a rule commits, (R,W) as a list of 0 and 1, if these are the scores of the holes."""
    asked = rule.ask(here)
    score = torch.where(asked, score, -torch.inf)
    return rule.commit(here, Guess(here.x, score, score)).int().tolist()


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 200), st.integers(1, 200))
def test_the_stateless_quota_equals_the_papers_table(holes, steps):
    table = [holes // steps + (i < holes % steps) for i in range(steps)]
    left = holes
    for i, due in enumerate(table):
        assert COMMITS["quota"]().due(now([[1] * left + [0]], steps - i, steps)).item() == due
        left -= due
    assert left == 0


def test_no_evaluation_is_spent_once_a_window_is_full():
    model = Knows([1] * 8)
    step = last(stream(model, Canvas.continuation([[]], 8, model.config), SampleConfig(8, 32, 4)))
    assert model.calls == step.nfe == 8


class Counting(Oracle):
    """Sure of nothing; notes how many holes each evaluation asks about."""

    def __init__(self) -> None:
        super().__init__(ModelConfig(vocab_size=4, mask_id=3, n_layer=1), lambda x: torch.zeros(*x.shape, 4))
        self.asked = []

    def forward(self, tokens, attn_mask=None, positions=None, where=None, cache=None):
        self.asked.append(len(where[0]))
        return super().forward(tokens, where=where)


@pytest.mark.parametrize("remasking", ["random", "low_confidence"])
@pytest.mark.parametrize("rule", [{"commit": "ancestral"}, {"revise": "remdm-cap:0.1"}])
def test_no_evaluation_is_spent_on_a_step_that_commits_nothing(rule, remasking):
    model = Counting()
    config = SampleConfig(8, 64, 8, remasking=remasking, **rule)
    steps = list(stream(model, Canvas.infill([[3] * 8], model.config), config, seed=3))
    assert all(step.committed.any() for step in steps)
    assert len(model.asked) == steps[-1].nfe == len(steps) < 50


def test_in_random_order_only_the_holes_that_chance_has_chosen_are_computed():
    model = Counting()
    last(stream(model, Canvas.infill([[3] * 8], model.config), SampleConfig(8, 4, 8, remasking="random")))
    assert model.asked == [2, 2, 2, 2]


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


def ancestral_distribution(model, steps):
    """p(x) of the ancestral sampler by enumeration: every state of 4 positions, every set of them revealed together."""
    states = list(itertools.product(range(4), repeat=4))
    number = {state: i for i, state in enumerate(states)}
    p_token = model(torch.tensor(states)).softmax(-1).tolist()  # [state][position][token]
    p = {(3, 3, 3, 3): 1.0}
    for left in range(steps, 0, -1):
        after = dict.fromkeys(states, 0.0)
        for state, mass in p.items():
            stays = [[(3, 1 - 1 / left)] if token == 3 else [] for token in state]
            reveals = [[(v, q / left) for v, q in enumerate(row[:3])] for row in p_token[number[state]]]
            choices = [s + r if t == 3 else [(t, 1.0)] for t, s, r in zip(state, stays, reveals, strict=True)]
            for choice in itertools.product(*choices):
                after[tuple(token for token, _ in choice)] += mass * math.prod(q for _, q in choice)
        p = {state: mass for state, mass in after.items() if mass > 0}
    return torch.tensor([p.get(state, 0.0) for state in itertools.product(range(3), repeat=4)])


@pytest.mark.parametrize("steps", [1, 4, 16])
def test_the_ancestral_sampler_follows_its_enumerated_distribution(steps):
    model = table_model()
    config = SampleConfig(4, steps, 4, temperature=1.0, remasking="random", commit="ancestral")
    exact = ancestral_distribution(model, steps)
    assert distance(sampled(model, config), exact) < 1.5 * noise(exact)


def test_the_ancestral_samplers_error_is_inverse_to_its_steps():
    model = table_model()
    exact = random_order_distribution(model, 4)
    scaled = [steps * distance(ancestral_distribution(model, steps), exact) for steps in (8, 16, 32, 64)]
    assert max(scaled) < 1.2 * min(scaled)
    assert scaled[0] > 0.1


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


@pytest.mark.parametrize("function", [gumbel_argmax, quick(gumbel_argmax)], ids=["one round", "two rounds"])
@pytest.mark.parametrize("kinds", [2, 7, 100])
def test_drawing_is_drawing_from_the_softmax(kinds, function):
    logits = 2 * torch.randn(kinds, generator=torch.Generator().manual_seed(1))
    n = 100_000
    tokens = function(logits.expand(n, -1), 1.3, torch.Generator().manual_seed(0))
    p = (logits / 1.3).softmax(0)
    errors = (tokens.bincount(minlength=kinds) / n - p).abs() / (p * (1 - p) / n).sqrt()
    assert errors.max() < 4.5


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
    ("rule", "expected"),
    [
        (COMMITS["quota"](), [1, 1, 0, 0, 0, 0]),  # 5 holes, 3 steps left
        (COMMITS["threshold"](0.9), [1, 1, 0, 0, 0, 0]),
        (COMMITS["threshold"](0.99), [1, 0, 0, 0, 0, 0]),  # always the surest
        (COMMITS["factor"](0.3), [1, 1, 0, 0, 0, 0]),  # 1 - .3/2 = .85, 1 - .3/3 = .9, 1 - .3/4 = .925 > .8
        (COMMITS["first-hitting"](), [1, 0, 0, 0, 0, 0]),
    ],
)
def test_commit_rules_by_hand(rule, expected):
    score = torch.tensor([[0.95, 0.92, 0.8, 0.5, 0.1, -torch.inf]])
    assert committed(rule, score, now([[1, 1, 1, 1, 1, 0]])) == [expected]


def test_the_entropy_bound_adds_up_all_entropies_but_the_largest():
    score = -torch.tensor([[0.02, 0.03, 0.04, 0.9, torch.inf], [0.7, 0.5, 0.6, torch.inf, torch.inf]])
    here = now([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]])
    assert committed(COMMITS["entropy-bound"](0.1), score, here) == [[1, 1, 1, 1, 0], [0, 1, 0, 0, 0]]
    assert committed(COMMITS["entropy-bound"](0.06), score, here) == [[1, 1, 1, 0, 0], [0, 1, 0, 0, 0]]


@pytest.mark.parametrize("commit", ["entropy-bound:0.5", "klass:0.3,0.5"])
def test_a_rule_that_needs_a_score_brings_it_whatever_remasking_says(commit):
    model = tiny_model()
    answers = [
        generate(model, [[1, 2]], SampleConfig(8, 8, 8, commit=commit, remasking=remasking))
        for remasking in ("low_confidence", "margin", "entropy", "random")
    ]
    assert all(answer == answers[0] for answer in answers)


# ---- the end of a text ----------------------------------------------------------------------------------------------


def test_an_answer_is_cut_before_its_first_stop_id():
    text = [3, 1, 14, 5, 9, 2, 6, 5]
    assert generate(Knows(text), [[]], SampleConfig(8, 8, 8)) == [[3, 1]]
    assert generate(Knows(text), [[]], SampleConfig(8, 8, 8, stop_at_eos=False)) == [text]
    assert generate(Knows(text), [[]], SampleConfig(8, 8, 8, stop_ids=(9, 5))) == [[3, 1, 14]]


def test_what_follows_a_stop_id_is_not_computed():
    model = Knows([3, 1, 14, 5, 9, 2, 6, 5])
    generate(model, [[]], SampleConfig(8, 8, 4))
    assert model.calls == 3


def test_a_stop_id_in_the_prompt_does_not_end_the_answer():
    assert generate(Knows([14, 3, 1, 4, 1]), [[14]], SampleConfig(4, 4, 4)) == [[3, 1, 4, 1]]


def test_deferred_stop_ids_are_committed_last():
    text = [14, 1, 4, 14, 5, 9]
    model, config = Knows(text), SampleConfig(6, 6, 6, defer_eos=True, stop_at_eos=False)
    steps = stream(model, Canvas.infill([[MASK] * 6], model.config), config)
    order = [step.committed[0].nonzero().item() for step in steps]
    assert sorted(order[-2:]) == [0, 3]


@pytest.mark.parametrize("temperature", [0.0, 0.5, 10.0, 1e6])
def test_banned_stop_ids_are_never_written_at_any_temperature(temperature):
    config = SampleConfig(8, 8, 8, temperature=temperature, ban_eos=True)
    assert all(14 not in generate(Knows([14] * 8), [[]], config, seed)[0] for seed in range(10))


def test_banned_ids_are_never_written_and_the_others_make_up_for_them():
    model = table_model()
    canvas = Canvas.infill([[3] * 4] * 500, model.config)
    options = {"temperature": 1.0, "remasking": "random", "commit": "first-hitting"}
    x = last(stream(model, canvas, SampleConfig(4, 4, 4, banned_ids=(1,), **options))).x
    assert set(x.flatten().tolist()) == {0, 2}


# ---- infilling, guidance, caches ------------------------------------------------------------------------------------


def test_holes_anywhere_are_filled_and_the_rest_is_kept():
    text = [3, 1, 4, 1, 5, 9]
    canvas = Canvas.infill([[MASK, 1, 4, MASK, 5, MASK]], Knows(text).config)
    assert last(stream(Knows(text), canvas, SampleConfig(3, 3, 3))).x.tolist() == [text]


def test_a_span_of_a_given_text_is_written_anew_and_the_rest_is_kept():
    text = [3, 1, 4, 1, 5, 9]
    canvas = Canvas.edit([[3, 1, 7, 7, 7, 9], [3, 8, 4, 1]], [(2, 5), (1, 2)], Knows(text).config)
    x = last(stream(Knows(text), canvas, SampleConfig(4, 4, 4, stop_at_eos=False))).x
    assert x[0].tolist() == text
    assert x[1, :4].tolist() == text[:4]


@pytest.mark.parametrize("span", [(2, 2), (-1, 2), (1, 5)])
def test_a_span_outside_the_text_is_refused(span):
    with pytest.raises(BadInput, match=r"^span: expected a part of the row's 4 tokens, got"):
        Canvas.edit([[1, 2, 3, 4]], [span], tiny_model().config)


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


@pytest.mark.parametrize(("cache", "steps"), [("prefix", 4), ("dual", 4), ("refresh:1,1", 16), ("refresh:1,9,1", 16)])
@pytest.mark.parametrize("cfg_scale", [0.0, 1.0])
def test_a_cache_renewed_at_every_step_changes_nothing(cache, steps, cfg_scale):
    """A window's first step computes everything, so windows of one step renew the prefix and the dual cache."""
    model, prompts = tiny_model(), [[1, 2, 3], [4]]
    plain = SampleConfig(16, steps, 4, cfg_scale=cfg_scale)
    assert generate(model, prompts, replace(plain, cache=cache)) == generate(model, prompts, plain)


@pytest.mark.parametrize(
    "fields", [{}, {"n_layer": 1}, {"n_head": 4, "n_kv_head": 2}, {"n_expert": 4, "n_expert_active": 2, "d_expert": 8}]
)
def test_leaving_queries_out_changes_no_logit(fields):
    """What a stream asks a LLaDA with, beside the whole evaluation, with and without padding."""
    model = tiny_model(**fields)
    x = torch.randint(13, (3, 12), generator=torch.Generator().manual_seed(0))
    where = torch.tensor([0, 0, 2]), torch.tensor([4, 6, 5])
    valid = torch.arange(12) >= torch.tensor([[0], [3], [2]])
    square = valid[:, None, None, :] & torch.ones(12, 12, dtype=torch.bool).tril(8)
    assert type(predictor_of(model)) is not Whole
    for mask in (None, valid[:, None, None, :], square):
        ask = Ask(x, where, slice(4, 8), torch.arange(3), mask)
        assert torch.allclose(predictor_of(model)(ask), Whole(model)(ask), atol=1e-5)


def test_a_hooked_or_compiled_model_is_evaluated_whole():
    model = tiny_model()
    assert type(predictor_of(torch.compile(model, backend="eager"))) is Whole
    model.register_forward_pre_hook(lambda *_: None)
    assert type(predictor_of(model)) is Whole


def test_any_mask_predictor_can_take_the_models_place():
    class Uniform:
        config, device = tiny_model().config, torch.device("cpu")

        def __call__(self, ask):
            return torch.zeros(len(ask.where[0]), 16)

    assert generate(Uniform(), [[1], [2, 3]], SampleConfig(4, 4, 4, cfg_scale=1.0)) == [[0] * 4] * 2


def test_a_compiled_model_writes_the_same():
    """With the backend that only traces: what the others make of the trace is theirs to test."""
    model, config = tiny_model().double(), SampleConfig(8, 8, 4)
    compiled = torch.compile(model, backend="eager", dynamic=True)
    written = generate(model, [[1, 2], [3]], config)
    assert generate(compiled, [[1, 2], [3]], config) == written
    for layer in model.layers:
        layer.forward = torch.compile(layer.forward, backend="eager", dynamic=True)
    assert generate(model, [[1, 2], [3]], config) == written


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
        {"commit": "quota:3"}, {"revise": "maybe"}, {"revise": "remdm-cap:-1"}, {"revise": "wino:0.5,0.5,0.5"},
        {"cache": "refresh:0"}, {"cache": "refresh:1,2,3"}, {"cache": "refresh:1.5"}, {"commit": "klass:0.9,x"},
    ],
)  # fmt: skip
def test_a_bad_option_is_refused_by_name(options):
    (name,) = options
    with pytest.raises(BadInput, match=rf"^{name}.*: expected .*, got .*; "):
        SampleConfig(**options)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("commit", {"commit": "threshold:0.9", "revise": "remdm-conf"}), ("cache", {"cache": "dual", "revise": "wino"}),
    ],
)  # fmt: skip
def test_options_that_do_not_go_together_are_refused(name, options):
    with pytest.raises(BadInput, match=rf"^{name}: expected .* with|beside .*, got .*; "):
        SampleConfig(**options)


def test_the_error_for_a_window_says_what_to_try():
    with pytest.raises(BadInput, match=r"^block_len: expected a divisor of gen_len 128, got 24; try 32$"):
        SampleConfig(block_len=24)


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "canvas"), ([[1, MASK]], {}, "prompt"), ([[1, 16]], {}, "token"), ([[-1]], {}, "token"),
        ([[1] * 4090], {}, "canvas"), ([[1]], {"stop_ids": (99,)}, "stop_ids"),
        ([[1]], {"stop_ids": (MASK,)}, "stop_ids"), ([[1]], {"banned_ids": (16,)}, "banned_ids"),
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
