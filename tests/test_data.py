"""Finding, downloading (from a server on the loopback address) and decoding pictures."""

import hashlib
import io
import os
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import rotvq.run.data as data
from helpers import noise
from rotvq.run.data import (
    SAMPLE,
    DataError,
    ImageNet10,
    Source,
    download_imagenette,
    imagenet10,
    list_pictures,
)


@pytest.fixture
def folder(tmp_path):
    "Two classes, three pictures each in train and two in val; some greyscale, one a PNG."
    for split, count in (("train", 3), ("val", 2)):
        for c, name in enumerate(("n01", "n02")):
            (tmp_path / "pics" / split / name).mkdir(parents=True)
            for i in range(count):
                mode, ext = [("RGB", "JPEG"), ("L", "jpg"), ("RGBA", "png")][i]
                noise(10 * c + i, mode=mode).save(tmp_path / "pics" / split / name / f"{i}.{ext}")
    return tmp_path / "pics"


def archive(folder: Path) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        tar.add(folder, "imagenette2-160")
    return buffer.getvalue()


@pytest.fixture
def server():
    """Serves `server.body`, stopping after `server.cut` bytes where that is set; counts requests
    for the whole body."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.requests += 1
            self.send_response(200)
            self.send_header("Content-Length", str(len(self.server.body)))
            self.end_headers()
            self.wfile.write(self.server.body[: self.server.cut])

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as s:
        s.body, s.cut, s.requests = b"", None, 0
        s.url = f"http://127.0.0.1:{s.server_port}/imagenette2-160.tgz"
        thread = threading.Thread(target=s.serve_forever, daemon=True)
        thread.start()
        yield s
        s.shutdown()
        thread.join()


def leftovers(parent: Path) -> list[str]:
    return sorted(p.name for p in parent.iterdir())


def test_download_whole(server, folder, tmp_path):
    server.body = archive(folder)
    target = tmp_path / "home" / "imagenet10"
    assert (
        download_imagenette(target, server.url, hashlib.sha256(server.body).hexdigest()) == target
    )
    assert leftovers(target.parent) == ["imagenet10"]
    assert len(list_pictures(target, "train")[0]) == 6 and len(list_pictures(target, "val")[0]) == 4


@pytest.mark.parametrize("fault", ["cut off", "wrong hash", "no pictures"])
def test_a_bad_download_leaves_nothing_and_a_repeat_succeeds(server, folder, tmp_path, fault):
    body = archive(folder)
    sha256 = hashlib.sha256(body).hexdigest()
    server.body, server.cut = (
        (archive(tmp_path / "pics" / "train" / "n01") if fault == "no pictures" else body),
        (len(body) // 2 if fault == "cut off" else None),
    )
    target = tmp_path / "home" / "imagenet10"
    given = {"wrong hash": "0" * 64, "no pictures": hashlib.sha256(server.body).hexdigest()}.get(
        fault, sha256
    )
    with pytest.raises((DataError, OSError)) as error:
        download_imagenette(target, server.url, given)
    assert fault == "no pictures" or server.url in str(error.value)
    assert leftovers(target.parent) == []
    server.body, server.cut = body, None
    download_imagenette(target, server.url, sha256)
    assert leftovers(target.parent) == ["imagenet10"]


def test_an_interrupted_download_leaves_nothing(server, folder, tmp_path, monkeypatch):
    def interrupt(archive, into):
        (into / "imagenette2-160" / "train").mkdir(parents=True)
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "unpack", interrupt)
    server.body = archive(folder)
    digest = hashlib.sha256(server.body).hexdigest()
    with pytest.raises(KeyboardInterrupt):
        download_imagenette(tmp_path / "home" / "imagenet10", server.url, digest)
    assert leftovers(tmp_path / "home") == []


def test_search_order_and_one_download(server, folder, tmp_path, monkeypatch):
    server.body = archive(folder)
    monkeypatch.setattr(
        data.download_imagenette,
        "__defaults__",
        (server.url, hashlib.sha256(server.body).hexdigest(), 20),
    )
    monkeypatch.setenv("ROTVQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("ROTVQ_DATA")
    monkeypatch.chdir(tmp_path)
    assert imagenet10() == Source(tmp_path / "cache" / "imagenet10", "imagenet10")
    asked = server.requests
    assert (
        imagenet10().root == tmp_path / "cache" / "imagenet10" and server.requests == asked
    )  # it is there now
    (tmp_path / "data").mkdir()
    os.symlink(folder, tmp_path / "data" / "imagenet10")
    assert imagenet10().root == Path("data/imagenet10")
    monkeypatch.setenv("ROTVQ_DATA", str(folder))
    assert imagenet10() == Source(folder, "pics")
    assert imagenet10("sample") == SAMPLE


def test_no_network_is_one_line_and_the_sample(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        data.download_imagenette, "__defaults__", ("http://127.0.0.1:9/none.tgz", "0" * 64, 2)
    )
    monkeypatch.setenv("ROTVQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("ROTVQ_DATA")
    monkeypatch.chdir(tmp_path)
    assert imagenet10() == SAMPLE
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "sample" in said and "refused" in said
    assert imagenet10(download=False) == SAMPLE and "download=False" in capsys.readouterr().err


def test_a_named_folder_that_is_wrong_is_never_replaced_by_the_sample(tmp_path, monkeypatch):
    monkeypatch.setenv("ROTVQ_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="nowhere"):
        imagenet10()
    (tmp_path / "half" / "train" / "n01").mkdir(parents=True)
    noise(0).save(tmp_path / "half" / "train" / "n01" / "a.png")
    with pytest.raises(DataError, match="half/val does not exist"):
        imagenet10(tmp_path / "half")
    (tmp_path / "half" / "val" / "n01").mkdir(parents=True)
    with pytest.raises(DataError, match="half/val/n01 has no pictures"):
        imagenet10(tmp_path / "half")
    (tmp_path / "flat" / "train").mkdir(parents=True)
    with pytest.raises(DataError, match="no class folders"):
        imagenet10(tmp_path / "flat")


def test_decoded_pictures(folder):
    held = ImageNet10("train", 16, Source(folder, "pics"))
    assert held.images.shape == (6, 3, 16, 16) and held.images.dtype == torch.uint8
    assert held.labels.tolist() == [0, 0, 0, 1, 1, 1] and held.classes == ["n01", "n02"]
    grey = held.images[1]
    assert torch.equal(grey[0], grey[1]) and torch.equal(grey[1], grey[2])
    image, label = held[5]
    assert label == 1 and torch.equal(image, held.images[5])
    half = ImageNet10("train", 16, Source(folder, "pics"), limit=2)
    assert half.labels.tolist() == [0, 1] and torch.equal(half.images, held.images[[0, 5]])


@pytest.mark.parametrize(
    "spoil", [lambda b: b[: len(b) // 2], lambda b: b"no picture at all", lambda b: b""]
)
def test_a_corrupt_picture_is_named_and_no_cache_is_left(folder, tmp_path, monkeypatch, spoil):
    monkeypatch.setenv("ROTVQ_CACHE", str(tmp_path / "cache"))
    victim = folder / "train" / "n02" / "0.JPEG"
    victim.write_bytes(spoil(victim.read_bytes()))
    with pytest.raises(DataError, match="n02/0.JPEG"):
        ImageNet10("train", 16, Source(folder, "pics"))
    assert leftovers(tmp_path / "cache" / "decoded") == []


def test_cache_is_reused_and_rebuilt(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("ROTVQ_CACHE", str(tmp_path / "cache"))
    decoded, real = [], data.decode_picture
    monkeypatch.setattr(
        data, "decode_picture", lambda file, size: decoded.append(file) or real(file, size)
    )
    source = Source(folder, "pics")
    first = ImageNet10("train", 16, source).images.clone()
    assert len(decoded) == 6
    assert (
        torch.equal(ImageNet10("train", 16, source).images, first) and len(decoded) == 6
    )  # reused
    ImageNet10("train", 8, source)
    assert len(decoded) == 12  # another resolution
    noise(99).save(folder / "train" / "n01" / "0.JPEG")
    assert (
        not torch.equal(ImageNet10("train", 16, source).images, first) and len(decoded) == 18
    )  # a changed file
    noise(98).save(folder / "train" / "n01" / "new.png")
    assert len(ImageNet10("train", 16, source)) == 7 and len(decoded) == 25  # a new file
    assert (
        len([p for p in leftovers(tmp_path / "cache" / "decoded") if "-16-" in p]) == 1
    )  # the outdated ones are gone
    for p in (tmp_path / "cache" / "decoded").iterdir():
        p.write_bytes(p.read_bytes()[:200])
    assert ImageNet10("train", 8, source).images.shape == (
        7,
        3,
        8,
        8,
    )  # a damaged cache is no obstacle


def test_odd_files(folder):
    n01 = folder / "train" / "n01"
    (n01 / "._0.JPEG").write_bytes(b"left by a file manager")
    (n01 / "folder.png").mkdir()
    Image.fromarray(np.full((20, 20), 30000, dtype=np.uint16)).save(n01 / "a16.png")
    turned = Image.new("RGB", (20, 10), "white")
    turned.paste("black", (0, 0, 10, 10))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown a quarter turn clockwise: black above
    turned.save(n01 / "b.png", exif=exif)
    held = ImageNet10("train", 10, Source(folder, "pics"))
    names = [p.name for p in list_pictures(folder, "train")[0]]
    assert len(held) == 8 and "._0.JPEG" not in names and "folder.png" not in names
    assert held.images[names.index("a16.png")].unique().tolist() == [30000 >> 8]
    picture = held.images[names.index("b.png")].float().mean((0, 2))
    assert picture[:4].max() < 50 and picture[-4:].min() > 200


def test_a_full_disk_is_reported_and_no_sample_taken(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("ROTVQ_CACHE", str(tmp_path / "cache"))
    usage = data.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(data.shutil, "disk_usage", lambda path: usage._replace(free=10))
    with pytest.raises(DataError, match="ROTVQ_CACHE"):
        ImageNet10("train", 16, Source(folder, "pics"))

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torchvision.datasets.utils.download_url", full)
    monkeypatch.delenv("ROTVQ_DATA")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="No space left"):
        imagenet10()


def test_two_downloads_at_once(server, folder, tmp_path, monkeypatch):
    "The other process finished first: its folder is taken, and nothing of ours is left."
    target, real = tmp_path / "home" / "imagenet10", data.unpack

    def race(archive, into):
        real(archive, into)
        data.shutil.copytree(folder, target)

    monkeypatch.setattr(data, "unpack", race)
    server.body = archive(folder)
    assert (
        download_imagenette(target, server.url, hashlib.sha256(server.body).hexdigest()) == target
    )
    assert leftovers(target.parent) == ["imagenet10"]


def test_writing_to_pictures_does_not_reach_the_cache(folder):
    held = ImageNet10("train", 16, Source(folder, "pics"))
    before = held.images.clone()
    held.images.zero_()
    assert torch.equal(ImageNet10("train", 16, Source(folder, "pics")).images, before)


def test_a_cache_that_cannot_be_written_is_named(folder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("ROTVQ_CACHE", str(tmp_path / "file"))
    with pytest.raises(DataError, match="ROTVQ_CACHE"):
        ImageNet10("train", 16, Source(folder, "pics"))


@pytest.mark.slow
def test_sample_crops_are_fixed_and_held_out_by_photograph():
    train, val = ImageNet10("train", 32, SAMPLE), ImageNet10("val", 32, SAMPLE)
    assert len(train) == 4096 and len(val) == 512 and not set(train.classes) & set(val.classes)
    assert torch.equal(ImageNet10("val", 32, SAMPLE).images, val.images)
    assert train.images.float().std() > 30  # photographs, not blanks
    assert len(torch.unique(val.images.flatten(1), dim=0)) == 512


def test_bad_arguments():
    for kw, word in (
        (dict(split="test"), "test"),
        (dict(size=0), "size = 0"),
        (dict(limit=0), "limit = 0"),
    ):
        with pytest.raises(DataError, match=word):
            ImageNet10(**kw)


@pytest.mark.parametrize(
    "array",
    [
        np.full((20, 20), 0.5, dtype=np.float32),
        np.full((20, 20), 2**30, dtype=np.int32),
        np.full((20, 20), -70000, dtype=np.int32),
    ],
    ids=["float", "int", "negative"],
)
def test_pictures_of_32_bits_are_refused(tmp_path, array):
    "They would become black, or anything: nobody knows which value is white."
    Image.fromarray(array).save(tmp_path / "a.tiff")
    with pytest.raises(DataError, match="a.tiff.*32 bits.*8 or 16"):
        data.decode_picture(tmp_path / "a.tiff", 16)


def test_pictures_of_16_bits_in_wider_pixels_are_read(tmp_path):
    Image.fromarray(np.full((20, 20), 40000, dtype=np.int32)).save(tmp_path / "a.tiff")
    assert np.unique(data.decode_picture(tmp_path / "a.tiff", 16)).tolist() == [40000 >> 8]


def test_a_wrong_folder_is_blamed_on_whoever_named_it(monkeypatch):
    monkeypatch.setenv("ROTVQ_DATA", "sample")
    with pytest.raises(DataError, match="nowhere is not a folder") as error:
        imagenet10("nowhere")
    assert "ROTVQ_DATA" not in str(error.value)
    monkeypatch.setenv("ROTVQ_DATA", "elsewhere")
    with pytest.raises(DataError, match="elsewhere is not a folder. ROTVQ_DATA names it; unset it"):
        imagenet10()


@pytest.mark.parametrize(
    "kind, content",
    [
        ("EPS", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EndComments\nshowpage\n"),
        ("GIF", None),
        ("PPM", None),
    ],
)
def test_a_name_does_not_make_a_picture_of_another_format(tmp_path, kind, content):
    """Pillow decides by content, and for some formats starts other programs, or code that is seldom
    tried."""
    file = tmp_path / "a.jpg"
    if content is None:
        Image.new("RGB", (8, 8)).save(file, kind)
    else:
        file.write_bytes(content)
    with pytest.raises(DataError, match="a.jpg cannot be read as a picture"):
        data.decode_picture(file, 8)


@pytest.mark.parametrize("kind", data.FORMATS)
def test_the_formats_that_are_named_are_read_whatever_the_file_is_called(tmp_path, kind):
    Image.new("RGB", (16, 16), (200, 10, 10)).save(tmp_path / "a.png", kind)
    assert abs(int(data.decode_picture(tmp_path / "a.png", 8)[0].mean()) - 200) < 4


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch):
    from rotvq.hardware import gpu
    from rotvq.layer.surroundings import cache_folder

    def nobody(*args, **kwargs):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("ROTVQ_CACHE", raising=False)
    monkeypatch.setattr("rotvq.layer.surroundings.user_cache_path", nobody)
    with pytest.raises(DataError, match="Set ROTVQ_CACHE"):
        data.cache_dir()
    assert gpu.read_choices() == {}
    gpu.write_choices()  # cannot, and training goes on
    monkeypatch.setattr(Path, "expanduser", nobody)
    with pytest.raises(DataError, match="~nouser/x has no home folder"):
        imagenet10("~nouser/x")
    monkeypatch.undo()
    monkeypatch.setenv("ROTVQ_CACHE", "~/a")
    assert data.cache_dir() == cache_folder() == Path.home() / "a" == gpu.known_choices().parent
