"""Text <-> ids: nothing lost, nothing altered, nothing typed that becomes a special token."""

import json
import os
import time

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from minillada.errors import BadInput, BadLuck
from minillada.text import tokenizer as module
from minillada.text.tokenizer import OURS, Tokenizer, display

TEXT = "the cat sat on the [MASK] mat, the cat sat.\r\nEin Bär\t€ 😀\n"
MAKERS = {
    "characters": lambda: Tokenizer.characters([TEXT[:20], TEXT[20:]]),
    "bytes": Tokenizer.bytes,
    "bpe": lambda: Tokenizer.bpe([TEXT] * 3, 280),
}
BYTES, BPE = MAKERS["bytes"](), MAKERS["bpe"]()


@pytest.fixture(params=MAKERS)
def tokenizer(request):
    return MAKERS[request.param]()


def edited(tmp_path, **changes):
    """A tokenizer.json of ours with some entries changed."""
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(json.loads(BYTES.to_json()) | changes), encoding="utf-8")
    return path


def test_decoding_gives_the_text_back_with_its_line_ends(tokenizer):
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert tokenizer.encode("") == [] and tokenizer.decode([]) == ""


@settings(max_examples=100, deadline=None)
@given(st.text())
def test_bytes_and_bpe_give_any_text_back(text):
    assert BYTES.decode(BYTES.encode(text)) == text
    assert BPE.decode(BPE.encode(text)) == text
    assert len(BYTES.encode(text)) == len(text.encode())


def test_a_typed_special_token_stays_text(tokenizer):
    for string in ("[MASK]",) if tokenizer.id_of_character else OURS:
        ids = tokenizer.encode(string)
        assert len(ids) > 1 and tokenizer.special_ids.isdisjoint(ids)
        assert tokenizer.decode(ids) == string


def test_masks_of_an_infilling_are_holes_and_the_text_between_is_encoded_apart(tokenizer):
    ids = tokenizer.encode_with_masks("the [MASK][MASK]cat")
    assert ids == [*tokenizer.encode("the "), tokenizer.mask_id, tokenizer.mask_id, *tokenizer.encode("cat")]
    assert tokenizer.encode_with_masks("[MASK]") == [tokenizer.mask_id]


def test_a_span_to_edit_is_as_many_holes_as_its_words_have_tokens(tokenizer):
    ids, span = tokenizer.encode_to_edit("the [[cat\nsat]] on"), tokenizer.encode(" cat\nsat")
    assert ids == [*tokenizer.encode("the"), *[tokenizer.mask_id] * len(span), *tokenizer.encode(" on")]
    assert tokenizer.encode_to_edit("the [cat] sat") == tokenizer.encode("the [cat] sat")
    two = tokenizer.encode_to_edit("[[a]][[t]]")
    assert two == [tokenizer.mask_id] * len(tokenizer.encode("a") + tokenizer.encode("t"))


def test_our_special_tokens_come_first_and_are_skipped_by_decode(tokenizer):
    assert (tokenizer.mask_id, tokenizer.eos_id, tokenizer.bos_id, tokenizer.pad_id) == (0, 1, 2, 3)
    ids = [2, *tokenizer.encode("cat"), 0, 1, 3]
    assert tokenizer.decode(ids) == "cat"
    assert tokenizer.decode(ids, skip_special=False) == "[BOS]cat[MASK][EOS][PAD]"


def test_a_batch_is_its_rows_one_at_a_time(tokenizer):
    texts = ["the cat", "", "sat on the mat" * 5]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


def test_saving_and_loading_changes_nothing(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "new")
    again = Tokenizer.load(tmp_path / "new")
    assert again.encode(TEXT) == tokenizer.encode(TEXT) and again.to_json() == tokenizer.to_json()
    assert (again.mask_id, again.vocab_size) == (tokenizer.mask_id, tokenizer.vocab_size)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["tokenizer.json"]


