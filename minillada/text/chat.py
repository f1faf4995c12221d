"""Turn messages into ids by a chat template, so that nothing that a person types becomes a special token.

The template is rendered with one private character in place of each message's content, and the result is cut there. Its
own pieces are encoded with their special tokens; the contents are encoded apart from them, as plain text.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from ..errors import BadInput, BadLuck, check_one_of, check_whole
from ..files import CONFIG_CAP, confined, one_line, read_json, write_file
from .tokenizer import Tokenizer, display, refuse_surrogates

# LLaDA's own template, for directories that have none.
LLADA = (
    "{{ bos_token | default('') }}"
    "{% for message in messages %}"
    "<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n{{ message.content }}<|eot_id|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
MARKERS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")  # of that template
TURN_ENDS = ("<|eot_id|>", "<|role_end|>", "<|im_end|>")  # what an answer ends with, besides the end of text
FILES = ("tokenizer_config.json", "generation_config.json", "chat_template.jinja")
MODEL = "config.json"
ROLES = ("system", "user", "assistant")
TEMPLATE_CAP, PROMPT_CAP = 64 << 10, 1 << 20  # bytes
RENDER = str(Path(__file__).with_name("render.py"))
PATIENCE = 20  # seconds to wait for a process that may compute for one of them
STAND_IN = 0xF0000  # the first of 65,534 private code points, which no template cuts or changes
Message = dict[str, Any]  # {"role": one of ROLES, "content": text}, and "image": the ids of a picture in front of it


@dataclass
class ChatTemplate:
    """A directory's template and its tokenizer. Make one with `load`."""

    tokenizer: Tokenizer
    source: str  # the Jinja2 program
    own: bool  # it comes from the directory
    names: dict[str, str]  # bos_token, eos_token, …: what the template may call them -> their text
    stop_ids: tuple[int, ...]  # tokens that end an answer
    rendered: dict[tuple, str] = field(default_factory=dict, repr=False)  # results, by roles

    @classmethod
    def load(cls, directory: str | Path, tokenizer: Tokenizer | None = None) -> "ChatTemplate":
        """Take chat_template.jinja, or the one in tokenizer_config.json, or LLaDA's. Raises BadInput, BadLuck."""
        directory = Path(directory)
        tokenizer = tokenizer or Tokenizer.load(directory)
        there = {name: confined(directory, name) for name in FILES if os.path.lexists(directory / name)}
        config, generation = (read_json(there[name], CONFIG_CAP) if name in there else {} for name in FILES[:2])
        alone = there.get("chat_template.jinja")
        if alone and alone.stat().st_size > TEMPLATE_CAP:
            raise BadInput(f"{alone.name}: expected at most {TEMPLATE_CAP} bytes, got more; use another")
        with one_line("chat_template.jinja: expected UTF-8", "download it again", UnicodeDecodeError):
            source = alone.read_bytes().decode() if alone else default_of(config.get("chat_template"))
        if source and len(source.encode("utf-8", "replace")) > TEMPLATE_CAP:
            raise BadInput(f"chat template: expected at most {TEMPLATE_CAP} bytes, got more; use another")
        protect(tokenizer, source or LLADA)
        names = special_names(config, tokenizer)
        model = read_json(confined(directory, MODEL), CONFIG_CAP) if os.path.lexists(directory / MODEL) else {}
        return cls(tokenizer, source or LLADA, bool(source), names, stop_ids(generation, model, tokenizer))

    def save(self, directory: str | Path) -> None:
        """Write the tokenizer and the template into a directory, so that what was trained with them can chat."""
        self.tokenizer.save(directory)
        write_file(Path(directory) / "chat_template.jinja", [self.source.encode()])

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids of the prompt for the next answer. Contents lose the blanks around them, as in LLaDA's, and
        between a picture and its message stands a newline, as in LLaDA-V's training. Unlike in the official code, a
        template's text and a content never merge into one token. Raises BadInput."""
        roles = [message["role"] for message in messages]
        contents = ["\n" * bool(m.get("image")) + m["content"].strip() for m in messages]
        check_size("messages", *contents)
        for role in roles:
            check_one_of("role", role, ROLES)
        check_whole("messages", len(messages), 0, 10_000, "start again")
        pieces = re.split("([\U000f0000-\U000ffffd])", self.render(roles, contents))  # the odd ones are stand-ins
        content_of = {chr(STAND_IN + i): content for i, content in enumerate(contents)}
        image_of = {chr(STAND_IN + i): message.get("image", ()) for i, message in enumerate(messages)}
        if not content_of.keys() >= set(pieces[1::2]) or any("\\udb80" in piece for piece in pieces):  # by tojson
            raise BadInput("chat template: expected one that leaves contents as they are, got another; use --raw")
        check_size("chat", *(content_of.get(piece, piece) for piece in pieces))
        content = lambda stand_in: [*image_of[stand_in], *self.tokenizer.encode(content_of[stand_in])]
        encode = [self.encode_markup, content]
        return [id for i, piece in enumerate(pieces) for id in encode[i % 2](piece)]

    def encode_markup(self, text: str) -> list[int]:
        """Return the ids of the template's own text, in which special tokens are recognised."""
        inner = self.tokenizer.inner
        inner.encode_special_tokens = False
        try:
            with one_line("chat template: expected text that the tokenizer can encode", "use another", BaseException):
                return inner.encode(text, add_special_tokens=False).ids
        finally:
            inner.encode_special_tokens = True

    def render(self, roles: list[str], contents: list[str]) -> str:
        """Return the rendered text with a stand-in for every content that is not empty."""
        shape = tuple((role, bool(content)) for role, content in zip(roles, contents, strict=True))
        if shape not in self.rendered:
            lacking = [marker for marker in MARKERS if self.tokenizer.inner.token_to_id(marker) is None]
            if lacking and not self.own:
                what = "chat: expected a chat template in the files or a tokenizer for LLaDA's"
                raise BadInput(f"{what}, got none and no {' '.join(lacking)}; use --prompt with --raw")
            messages = [{"role": r, "content": chr(STAND_IN + i) if full else ""} for i, (r, full) in enumerate(shape)]
            context = {**self.names, "messages": messages, "add_generation_prompt": True}
            self.rendered[shape] = run_template(self.source, {**context, "tools": None, "documents": None})
        return self.rendered[shape]

    def fit(self, messages: list[Message], room: int) -> tuple[list[Message], list[int]]:
        """Leave out the oldest turns until the messages make at most `room` tokens; return the rest and their ids.
        System messages and the last message stay. Raises BadInput if these alone are too long."""
        first = next((i for i, message in enumerate(messages) if message["role"] != "system"), 0)
        while len(ids := self.encode_chat(messages)) > room:
            if len(messages) - first < 3:
                raise BadInput(f"message: expected at most {room} tokens with its template, got {len(ids)}; shorten it")
            messages = messages[:first] + messages[first + 2 :]
        return messages, ids


