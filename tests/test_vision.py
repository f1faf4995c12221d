"""LLaDA-V: what it sees, and that a picture is a list of ids like any text. The oracle is the official code."""

import io
import json
import random
import runpy
import shutil
import sys
import time
from argparse import Namespace
from dataclasses import replace

import pytest
import tokenizers
import torch
from oracles import GOLDEN, tiny_model
from safetensors.torch import load_file
from talkers import SPECIAL, ids, write_template, write_tokenizer
from tokenizers import decoders, models, pre_tokenizers

import minillada
from minillada import BadInput, BadLuck, SampleConfig, SFTConfig
from minillada.commands.ask import SYSTEM, make_talker
from minillada.commands.cli import run
from minillada.measure.likelihood import log_likelihood
from minillada.text.scenes import COLOURS, Thing, caption, draw, questions, scene, shapes, unseen, write_scenes
from minillada.training.config import IDS, PRESETS
from minillada.training.sft import read_items, teach
from minillada.weights.checkpoint import blank, check, weights
from minillada.weights.pictures import LARGEST, Tiles, best_grid, field, n_patches, open_picture, tile
from minillada.weights.quantize import quantize
from minillada.weights.schemes import TOWER_NAMES
from minillada.weights.tower import TOWER, TOWERS, Tower, Vision, read_vision
from minillada.weights.vision import with_album, with_vision

Image = pytest.importorskip("PIL.Image", reason="pictures need: pip install minillada[vision]")
HOME = GOLDEN / "llada_v"
CASES = {case["name"]: case for case in json.loads((HOME / "expected.json").read_text())["cases"]}
SETTINGS = {"plain": {}, "half_steps": {"steps": 6}, "blocks_of_4": {"block_len": 4}, "guided": {"cfg_scale": 1.5}}
GRIDS = tuple((i, j) for i in range(1, 7) for j in range(1, 7))
every = pytest.mark.parametrize("name", CASES)
# the golden pictures were cut with Pillow 13; an older one, as Python 3.10 has, rounds one tile of `tall` otherwise
OLD_PILLOW = int(pytest.importorskip("PIL").__version__.split(".")[0]) < 13


@pytest.fixture(scope="module")
def model():
    return minillada.load(HOME, mask_id=255)[0]


@pytest.fixture(scope="module")
def expected():
    return load_file(HOME / "expected.safetensors")


def shown(model, name):
    """The model that sees a golden picture, and the golden prompt about it."""
    case = CASES[name]
    seeing, picture = minillada.see(model, HOME / case["file"], case["image_aspect_ratio"])
    return seeing, [id for i in case["input_ids"] for id in (picture if i == -200 else [i])]


# ---- what the official code sees and says ----------------------------------------------------------------------------


@every
def test_the_tiles_are_the_official_ones(name, model, expected):
    vision, case = model.embed.vision, CASES[name]
    tiles = tile(open_picture(HOME / case["file"]), vision.image_size, case["image_aspect_ratio"], vision.grids)
    away = (tiles.pixels.int() - expected[f"{name}.tiles"].int()).abs()
    assert away.max() <= (OLD_PILLOW and name == "tall")
    assert len(tiles.pixels) == case["n_tiles"] and n_patches(tiles, vision.side) == case["n_image_tokens"]


def test_the_tower_gets_the_official_values(model, expected, monkeypatch):
    got = []
    monkeypatch.setattr(model.embed.tower, "forward", lambda x: got.append(x) or torch.zeros(len(x), 16, 24))
    minillada.see(model, HOME / "square.png")
    assert torch.equal(got[0], expected["square.values"])


@every
@torch.no_grad()
def test_embeddings_and_logits_are_the_official_ones(name, model, expected):
    if OLD_PILLOW and name == "tall":
        pytest.skip("Pillow before 13 makes other pixels of this picture")
    seeing, prompt = shown(model, name)
    patches = torch.tensor([id for id in prompt if id >= 256])
    torch.testing.assert_close(seeing.embed(patches), expected[f"{name}.image_embeddings"], atol=3e-4, rtol=0)
    logits = seeing(torch.tensor([prompt + [255] * 12]))[0, -19:]
    torch.testing.assert_close(logits, expected[f"{name}.logits"], atol=1e-4, rtol=0)


