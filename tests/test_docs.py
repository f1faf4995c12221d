"""What README and docs promise: links lead somewhere, and the code shown is the code of plain.py."""

import re
import runpy
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy, one_hot

from minillada.plain import Plain, bound, generate

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_to_a_file_or_a_heading_leads_there(page):
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    for link in links:
        if "://" in link:
            continue
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_the_readme_has_fewer_than_150_lines():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 150


def shown(number: int, path: Path) -> dict:
    """The functions of a Python block of the README: 0 is GPT's, 1 LLaDA's."""
    blocks = re.findall(r"```python\n(def loss.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    (path / "shown.py").write_text(blocks[number], encoding="utf-8")

    def nats(logits, x):
        return cross_entropy(logits.mT, x, reduction="none")

    return runpy.run_path(str(path / "shown.py"), {"torch": torch, "nats": nats, "M": 10})


def test_the_readme_shows_the_loss_and_the_sampler_of_plain(tmp_path):
    code = shown(1, tmp_path)
    torch.manual_seed(0)
    model = Plain(vocab_size=11, mask_id=10, n_layer=1)
    torch.nn.init.normal_(model.head.weight).data[10] = 0  # nobody draws [MASK]: the README has no ban
    x0, t = torch.randint(10, (4, 12)), torch.tensor([0.2, 0.5, 0.7, 1.0])
    torch.manual_seed(1)
    loss = code["loss"](model, x0, t[:, None])
    assert torch.allclose(loss, bound(model, x0, t, torch.Generator().manual_seed(1)))
    canvas = x0.index_fill(1, torch.arange(3, 12), 10)
    with torch.no_grad():
        *_, x = generate(model, canvas, block_len=9, steps=4)
        assert torch.equal(code["write"](model, canvas, steps=4), x)
    assert (x != 10).all()


def test_the_gpt_of_the_readme_predicts_the_next_token_and_writes_from_left_to_right(tmp_path):
    code = shown(0, tmp_path)
    counter = lambda x: 9.0 * one_hot(x + 1, 11)  # sure that one more comes next
    assert code["write"](counter, torch.tensor([[3]]), steps=4).tolist() == [[3, 4, 5, 6, 7]]
    assert (
        code["loss"](counter, torch.tensor([[3, 4, 5]])) < 0.01 < 8 < code["loss"](counter, torch.tensor([[3, 5, 3]]))
    )
