"""What several files of tests share."""

import dataclasses
import json
from configparser import ConfigParser, SectionProxy
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from rotvq import VQVAE
from rotvq.run.training import PRESETS, Learner

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"


def below(folder: Path, pattern: str) -> list[Path]:
    "Files of a folder and of those in it; without what begins with a dot, as Jupyter's copies do."
    files = sorted(folder.rglob(pattern))
    return [p for p in files if not any(x[0] == "." for x in p.relative_to(folder).parts)]


NOTEBOOKS = below(NBS, "*.ipynb")
PAGES = below(NBS, "*.qmd")
CPU = torch.device("cpu")
TINY = dataclasses.replace(PRESETS["smoke"], name="tiny", limit=48, epochs=2)  # a run of a second
TIMES = ("seconds", "pictures_per_second", "memory_gb")  # what differs from run to run
METRICS = {"mse", "psnr", "quantization_error", "relative_error"}
METRICS |= {"usage", "perplexity", "images"}


def noise(seed: int, size: tuple[int, int] = (24, 20), mode: str = "RGB") -> Image.Image:
    "A picture that no other is like."
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def picture_folder(root: Path, train: int = 12, val: int = 4) -> Path:
    "A set of one class."
    for split, count in (("train", train), ("val", val)):
        (root / split / "a").mkdir(parents=True)
        for i in range(count):
            noise(100 * (split == "val") + i, (40, 40)).save(root / split / "a" / f"{i:03}.png")
    return root


def lines(file: Path) -> list[dict]:
    "The objects of a file of JSON lines."
    return [json.loads(line) for line in file.read_text().splitlines()]


def same_weights(a: Path, b: Path) -> bool:
    "Whether two saved models are the same, bit for bit."
    a, b = (VQVAE.from_pretrained(folder).state_dict() for folder in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def contents(folder: Path, pattern: str = "**/*") -> dict[str, bytes]:
    "All files of a folder."
    files = (p for p in sorted(folder.glob(pattern)) if p.is_file())
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


def place(page: Path) -> str:
    "Of a notebook or a page: its path in nbs/."
    return page.relative_to(NBS).as_posix()


def settings() -> SectionProxy:
    "What settings.ini says."
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return config["DEFAULT"]


def losses_become(monkeypatch, value: float) -> None:
    "Every step of a training reports a loss that is no number."
    real = Learner.step

    def step(self, x, lr=None):
        mse, counts = real(self, x, lr)
        return mse * value, counts

    monkeypatch.setattr(Learner, "step", step)
