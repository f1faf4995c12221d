"""The smallest models that one can talk with: a golden checkpoint with a tokenizer for its ids, and a random one."""

import json
import shutil
from pathlib import Path

import tokenizers
from oracles import GOLDEN, tiny_model
from tokenizers import decoders, models, pre_tokenizers

import minillada

SPECIAL = {"[BOS]": 250, "<|start_header_id|>": 251, "<|end_header_id|>": 252, "<|eot_id|>": 253}
SPECIAL |= {"<|endoftext|>": 254, "<|mdm_mask|>": 255}
CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))  # 96 characters, ids 0 to 95


def write_tokenizer(directory: Path, special: bool = True) -> Path:
    """One token per ASCII character. special=False: tokenizer.json calls the markers ordinary tokens."""
    vocabulary = {character: id for id, character in enumerate(CHARACTERS)}
    inner = tokenizers.Tokenizer(models.WordLevel(vocabulary | SPECIAL))
    inner.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    (inner.add_special_tokens if special else inner.add_tokens)(list(SPECIAL))
    directory.mkdir(parents=True, exist_ok=True)
    inner.save(str(directory / "tokenizer.json"))
    return directory


def write_talker(directory: Path) -> Path:
    """A model directory: vocabulary 256, mask 255, eos = pad 254, eot 253, length 128."""
    shutil.copytree(GOLDEN / "llada_dense", directory, dirs_exist_ok=True)
    return write_tokenizer(directory)


def write_random(directory: Path) -> Path:
    """A random model of those characters with a tokenizer of ours, length 48."""
    tokenizer = minillada.Tokenizer.characters([CHARACTERS])
    ids = {"mask_id": tokenizer.mask_id, "eos_id": tokenizer.eos_id, "pad_id": tokenizer.pad_id}
    minillada.save(tiny_model(vocab_size=tokenizer.vocab_size, max_len=48, **ids), directory, tokenizer)
    return directory


def write_template(directory: Path, template: object, **more: object) -> Path:
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": template, **more}))
    return directory


def ids(text: str) -> list[int]:
    return [CHARACTERS.index(character) for character in text]
