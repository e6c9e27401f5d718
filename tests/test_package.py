"""What is released: both files build from a clean copy, with all that an installation needs and a
page that leads somewhere."""

import json
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes

import pytest
import yaml

from helpers import ROOT, settings

pytestmark = pytest.mark.slow

COPIED = ("rotvq", "tests", "settings.ini", "setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE")
COPIED += ("README.md", "CHANGELOG.md", "CITATION.cff", "rotvq_command.py")


def build(source, out, kind: str):
    "One of the two files, as `python -m build` makes it, but with the setuptools that is here."
    call = f"from setuptools import build_meta as b; print('\\n' + b.build_{kind}({str(out)!r}))"
    done = subprocess.run([sys.executable, "-c", call], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    "The archive of the sources, and the wheel that is made from what lies in that archive."
    pytest.importorskip("setuptools", minversion="68")
    place = tmp_path_factory.mktemp("package")
    for name in COPIED:
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, place / name)
    archive = build(place, place, "sdist")
    (place / "unpacked").mkdir()
    with tarfile.open(archive) as tar:
        tar.extractall(place / "unpacked")
        names = {member.name.partition("/")[2] for member in tar if member.isfile()}
    (inside,) = (place / "unpacked").iterdir()
    return names, build(inside, place, "wheel")


def test_the_archive_has_what_it_takes_to_build_and_no_more(files):
    names, _ = files
    assert {"settings.ini", "setup.py", "pyproject.toml", "LICENSE", "README.md"} <= names
    assert {"CHANGELOG.md", "CITATION.cff", "rotvq/__main__.py", "rotvq_command.py"} <= names
    assert not [name for name in names if name.startswith("tests/") or name.endswith(".pyc")]


def test_the_wheel_has_the_package_whole(files):
    with zipfile.ZipFile(files[1]) as wheel:
        inside = {
            name for name in wheel.namelist() if not name.split("/")[0].endswith(".dist-info")
        }
    held = {p.relative_to(ROOT).as_posix() for p in (ROOT / "rotvq").rglob("*") if p.is_file()}
    assert inside == {name for name in held if "__pycache__" not in name} | {"rotvq_command.py"}


def test_what_the_index_is_told(files):
    with zipfile.ZipFile(files[1]) as wheel:
        (name,) = (n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
        told = message_from_bytes(wheel.read(name))
        assert name.replace("METADATA", "entry_points.txt") in wheel.namelist()
        assert any(n.endswith("LICENSE") for n in wheel.namelist())
    cfg = settings()
    assert told["Requires-Python"] == f">={cfg['min_python']}" and told["Version"] == cfg["version"]
    labels = {line.split(",")[0] for line in told.get_all("Project-URL")}
    assert {"Documentation", "Source", "Issues", "Changes", "Paper"} <= labels
    assert "Apache-2.0" in (told["License-Expression"] or told["License"])
    versions = [c.split(" :: ")[-1] for c in told.get_all("Classifier") if "Python :: 3." in c]
    assert versions == cfg["python_versions"].split() and versions[0] == cfg["min_python"]
    page = told.get_payload(decode=True).decode() if told.get_payload() else told["Description"]
    links = re.findall(r"\]\(([^)\s]+)\)", page)
    assert len(links) > 40 and all(re.match("https://|#", link) for link in links)
    assert "https://rotvq.github.io/rotvq/run/when.html" in links
    assert "https://raw.githubusercontent.com/rotvq/rotvq/main/nbs/images/effect.png" in links


def test_shipped_models_say_where_they_come_from_and_what_may_be_done_with_them():
    models = list((ROOT / "rotvq").rglob("model.safetensors"))
    assert len(models) == 2
    for model in models:
        said = (model.parent / "README.md").read_text(encoding="utf-8")
        for word in ("Made by", "Trained on", "Licence", "Apache License 2.0", "Imagenette"):
            assert word in said, model.parent


def workflows() -> dict[str, dict]:
    files = (ROOT / ".github" / "workflows").glob("*.yml")
    return {file.stem: yaml.safe_load(file.read_text(encoding="utf-8")) for file in files}


def test_actions_are_pinned_by_commit():
    "A tag can be moved; the version stands beside it, for people."
    for file in (ROOT / ".github" / "workflows").glob("*.yml"):
        for line in re.findall(r"uses: *(.*)", file.read_text(encoding="utf-8")):
            assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line), (
                f"{file.name}: {line}"
            )


def test_a_release_is_tested_built_and_tried_before_it_is_published():
    jobs = workflows()["release"]["jobs"]
    assert jobs["publish"]["needs"] == "build" and jobs["build"]["needs"] == "test"
    steps = {
        name: [s["run"].split()[1] for s in jobs[name]["steps"] if "run" in s] for name in jobs
    }
    assert steps == {"test": ["release-check", "test"], "build": ["dist-check"], "publish": []}


def test_the_versions_of_python_that_are_tried():
    cfg, matrix = settings(), workflows()["test"]["jobs"]["test"]["strategy"]["matrix"]
    assert matrix["python"] == cfg["python_versions"].split()
    assert all(
        other["untried"] and other["python"] not in matrix["python"] for other in matrix["include"]
    )
    oldest = tuple(map(int, cfg["min_python"].split(".")))
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert f"sys.version_info < {oldest} and" in makefile
    assert f"Python {cfg['min_python']} or newer" in (ROOT / "README.md").read_text(
        encoding="utf-8"
    )


def test_pip_does_not_install_where_there_is_no_environment():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert "export PIP_REQUIRE_VIRTUALENV ?= 1\n" in makefile


def test_the_shipped_model_is_made_by_the_command_that_its_page_names():
    from rotvq.cli import PRETRAINED, parse

    page = (PRETRAINED / "README.md").read_text(encoding="utf-8")
    command = re.search(r"`rotvq (train [^`]*)`", page)[1].split()
    made = json.loads((PRETRAINED / "run.json").read_text(encoding="utf-8"))["run"]
    args = parse(command)
    assert args.estimators == (made["estimator"],) and args.seed == made["seed"]
    assert made["preset"].items() <= vars(args.settings).items()
