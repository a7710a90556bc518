"""The disk cache: its bound, who goes first, what stays, and several processes at once."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections import namedtuple
from pathlib import Path

import pytest
from filelock import FileLock
from hypothesis import given
from hypothesis import strategies as st

from petalnet.errors import UsageError
from petalnet.models.filling import Filling, merged, read_progress
from petalnet.models.weight_cache import Entry, WeightCache, least_recently_used, weight_cache


def put(cache: WeightCache, key: str, size: int = 1000) -> Path:
    with cache.filling(key, size) as filling:
        fill(filling)
        return filling.commit()


def fill(filling: Filling) -> None:
    with filling.path.open("r+b") as stream:
        stream.write(b"x" * filling.size)
    filling.note(0, filling.size)


def kept(cache: WeightCache) -> set[str]:
    return {path.name for path in cache.folder.iterdir() if "." not in path.name}


def test_a_file_is_there_once_it_is_whole(tmp_path: Path) -> None:
    cache = WeightCache(tmp_path / "some", None)
    assert cache.find("one") is None
    with cache.filling("one", 1000) as filling:
        assert filling.path.stat().st_size == filling.size == 1000
        assert filling.lacking == ((0, 1000),) and cache.find("one") is None
        filling.note(500, 1000)
        with pytest.raises(ValueError, match=r"bytes \(0, 500\) of one are not there yet"):
            filling.commit()
        fill(filling)
        path = filling.commit()
    assert cache.find("one") == path and path.read_bytes() == b"x" * 1000
    with cache.filling("one", 1000) as filling:
        assert filling.done == ((0, 1000),) and filling.lacking == () and filling.commit() == path


@pytest.mark.parametrize("key", ["", "../one", "a/b", ".hidden", "one.incomplete", "use-1", "x" * 300])
def test_keys_are_names_of_files(key: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be the key of a file"):
        WeightCache(tmp_path, None).find(key)


def test_what_was_used_least_recently_makes_room(tmp_path: Path) -> None:
    cache = WeightCache(tmp_path, 3000)
    for key in ("one", "two", "three"):
        put(cache, key)
    assert cache.find("one") is not None
    put(cache, "four")
    assert kept(cache) == {"one", "three", "four"}
    put(cache, "five", 2000)
    assert kept(cache) == {"four", "five"}


def test_reading_counts_as_use_but_does_not_change_the_file(tmp_path: Path) -> None:
    cache = WeightCache(tmp_path, None)
    path = put(cache, "one")
    changed = path.stat().st_mtime_ns
    os.utime(path, ns=(0, changed))
    assert cache.find("one") == path
    assert path.stat().st_mtime_ns == changed and path.stat().st_atime_ns > 0


def test_what_a_load_needs_stays(tmp_path: Path) -> None:
    cache, other = WeightCache(tmp_path, 3000), WeightCache(tmp_path, 3000)
    put(cache, "old")
    with cache.keeping():
        put(cache, "one")
        assert cache.find("old") is not None
        put(other, "two")
        with pytest.raises(UsageError, match=r"--max-disk-space: there is no room for 0.00 MB more.*loads under way: raise it by 0.00 MB"):
            put(other, "three", 2000)
        assert kept(cache) == {"old", "one", "two"}, "nothing was removed for what has no room all the same"
        put(other, "three")
        assert kept(cache) == {"old", "one", "three"}
    put(other, "four", 2000)
    assert kept(cache) == {"three", "four"}
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("use-")]


def test_more_than_the_bound_is_refused_at_once(tmp_path: Path) -> None:
    cache = WeightCache(tmp_path, 10**7)
    put(cache, "one")
    with pytest.raises(UsageError, match="takes 0.02 GB on the disk, and 0.01 GB are allowed: raise it, or serve fewer blocks"):
        put(cache, "two", 2 * 10**7)
    assert kept(cache) == {"one"}, "nothing was removed for it"


def test_a_lower_bound_holds_from_the_next_load_on(tmp_path: Path) -> None:
    for key in ("one", "two", "three"):
        put(WeightCache(tmp_path, None), key)
    cache = WeightCache(tmp_path, 1500)
    with cache.keeping():
        assert cache.find("one") is not None
    assert kept(cache) == {"one"}


def test_a_full_disk_makes_room_and_then_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = WeightCache(tmp_path, None)
    put(cache, "one")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10**6, 10**6, 500))
    put(cache, "two", 1200)
    assert kept(cache) == {"two"}
    with pytest.raises(UsageError, match=r"is on is full: 2.00 GB more are needed. Free some, or set PETALNET_CACHE_DIR"):
        put(cache, "three", 2 * 10**9)


def test_what_a_killed_process_left_is_gone_on_with(tmp_path: Path) -> None:
    code = f"""
