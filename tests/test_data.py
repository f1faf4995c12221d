"""Text of any size and kind to ids on disk, faults named, and batches that repeat."""

import hashlib
import http.server
import itertools
import json
import os
import subprocess
import sys
import threading
import time
import tracemalloc

import numpy as np
import pytest
import torch

from minillada.errors import BadInput, BadLuck
from minillada.text import corpora
from minillada.text import ids as on_disk
from minillada.text.corpora import cache_dir, read_text
from minillada.text.ids import (
    batches,
    by_documents,
    document_batches,
    document_rows,
    tokenise,
    validation_batch,
    whole_documents,
)
from minillada.text.tokenizer import Tokenizer

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


def visible(directory):
    """The names there, without those of locks."""
    return sorted(path.name for path in directory.iterdir() if not path.name.startswith("."))


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
        monkeypatch.setattr(corpora, "CHUNK", chunk)
        assert whole(path) == "a\n€\nb\n\n😀\n"


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 1 << 18])
@pytest.mark.parametrize("bad, offset", [(b"ab\xff", 2), ("é€".encode() + b"\x80x", 5), (b"\xef\xbb\xbfa\xe2\x82", 4)])
def test_what_is_not_utf8_is_named_with_file_and_offset(file, monkeypatch, chunk, bad, offset):
    monkeypatch.setattr(corpora, "CHUNK", chunk)
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
    monkeypatch.setattr(corpora, "MAX_LINE", 20)
    with pytest.raises(BadInput, match="at most 20 bytes"):
        whole(file('{"text": "aaaaaaaaaaaaaaaaaaaa"}', "d.jsonl"))


def test_memory_does_not_grow_with_the_length_of_a_line(file, tmp_path, monkeypatch):
    monkeypatch.setattr(on_disk, "GROUP", corpora.CHUNK)
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
        monkeypatch.setattr(corpora, "CHUNK", chunk)
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
        return {path: path.stat().st_mtime_ns for path in ids.glob("*/*")}

    first = tokenise(path, BYTES, ids).fingerprint
    before = written()
    assert sorted(path.name for path in before) == ["counts.json", "manifest.json", "train.bin", "val.bin"]
    assert tokenise(path, BYTES, ids).fingerprint == first and written() == before
    assert tokenise(path, Tokenizer.bpe(["the cat"], 262), ids).fingerprint != first and len(visible(ids)) == 2
    path.write_text("the dog sat on the mat " * 9)
    assert tokenise(path, BYTES, ids).fingerprint != first and len(visible(ids)) == 3
    assert before.items() <= written().items()


DAMAGE = {
    "cut short": ("train.bin", b"abc"),
    "of the same size": ("train.bin", b"\1\0" * 19),
    "empty": ("val.bin", b""),
    "counts of nothing": ("counts.json", b"{}"),
    "counts of another text": ("counts.json", b'{"dtype": "uint16"}'),
    "no JSON": ("manifest.json", b"nonsense"),
    "a manifest of nothing": ("manifest.json", b'{"files": {}}'),
    "missing": ("counts.json", None),
}


