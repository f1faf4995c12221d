"""Text of any size and kind to ids on disk, faults named, and batches that repeat."""

import hashlib
import http.server
import json
import os
import sys
import threading
import tracemalloc

import numpy as np
import pytest
import torch

from minillada import data
from minillada.data import batches, cache_dir, read_text, tokenise, validation_batch
from minillada.errors import BadInput, BadLuck
from minillada.tokenizer import Tokenizer

posix = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX files")
BYTES = Tokenizer.bytes()


@pytest.fixture
def file(tmp_path):
    """Write bytes to a file of that name; its path."""

    def write(content, name="text.txt"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def whole(source, **options):
    return "".join(read_text(source, **options))


# ---- reading


def test_the_default_corpus_comes_with_python():
    from pydoc_data.topics import topics

    assert whole("docs") == "\n".join(topics.values()) and len(whole("docs")) > 400_000


def test_the_tales_are_about_a_megabyte_and_always_the_same():
    text = whole("tales")
    assert 0.9e6 < len(text) < 1.3e6 and text == whole("tales") and text.count("\n") == 2500


def test_line_ends_become_lf_and_a_byte_order_mark_is_dropped_wherever_the_reads_cut(file, monkeypatch):
    path = file(b"\xef\xbb\xbfa\r\n\xe2\x82\xac\rb\n\r\n\xf0\x9f\x98\x80\r")
    for chunk in range(1, 12):
        monkeypatch.setattr(data, "CHUNK", chunk)
        assert whole(path) == "a\n€\nb\n\n😀\n"


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 1 << 18])
@pytest.mark.parametrize("bad, offset", [(b"ab\xff", 2), ("é€".encode() + b"\x80x", 5), (b"\xef\xbb\xbfa\xe2\x82", 4)])
def test_what_is_not_utf8_is_named_with_file_and_offset(file, monkeypatch, chunk, bad, offset):
    monkeypatch.setattr(data, "CHUNK", chunk)
    with pytest.raises(BadInput, match=rf"text\.txt: .* at offset {offset};"):
        whole(file(bad))


def test_a_binary_file_is_refused(file):
    with pytest.raises(BadInput, match="NUL"):
        whole(file(b"ab\0cd"))


def test_a_name_that_is_neither_corpus_nor_path_lists_the_corpora(tmp_path):
    for name in ("shakespear", tmp_path / "gone.txt", "x" * 5000):
        with pytest.raises(BadLuck, match="docs, tales, shakespeare or a path"):
            whole(name)


@posix
def test_a_fifo_is_refused_and_never_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    with pytest.raises(BadInput, match="regular file"):
        whole(tmp_path / "pipe.txt")


@posix
@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_bad_luck(file):
    path = file("a")
    path.chmod(0)
    with pytest.raises(BadLuck, match="permissions"):
        whole(path)


def test_a_directory_is_its_text_files_in_order(file, tmp_path):
    for name in ("b.txt", "a/z.md", "c.bin", "a/y.TXT"):
        file(name, f"d/{name}")
    assert whole(tmp_path / "d") == "a/y.TXTa/z.mdb.txt"
    assert whole([tmp_path / "d/b.txt", tmp_path / "d/a"]) == "b.txta/y.TXTa/z.md"


def test_a_directory_without_text_is_refused(file, tmp_path):
    file("x", "d/c.bin")
    with pytest.raises(BadInput, match=r"\.txt or \.md"):
        whole(tmp_path / "d")


def test_jsonl_gives_the_chosen_field(file):
    path = file('\ufeff{"text": "a\\r\\nb", "title": "T"}\n\n{"text": "c", "title": "U"}', "d.jsonl")
    assert whole(path) == "a\nbc" and whole(path, field="title") == "TU"


@pytest.mark.parametrize(
    "line",
    [b"{", b"\xff", b"{}", b'["text"]', b'{"text": 1}', b'{"text": "\\ud800"}', b'{"text": "\\u0000"}', b"[" * 99999],
)
def test_a_line_of_jsonl_that_cannot_be_used_is_named_by_number(file, line):
    with pytest.raises(BadInput, match=r"d\.jsonl, line 2") as error:
        whole(file(b'{"text": "a"}\n' + line + b"\n", "d.jsonl"))
    assert "\n" not in str(error.value)


def test_a_line_of_jsonl_that_is_too_long_is_refused(file, monkeypatch):
    monkeypatch.setattr(data, "MAX_LINE", 20)
    with pytest.raises(BadInput, match="at most 20 bytes"):
        whole(file('{"text": "aaaaaaaaaaaaaaaaaaaa"}', "d.jsonl"))


