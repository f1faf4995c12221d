"""Learning from rewards: the estimates by enumeration, the loss by hand, and runs that resume."""

import itertools
import json
from functools import partial
from pathlib import Path

import pytest
import torch
from oracles import tiny_model
from runs_compared import assert_an_interruption_changes_nothing

from minillada import BadInput, RewardConfig, TrainConfig, exact_bound, train
from minillada.text.tasks import Example, Task
from minillada.training.rewards import (
    ALGORITHMS,
    PADDING,
    Questions,
    Rewards,
    Written,
    advantages,
    gains,
    left_to_right,
    mean_field,
    noised_answers,
    token_log_p,
    told,
    two_sided,
)
from train_tiny import config_for

QUICK = {"steps": 6, "batch_size": 4, "group": 2, "inner": 2, "eval_every": 2, "precision": "float32"}


@pytest.fixture(autouse=True)
def private_cache(monkeypatch, tmp_path_factory):
    monkeypatch.setenv("MINILLADA_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def config(**changes) -> RewardConfig:
    return RewardConfig(
        **{"start": "somewhere", "data": "addition:1", "precision": "float32", "temperature": 0.5, **changes}
    )


class Letters:
    """A tokenizer whose token 3 is the letter d."""

    def decode(self, ids):
        return "".join(chr(97 + i) for i in ids)


def lesson(check, items=None, gen_len: int = 3, **changes) -> tuple[torch.nn.Module, Rewards]:
    """A tiny model in float64, and the objective in which check(text) judges what it writes."""
    items = items or [[([1, 2, 3], [4, 14])], [([8], [9, 9, 14])]]
    task = Task("letters", [Example("", "")] * len(items), [Example("", "")] * len(items), lambda _, got: check(got))
    more = {"task": task, "tokenizer": Letters(), "gen_len": gen_len}
    questions = Questions(None, None, 1.0, 1.0, "", items, items, 8, **more)
    model = tiny_model().double()
    settings = {"rollout_steps": 1, "batch_size": 8, "group": 4, "temperature": 1.0, "prompt_mask": 0.0, **changes}
    return model, Rewards(questions, config(**settings), model.config)


def written(rows: list[list[int]], n_prompt: int, eos: int = 14) -> Written:
    x0 = torch.tensor(rows)
    answer = (torch.arange(x0.shape[1]) >= n_prompt).expand_as(x0)
    ends = answer & (x0 == eos)
    return Written(x0, answer, answer & (ends.cumsum(1) - ends.long() == 0))


def gradient(model, loss) -> torch.Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ---- weights


@pytest.mark.parametrize("size", [2, 3])
def test_a_groups_mean_as_baseline_gives_exactly_1_minus_1_over_g_of_the_true_gradient(size):
    """By enumeration of every group of answers of one token: 6 tokens, each with a reward."""
    logits = torch.randn(6, dtype=torch.float64, generator=rng()).requires_grad_()
    reward = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.25, 0.0], dtype=torch.float64)
    p = logits.softmax(0)
    (true,) = torch.autograd.grad(p @ reward, logits)
    found = torch.zeros(6, dtype=torch.float64)
    for group in map(list, itertools.product(range(6), repeat=size)):
        log_p = logits.log_softmax(0)[group]
        (one,) = torch.autograd.grad((advantages(reward[group][None])[0] * log_p).mean(), logits)
        found += p[group].prod().detach() * one
    torch.testing.assert_close(found, (1 - 1 / size) * true, rtol=1e-12, atol=1e-15)


def test_weights_by_hand():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    assert advantages(rewards).tolist() == [[0.5, -0.5, -0.5, 0.5], [0, 0, 0, 0]]
    e = torch.tensor(0.5).exp().item()
    high, low = (x / (2 * e + 2 / e) for x in (e, 1 / e))
    torch.testing.assert_close(two_sided(rewards)[0], torch.tensor([1.0, -1, -1, 1]) * (high - low))
    assert two_sided(rewards)[1].abs().max() == 0
    assert ALGORITHMS["rejection"].weigh(rewards) is rewards


def test_what_the_log_tells_of_a_rollout():
    rewards = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    expected = {"reward": 1 / 6, "mixed": 0.5, "distinct": 1.5, "agreement": (2 / 3 + 1) / 2}
    assert told(rewards, ["a", "b", "b", "c", "c", "c"]) == pytest.approx(expected)


# ---- what stands for log p


def test_of_one_token_the_bound_is_exact_and_so_is_the_mean_field():
    model = tiny_model().double()
    w = written([[1, 2, 3, token] for token in range(13)], 3)
    exact = model(torch.tensor([[1, 2, 3, 15]]))[0, -1].log_softmax(-1)[:13]
    for states in (noised_answers, mean_field, left_to_right):
        noised = states(w, model.config, config(prompt_mask=0.0), rng())
        torch.testing.assert_close(token_log_p(model, w.x0, noised), exact, rtol=1e-12, atol=0)
        assert (noised.weight == 4).all()  # for the mean over the row's four columns
    assert exact[3].item() == pytest.approx(-exact_bound(model, [1, 2, 3], [3]), rel=1e-6)


