"""load_8b.py and sample.py as a person uses them. Most run inside this process, where starting costs nothing."""

import io
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from oracles import GOLDEN
from pseudo_terminal import chat, last_picture, seen_in_terminal, with_terminals
from safetensors.torch import load_file, save_file
from talkers import CHARACTERS, write_talker, write_template, write_tokenizer

import minillada
from minillada.commands.ask import guide_of, quick_dtype
from minillada.commands.cli import Parser, run
from minillada.errors import BadInput, BadLuck
from minillada.text.chat import PROMPT_CAP
from minillada.text.tasks import make_task
from minillada.weights.shipped import HOME

ROOT = Path(__file__).parents[1]
QUICK = ["--gen-len", "16", "--device", "cpu"]


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    return write_talker(tmp_path_factory.mktemp("talker"))


@pytest.fixture
def call(monkeypatch, capsys):
    """call(script, *arguments, typed=text) -> (exit code, standard output, standard error)."""
    mains = {}

    def call(script, *arguments, typed=""):
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        main = mains.setdefault(script, runpy.run_path(str(ROOT / script))["main"])
        code = 0
        try:
            run(main)
        except SystemExit as error:
            code = error.code
        found = capsys.readouterr()
        return code, found.out, found.err

    return call


def refused(result, reason):
    """Exit 2, and the last line of stderr, the only one without a colour or a bar, is the error."""
    code, out, err = result
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith("error: ") and reason in err.splitlines()[-1]
    assert "Traceback" not in err and "\x1b" not in err


# ---- load_8b.py -----------------------------------------------------------------------------------------------------


def test_a_check_reads_no_weights_and_says_what_it_found(call, home):
    code, out, err = call("load_8b.py", home, "--check")
    assert (code, out) == (0, "")
    assert "LLaDA names, 30 tensors in 3 files, 208kB of float32" in err
    assert "104kB in bfloat16" in err
    assert "answers end at (254, 253)" in err
    assert "all well; the weights were not read" in err


def test_a_deep_check_finds_what_is_not_finite(call, tmp_path):
    write_talker(tmp_path)
    file = tmp_path / "model-00001-of-00003.safetensors"
    tensors = load_file(file)
    name = sorted(tensors)[0]
    tensors[name].view(-1)[3] = float("nan")
    save_file(tensors, file)
    assert call("load_8b.py", tmp_path, "--check")[0] == 0
    refused(call("load_8b.py", tmp_path, "--check", "--deep"), f"NaN or infinity in {name}")


@pytest.mark.parametrize("mode", [["--check"], ["--prompt", "a"], ["--chat"]], ids=["check", "prompt", "chat"])
@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("config.json", "{", "config.json: expected JSON"),
        ("model.safetensors.index.json", "[]", "expected a JSON object, got list"),
        ("model-00002-of-00003.safetensors", "", "model-00002-of-00003.safetensors"),
        ("tokenizer.json", "{}", "tokenizer.json"),
        ("chat_template.jinja", "{{ nothing }}", "'nothing' is undefined"),
        ("chat_template.jinja", "x" * 70_000, "at most 65536 bytes"),
        ("tokenizer_config.json", "{", "tokenizer_config.json: expected JSON"),
    ],
)
def test_a_faulty_directory_costs_one_line(call, tmp_path, mode, file, content, reason):
    write_talker(tmp_path)
    (tmp_path / file).write_text(content)
    refused(call("load_8b.py", tmp_path, *mode), reason)


def test_a_prompt_is_a_text_or_a_message(call, home, tmp_path):
    code, out, err = call("load_8b.py", home, "--prompt", "Hello", "--quiet", *QUICK)
    assert (code, "texts to go on with" in err) == (0, True)
    assert out.startswith("Hello")
    model, tokenizer = minillada.load(home)
    config = minillada.SampleConfig(gen_len=16, steps=16, block_len=16, stop_ids=(254, 253))
    assert out.rstrip("\n") == "Hello" + tokenizer.decode(
        minillada.generate(model, [tokenizer.encode("Hello")], config)[0]
    )
    assert "loaded in" in err and "takes 208kB on cpu" in err
    instruct = write_talker(tmp_path / "Small-Instruct")
    code, out, err = call("load_8b.py", instruct, "--prompt", "Hello", "--quiet", *QUICK)
    assert (code, "messages in the chat template" in err, out.startswith("Hello")) == (0, True, False)
    assert call("load_8b.py", instruct, "--prompt", "Hello", "--raw", "--quiet", *QUICK)[1].startswith("Hello")


