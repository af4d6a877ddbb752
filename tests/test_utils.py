"""Messages and atomic writes."""

import os

import pytest

import utils


def test_durations():
    found = [utils.duration(seconds) for seconds in (0.2, 42, 119, 3599, 100_000)]
    assert found == ["1 s", "42 s", "2 min", "1 h 0 min", "27 h 47 min"]


@pytest.mark.skipif(os.name != "posix", reason="needs links")
def test_write_text_keeps_links(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "file")
    utils.write_text(tmp_path / "link", "name-\udcff\n")  # a file name that is not UTF-8
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_bytes() == b"name-\xff\n"
