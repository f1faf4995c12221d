"""Text <-> ids: characters, bytes, byte-level BPE and any real `tokenizer.json`, all behind one small class.

Ids are plain lists of int. Text is never altered (no lower-casing, no CRLF change) and never becomes a special token:
a typed "[MASK]" is six ordinary characters, unless `encode_with_masks` is asked to read it as a hole.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from ..errors import BadInput, BadLuck, check_whole
from ..files import one_line, write_file

# The strings that known models use for each role, ours first; LLaDA and LLaDA-MoE pad with their end of text.
KNOWN = {
    "mask": ("[MASK]", "<|mdm_mask|>", "<|mask|>", "<mask>"),
    "eos": ("[EOS]", "<|endoftext|>", "</s>"),
    "bos": ("[BOS]", "<|startoftext|>", "<s>"),
    "pad": ("[PAD]", "<pad>", "<|endoftext|>"),
}
OURS = [strings[0] for strings in KNOWN.values()]  # ids 0 to 3 of the vocabularies made here
MAX_FILE = 100_000_000  # bytes of a tokenizer.json

# Shown in place of what a terminal would obey, one sign for one: pictures of the C0 controls (all but \n and \t), and
# U+FFFD for C1 controls, for signs that turn lines or the writing direction, and for lone surrogates (unprintable).
HARMLESS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {0x7F: 0x2421}
for first, last in [(0x80, 0x9F), (0x200E, 0x200F), (0x2028, 0x202E), (0x2066, 0x2069), (0xD800, 0xDFFF)]:
    HARMLESS |= dict.fromkeys(range(first, last + 1), 0xFFFD)

# The library raises bare `Exception`s, and its panics are not even those.
no_panic = partial(one_line, faults=BaseException)


def display(text: str) -> str:
    """The text with everything a terminal would obey made visible and harmless; newlines and tabs stay."""
    return text.translate(HARMLESS)


class Tokenizer:
    """One wrapper round `tokenizers.Tokenizer`; make one with `characters`, `bytes`, `bpe` or `load`."""

    def __init__(self, inner: tokenizers.Tokenizer, special: Mapping[str, int] | None = None) -> None:
        special = {role: id for role, id in (special or {}).items() if id is not None}
        for role, id in special.items():
            if role not in KNOWN or type(id) is not int or id < 0:
                raise BadInput(f"special: expected {', '.join(KNOWN)} with an id each, got {role}={id!r}; mend it")
        vocabulary = inner.get_vocab()
        roles = {role: next((s for s in strings if s in vocabulary), None) for role, strings in KNOWN.items()}
        inner.add_special_tokens([string for string in roles.values() if string])  # even if the file says ordinary
        inner.encode_special_tokens = True  # in a text they are only text
        inner.no_truncation()  # a file may ask for either; a text is always read whole and alone
        inner.no_padding()
        ids = {role: vocabulary.get(string) for role, string in roles.items()} | special
        self.mask_id, self.eos_id, self.bos_id, self.pad_id = (ids[role] for role in KNOWN)
        self.inner = inner
        known_ids = [*vocabulary.values(), *(id for id in ids.values() if id is not None)]
        self.vocab_size: int = max(known_ids, default=-1) + 1  # where ids have gaps, more than there are tokens
        self.unk_id = vocabulary.get(getattr(inner.model, "unk_token", None))
        added = {id for id, token in inner.get_added_tokens_decoder().items() if token.special}
        self.special_ids = frozenset(added | {self.mask_id} - {None})
        # One character per token needs no library: a dictionary is ten times as fast and knows what it does not know.
        ordinary = {token: id for token, id in vocabulary.items() if id not in self.special_ids}
        by_character = isinstance(inner.model, models.WordLevel) and inner.normalizer is None
        self.id_of_character = ordinary if by_character and all(len(token) == 1 for token in ordinary) else None

    @classmethod
    def characters(cls, text_chunks: Iterable[str]) -> "Tokenizer":
        """The special tokens, then every character of the text in order of its code point."""
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
        """The special tokens and the 256 bytes of UTF-8: BPE that has seen nothing and merges nothing."""
        return cls.bpe([], len(OURS) + 256)

    @classmethod
    def bpe(cls, text_chunks: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Byte-level byte-pair encoding trained on the text; every text is encodable. Same text, same merges."""
        least = len(OURS) + 256
        check_whole("vocab_size", vocab_size, least, fix=f"try {least}")
        inner = tokenizers.Tokenizer(models.BPE())
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=OURS, initial_alphabet=alphabet, show_progress=False
        )
        with no_panic("text: expected Unicode text to train on", "mend the text"):
            inner.train_from_iterator(text_chunks, trainer)
        return cls(inner)

    @classmethod
    def load(cls, path_or_dir: str | Path, special: Mapping[str, int] | None = None) -> "Tokenizer":
        """Read a `tokenizer.json`. `special` gives ids by role (mask, eos, bos, pad) where its strings do not tell.

        Raises BadLuck if the file cannot be read, BadInput if it is not a tokenizer of at most 100 MB.
        """
        path = Path(path_or_dir)
        path = path / "tokenizer.json" if path.is_dir() else path
        with one_line(f"{path}: expected a readable file", "check its permissions"):
            if not path.is_file():  # a FIFO would block
                raise BadLuck(f"{path}: expected a tokenizer.json, got no such file; give the directory that holds one")
            with open(path, "rb") as file:
                data = file.read(MAX_FILE + 1)
        if len(data) > MAX_FILE:
            raise BadInput(f"{path}: expected at most {MAX_FILE} bytes, got more; is it a tokenizer.json?")
        with no_panic(f"{path}: expected a valid tokenizer.json", "download or make it again"):
            return cls(tokenizers.Tokenizer.from_buffer(data), special)

    def to_json(self) -> str:
        """What `save` writes."""
        return self.inner.to_str(pretty=True)

    def save(self, directory: str | Path) -> None:
        """Write `directory/tokenizer.json`, whole or not at all. Raises BadLuck."""
        write_file(Path(directory) / "tokenizer.json", [self.to_json().encode()])

    def encode(self, text: str) -> list[int]:
        """The ids of the text, nothing added in front or behind. Raises BadInput for text outside the vocabulary."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, unpadded."""
        if self.id_of_character is not None:
            return [self._encode_characters(text) for text in texts]
        for text in texts:
            refuse_surrogates(text)
        with no_panic("text: expected text this tokenizer can encode", "use another text or tokenizer"):
            rows = [e.ids for e in self.inner.encode_batch_fast(list(texts), add_special_tokens=False)]
        untypeable = self.special_ids - {self.unk_id}
        for row in rows:  # some vocabularies also hold "[MASK]" as a word
            if not untypeable.isdisjoint(row):
                token = self.token(next(id for id in row if id in untypeable))
                raise BadInput(f"text: expected no special tokens, got {token!r}; write it in another way")
        return rows

    def _encode_characters(self, text: str) -> list[int]:
        try:
            return list(map(self.id_of_character.__getitem__, text))
        except KeyError:
            strange = dict.fromkeys(c for c in text if c not in self.id_of_character)
            named = ", ".join(f"{c!a} (U+{ord(c):04X})" for c in list(strange)[:5])
            raise BadInput(
                f"text: expected characters of the vocabulary, got {named}{', ...' * (len(strange) > 5)}; "
                "remove them or use bytes or BPE"
            ) from None

    def encode_with_masks(self, text: str) -> list[int]:
        """For infilling: each literal "[MASK]" is one hole (mask_id), the texts between are encoded apart."""
        if self.mask_id is None:
            raise BadInput("tokenizer: expected a mask token, got none; load it with special={'mask': id}")
        first, *others = self.encode_batch(text.split(KNOWN["mask"][0]))
        return first + [id for ids in others for id in (self.mask_id, *ids)]

    def encode_to_edit(self, text: str) -> list[int]:
        """For editing: each "[[span]]" is as many holes as its words, with a blank before them, have tokens."""
        if self.mask_id is None:
            raise BadInput("tokenizer: expected a mask token, got none; load it with special={'mask': id}")
        pieces = re.split(r"( ?)\[\[(.+?)\]\]", text, flags=re.DOTALL)  # given, blank, span, ..., given
        spans = self.encode_batch([blank + span for blank, span in zip(pieces[1::3], pieces[2::3], strict=True)])
        given = self.encode_batch(pieces[::3])
        return [id for ids, span in zip(given, [*spans, []], strict=True) for id in (*ids, *[self.mask_id] * len(span))]

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of the ids; bytes that are no UTF-8 become U+FFFD. Raises BadInput for an unknown id."""
        ids = [int(id) for id in ids]
        strange = next((id for id in ids if not 0 <= id < self.vocab_size), None)
        if strange is not None:
            raise BadInput(f"ids: expected 0 to {self.vocab_size - 1}, got {strange}; is it this model's tokenizer?")
        if skip_special:
            ids = [id for id in ids if id not in self.special_ids]
        with no_panic("ids: expected ids this tokenizer can decode", "check tokenizer.json"):
            return self.inner.decode(ids, skip_special_tokens=False)

    def token(self, id: int) -> str:
        """What one token shows alone, special ones too; U+FFFD for part of a character, `<id>` for an unused id."""
        known = 0 <= id < self.vocab_size and self.inner.id_to_token(id) is not None
        return self.decode([id], skip_special=False) if known else f"<{id}>"


def refuse_surrogates(text: str, what: str = "text") -> None:
    """Half a UTF-16 pair is no character, though a Python string can hold it. Raises BadInput."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = f"the lone surrogate U+{ord(text[error.start]):04X} at {error.start}"
        raise BadInput(f"{what}: expected Unicode text, got {found}; remove it") from None