@pytest.mark.parametrize(("name", "content"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_of_ids_is_made_again(name, content, file, tmp_path):
    path = file("the cat sat on the mat")
    tokens = tokenise(path, BYTES, tmp_path / "ids")
    train, val = tokens.train.tolist(), tokens.val.tolist()
    del tokens
    [damaged] = (tmp_path / "ids").glob(f"*/{name}")
    damaged.unlink() if content is None else damaged.write_bytes(content)
    again = tokenise(path, BYTES, tmp_path / "ids")
    assert again.train.tolist() == train and again.val.tolist() == val


def test_a_fault_on_the_way_leaves_no_files(file, tmp_path):
    letters = Tokenizer.characters(["ab"])
    with pytest.raises(BadInput, match=r"U\+0063"):
        tokenise(file("ab" * 50 + "c"), letters, tmp_path / "ids")
    assert visible(tmp_path / "ids") == []


@pytest.fixture
def story(file, monkeypatch):
    """A text of several documents and many groups, and what its ids are when each piece is encoded alone."""
    monkeypatch.setattr(corpora, "CHUNK", 64)
    monkeypatch.setattr(on_disk, "GROUP", 200)
    path = file("".join(json.dumps({"text": f"{i} sheep, Bär, €. " * 10}) + "\n" for i in range(9)), "d.jsonl")
    files = [path, file("the cat sat on the mat\r\n" * 30)]
    tokenizer = Tokenizer.bpe(["the cat sat on the mat, sheep"], 280)
    texts = [list(chunks) for chunks in corpora.documents(files)]
    cut, ids = sum(len(c) for chunks in texts for c in chunks) * 9 // 10, {"train": [], "val": []}
    for number, chunks in enumerate(texts):
        if number:
            ids["train" if cut > 0 else "val"].append(tokenizer.eos_id)
        for chunk in chunks:
            ids["train"] += tokenizer.encode(chunk[: max(cut, 0)])
            ids["val"] += tokenizer.encode(chunk[max(cut, 0) :])
            cut -= len(chunk)
    return files, tokenizer, ids


def test_ids_encoded_in_groups_are_those_of_each_piece_alone(story, tmp_path):
    files, tokenizer, ids = story
    tokens = tokenise(files, tokenizer, tmp_path / "ids")
    assert tokens.train.tolist() == ids["train"] and tokens.val.tolist() == ids["val"]


def contents(directory):
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("fault", [KeyboardInterrupt(), BadInput("no"), OSError(28, "No space left on device")])
def test_an_interruption_at_any_moment_leaves_nothing_and_starting_again_gives_the_same_files(
    fault, story, tmp_path, monkeypatch
):
    files, tokenizer, ids = story
    tokenise(files, tokenizer, tmp_path / "whole")
    moments, right = 0, Tokenizer.encode_batch

    def encode_batch(self, texts):
        if moments_left.pop():
            return right(self, texts)
        raise fault

    monkeypatch.setattr(Tokenizer, "encode_batch", encode_batch)
    while True:
        home = tmp_path / str(moments)
        moments_left = [*[True] * 100, False, *[True] * moments]
        try:
            tokenise(files, tokenizer, home)
            break  # there were not so many moments
        except (KeyboardInterrupt, BadInput, BadLuck):
            assert visible(home) == [] and not list(home.glob(".*.tmp"))
        tokens = tokenise(files, tokenizer, home)
        assert tokens.train.tolist() == ids["train"] and tokens.val.tolist() == ids["val"]
        assert contents(home) == contents(tmp_path / "whole")
        moments += 1
    assert moments > 7


def test_what_a_killed_process_left_is_removed(story, tmp_path):
    files, tokenizer, ids = story
    tokenise(files, tokenizer, tmp_path / "whole")
    [name] = visible(tmp_path / "whole")
    draft = tmp_path / "ids" / f".{name}.tmp"
    draft.mkdir(parents=True)
    (draft / ".train.bin.123.tmp").write_bytes(b"half")
    assert tokenise(files, tokenizer, tmp_path / "ids").train.tolist() == ids["train"]
    assert contents(tmp_path / "ids") == contents(tmp_path / "whole")


def test_a_text_that_changes_between_two_calls_has_files_of_its_own(file, story, tmp_path):
    files, tokenizer, ids = story
    tokenise(files, tokenizer, tmp_path / "ids")
    lf = file("the cat sat on the mat\n" * 30)  # the same text, read in other pieces
    same = tokenise(files, tokenizer, tmp_path / "ids")
    assert len(visible(tmp_path / "ids")) == 1 and same.val.tolist() == ids["val"]
    lf.write_text("the dog sat on the mat\n" * 30)
    assert "dog" in tokenizer.decode(tokenise(files, tokenizer, tmp_path / "ids").val)
    assert len(visible(tmp_path / "ids")) == 2


def test_a_text_that_changes_while_it_is_read_is_refused(story, tmp_path, monkeypatch):
    files, tokenizer, _ = story
    right = Tokenizer.encode_batch

    def encode_batch(self, texts):
        files[1].write_text("the rat sat on the mat\n" * 30)
        return right(self, texts)

    monkeypatch.setattr(Tokenizer, "encode_batch", encode_batch)
    with pytest.raises(BadInput, match="to stay as it is"):
        tokenise(files, tokenizer, tmp_path / "ids")
    assert visible(tmp_path / "ids") == []


def test_a_full_disk_is_one_line_and_leaves_nothing(story, tmp_path, monkeypatch):
    files, tokenizer, ids = story

    def full(handle):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(BadLuck, match="No space left on device; ") as error:
            tokenise(files, tokenizer, tmp_path / "ids")
    assert "\n" not in str(error.value) and visible(tmp_path / "ids") == []
    assert tokenise(files, tokenizer, tmp_path / "ids").train.tolist() == ids["train"]


def test_the_disk_has_every_file_before_the_directory_gets_its_name(story, tmp_path, monkeypatch):
    files, tokenizer, _ = story
    events, fsync, replace, rename = [], os.fsync, os.replace, os.rename
    monkeypatch.setattr(os, "fsync", lambda handle: events.append("flush") or fsync(handle))
    monkeypatch.setattr(os, "replace", lambda a, b: events.append(b.name) or replace(a, b))
    monkeypatch.setattr(os, "rename", lambda a, b: events.append("the name") or rename(a, b))
    tokenise(files, tokenizer, tmp_path / "ids")
    events = events[: events.index("the name")]
    assert [e for e in events if e != "flush"] == ["val.bin", "train.bin", "counts.json", "manifest.json"]
    assert all(events[i - 1] == "flush" for i, e in enumerate(events) if e != "flush")


def test_a_killed_process_leaves_no_ids_and_another_one_waits_for_it(file, tmp_path):
    """Two real processes: the one that holds the lock is killed half-way, then this one writes everything."""
    path = file(f"{'the cat sat on the mat ' * 20}\n" * 400)
    program = (
        "import sys, time; from minillada.text import corpora, ids; from minillada.text.tokenizer import Tokenizer\n"
        "ids.GROUP, corpora.CHUNK, right = 1 << 14, 1 << 12, Tokenizer.encode_batch\n"
        "def slow(*args): print(flush=True); time.sleep(0.05); return right(*args)\n"
        "Tokenizer.encode_batch = slow; ids.tokenise(sys.argv[1], Tokenizer.bytes(), sys.argv[2])"
    )
    ids = tmp_path / "ids"
    with subprocess.Popen([sys.executable, "-c", program, str(path), str(ids)], stdout=subprocess.PIPE) as child:
        for _ in range(3):
            child.stdout.readline()
        assert visible(ids) == [] and len(list(ids.glob(".*.tmp"))) == 1
        threading.Timer(0.1, child.kill).start()
        tokens = tokenise(path, BYTES, ids)  # waits for the lock
        assert child.wait() != 0
    assert len(visible(ids)) == 1 and not list(ids.glob(".*.tmp"))
    assert BYTES.decode([*tokens.train, *tokens.val]) == path.read_text()


def test_merges_are_learned_from_a_bounded_part_of_the_text(file, monkeypatch):
    path = file("the cat sat on the mat " * 500 + "zygote " * 500)
    of_all = corpora.make_tokenizer("bpe:280", path)
    monkeypatch.setattr(corpora, "MERGES_FROM", 5000)
    of_the_start = corpora.make_tokenizer("bpe:280", path)
    assert len(of_all.encode(" zygote")) < len(of_the_start.encode(" zygote"))


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


@pytest.mark.parametrize(
    "n, length, batch_size", [(100, 7, 4), (64, 8, 8), (23, 5, 3), (9, 5, 2), (5, 5, 2), (6, 1, 4)]
)
def test_every_window_comes_once_in_an_epoch(n, length, batch_size):
    tokens = np.arange(n, dtype=np.uint16)
    per_epoch = max(1, (n - length + 1) // length)
    stream = batches(tokens, batch_size, length, seed=3)
    rows = torch.cat([next(stream) for _ in range(20 * per_epoch)])
    assert rows.dtype == torch.long and torch.equal(rows, rows[:, :1] + torch.arange(length))
    epochs = rows[:, 0].split(per_epoch)[:20]
    for starts in epochs:
        first, last = starts.min().item(), starts.max().item()
        assert sorted(starts.tolist()) == list(range(first, last + 1, length))  # side by side, each once
        assert len(starts) == per_epoch and first >= 0 and last + length <= n
    if per_epoch > 5:
        assert len({tuple(starts.tolist()) for starts in epochs}) > 15  # another order every time


def test_over_the_epochs_windows_start_anywhere():
    stream = batches(np.arange(50, dtype=np.uint16), 9, 5, seed=0)
    assert set(torch.cat([next(stream) for _ in range(200)])[:, 0].tolist()) == set(range(46))


@pytest.mark.parametrize("start", [1, 5, 6, 7, 40])
def test_a_batch_depends_on_the_seed_and_its_number_alone(start):
    tokens = np.arange(103, dtype=np.uint16)
    stream, later = batches(tokens, 4, 5, seed=1), batches(tokens, 4, 5, seed=1, start=start)
    for _ in range(start):
        next(stream)
    assert all(torch.equal(next(stream), next(later)) for _ in range(15))
    other = batches(tokens, 4, 5, seed=2, start=start)
    assert not torch.equal(next(stream), next(other))


def test_starting_far_ahead_takes_no_time():
    tokens = np.arange(1000, dtype=np.uint16)
    before = time.perf_counter()
    assert next(batches(tokens, 8, 16, seed=0, start=10**15)).shape == (8, 16)
    assert time.perf_counter() - before < 1


def test_a_negative_seed_is_refused():
    with pytest.raises(BadInput, match="seed"):
        next(batches(np.arange(9), 1, 2, seed=-1))


def test_the_validation_batch_is_evenly_spaced_and_always_the_same():
    tokens = np.arange(101, dtype=np.uint32)
    batch = validation_batch(tokens, 5, 21)
    assert batch[:, 0].tolist() == [0, 20, 40, 60, 80] and batch[-1, -1] == 100 and batch.shape == (5, 21)
    assert torch.equal(batch, validation_batch(tokens, 5, 21))


@pytest.mark.parametrize("length", [0, 6])
def test_windows_longer_than_the_tokens_are_refused(length):
    tokens = np.arange(5, dtype=np.uint16)
    with pytest.raises(BadInput, match="length"):
        next(batches(tokens, 1, length, seed=0))
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
    monkeypatch.setattr(corpora, "SHAKESPEARE_SIZE", len(text))
    monkeypatch.setattr(corpora, "SHAKESPEARE_SHA256", hashlib.sha256(text).hexdigest())
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
        list(corpora.shakespeare("http://127.0.0.1:9/"))
    assert "tinyshakespeare.txt" in str(error.value) and "\n" not in str(error.value)


def whole_of(server):
    return "".join(corpora.shakespeare(server.url))


def test_what_is_written_about_the_tokens_is_plain_json(file, tmp_path):
    tokenise(file("the cat sat on the mat"), BYTES, tmp_path / "ids")
    about = json.loads(next((tmp_path / "ids").glob("*/counts.json")).read_bytes())
    assert about["dtype"] == "uint16" and about["val"] == {"tokens": 3, "characters": 3, "bytes": 3}


# ---- A document in each row ----


def test_documents_are_what_stands_between_two_ends_of_text():
    tokens = np.array([5, 6, 1, 7, 1, 8, 8, 8, 1, 9], np.uint16)  # the first may be cut, the last has no end
    spans = whole_documents(tokens, eos_id=1)
    assert spans.tolist() == [[2, 5], [4, 9]]  # with the ends of text on both sides
    assert document_rows(tokens, spans, 6).tolist() == [[1, 7, 1, 1, 1, 1], [1, 8, 8, 8, 1, 1]]
    with pytest.raises(BadInput, match="expected many documents"):
        whole_documents(np.array([5, 6, 1]), 1)


def test_every_document_comes_once_in_an_epoch_and_batch_n_depends_on_n_alone():
    tokens = np.array([1, *(token for n in range(10, 17) for token in (n, 1))], np.uint16)
    spans = whole_documents(tokens, 1)
    seen = [row[1] for batch in itertools.islice(document_batches(tokens, spans, 7, 3, 0), 3) for row in batch.tolist()]
    assert [sorted(seen[i : i + 7]) for i in (0, 7, 14)] == [list(range(10, 17))] * 3 and seen[:7] != seen[7:14]
    far = list(itertools.islice(document_batches(tokens, spans, 3, 3, 4), 6))
    assert torch.equal(far[5], next(document_batches(tokens, spans, 3, 3, 4, start=5)))


def test_a_token_of_a_padded_row_has_fewer_characters_and_a_document_that_is_too_long_is_refused(file, tmp_path):
    lines = "".join(json.dumps({"text": "ab" * n}) + "\n" for n in (1, 2, 1, 2) * 10)
    text = tokenise(file(lines.encode(), "a.jsonl"), BYTES, tmp_path / "cache")
    rows = by_documents(text, 8, BYTES.eos_id)
    spans = whole_documents(text.val, BYTES.eos_id)
    letters = sum(stop - start - 2 for start, stop in spans)
    assert rows.characters_per_token == pytest.approx(letters / (8 * len(spans)), rel=0.1)
    with pytest.raises(BadInput, match="at most 5 tokens, got one of 6"):
        by_documents(text, 5, BYTES.eos_id)
