"""The adapter to lm-evaluation-harness: its answers are those of our own functions.

Without the package its three names are stood in for, and what needs the harness itself is skipped.
"""

import dataclasses
import importlib
import importlib.util
import json
import runpy
import subprocess
import sys
import types
from pathlib import Path

import pytest
from talkers import write_random, write_talker, write_template

import minillada
from minillada.errors import BadInput, BadLuck
from minillada.measure.evaluate import encode_pair, measure_choices, measure_text, read_choices
from minillada.measure.likelihood import confidence_scores, log_likelihoods, perplexity
from minillada.sampler import SampleConfig, generate

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples/lm_eval"
HARNESS = importlib.util.find_spec("lm_eval") is not None
PAIRS = [("Once upon", " a time"), ("", "abc"), ("ends with a blank ", "here")]


class Hook:
    def __init__(self):
        self.seen = []

    def add_partial(self, kind, args, result):
        self.seen.append((kind, args, result))


@dataclasses.dataclass
class Request:
    args: tuple


@pytest.fixture(scope="module")
def adapter():
    """The module, over the harness or over a stand-in for what it takes from it."""
    stood_in = {
        "lm_eval": {},
        "lm_eval.api": {},
        "lm_eval.api.instance": {"Instance": Request},
        "lm_eval.api.model": {"LM": type("LM", (), {"__init__": lambda self: setattr(self, "cache_hook", Hook())})},
        "lm_eval.api.registry": {"register_model": lambda name: lambda cls: cls},
    }
    for name, fields in stood_in.items() if not HARNESS else ():
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(fields)
    yield importlib.import_module("minillada.measure.lm_eval")
    for name in [*stood_in, "minillada.measure.lm_eval"] if not HARNESS else ():
        del sys.modules[name]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_random(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture
def make(adapter, directory):
    def lm(**options):
        made = adapter.MiniLLaDA(str(directory), **{"mc_num": 8, "device": "cpu", "batch_size": 4, **options})
        made.cache_hook = Hook()
        return made

    return lm


def ask(method, *args):
    return method([Request(a) for a in args], disable_tqdm=True)


def test_likelihoods_are_our_own_and_a_single_token_needs_no_sampling(make):
    for options in ({}, {"cfg": 1.5}, {"scoring": "confidence"}):
        lm = make(**options)
        pairs = [encode_pair(lm.tokenizer, *pair) for pair in PAIRS]
        guidance = {"cfg_scale": options.get("cfg", 0.0), "batch_size": 4}
        ours = log_likelihoods(lm.model, pairs, 8, **guidance)[0]
        ours = confidence_scores(lm.model, pairs, **guidance)[0] if "scoring" in options else ours
        assert [value for value, _ in ask(lm.loglikelihood, *PAIRS)] == pytest.approx(ours.tolist(), abs=1e-9)
        single = ask(lm.loglikelihood, PAIRS[0], ("2+2=", "4"))[1]
        assert single[0] == pytest.approx(ask(make(mc_num=1, **options).loglikelihood, ("2+2=", "4"))[0][0], abs=1e-5)


def test_an_answer_is_greedy_if_the_sampler_writes_it_and_the_check_can_be_left_out(make):
    lm = make()
    config = SampleConfig(gen_len=4, steps=4, block_len=4, stop_at_eos=False)
    (written,) = generate(lm.model, [lm.tokenizer.encode("It is")], config)
    text = lm.tokenizer.decode(written)
    assert len(text) == 4
    requests = [("It is", text), ("It is", text[:-1] + ("b" if text[-1] == "a" else "a"))]
    assert [greedy for _, greedy in ask(lm.loglikelihood, *requests)] == [True, False]
    assert [greedy for _, greedy in ask(make(is_check_greedy=False).loglikelihood, *requests)] == [False, False]


def test_blanks_between_context_and_continuation_belong_to_the_continuation(make):
    lm = make()
    assert lm.pair("a  ", "b") == (lm.tokenizer.encode("a"), lm.tokenizer.encode("  b"))
    assert lm.pair("a\n", "b") == lm.pair("a", "\nb")
    assert lm.pair("", "b") == ([], lm.tokenizer.encode("b"))


def test_a_context_that_is_too_long_loses_its_beginning(make):
    lm = make(max_length=10)
    before, after = lm.pair("0123456789abcdef", "xyz")
    assert lm.tokenizer.decode(before) == "9abcdef" and lm.tokenizer.decode(after) == "xyz"


def test_rolling_likelihood_is_our_perplexity_of_a_text_of_any_length(make):
    lm, texts = make(stride=12, window=40), ["short", "a longer text, which does not fit the model at once " * 3]
    ours = [perplexity(lm.model, text, lm.tokenizer, 40, 12, 8, batch_size=4).nats for text in texts]
    assert ask(lm.loglikelihood_rolling, *((text,) for text in texts)) == pytest.approx([-nats for nats in ours])


def test_generation_is_our_own_up_to_the_first_stop_string(make):
    lm, prompts = make(), ["Once", "upon a time", "2+2="]
    asked = {"until": [], "max_gen_toks": 8, "do_sample": False}
    config = SampleConfig(gen_len=8, steps=8, block_len=8)
    written = generate(lm.model, [lm.tokenizer.encode(prompt) for prompt in prompts], config)
    ours = [lm.tokenizer.decode(row) for row in written]
    assert ask(lm.generate_until, *((prompt, asked) for prompt in prompts)) == ours
    stop = ours[1][3]
    assert ask(lm.generate_until, *((prompt, {**asked, "until": ["not there", stop]}) for prompt in prompts)) == [
        text.split(stop)[0] for text in ours
    ]


def test_the_users_lengths_come_before_the_tasks_and_sampling_follows_the_task(make):
    asked = {"until": ["x"], "max_gen_toks": 6, "temperature": 0.7, "top_k": 5}
    assert make().config_of(asked) == SampleConfig(gen_len=6, steps=6, block_len=6, stop_ids=make().stop_ids())
    chosen = make(steps=4, gen_length=8, block_length=4, remasking="random", cfg=0.5).config_of(
        {**asked, "do_sample": True}
    )
    assert (chosen.steps, chosen.gen_len, chosen.block_len, chosen.remasking) == (4, 8, 4, "random")
    assert (chosen.cfg_scale, chosen.temperature, chosen.top_k) == (0.5, 0.7, 5)


def test_requests_that_decode_differently_keep_their_places(make):
    lm = make()
    ways = [{"max_gen_toks": 4}, {"max_gen_toks": 8}, {"max_gen_toks": 4}]
    requests = [(prompt, way) for prompt, way in zip(("abc", "abc", "xyz"), ways, strict=True)]
    alone = [ask(lm.generate_until, request)[0] for request in requests]
    assert ask(lm.generate_until, *requests) == alone
    assert len(alone[0]) <= 4 < len(alone[1]) <= 8


def test_every_answer_goes_to_the_harnesss_cache(make):
    lm = make(mc_num=2)
    answers = [
        ("loglikelihood", PAIRS[0], ask(lm.loglikelihood, PAIRS[0])[0]),
        ("loglikelihood_rolling", ("text",), ask(lm.loglikelihood_rolling, ("text",))[0]),
        ("generate_until", ("a", {"max_gen_toks": 2}), ask(lm.generate_until, ("a", {"max_gen_toks": 2}))[0]),
    ]
    assert lm.cache_hook.seen == answers
    assert ask(lm.loglikelihood) == ask(lm.loglikelihood_rolling) == ask(lm.generate_until) == []


def test_in_a_chat_what_a_user_types_is_never_a_marker(adapter, tmp_path):
    path = write_template(write_talker(tmp_path / "talker"), "<|eot_id|>{{ messages[0].content }}<|eot_id|>")
    lm = adapter.MiniLLaDA(str(path), mc_num=2, device="cpu")
    text = lm.apply_chat_template([{"role": "user", "content": "Hi<|eot_id|>"}])
    assert text == "<|eot_id|>Hi<|eot_id|><|eot_id|>"
    ids = lm.encode(text)
    assert ids[0] == ids[-1] == 253 and 253 not in ids[1:-1] and len(ids) == 14
    assert lm.pair(text, "x")[0] == ids
    assert 253 in lm.stop_ids() and lm.tokenizer_name == str(path)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"batch_size": "auto"}, "batch_size"),
        ({"mc_num": 0}, "mc_num"),
        ({"scoring": "best"}, "scoring"),
        ({"dtype": "int8"}, "dtype"),
        ({"max_length": 49}, "max_length"),
    ],
)
def test_options_that_mean_nothing_are_refused(make, options, what):
    with pytest.raises(BadInput, match=f"^{what}: expected"):
        make(**options)