def test_left_to_right_log_p_is_the_chain_of_conditionals():
    model, w = tiny_model().double(), written([[1, 2, 5, 6, 14, 14], [3, 2, 7, 8, 9, 10]], 2)
    noised = left_to_right(w, model.config, config(), rng())
    log_p = token_log_p(model, w.x0.repeat_interleave(4, 0), noised)
    chain = []
    for row, length in ((0, 3), (1, 4)):  # the first end of text counts, those behind it were not drawn
        for i in range(2, 2 + length):
            x = w.x0[row].clone()
            x[i:] = 15
            chain.append(model(x[None])[0, i].log_softmax(-1)[w.x0[row, i]])
    torch.testing.assert_close(log_p, torch.stack(chain), rtol=1e-12, atol=0)


def test_a_left_to_right_rollout_writes_each_answer_as_often_as_its_log_p_says():
    model, learner = lesson(len, [[([1, 2], [3])]], 2, batch_size=3000, group=3000, algorithm="just-grpo")
    with torch.no_grad():
        model.head.weight[:13] /= 4
        model.head.weight[3:13] = -model.head.weight[3:13].abs() - 1
        w, _ = learner.write(model, learner.questions.learned * 3000, True, 1.0, 0)
        noised = left_to_right(w, model.config, learner.config, rng())
        log_p = token_log_p(model, w.x0.repeat_interleave(2, 0), noised)
        each = torch.zeros(noised.masked.shape[0], dtype=torch.float64)
        each[noised.masked.any(1)] = log_p
    answers, inverse, times = w.x0[:, 2:].unique(dim=0, return_inverse=True, return_counts=True)
    p = torch.zeros(len(answers), dtype=torch.float64).index_put((inverse,), each.view(-1, 2).sum(1).exp())
    often = times / 3000 > 0.02
    assert often.sum() > 3
    assert ((times / 3000 - p)[often].abs() < 4 * (p * (1 - p) / 3000).sqrt()[often]).all()


def test_the_mean_field_hides_the_answer_and_a_share_of_the_question_but_no_padding():
    w = written([[PADDING, *[1] * 199, 5, 14, 14]] * 50, 200)
    noised = mean_field(w, tiny_model().config, config(), rng())
    hidden = noised.xt == 15
    assert hidden[:, 200:].all() and not hidden[:, 0].any()
    assert hidden[:, 1:200].float().mean().item() == pytest.approx(0.15, abs=0.015)
    assert noised.masked.equal(w.said) and noised.masked.sum(1).tolist() == [2] * 50


# ---- the loss


@pytest.mark.parametrize("name", ALGORITHMS)
def test_at_the_first_inner_step_the_ratio_is_1_and_the_gradient_that_of_signed_sft(name):
    model, learner = lesson(lambda got: float("d" in got or len(got) == 2), algorithm=name, accumulate=2)
    parts = list(learner.losses(model, (0, [0, 1]), rng(1)))
    assert len(parts) == 2
    (w, weight), noised = learner.rollout, learner.noised
    each = len(noised.xt) // 8
    x0 = w.x0.repeat_interleave(each, 0)
    log_p = torch.zeros(x0.shape, dtype=torch.float64).masked_scatter(noised.masked, token_log_p(model, x0, noised))
    of_answers = (log_p * noised.weight[:, None] / x0.shape[1]).view(8, -1).sum(1)  # per token of the answer
    assert weight.abs().sum() > 0 and (name == "rejection") == bool((weight >= 0).all())
    torch.testing.assert_close(gradient(model, sum(parts)), gradient(model, -(weight * of_answers).mean()))


def test_a_ratio_counts_as_far_as_the_clip_unless_that_would_hold_back():
    old, now = torch.zeros(4), torch.tensor([2.0, 0.25, 2.0, 0.25]).log()
    weight = torch.tensor([1.0, 1.0, -1.0, -1.0])
    torch.testing.assert_close(gains(now, old, weight, 0.5), torch.tensor([1.5, 0.25, -2.0, -0.5]))


def test_later_inner_steps_learn_from_the_same_answers():
    model, learner = lesson(lambda got: float("d" in got or len(got) == 2), algorithm="just-grpo")
    for part in learner.losses(model, (0, [0, 1]), rng(1)):
        part.backward()
    rollout, old, numbers = learner.rollout, learner.old[0], learner.numbers
    with torch.no_grad():
        for p in model.parameters():
            p -= 0.1 * p.grad
    (loss,) = learner.losses(model, (1, [0, 1]), rng(2))
    assert learner.rollout is rollout and learner.numbers is numbers and learner.old[0] is old
    assert loss.item() < 0 and loss.requires_grad  # what was right has become likelier


