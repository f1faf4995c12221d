"""Block models: noise and bound by block, decoding with the exact cache, LLaDA2's decoding, and their training."""

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from oracles import GOLDEN, tiny_model
from torch import Generator

import minillada
from minillada import SampleConfig, exact_bound, generate, log_likelihoods, stream
from minillada.commands.ask import usual_of
from minillada.decoding.llada2 import official
from minillada.diffusion import Noised, exact_count, model_bound, sample_t
from minillada.errors import BadInput
from minillada.measure.blocks import beside, block_levels, bound, noise_blocks
from minillada.model import LLaDA, block_causal
from minillada.sampler import Canvas
from minillada.training.config import TrainConfig
from minillada.training.edits import with_errors

CASES = json.loads((GOLDEN / "llada2_decode" / "expected.json").read_text(encoding="utf-8"))["cases"]


def small(block: int, **fields) -> LLaDA:
    """Three words and a mask, in float64."""
    ids = {"vocab_size": 4, "mask_id": 3, "eos_id": None, "pad_id": None}
    return tiny_model(**ids, block=block, max_len=16, **fields).double()


# ---- noise and bound -------------------------------------------------------------------------------------------------


def test_blocks_of_one_token_make_the_likelihood_of_an_autoregressive_model():
    model, look, total = small(1), block_causal(torch.arange(4)), 0.0
    never = lambda model, args, logits: logits.index_fill(-1, torch.tensor([3]), -1e9)  # [MASK] is no word
    model.register_forward_hook(never)
    for text in itertools.product(range(3), repeat=4):
        nats = 0.0
        for i in range(4):  # a mask at place i sees the clean text before it
            x = torch.tensor([[*text[:i], 3, *text[i + 1 :]]])
            nats -= model(x, attn_mask=look)[0, i].log_softmax(-1)[text[i]].item()
        assert exact_bound(model, [], text) == pytest.approx(nats, abs=1e-9)
        total += math.exp(-nats)
    assert total == pytest.approx(1, abs=1e-9)


def test_one_block_of_the_whole_text_is_full_attention():
    text = [0, 2, 1, 1]
    assert exact_bound(small(4), [], text) == pytest.approx(exact_bound(small(0), [], text), abs=1e-12)


