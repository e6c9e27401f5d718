"""Runs the checks of the chapters on code that has been changed.

    python tests/mutate.py JOBS.json

Each job names a check, and perhaps a text and what to put in its place, in the package and in the
chapter of the check. Of the chapter only those cells run that define what the check needs. Prints
one JSON line a job: the check's outcome. Every job has a process of its own, forked from one that
has imported torch, so that none sees another's change.
"""

import ast
import json
import os
import re
import shutil
import sys
import tempfile
import time
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# not from helpers.py, which imports the package: a job imports its own, changed
NOTEBOOKS = [
    p for p in sorted((ROOT / "nbs").rglob("*.ipynb")) if ".ipynb_checkpoints" not in p.parts
]
# imported before a job forks, so that none has to do it again
BEFOREHAND = (
    "einops",
    "matplotlib.pyplot",
    "torch",
    "torch._dynamo",
    "torch.utils._python_dispatch",
    "vector_quantize_pytorch",
)
# which cells a check rests on does not show in these
DRAW_AND_SAY = {"fig", "ax", "axes", "plots", "plt", "print", "assert_close"}
SHORTER = "SEEDS = (0, 1, 2)", "SEEDS = (0,)"  # what is wrong is wrong with one seed


def chapter_of(check: str) -> tuple[Path, list[str]]:
    """Path and code cells of the notebook with the check, up to it, but for the first, which
    installs the package where it is missing."""
    for file in NOTEBOOKS:
        cells = [
            "".join(c["source"])
            for c in json.loads(file.read_text(encoding="utf-8"))["cells"]
            if c["cell_type"] == "code"
        ]
        for k, source in enumerate(cells):
            if re.search(rf"^#\| label: {check}$", source, re.MULTILINE):
                return file, cells[1 : k + 1]
    raise LookupError(check)


def names_of(tree: ast.AST) -> tuple[set[str], set[str]]:
    "Names that a cell gives a value or changes, and names that it uses."
    gives, uses, imported = set(), set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            (uses if isinstance(node.ctx, ast.Load) else gives).add(node.id)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            gives.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            imported |= {(a.asname or a.name).split(".")[0] for a in node.names}
    # x.backward(), x.train(), kept.append(...): a call may change what it is called on
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            function = node.value.func
            while isinstance(function, ast.Attribute):
                function = function.value
            if isinstance(function, ast.Name) and function.id not in DRAW_AND_SAY:
                gives.add(function.id)
        if isinstance(node, ast.Subscript | ast.Attribute) and isinstance(node.ctx, ast.Store):
            target = node
            while isinstance(target, ast.Subscript | ast.Attribute):
                target = target.value
            if isinstance(target, ast.Name):
                gives.add(target.id)
    return gives - DRAW_AND_SAY | imported, uses - (DRAW_AND_SAY - {"plots", "plt", "assert_close"})


def needed(cells: list[str]) -> list[ast.Module]:
    "The last cell, and those before it that it rests on, without their own assertions."
    trees = [ast.parse(re.sub(r"^[%!].*$", "", cell, flags=re.MULTILINE)) for cell in cells]
    names, kept = [names_of(tree) for tree in trees], {len(trees) - 1}
    while True:
        wanted = set().union(*(names[k][1] for k in kept))
        more = {k for k in range(len(trees)) if names[k][0] & wanted} - kept
        if not more:
            break
        kept |= more
    for tree in trees[:-1]:
        tree.body = [
            s
            for s in tree.body
            if not isinstance(s, ast.Assert)
            and not (
                isinstance(s, ast.Expr)
                and isinstance(s.value, ast.Call)
                and getattr(s.value.func, "id", "") == "assert_close"
            )
        ]
    return [trees[k] for k in sorted(kept)]


def run(job: dict) -> dict:
    """Outcome of a check: passes (twice in a row, where nothing is changed), caught, or what else
    went wrong."""
    check, old, new = job["check"], job.get("old"), job.get("new")
    notebook, cells = chapter_of(check)
    with tempfile.TemporaryDirectory() as folder:
        package = shutil.copytree(
            ROOT / "rotvq", Path(folder) / "rotvq", ignore=shutil.ignore_patterns("__pycache__")
        )
        found = 0
        if old:
            for file in package.rglob("*.py"):
                text = file.read_text(encoding="utf-8")
                if old in text:
                    file.write_text(text.replace(old, new), encoding="utf-8")
                found += text.count(old)
            found += sum(cell.count(old) for cell in cells)
            cells = [cell.replace(old, new).replace(*SHORTER) for cell in cells]
            if not found:
                return job | {"outcome": "the text to change is nowhere"}
        sys.path.insert(0, folder)
        os.chdir(notebook.parent)
        import torch

        torch.set_num_threads(1)
        names: dict = {"__name__": "__main__"}
        try:
            for tree in (trees := needed(cells)):
                began = time.monotonic()
                exec(compile(tree, notebook.name, "exec"), names)
            if not old and time.monotonic() - began < 2:  # a reader may run a check once more
                exec(compile(trees[-1], notebook.name, "exec"), names)
        except AssertionError:
            outcome = "caught"
        except Exception as error:
            outcome = f"{type(error).__name__}: {error}"
        else:
            outcome = "passes"
    return job | {"outcome": outcome}


def main():
    jobs = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    os.environ |= {"MPLBACKEND": "Agg", "ROTVQ_STATIC": "1"}
    sys.stdout.flush()
    for name in BEFOREHAND:
        import_module(name)
    out, sys.stdout = sys.stdout, sys.stderr  # the chapters print too
    with get_context("fork").Pool(2, maxtasksperchild=1) as pool:
        for result in pool.imap(run, jobs, chunksize=1):
            print(json.dumps(result), file=out, flush=True)


if __name__ == "__main__":
    main()