def test_memory_does_not_grow_with_the_length_of_a_line(file, tmp_path):
    path = file(b"all in one line " * 500_000)  # 8 MB
    tokenizer = Tokenizer.characters(read_text(path))
    tracemalloc.start()
    tokens = tokenise(path, tokenizer, tmp_path / "ids")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(tokens.train) + len(tokens.val) == 8_000_000 and peak < 6e6


# ---- ids on disk


def test_the_split_is_nine_to_one_by_characters_and_loses_nothing(file, tmp_path):
    text = "".join(f"{i} Bär €. " for i in range(2000))
    tokens = tokenise(file(text), BYTES, tmp_path / "ids")
    cut = len(text) * 9 // 10
    assert BYTES.decode(tokens.train) == text[:cut] and BYTES.decode(tokens.val) == text[cut:]
    assert isinstance(tokens.train, np.memmap) and tokens.train.dtype == np.uint16
    assert tokens.characters_per_token == len(text[cut:]) / len(tokens.val)
    assert tokens.bytes_per_token == 1.0


def test_the_chunks_read_do_not_change_the_characters(file, tmp_path, monkeypatch):
    path = file("Bär € 😀\r\n" * 50)
    at_once = tokenise(path, BYTES, tmp_path / "ids")
    for chunk in (3, 4, 5, 7, 30):
        monkeypatch.setattr(data, "CHUNK", chunk)
        in_pieces = tokenise(path, BYTES, tmp_path / str(chunk))
        assert np.array_equal(at_once.train, in_pieces.train) and np.array_equal(at_once.val, in_pieces.val)
        assert at_once.fingerprint == in_pieces.fingerprint


def test_documents_are_separated_by_eos(file, tmp_path):
    path = file('{"text": "aaaa"}\n{"text": "bbbb"}\n{"text": "cc"}', "d.jsonl")
    tokens = tokenise(path, BYTES, tmp_path / "ids")
    assert BYTES.decode([*tokens.train, *tokens.val], skip_special=False) == "aaaa[EOS]bbbb[EOS]cc"
    assert BYTES.decode(tokens.val) == "c" and tokens.characters_per_token == 1
    endless = Tokenizer.bytes()
    endless.eos_id = None
    with pytest.raises(BadInput, match="eos"):
        tokenise(path, endless, tmp_path / "ids")


def test_the_fingerprint_knows_where_documents_end(file, tmp_path):
    pairs = [("ab", "cd"), ("abc", "d")]
    sources = [[file(a, f"{a}/1"), file(b, f"{a}/2")] for a, b in pairs]
    assert len({tokenise(source, BYTES, tmp_path / "ids").fingerprint for source in sources}) == 2


def test_files_are_reused_until_the_text_or_the_tokenizer_changes(file, tmp_path):
    path, ids = file("the cat sat on the mat " * 9), tmp_path / "ids"

    def written():
        return {p.name: p.stat().st_mtime_ns for p in ids.iterdir()}

    first = tokenise(path, BYTES, ids).fingerprint
    before = written()
    assert len(before) == 3
    assert tokenise(path, BYTES, ids).fingerprint == first and written() == before
    assert tokenise(path, Tokenizer.bpe(["the cat"], 262), ids).fingerprint != first and len(written()) == 6
    path.write_text("the dog sat on the mat " * 9)
    assert tokenise(path, BYTES, ids).fingerprint != first and len(written()) == 9
    assert before.items() <= written().items()


def test_a_damaged_file_of_ids_is_made_again(file, tmp_path):
    path = file("the cat sat on the mat")
    tokens = tokenise(path, BYTES, tmp_path / "ids")
    right = tokens.train.tolist()
    del tokens
    for name, content in (("*.train.bin", b"abc"), ("*.json", b"{}"), ("*.json", b"nonsense")):
        next((tmp_path / "ids").glob(name)).write_bytes(content)
        assert tokenise(path, BYTES, tmp_path / "ids").train.tolist() == right


def test_a_fault_on_the_way_leaves_no_files(file, tmp_path):
    letters = Tokenizer.characters(["ab"])
    with pytest.raises(BadInput, match=r"U\+0063"):
        tokenise(file("ab" * 50 + "c"), letters, tmp_path / "ids")
    assert list((tmp_path / "ids").iterdir()) == []


def test_large_vocabularies_are_written_wide(file, tmp_path):
    BYTES.save(tmp_path)
    wide = Tokenizer.load(tmp_path, special={"mask": 70_000})
    assert tokenise(file("the cat sat"), wide, tmp_path / "ids").train.dtype == np.uint32


