"""What can be wrong with pictures, their folders, their archive and what is kept of them."""

import hashlib
import io
import os
import resource
import signal
import tarfile
import warnings

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

import rotvq.run.data as data
from helpers import noise, picture_folder
from rotvq.run.data import DataError, ImageNet10, Source, decode_all, list_pictures, unpack


@pytest.fixture
def pics(tmp_path):
    return picture_folder(tmp_path / "pics")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ROTVQ_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "decoded"


# Folders


def test_links_are_followed(pics, tmp_path):
    "To a file, to a class, and to a folder inside of a class: pictures are often kept elsewhere."
    elsewhere = picture_folder(tmp_path / "elsewhere", train=3) / "train" / "a"
    (pics / "train" / "b").symlink_to(elsewhere)
    (pics / "train" / "a" / "more").symlink_to(elsewhere)
    (pics / "train" / "a" / "one.png").symlink_to(elsewhere / "000.png")
    files, labels, classes = list_pictures(pics, "train")
    assert classes == ["a", "b"] and [labels.count(c) for c in (0, 1)] == [12 + 3 + 1, 3]


@pytest.mark.parametrize("place", ["train/a/x.png", "train/a/more", "train/b"])
def test_a_link_to_nothing_is_named(pics, place):
    (pics / place).symlink_to("/mnt/not-there")
    with pytest.raises(DataError, match=f"{place} is a link to /mnt/not-there"):
        list_pictures(pics, "train")


def test_a_link_that_leads_in_circles_is_named(pics):
    (pics / "train" / "a" / "again").symlink_to(pics / "train")
    with pytest.raises(DataError, match="train/a/again/a holds itself, by a link"):
        list_pictures(pics, "train")


def test_a_folder_that_may_not_be_read_is_named(pics, monkeypatch):
    real = os.scandir

    def scandir(folder):  # root may read all
        if str(folder).endswith("train/a"):
            raise PermissionError(13, "Permission denied", str(folder))
        return real(folder)

    monkeypatch.setattr(data.os, "scandir", scandir)
    with pytest.raises(DataError, match="train/a cannot be looked into .Permission denied."):
        list_pictures(pics, "train")


def test_pictures_that_are_left_out_are_counted(pics):
    noise(1).save(pics / "train" / "lost.png")
    for name in ("x.gif", "y.HEIC"):
        (pics / "train" / "a" / name).write_bytes(b"")
    with pytest.warns(UserWarning, match="3 pictures in .*train are left out, .*lost.png"):
        assert len(list_pictures(pics, "train")[0]) == 12


def test_what_is_no_picture_is_left_out_without_a_word(pics):
    for name in (".DS_Store", "notes.txt", "Thumbs.db"):
        (pics / "train" / "a" / name).write_text("")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(list_pictures(pics, "train")[0]) == 12


@pytest.mark.parametrize("ending", sorted(data.EXTENSIONS))
def test_every_ending_is_found_and_read(pics, ending, cache):
    kind = {".png": "PNG", ".webp": "WEBP", ".bmp": "BMP", ".tif": "TIFF", ".tiff": "TIFF"}
    noise(7).save(pics / "train" / "a" / f"z{ending.upper()}", kind.get(ending, "JPEG"))
    assert ImageNet10("train", 16, Source(pics, "pics")).images.shape == (13, 3, 16, 16)


# Pictures


def camera(orientation) -> bytes:
    "A JPEG whose EXIF data say how the camera was held: white left, black right."
    image, exif = Image.new("RGB", (32, 16), "white"), Image.Exif()
    image.paste("black", (16, 0, 32, 16))
    exif[ExifTags.Base.Orientation] = orientation
    file = io.BytesIO()
    image.save(file, "JPEG", exif=exif, quality=95)
    return file.getvalue()


def test_damaged_exif_data_do_not_stop_a_set(tmp_path):
    "Every byte of the block, spoilt in turn: the pixels are read all the same."
    whole = camera(1)
    begin = whole.index(b"Exif\0\0") + 6
    (tmp_path / "a.jpg").write_bytes(whole)
    expected = data.decode_picture(tmp_path / "a.jpg", 16)
    for place in range(begin, begin + 26):
        for value in (0, 255):
            spoilt = whole[:place] + bytes([value]) + whole[place + 1 :]
            (tmp_path / "a.jpg").write_bytes(spoilt)
            found = data.decode_picture(tmp_path / "a.jpg", 16)
            # which way is up may be what was spoilt
            assert np.array_equal(np.sort(found, None), np.sort(expected, None)), place


@pytest.mark.parametrize("orientation", range(9))
def test_pictures_are_turned_as_pillow_turns_them(tmp_path, orientation):
    from PIL import ImageOps

    (tmp_path / "a.jpg").write_bytes(camera(orientation))
    with Image.open(tmp_path / "a.jpg") as image:
        expected = ImageOps.exif_transpose(image)
        assert np.array_equal(np.asarray(data.upright(image)), np.asarray(expected))