@every
@pytest.mark.parametrize("banned", ["", "_banned"])
def test_every_official_generation_is_repeated(name, banned, model):
    seeing, prompt = shown(model, name)
    for setting, fields in SETTINGS.items():
        ban = tuple(CASES[name]["banned"]) if banned else ()
        config = SampleConfig(**{"gen_len": 12, "steps": 12, "block_len": 12, "banned_ids": ban, **fields})
        config = replace(config, stop_at_eos=False)
        assert minillada.generate(seeing, [prompt], config) == [CASES[name]["generated"][setting + banned]], setting


def test_the_published_size_has_the_published_number_of_tensors_and_parameters(tmp_path):
    told = {"mm_hidden_size": 1152, "image_aspect_ratio": "anyres_max_4", "image_grid_pinpoints": "(1x1),...,(6x6)"}
    (tmp_path / "config.json").write_text(json.dumps(told))
    vision, sizes = read_vision(tmp_path), PRESETS["llada-8b"]["model"]
    model = blank(minillada.ModelConfig(**IDS["llada-8b"], **sizes), vision)
    assert vision.side == 27 and vision.grids == GRIDS
    assert (len(weights(model)), model.n_parameters()) == (717, 8_434_837_024)


@pytest.mark.soak
@torch.no_grad()
def test_the_large_tower_computes_what_transformers_computes():
    transformers = pytest.importorskip("transformers", reason="the comparison needs transformers")
    torch.manual_seed(0)
    config = transformers.SiglipVisionConfig(
        hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16, image_size=384,
        patch_size=14,
    )  # fmt: skip
    theirs, ours = transformers.SiglipVisionModel(config).eval(), Tower(Vision(**TOWERS[1152]))
    for mine, name in (pair for pair in TOWER_NAMES.items() if pair[0] != "post_norm"):
        for i in range(26) if "{i}" in mine else [0]:
            there = theirs.get_submodule(prefix_of(theirs) + name.replace("{i}", str(i)))
            ours.get_submodule(mine.replace("{i}", str(i))).load_state_dict(there.state_dict())
    tiles = torch.rand(1, 3, 384, 384) * 2 - 1
    start = time.process_time()
    got = ours(tiles)
    print(f"{time.process_time() - start:.1f} s of processor time for a tile")
    assert (got - theirs(tiles, output_hidden_states=True).hidden_states[-2]).abs().max() < 1e-4


def prefix_of(module):
    """What transformers calls the part that computes: it has changed between versions."""
    return "vision_model." if hasattr(module, "vision_model") else ""


# ---- a picture is a list of ids --------------------------------------------------------------------------------------


def test_a_batch_of_pictures_answers_as_each_alone():
    model = minillada.load(HOME, mask_id=255, dtype=torch.float64)[0]
    both, first = minillada.see(model, HOME / "square.png")
    both, second = minillada.see(both, HOME / "padded.png", aspect="pad")
    assert first == list(range(256, 256 + 36)) and second == list(range(292, 292 + 17))
    prompts = [[1, *first, 2, 3], [4, *second], [5, 6, 7]]
    config = SampleConfig(gen_len=8, steps=8, block_len=4, stop_at_eos=False)
    answers = minillada.generate(both, prompts, config)
    alone = minillada.see(model, HOME / "padded.png", aspect="pad")
    assert answers[:1] == minillada.generate(both, prompts[:1], config)
    assert answers[1:2] == minillada.generate(alone[0], [[4, *alone[1]]], config)
    assert answers[2:] == minillada.generate(model, prompts[2:], config)


@pytest.mark.parametrize("cache", ["prefix", "dual", "refresh:1,1,0.25"])
def test_caches_see_pictures_too(cache, model):
    seeing, prompt = shown(model, "padded")
    config = SampleConfig(gen_len=6, steps=6, block_len=6, stop_at_eos=False)
    with_cache = minillada.generate(seeing, [prompt], replace(config, cache=cache))
    if cache.startswith("refresh"):  # which renews everything here
        assert with_cache == minillada.generate(seeing, [prompt], config)
    blind = minillada.generate(seeing, [[id if id < 256 else 0 for id in prompt]], replace(config, cache=cache))
    assert with_cache != blind


@torch.no_grad()
def test_text_without_a_picture_is_unchanged(model):
    seeing, _ = minillada.see(model, HOME / "square.png")
    tokens = torch.tensor([[1, 2, 255, 3]])
    assert torch.equal(model(tokens), seeing(tokens))
    assert model.config.max_len == 1024 and type(model.config) is minillada.ModelConfig
    assert seeing.head is model.head and seeing.embed.weight is model.embed.weight


