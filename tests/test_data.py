"""Folders, download, hostile archives, and the split that is held out."""

import functools
import hashlib
import http.client
import http.server
import io
import tarfile
import threading
from collections import Counter

import numpy as np
import pytest
import torch

import batches
import data
from utils import UserError

NAMES = [*data.TRAIN_FILES, *data.TEST_FILES]


def write_files(folder, count=20):
    """Write the official files, each with `count` images that tell the file and the place they are from."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(NAMES):
        images = np.full((count, 32, 32, 3), number, np.uint8)
        images[:, 0, 0, 0] = np.arange(count)
        batches.write_batch(folder / name, images, np.arange(count) % 10, name)
    batches.write_label_names(folder / data.META_FILE, batches.CLASSES)
    return folder


def pack(members) -> bytes:
    """Make an archive of (name or TarInfo, content) pairs."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for member, content in members:
            info = member if isinstance(member, tarfile.TarInfo) else tarfile.TarInfo(member)
            info.size = len(content) if info.isfile() else 0
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """Give the members of an archive in the official layout."""
    folder = write_files(tmp_path_factory.mktemp("official"))
    return [(f"{data.FOLDER}/{name}", (folder / name).read_bytes()) for name in [*NAMES, data.META_FILE]]


@pytest.fixture
def serve(tmp_path):
    """Give a function that serves bytes on this machine and returns their address."""
    root = tmp_path / "served"
    root.mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=root)
    handler.func.log_message = lambda *_: None
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def put(content: bytes) -> str:
        (root / "cifar.tar.gz").write_bytes(content)
        return f"http://127.0.0.1:{server.server_port}/cifar.tar.gz"
    yield put
    server.shutdown()
    server.server_close()


def md5(content: bytes) -> str:
    return hashlib.md5(content).hexdigest()


def test_download_checks_unpacks_and_leaves_nothing_else(official, serve, tmp_path, capsys):
    archive = pack(official)
    folder = data.download_archive(tmp_path / "data", serve(archive), md5(archive))
    assert folder == tmp_path / "data" / data.FOLDER
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        name.split("/")[1]: content for name, content in official}
    assert [path.name for path in (tmp_path / "data").iterdir()] == [data.FOLDER]
    assert "fetching cifar.tar.gz" in capsys.readouterr().err  # the progress bar
    assert len(data.load_split(str(tmp_path / "data"), data.TRAIN_FILES).targets) == 100


def test_a_wrong_checksum_is_refused_before_unpacking(official, serve, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "unpack", lambda *_: pytest.fail("unpacked an unchecked archive"))
    with pytest.raises(UserError, match=f"expected {data.MD5}"):
        data.download_archive(tmp_path / "data", serve(pack(official)))
    assert list((tmp_path / "data").iterdir()) == []


def test_offline_is_one_clear_error(tmp_path):
    with pytest.raises(UserError) as error:
        data.download_archive(tmp_path / "data", "http://127.0.0.1:9/cifar-10-python.tar.gz")
    line = str(error.value)
    assert "\n" not in line and str(tmp_path / "data" / data.FOLDER) in line and "--synthetic" in line
    assert list((tmp_path / "data").iterdir()) == []


def test_two_that_download_at_once_both_have_it(official, serve, tmp_path, monkeypatch):
    archive, unpack = pack(official), data.unpack

    def be_slower(*args):
        monkeypatch.setattr(data, "unpack", unpack)
        data.download_archive(tmp_path / "data", serve(archive), md5(archive))
        unpack(*args)
    monkeypatch.setattr(data, "unpack", be_slower)
    folder = data.download_archive(tmp_path / "data", serve(archive), md5(archive))
    assert [path.name for path in (tmp_path / "data").iterdir()] == [data.FOLDER] == [folder.name]
    assert len(data.load_split(str(tmp_path / "data"), data.TRAIN_FILES).targets) == 100


def test_a_server_that_speaks_no_http_is_one_clear_error(tmp_path, monkeypatch):
    def answer(*_, **__):
        raise http.client.BadStatusLine("SSH-2.0")
    monkeypatch.setattr(data.urllib.request, "urlopen", answer)
    with pytest.raises(UserError, match="SSH-2.0"):
        data.download_archive(tmp_path / "data")
    assert list((tmp_path / "data").iterdir()) == []


