"""Package metadata, read from settings.ini so that it is written down once."""

import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

root = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(root / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]
site, source = cfg["doc_host"] + cfg["doc_baseurl"], cfg["git_url"]
raw = source.replace("github.com", "raw.githubusercontent.com")


def absolute(link: re.Match) -> str:
    "Where a link of the README leads to for somebody who reads it on the package index."
    file, _, place = link[1].partition("#")
    page = re.fullmatch(r"nbs/((?:\w+/)*)(?:\d+_)?(\w+)\.(?:ipynb|qmd)", file)
    if page:
        target = f"{site}/{page[1]}{page[2]}.html"
    else:
        place_of = raw if file.endswith((".png", ".webp")) else f"{source}/blob"
        target = f"{place_of}/{cfg['branch']}/{file}"
    return f"]({target}{'#' + place if place else ''})"


readme = (root / "README.md").read_text(encoding="utf-8")
extras = {
    name.removesuffix("_requirements"): cfg[name].split()
    for name in cfg
    if name.endswith("_requirements")
}
extras["dev"] += extras["notebooks"]  # the tests execute the notebooks
versions = cfg["python_versions"].split()

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=re.sub(r"\]\((?!https?://|#)([^)\s]+)\)", absolute, readme),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=site,
    project_urls={
        "Documentation": site,
        "Source": source,
        "Issues": f"{source}/issues",
        "Changes": f"{source}/blob/{cfg['branch']}/CHANGELOG.md",
        "Paper": "https://arxiv.org/abs/2410.06424",
    },
    keywords=cfg["keywords"].split(),
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Processing",
        "Typing :: Typed",
        *(f"Programming Language :: Python :: {version}" for version in ["3", *versions]),
    ],
    license="Apache-2.0",
    license_files=["LICENSE"],
    packages=find_packages(include=["rotvq", "rotvq.*"]),
    py_modules=["rotvq_command"],
    package_data={
        "rotvq": ["py.typed", "sample/*.md", "sample/*/*/*.jpg", "pretrained/*", "judge/*"]
    },
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(),
    extras_require=extras,
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        "nbdev": [f"{cfg['lib_name']}={cfg['lib_path']}._modidx:d"],
    },
)