def run_template(source: str, context: dict) -> str:
    """Render the template in a process that can be stopped. Raises BadInput if the template fails."""
    if tuple(map(int, re.findall(r"\d+", version("jinja2"))[:3])) < (3, 1, 6):
        raise BadLuck(f"jinja2: expected 3.1.6 or newer, got {version('jinja2')}; pip install -U jinja2")
    job = json.dumps({"path": sys.path, "template": source, "context": context}).encode()
    try:
        done = subprocess.run([sys.executable, "-I", RENDER], input=job, capture_output=True, timeout=PATIENCE)
        answer = json.loads(done.stdout)
    except (subprocess.TimeoutExpired, ValueError):  # ValueError: it was stopped before it answered
        answer = {"error": "one that takes too much time or memory"}
    if "error" in answer:
        raise BadInput(f"chat template: expected one that renders, got {display(answer['error'])}; use another")
    return answer["text"]


def check_size(what: str, *texts: str) -> None:
    """Raise BadInput for more than 1 MB of text, and for text with lone surrogates."""
    if sum(map(len, texts)) > PROMPT_CAP or sum(len(text.encode("utf-8", "replace")) for text in texts) > PROMPT_CAP:
        raise BadInput(f"{what}: expected at most {PROMPT_CAP} bytes, got more; shorten it")
    for text in texts:
        refuse_surrogates(text, what)


def default_of(found: object) -> str | None:
    """Return the template in tokenizer_config.json: a text, or the one named "default" in a list. Raises BadInput."""
    if isinstance(found, list) and all(isinstance(entry, dict) for entry in found):
        found = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry.get("name"), str)}
        check_one_of("chat_template", "default", found)
        found = found["default"]
    if found is not None and not isinstance(found, str):
        raise BadInput(f"chat_template: expected a text or a list of named ones, got {type(found).__name__}; remove it")
    return found


def special_names(config: dict, tokenizer: Tokenizer) -> dict[str, str]:
    """Return the texts of bos_token and so on: those of the file, or else those of the tokenizer."""
    ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id, "pad_token": tokenizer.pad_id}
    names = {name: tokenizer.token(id) for name, id in ids.items() if id is not None}
    for name in (*ids, "unk_token"):
        found = config.get(name)
        found = found.get("content") if isinstance(found, dict) else found
        if isinstance(found, str):
            names[name] = found
    return names


def stop_ids(generation: dict, model: dict, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the ids of the end of text, of generation_config.json, of a list in config.json, and of the end of a turn,
    each once."""
    ends = generation.get("eos_token_id", [])
    told = ends if isinstance(ends, list) else [ends]
    if isinstance(more := model.get("eos_token_id"), list):
        told = [*told, *more]
    for id in told:
        check_whole("eos_token_id in generation_config.json or config.json", id, 0)
    found = dict.fromkeys([tokenizer.eos_id, *told, *map(tokenizer.inner.token_to_id, TURN_ENDS)])
    return tuple(id for id in found if id is not None)


def protect(tokenizer: Tokenizer, source: str) -> None:
    """Make the markers of the template special tokens, which nobody can type, even if tokenizer.json does not."""
    added = {token.content for token in tokenizer.inner.get_added_tokens_decoder().values()}
    known = [marker for marker in MARKERS if tokenizer.inner.token_to_id(marker) is not None]
    markers = [text for text in sorted(added | set(known)) if text in source and not text.isspace()]
    tokenizer.inner.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in markers])
    tokenizer.special_ids |= {tokenizer.inner.token_to_id(text) for text in markers}
