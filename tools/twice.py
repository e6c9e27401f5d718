"""Executes every code cell of the notebooks twice in a row, as a reader does who changes one and
goes back: nothing may fail.

    python tools/twice.py [book/01_vqvae ...]             (make test-twice)

On the bundled sample, in a copy of the notebooks.
"""

import copy
import os
import shutil
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError

NOTEBOOKS = Path(__file__).resolve().parent.parent / "nbs"


def failures(notebook: Path, folder: Path) -> list[str]:
    "The cells of a notebook that fail, the first or the second time."
    book = nbformat.read(notebook, 4)
    client = NotebookClient(book, timeout=600, resources={"metadata": {"path": str(folder)}})
    found = []
    with client.setup_kernel():
        for number, cell in enumerate(book.cells):
            for time in ("first", "second") if cell.cell_type == "code" else ():
                try:
                    client.execute_cell(copy.deepcopy(cell), number)
                except (CellExecutionError, CellTimeoutError) as error:
                    said = str(error).strip().splitlines()[-1]
                    found.append(f"{notebook.stem}, cell {cell.id}, the {time} time: {said}")
    return found


def main() -> int:
    with tempfile.TemporaryDirectory() as place:
        os.environ |= {"ROTVQ_DATA": "sample", "ROTVQ_PRESET": "smoke", "OMP_NUM_THREADS": "1"}
        os.environ |= {"ROTVQ_CACHE": f"{place}/cache", "ROTVQ_STATIC": "1"}
        folder = Path(shutil.copytree(NOTEBOOKS, f"{place}/nbs"))
        bad = []
        files = (file.relative_to(NOTEBOOKS) for file in NOTEBOOKS.rglob("*.ipynb"))
        all_of = (file for file in files if ".ipynb_checkpoints" not in file.parts)
        for name in sys.argv[1:] or sorted(file.with_suffix("").as_posix() for file in all_of):
            print(f"==> {name}", flush=True)
            notebook = folder / f"{name}.ipynb"
            found = failures(notebook, notebook.parent)
            print(*found, sep="\n", end="\n" if found else "", flush=True)
            bad += found
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