@pytest.mark.parametrize("block", [1, 2, 3, 4, 7])
def test_the_concatenated_loss_is_that_of_a_loop_over_blocks(block):
    model, rng = small(block), Generator().manual_seed(block)
    x0 = torch.randint(0, 3, (5, 7), generator=rng)
    noised = noise_blocks(x0, 3, block_levels(x0, block, rng), rng, block)
    expected, noised = torch.zeros(5, dtype=torch.float64), noised._replace(weight=noised.weight.double())
    for start in range(0, 7, block):
        stop = min(start + block, 7)
        x = torch.cat([x0[:, :start], noised.xt[:, start:stop]], 1)
        logits = model(x, attn_mask=block_causal(torch.arange(stop) // block))[:, start:]
        nats = F.cross_entropy(logits.transpose(1, 2), x0[:, start:stop], reduction="none")
        expected += (nats * noised.masked[:, start:stop] * noised.weight[:, start:stop]).sum(1)
    found = bound(model, x0, noised, block=block)
    assert torch.allclose(found, expected, atol=1e-12, rtol=0)


def test_noise_is_exact_count_in_every_block_of_what_may_be_hidden():
    rng, x0 = Generator().manual_seed(0), torch.arange(3 * 10).view(3, 10) % 3
    maskable = torch.arange(10).expand(3, -1) >= torch.tensor([[0], [3], [9]])
    noised = noise_blocks(x0, 3, torch.full((3, 3), 0.5), rng, 4, maskable)
    assert noised.masked.tolist() == (noised.xt == 3).tolist()
    for row, first in enumerate((0, 3, 9)):
        for start in (0, 4, 8):
            span = slice(start, min(start + 4, 10))
            m = max(0, span.stop - max(first, start))
            count = math.ceil(m / 2)
            assert noised.masked[row, span].sum() == count
            if count:
                assert noised.weight[row, span].tolist() == [m / count] * (span.stop - start)


def test_levels_of_all_blocks_are_strata_in_random_order():
    t = block_levels(torch.zeros(8, 12), 4, Generator().manual_seed(0))
    assert t.shape == (8, 3)
    assert ((t.flatten().sort().values * 24).ceil() == torch.arange(1, 25)).all()
    assert (t.flatten().diff() > 0).float().mean() not in (0, 1)
    assert block_levels(torch.zeros(8, 12), 0, Generator().manual_seed(0)).shape == (8, 1)


def test_who_looks_at_whom_by_hand():
    rows = beside(4, 2).int().tolist()
    assert rows[0] == rows[1] == [1, 1, 0, 0, 0, 0, 0, 0]
    assert rows[2] == rows[3] == [0, 0, 1, 1, 1, 1, 0, 0]
    assert rows[4] == rows[5] == [0, 0, 0, 0, 1, 1, 0, 0]
    assert rows[6] == rows[7] == [0, 0, 0, 0, 1, 1, 1, 1]


def test_nothing_depends_on_later_blocks():
    model, rng = small(2), Generator().manual_seed(0)
    x0 = torch.randint(0, 3, (1, 8), generator=rng)
    masked = torch.zeros(1, 8, dtype=torch.bool)
    masked[0, 3] = True
    first = Noised(x0.masked_fill(masked, 3), masked, torch.ones(1, 8))
    changed = x0.clone()
    changed[0, 4:] = (x0[0, 4:] + 1) % 3
    other = Noised(changed.masked_fill(masked, 3), masked, torch.ones(1, 8))
    assert bound(model, x0, first, block=2).item() == bound(model, changed, other, block=2).item()
    seen = []
    handle = model.embed.register_forward_hook(lambda _, __, out: (out.retain_grad(), seen.append(out))[0])
    bound(model, x0, first, block=2).sum().backward()
    handle.remove()
    grad = seen[0].grad[0].abs().sum(-1)  # (2T,) of [xt ; x0]
    assert (grad[2:4] > 0).all()
    assert (grad[8:10] > 0).all()
    assert not grad[4:8].any()
    assert not grad[10:].any()


def test_estimates_agree_with_the_enumerated_bound():
    model = small(2)
    pairs = [([0, 1, 2], [1, 0, 2, 2]), ([], [2, 1, 0])]
    values, errors = log_likelihoods(model, pairs, n_samples=4000, batch_size=500)
    for (prompt, answer), value, error in zip(pairs, values, errors, strict=True):
        assert abs(value + exact_bound(model, prompt, answer)) < 4 * error + 1e-6


def test_the_standard_error_is_that_of_repeated_estimates():
    model, pair = small(2), [([0], [1, 0, 2, 2, 1])]
    found = [log_likelihoods(model, pair, n_samples=16, seed=seed) for seed in range(200)]
    spread = torch.stack([values[0] for values, _ in found]).std().item()
    told = torch.stack([errors[0] ** 2 for _, errors in found]).mean().sqrt().item()
    assert 0.75 < told / spread < 1.35


def test_padding_changes_no_row_of_a_batch():
    model = small(2)
    pairs = [([0, 1, 2], [1, 0, 2, 2]), ([], [2]), ([1], [0, 1])]
    together, _ = log_likelihoods(model, pairs, n_samples=1, batch_size=3, seed=1)
    one_by_one, _ = log_likelihoods(model, pairs, n_samples=1, batch_size=1, seed=1)
    assert torch.allclose(together, one_by_one, atol=1e-6)


# ---- decoding --------------------------------------------------------------------------------------------------------

PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8, 9], [1]]
WAYS = [
    {}, {"temperature": 1.0}, {"cfg_scale": 1.5}, {"remasking": "random", "temperature": 1.0}, {"ban_eos": True},
    {"commit": "threshold:0.5"}, {"commit": "factor:1"}, {"commit": "klass:0.5,0.1"}, {"commit": "entropy-bound:0.5"},
    {"commit": "llada2:0.3,4"}, {"commit": "llada2.1:0.3,0.2"}, {"revise": "remdm-cap:0.1"}, {"steps": 8},
    {"remasking": "margin"}, {"commit": "first-hitting", "temperature": 1.0},
]  # fmt: skip


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_the_block_cache_changes_no_token_and_no_number_of_evaluations(way):
    model = tiny_model(max_len=64, block=4).double()
    base = SampleConfig(**{"gen_len": 16, "steps": 16, "block_len": 16, **way})
    canvas = Canvas.continuation(PROMPTS, 16, model.config)
    plain, cached = (list(stream(model, canvas, replace(base, cache=cache))) for cache in ("none", "block"))
    assert torch.equal(plain[-1].x, cached[-1].x)
    assert len(plain) == len(cached)
    assert not (cached[-1].x == model.config.mask_id).any()


