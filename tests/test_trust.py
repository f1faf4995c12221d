"""What attacks on the program found, one test for each: docs/trust.md says which. Others stand with their subject."""

import importlib.util
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
import torch
from browser import free_port
from oracles import GOLDEN
from talkers import write_talker, write_template
from test_train import QUICK

import minillada
from minillada.commands import app, cli
from minillada.commands.cli import run
from minillada.decoding.scores import negative_entropy
from minillada.errors import BadInput, BadLuck, in_a_line
from minillada.files import checkpoints_of, newest_checkpoint
from minillada.sampler import SampleConfig
from minillada.text.chat import ChatTemplate
from minillada.text.corpora import make_tokenizer, read_text
from minillada.training.run import train
from minillada.weights import checkpoint

ROOT = Path(__file__).parents[1]
posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals and shells")


def outcome(capsys, monkeypatch, script: str, *options: object) -> tuple[int, str, str]:
    """Run a script in this process: its exit code, standard output and standard error."""
    monkeypatch.setattr(sys, "argv", [script, *map(str, options)])
    code = 0
    try:
        run(runpy.run_path(str(ROOT / script))["main"])
    except SystemExit as end:
        code = end.code
    found = capsys.readouterr()
    return code, found.out, found.err


# ---- Configs that transformers saves again --------------------------------------------------------------------------

SAVED = {  # what transformers 4.48.3 and 5.0.0 make of LLaDA2's config.json, as a class with its own fields saves it
    "4.48": {"sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 28},
    "5.0": {"rope_scaling": ..., "rope_theta": ..., "partial_rotary_factor": ...,
            "rope_parameters": {"rope_theta": 600000, "partial_rotary_factor": 0.5, "rope_type": "default"}},
    "5.0, filled in": {"rope_scaling": ..., "rope_parameters": {"rope_theta": 10000.0, "partial_rotary_factor": 0.5,
                       "rope_type": "default"}},
    "a list of ends": {"eos_token_id": [254, 253]},
    "private": {"_attn_implementation_autoset": True, "_attn_implementation": "sdpa"},
    "layers of one type": {"layer_types": 3 * ["full_attention"]},
    "no router_dtype": {"router_dtype": ...},
    "off": {"use_nonsense": False, "prefix": None, "pruned_heads": {}, "word": [], "rope_scaling": {"type": "default"}},
    "usual": {"return_dict": True, "top_k": 50, "id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "min_length": 0},
}  # fmt: skip


def llada2(home: Path, **changes: object) -> Path:
    shutil.copytree(GOLDEN / "llada2_moe", home)
    raw = json.loads((home / "config.json").read_text()) | changes
    (home / "config.json").write_text(json.dumps({key: value for key, value in raw.items() if value is not ...}))
    return home


@pytest.mark.filterwarnings("ignore:config.json. ignored")
@pytest.mark.parametrize("changes", SAVED.values(), ids=SAVED)
def test_a_fine_tune_that_transformers_saved_again_is_the_same_model(tmp_path, changes):
    config = checkpoint.check(llada2(tmp_path / "again", **changes), mask_id=255).config
    assert config == checkpoint.check(GOLDEN / "llada2_moe", mask_id=255).config


@pytest.mark.parametrize(
    "changes",
    [
        {"sliding_window": 4096, "use_sliding_window": True},
        {"sliding_window": 4096},
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}},
        {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
        {"attn_temperature": 0.5},
        {"attn_window": 0},
        {"top_k": 5},
        {"router_dtype": "bf16"},
    ],
    ids=lambda changes: " ".join(changes),
)
def test_a_key_that_could_change_the_arithmetic_is_refused_by_name(tmp_path, changes):
    with pytest.raises(BadInput) as told:
        checkpoint.check(llada2(tmp_path / "other", **changes), mask_id=255)
    assert any(key in str(told.value) for key in (*changes, "rope_theta")) and "\n" not in str(told.value)


def test_ignored_keys_are_named_once_and_harmful_ones_if_they_are_allowed(tmp_path):
    with pytest.warns(UserWarning, match=r"^config.json: ignored use_nonsense, return_dict$"):
        checkpoint.check(llada2(tmp_path / "a", use_nonsense=False, return_dict=True), mask_id=255)
    home = llada2(tmp_path / "b", attn_temperature=0.5)
    with pytest.raises(BadInput, match=r"got 'attn_temperature'; .* or add --allow-unknown-keys"):
        checkpoint.load(home, mask_id=255)
    with pytest.warns(UserWarning, match=r"^config.json: ignored attn_temperature$"):
        checkpoint.load(home, mask_id=255, allow_unknown_keys=True)


def test_a_script_names_ignored_keys_in_one_line(tmp_path, monkeypatch, capsys):
    home = write_talker(tmp_path)
    edit(home / "config.json", return_dict=True)
    options = ["--prompt", "a", "--quiet", "--gen-len", 2, "--device", "cpu"]
    code, _, err = outcome(capsys, monkeypatch, "load_8b.py", home, *options)
    assert code == 0 and err.count("return_dict") == 1 and "\nwarning: config.json: ignored return_dict\n" in "\n" + err


def test_an_answer_ends_at_every_id_that_the_config_lists(tmp_path):
    home = write_talker(tmp_path)
    raw = json.loads((home / "config.json").read_text()) | {"eos_token_id": [254, 65]}
    (home / "config.json").write_text(json.dumps(raw))
    assert minillada.load(home)[0].config.eos_id == 254 and 65 in ChatTemplate.load(home).stop_ids


# ---- Durability -----------------------------------------------------------------------------------------------------


def begun(directory: Path, steps: int = 2, **more: object) -> Path:
    """A run that was stopped after so many steps."""
    stops = iter([False] * (steps - 1) + [True])
    list(train(minillada.TrainConfig(**QUICK | more, out=str(directory)), stop=lambda: next(stops)))
    return directory


def snapshot(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def edit(file: Path, **changes: object) -> None:
    document = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in document.items() if value is not ...}))