def test_an_answer_ends_where_the_files_say(call, tmp_path):
    write_talker(tmp_path)
    _, out, _ = call("load_8b.py", tmp_path, "--prompt", "Hello", "--quiet", *QUICK)
    favourite = out.removeprefix("Hello")[0]
    ends = {"eos_token_id": [254, CHARACTERS.index(favourite)]}
    (tmp_path / "generation_config.json").write_text(json.dumps(ends))
    _, out, _ = call("load_8b.py", tmp_path, "--prompt", "Hello", "--quiet", *QUICK)
    assert favourite not in out.removeprefix("Hello")


def test_every_way_of_storing_the_weights_answers(call, home):
    for options in (["--dtype", "bfloat16"], ["--quantize", "int8"], ["--quantize", "int4", "--dtype", "float16"]):
        code, out, err = call("load_8b.py", home, "--prompt", "Hello", "--quiet", *options, *QUICK)
        assert (code, out[:5]) == (0, "Hello")
        assert "takes 208kB" not in err


def test_a_piped_chat_goes_on_after_what_cannot_be_used(call, home):
    typed = ["Hi", "", "  ", "caf\u00e9", "\udcff", "a" * 500, "x" * (PROMPT_CAP + 1), "/reset", "Bye", "/quit", "no"]
    code, out, err = call("load_8b.py", home, "--chat", *QUICK, typed="\n".join(typed))
    assert code == 0
    assert len(out.splitlines()) <= 2 * 16 and "you>" not in out
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 4
    for line, reason in zip(errors, ["", "U+DCFF", "at most 112 tokens", "at most 1048576 bytes"], strict=True):
        assert reason in line


