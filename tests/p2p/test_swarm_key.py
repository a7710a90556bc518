"""The key of a private swarm: its file, its forms, and that it shows itself nowhere."""

from __future__ import annotations

import base64
import copy
import logging
import os
import pickle
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from petalnet.errors import UsageError
from petalnet.p2p.swarm_key import HEADER, SwarmKey


def test_a_key_survives_its_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    key, path = SwarmKey.generate(), tmp_path / "swarm.key"
    key.save_new(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_text().splitlines()[0] == HEADER and len(path.read_text().splitlines()) == 2
    loaded = SwarmKey.load(path)
    assert loaded == key and hash(loaded) == hash(key) and loaded.path == path
    assert SwarmKey.generate() != key
    assert not caplog.records


def test_a_mask_of_the_user_does_not_open_the_file(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        SwarmKey.generate().save_new(tmp_path / "swarm.key")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "swarm.key").stat().st_mode) == 0o600


def test_a_file_that_exists_stays(tmp_path: Path) -> None:
    path = tmp_path / "swarm.key"
    path.write_text("mine")
    with pytest.raises(UsageError, match="exists") as caught:
        SwarmKey.generate().save_new(path)
    assert path.read_text() == "mine" and "\n" not in str(caught.value)
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UsageError, match="exists"):
        SwarmKey.generate().save_new(tmp_path / "link")
    assert not (tmp_path / "elsewhere").exists()


def test_a_folder_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot write the swarm key"):
        SwarmKey.generate().save_new(tmp_path / "none" / "swarm.key")


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o666])
def test_a_file_that_others_can_read_is_used_with_a_warning(tmp_path: Path, mode: int, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "swarm.key"
    SwarmKey.generate().save_new(path)
    path.chmod(mode)
    with caplog.at_level(logging.WARNING):
        SwarmKey.load(path)
    (record,) = caplog.records
    assert "chmod 600" in record.getMessage() and str(path) in record.getMessage()


GOOD = SwarmKey(bytes(range(32))).text()


@pytest.mark.parametrize(
    "content",
    [
        b"", b"\n", b"rubbish", HEADER.encode(), GOOD.replace("1", "2", 1).encode(), GOOD.splitlines()[1].encode(), GOOD[:-3].encode(),
        (HEADER + "\n" + base64.b64encode(bytes(31)).decode()).encode(), GOOD.encode() + b"more\n", b"\xff\xfe" * 50, GOOD.encode() * 100,
        GOOD.encode() + b"\n" * 5000 + b"x", bytes(100_000),
    ],
)  # fmt: skip
def test_what_is_no_key_file_is_told_in_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "swarm.key"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"swarm\.key is not a swarm key .*petalnet key new") as caught:
        SwarmKey.load(path)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_told_in_one_line(tmp_path: Path) -> None:
    for path, says in ((tmp_path / "none.key", "No such file"), (tmp_path, "directory")):
        with pytest.raises(UsageError, match=says) as caught:
            SwarmKey.load(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_programs_give_a_key_a_text_or_a_path(tmp_path: Path) -> None:
    key, path = SwarmKey.generate(), tmp_path / "swarm.key"
    key.save_new(path)
    for form in (key, key.text(), key.text().strip(), key.text().splitlines()[1], path, str(path), key.text().replace("\n", "\r\n")):
        assert SwarmKey.of(form) == key
    assert SwarmKey.of(key.text()).path is None
    for form in ("no-such-file", f"{HEADER}\n{'A' * 44}\n", "something else\n" + "A" * 43 + "="):
        with pytest.raises(UsageError) as caught:
            SwarmKey.of(form)
        assert "\n" not in str(caught.value) and "AAAA" not in str(caught.value)


def test_a_key_is_shown_nowhere(tmp_path: Path) -> None:
    key = SwarmKey(bytes(range(1, 33)))
    secret = key.text().splitlines()[1]
    shown = [repr(key), str(key), f"{key}", repr([key]), repr({"key": key})]
    assert not any(secret in text or secret[:8] in text for text in shown)
    assert all(key.fingerprint in text for text in shown)
    with pytest.raises(TypeError, match="path"):
        pickle.dumps(key)
    key.save_new(tmp_path / "swarm.key")
    pickled = pickle.dumps(SwarmKey.load(tmp_path / "swarm.key"))
    assert bytes(range(1, 33)) not in pickled and secret.encode() not in pickled
    assert pickle.loads(pickled) == key
    assert copy.deepcopy(key) is key


@given(st.binary(min_size=32, max_size=32), st.binary(min_size=32, max_size=32))
def test_keys_are_equal_where_their_bytes_are(one: bytes, other: bytes) -> None:
    a, b = SwarmKey(one), SwarmKey(other)
    assert (a == b) == (one == other) == (a.tag(b"x", b"y") == b.tag(b"x", b"y"))
    assert SwarmKey.parse(a.text()) == a
    assert a != one


@given(st.binary(max_size=40), st.binary(max_size=40), st.binary(max_size=40), st.binary(max_size=40))
def test_a_tag_is_for_one_purpose_and_one_text(purpose: bytes, data: bytes, other_purpose: bytes, other_data: bytes) -> None:
    """Also where a purpose and a text together are the same bytes."""
    key = SwarmKey(bytes(32))
    same = (purpose, data) == (other_purpose, other_data)
    assert (key.tag(purpose, data) == key.tag(other_purpose, other_data)) == same
    assert key.tag(purpose + data, b"") != key.tag(purpose, data) or not data


@given(st.text(max_size=200))
def test_no_text_breaks_the_reading(text: str) -> None:
    try:
        SwarmKey.parse(text)
    except UsageError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("size", [0, 31, 33])
def test_a_key_has_32_bytes(size: int) -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        SwarmKey(bytes(size))
