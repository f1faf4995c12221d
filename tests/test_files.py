"""Careful files: every fault is one line of the right kind, and what is written is whole or not there."""

import errno
import os

import pytest
from safetensors import SafetensorError

from minillada import files
from minillada.errors import BadInput, BadLuck


class Panic(BaseException):
    """Like that of a library written in Rust: no `Exception`."""


FAULTS = {
    "a full disk": (OSError(errno.ENOSPC, "No space left on device"), BadLuck, "got No space left on device;"),
    "a full disk while tensors are written": (SafetensorError("IoError:\n full"), BadLuck, "got 'IoError: full';"),
    "a system error without a text": (OSError("odd"), BadLuck, "got 'odd';"),
    "an exception": (Exception("expected value\nat line 3"), BadInput, "got 'expected value at line 3';"),
    "a panic": (Panic("index out of bounds:\n\tthe len is 0"), BadInput, "got 'index out of bounds: the len is 0';"),
    "a panic that would move the cursor": (Panic("\x1b[2J\u202e"), BadInput, r"got '\x1b[2J\u202e';"),
    "a panic without end": (Panic("x" * 10**6), BadInput, f"got '{'x' * 200}';"),
}


@pytest.mark.parametrize(("fault", "kind", "line"), FAULTS.values(), ids=FAULTS)
def test_any_fault_is_one_line_of_the_kind_that_is_to_blame(fault, kind, line):
    with pytest.raises(kind) as told, files.one_line("text: expected some", "mend it", faults=BaseException):
        raise fault
    assert str(told.value) == f"text: expected some, {line} mend it"


@pytest.mark.parametrize("error", [BadInput("a"), BadLuck("b"), KeyboardInterrupt(), SystemExit(3), MemoryError("c")])
def test_what_is_no_fault_or_has_its_line_already_passes_unchanged_but_is_undone(error):
    undone = []
    careful = files.one_line("text: expected some", "mend it", BaseException, undo=lambda: undone.append(1))
    with pytest.raises(type(error)) as told, careful:
        raise error
    assert told.value is error and undone == [1]


def test_a_bug_is_not_taken_for_a_fault_of_the_system():
    with pytest.raises(TypeError), files.one_line("file: expected to write it", "mend it"):
        raise TypeError("ours")


def test_what_fails_half_way_leaves_the_old_file_and_nothing_else(tmp_path):
    files.write_json(tmp_path / "new" / "a.json", {"old": 1})
    for error in (OSError(errno.EFBIG, "File too large"), KeyboardInterrupt()):
        with pytest.raises((BadLuck, KeyboardInterrupt)), files.replacing(tmp_path / "new" / "a.json") as file:
            file.write(b"{")
            raise error
    assert files.read_json(tmp_path / "new" / "a.json", 100) == {"old": 1}
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.json"]


def test_a_temporary_name_is_one_that_can_be_swept(tmp_path):
    assert files.temporary(tmp_path / "a.json").match(files.LEFTOVER) and not (tmp_path / "a.tmp").match(files.LEFTOVER)


@pytest.mark.skipif(os.name != "posix", reason="nothing is flushed there")
def test_a_file_system_that_cannot_flush_a_directory_is_tolerated_and_a_failing_disk_is_not(tmp_path, monkeypatch):
    for code, passes in ((errno.EINVAL, True), (errno.ENOTSUP, True), (errno.EIO, False)):

        def failing(_, code=code):
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(os, "fsync", failing)
        if passes:
            files.sync_directory(tmp_path)
        else:
            with pytest.raises(OSError, match=os.strerror(code)):
                files.sync_directory(tmp_path)


def test_the_newest_whole_checkpoint_is_found_without_a_warning_and_with_the_reasons(tmp_path, recwarn):
    for step in (1, 2, 3):
        home = tmp_path / "checkpoints" / f"step-{step:08d}"
        files.write_json(home / "state.json", {"step": step})
        files.write_manifest(home, {})
    (home / "state.json").write_text('{"step": 4}')
    (tmp_path / "checkpoints" / "step-9").mkdir()  # not a name of ours
    newest, damaged = files.newest_checkpoint(tmp_path)
    assert newest.name == "step-00000002" and [path.name for path in damaged] == ["step-00000003"]
    assert "state.json: expected bytes" in damaged[home] and not recwarn
    assert files.newest_checkpoint(home) == (None, {})