def test_questions_follow_the_number_of_the_rollout_alone():
    _, learner = lesson(len, inner=3, batch_size=4, group=4)
    batches = list(itertools.islice(learner.batches(0), 12))
    assert [inner for inner, _ in batches] == [0, 1, 2] * 4
    assert all(batches[i][1] == batches[i // 3 * 3][1] for i in range(12))
    assert list(itertools.islice(learner.batches(7), 5)) == batches[7:]


def test_without_any_right_answer_a_line_says_so_and_nothing_is_learned():
    model, learner = lesson(lambda got: 0.0)
    with pytest.warns(UserWarning, match="^reward: expected right answers, got none of the first 8, .*; begin with"):
        (loss,) = learner.losses(model, (0, [0, 1]), rng())
    assert loss.item() == 0 and gradient(model, loss).abs().max() == 0


# ---- training


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A small run to begin with that has seen sums of digits."""
    home = tmp_path_factory.mktemp("rewards")
    (home / "text.txt").write_text("".join(f"{a}+{b}={a + b}\n" for a in range(10) for b in range(10)) * 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINILLADA_CACHE", str(home / "cache"))
        more = {"preset": "nano", "length": 32, "tokenizer": "characters", "data": str(home / "text.txt")}
        list(train(TrainConfig(steps=6, batch_size=4, precision="float32", **more, out=str(home / "pre"))))
    return home


@pytest.mark.filterwarnings("ignore:reward")
@pytest.mark.parametrize("name", ["rejection", "diffu-grpo"])
def test_an_interrupted_run_ends_with_the_weights_and_losses_of_an_uninterrupted_one(home, tmp_path, name):
    own = {**QUICK, "start": str(home / "pre"), "temperature": 1.0, "rollout_steps": 2, "algorithm": name}
    names = ("loss", "reward", "mixed", "distinct", "agreement")
    assert_an_interruption_changes_nothing(partial(config, **own), tmp_path, *names)
    notices = [json.loads(line).get("notices", []) for line in (tmp_path / "whole/log.jsonl").open()]
    assert [any("algorithm" in n for n in found) for found in notices] == [name != "rejection", *[False] * 5]


@pytest.mark.filterwarnings("ignore:reward")
def test_a_stop_in_the_middle_of_a_rollout_waits_for_its_end_and_so_do_checkpoints(home, tmp_path):
    own = {**QUICK, "inner": 3, "steps": 9, "eval_every": 4, "start": str(home / "pre"), "rollout_steps": 2}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    steps = list(train(config(**own, out=str(whole))))
    assert [step.step for step in steps if step.bound is not None] == [6, 9]  # 4 and 8 are no rollout's last steps
    stop = iter([False, False, False, True]).__next__
    assert [step.step for step in train(config(**own, out=str(parts)), stop=stop)][-1] == 6
    assert [step.loss for step in train(resume=parts)] == [step.loss for step in steps[6:]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": "opn4"}, "task: expected one of .*, got 'opn4'; did you mean open4?"),
        ({"data": "sudoku4:2"}, "task sudoku4: expected none"),
        ({"algorithm": "grpo"}, "algorithm: expected one of rejection, .*, got 'grpo'"),
        ({"rollout_steps": 0}, "rollout_steps: expected"),
        ({"temperature": -1}, "temperature: expected"),
        ({"batch_size": 100, "group": 8}, "batch_size: expected a multiple of the group's 8 answers, got 100; "),
        ({"algorithm": "wd1", "group": 1}, "group: expected 2 answers or more with wd1, got 1; "),
    ],
)
def test_a_config_that_cannot_be_is_refused(changes, message):
    with pytest.raises(BadInput, match=f"^{message}"):
        config(**changes)


def test_a_task_that_the_model_cannot_read_and_too_many_steps_are_refused(home):
    refused = partial(pytest.raises, BadInput)
    with refused(match=r"^reward reverse: text: expected characters of the vocabulary, got .*; "):
        next(train(config(**{**QUICK, "data": "reverse", "start": str(home / "pre")})))
    with refused(match=r"^rollout_steps: expected at most 3, the tokens of the longest answer, got 4; lower it"):
        next(train(config(**QUICK, start=str(home / "pre"), rollout_steps=4)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reward": "open4"}, "from: expected a run or model directory to begin with, got none; add --from RUN"),
        (
            {"reward": "open4", "sft": "a.jsonl", "start": "."},
            "reward: expected none with --sft, got 'open4'; leave one",
        ),
        ({"reward": "open4", "start": ".", "beta": 0.1}, "beta: expected none with --reward, got 0.1; leave it out"),
        ({"group": 4}, "group: expected none with pre-training, got 4; leave it out"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(BadInput, match=f"^{message}"):
        config_for(options)


def test_the_option_gives_the_config_and_a_run_directory_of_its_name(home):
    found = config_for({"reward": "countdown:4", "start": str(home / "pre"), "rollout_steps": 2})
    assert (found.data, found.rollout_steps, found.algorithm) == ("countdown:4", 2, "rejection")
    assert Path(found.out).name.startswith("countdown4-reward-")
    assert found.lr > 5 * config(algorithm="wd1").lr  # weights of both signs need smaller steps
