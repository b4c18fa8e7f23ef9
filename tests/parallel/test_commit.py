"""What one rank does with directories."""

import contextlib
import errno
import os
import shutil
from pathlib import Path
from unittest import mock

import pytest

from models.checkpoint import list_checkpoints
from parallel.commit import give_back, publish, stage, sweep


def test_what_killed_saves_left_is_swept_before_the_next(tmp_path):
    for name in (".step_00000001.partial", ".step_00000001.replaced", ".step_00000002.retired", "step_00000003"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    stage(tmp_path / ".step_00000001.partial")
    found = sorted(path.name for path in tmp_path.rglob("*"))
    assert found == [".step_00000001.partial", "file", "step_00000003"]


def test_what_made_way_for_a_save_that_was_killed_comes_back(tmp_path):
    for name in ("step_00000001", "step_00000002", ".step_00000003.replaced", ".step_00000002.replaced"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "meta.json").write_text(name)
    (tmp_path / ".step_00000003.partial").mkdir()
    give_back(tmp_path)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000001", "step_00000002", "step_00000003"]
    assert (tmp_path / "step_00000003" / "meta.json").read_text() == ".step_00000003.replaced"
    assert (tmp_path / "step_00000002" / "meta.json").read_text() == "step_00000002"
    assert sweep(tmp_path) == []
    assert len(list(tmp_path.iterdir())) == 3


def test_a_save_over_one_of_its_step_can_be_killed_anywhere(tmp_path):
    """Whichever rename does not happen any more, one of the two is there at the next start."""
    for renames in range(3):
        directory = tmp_path / str(renames)
        staging, final = directory / ".step_00000003.partial", directory / "step_00000003"
        for path, content in ((final, "old"), (staging, "new")):
            path.mkdir(parents=True)
            (path / "meta.json").write_text(content)
        left = iter(range(renames))

        def rename(path, target, rename=Path.rename, left=left):
            if next(left, None) is None:
                raise KeyboardInterrupt
            return rename(path, target)

        with mock.patch.object(Path, "rename", rename), contextlib.suppress(KeyboardInterrupt):
            publish(staging, final)
        give_back(directory)
        assert (final / "meta.json").read_text() == ("old" if renames < 2 else "new")


def test_what_cannot_be_removed_is_told_unless_it_is_in_the_way(tmp_path):
    (tmp_path / ".step_00000001.partial").mkdir()
    read_only = OSError(errno.EROFS, os.strerror(errno.EROFS))
    with mock.patch.object(shutil, "rmtree", side_effect=read_only):
        assert sweep(tmp_path) == [f"{tmp_path / '.step_00000001.partial'} cannot be removed: {read_only.strerror}"]
        stage(tmp_path / ".step_00000002.partial")
        with pytest.raises(OSError, match="Read-only file system"):
            stage(tmp_path / ".step_00000001.partial")