def test_ids_of_patches_belong_to_the_model_that_was_shown_them(model):
    seeing, picture = minillada.see(model, HOME / "padded.png", aspect="pad")
    for blind, prompt in ((model, picture), (seeing, [picture[-1] + 1])):
        with pytest.raises(BadInput, match="token: expected an id from 0 to 255, got"):
            minillada.generate(blind, [prompt], SampleConfig(gen_len=4, steps=4, block_len=4))
    assert log_likelihood(seeing, picture, [1, 2], n_samples=2) < 0


def test_a_model_that_only_reads_says_so():
    with pytest.raises(BadInput, match="see: expected a model with a vision tower"):
        minillada.see(tiny_model(), HOME / "square.png")


@pytest.mark.parametrize("aspect", ["square", "anyres_max_0", "anyres_max_", 4])
def test_an_unknown_way_of_tiling_is_refused(aspect, model):
    with pytest.raises(BadInput, match="aspect: expected pad, anyres or anyres_max_N"):
        minillada.see(model, HOME / "square.png", aspect)


def test_quantised_weights_see_as_before(model):
    small = quantize(minillada.load(HOME, mask_id=255)[0], "int8")
    ids = torch.tensor(minillada.see(model, HOME / "square.png")[1])
    embeddings = [minillada.see(m, HOME / "square.png")[0].embed(ids) for m in (model, small)]
    assert torch.equal(*embeddings)


# ---- tiling, by hand -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size, grid, tokens",
    [((384, 384), (1, 1), 1485), ((640, 480), (2, 2), 2929), ((1024, 768), (3, 2), 3627)],
)
def test_the_published_tiling_makes_so_many_tokens(size, grid, tokens):
    assert best_grid(size, 384, GRIDS) == grid
    assert n_patches(Tiles(torch.empty(0), grid, size, 4.0), 27) == tokens


def test_no_picture_makes_more_tokens_than_the_limit_allows():
    sizes = [(w, h) for w in range(50, 2400, 117) for h in range(50, 2400, 117)]
    most = max(n_patches(Tiles(torch.empty(0), best_grid(size, 384, GRIDS), size, 4.0), 27) for size in sizes)
    assert 4000 < most <= 4293


def test_the_border_of_a_tile_is_left_out():
    rows, columns, high, wide = field(Tiles(torch.empty(0), (1, 1), (20, 10), 4.0), 4)
    assert (rows, columns, high, wide) == (slice(1, 3), slice(0, 4), 2, 4)


# ---- directories -----------------------------------------------------------------------------------------------------


def test_a_checkpoint_saved_again_is_the_original(model, tmp_path):
    minillada.save(minillada.see(model, HOME / "square.png")[0], tmp_path / "again")
    original, again = (load_file(d / "model.safetensors") for d in (HOME, tmp_path / "again"))
    assert original.keys() == again.keys() and all(torch.equal(original[key], again[key]) for key in original)
    configs = [json.loads((d / "config.json").read_text()) for d in (HOME, tmp_path / "again")]
    names = {"bos_token_id", "mlp_bias", "mm_vision_tower", "torch_dtype", "transformers_version"}
    assert {key for key in configs[0] | configs[1] if configs[0].get(key) != configs[1].get(key)} <= names
    loaded, _ = minillada.load(tmp_path / "again")  # now without being told the mask
    assert loaded.config == model.config and loaded.embed.vision == model.embed.vision


def test_a_check_knows_a_model_that_sees():
    report = check(HOME, deep=True, mask_id=255)
    assert report.scheme == "LLaDA-V" and report.meta.embed.vision.n_layer == 2 and not report.non_finite


def test_a_tiny_model_of_ours_learns_to_see_in_the_same_files(tmp_path):
    vision = Vision(width=16, d_ff=24, n_layer=1, n_head=2, image_size=12, patch_size=4)
    model = with_vision(tiny_model(), vision, torch.Generator().manual_seed(0))
    minillada.save(model, tmp_path / "ours")
    loaded, _ = minillada.load(tmp_path / "ours")
    assert loaded.embed.vision == vision and loaded.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    again = with_vision(tiny_model(), vision, torch.Generator().manual_seed(0))
    assert torch.equal(again.embed.tower.patch.weight, model.embed.tower.patch.weight)


