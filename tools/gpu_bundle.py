"""What `benchmarks/gpu_check.py` needs on a machine with a GPU and without network, into
gpu-bundle/.

    make gpu-bundle                                 (python tools/gpu_bundle.py)
    make gpu-bundle BUNDLE="--part-mb 48"           more and smaller archives
    make gpu-bundle BUNDLE="--reencode"             one archive of smaller pictures (figures say so)

source.tar.gz: the source tree as it was committed. wheels/: packages that PyTorch does not bring
along, for Linux on x86-64, by name and version as they are installed here. pictures-*.tar.xz:
ImageNet-10 byte for byte, in archives of at most --part-mb MB each that hold every second (third,
...) picture, so that one alone is a fair half. bundle.json: what is what. Takes about two minutes.
"""

import argparse
import importlib.metadata
import io
import json
import re
import subprocess
import sys
import tarfile
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
from gpu_check import needed

SOURCES = (
    "rotvq",
    "tests",
    "benchmarks",
    "tools",
    "settings.ini",
    "setup.py",
    "pyproject.toml",
    "rotvq_command.py",
    "Makefile",
    "README.md",
    "LICENSE",
)
# pip takes each platform tag as it is, and wheels name the oldest that will do
PLATFORMS = (
    "manylinux_2_28_x86_64",
    "manylinux_2_27_x86_64",
    "manylinux_2_17_x86_64",
    "manylinux2014_x86_64",
    "manylinux1_x86_64",
)
BROUGHT = ("torch", "torchvision", "numpy", "pillow")  # by a machine with PyTorch


def usual(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def closure(names, python: str, leave_out=frozenset()) -> dict[str, str]:
    "These distributions and what they need on Linux, name and version, as installed here."
    environment = default_environment() | {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "sys_platform": "linux",
        "platform_system": "Linux",
        "platform_machine": "x86_64",
        "extra": "",
    }
    found, waiting = {}, [usual(name) for name in names]
    while waiting:
        name = waiting.pop()
        if name in found or name in leave_out:
            continue
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # of another platform
        needs = map(Requirement, importlib.metadata.requires(name) or [])
        waiting += [
            usual(need.name)
            for need in needs
            if need.marker is None or need.marker.evaluate(environment)
        ]
    return found


def wheels(out: Path, python: str) -> dict[str, str]:
    there = closure(BROUGHT, python)
    names = closure(needed(), python, set(there))
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-q",
            "--disable-pip-version-check",
            "--no-deps",
            "--only-binary=:all:",
            "--python-version",
            python,
            "--implementation",
            "cp",
            *platforms,
            "-d",
            out / "wheels",
            *(f"{name}=={version}" for name, version in names.items()),
        ],
        check=True,
    )
    return names


def archived(files: list[tuple[str, Path | bytes]], archive: Path) -> None:
    "Names and contents, in one compressed archive whose bytes depend on nothing else."
    with tarfile.open(archive, "w:xz") as held:
        for name, content in files:
            content = content if isinstance(content, bytes) else content.read_bytes()
            info = tarfile.TarInfo(name)
            info.size = len(content)
            held.addfile(info, io.BytesIO(content))


def byte_for_byte(root: Path, out: Path, most: float) -> str:
    "The files as they are; the name of their folder."
    from rotvq.run.data import list_pictures

    files = [file for split in ("train", "val") for file in list_pictures(root, split)[0]]
    count = -(
        -int(0.93 * sum(file.stat().st_size for file in files)) // int(most)
    )  # xz leaves a little more
    while True:
        archives = [out / f"pictures-{number + 1}.tar.xz" for number in range(count)]
        for number, archive in enumerate(archives):
            archived(
                [
                    (f"imagenet10/{file.relative_to(root).as_posix()}", file)
                    for file in files[number::count]
                ],
                archive,
            )
        largest = max(archive.stat().st_size for archive in archives)
        if largest <= most:
            return "imagenet10"
        for archive in archives:
            archive.unlink()
        count = max(count + 1, round(count * largest / most + 0.49))


def reencoded(root: Path, out: Path, most: float, side: int) -> str:
    """Middle squares of `side` pixels at the highest quality that fits into one archive; the name
    of their folder says so."""
    from PIL import Image

    from rotvq.run.data import decode_picture, list_pictures

    pictures = [
        (
            file.relative_to(root).with_suffix(".jpg").as_posix(),
            Image.fromarray(decode_picture(file, side).transpose(1, 2, 0)),
        )
        for split in ("train", "val")
        for file in list_pictures(root, split)[0]
    ]
    for quality in (95, 92, 90, 87, 85, 80, 75):
        encoded = []
        for name, picture in pictures:
            file = io.BytesIO()
            picture.save(file, "JPEG", quality=quality)
            encoded.append((name, file.getvalue()))
        folder, archive = f"imagenet10-{side}px-q{quality}", out / "pictures-1.tar.xz"
        archived([(f"{folder}/{name}", content) for name, content in encoded], archive)
        if archive.stat().st_size <= most:
            return folder
    raise SystemExit(
        f"{len(pictures):,} pictures of {side} pixels do not fit into {most / 1e6:.0f} MB: choose a"
        " smaller --side."
    )


def main():
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--data", help="see `rotvq train --help`")
    options.add_argument("--python", default="3.12", help="of the other machine")
    options.add_argument("--part-mb", type=float, default=60, help="most of an archive of pictures")
    options.add_argument("--reencode", action="store_true")
    options.add_argument("--side", type=int, default=128, help="of pictures that are encoded anew")
    options.add_argument("--out", type=Path, default=ROOT / "gpu-bundle")
    args = options.parse_args()
    from rotvq.run.data import SAMPLE, imagenet10
    from rotvq.run.records import commit_of, data_fingerprint

    source = imagenet10(args.data)
    (args.out / "wheels").mkdir(parents=True, exist_ok=True)
    for old in [*args.out.glob("pictures-*"), *args.out.glob("wheels/*.whl")]:
        old.unlink()
    commit = commit_of(ROOT)
    print(f"==> sources of {commit}", flush=True)
    subprocess.run(
        ["git", "archive", "-o", (args.out / "source.tar.gz").resolve(), "HEAD", *SOURCES],
        cwd=ROOT,
        check=True,
    )
    print("==> wheels", flush=True)
    about = {"commit": commit, "wheels": wheels(args.out, args.python), "python": args.python}
    if source == SAMPLE:
        print("==> no ImageNet-10 here: the full run will be on the bundled sample", flush=True)
    else:
        print(f"==> pictures of {source.root}", flush=True)
        most = 1e6 * args.part_mb
        folder = (
            reencoded(source.root, args.out, most, args.side)
            if args.reencode
            else byte_for_byte(source.root, args.out, most)
        )
        about |= {
            "folder": folder,
            "pictures": data_fingerprint(source),
            "reencoded": args.reencode,
        }
    (args.out / "bundle.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    for file in sorted(args.out.rglob("*")):
        if file.is_file():
            print(f"{file.stat().st_size / 1e6:8.2f} MB  {file.relative_to(args.out)}")


if __name__ == "__main__":
    main()
