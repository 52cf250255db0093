"""Atomic files and directories, in order on the disk, and the lock on a folder."""

import errno
import multiprocessing
import os
import shutil
from pathlib import Path

import pytest

from qlora_lite.foundation.errors import RunError
from qlora_lite.foundation.files import (
    DiskFull,
    complete_directory,
    lock,
    make_folder,
    require_free_space,
    require_possible_folder,
    write_json,
    write_text,
)
from tests.disk_calls import record_disk_calls


def test_a_file_is_replaced_and_no_temporary_file_is_left(tmp_path):
    path = tmp_path / "a.json"
    write_text(path, "old")
    write_json(path, {"new": "ü"})
    assert path.read_text(encoding="utf-8") == '{\n  "new": "ü"\n}\n'
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_file_is_synced_before_the_rename_and_its_directory_after_it(tmp_path, monkeypatch):
    calls = record_disk_calls(monkeypatch, tmp_path)
    write_text(tmp_path / "a.txt", "hello")
    assert calls == ["sync .a.txt.writing (5 bytes)", "rename .a.txt.writing -> a.txt", "sync ."]


def test_a_directory_is_complete_or_absent(tmp_path):
    target = tmp_path / "step"
    with pytest.raises(ValueError, match="half way"), complete_directory(target) as temporary:
        (temporary / "one").write_text("1")
        raise ValueError("half way")
    assert os.listdir(tmp_path) == []
    with complete_directory(target) as temporary:
        (temporary / "one").write_text("1")
        assert not target.exists()
    assert (target / "one").read_text() == "1"
    assert os.listdir(tmp_path) == ["step"]


def test_an_existing_directory_is_replaced_and_leftovers_are_removed(tmp_path):
    target = tmp_path / "step"
    (tmp_path / ".step.writing").mkdir()
    (tmp_path / ".step.writing" / "leftover").write_text("x")
    for content in "12":
        with complete_directory(target) as temporary:
            (temporary / content).write_text(content)
    assert os.listdir(target) == ["2"]
    assert os.listdir(tmp_path) == ["step"]


def test_a_directory_is_synced_with_its_content_before_the_rename(tmp_path, monkeypatch):
    calls = record_disk_calls(monkeypatch, tmp_path)
    with complete_directory(tmp_path / "step") as temporary:
        (temporary / "one").write_text("1")
        (temporary / "inner").mkdir()
        (temporary / "inner" / "two").write_text("22")
    assert sorted(calls[:-2]) == [
        "sync .step.writing",
        "sync .step.writing/inner",
        "sync .step.writing/inner/two (2 bytes)",
        "sync .step.writing/one (1 bytes)",
    ]
    assert calls[-2:] == ["rename .step.writing -> step", "sync ."]


def test_an_old_directory_is_replaced_only_after_the_new_one_is_synced(tmp_path, monkeypatch):
    (tmp_path / "step").mkdir()
    calls = record_disk_calls(monkeypatch, tmp_path)
    with complete_directory(tmp_path / "step") as temporary:
        (temporary / "one").write_text("1")
    assert calls == [
        "sync .step.writing/one (1 bytes)",
        "sync .step.writing",
        "rename step -> .step.old",
        "rename .step.writing -> step",
        "sync .",
    ]


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path):
    target = tmp_path / "step"
    with complete_directory(target) as temporary:
        (temporary / "1").write_text("1")
    os.rename(target, tmp_path / ".step.old")
    with pytest.raises(ValueError, match="again"), complete_directory(target):
        raise ValueError("again")
    assert os.listdir(target) == ["1"]
    assert os.listdir(tmp_path) == ["step"]


def test_what_a_kill_after_the_renames_left_is_removed(tmp_path):
    target = tmp_path / "step"
    for name in ("step", ".step.old"):
        (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match="again"), complete_directory(target):
        raise ValueError("again")
    assert os.listdir(tmp_path) == ["step"]


@pytest.mark.parametrize("name", [".step.old", ".step.writing", "step"])
def test_a_file_in_place_of_the_directory_is_replaced(tmp_path, name):
    (tmp_path / name).write_text("")
    for _ in range(2):
        with complete_directory(tmp_path / "step") as temporary:
            (temporary / "1").write_text("1")
        assert os.listdir(tmp_path) == ["step"]
        assert os.listdir(tmp_path / "step") == ["1"]


def _hold(path, locked, release):
    with lock(path):
        locked.set()
        release.wait(30)


def test_a_second_process_cannot_lock_until_the_first_ends(tmp_path):
    context = multiprocessing.get_context("fork")
    locked, release = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(tmp_path, locked, release))
    other.start()
    assert locked.wait(30)
    with pytest.raises(RunError, match=f"in use by process {other.pid}"), lock(tmp_path):
        pass
    release.set()
    other.join()
    with lock(tmp_path):
        pass


@pytest.mark.parametrize("damage", ["lock deleted", "lock replaced", "folder deleted", "moved"])
def test_a_lock_that_was_taken_away_is_noticed(tmp_path, damage):
    directory = tmp_path / "run"
    directory.mkdir()
    with pytest.raises(RunError, match="moved or deleted"), lock(directory) as held:
        held.require()
        if damage == "moved":
            directory.rename(tmp_path / "elsewhere")
        elif damage == "folder deleted":
            shutil.rmtree(directory)
        else:
            (directory / ".lock").unlink()
        if damage == "lock replaced":
            (directory / ".lock").write_text("")
        held.require()


def test_what_cannot_be_created_is_a_run_error(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nothing" / "here")
    for place in (tmp_path / "file" / "inside", Path("/proc/inside")):
        with pytest.raises(RunError, match=f"folder {place} cannot be created"):
            make_folder(place)
        with pytest.raises(RunError, match="cannot be created"), complete_directory(place):
            pass
    with pytest.raises(RunError, match="file /proc/inside cannot be created"):
        write_text(Path("/proc/inside"), "text")
    for place in (tmp_path / "file", tmp_path / "link"):
        with pytest.raises(RunError, match=f"{place} is a file or a broken link"):
            make_folder(place)
    with pytest.raises(RunError, match=f"{tmp_path / 'link'} is a file or a broken link"):
        make_folder(tmp_path / "link" / "inside")


def test_a_folder_is_impossible_in_a_file_or_a_broken_link(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nothing" / "here")
    (tmp_path / "round").symlink_to(tmp_path / "round")
    for name, kind in {"file": "a file", "link": "a broken link", "round": "a broken link"}.items():
        for place in (tmp_path / name, tmp_path / name / "inside"):
            with pytest.raises(RunError, match=f"{name} is {kind}, and a folder is needed"):
                require_possible_folder(place)
    require_possible_folder(tmp_path / "new" / "folder")


def test_a_full_disk_is_reported_when_not_even_the_folder_fits(tmp_path, monkeypatch):
    def full(path, **options):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(DiskFull, match="the disk is full"), complete_directory(tmp_path / "a"):
        pass


def test_too_little_space_is_reported_before_anything_is_written(tmp_path):
    require_free_space(tmp_path, 1, "a checkpoint")
    with pytest.raises(RunError, match="a merged model needs"):
        require_free_space(tmp_path, 10**18, "a merged model")
