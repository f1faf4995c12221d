"""The adapter to OpenCompass: its answers are those of our own functions."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from talkers import write_random, write_talker, write_template

import minillada
from minillada.errors import BadInput, BadLuck
from minillada.measure.evaluate import encode_pair, measure_choices, read_choices, score_options
from minillada.measure.likelihood import confidence_scores, log_likelihoods, perplexity
from minillada.sampler import SampleConfig, generate

ROOT = Path(__file__).parents[1]
CHOICES, SUMS = ROOT / "examples/lm_eval/choices.jsonl", ROOT / "examples/lm_eval/sums.jsonl"
PAIRS = [("Once upon", " a time"), ("ends with a blank ", "here"), ("2+2=", "4"), ("2+3=", "five")]
META = {"round": [{"role": "HUMAN", "begin": "<"}, {"role": "BOT", "begin": ">", "end": ".", "generate": True}]}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_random(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def adapter():
    pytest.importorskip("opencompass", reason="needs opencompass, in an environment of its own")
    return importlib.import_module("minillada.measure.opencompass")


@pytest.fixture
def make(adapter, directory):
    return lambda **options: adapter.MiniLLaDA(str(directory), **{"mc_num": 8, "device": "cpu", "rows": 4, **options})


def rounds(*prompts):
    """Templates as OpenCompass fills them in: a question of HUMAN and an answer of BOT each."""
    from opencompass.openicl.icl_prompt_template import PromptTemplate

    turns = [{"role": "HUMAN", "prompt": "{q}"}, {"role": "BOT", "prompt": "{a}"}]
    template = PromptTemplate({0: {"round": turns}})
    return [template.generate_label_prompt_item({"q": q, "a": a}, "", 0) for q, a in prompts]


def per_token(values, pairs):
    return [-value / len(after) for value, (_, after) in zip(values.tolist(), pairs, strict=True)]


def test_a_perplexity_is_the_bound_per_token_of_a_text_of_any_length(make):
    texts = ["short", "a longer text, which does not fit the model at once " * 3]
    model = make(stride=12, window=40)
    ours = [perplexity(model.model, text, model.tokenizer, 40, 12, 8, batch_size=4) for text in texts]
    assert model.get_ppl(texts).tolist() == pytest.approx([one.nats / one.tokens for one in ours])
    assert model.get_ppl_from_template(texts).tolist() == model.get_ppl(texts).tolist()
    whole = make().get_ppl_from_template(rounds(PAIRS[0]))  # no meta template: no role is generated
    assert whole.tolist() == make().get_ppl(["\n".join(PAIRS[0])]).tolist()


def test_the_tokens_that_mask_length_counts_are_given(make):
    model, texts, given = make(), ["Once upon a time", "2+3=five"], [9, 4]
    rows = [model.tokenizer.encode(text) for text in texts]
    pairs = [(row[:n], row[n:]) for row, n in zip(rows, given, strict=True)]
    ours = log_likelihoods(model.model, pairs, 8, batch_size=4)[0]
    assert model.get_ppl(texts, given).tolist() == pytest.approx(per_token(ours, pairs), abs=1e-9)
    assert model.get_ppl_from_template(texts, given).tolist() == model.get_ppl(texts, given).tolist()
    with pytest.raises(BadInput, match=r"^answer: expected at least one token"):
        model.get_ppl(["2+2="], [4])


def test_what_a_template_generates_is_predicted_given_the_rest(make):
    for options in ({}, {"cfg": 1.5}, {"scoring": "confidence"}):
        model = make(meta_template=META, **options)
        pairs = [encode_pair(model.tokenizer, f"<{question}>", f"{answer}.") for question, answer in PAIRS]
        guidance = {"cfg_scale": options.get("cfg", 0.0), "batch_size": 4}
        ours = log_likelihoods(model.model, pairs, 8, **guidance)[0]
        ours = confidence_scores(model.model, pairs, **guidance)[0] if "scoring" in options else ours
        found = model.get_ppl_from_template(rounds(*PAIRS)).tolist()
        assert found == pytest.approx(per_token(ours, pairs), abs=1e-9)


def test_a_log_likelihood_is_that_of_the_end_of_a_text_and_a_single_token_needs_no_sampling(make):
    model, texts, ends = make(), ["".join(pair) for pair in PAIRS], [end for _, end in PAIRS]
    several = [encode_pair(model.tokenizer, *pair) for pair in PAIRS if pair[1] != "4"]
    ours = log_likelihoods(model.model, several, 8, batch_size=4)[0].tolist()
    found = model.get_loglikelihood(texts, ends).tolist()
    assert found[:2] + found[3:] == pytest.approx(ours, abs=1e-9)
    assert found[2] == pytest.approx(make(mc_num=1).get_loglikelihood(["2+2=4"], ["4"]).item(), abs=1e-5)
    for strange in ("5", ""):
        with pytest.raises(BadInput, match=r"^cont: expected the end of the prompt"):
            model.get_loglikelihood(["2+2=4"], [strange])


def test_a_context_that_is_too_long_loses_its_beginning(make):
    model = make(max_seq_len=10)
    before, after = model.pair("0123456789abcdef", "0123456789abcdefxyz")
    assert model.tokenizer.decode(before) == "9abcdef" and model.tokenizer.decode(after) == "xyz"
    asked = {"max_out_len": 4}
    assert model.generate(["0123456789abcdef"], **asked) == model.generate(["abcdef"], **asked)


def test_generation_is_our_own_up_to_the_first_stop_string(make):
    model, prompts = make(), ["Once", "upon a time", "2+2="]
    config = SampleConfig(gen_len=8, steps=8, block_len=8)
    written = generate(model.model, [model.tokenizer.encode(prompt) for prompt in prompts], config)
    ours = [model.tokenizer.decode(row) for row in written]
    assert model.generate(prompts, max_out_len=8) == ours
    stop = ours[1][3]
    until_it = [text.split(stop)[0] for text in ours]
    assert make().generate(prompts, max_out_len=8, stopping_criteria=["not there", stop]) == until_it
    assert make(stop_words=[stop]).generate(prompts, max_out_len=8) == until_it


def test_the_users_lengths_come_before_the_tasks(make):
    prompts, config = ["Once"], SampleConfig(gen_len=8, steps=4, block_len=4)
    model = make(gen_length=8, steps=4, block_length=4)
    (ours,) = generate(model.model, [model.tokenizer.encode(prompts[0])], config)
    assert model.generate(prompts, max_out_len=2) == [model.tokenizer.decode(ours)]


def test_a_question_asked_again_is_drawn_again_and_a_run_repeats_itself(make):
    drawing = {"do_sample": True, "temperature": 1.0, "top_k": 50}
    runs = []
    for model, more in ((make(), drawing), (make(generation_kwargs=drawing), {})):
        runs.append([model.generate(["Once"], max_out_len=8, **more) for _ in range(3)])
    assert runs[0] == runs[1] and len({answer for (answer,) in runs[0]}) == 3
    with pytest.raises(BadInput, match=r"^generation_kwargs: expected one of do_sample"):
        make(generation_kwargs={"num_beams": 4}).generate(["Once"], max_out_len=8)


def test_a_prompt_is_as_long_as_its_tokens(make):
    model = make(meta_template=META)
    assert model.get_token_len("12 34") == 5
    assert model.get_token_len_from_template(rounds(("12", "34")), mode="ppl") == [len("<12>34.")]
    assert model.get_token_len_from_template(rounds(("12", "34")), mode="gen") == [len("<12>")]


def test_in_a_chat_the_answer_is_predicted_and_what_a_user_types_is_never_a_marker(adapter, tmp_path):
    path = write_template(write_talker(tmp_path / "talker"), "<|eot_id|>{{ messages[0].content }}<|eot_id|>")
    model = adapter.MiniLLaDA(str(path), chat=True, mc_num=8, device="cpu")
    (question,) = model.parse_template(rounds(("Hi<|eot_id|>", "Hello")), mode="gen")
    ids = model.encode(question)
    assert ids[0] == ids[-1] == 253 and 253 not in ids[1:-1] and len(ids) == 14
    assert model.get_token_len(question) == 14 and 253 in model.stop_ids()
    pair = (ids, model.tokenizer.encode("Hello"))
    ours = log_likelihoods(model.model, [pair], 8)[0]
    found = model.get_ppl_from_template(rounds(("Hi<|eot_id|>", "Hello")))
    assert found.tolist() == pytest.approx(per_token(ours, [pair]), abs=1e-9)
    config = SampleConfig(gen_len=4, steps=4, block_len=4, stop_ids=model.stop_ids())
    (written,) = generate(model.model, [ids], config)
    assert model.generate([question], max_out_len=4) == [model.tokenizer.decode(written)]
    with pytest.raises(BadInput, match=r"^chat: expected an answer to predict"):
        model.get_ppl(["a text"])
    said = [("SYSTEM", "Be"), ("SYSTEM", "brief"), ("HUMAN", "Hi"), ("BOT", "")]
    turns = adapter.messages([{"role": role, "prompt": text} for role, text in said])
    assert turns == [{"role": "system", "content": "Be\nbrief"}, {"role": "user", "content": "Hi"}]
    assert adapter.messages("Hi") == [{"role": "user", "content": "Hi"}]


def test_a_file_of_choices_is_a_data_set_with_a_column_for_each_option(adapter, tmp_path):
    (tmp_path / "two.jsonl").write_text('{"prompt": "2+2=", "options": ["3", "4"], "answer": 1}\n')
    (row,) = adapter.Choices.load(str(tmp_path / "two.jsonl")).to_list()
    assert row == {"prompt": "2+2=", "options": ["3", "4"], "answer": 1, "option0": "3", "option1": "4"}
    uneven = tmp_path / "two.jsonl"
    uneven.write_text(uneven.read_text() + '{"prompt": "1+1=", "options": ["1", "2", "3"], "answer": 1}\n')
    with pytest.raises(BadInput, match="expected as many options in every line"):
        adapter.Choices.load(str(uneven))


def test_without_the_package_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # as if it could not be found
    monkeypatch.delitem(sys.modules, "minillada.measure.opencompass", raising=False)
    with pytest.raises(BadLuck, match=r"^opencompass: expected the package, .* pip install 'minillada\[opencompass\]'"):
        importlib.import_module("minillada.measure.opencompass")


def test_the_command_over_the_example_gives_our_own_numbers(adapter, directory, tmp_path):
    text = (ROOT / "examples/opencompass/toy.py").read_text(encoding="utf-8")
    for name, path in (("runs/add-1", directory), (CHOICES.relative_to(ROOT).as_posix(), CHOICES)):
        assert text.count(f'"{name}"') == 1
        text = text.replace(f'"{name}"', f'"{path.as_posix()}"')
    text = text.replace('"examples/', f'"{ROOT.as_posix()}/examples/').replace("mc_num=128", 'mc_num=4, device="cpu"')
    text += '\nmodels.append(dict(models[0], abbr="surest", scoring="confidence"))\n'
    (tmp_path / "toy.py").write_text(text, encoding="utf-8")
    command = [sys.executable, "-c", "from opencompass.cli.main import main; main()", "toy.py", "--debug", "-w", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    (out,) = (tmp_path / "out").iterdir()
    found = {
        (kind, model, task): json.loads((out / kind / model / f"{task}.json").read_text(encoding="utf-8"))
        for kind in ("predictions", "results")
        for model in ("minillada", "surest")
        for task in ("toy_choices", "toy_sums")
    }
    model, tokenizer = minillada.load(directory)

    items, bounds = read_choices(CHOICES), []
    for label in range(4):  # one batch of all questions for each
        pairs = [encode_pair(tokenizer, item["prompt"], item["options"][label]) for item in items]
        scores = score_options(model, pairs, n_samples=4, batch_size=32)
        bounds.append([-score / len(after) for score, (_, after) in zip(scores, pairs, strict=True)])
    predictions = found["predictions", "minillada", "toy_choices"]
    for i, of_item in enumerate(zip(*bounds, strict=True)):
        theirs = [predictions[str(i)][f"label: {label}"]["PPL"] for label in range(4)]
        assert theirs == pytest.approx(of_item, abs=1e-5)
    chosen = [of_item.index(min(of_item)) for of_item in zip(*bounds, strict=True)]
    right = sum(label == item["answer"] for label, item in zip(chosen, items, strict=True))
    assert found["results", "minillada", "toy_choices"]["accuracy"] == pytest.approx(100 * right / len(items))
    surest = measure_choices(model, tokenizer, items, scoring="confidence")  # nothing is drawn: batches do not matter
    accuracy = found["results", "surest", "toy_choices"]["accuracy"]
    assert accuracy == pytest.approx(100 * surest["accuracy_per_character"])

    sums = [json.loads(line) for line in SUMS.read_text(encoding="utf-8").splitlines()]
    config = SampleConfig(gen_len=4, steps=4, block_len=4)
    rows = generate(model, [tokenizer.encode(item["prompt"]) for item in sums], config)
    written = [tokenizer.decode(row).split("\n")[0] for row in rows]
    theirs = found["predictions", "minillada", "toy_sums"]
    assert [theirs[str(i)]["prediction"] for i in range(len(sums))] == written
    right = sum(text == item["answer"] for text, item in zip(written, sums, strict=True))
    assert found["results", "minillada", "toy_sums"]["accuracy"] == pytest.approx(100 * right / len(sums))