@pytest.mark.parametrize("commit", ["quota", "threshold:0.5", "llada2:0.3,4", "llada2.1:0.3,0.2"])
@pytest.mark.parametrize("cfg_scale", [0.0, 1.0])
def test_each_row_of_a_batch_is_what_it_is_alone(commit, cfg_scale):
    model = tiny_model(max_len=64, block=4).double()
    config = SampleConfig(gen_len=15, steps=15, block_len=15, commit=commit, cfg_scale=cfg_scale, cache="block")
    assert generate(model, PROMPTS, config) == [generate(model, [prompt], config)[0] for prompt in PROMPTS]


def test_finished_blocks_are_evaluated_once():
    model, columns = tiny_model(max_len=64, block=4), []
    model.register_forward_pre_hook(lambda _, args: columns.append(args[0].shape[1]))
    config = SampleConfig(gen_len=12, steps=12, block_len=12, cache="block", stop_at_eos=False)
    list(stream(model, Canvas.continuation([[1] * 8], 12, model.config), config))
    assert columns == [12, 4, 4, 4, 8, 4, 4, 4, 8, 4, 4, 4]  # the first one includes the prompt, then the block before


def test_holes_beyond_the_end_of_text_cost_nothing():
    model = tiny_model(max_len=64, block=4)
    config = SampleConfig(gen_len=40, steps=40, block_len=40, cache="block")
    canvas = Canvas.continuation([[1]], 40, model.config)
    written = list(stream(model, canvas, config))[2].x[0, 1:4].tolist()  # the first block's
    steps = list(stream(model, canvas, replace(config, stop_ids=(written[-1],))))
    assert len(steps) <= 3
    assert not (steps[-1].x == 15).any()


def test_holes_inside_a_text_are_filled_block_by_block():
    model = tiny_model(max_len=64, block=4)
    row = [1, 2, 15, 4, 5, 6, 7, 8, 15, 15, 3, 4, 5]
    canvas = Canvas.infill([row, [15, 2]], model.config)
    config = SampleConfig(gen_len=8, steps=8, block_len=8, stop_at_eos=False, cache="block")
    steps = list(stream(model, canvas, config))
    assert [(step.window.start, step.window.stop) for step in steps] == [(0, 4), (8, 12), (8, 12)]
    other = Canvas.infill([[*row[:4], 9, 9, 9, 9, *row[8:]], [15, 2]], model.config)
    assert list(stream(model, other, config))[-1].x[0, 2] == steps[-1].x[0, 2]  # what comes later is not seen


def test_other_caches_are_refused_and_blocks_can_be_chosen():
    model = tiny_model(max_len=64, block=4)
    for cache in ("prefix", "dual", "refresh"):
        with pytest.raises(BadInput, match="cache: expected none or block with a block model"):
            generate(model, [[1]], SampleConfig(gen_len=8, steps=8, block_len=8, cache=cache))
    full = tiny_model(max_len=64)
    config = SampleConfig(gen_len=8, steps=8, block_len=8)
    assert generate(model, PROMPTS, replace(config, block=0)) == generate(full, PROMPTS, config)
    assert generate(full, PROMPTS, replace(config, block=4)) == generate(model, PROMPTS, config)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['version']}-{len(case['prompt'])}-{case['nfe']}")
def test_llada2_decodes_as_its_authors_do(case, golden_llada2):
    arguments = {k: v for k, v in case.items() if k not in ("version", "prompt", "generated", "nfe")}
    config = official(case["version"], **arguments)
    (answer,) = generate(golden_llada2, [case["prompt"]], config)
    expected = case["generated"]
    if expected and expected[-1] == case["eos_id"]:
        expected = expected[:-1]
    assert answer == expected
    canvas = Canvas.continuation([case["prompt"]], config.gen_len, replace(golden_llada2.config, block=config.block))
    nfe = len(list(stream(golden_llada2, canvas, config)))
    assert nfe == case["nfe"] if case["version"] == "2.1" else nfe <= case["nfe"]


@pytest.fixture(scope="module")
def golden_llada2() -> LLaDA:
    return minillada.load(GOLDEN / "llada2_moe", mask_id=255)[0]


def test_llada2_is_a_block_model_and_still_sees_everything_when_called(golden_llada2):
    assert golden_llada2.config.block == 32


def test_another_version_is_refused():
    with pytest.raises(BadInput, match=r"version: expected 2\.0 or 2\.1"):
        official("3.0")


# ---- training --------------------------------------------------------------------------------------------------------


def nano(out=None, **fields) -> TrainConfig:
    return TrainConfig(**{"data": "tales", "preset": "nano", "steps": 4, "out": out and str(out), **fields})


def test_a_run_learns_in_blocks_and_saves_them(tmp_path):
    *_, last = minillada.train(nano(tmp_path / "run", block=8))
    model, _ = minillada.load(tmp_path / "run")
    assert model.config.block == last.model.config.block == 8
    assert math.isfinite(last.bound)