def test_a_png_whose_bytes_were_lost_is_not_read_as_black(tmp_path):
    "A crash of the machine may leave zeros; Pillow stops reading there, and says nothing."
    noise(3, (40, 40)).save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(whole[:100] + bytes(len(whole) - 100))
    with pytest.raises(DataError, match="a.png cannot be read as a picture"):
        data.decode_picture(tmp_path / "a.png", 16)


# What is kept of them


def spoil(file, how):
    pixels = np.load(file)
    whole = file.read_bytes()
    if how == "a byte":
        file.write_bytes(whole[:-40] + bytes([whole[-40] ^ 1]) + whole[-39:])
    if how == "header":
        file.write_bytes(whole[:20] + b"[" + whole[21:])
    if how == "zeros from the start":
        file.write_bytes(whole[:10] + bytes(len(whole) - 10))
    if how == "zeros":
        file.write_bytes(whole[:200] + bytes(len(whole) - 200))
    if how == "no checksum":
        file.write_bytes(whole[:-8])
    if how == "columns first":
        np.save(file, np.asfortranarray(pixels))
    if how == "numbers":
        np.save(file, pixels.astype(np.float32))
    if how == "objects":
        np.save(file, np.array([{}], dtype=object), allow_pickle=True)


HOW = [
    "a byte",
    "header",
    "zeros from the start",
    "zeros",
    "no checksum",
    "columns first",
    "numbers",
    "objects",
]


@pytest.mark.parametrize("how", HOW)
def test_decoded_pictures_that_were_damaged_are_decoded_once_more(pics, cache, capsys, how):
    source = Source(pics, "pics")
    expected = ImageNet10("train", 16, source).images.clone()
    (file,) = cache.iterdir()
    spoil(file, how)
    assert torch.equal(ImageNet10("train", 16, source).images, expected)
    assert f"{file} is damaged" in capsys.readouterr().err
    assert torch.equal(ImageNet10("train", 16, source).images, expected)
    assert capsys.readouterr().err == "" and list(cache.iterdir()) == [file]


def test_a_disk_that_fills_while_decoding_is_an_error(tmp_path):
    "A limit on the size of files stands for the disk: it is met in the middle of a write."
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(DataError, match="Cannot write to .*ROTVQ_CACHE"):
            picture = np.zeros((3, 64, 64), np.uint8)
            decode_all(list(range(40)), lambda job: picture, 64, tmp_path / "cache" / "a.npy")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert list((tmp_path / "cache").iterdir()) == []


# The archive


def member(name, kind=tarfile.REGTYPE, target="", content=b"x"):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    info.size = len(content) if kind == tarfile.REGTYPE else 0
    return info, content


@pytest.mark.parametrize(
    "odd",
    [
        member("../outside"),
        member("/tmp/absolute"),
        member("set/train/../../../outside"),
        member("set/link", tarfile.SYMTYPE, "/etc"),
        member("set/hard", tarfile.LNKTYPE, "../../outside"),
        member("set/pipe", tarfile.FIFOTYPE),
        member("set/device", tarfile.CHRTYPE),
    ],
    ids=lambda odd: odd[0].name,
)
def test_an_archive_that_reaches_out_is_refused_whole(tmp_path, odd):
    with tarfile.open(tmp_path / "a.tgz", "w:gz") as tar:
        for info, content in (member("set/train/a/0.png"), odd):
            tar.addfile(info, io.BytesIO(content) if info.isreg() else None)
    with pytest.raises(DataError, match=f"a.tgz holds {odd[0].name}"):
        unpack(tmp_path / "a.tgz", tmp_path / "into" / "deep")
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["a.tgz"]


def test_an_archive_of_files_and_folders_is_unpacked(tmp_path):
    folder = member("set", tarfile.DIRTYPE)
    file = member("set/run", content=b"#!")
    file[0].mode = 0o4777
    with tarfile.open(tmp_path / "a.tgz", "w:gz") as tar:
        for info, content in (folder, file):
            tar.addfile(info, io.BytesIO(content) if info.isreg() else None)
    unpack(tmp_path / "a.tgz", tmp_path / "into")
    assert (tmp_path / "into" / "set" / "run").read_bytes() == b"#!"
    mode = (tmp_path / "into" / "set" / "run").stat().st_mode
    assert mode & 0o7022 == 0  # for nobody else to write, nor to run as another


def test_the_archive_is_known_by_a_sha256():
    url, digest = data.IMAGENETTE
    assert url.startswith("https://") and len(bytes.fromhex(digest)) == hashlib.sha256().digest_size


def test_what_another_process_puts_away_is_no_error(pics, cache, monkeypatch):
    "Its temporary file is renamed between a look at the folder and one at the file."
    source = Source(pics, "pics")
    ImageNet10("train", 16, source)
    (cache / ".gone.npy").symlink_to(cache / "renamed.npy")
    assert ImageNet10("train", 8, source).images.shape == (12, 3, 8, 8)


def test_another_way_of_decoding_finds_what_it_replaces(pics, cache, monkeypatch):
    source = Source(pics, "pics")
    ImageNet10("train", 16, source)
    monkeypatch.setattr(data, "DECODER", data.DECODER + 1)
    ImageNet10("train", 16, source)
    assert len(list(cache.iterdir())) == 1