def change(home, file, **keys):
    shutil.copytree(HOME, home, dirs_exist_ok=True)
    found = json.loads((home / file).read_text()) | keys
    (home / file).write_text(json.dumps({key: value for key, value in found.items() if value is not ...}))
    return home


@pytest.mark.parametrize(
    "file, keys, reason",
    [
        ("config.json", {"mm_projector_type": "linear"}, "mm_projector_type: expected 'mlp2x_gelu'"),
        ("config.json", {"mm_patch_merge_type": "flat"}, "mm_patch_merge_type: expected 'spatial_unpad'"),
        ("config.json", {"mm_use_im_start_end": True}, "mm_use_im_start_end: expected False"),
        ("config.json", {"mm_fusion": 3}, "got 'mm_fusion'"),
        ("config.json", {"mm_hidden_size": 23}, "mm_hidden_size: expected the tower's width 24, got 23"),
        ("config.json", {"image_aspect_ratio": "square"}, "aspect: expected pad, anyres or anyres_max_N"),
        (
            "config.json",
            {"image_grid_pinpoints": [[31, 30]]},
            "image_grid_pinpoints: expected pairs of multiples",
        ),
        ("config.json", {"image_grid_pinpoints": "(1x1)"}, "tensors"),
        ("vision_config.json", {"hidden_act": "relu"}, "hidden_act in vision_config.json"),
        ("vision_config.json", {"num_attention_heads": 5}, "vision n_head: expected a divisor of the width 24"),
        ("vision_config.json", {"image_size": 2**40}, "vision image_size: expected a whole number from 1 to 4096"),
        ("vision_config.json", {"patch_size": 0}, "vision patch_size"),
        ("vision_config.json", {"num_hidden_layers": 1}, "num_hidden_layers in vision_config.json"),
        ("vision_config.json", {"num_hidden_layers": 4}, "tensors: expected those of config.json"),
        ("vision_config.json", {"hidden_size": ...}, "got no hidden_size"),
        ("vision_config.json", {"use_rope": True}, "got use_rope"),
    ],
)
def test_a_directory_that_does_not_fit_is_refused(file, keys, reason, tmp_path):
    home = change(tmp_path / "home", file, **keys)
    if reason == "tensors":
        assert read_vision(home).grids == ((1, 1),)
        return
    with pytest.raises(BadInput) as refusal:
        minillada.load(home, mask_id=255)
    assert reason in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_tower_that_no_file_describes_is_refused(tmp_path):
    home = change(tmp_path / "home", "config.json")
    (home / TOWER).unlink()
    with pytest.raises(BadInput, match="mm_hidden_size: expected 1152, or a vision_config"):
        minillada.load(home, mask_id=255)


# ---- the scripts -----------------------------------------------------------------------------------------------------


@pytest.fixture
def call(monkeypatch, capsys):
    def call(*arguments, typed=""):
        monkeypatch.setattr(sys, "argv", ["load_8b.py", *map(str, arguments), "--device", "cpu"])
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
        code = 0
        try:
            run(runpy.run_path(str(GOLDEN.parents[1] / "load_8b.py"))["main"])
        except SystemExit as error:
            code = error.code
        return code, *capsys.readouterr()

    return call


def write_exact(home, case):
    """Golden files with a tokenizer and a template that make exactly the golden prompt of a message; the message."""
    shutil.copytree(HOME, home)
    before, after = case["input_ids"][1:6], case["input_ids"][7:]
    letter = lambda id: "\n" if id == after[0] else chr(0x4E00 + id)
    inner = tokenizers.Tokenizer(models.WordLevel({letter(id): id for id in range(250)} | SPECIAL))
    inner.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    inner.add_special_tokens(list(SPECIAL))
    inner.save(str(home / "tokenizer.json"))
    start = next(text for text, id in SPECIAL.items() if id == case["input_ids"][0])
    write_template(home, start + "".join(map(letter, before)) + "{{ messages[-1].content }}")
    config = json.loads((home / "config.json").read_text()) | {"image_aspect_ratio": case["image_aspect_ratio"]}
    (home / "config.json").write_text(json.dumps(config))
    return "".join(map(letter, after[1:])), letter