def test_a_chat_remembers_until_it_is_reset_or_full(call, home):
    def answers(*typed):
        out = call("load_8b.py", home, "--chat", "--gen-len", "8", "--device", "cpu", typed="\n".join(typed))[1]
        return out.split("\n")[:-1]

    again = answers("Hello", "/reset", "Hello")
    assert again[: len(again) // 2] == again[len(again) // 2 :]
    assert answers("Other", "Hello")[-1] != again[-1] or answers("Other", "Hello")[:-1]
    assert any("no longer fit and are forgotten" in line for line in answers("a" * 40, "b" * 40, "c"))


def test_a_file_of_prompts_becomes_jsonl(call, home, tmp_path):
    (tmp_path / "plain.txt").write_text("One\n\nTwo and more\nThree\n")
    lines = [json.dumps({"prompt": text, "id": 1}) for text in ("One", "Two and more", "Three")]
    (tmp_path / "lines.jsonl").write_text("\n".join(lines))
    results = []
    for options in (["plain.txt", "--batch-size", "1"], ["plain.txt"], ["lines.jsonl", "--batch-size", "2"]):
        code, out, _ = call("load_8b.py", home, "--prompts", tmp_path / options[0], *options[1:], *QUICK)
        assert code == 0
        results.append([json.loads(line) for line in out.splitlines()])
    assert results[0] == results[1] == results[2]
    assert [found["prompt"] for found in results[0]] == ["One", "Two and more", "Three"]
    assert all(set(found) == {"prompt", "answer"} for found in results[0])
    written = tmp_path / "answers.jsonl"
    assert call("sample.py", home, "--prompts", tmp_path / "plain.txt", "--temperature", "0", "--out", written, *QUICK)[
        :2
    ] == (0, "")
    assert [json.loads(line) for line in written.read_text().splitlines()] == results[0]
    refused(call("sample.py", home, "--prompts", tmp_path / "plain.txt", "--out", written), "out: expected a new file")


FAULTS = [
    ([], "required"),
    (["--prompt", "a", "--chat"], "not allowed with"),
    (["--prompt", "a", "--dtype", "int8"], "dtype: expected one of bfloat16, float16, float32"),
    (["--prompt", "a", "--quantize", "int2"], "quantize: expected one of int8, int4"),
    (["--prompt", "a", "--device", "tpu"], "device: expected one of"),
    (["--prompt", "a", "--device", "cpu:x"], "device: expected"),
    (["--prompt", "a", "--revision", "main"], "revision: expected none"),
    (["--prompt", "a", "--gen-len", "0"], "gen_len: expected"),
    (["--prompt", "a", "--block-len", "0"], "block_len: expected"),
    (["--fill", "a[MASK]", "--gen-len", "4"], "fill: expected neither"),
    (["--prompt", "a", "--gen-len", "200"], "gen_len: expected a whole number from 1 to 127, got 200"),
    (["--chat", "--gen-len", "1000000000"], "gen_len: expected a whole number from 1 to 127"),
    (["--prompt", "a", "--gen-len", "x"], "invalid int value"),
    (["--prompt", "a", "--block-len", "7", "--gen-len", "16"], "block_len: expected a divisor"),
    (["--prompt", "a", "--steps", "3", "--block-len", "8", "--gen-len", "16"], "steps: expected a multiple"),
    (["--prompt", "a", "--temperature", "nan"], "temperature: expected a finite number"),
    (["--prompt", "a", "--commit", "all"], "commit: expected one of"),
    (["--prompt", "a", "--seed", "-1"], "seed: expected a whole number"),
    (["--prompt", "a", "--batch-size", "0"], "batch_size: expected a whole number"),
    (["--prompt", "a" * 200], "prompt: expected fewer than 128 tokens, got 200"),
    (["--prompt", "\u00e9"], "error: text: expected"),
    (["--prompt", "\udcff"], "the lone surrogate U+DCFF"),
    (["--fill", "nothing to fill"], "fill: expected at least one [MASK]"),
    (["--fill", "x" * (PROMPT_CAP + 1)], "fill: expected at most 1048576 bytes"),
    (["--edit", "nothing to [edit]"], "edit: expected at least one [[span]]"),
    (["--edit", "a [[b]]", "--block-len", "4"], "edit: expected neither"),
    (["--prompts", "no-such-file"], "no-such-file: expected a file"),
    (["--prompt", "a", "--out", "x"], "out: expected a new file for the answers to --prompts, got no --prompts"),
    (["--prompt", "a", "--what"], "got: no option --what; did you mean "),
    (["--promt", "a"], "got: no option --promt; did you mean --prompt?"),
    (["--prompt", "a", "--temperatur=1"], "got: no option --temperatur; did you mean --temperature?"),
    (["--prompt", "a", "--commit", "treshold:0.9"], "did you mean threshold?"),
    (["--prompt", "a", "--remasking", "low-confidence"], "did you mean low_confidence?"),
]


@pytest.mark.parametrize(("options", "reason"), FAULTS, ids=[" ".join(o)[:40] + " " for o, _ in FAULTS])
def test_a_faulty_option_costs_one_line(call, home, options, reason):
    refused(call("load_8b.py", home, *options), reason)


def test_a_file_of_prompts_is_refused_by_line(call, home, tmp_path):
    for content, reason in [(b"", "expected a prompt in each line, got nothing"), (b"ok\n\xff", "expected UTF-8")]:
        (tmp_path / "p.txt").write_bytes(content)
        refused(call("load_8b.py", home, "--prompts", tmp_path / "p.txt"), reason)
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n{"question": "b"}')
    refused(call("load_8b.py", home, "--prompts", tmp_path / "p.jsonl"), "line 2")


def test_an_instruct_model_wants_a_message(call, tmp_path):
    home = write_template(write_talker(tmp_path / "x"), "{{ messages[0].content }}")
    refused(call("load_8b.py", home, "--prompt", " \n"), "prompt: expected some text, got none")
    assert call("load_8b.py", home, "--prompt", "", "--raw", "--quiet", *QUICK)[0] == 0


def test_a_name_that_is_no_directory_is_asked_of_the_hub(call, home, monkeypatch):
    asked = []
    monkeypatch.setattr("minillada.weights.hub.fetch", lambda *args, progress: asked.append(args) or home)
    assert call("load_8b.py", "GSAI-ML/LLaDA-8B-Base", "--check", "--revision", "v1")[0] == 0
    assert asked == [("GSAI-ML/LLaDA-8B-Base", "v1")]


def test_what_is_neither_here_nor_a_name_is_refused(call):
    refused(call("load_8b.py", "no such directory", "--check"), "expected a model that is here")


@pytest.fixture
def two_runs(tmp_path, monkeypatch):
    """A directory with runs, as the working directory; asking the hub is a failure."""
    monkeypatch.setattr("minillada.weights.hub.fetch", lambda *args, **more: pytest.fail(f"the hub is asked: {args}"))
    for name in ("tales-nano-1", "docs-tiny-1"):
        (tmp_path / "runs" / name / "checkpoints").mkdir(parents=True)
        (tmp_path / "runs" / name / "run.json").write_text("{}")
    monkeypatch.chdir(tmp_path)


def test_a_name_that_is_not_here_gets_a_list_of_what_is(call, two_runs):
    for name in ("runs/doc-tiny-1", "./runs/docs-tiny-2", "docs-tiny-1"):
        for script, options in (("sample.py", []), ("load_8b.py", ["--check"])):
            refused(call(script, name, *options), f"{name}: expected a model that is here (runs/docs-tiny-1, ")
    refused(call("sample.py", "GSAI-ML/LLaDA-8B-Base"), "or add --hub")
    refused(call("train_tiny.py", "--resume", "runs/docs-tiny-2"), "(runs/docs-tiny-1, runs/tales-nano-1)")
    refused(call("train_tiny.py", "--sft", "a.jsonl", "--from", "runs/docs-2"), "(runs/docs-tiny-1, ")


def test_sample_asks_the_hub_when_it_is_told_to(call, home, monkeypatch):
    monkeypatch.setattr("minillada.weights.hub.fetch", lambda name, *more: home if name == "a/b" else pytest.fail())
    assert call("sample.py", "a/b", "--hub", "--prompt", "Hello", "--quiet", *QUICK)[0] == 0


def test_without_a_run_a_shipped_model_writes(call, home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for module in ("commands.cli", "weights.checkpoint"):
        monkeypatch.setattr(f"minillada.{module}.shipped", lambda name: home if name == "tales" else None)
    code, out, err = call("sample.py", "--prompt", "Hello", *QUICK)
    assert code == 0 and out.splitlines()[1].startswith("Hello")
    assert "no run under runs/ yet: this is the shipped model `tales`" in err.splitlines()[0]


def test_what_looks_like_a_run_is_never_asked_of_the_hub(monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *args, **more: pytest.fail("the hub is asked"))
    for name in ("runs/docs-tiny-1", "./a/b", "/a/b"):
        with pytest.raises(BadLuck, match="got neither"):
            minillada.load(name)


def test_a_mask_that_no_file_tells_can_be_given(call, tmp_path):
    shutil.copytree(GOLDEN / "llada_moe", tmp_path, dirs_exist_ok=True)
    refused(call("load_8b.py", tmp_path, "--check"), "mask_id: expected one")
    assert call("load_8b.py", tmp_path, "--check", "--mask-id", "255")[0] == 0
    write_tokenizer(tmp_path)
    assert call("load_8b.py", tmp_path, "--prompt", "a", "--quantize", "int4", *QUICK)[0] == 0


def test_without_a_tokenizer_there_is_no_answer(call):
    assert call("load_8b.py", GOLDEN / "llada_dense", "--check")[0] == 0
    refused(call("load_8b.py", GOLDEN / "llada_dense", "--prompt", "a"), "expected a tokenizer.json, got none")


def raises(error):
    raise error


@pytest.mark.parametrize(
    ("failure", "code", "line"),
    [
        (lambda: torch.empty(10**15), 2, "error: memory: expected enough, got "),
        (lambda: raises(MemoryError()), 2, "error: memory: expected enough, got "),
        (
            lambda: raises(FileNotFoundError(2, "No such file", "x")),
            2,
            "error: x: expected to use it, got No such file; ",
        ),
        (lambda: raises(BadInput("a\n b\x1b[2J: expected c")), 2, "error: a b␛[2J: expected c"),
        (lambda: raises(KeyboardInterrupt()), 130, ""),
    ],
    ids=["allocator", "memory", "system", "input", "Ctrl-C"],
)
def test_every_fault_has_its_exit_code(capsys, failure, code, line):
    with pytest.raises(SystemExit) as exit:
        run(failure)
    assert exit.value.code == code
    found = capsys.readouterr().err
    assert found.startswith(line) and found.count("\n") == bool(line)


def test_our_own_bugs_keep_their_traceback():
    with pytest.raises(RuntimeError, match="shape"):
        run(lambda: raises(RuntimeError("shape")))


# ---- sample.py ------------------------------------------------------------------------------------------------------


def test_a_text_with_holes_is_filled_and_the_rest_kept(call, home):
    code, out, _ = call("sample.py", home, "--fill", "a[MASK][MASK]b[MASK]", "--quiet", "--device", "cpu")
    assert code == 0 and out[0] == "a" and "b" in out
    code, out, _ = call("sample.py", home, "--fill", "a[MASK][MASK]b[MASK]", "--device", "cpu")
    assert code == 0 and out.startswith("--- step 1, 33% written\na") and "--- step 3, 100% written" in out


def test_a_span_is_written_anew_and_the_rest_kept(call, home):
    code, out, _ = call("sample.py", home, "--edit", "a[[bcd]]e", "--quiet", "--device", "cpu")
    assert code == 0 and out[0] == "a" and out.strip()[-1] == "e"
    code, out, _ = call("sample.py", home, "--edit", "a[[bcd]]e", "--device", "cpu")
    assert code == 0 and "--- step 3, 100% written" in out


@pytest.mark.parametrize("rule", ["--commit=klass", "--commit=entropy-bound", "--commit=threshold", "--revise=wino"])
def test_a_rule_that_goes_by_confidence_brings_the_order_it_needs(call, home, rule):
    code, out, err = call("sample.py", home, "--prompt", "a", rule, "--gen-len", "4", "--quiet", "--device", "cpu")
    assert (code, err) == (0, "") and out.startswith("a")


def test_both_scripts_chat_alike(call, home):
    typed = "Hello\nAnd you?\n"
    loaded = call("load_8b.py", home, "--chat", *QUICK, typed=typed)
    sampled = call("sample.py", home, "--chat", "--temperature", "0", *QUICK, typed=typed)
    assert loaded[:2] == sampled[:2]


def test_both_scripts_have_the_same_options(call, home):
    _, mine, _ = call("sample.py", "--help")
    _, theirs, _ = call("load_8b.py", "--help")
    options = {word.strip("[],") for word in mine.split() if word.startswith("--")} - {"--hub"}
    assert {"--prompt", "--fill", "--chat", "--prompts", "--steps", "--commit", "--cache", "--seed"} <= options
    assert all(option in theirs for option in options)


@pytest.mark.parametrize("script", ["sample.py", "load_8b.py", "train_tiny.py"])
def test_help_fits_a_terminal_and_its_examples_can_be_typed(call, monkeypatch, script):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = call(script, "--help")
    assert code == 0 and max(map(len, out.splitlines())) < 80
    main = runpy.run_path(str(ROOT / script))["main"]
    parse_args = Parser.parse_args
    parsed = []

    def parse(self):
        parsed.append(parse_args(self))
        raise SystemExit(0)

    monkeypatch.setattr(Parser, "parse_args", parse)
    for line in out.replace("\\\n", " ").split("examples:")[1].splitlines():
        if f"python {script}" in line:
            words = shlex.split(re.split(r"(?<=\S)  +(?![- ])", line.strip())[0])
            monkeypatch.setattr(sys, "argv", words[1:])
            with pytest.raises(SystemExit):
                main()
    assert len(parsed) >= 5


def test_one_line_sums_up_what_was_done_and_with_what(call, home, tmp_path):
    options = ["--temperature", "0.5", "--commit", "threshold:0.9", "--seed", "3", *QUICK]
    line = (
        rf"{re.escape(str(home))}: temperature 0.5, order low_confidence, windows of 16, commit threshold:0\.9; "
        r"\d+ evaluations, \d+\.\d s, [\d,]+ tokens/s; seed 3"
    )
    for script in ("sample.py", "load_8b.py"):
        assert re.fullmatch(line, call(script, home, "--prompt", "Hello", *options)[2].splitlines()[-1])
    (tmp_path / "lines.txt").write_text("One\nTwo\n")
    assert re.fullmatch(line, call("sample.py", home, "--prompts", tmp_path / "lines.txt", *options)[2].strip())


def test_a_chat_with_a_model_that_was_not_taught_says_how_to_teach_it(call, home):
    code, _, err = call("sample.py", home, "--chat", *QUICK, typed="Hello\n")
    assert code == 0 and err.count("\n") == 1
    assert f"train_tiny.py --sft DATA --from {home}" in err and "`questions`" in err


def test_the_shipped_model_answers_what_it_offers_to_be_asked_and_questions_that_follow(call):
    asked = make_task("questions", 0, n_test=3).test
    offered = guide_of(HOME / "questions")["examples"]["chat"]
    assert offered == [example.prompt for example in asked]
    for text, answer in zip(offered, ("striped", "ball", "at the edge of the village"), strict=True):
        assert call("sample.py", "questions", "--chat", typed=f"{text}\n")[:2] == (0, f"{answer}\n")
    code, out, _ = call("sample.py", "questions", "--chat", typed=f"{offered[0]}\nWhere did Kitty live?\n")
    assert (code, out.splitlines()) == (0, ["striped", "beside the lighthouse"])


@with_terminals
@pytest.mark.parametrize("script", ["sample.py", "load_8b.py", "train_tiny.py"])
def test_a_terminal_shows_something_before_torch_is_there(tmp_path, script):
    (tmp_path / "torch.py").write_text("raise SystemExit(7)")
    command = [sys.executable, ROOT / script]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    shown, code = seen_in_terminal(command, environment)
    assert (shown, code) == ("loading…\r", 7)
    piped = subprocess.run(command, env=environment, capture_output=True, timeout=60)
    assert (piped.stdout, piped.stderr, piped.returncode) == (b"", b"", 7)


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_alone_names_every_target():
    told = subprocess.run(["make", "-C", ROOT, f"PYTHON={sys.executable}"], capture_output=True, text=True).stdout
    (targets,) = re.findall(r"(?m)^\.PHONY: (.+)", (ROOT / "Makefile").read_text())
    assert re.findall(r"(?m)^make (\S+) +\S", told) == targets.split()


def test_control_characters_of_an_answer_never_reach_the_terminal(call, tmp_path):
    home = write_talker(tmp_path)
    table = json.loads((home / "tokenizer.json").read_text())
    for harmless, wild in (("L", "\x1b"), ("w", "\x9b")):  # what this model likes to say
        table["model"]["vocab"][wild] = table["model"]["vocab"].pop(harmless)
    (home / "tokenizer.json").write_text(json.dumps(table))
    code, out, err = call("load_8b.py", home, "--chat", *QUICK, typed="hi\nx\n")
    assert code == 0, err
    assert "␛" in out and not any(wild in out for wild in "\x1b\x9b")


def chats(turns, home, monkeypatch, capsys):
    """Resident pages after half of the turns and at the end."""
    pages, typed = [], iter(range(turns))

    def type_in(prompt):
        capsys.readouterr()
        if (turn := next(typed, None)) is None:
            raise EOFError
        if turn in (turns // 2, turns - 1):
            pages.append(int(Path("/proc/self/statm").read_text().split()[1]))
        return f"message {turn}"

    monkeypatch.setattr("builtins.input", type_in)
    monkeypatch.setattr(sys, "argv", ["load_8b.py", str(home), "--chat", "--gen-len", "8", "--device", "cpu"])
    runpy.run_path(str(ROOT / "load_8b.py"))["main"]()
    return pages


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("turns", [60, pytest.param(1000, marks=pytest.mark.soak)])
def test_a_long_chat_takes_no_more_memory_than_a_short_one(turns, home, monkeypatch, capsys):
    middle, end = chats(turns, home, monkeypatch, capsys)
    assert (end - middle) * os.sysconf("SC_PAGESIZE") < 8 << 20


# ---- from outside ---------------------------------------------------------------------------------------------------


@with_terminals
def test_a_person_chats_for_three_turns_in_a_terminal(home):
    with chat("load_8b.py", home, *QUICK) as say:
        for message in ("Hello", "How are you?", "Good"):
            shown = say(message)
            assert "░" in shown and "\x1b[J" in shown, "the masks resolve before one's eyes"
            assert "░" not in last_picture(shown)


def script(*command, **options):
    return subprocess.run([sys.executable, *map(str, command)], capture_output=True, cwd=ROOT, timeout=120, **options)


def test_a_real_process_exits_with_2_and_one_line(tmp_path):
    done = script("load_8b.py", tmp_path, "--check")
    assert done.returncode == 2
    assert done.stdout == b"" and done.stderr.startswith(b"error: ") and done.stderr.count(b"\n") == 1


def test_a_real_process_survives_bytes_that_are_no_text(home):
    done = script("sample.py", home, "--chat", *QUICK, input=b"\xff\xfe\nHi\n")
    assert done.returncode == 0
    assert done.stderr.count(b"error: ") == 1 and b"surrogate" in done.stderr
    assert done.stdout


# ---- what a run leaves to look at ------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["sample.py", "load_8b.py"])
def test_a_run_is_written_as_a_page_and_as_an_animation(call, home, tmp_path, script):
    page, animation = tmp_path / "a.html", tmp_path / "a.svg"
    files = ["--html", page, "--svg", animation]
    plain = call(script, home, "--prompt", "Hello", "--quiet", *QUICK)
    code, out, _ = call(script, home, "--prompt", "Hello", "--quiet", *files, *QUICK)
    assert (code, out) == (0, plain[1])
    assert '"steps":16' in page.read_text(encoding="utf-8") and animation.read_text(encoding="utf-8").startswith("<svg")
    refused(call(script, home, "--prompt", "Hello", "--quiet", *files, *QUICK), "html: expected a new file")


def test_a_file_to_write_is_refused_before_a_model_is_looked_for(call, tmp_path):
    (tmp_path / "a.html").write_text("mine")
    refused(call("sample.py", "no such model", "--html", tmp_path / "a.html"), "html: expected a new file")
    refused(call("sample.py", "no such model", "--svg", tmp_path / "none" / "a.svg"), "svg: expected a directory")
    for options in (["--chat"], ["--prompts", tmp_path / "a.html"]):
        refused(call("sample.py", "no such model", "--svg", tmp_path / "a.svg", *options), "svg: expected one answer")
    refused(call("load_8b.py", "no such model", "--check", "--svg", tmp_path / "a.svg"), "svg: expected one answer")
    assert [file.name for file in tmp_path.iterdir()] == ["a.html"]


def test_steps_are_held_only_where_one_can_see_them(call, home):
    start = time.monotonic()
    assert call("sample.py", home, "--prompt", "Hello", "--watch", "60", *QUICK)[0] == 0
    assert time.monotonic() - start < 60
    refused(call("sample.py", home, "--prompt", "Hello", "--watch", "--quiet"), "watch: expected no --quiet")
    refused(call("sample.py", home, "--prompt", "Hello", "--watch", "nan"), "watch: expected a finite number")


@pytest.mark.parametrize("able", [{"amx_bf16": True}, {}])
def test_a_run_of_ours_is_decoded_in_bfloat16_where_a_cpu_has_instructions_for_it(able, call, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    ask = lambda *more: call("sample.py", "sudoku4", "--prompt", "2.14..3.342..24.=", "--gen-len", "4", *more)[2]
    assert (", in bfloat16; " in ask()) == bool(able) and ", in bfloat16; " not in ask("--dtype", "float32")
    for directory in (HOME / "tales", tmp_path / "checkpoints/step-1", tmp_path / "model"):
        (tmp_path / "run.json").touch()
        own = directory != tmp_path / "model"
        assert quick_dtype(directory, "cpu") == (torch.bfloat16 if able and own else None)
        assert quick_dtype(directory, "cuda") is None