def test_the_saved_file_means_the_same_to_the_library_itself(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    plain = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    text = TEXT.replace("[MASK]", "")
    assert plain.encode(text).ids == tokenizer.encode(text) and plain.decode(tokenizer.encode(text)) == text


def test_bpe_is_deterministic_and_merges():
    assert MAKERS["bpe"]().to_json() == BPE.to_json()
    assert len(BPE.encode("the cat")) < len(BYTES.encode("the cat"))
    assert BYTES.vocab_size == 260 and BPE.vocab_size == 280


def test_characters_outside_the_vocabulary_are_named():
    with pytest.raises(BadInput, match=r"'\\u4e2d' \(U\+4E2D\), '~' \(U\+007E\)"):
        MAKERS["characters"]().encode("the 中 cat~")


def test_a_lone_surrogate_is_refused(tokenizer):
    with pytest.raises(BadInput, match="U\\+D800"):
        tokenizer.encode("the \ud800")
    with pytest.raises(BadInput):
        Tokenizer.characters(["\ud800"])
    with pytest.raises(BadInput):
        Tokenizer.bpe(["\ud800"], 260)


def test_ids_outside_the_vocabulary_are_refused(tokenizer):
    for strange in (-1, tokenizer.vocab_size):
        with pytest.raises(BadInput, match="ids: expected 0 to"):
            tokenizer.decode([5, strange])
        assert tokenizer.token(strange) == f"<{strange}>"


def test_a_token_on_its_own_is_readable():
    assert BPE.token(0) == "[MASK]"
    assert [BPE.token(id) for id in BPE.encode(" the")] == [" the"]
    assert BYTES.token(BYTES.encode("é")[0]) == "\ufffd"


@pytest.mark.parametrize("size", [259, -1, True, 300.0])
def test_a_vocabulary_without_room_for_the_bytes_is_refused(size):
    with pytest.raises(BadInput, match="vocab_size"):
        Tokenizer.bpe([TEXT], size)


def test_special_tokens_of_known_models_are_found_and_can_be_overruled(tmp_path):
    text = BYTES.to_json().replace('"special": true', '"special": false')
    for ours, theirs in zip(OURS, ("<|mdm_mask|>", "<|endoftext|>", "<|startoftext|>", "<|x|>"), strict=True):
        text = text.replace(ours, theirs)
    path = tmp_path / "tokenizer.json"
    path.write_text(text, encoding="utf-8")
    found = Tokenizer.load(path)
    assert (found.mask_id, found.eos_id, found.bos_id, found.pad_id) == (0, 1, 2, 1)
    assert found.decode(found.encode("<|mdm_mask|>")) == "<|mdm_mask|>"
    overruled = Tokenizer.load(path, special={"mask": 300, "pad": 7, "bos": None})
    assert (overruled.mask_id, overruled.pad_id, overruled.bos_id, overruled.vocab_size) == (300, 7, 2, 301)
    for wrong in ({"mask": -1}, {"mask": "[MASK]"}, {"unk": 3}):
        with pytest.raises(BadInput, match="special"):
            Tokenizer.load(path, special=wrong)


def test_a_mask_word_inside_the_vocabulary_cannot_be_typed(tmp_path):
    model = {"type": "WordLevel", "unk_token": "?", "vocab": {"[MASK]": 0, "cat": 1, "?": 2}}
    words = Tokenizer.load(edited(tmp_path, model=model, added_tokens=[], pre_tokenizer={"type": "WhitespaceSplit"}))
    assert words.encode("cat dog") == [1, 2]
    with pytest.raises(BadInput, match="no special tokens"):
        words.encode("cat [MASK]")
    assert words.encode_with_masks("cat [MASK]") == [1, 0]


def test_a_file_that_truncates_or_pads_does_not_do_so_here(tmp_path):
    truncation = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    assert len(Tokenizer.load(edited(tmp_path, truncation=truncation)).encode("abcd")) == 4


def test_a_tokenizer_file_that_is_missing_is_bad_luck(tmp_path):
    for path in (tmp_path, tmp_path / "no.json"):
        with pytest.raises(BadLuck, match=r"tokenizer\.json"):
            Tokenizer.load(path)


def test_a_tokenizer_file_that_is_broken_or_too_large_is_one_line(tmp_path, monkeypatch):
    path = tmp_path / "tokenizer.json"
    whole = BYTES.to_json().encode()
    for data in (b"", b"{}", b"[1]", b"\xff\xfe", whole[: len(whole) // 2]):
        path.write_bytes(data)
        with pytest.raises(BadInput) as error:
            Tokenizer.load(path)
        assert "\n" not in str(error.value)
    path.write_bytes(whole)
    monkeypatch.setattr(module, "MAX_FILE", 1000)
    with pytest.raises(BadInput, match="at most 1000 bytes"):
        Tokenizer.load(path)


def test_a_panic_of_the_library_is_bad_input(tmp_path):
    with pytest.raises(BadInput, match="charsmap"):
        Tokenizer.load(edited(tmp_path, normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}))
    panics = Tokenizer.load(edited(tmp_path, pre_tokenizer={"type": "FixedLength", "length": 0}))
    with pytest.raises(BadInput, match="chunk size") as error:
        panics.encode("cat")
    line = str(error.value)
    assert "\n" not in line and line.startswith("text: expected text this tokenizer can encode, got '")
    assert line.endswith("; use another text or tokenizer")


def test_saving_where_nothing_can_be_written_is_bad_luck_and_leaves_the_old_file(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadLuck):
        BYTES.save(tmp_path / "file")
    (tmp_path / "tokenizer.json").write_text("old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(BadLuck, match="No space left"):
        BYTES.save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "tokenizer.json"]
    assert (tmp_path / "tokenizer.json").read_text() == "old"


def test_a_pasted_megabyte_is_quick(tokenizer):
    start = time.perf_counter()
    for text in ("the cat sat " * 87_000, "t" * 1_000_000):
        assert len(tokenizer.encode(text)) > 1000
    assert time.perf_counter() - start < 10


def test_display_makes_harmless_what_a_terminal_would_obey():
    assert display("a\tb\n") == "a\tb\n"
    assert display("\x1b[2Jé\r\x07\x7f") == "␛[2Jé␍␇␡"
    assert display("\x9b2J\u202e\u2066\ud800") == "�2J���"


@given(st.text(st.characters(max_codepoint=0x2100)))
def test_display_keeps_the_width_and_leaves_no_control(text):
    shown = display(text)
    assert len(shown) == len(text)
    assert all(c.isprintable() or c in "\n\t" or ord(c) in (0xA0, 0xAD) or ord(c) > 0xFF for c in shown)