@pytest.mark.parametrize("name, setting", list(zip(CASES, [*SETTINGS, "plain"], strict=True)))
def test_load_8b_says_what_the_official_code_says(name, setting, call, tmp_path):
    message, letter = write_exact(tmp_path / "home", CASES[name])
    options = {"--gen-len": 12, "--steps": 12, "--block-len": 12}
    options |= {f"--{key.replace('_', '-')}": value for key, value in SETTINGS[setting].items()}
    given = [part for pair in options.items() for part in pair]
    code, out, _ = call(tmp_path / "home", "--image", HOME / f"{name}.png", "--prompt", message, "--quiet", *given)
    assert (code, out) == (0, "".join(map(letter, CASES[name]["generated"][f"{setting}_banned"])) + "\n")


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    """The golden model with one token per ASCII character and LLaDA's own markers."""
    home = tmp_path_factory.mktemp("talker")
    shutil.copytree(HOME, home, dirs_exist_ok=True)
    return write_tokenizer(home)


def test_the_official_prompt_has_a_system_message_and_a_newline_behind_the_picture(talker, model):
    loaded, tokenizer = minillada.load(talker)
    args = Namespace(raw=False, chat=False, image=HOME / "padded.png")
    asks = make_talker(talker, "LLaDA-V", loaded, tokenizer, args)
    head = lambda role: [251, *ids(role), 252, *ids("\n\n")]
    n = len(asks.image)
    assert n == len(minillada.see(model, HOME / "padded.png")[1])
    prompt = asks.encode("What?")
    assert prompt == [
        250, *head("system"), *ids(SYSTEM), 253, *head("user"), *range(256, 256 + n), *ids("\nWhat?"), 253,
        *head("assistant"),
    ]  # fmt: skip
    config = asks.config(Namespace(**dict.fromkeys(ALL_OPTIONS), seed=0), len(prompt))
    assert (config.gen_len, config.steps, config.block_len) == (128, 128, 128)
    assert set(config.banned_ids) == {250, 251, 252, 254} and config.stop_ids == (253,)


ALL_OPTIONS = ("gen_len", "steps", "block_len", "temperature", "remasking", "commit", "revise", "cfg_scale", "top_k",
               "top_p", "cache", "ban_eos", "defer_eos")  # fmt: skip


def test_a_chat_may_hold_several_pictures(call, talker):
    square, padded = HOME / "square.png", HOME / "padded.png"
    typed = f"/image {square}\nWhat?\n/image {padded}\nAnd now?\n/image no.png\n/reset\nHi\n/quit\n"
    code, out, err = call(talker, "--chat", "--gen-len", "2", typed=typed)
    assert code == 0 and out.count("which your next message is about") == 2
    assert err.count("error: ") == 1 and "no.png: expected a picture, got no such file" in err


def test_a_check_says_what_the_model_sees_with(call, talker):
    code, out, err = call(talker, "--check")
    assert (code, out) == (0, "") and "LLaDA-V names" in err
    assert "sees: a tower of 2 layers of width 24, tiles of 30 pixels, anyres_max_4" in err


def test_a_page_shows_the_picture(call, talker, tmp_path):
    page, picture = tmp_path / "run.html", tmp_path / "run.svg"
    files = ["--html", page, "--svg", picture]
    code, _, err = call(talker, "--image", HOME / "wide.png", "--prompt", "Hi", "--gen-len", "4", "--quiet", *files)
    assert code == 0, err
    text = page.read_text(encoding="utf-8")
    assert text.count('src="data:image/png;base64,') == 1 and "img-src data:" in text
    assert picture.read_text(encoding="utf-8").count('href="data:image/png;base64,') == 1
    call(talker, "--prompt", "Hi", "--gen-len", "4", "--quiet", "--html", tmp_path / "blind.html")
    assert "img" not in (tmp_path / "blind.html").read_text(encoding="utf-8").split("<body>")[1].split("<script")[0]


def test_holes_are_filled_from_the_picture(call, talker):
    code, out, _ = call(talker, "--image", HOME / "padded.png", "--fill", "a [MASK] circle", "--quiet")
    assert code == 0 and out.startswith("a ") and out.endswith(" circle\n")


