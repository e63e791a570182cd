"""One process at a time in a folder; a system without locks is said."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from minillm.lock import FolderLock
from minillm.log import UserError


def test_a_folder_is_locked_until_it_is_closed(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "run"
    first = FolderLock(folder, "training in")
    with pytest.raises(UserError, match=f"Another process is training in {folder}. Wait for it, end it, or choose"):
        FolderLock(folder, "training in")
    FolderLock(tmp_path / "new" / "other", "training in").close()
    first.close()
    FolderLock(folder, "training in").close()


def test_a_lock_follows_a_folder_that_moves(tmp_path: Path) -> None:
    first = FolderLock(tmp_path / "run", "training in")
    (tmp_path / "run").rename(tmp_path / "run.previous")
    FolderLock(tmp_path / "run", "training in").close()
    with pytest.raises(UserError):
        FolderLock(tmp_path / "run.previous", "training in")
    first.close()


def test_a_file_system_without_locks_gets_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", refuse)
    FolderLock(tmp_path, "preparing").close()
    assert f"{tmp_path} cannot be locked (No locks available): make sure that nothing else" in capsys.readouterr().err