def edit_state(directory: Path, **changes: object) -> None:
    """Change state.json as a program would: with a manifest that fits."""
    newest = checkpoints_of(directory)[-1]
    edit(newest / "state.json", **changes)
    minillada.files.write_manifest(newest)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    return begun(tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture
def mine(stopped, tmp_path):
    """A copy of that run, ours to break, with a log that goes on after its checkpoint."""
    home = Path(shutil.copytree(stopped, tmp_path / "run"))
    with open(home / "log.jsonl", "a") as log:
        log.write('{"step": 3, "loss": 1.0}\n{"step"')
    return home


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"batch_size": 2}, "got an edited one; undo the change of batch_size, or allow it by name, as --batch-size"),
        ({"lr": 0.5, "seed": 7}, "undo the change of lr, seed, or allow it by name"),
        ({"wings": 2}, "got one more or less, 'wings'"),
        ({"version": 3}, "expected version 2 .* got version 3"),
        ({"objective": []}, "expected version 2 and an objective"),
        ({"lr": "fast"}, "expected lr to be float | None, got 'fast'"),
        ({"steps": True}, "expected steps to be int | None, got True"),
        ({"data": 5}, "expected data to be str | tuple"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_a_run_json_of_other_values_is_refused_and_nothing_changes(mine, change, said):
    edit(mine / "run.json", **change)
    before = snapshot(mine)
    with pytest.raises(BadInput, match=rf"^run.json: .*{said}") as told:
        next(train(resume=mine))
    assert "\n" not in str(told.value) and snapshot(mine) == before


@pytest.mark.parametrize(
    "change",
    [{"base": ...}, {"rng.python": ...}, {"step": "3"}, {"version": 3}, {"rates": ...}, {"rng.python": [3, "x", None]},
     {"rng.numpy": []}, {"rates": [1.0]}],
    ids=lambda change: " ".join(f"{k} {v}" for k, v in change.items()),
)  # fmt: skip
def test_a_state_of_another_version_costs_one_line_and_changes_nothing(mine, change):
    edit_state(mine, **change)
    before = snapshot(mine)
    with pytest.raises(BadInput, match=r": expected .*, got .*; ") as told:
        next(train(resume=mine))
    assert "\n" not in str(told.value) and snapshot(mine) == before


def test_a_refused_resume_changes_nothing_and_an_accepted_one_cuts_the_log(mine, tmp_path):
    (mine / "checkpoints" / ".step-00000009.1.tmp").mkdir()
    (tmp_path / "aside").mkdir()
    before = snapshot(mine)
    for refused in ({"beta": 1.0}, {"preset": "small"}, {"lr": -1.0}, {"data": str(tmp_path / "none")}):
        with pytest.raises((BadInput, BadLuck)):
            next(train(resume=mine, **refused))
        assert snapshot(mine) == before and (mine / "checkpoints" / ".step-00000009.1.tmp").exists()
    next(train(resume=mine))
    steps = [json.loads(line)["step"] for line in (mine / "log.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3] and not (mine / "checkpoints" / ".step-00000009.1.tmp").exists()


def test_a_field_may_differ_if_it_is_named(mine):
    edit(mine / "run.json", lr=0.5, batch_size=2)
    step = next(train(resume=mine, lr=0.25, batch_size=2))
    assert (step.config.lr, step.config.batch_size, step.step) == (0.25, 2, 3) and step.lr <= 0.25


def test_a_run_goes_on_beyond_its_steps_when_more_are_asked_for(mine):
    assert [step.step for step in train(resume=mine, steps=4)] == [3, 4]


def test_options_beside_resume_are_not_passed_over_in_silence(mine, monkeypatch, capsys):
    code, _, err = outcome(capsys, monkeypatch, "train_tiny.py", "--resume", mine, "--preset", "small")
    assert code == 2 and "resume: expected no other preset than the run began with, got 'small'" in err
    code, out, _ = outcome(capsys, monkeypatch, "train_tiny.py", "--resume", mine, "--steps", 3)
    assert code == 0 and "after 3 steps" in out


def test_a_reader_takes_the_next_checkpoint_when_its_own_is_dropped(tmp_path, monkeypatch):
    home, load, loads = begun(tmp_path / "run", 1, keep=1), checkpoint.load_directory, []

    def meanwhile(directory, *rest):
        loads.append(directory)
        if len(loads) == 1:  # training goes on, and drops what was just found
            list(train(resume=home, steps=2))
        return load(directory, *rest)

    monkeypatch.setattr(checkpoint, "load_directory", meanwhile)
    minillada.load(home)
    names = [path.name for path in loads]
    assert (names[0], names[-1], loads[0].exists()) == ("step-00000001", "step-00000002", False)


def test_a_checkpoint_that_goes_while_it_is_verified_is_not_called_damaged(tmp_path, monkeypatch):
    home, verify, seen = begun(tmp_path / "run", 1), minillada.files.verify_manifest, []

    def meanwhile(directory, *rest):
        seen.append(directory)
        if len(seen) == 1:
            os.rename(directory, directory.with_name("step-00000002"))
        return verify(directory, *rest)

    monkeypatch.setattr(minillada.files, "verify_manifest", meanwhile)
    newest, damaged = newest_checkpoint(home)
    assert newest.name == "step-00000002" and not damaged


@pytest.mark.parametrize("vocabulary", [3, 100, 4099])
def test_an_entropy_does_not_depend_on_the_rows_beside_it(vocabulary):
    logits = 1e-3 * torch.randn(33, vocabulary, generator=torch.Generator().manual_seed(0))  # nearly uniform
    rng, none = torch.Generator(), torch.zeros(33, dtype=torch.long)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        whole = negative_entropy(logits, none, rng)
        for n in (1, 2, 7):
            parts = torch.cat([negative_entropy(part, none, rng) for part in logits.split(n)])
            assert torch.equal(parts, whole), n
    torch.set_num_threads(1)
    exact = (logits.double().softmax(-1) * logits.double().log_softmax(-1)).sum(-1)
    assert torch.equal(whole.argsort(), exact.argsort())


def test_of_equal_entropies_the_leftmost_is_first():
    from minillada.strategies import surest

    score = negative_entropy(torch.zeros(4, 50), torch.zeros(4, dtype=torch.long), torch.Generator())
    assert surest(score[None], torch.tensor([2])).tolist() == [[True, True, False, False]]


@pytest.mark.parametrize("source", ["", Path(""), [], [""], ["docs", ""]], ids=repr)
def test_an_empty_name_is_no_corpus(source, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("the current directory")
    if source == Path(""):
        pytest.skip("that is `.`, which was asked for")
    with pytest.raises(BadInput, match=r"^data: expected "):
        list(read_text(source))


def test_two_outputs_never_share_a_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, out, err = outcome(capsys, monkeypatch, "sample.py", "tales", "--html", "x", "--svg", tmp_path / "x")
    assert (code, out) == (2, "") and err.startswith("error: svg: expected another file than that of html, got ")
    assert not list(tmp_path.iterdir())


def test_steps_without_end_are_refused():
    for field, value in (("steps", 8 * 10**12), ("gen_len", 10**15), ("block_len", 10**15)):
        with pytest.raises(BadInput, match=rf"^{field}: expected a whole number from 1 to "):
            SampleConfig(commit="ancestral", temperature=1.0, **{field: value})


def test_a_notebook_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    execute = pytest.importorskip("execute")
    nbformat = pytest.importorskip("nbformat")
    path = tmp_path / "a.ipynb"
    path.write_text("before")
    monkeypatch.setattr(execute, "execute", lambda *args, **more: nbformat.v4.new_notebook())
    monkeypatch.setattr(sys, "argv", ["execute.py", str(path)])
    real = os.replace

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(BadLuck, match="No space left"):
        execute.main()
    assert path.read_text() == "before" and len(list(tmp_path.iterdir())) == 1
    monkeypatch.setattr(os, "replace", real)
    execute.main()
    assert json.loads(path.read_text())["nbformat"] == 4 and path.read_bytes().endswith(b"}\n")


# ---- The form of what is said ---------------------------------------------------------------------------------------


def test_every_message_is_one_line_that_a_terminal_shows_as_it_is():
    for kind in (BadInput, BadLuck):
        assert str(kind("a: expected b,\n  got \x1b[31mc\x9b\r\t; d")) == "a: expected b, got ␛[31mc�␍ ; d"
    assert in_a_line("  a\n\n b ") == "  a b "


def test_what_a_template_raises_is_one_line(tmp_path):
    home = write_template(write_talker(tmp_path), "{{ raise_exception('no\\nway\\x1b[2J') }}")
    with pytest.raises(BadInput, match="TemplateError: no way␛") as told:
        ChatTemplate.load(home).encode_chat([{"role": "user", "content": "Hi"}])
    assert "\n" not in str(told.value) and "\x1b" not in str(told.value)


def test_a_path_that_leads_away_is_named_with_what_it_is(tmp_path):
    with pytest.raises(BadInput, match=r"expected the plain name of a file in this directory, got a path; name it"):
        minillada.files.confined(tmp_path, "../x")


@pytest.mark.parametrize("size", ["9" * 30, "5²", "٣٠٠", "-5", "1e3", "", "5", "99999999"])
def test_a_vocabulary_of_no_sensible_size_costs_one_line(size):
    with pytest.raises(BadInput, match=r"^(tokenizer|vocab_size): expected .*, got "):
        make_tokenizer(f"bpe:{size}", "tales")


@pytest.mark.parametrize(
    ("script", "options", "line"),
    [
        (
            "train_tiny.py",
            ["--sft", "F", "--from", ""],
            "error: model: expected a model that is here (runs/docs-tiny-1, ",
        ),
        (
            "train_tiny.py",
            ["--data", ""],
            "shakespeare or a path, got an empty name; ",
        ),
        ("train_tiny.py", ["--data", "tale"], "did you mean tales?"),
        ("train_tiny.py", ["--preset", "tinny"], "did you mean tiny?"),
        ("train_tiny.py", ["--tokenizer", "character"], "did you mean characters?"),
        ("train_tiny.py", ["--batchsize", "3"], "did you mean --batch-size?"),
        ("train_tiny.py", ["--log", "tensorbord"], "did you mean tensorboard?"),
        ("sample.py", ["tale"], "(tales, "),
        ("sample.py", ["tales", "--commit", "anc"], "error: commit: expected one of "),
        ("sample.py", ["tales", "--revise", "whino"], "did you mean wino?"),
        ("sample.py", ["tales", "--prompts", "\x1b[31m\nx"], "error: ␛[31m x: expected a file"),
        ("sample.py", ["runs/docs-tiny-l"], "(runs/docs-tiny-1, "),
    ],
    ids=lambda value: " ".join(value)[:30].encode("unicode_escape").decode() if isinstance(value, list) else "",
)
def test_a_slip_costs_one_line_with_what_was_meant(script, options, line, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("minillada.weights.hub.fetch", lambda *args, **more: pytest.fail("the hub is asked"))
    (tmp_path / "runs" / "docs-tiny-1" / "checkpoints").mkdir(parents=True)
    (tmp_path / "runs" / "docs-tiny-1" / "run.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    code, _, err = outcome(capsys, monkeypatch, script, *options)
    assert code == 2 and err.count("\n") == 1 and err.startswith("error: ") and line in err


def test_an_unknown_task_is_asked_back(monkeypatch, capsys, tmp_path):
    from minillada.commands import tasks

    monkeypatch.setattr(sys, "argv", ["tasks", "adition", "--out", str(tmp_path / "x")])
    with pytest.raises(BadInput, match=r"did you mean addition\?"):
        tasks.main()


def test_the_name_of_a_directory_obeys_no_terminal(tmp_path, monkeypatch, capsys):
    name = tmp_path / "\x1b[31m"
    options = ["--data", "tales", "--preset", "nano", "--steps", 1, "--batch-size", 2, "--length", 16]
    code, out, err = outcome(capsys, monkeypatch, "train_tiny.py", *options, "--tokenizer", "bytes", "--out", name)
    assert code == 0 and name.is_dir() and "\x1b" not in out + err and "␛[31m" in out


def test_an_error_stands_alone_where_nobody_watches(tmp_path, monkeypatch, capsys):
    home = write_talker(tmp_path / "Base")
    (home / "generation_config.json").write_text("[]")  # found after the weights are loaded
    code, _, err = outcome(capsys, monkeypatch, "load_8b.py", home, "--prompt", "a")
    assert code == 2 and "\r" not in err and "loading" not in err and err.splitlines()[-1].startswith("error: ")


def test_a_warning_is_one_line_too(capsys):
    import warnings

    def main():
        warnings.warn("a\nb\x1b", stacklevel=1)

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        run(main)
    assert capsys.readouterr().err == "warning: a b␛\n"


# ---- What is closed or interrupted ----------------------------------------------------------------------------------


@pytest.mark.parametrize("closed", ["stdout", "stderr", "stdin"])
def test_a_closed_stream_is_no_bug(closed, monkeypatch, capsys):
    monkeypatch.setattr(sys, closed, None)  # as Python does for `>&-`
    run(lambda: (cli.say("a"), cli.tell("b"), closed != "stdin" or sys.stdin.read()))
    assert capsys.readouterr() == ("" if closed == "stdout" else "a\n", "" if closed == "stderr" else "b\n")


@posix
def test_a_script_whose_output_is_closed_ends_in_peace(tmp_path):
    command = f"{sys.executable} sample.py tales --prompt a --gen-len 2 >&- 2>{tmp_path / 'err'}"
    done = subprocess.run(["sh", "-c", command], cwd=ROOT, timeout=100)
    assert done.returncode == 0 and "Traceback" not in (tmp_path / "err").read_text()


@posix
@pytest.mark.parametrize("how", [["sample.py", "tales"], ["-m", "minillada", "play"]], ids=" ".join)
def test_ctrl_c_while_modules_are_imported_leaves_no_traceback(how, tmp_path):
    slow = tmp_path / "torch.py"  # in place of PyTorch, whose import takes seconds
    slow.write_text(f"import time\nopen({str(tmp_path / 'begun')!r}, 'w').close()\ntime.sleep(30)\n")
    path = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    child = subprocess.Popen([sys.executable, *how], stderr=subprocess.PIPE, cwd=ROOT, env=path, text=True)
    while not (tmp_path / "begun").exists():
        time.sleep(0.02)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=20)
    assert (child.returncode, err) == (130, "")


# ---- The app --------------------------------------------------------------------------------------------------------

needs_gradio = pytest.mark.skipif(
    not importlib.util.find_spec("gradio"), reason="Gradio is not installed (extra `app`)"
)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    home = write_talker(tmp_path_factory.mktemp("app") / "writer")
    get = app.models("cpu", False)
    page = app.build(lambda name: get(str(home)), ["writer"])
    app.launch(page, "127.0.0.1", free_port())
    yield page
    page.close()


def asked(page, path: str, data: bytes | None = None, kind: str = "application/json") -> tuple[int, bytes]:
    try:
        with urlopen(Request(page.local_url + path, data, {"Content-Type": kind}), timeout=20) as answer:
            return answer.status, answer.read(200_000)
    except HTTPError as error:
        return error.code, error.read()


@needs_gradio
def test_the_app_takes_no_files_and_tells_nothing_about_itself(page):
    form = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a"\r\n\r\nx\r\n--x--\r\n'
    for path in ("gradio_api/upload", "gradio_api/upload/", "gradio_api/upload?upload_id=1", "upload"):
        assert asked(page, path, form, "multipart/form-data; boundary=x")[0] in (404, 405), path
    for path in ("gradio_api/info", "gradio_api/info/", "gradio_api/openapi.json", "gradio_api/file=/etc/passwd",
                 "gradio_api/proxy=http://127.0.0.1", "gradio_api/upload_progress?upload_id=1", "info",
                 "gradio_api//info", "gradio_api/queue/../info"):  # fmt: skip
        code, body = asked(page, path)
        assert code == 404 or (b"named_endpoints" not in body and b"root:" not in body), path
    assert asked(page, "")[0] == 200


def said(page, session: str, function: int, data: list) -> str:
    """Send what a page would, and return all that comes back."""
    body = json.dumps({"data": data, "fn_index": function, "session_hash": session, "trigger_id": None}).encode()
    code, answer = asked(page, "gradio_api/queue/join?", body)
    return asked(page, f"gradio_api/queue/data?session_hash={session}")[1].decode() if code == 200 else answer.decode()


@needs_gradio
def test_requests_that_no_page_sends_leave_no_traceback(page, capfd):
    made = said(page, "s", 0, ["writer"])  # what the choice of a model makes, and which functions it has
    lines = [json.loads(line.removeprefix("data: ")) for line in made.splitlines() if line.startswith("data: ")]
    (config,) = [line["output"]["render_config"] for line in lines if line["msg"] == "process_completed"]
    assert len(config["dependencies"]) > 10
    for data in ([], [5], ["nobody"]):
        said(page, "s", 0, data)
    for one in config["dependencies"]:
        if one["backend_fn"] and one["inputs"]:
            for data in ([], [None] * len(one["inputs"]), [{"a": 1}] * len(one["inputs"])):
                said(page, "s", one["id"], data)
    err = capfd.readouterr().err
    assert "Traceback" not in err, err


@needs_gradio
def test_null_in_place_of_a_text_is_told(monkeypatch):
    import gradio as gr

    told = []
    monkeypatch.setattr(gr, "Error", lambda line, **more: told.append(line) or ValueError(line))
    listened = []
    events = type("Event", (), {"then": lambda self, work, *rest, **more: listened.append(work)})
    button = type("Button", (), {"click": lambda self, work, *rest, **more: listened.append(work) or events()})()
    box = type("Box", (), {"submit": button.click})()
    app.connect((box, button, button, button), lambda: None, lambda *values: iter([values]), [], [])
    guarded = next(work for work in listened if getattr(work, "__name__", "") == "guarded")
    with pytest.raises(ValueError, match="text: expected a text, got None; write one"):
        next(guarded(None))


@posix
@needs_gradio
def test_ctrl_c_ends_the_app_while_it_computes(tmp_path):
    home, port = write_talker(tmp_path / "writer"), free_port()
    program = (
        "import sys, threading, torch; from minillada.commands import app; from minillada.commands.cli import run\n"
        "def compute():\n    x = torch.randn(700, 700)\n    while True: x = (x @ x).clamp(-1, 1)\n"
        "real = app.launch\n"
        "def launch(*a, **k):\n    real(*a, **k); threading.Thread(target=compute).start(); print('up', flush=True)\n"
        "app.launch = launch\nrun(app.main)"
    )
    command = [sys.executable, "-c", program, str(home), "--port", str(port), "--device", "cpu"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        while child.stdout.readline().strip() != "up":
            assert child.poll() is None, child.stderr.read()
        time.sleep(0.5)
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=20)
        assert (child.returncode, "Traceback" in err) == (130, False), err
    finally:
        child.kill()