@pytest.mark.parametrize(
    "arguments, reason",
    [
        (["--image", HOME / "none.png", "--prompt", "Hi"], "none.png: expected a picture, got no such file"),
        (["--image", HOME / "config.json", "--prompt", "Hi"], "config.json: expected a whole picture (PNG, JPEG"),
        (["--image", HOME / "square.png", "--edit", "[[a]]"], "image: expected --prompt, --fill or --chat with it"),
        (["--image", HOME / "square.png", "--check"], "image: expected --prompt, --fill or --chat with it"),
    ],
)
def test_a_picture_that_cannot_be_used_costs_one_line(arguments, reason, call, talker):
    code, out, err = call(talker, *arguments)
    assert (code, out) == (2, "") and len(err.splitlines()) == 1 and err.startswith("error: ") and reason in err


def test_a_model_that_only_reads_is_shown_no_picture(call):
    code, _, err = call("questions", "--image", HOME / "square.png", "--prompt", "Hi")
    assert code == 2 and "see: expected a model with a vision tower" in err.splitlines()[-1]


# ---- pictures of every kind ------------------------------------------------------------------------------------------


def written(tmp_path, picture, name="x.png", **how):
    picture.save(tmp_path / name, **how)
    return tmp_path / name


def corner(path):
    return open_picture(path).getpixel((0, 0))


RED = (255, 0, 0)


@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.gif", "x.webp", "x.bmp", "x.tiff"])
def test_every_format_is_seen(name, tmp_path):
    path = written(tmp_path, Image.new("RGB", (16, 8), RED), name)
    assert open_picture(path).size == (16, 8) and open_picture(path).mode == "RGB"
    assert all(abs(a - b) < 3 for a, b in zip(corner(path), RED, strict=True))


def test_sixteen_bits_of_grey_keep_their_contrast(tmp_path):
    path = written(tmp_path, Image.new("I;16", (4, 4), 32896))
    assert corner(path) == (128, 128, 128)


def test_what_is_transparent_is_white(tmp_path):
    assert corner(written(tmp_path, Image.new("RGBA", (4, 4), (0, 0, 255, 0)))) == (255, 255, 255)
    assert corner(written(tmp_path, Image.new("LA", (4, 4), (0, 0)))) == (255, 255, 255)
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 255, 255, 0, 0])
    assert corner(written(tmp_path, palette)) == RED
    assert corner(written(tmp_path, palette, transparency=1)) == (255, 255, 255)


def test_a_picture_stands_as_the_camera_was_held(tmp_path):
    picture = Image.new("RGB", (8, 4))
    picture.putpixel((0, 3), RED)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn it clockwise
    path = written(tmp_path, picture, exif=exif)
    assert open_picture(path).size == (4, 8) and corner(path) == RED


def test_of_a_moving_picture_the_first_frame_is_seen(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    assert corner(written(tmp_path, frames[0], "x.gif", save_all=True, append_images=frames[1:])) == RED


@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
@pytest.mark.parametrize("name", ["wide.png", "x.jpg"])
def test_a_truncated_picture_is_refused(name, share, tmp_path):
    whole = written(tmp_path, open_picture(HOME / "wide.png"), name).read_bytes()
    (tmp_path / name).write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(BadInput, match="expected a whole picture") as refusal:
        open_picture(tmp_path / name)
    assert "\n" not in str(refusal.value)


def test_the_pixels_of_a_bomb_are_counted_before_it_is_decoded(tmp_path):
    path = written(tmp_path, Image.new("1", (2**13 + 1, 2**13)))  # 8 kB
    start = time.process_time()
    with pytest.raises(BadInput, match=f"at most {LARGEST:,} pixels, got 8193 x 8192"):
        open_picture(path)
    assert time.process_time() - start < 1
    with pytest.raises(BadInput, match="pixels"):
        open_picture(Image.new("1", (2**13 + 1, 2**13)))


def test_other_things_are_no_pictures(tmp_path):
    (tmp_path / "x.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    (tmp_path / "empty.png").touch()
    for path in (tmp_path / "x.eps", tmp_path / "empty.png"):
        with pytest.raises(BadInput, match="expected a whole picture"):
            open_picture(path)
    with pytest.raises(BadLuck, match="got no such file"):
        open_picture(tmp_path)
    with pytest.raises(BadInput, match="expected a path or a PIL image, got int"):
        open_picture(3)
    with pytest.raises(BadInput, match="floating"):
        open_picture(Image.new("F", (2, 2)))


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1)])
def test_the_smallest_and_the_longest_pictures_are_seen(size, model):
    for aspect in ("pad", "anyres_max_4"):
        seeing, picture = minillada.see(model, Image.new("RGB", size), aspect)
        assert len(seeing.embed.patches) == len(picture) >= 16 and seeing.embed.patches.isfinite().all()