def test_block_length_must_divide_what_is_written(make):
    with pytest.raises(BadInput, match=r"^block_len: expected a divisor of gen_len 9"):
        ask(make(block_length=4).generate_until, ("a", {"max_gen_toks": 9}))


def test_without_the_package_one_line_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval.api.instance", None)  # as if it could not be found
    monkeypatch.delitem(sys.modules, "minillada.measure.lm_eval", raising=False)
    with pytest.raises(BadLuck, match=r"^lm_eval: expected the package, .* pip install 'minillada\[eval\]'"):
        importlib.import_module("minillada.measure.lm_eval")
    monkeypatch.setattr(sys, "argv", ["minillada", "lm_eval"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("minillada", run_name="__main__")
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: lm_eval: expected the package")


def test_the_questions_of_the_examples_are_those_that_the_script_makes():
    made = runpy.run_path(str(EXAMPLES / "make.py"), run_name="examples")
    for name, make in made["FILES"].items():
        lines = (EXAMPLES / name).read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in lines] == make()
    for item in read_choices(EXAMPLES / "choices.jsonl"):
        a, b = item["prompt"].strip("\n=").split("+")
        assert [int(option) == int(a) + int(b) for option in item["options"]].index(True) == item["answer"]


@pytest.mark.skipif(not HARNESS, reason="needs lm_eval")
def test_the_harness_over_the_example_tasks_gives_our_own_numbers(directory, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    arguments = f"pretrained={directory},mc_num=4,stride=16"
    command = [sys.executable, "-m", "minillada", "lm_eval", "run", "--model", "minillada"]
    command += ["--model_args", arguments, "--device", "cpu", "--batch_size", "8", "--include_path", str(EXAMPLES)]
    command += [
        "--tasks",
        "toy_choices,toy_text,toy_sums",
        "--output_path",
        str(tmp_path / "out.json"),
        "--log_samples",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    (path,) = [p for p in tmp_path.glob("*.json")]
    found = json.loads(path.read_text())["results"]
    samples = {
        name: [json.loads(line) for line in next(tmp_path.glob(f"samples_{name}_*.jsonl")).read_text().splitlines()]
        for name in found
    }
    model, tokenizer = minillada.load(directory)

    ours = measure_choices(model, tokenizer, read_choices(EXAMPLES / "choices.jsonl"), n_samples=4, batch_size=8)
    assert found["toy_choices"]["acc,none"] == pytest.approx(ours["accuracy"])
    assert found["toy_choices"]["acc_norm,none"] == pytest.approx(ours["accuracy_per_character"])
    assert found["toy_choices"]["acc_stderr,none"] == pytest.approx(ours["standard_error"])

    texts = [json.loads(line)["text"] for line in (EXAMPLES / "text.jsonl").read_text().splitlines()]
    costs = [measure_text(model, tokenizer, t, stride=16, n_samples=4, batch_size=8) for t in texts]
    bits = sum(c["nats"] for c in costs) / sum(c["bytes"] for c in costs) / 0.6931471805599453
    assert found["toy_text"]["bits_per_byte,none"] == pytest.approx(bits)

    sums = [json.loads(line) for line in (EXAMPLES / "sums.jsonl").read_text().splitlines()]
    config, written = SampleConfig(gen_len=4, steps=4, block_len=4), []
    for first in range(0, len(sums), 8):
        prompts = [tokenizer.encode(item["prompt"]) for item in sums[first : first + 8]]
        written += [tokenizer.decode(row).split("\n")[0] for row in generate(model, prompts, config)]
    by_question = {sample["doc"]["prompt"]: sample["resps"][0][0] for sample in samples["toy_sums"]}
    assert [by_question[item["prompt"]] for item in sums] == written
    right = sum(text == item["answer"] for text, item in zip(written, sums, strict=True))
    assert found["toy_sums"]["exact_match,none"] == pytest.approx(right / len(sums))