import os, signal
from pathlib import Path
from petalnet.models import filling
from petalnet.models.weight_cache import WeightCache
filling.NOTE_BYTES = 100
cache = WeightCache(Path({str(tmp_path)!r}), None)
with cache.keeping(), cache.filling("one", 1000) as one:
    with one.path.open("r+b") as stream:
        stream.write(b"y" * 300)
    one.note(0, 200)
    one.note(200, 250)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == -9
    cache = WeightCache(tmp_path, None)
    with cache.filling("one", 1000) as filling:
        assert filling.done == ((0, 200),), "the last 50 bytes were not forced to the disk"
        assert filling.lacking == ((200, 1000),)
        filling.note(900, 1000)
    with cache.filling("one", 1000) as filling:
        assert filling.done == ((0, 200), (900, 1000))
        assert filling.path.read_bytes()[:300] == b"y" * 300
    with cache.filling("one", 900) as filling:
        assert filling.done == (), "another size: another file"
        filling.path.write_bytes(b"z" * 900)
    put(WeightCache(tmp_path, 1000), "two")
    assert not list(tmp_path.glob("one*")) and not list(tmp_path.glob("use-*")), "what nobody goes on with goes, too"


def test_two_that_want_the_same_fetch_it_once(tmp_path: Path) -> None:
    started, fetched = threading.Event(), []

    def fetch(wait: bool) -> None:
        with WeightCache(tmp_path, None).filling("one", 1000) as filling:
            if filling.lacking:
                fetched.append(filling.size)
                started.set()
                fill(filling)
                filling.commit()

    with FileLock(tmp_path / "one.lock"):
        threads = [threading.Thread(target=fetch, args=(True,)) for _ in range(2)]
        for thread in threads:
            thread.start()
        assert not started.wait(0.1)
    for thread in threads:
        thread.join()
    assert fetched == [1000]


def test_damaged_files_can_be_discarded(tmp_path: Path) -> None:
    cache = WeightCache(tmp_path, None)
    put(cache, "one")
    cache.discard("one")
    cache.discard("two")
    assert kept(cache) == set() and cache.find("one") is None


def test_a_damaged_list_of_uses_does_not_stop_anybody(tmp_path: Path) -> None:
    cache = WeightCache(tmp_path, 1000)
    with cache.keeping():
        put(cache, "one")
        (listed,) = tmp_path.glob("use-*.json")
        assert json.loads(listed.read_text()) == ["one"]
        listed.write_text("{")
        put(WeightCache(tmp_path, 1000), "two")
    assert kept(cache) == {"two"}


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    cache = WeightCache(tmp_path / "file" / "weights", None)
    for use in (lambda: cache.find("one"), lambda: put(cache, "one"), lambda: cache.keeping().__enter__()):
        with pytest.raises(UsageError, match="^what is fetched cannot be kept in .*: Not a directory. Set PETALNET_CACHE_DIR to a folder"):
            use()


def test_where_it_is(cache_folder: Path, tmp_path: Path) -> None:
    assert weight_cache(None).folder == cache_folder / "petalnet-weights"
    assert weight_cache(5, tmp_path / "hub").folder == tmp_path / "hub" / "petalnet-weights"


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)).map(lambda pair: (min(pair), max(pair)))))
def test_merged_ranges_hold_the_same_bytes(ranges: list[tuple[int, int]]) -> None:
    result = merged(ranges)
    assert {byte for start, end in result for byte in range(start, end)} == {byte for start, end in ranges for byte in range(start, end)}
    assert all(left[1] < right[0] for left, right in zip(result, result[1:], strict=False))


@pytest.mark.parametrize("text", ["0 20", "5 3\n", "0 5000\n", "-1 5\n", "a b\n", "0 5 7\n", "\n", "0 99999999999999999999999\n"])
def test_notes_that_make_no_sense_do_not_count(text: str, tmp_path: Path) -> None:
    file = tmp_path / "progress"
    file.write_text("3 7\n" + text)
    assert read_progress(file, 1000) == [(3, 7)]


def test_whom_to_choose() -> None:
    entries = [Entry(str(age), 10, 0, 100 - age, age == 3) for age in range(5)]
    assert [entry.key for entry in least_recently_used(entries, 15)] == ["4", "2"]
    assert least_recently_used(entries, 0) == []
    assert [entry.key for entry in least_recently_used(entries, 1000)] == ["4", "2", "1", "0"]