def test_without_pillow_one_line_says_what_to_install(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(BadLuck, match=r"picture: expected Pillow, got none; pip install 'minillada\[vision\]'"):
        minillada.see(model, HOME / "square.png")


# ---- learning to see -------------------------------------------------------------------------------------------------

EYES = Vision(width=8, d_ff=16, n_layer=1, n_head=2, image_size=48, patch_size=16)
RUN = {"steps": 2, "batch_size": 4, "eval_every": 2, "precision": "float32"}


@pytest.fixture(scope="module")
def school(tmp_path_factory):
    """A newborn model that could see, and lessons about pictures."""
    home = tmp_path_factory.mktemp("school")
    write_scenes(home, shapes(), {1: 4, 2: 6})
    tokenizer = minillada.Tokenizer.bpe([(home / "scenes.jsonl").read_text()], 320)
    ids = {"mask_id": tokenizer.mask_id, "eos_id": tokenizer.eos_id, "pad_id": tokenizer.pad_id}
    model = tiny_model(vocab_size=tokenizer.vocab_size, max_len=96, **ids)
    minillada.save(with_vision(model, EYES, torch.Generator().manual_seed(0)), home / "newborn", tokenizer)
    return home


def lesson(school, name="scenes.jsonl", **more):
    return SFTConfig(data=str(school / name), start=str(school / "newborn"), **{**RUN, **more})


def test_a_tower_learns_with_the_loss_of_sft(school, tmp_path):
    *_, last = minillada.train(lesson(school, out=str(tmp_path / "run")))
    before, after = minillada.load(school / "newborn")[0], minillada.load(tmp_path / "run")[0]
    changed = {
        name for (name, a), b in zip(before.named_parameters(), after.parameters(), strict=True) if (a != b).any()
    }
    assert {"embed.tower.patch.weight", "embed.tower.layers.0.q.weight", "embed.projector.2.bias"} <= changed
    assert not any("post_norm" in name for name in changed) and last.bound is not None
    assert after.embed.vision == EYES and type(after.config) is minillada.ModelConfig


def test_training_looks_at_a_picture_as_see_does(school):
    model, tokenizer = minillada.load(school / "newborn")
    items = read_items(school / "scenes.jsonl", teach(school / "newborn", tokenizer), model.config, vision=EYES)
    lines = [json.loads(line) for line in (school / "scenes.jsonl").read_text().splitlines()]
    assert len(items.album) == len({line["image"] for line in lines}) == 10
    rows = [prompt for item in items.learned[:5] for prompt, _ in item]
    learning = with_album(minillada.load(school / "newborn")[0], items.album)
    for row, line in zip(rows, lines, strict=False):
        n = sum(id >= model.config.embedding_size for id in row)
        seeing, picture = minillada.see(model, school / line["image"])
        assert len(picture) == n == 10
        torch.testing.assert_close(learning.embed(torch.tensor(row[:n])), seeing.embed(torch.tensor(picture)))
    width = max(map(len, rows))
    batch = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    alone = torch.stack([learning.embed(row[None])[0] for row in batch])
    torch.testing.assert_close(learning.embed(batch), alone)


def test_an_interrupted_lesson_goes_on_bit_for_bit_if_no_picture_was_changed(school, tmp_path):
    shutil.copytree(school, tmp_path / "school")
    config = lesson(tmp_path / "school", steps=2, eval_every=1)
    whole = [step.loss for step in minillada.train(config)]
    steps = minillada.train(replace(config, out=str(tmp_path / "run")))
    assert next(steps).loss == whole[0]
    steps.close()
    first = tmp_path / "school" / json.loads((school / "scenes.jsonl").read_text().splitlines()[0])["image"]
    kept = first.read_bytes()
    Image.new("RGB", (48, 48)).save(first)
    with pytest.raises(BadInput, match="data: expected the text this run began with, got another"):
        next(minillada.train(resume=tmp_path / "run"))
    first.write_bytes(kept)
    assert [step.loss for step in minillada.train(resume=tmp_path / "run")] == whole[1:]


def test_adapters_learn_about_pictures_while_the_tower_stays(school, tmp_path):
    list(minillada.train(lesson(school, lora=2, out=str(tmp_path / "run"))))
    before, after = minillada.load(school / "newborn")[0], minillada.load(tmp_path / "run")[0]
    pairs = zip(before.named_parameters(), after.parameters(), strict=True)
    assert {name.split(".")[2] for (name, a), b in pairs if (a != b).any()} == {"attn"}


@pytest.mark.parametrize(
    "image, reason",
    [
        ("../square.png", "expected the plain name of a file in this directory"),
        ("/etc/hostname", "expected the plain name of a file in this directory"),
        ("pictures\\00000.png", "expected the plain name of a file in this directory"),
        ("pictures/none.png", "expected a file, got nothing"),
        ("outside/x.png", "got a link that leaves it"),
        ("scenes.jsonl", "expected a whole picture"),
        (3, "expected the plain name of a file in this directory"),
    ],
)
def test_a_picture_that_a_line_may_not_name_is_refused_with_the_line(image, reason, school, tmp_path):
    if image == "outside/x.png":
        written(tmp_path, Image.new("RGB", (2, 2)))
        (school / "outside").mkdir(exist_ok=True)
        (school / "outside/x.png").unlink(missing_ok=True)
        (school / "outside/x.png").symlink_to(tmp_path / "x.png")
    (school / "bad.jsonl").write_text(json.dumps({"image": image, "prompt": "a", "answer": "b"}) + "\n")
    with pytest.raises((BadInput, BadLuck)) as refusal:
        next(minillada.train(lesson(school, "bad.jsonl")))
    assert "bad.jsonl, line 1: " in str(refusal.value) and reason in str(refusal.value)


def test_a_model_that_only_reads_learns_nothing_about_pictures(school, tmp_path):
    write_tokenizer(tmp_path / "reader")
    minillada.save(tiny_model(vocab_size=256, mask_id=255, eos_id=254, pad_id=None), tmp_path / "reader")
    config = replace(lesson(school), start=str(tmp_path / "reader"))
    with pytest.raises(BadInput, match="image: expected none, as the model only reads"):
        next(minillada.train(config))


def test_a_picture_stands_in_front_of_what_the_user_says_first(school):
    model, tokenizer = minillada.load(school / "newborn")
    told = [("user", "describe:"), ("assistant", "a red circle"), ("user", "where?"), ("assistant", "top")]
    line = {"image": "pictures/00000.png", "messages": [{"role": role, "content": text} for role, text in told]}
    (school / "talk.jsonl").write_text((json.dumps(line) + "\n") * 2)
    items = read_items(school / "talk.jsonl", teach(school / "newborn", tokenizer), model.config, vision=EYES)
    v = model.config.embedding_size
    for prompt, _ in items.learned[0]:
        assert prompt[:10] == list(range(v, v + 10)) and max(prompt[10:]) < v
    assert len(items.album) == 1


# ---- the scenes ------------------------------------------------------------------------------------------------------


def test_a_scene_is_drawn_where_and_as_it_is_told():
    things = [Thing(0, "red", "square"), Thing(5, "blue", "circle")]
    pixels = draw(things, shapes(), random.Random(0)).astype(int)
    for thing in things:
        y, x = 16 * (thing.cell // 3) + 8, 16 * (thing.cell % 3) + 8
        assert abs(pixels[y, x] - COLOURS[thing.colour]).max() < 25
    assert pixels[40, 8].min() > 190  # an empty cell


def test_captions_and_answers_say_where_things_are():
    a, b, c = Thing(0, "red", "square"), Thing(5, "blue", "circle"), Thing(6, "black", "cross")
    assert caption([b, a]) == "a red square left of a blue circle"
    assert caption([c, a]) == "a red square above a black cross"
    asked = {question.kind: question for seed in range(9) for question in questions([a, b], random.Random(seed))}
    assert asked["where"].answer in ("top left", "right") and asked["count"].answer == "two"
    for seed in range(20):
        for kind, prompt, answer in questions([a, b], random.Random(seed)):
            if kind == "yes/no":
                holds = ("is the red square left of" in prompt) or ("is the blue circle right of" in prompt)
                assert answer == ("yes" if holds else "no")


def test_pairs_that_are_never_drawn_are_in_the_test_alone():
    rng, never = random.Random(0), unseen(shapes())
    drawn = lambda of: [{(t.colour, t.form) for t in scene(rng, list(shapes()), 2, of)} for _ in range(50)]
    assert len(never) == 4 and not any(pairs & never for pairs in drawn("seen"))
    assert all(len(pairs & never) == 1 for pairs in drawn("unseen"))