def test_text_that_is_empty_or_shorter_than_the_context_is_refused(file, tmp_path):
    for content in (b"", b"\xef\xbb\xbf"):
        with pytest.raises(BadInput, match="expected some text"):
            tokenise(file(content), BYTES, tmp_path / "ids")
    with pytest.raises(BadInput, match="at least 11 tokens for val, got 10"):
        tokenise(file("a" * 100), BYTES, tmp_path / "ids", length=11)
    with pytest.raises(BadInput, match="for train, got 0"):
        tokenise(file("a"), BYTES, tmp_path / "ids")


# ---- batches


def test_batches_are_windows_of_the_tokens_and_reach_both_ends():
    tokens, generator = np.arange(10, dtype=np.uint16), torch.Generator().manual_seed(0)
    stream = batches(tokens, 4, 3, generator)
    rows = torch.cat([next(stream) for _ in range(50)])
    assert rows.shape == (200, 3) and rows.dtype == torch.long
    assert torch.equal(rows, rows[:, :1] + torch.arange(3)) and set(rows[:, 0].tolist()) == set(range(8))


def test_the_state_of_the_generator_is_all_there_is_to_resume_from():
    tokens, generator = np.arange(1000, dtype=np.uint16), torch.Generator().manual_seed(0)
    stream = batches(tokens, 2, 8, generator)
    next(stream)
    state = generator.get_state()
    expected = [next(stream) for _ in range(3)]
    again = batches(tokens, 2, 8, torch.Generator().set_state(state))
    assert all(torch.equal(x, next(again)) for x in expected)


def test_the_validation_batch_is_evenly_spaced_and_always_the_same():
    tokens = np.arange(101, dtype=np.uint32)
    batch = validation_batch(tokens, 5, 21)
    assert batch[:, 0].tolist() == [0, 20, 40, 60, 80] and batch[-1, -1] == 100 and batch.shape == (5, 21)
    assert torch.equal(batch, validation_batch(tokens, 5, 21))


@pytest.mark.parametrize("length", [0, 6])
def test_windows_longer_than_the_tokens_are_refused(length):
    tokens = np.arange(5, dtype=np.uint16)
    with pytest.raises(BadInput, match="length"):
        next(batches(tokens, 1, length, torch.Generator()))
    with pytest.raises(BadInput, match="length"):
        validation_batch(tokens, 1, length)


# ---- the cache and the one download


def test_the_cache_directory_can_be_chosen(monkeypatch, tmp_path):
    monkeypatch.setenv("MINILLADA_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.delenv("MINILLADA_CACHE")
    assert cache_dir().name == "minillada"


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A web server on this machine: set `.body`, read `.asked`. What is known of Shakespeare becomes a small text."""
    text = b"To be, or not to be\r\n"
    monkeypatch.setattr(data, "SHAKESPEARE_SIZE", len(text))
    monkeypatch.setattr(data, "SHAKESPEARE_SHA256", hashlib.sha256(text).hexdigest())
    monkeypatch.setenv("MINILLADA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.asked += 1
            self.send_response(200 if self.server.body else 404)
            self.end_headers()
            self.wfile.write(self.server.body)

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        server.body, server.asked, server.url = text, 0, f"http://127.0.0.1:{server.server_port}/"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


def test_shakespeare_is_downloaded_once(server):
    assert [whole_of(server), whole_of(server), server.asked] == ["To be, or not to be\n"] * 2 + [1]


def test_a_damaged_copy_of_shakespeare_is_downloaded_again(server):
    whole_of(server)
    (cache_dir() / "tinyshakespeare.txt").write_bytes(b"To be")
    assert whole_of(server) == "To be, or not to be\n" and server.asked == 2


@pytest.mark.parametrize("body", [b"", b"To be, or not to bee\n", b"To be" * 100_000])
def test_another_text_than_shakespeare_is_refused_and_not_kept(server, body):
    server.body = body
    with pytest.raises(BadLuck, match=r"save https://raw.* as .*tinyshakespeare\.txt, or use the data 'docs'"):
        whole_of(server)
    assert not cache_dir().exists()


def test_without_a_network_it_says_how_to_get_shakespeare_by_hand(server):
    with pytest.raises(BadLuck, match="shakespeare: expected to download") as error:
        list(data.shakespeare("http://127.0.0.1:9/"))
    assert "tinyshakespeare.txt" in str(error.value) and "\n" not in str(error.value)


def whole_of(server):
    return "".join(data.shakespeare(server.url))


def test_what_is_written_about_the_tokens_is_plain_json(file, tmp_path):
    tokenise(file("the cat sat on the mat"), BYTES, tmp_path / "ids")
    about = json.loads(next((tmp_path / "ids").glob("*.json")).read_bytes())
    assert about["dtype"] == "uint16" and about["val"] == {"tokens": 3, "characters": 3, "bytes": 3}
