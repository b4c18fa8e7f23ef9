"""What one rank does with directories."""

import errno
import os
import shutil
from unittest import mock

import pytest

from parallel.commit import stage, sweep


def test_what_killed_saves_left_is_swept_before_the_next(tmp_path):
    for name in (".step_00000001.partial", ".step_00000001.replaced", ".step_00000002.retired", "step_00000003"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    stage(tmp_path / ".step_00000001.partial")
    found = sorted(path.name for path in tmp_path.rglob("*"))
    assert found == [".step_00000001.partial", "file", "step_00000003"]


def test_what_cannot_be_removed_is_told_unless_it_is_in_the_way(tmp_path):
    (tmp_path / ".step_00000001.partial").mkdir()
    read_only = OSError(errno.EROFS, os.strerror(errno.EROFS))
    with mock.patch.object(shutil, "rmtree", side_effect=read_only):
        assert sweep(tmp_path) == [f"{tmp_path / '.step_00000001.partial'} cannot be removed: {read_only.strerror}"]
        stage(tmp_path / ".step_00000002.partial")
        with pytest.raises(OSError, match="Read-only file system"):
            stage(tmp_path / ".step_00000001.partial")