def test_a_block_as_long_as_the_text_is_plain_pre_training():
    plain, blocks = ([step.loss for step in minillada.train(nano(block=block))] for block in (0, 64))
    assert plain[0] == pytest.approx(blocks[0], rel=0.2)  # other levels of noise, the same bound


def test_a_trained_model_is_converted(tmp_path):
    list(minillada.train(nano(tmp_path / "full")))
    first = next(iter(minillada.train(nano(start=str(tmp_path / "full"), block=8))))
    assert first.model.config.block == 8
    assert first.config.lr == 0.003
    trained, new = (minillada.load(tmp_path / "full")[0], first.model)
    assert (trained.embed.weight - new.embed.weight).abs().max() < 0.1  # it began with the trained weights


@pytest.mark.parametrize("block", [5, 65, -1])
def test_a_block_that_does_not_divide_the_length_is_refused(block):
    with pytest.raises(BadInput, match="block: expected"):
        nano(block=block)


def test_a_whole_text_as_one_block_is_noised_as_before():
    rng, again = Generator().manual_seed(3), Generator().manual_seed(3)
    x0 = torch.randint(0, 3, (4, 6), generator=Generator().manual_seed(0))
    t = torch.tensor([0.1, 0.4, 0.6, 1.0])
    found, expected = noise_blocks(x0, 3, t[:, None], rng, 0), exact_count(x0, 3, t, again)
    assert torch.equal(found.xt, expected.xt)
    assert torch.equal(found.weight, expected.weight)
    assert torch.allclose(bound(small(0), x0, found), model_bound(small(0), x0, expected), atol=1e-6)
    assert sample_t(4, rng).shape == (4,)


def test_wrong_tokens_are_asked_about_and_as_many_right_ones():
    x0, rng = torch.zeros(200, 50, dtype=torch.long), Generator().manual_seed(0)
    maskable = torch.arange(50).expand(200, -1) >= 10
    noised = exact_count(x0, 9, torch.full((200,), 0.5), rng, maskable)
    found = with_errors(x0, noised, 0.1, 10, 9, rng, maskable)
    wrong = (found.xt != 0) & (found.xt != 9)
    assert not (wrong & ~maskable).any()
    assert (found.xt == 9).sum() == noised.masked.sum()
    assert wrong.sum() / (200 * 20) == pytest.approx(0.1 * 8 / 9, abs=0.02)  # one word in nine is right by chance
    assert (found.masked & ~noised.masked).sum() / (200 * 20) == pytest.approx(0.2, abs=0.02)
    assert (found.weight[noised.masked] == 2).all()
    assert (found.weight[found.masked & ~noised.masked] == 1).all()


def test_a_run_learns_to_correct():
    *_, last = minillada.train(nano(block=8, errors=0.1))
    assert math.isfinite(last.loss)
    with pytest.raises(BadInput, match="errors: expected"):
        nano(errors=2.0)


@pytest.mark.parametrize("seed", range(6))
def test_self_speculation_writes_what_blocks_of_one_token_write(seed):
    model = tiny_model(seed, max_len=64, block=4).double()
    one = SampleConfig(gen_len=14, steps=14, block_len=14, block=1)
    assert generate(model, PROMPTS, replace(one, block=4, commit="speculate")) == generate(model, PROMPTS, one)


def test_self_speculation_needs_fewer_evaluations_where_drafts_are_right():
    model, tokenizer = minillada.load("tales")
    prompt = [1, *tokenizer.encode("Once upon a time a brave child named Greta lived by the river. ")]
    one = SampleConfig(gen_len=40, steps=40, block_len=40, block=1)
    found = {}
    for name, config in (("one", one), ("speculate", replace(one, block=4, commit="speculate"))):
        c = replace(model.config, block=config.block)
        found[name] = list(stream(model, Canvas.continuation([prompt], 40, c), config))
    width = found["one"][-1].x.shape[1]
    assert torch.equal(found["one"][-1].x, found["speculate"][-1].x[:, :width])
    assert len(found["speculate"]) < 0.75 * len(found["one"])


def test_llada2_is_decoded_as_its_authors_do_unless_told_otherwise():
    assert usual_of("LLaDA2", "inclusionAI/LLaDA2.0-mini") == {"commit": "llada2"}
    assert usual_of("LLaDA2", "inclusionAI/LLaDA2.1-mini") == {"commit": "llada2.1"}
    assert usual_of("LLaDA", "GSAI-ML/LLaDA-8B-Instruct") == {}
