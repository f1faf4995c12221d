"""Turn text into ids and back: characters, bytes, byte-level BPE, or any `tokenizer.json`, in one small class.

Ids are plain lists of int. Text is not altered (no lower-casing, no CRLF change) and never becomes a special token: a
typed "[MASK]" is six ordinary characters; only `encode_with_masks` reads it as a hole.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from ..errors import LIMITS, BadInput, BadLuck, check_whole, display  # noqa: F401 display: of tokens
from ..files import listed, one_line, write_file

# The strings that known models use for each role, ours first; LLaDA and LLaDA-MoE pad with their end of text.
KNOWN = {
    "mask": ("[MASK]", "<|mdm_mask|>", "<|mask|>", "<mask>"),
    "eos": ("[EOS]", "<|endoftext|>", "</s>"),
    "bos": ("[BOS]", "<|startoftext|>", "<s>"),
    "pad": ("[PAD]", "<pad>", "<|endoftext|>"),
}
OURS = [strings[0] for strings in KNOWN.values()]  # ids 0 to 3 of the vocabularies made here
MAX_FILE = 100_000_000  # bytes of a tokenizer.json

# The library raises bare `Exception`s, and its panics are `BaseException`s.
no_panic = partial(one_line, faults=BaseException)


class Tokenizer:
    """A wrapper round `tokenizers.Tokenizer`; make one with `characters`, `bytes`, `bpe` or `load`."""

    def __init__(self, inner: tokenizers.Tokenizer, special: Mapping[str, int] | None = None) -> None:
        """Find the special tokens by their strings, or by the ids in `special`, {role: id}. Raises BadInput."""
        special = {role: id for role, id in (special or {}).items() if id is not None}
        for role, id in special.items():
            if role not in KNOWN or type(id) is not int or id < 0:
                raise BadInput(f"special: expected {', '.join(KNOWN)} with an id each, got {role}={id!r}; give ids")
        vocabulary = inner.get_vocab()
        roles = {role: next((s for s in strings if s in vocabulary), None) for role, strings in KNOWN.items()}
        inner.add_special_tokens([string for string in roles.values() if string])  # even if they are ordinary
        inner.encode_special_tokens = True  # in a text they are ordinary characters
        inner.no_truncation()  # the file may ask for truncation or padding; a text is read whole and alone
        inner.no_padding()
        ids = {role: vocabulary.get(string) for role, string in roles.items()} | special
        self.mask_id, self.eos_id, self.bos_id, self.pad_id = (ids[role] for role in KNOWN)
        self.inner = inner
        known_ids = [*vocabulary.values(), *(id for id in ids.values() if id is not None)]
        self.vocab_size: int = max(known_ids, default=-1) + 1  # more than there are tokens if ids have gaps
        self.unk_id = vocabulary.get(getattr(inner.model, "unk_token", None))
        added = {id for id, token in inner.get_added_tokens_decoder().items() if token.special}
        self.special_ids = frozenset(added | {self.mask_id} - {None})
        # With one character per token a dictionary is ten times as fast, and can name a character that is missing.
        ordinary = {token: id for token, id in vocabulary.items() if id not in self.special_ids}
        by_character = isinstance(inner.model, models.WordLevel) and inner.normalizer is None
        self.id_of_character = ordinary if by_character and all(len(token) == 1 for token in ordinary) else None

    @classmethod
    def characters(cls, text_chunks: Iterable[str]) -> "Tokenizer":
        """Make a vocabulary of the special tokens and every character of the text, in order of code points."""
        seen: set[str] = set()
        for chunk in text_chunks:
            seen.update(chunk)
        refuse_surrogates("".join(seen))
        vocabulary = {token: id for id, token in enumerate(OURS + sorted(seen))}
        inner = tokenizers.Tokenizer(models.WordLevel(vocabulary))
        inner.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
        inner.decoder = decoders.Fuse()
        return cls(inner)

    @classmethod
    def bytes(cls) -> "Tokenizer":
        """Make a vocabulary of the special tokens and the 256 bytes: BPE without merges, which encodes any text."""
        return cls.bpe([], len(OURS) + 256)

    @classmethod
    def bpe(cls, text_chunks: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Learn byte-level byte-pair encoding from the text, which then encodes any text. Same text, same merges."""
        least = len(OURS) + 256
        check_whole("vocab_size", vocab_size, least, LIMITS["vocab_size"], fix=f"try {least}")
        inner = tokenizers.Tokenizer(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        given = {"special_tokens": OURS, "initial_alphabet": sorted(pre_tokenizers.ByteLevel.alphabet())}
        trainer = trainers.BpeTrainer(vocab_size=vocab_size, show_progress=False, **given)
        with no_panic("text: expected Unicode text to train on", "use another text"):
            inner.train_from_iterator(text_chunks, trainer)
        return cls(inner)

    @classmethod
    def load(cls, path_or_dir: str | Path, special: Mapping[str, int] | None = None) -> "Tokenizer":
        """Read a `tokenizer.json`; `special` has ids of roles whose strings are unknown. Raises BadInput, BadLuck."""
        path = Path(path_or_dir)
        path = path / "tokenizer.json" if path.is_dir() else path
        with one_line(f"{path}: expected a readable file", "check its permissions"):
            if not path.is_file():  # a FIFO would block
                raise BadLuck(f"{path}: expected a tokenizer.json, got no such file; give the directory that holds one")
            with open(path, "rb") as file:
                data = file.read(MAX_FILE + 1)
        if len(data) > MAX_FILE:
            raise BadInput(f"{path}: expected at most {MAX_FILE} bytes, got more; give a tokenizer.json")
        with no_panic(f"{path}: expected a valid tokenizer.json", "download or make it again"):
            return cls(tokenizers.Tokenizer.from_buffer(data), special)

    def to_json(self) -> str:
        """Return the text that `save` writes."""
        return self.inner.to_str(pretty=True)

    def save(self, directory: str | Path) -> None:
        """Write `directory/tokenizer.json` whole or not at all. Raises BadLuck."""
        write_file(Path(directory) / "tokenizer.json", [self.to_json().encode()])

    def encode(self, text: str) -> list[int]:
        """Return the ids of the text, without a beginning or end token. Raises BadInput if it cannot be encoded."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, unpadded. Raises BadInput."""
        if self.id_of_character is not None:
            return [self._encode_characters(text) for text in texts]
        for text in texts:
            refuse_surrogates(text)
        with no_panic("text: expected text this tokenizer can encode", "use another text or tokenizer"):
            rows = [e.ids for e in self.inner.encode_batch_fast(list(texts), add_special_tokens=False)]
        untypeable = self.special_ids - {self.unk_id}
        for row in rows:  # some vocabularies hold "[MASK]" as an ordinary word too
            if not untypeable.isdisjoint(row):
                token = self.token(next(id for id in row if id in untypeable))
                raise BadInput(f"text: expected no special tokens, got {token!r}; write it in another way")
        return rows

    def _encode_characters(self, text: str) -> list[int]:
        try:
            return list(map(self.id_of_character.__getitem__, text))
        except KeyError:
            strange = dict.fromkeys(c for c in text if c not in self.id_of_character)
            got = listed([f"{c!a} (U+{ord(c):04X})" for c in strange], most=5)
            fix = "remove them or use bytes or BPE"
            raise BadInput(f"text: expected characters of the vocabulary, got {got}; {fix}") from None

    def encode_with_masks(self, text: str) -> list[int]:
        """Return the ids for infilling: each "[MASK]" is one hole (mask_id), the texts between are encoded apart."""
        texts = text.split(KNOWN["mask"][0])
        return self._with_holes(texts, [1] * (len(texts) - 1))

    def encode_to_edit(self, text: str) -> list[int]:
        """Return the ids for editing: each "[[span]]", with a blank before it, is as many holes as it has tokens."""
        pieces = re.split(r"( ?)\[\[(.+?)\]\]", text, flags=re.DOTALL)  # given, blank, span, ..., given
        spans = self.encode_batch([blank + span for blank, span in zip(pieces[1::3], pieces[2::3], strict=True)])
        return self._with_holes(pieces[::3], [len(span) for span in spans])

    def _with_holes(self, texts: list[str], holes: list[int]) -> list[int]:
        if self.mask_id is None:
            raise BadInput("tokenizer: expected a mask token, got none; load it with special={'mask': id}")
        given = zip(self.encode_batch(texts), [*holes, 0], strict=True)
        return [id for ids, n in given for id in (*ids, *[self.mask_id] * n)]

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Return the text of the ids; bytes that are not UTF-8 become U+FFFD. Raises BadInput for an unknown id."""
        ids = [int(id) for id in ids]
        if strange := [id for id in ids if not 0 <= id < self.vocab_size]:
            raise BadInput(f"ids: expected 0 to {self.vocab_size - 1}, got {strange[0]}; use the model's tokenizer")
        if skip_special:
            ids = [id for id in ids if id not in self.special_ids]
        with no_panic("ids: expected ids this tokenizer can decode", "check tokenizer.json"):
            return self.inner.decode(ids, skip_special_tokens=False)

    def token(self, id: int) -> str:
        """Return the text of one token, special ones too; U+FFFD for part of a character, `<id>` for an unused id."""
        known = 0 <= id < self.vocab_size and self.inner.id_to_token(id) is not None
        return self.decode([id], skip_special=False) if known else f"<{id}>"


def refuse_surrogates(text: str, what: str = "text") -> None:
    """Raise BadInput for half a UTF-16 pair, which is not a character although a Python string can hold it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = f"the lone surrogate U+{ord(text[error.start]):04X} at {error.start}"
        raise BadInput(f"{what}: expected Unicode text, got {found}; remove it") from None