def test_an_interrupted_download_leaves_no_half_file(tmp_path, monkeypatch):
    def die(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(data, "fetch", die)
    with pytest.raises(KeyboardInterrupt):
        data.download_archive(tmp_path / "data")
    assert list((tmp_path / "data").iterdir()) == []


def link(name, kind, target):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(("extra", "message"), [
    ([("../outside", b"x"), ("/tmp/outside", b"x"), (f"{data.FOLDER}/../../outside", b"x")], None),
    ([(link(f"{data.FOLDER}/data_batch_1", tarfile.SYMTYPE, "/etc/passwd"), b"")], "no plain file"),
    ([(link(f"{data.FOLDER}/test_batch", tarfile.LNKTYPE, "../outside"), b"")], "no plain file"),
])
def test_no_path_of_an_archive_leaves_the_folder(official, serve, tmp_path, extra, message):
    archive = pack(extra + official)
    fetch = functools.partial(data.download_archive, tmp_path / "below" / "data", serve(archive), md5(archive))
    if message:
        with pytest.raises(UserError, match=message):
            fetch()
    else:
        fetch()
    assert {path.name for path in tmp_path.rglob("*") if path.is_file() and "served" not in path.parts} == (
        set() if message else {*NAMES, data.META_FILE})


@pytest.mark.parametrize("content", [b"", b"no archive", b"\x1f\x8b\x08\x00" + bytes(30)])
def test_archives_that_are_none(serve, tmp_path, content):
    with pytest.raises(UserError, match="archive.tar.gz"):
        data.download_archive(tmp_path / "data", serve(content), md5(content))


def test_archive_with_a_missing_file_or_a_huge_one(official, serve, tmp_path, monkeypatch):
    archive = pack(official[1:])
    with pytest.raises(UserError, match="holds no data_batch_1"):
        data.download_archive(tmp_path / "data", serve(archive), md5(archive))
    monkeypatch.setattr(batches, "MAX_BYTES", 1000)
    archive = pack(official)
    with pytest.raises(UserError, match="sensible size"):
        data.download_archive(tmp_path / "data", serve(archive), md5(archive))


def test_the_folder_itself_or_its_parent(tmp_path):
    folder = write_files(tmp_path / data.FOLDER)
    for data_dir in (tmp_path, folder):
        split = data.load_split(str(data_dir), data.TRAIN_FILES)
        assert split.images.shape == (100, 32, 32, 3) and split.images.dtype == torch.uint8
        assert split.images[:, 1, 1, 1].tolist() == [i for i in range(5) for _ in range(20)]  # in the files' order
        assert data.load_split(str(data_dir), data.TEST_FILES).images[0, 1, 1, 1] == 5
    assert split.classes == list(batches.CLASSES)


def test_limits_take_the_first_images(tmp_path):
    write_files(tmp_path / data.FOLDER)
    split = data.load_split(str(tmp_path), data.TRAIN_FILES, limit=25)
    assert split.images[:, 0, 0, 0].tolist() == [*range(20), *range(5)]
    with pytest.raises(UserError, match="holds 100 images"):
        data.load_split(str(tmp_path), data.TRAIN_FILES, limit=101)


def test_a_missing_file_is_named(tmp_path):
    (write_files(tmp_path / data.FOLDER) / "data_batch_3").unlink()
    with pytest.raises(UserError, match="data_batch_3"):
        data.load_split(str(tmp_path), data.TRAIN_FILES)


def test_no_folder_and_no_download(tmp_path):
    with pytest.raises(UserError, match=r"no CIFAR-10 in .*--synthetic"):
        data.load_split(str(tmp_path), data.TRAIN_FILES, download=False)


def test_held_out_images_are_balanced_and_the_same_for_all_seeds(tmp_path):
    split = data.load_split(str(write_files(tmp_path)), data.TRAIN_FILES)
    train, val = data.hold_out(split, 33)
    assert len(train.targets) == 67 and sorted(Counter(val.targets.tolist()).values()) == [3] * 7 + [4] * 3
    together = torch.cat([train.images, val.images]).view(100, -1)
    assert sorted(map(bytes, together.numpy())) == sorted(map(bytes, split.images.view(100, -1).numpy()))
    assert torch.equal(data.hold_out(split, 33)[1].images, val.images)
    with pytest.raises(UserError, match="--val-size 100"):
        data.hold_out(split, 100)
