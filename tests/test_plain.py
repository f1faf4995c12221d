"""plain.py is the ladder's first rung: the course's files compute what it computes, and it needs nothing of ours."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from oracles import tiny_model
from torch import Generator

from minillada import Canvas, SampleConfig, plain, stream
from minillada.diffusion import bernoulli, pretraining_loss
from minillada.model import LLaDA

SOURCE = Path(plain.__file__)


def pair(**fields) -> tuple[LLaDA, plain.Plain]:
    """A random LLaDA, and Plain with its weights."""
    model = tiny_model(n_layer=3, rope_theta=100.0, **fields)
    c = model.config
    copy = plain.Plain(c.vocab_size, c.mask_id, c.n_layer, c.n_head, c.d_model, c.d_ff, c.rope_theta)
    copy.load_state_dict(model.state_dict())  # the names are the same
    return model, copy


def rows(*shape: int) -> torch.Tensor:
    return torch.randint(13, shape, generator=Generator().manual_seed(0))


def filled(model: plain.Plain, x: torch.Tensor, *options) -> list[torch.Tensor]:
    return list(plain.generate(model, x, *options))


def test_the_same_weights_give_the_same_logits():
    model, copy = pair()
    x = rows(2, 40)
    with torch.no_grad():
        assert torch.allclose(copy(x), model(x), atol=1e-5)
        assert model(x).std() > 1  # logits that differ enough for the comparison to mean something


def test_the_same_random_numbers_hide_the_same_tokens():
    x0, t = rows(4, 40), torch.tensor([0.001, 0.3, 0.7, 1.0])
    xt, masked = plain.mask(x0, t, 15, Generator().manual_seed(1))
    noised = bernoulli(x0, 15, t, Generator().manual_seed(1))
    assert torch.equal(xt, noised.xt) and torch.equal(masked, noised.masked)
    assert masked[3].all() and masked[1].sum() < masked[2].sum()


def test_the_same_masks_give_the_same_loss_and_gradients():
    model, copy = pair()
    x0, t = rows(4, 40), torch.tensor([0.1, 0.3, 0.7, 1.0])
    loss = plain.bound(copy, x0, t, Generator().manual_seed(1))
    expected = pretraining_loss(model, x0, bernoulli(x0, 15, t, Generator().manual_seed(1)))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    expected.backward()
    theirs = dict(model.named_parameters())
    for name, p in copy.named_parameters():
        assert torch.allclose(p.grad, theirs[name].grad, rtol=1e-4, atol=1e-4 * theirs[name].grad.abs().max()), name


@pytest.mark.parametrize(("block_len", "steps"), [(8, 32), (8, 12), (16, 6), (32, 1), (32, 32)])
def test_every_step_writes_the_same_tokens_as_the_sampler(block_len, steps):
    model, copy = pair()
    x = torch.cat([rows(3, 7), torch.full((3, 32), 15)], dim=1)
    config = SampleConfig(gen_len=32, steps=steps, block_len=block_len, stop_at_eos=False)
    expected = [step.x for step in stream(model, Canvas(x, torch.ones_like(x, dtype=torch.bool)), config)]
    found = filled(copy, x, block_len, steps)
    assert len(found) == steps
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not (found[-1] == 15).any() and torch.equal(found[-1][:, :7], x[:, :7])


def test_a_temperature_draws_from_the_softmax():
    _, copy = pair()
    x = torch.full((4000, 1), 15)
    (drawn,) = filled(copy, x, 1, 1, 2.0, Generator().manual_seed(0))
    with torch.no_grad():
        expected = (copy(x[:1])[0, 0, :15] / 2.0).softmax(-1)  # [MASK], the last id, is never written
    found = drawn.flatten().bincount(minlength=15) / len(x)
    assert (found - expected).abs().max() < 4 * (0.25 / len(x)) ** 0.5
    assert torch.equal(drawn, filled(copy, x, 1, 1, 2.0, Generator().manual_seed(0))[0])


def test_training_lowers_the_loss():
    torch.manual_seed(0)
    model, text = plain.Plain(4, 3, n_layer=1, n_head=2, d_model=16, d_ff=32), torch.arange(300) % 3
    losses = list(plain.learn(model, text, (16, 12), 120, Generator().manual_seed(0)))
    assert len(losses) == 120
    assert sum(losses[-20:]) < 0.7 * sum(losses[:20])


def test_it_imports_torch_and_the_standard_library_alone():
    names = set()
    for node in ast.walk(ast.parse(SOURCE.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            names.add(node.module.split(".")[0])
    assert names - sys.stdlib_module_names == {"torch"}


def test_it_is_short():
    assert len(SOURCE.read_text(encoding="utf-8").splitlines()) < 120


def test_it_trains_on_a_file_and_writes_with_the_characters_of_it(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("to be or not to be\x1b, " * 60, encoding="utf-8")
    command = [sys.executable, "-m", "minillada.plain", file, "--steps", "3"]
    result = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=120)
    assert result.returncode == 0, result.stderr
    first, written = result.stdout.split("\n", 1)
    passages = written.split("-----")
    assert re.fullmatch(r"step 3: at most \d+\.\d+ nats per unseen character", first)
    assert len(passages) == 3
    assert set("".join(passages)) <= set("to be or not to be, \n")  # and no control character


@pytest.mark.parametrize(
    ("content", "steps", "got"),
    [
        (None, 1, "got 'No such file or directory'; name another file"),
        (b"\xff\xfe" * 1000, 1, "got 'invalid start byte'; name another file"),
        (b"to be", 1, "expected 640 characters and 1 step, got 5 and 1; name a longer text or more steps"),
        (b"to be " * 300, 0, "expected 640 characters and 1 step, got 1800 and 0; name a longer text or more steps"),
        (b"to be " * 300, "x", "invalid int value: 'x'"),
    ],
)
def test_bad_input_gets_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, content, steps, got):
    file = tmp_path / "text.txt"
    if content is not None:
        file.write_bytes(content)
    monkeypatch.setattr(sys, "argv", ["plain.py", str(file), "--steps", str(steps)])
    with pytest.raises(SystemExit) as stop:
        plain.main()
    out, err = capsys.readouterr()
    assert (stop.value.code, out) == (2, "")
    assert re.fullmatch(r".*error: .*\n", err) and got in err
