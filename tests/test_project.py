"""The project as a whole: notebooks and package agree, outputs are clean, README and landing page
agree, the package is light."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from helpers import NBS, NOTEBOOKS, PAGES, ROOT, below, contents, place, settings

pytestmark = pytest.mark.slow
sys.path.insert(0, str(ROOT / "tools"))


def cells(notebook: Path):
    return json.loads(notebook.read_text(encoding="utf-8"))["cells"]


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    "A copy of what export and clean read and write, so that the working tree stays as it is."
    place = tmp_path_factory.mktemp("project") / "rotvq"
    place.mkdir()
    for name in ("nbs", "rotvq"):
        shutil.copytree(
            ROOT / name,
            place / name,
            symlinks=True,
            ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"),
        )
    for name in ("settings.ini", "pyproject.toml", "_quarto.yml", "setup.py"):
        shutil.copy(ROOT / name, place)
    return place


def nbdev(command: str, place: Path):
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"}
    done = subprocess.run(
        [str(Path(sys.executable).with_name(command))],
        cwd=place,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_export_leaves_no_difference(copy):
    nbdev("nbdev_export", copy)
    made, held = (contents(root / "rotvq", "**/*.py") for root in (copy, ROOT))
    assert made == held, "run `make export`"


def test_clean_leaves_no_difference(copy):
    nbdev("nbdev_clean", copy)
    cleaned = {place(p): (copy / "nbs" / place(p)).read_bytes() for p in NOTEBOOKS}
    assert cleaned == {place(p): p.read_bytes() for p in NOTEBOOKS}, "run nbdev_clean"


def test_readme_is_the_landing_page():
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "readme.py", "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_benchmark_page_shows_the_results():
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "benchmarks_page.py", "--check"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_the_benchmark_page_refuses_what_was_disturbed(monkeypatch):
    "Median and quartiles of a lookup beside which other work began."
    monkeypatch.syspath_prepend(ROOT / "tools")
    from benchmarks_page import refuse_disturbed

    row = {"median_s": 0.01, "quartiles_s": [0.009, 0.0149]}
    refuse_disturbed("quiet.json", {"shapes": [{"lookup": {"rotvq": row}}]})
    with pytest.raises(SystemExit, match="loud.json: a quartile lies 2200%"):
        refuse_disturbed(
            "loud.json",
            {"curves": {"N": [{"lookup": {"rotvq": row | {"quartiles_s": [0.009, 0.23]}}}]}},
        )


def test_solutions_are_folded_and_no_widget_is_stored():
    for notebook in NOTEBOOKS:
        for cell in cells(notebook):
            if '#| code-summary: "Solution"' in "".join(cell["source"]):
                assert cell["metadata"].get("jupyter") == {
                    "outputs_hidden": True,
                    "source_hidden": True,
                }, notebook.name
            assert not [
                o
                for o in cell.get("outputs", [])
                if "application/vnd.jupyter.widget-view+json" in o.get("data", {})
            ], notebook.name


def test_links_and_pictures_lead_somewhere():
    for file in [ROOT / "README.md", *PAGES, *NOTEBOOKS]:
        text = (
            file.read_text(encoding="utf-8")
            if file.suffix != ".ipynb"
            else "\n".join(
                "".join(c["source"]) for c in cells(file) if c["cell_type"] == "markdown"
            )
        )
        for target in re.findall(r"\]\((?!https?://|#)([^)#\s]+)", text):
            assert (file.parent / target).exists(), f"{file.name}: {target}"


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_executed_and_clean(notebook):
    code = [c for c in cells(notebook) if c["cell_type"] == "code"]
    outputs = [o for c in code for o in c["outputs"]]
    assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]
    if len(code) > 3:
        assert outputs, "not executed"
    for cell in code:
        source = "".join(cell["source"])
        if moving := re.search(
            r"^(?:display\()?(?:plots\.)?(explorable|film|training)\(", source, re.M
        ):
            name = {"training": "playground-training"}.get(moving[1], f"rotvq-{moving[1]}")
            pages = ("".join(o.get("data", {}).get("text/html", "")) for o in cell["outputs"])
            (html,) = (page for page in pages if name in page)
            if moving[1] != "training":
                assert len(re.search(r'<img alt="([^"]*)"', html)[1]) > 30
            assert notebook.stem in ("index", "90_plots") or re.search(
                r"#\| label: fig-.*\n#\| fig-cap: ", source
            )
        elif "#| label: fig-" in source:
            assert (
                "#| fig-cap: " in source
                and "#| fig-alt: " in source
                and any("image/png" in o.get("data", {}) for o in cell["outputs"])
            )
        if (
            any("text/markdown" in o.get("data", {}) for o in cell["outputs"])
            and not re.search(r"#\| (classes: answer|echo: false)", source)
            and notebook.stem[:2] not in ("60", "91")
        ):
            assert re.search(r"#\| label: tbl-.*\n(#\| column.*\n)?#\| tbl-cap: ", source), (
                f"a table without number or caption: {source[:60]}"
            )
        directives = re.match(r"(?:#\|.*\n)*", source).group()
        if "eval: false" not in directives and cell is not code[0]:
            ast.parse(source)
        if "export" in directives:  # the docs build runs these cells alone
            kinds = {
                type(node) in (ast.Import, ast.ImportFrom)
                for node in ast.parse(source).body
                if not isinstance(node, ast.Expr)
            }
            if notebook.stem != "index":
                assert len(kinds) < 2, f"imports mixed with other code: {source[:60]}"


def test_notebooks_begin_alike():
    """A number in the title of a chapter; then a cell that says how long it takes, and installs the
    package where it is missing."""
    begins = set()
    for notebook in NOTEBOOKS:
        held = cells(notebook)
        title, number = "".join(held[0]["source"]), re.match(r"0\d|1[01]", notebook.stem)
        if number and notebook.parent.name == "book":
            assert title.startswith(f"# {int(number[0])} · "), notebook.name
        first = next("".join(c["source"]) for c in held if c["cell_type"] == "code")
        assert re.search(r"Runs in (\d+ seconds|\d+ minutes?) on two CPU cores", first), (
            notebook.name
        )
        *begin, last = first.splitlines()
        # results/ is beside this folder, or in it
        assert last == f"    %cd -q rotvq/{notebook.parent.relative_to(ROOT).as_posix()}"
        begins.add(re.sub(r"Runs in \d+ \w+", "", "\n".join(begin)))
    assert len(begins) == 1


def works() -> dict[str, str]:
    "Key and address of each work of the bibliography."
    return dict(
        re.findall(
            r"@\w+\{(\w+),.*?url = \{([^}]+)\}",
            (ROOT / "nbs" / "references.bib").read_text(encoding="utf-8"),
            re.DOTALL,
        )
    )


def test_works_resolve():
    """Each link to a paper or an article leads to a work of the bibliography, and each of those is
    on the page of the literature."""
    page = (ROOT / "nbs" / "literature.qmd").read_text(encoding="utf-8")
    assert set(works()) == set(re.findall(r"@(\w+)(?=[, ])", page.split("## To cite")[0]))
    for file in [*NOTEBOOKS, *PAGES]:
        text = (
            "\n".join("".join(c["source"]) for c in cells(file) if c["cell_type"] == "markdown")
            if file.suffix == ".ipynb"
            else file.read_text(encoding="utf-8")
        )
        for address in re.findall(r"\]\((https?://(?:arxiv|doi|dl\.acm|kexue)[^)]*)\)", text):
            assert address in works().values(), f"{file.name}: {address}"


def test_every_page_says_what_it_is_about():
    "A title, and a sentence for those who find it by searching."
    for page in PAGES:
        head = yaml.safe_load(page.read_text(encoding="utf-8").split("---")[1])
        assert head["title"] and 30 < len(head["description"]) < 160, place(page)
    for notebook in NOTEBOOKS:
        first = next(c for c in cells(notebook) if c["cell_type"] == "markdown")
        assert re.match(r"# .+\n\n> .{20,}", "".join(first["source"])), place(notebook)


def test_no_notebook_replaces_an_operator_of_the_package():
    """An operator that is defined again under its name leaves the first one dangling, and the
    process may crash."""
    for notebook in NOTEBOOKS:
        for cell in cells(notebook):
            assert not re.search(r"custom_op\(\s*[\"']rotvq::", "".join(cell["source"])), (
                notebook.name
            )


def test_every_notebook_is_in_the_sidebar():
    site = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))["website"]["sidebar"][
        "contents"
    ]
    listed = [page for entry in site for page in entry.get("contents", [entry])]
    for page in listed:
        if number := re.match(r"book/(0\d|1[01])_", page["href"]):
            assert page["text"].startswith(f"{int(number[1])} ")
    pages = {place(p) for p in [*NOTEBOOKS, *PAGES]} - {"404.qmd"}
    assert sorted(page["href"] for page in listed) == sorted(pages)
    assert (ROOT / "nbs" / "_quarto.yml").is_symlink() and not (ROOT / "_quarto.yml").is_symlink()


def test_import_needs_the_run_time_requirements_only(tmp_path):
    """Import and train with every other package of the development environment out of reach; what
    only a download or a training needs is not imported before."""
    absent = (
        "matplotlib IPython jupyter_core ipywidgets nbdev fastcore execnb pytest hypothesis"
        " vector_quantize_pytorch yaml torchmetrics tensorboard".split()
    )
    code = f"""
import sys
sys.modules.update(dict.fromkeys({absent}))  # None: importing it raises ModuleNotFoundError
import rotvq
from rotvq.cli import main
assert not {{"torchvision", "torch._dynamo"}} & {{*sys.modules}}  # a second each, for nothing
sys.exit(main(["train", "--preset", "smoke", "--data", "sample", "--out", sys.argv[1] + "/run"]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "no curves.png" in done.stderr and (tmp_path / "run" / "reconstructions.png").exists()


# which folders a module may import from; "" is rotvq/ itself, where the book's modules lie
FLOORS = {
    "book": {"book"},
    "layer": {"book", "layer"},
    "hardware": {"book", "layer", "hardware"},
    "run": {"book", "layer", "hardware", "run"},
    "": {"book", "layer", "hardware", "run", ""},
}
# what hardware may know of the layer: its operators, and what surrounds them
OPERATORS = {f"layer.{name}" for name in "lookup gradients step learning surroundings".split()}


def imported(module: str, node: ast.ImportFrom, known: set[str]) -> list[str]:
    "Modules of the package that a statement of one of them imports."
    if not node.level and node.module.split(".")[0] != "rotvq":
        return []
    above = ["rotvq", *module.split(".")]
    base = above[: len(above) - node.level] if node.level else []
    name = ".".join([*base, *(node.module.split(".") if node.module else [])])
    name = name.removeprefix("rotvq").removeprefix(".")
    if name in known:
        return [name]
    return [f"{name}.{part.name}".removeprefix(".") for part in node.names]


def test_modules_import_only_earlier_chapters():
    """The staircase: a module imports from notebooks with a lower number, and from the folders
    below its own; only the command line may draw, and only inside a function."""
    chapter, floor = {}, {}
    for notebook in NOTEBOOKS:
        name = re.search(
            r"#\| default_exp ([\w.]+)",
            "".join("".join(c["source"]) for c in cells(notebook) if c["cell_type"] == "code"),
        )
        number = int(re.match(r"\d*", notebook.stem).group() or 0)
        if name and notebook.stem != "index":
            module = name.group(1)
            chapter[module] = number
            # a notebook's folder is its module's, and the book's modules are the package's own
            floor[module] = notebook.parent.relative_to(NBS).as_posix().removeprefix(".")
            assert module.rpartition(".")[0] == floor[module].replace("book", ""), notebook
    files = [p.relative_to(ROOT / "rotvq") for p in below(ROOT / "rotvq", "[!_]*.py")]
    assert set(chapter) == {".".join(p.with_suffix("").parts) for p in files}
    count = 0
    for module, number in chapter.items():
        file = ROOT / "rotvq" / f"{module.replace('.', '/')}.py"
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ImportFrom):
                for other in imported(module, node, set(chapter)):
                    assert chapter[other] < number, f"{module} imports {other}"
                    assert floor[other] in FLOORS[floor[module]], f"{module} imports {other}"
                    if (floor[module], floor[other]) == ("hardware", "layer"):
                        assert other in OPERATORS, f"{module} imports {other}"
                    count += 1
    assert count > 100


def test_workflows_run_what_the_makefile_has():
    targets = set(
        re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    )
    assert {
        "train",
        "test",
        "test-oldest",
        "test-integrations",
        "lab",
        "docs",
        "export",
        "clean",
    } <= targets
    for file in (ROOT / ".github" / "workflows").glob("*.yml"):
        jobs = yaml.safe_load(file.read_text(encoding="utf-8"))["jobs"]
        steps = [step for job in jobs.values() for step in job["steps"]]
        assert all(("uses" in step) != ("run" in step) for step in steps)
        for step in steps:
            if "run" in step:
                assert step["run"].split()[0] == "make" and step["run"].split()[1] in targets
    assert "make test" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_nbdev_is_pinned_with_what_it_needs():
    dev = settings()["dev_requirements"].split()
    for pin in ("nbdev==2.4.14", "execnb<0.2", "fastcore<2", "ghapi<2", "fastgit<0.1"):
        assert pin in dev


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_code_fits_its_column(notebook):
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            for line in "".join(cell["source"]).splitlines():
                assert len(line) <= 88 or line.startswith("#|"), line


def minutes(notebook: Path) -> float:
    "A reader: 150 words, 40 signs of formulas, 25 lines of code (folded: 50), a figure."
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    text = " ".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    code = ["".join(c["source"]) for c in cells if c["cell_type"] == "code"]
    code = [source for source in code if not re.search(r"#\| (hide|echo: false)", source)]
    formula = r"\$\$.*?\$\$|\$[^$]+\$"
    formulas = re.findall(formula, text, re.DOTALL)
    signs = sum(len(re.findall(r"\\?[A-Za-zα-ω]+|\d+|[-=+<>]", f)) for f in formulas)
    words = len(re.sub(formula + r"|\(http[^)]*\)", " ", text, flags=re.DOTALL).split())
    folded = [source for source in code if "#| code-fold" in source]
    lines = 2 * sum(source.count("\n") + 1 for source in code)
    lines -= sum(source.count("\n") + 1 for source in folded)
    figures = sum("#| label: fig-" in source for source in code)
    return words / 150 + signs / 40 + lines / 50 + figures


def test_minutes_to_read():
    rows = re.findall(
        r"^\| \d+ \|.*\]\(nbs/(\S+\.ipynb)\).*\| (\d+) \|$",
        (ROOT / "README.md").read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    assert len(rows) == 11
    for name, said in rows:
        assert abs(minutes(ROOT / "nbs" / name) - int(said)) <= max(2, 0.12 * int(said)), name


def test_citation_has_the_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == settings()["version"] and citation["cff-version"] == "1.2.0"


def test_pages_are_mended():
    from mend_pages import mend

    inline = "<script>draw()</script>"
    page = (
        '<script src="https://cdn.example.org/require.js/2.3.6/require.min.js"'
        ' integrity="sha-1"></script>\n<script'
        f' src="https://cdn.example.org/jquery.min.js"></script>{inline}<script'
        ' src="site_libs/quarto.js"></script>'
    )
    assert mend(page) == f'{inline}<script src="site_libs/quarto.js"></script>'
    assert (
        mend('<mover><mi>q</mi><mo accent="true">\u0302</mo></mover><mo form="prefix">∥</mo>')
        == '<mover><mi>q</mi><mo accent="true" stretchy="false">^</mo></mover><mo'
        ' form="prefix">‖</mo>'
    )


def test_a_shown_figure_leads_to_the_code_that_draws_it():
    from mend_pages import sourced

    page = '<figcaption class="x" id="fig-a-caption-1">\nFigure 1: A.\n</figcaption>'
    shown = sourced(page, "{{< embed book/01_vqvae.ipynb#fig-a >}}")
    assert shown == page.replace("\n</fig", ' <a href="book/vqvae.html#fig-a">Code.</a></fig')
    twenty = (NBS / "twenty.qmd").read_text(encoding="utf-8")
    figures = re.findall(r"embed (\S+)#(fig-[\w-]+) >", twenty)
    assert len(figures) > 11
    for file, label in figures:
        assert f"#| label: {label}\\n" in (NBS / file).read_text(encoding="utf-8"), label


def test_pages_are_light():
    from lighten_pages import few_rules, sooner

    sheet = (
        "/*! licence */.a,.b:hover{c:d}.a:not(.z) p{e:url(x;y)}"
        '@media print{.b{f:"}"}}@media screen{.a{g:h}}@font-face{i:j}:is(.a,.b){k:l}p{m:n}'
    )
    assert few_rules(sheet, {"a"}) == (
        "/*! licence */.a{c:d}.a:not(.z) p{e:url(x;y)}@media screen{.a{g:h}}"
        "@font-face{i:j}:is(.a,.b){k:l}p{m:n}"
    )
    page = (
        '<head><script src="x.js"></script><script src="y.js" type="module"></script>'
        '<link href="d.css" rel="stylesheet" class="quarto-color-alternate"></head><body>'
        "<script>var lightboxQuarto = 1</script></body>"
    )
    light = sooner(page)
    assert '<script defer src="x.js">' in light and '<script src="y.js" type="module">' in light
    assert 'rel="disabled-stylesheet"' in light and "prefers-color-scheme" in light
    assert '<script type="module">var lightboxQuarto' in light


def test_links_to_works_become_citations():
    from mend_pages import cite, offer, works

    entry = (
        '<div id="ref-a2020" class="csl-entry" role="listitem">\nA. 2020. <a'
        ' href="https://example.org/?x=1&amp;y">here</a>.\n</div>'
    )
    known = works(f'<div id="refs">{entry}<div id="ref-b" class="csl-entry">B.</div></div>')
    assert known == {"https://example.org/?x=1&y": ("a2020", entry)}
    link, other = (
        '<a href="https://example.org/?x=1&amp;y">A, 2020</a>',
        '<a href="https://example.org/z">z</a>',
    )
    page = cite(f"{link}<main>{link} {other}</main>{link}", known)
    marked = link.replace("<a", '<a role="doc-biblioref"')
    cited = f'<span class="citation" data-cites="a2020">{marked}</span>'
    assert (
        page.startswith(f"{link}<main>{cited} {other}<section")
        and page.count(entry) == 1
        and page.endswith(f"</section>\n</main>{link}")
    )
    for page in (f"<main>{other}</main>", link):
        assert cite(page, known) == page
    page = offer('<div class="toc-actions"><ul><li>edit</li></ul></div>', "book/01_a.ipynb")
    assert (
        'href="01_a.ipynb" download' in page
        and "/github/rotvq/rotvq/blob/main/nbs/book/01_a.ipynb" in page
        and page.endswith("<li>edit</li></ul></div>")
    )


def test_names_lead_to_the_reference():
    import reference
    from mend_pages import mend

    name = '<a href="https://rotvq.github.io/rotvq/book/vqvae.html#nearest_code">'
    assert mend(name) == '<a href="reference/codebook.html#nearest_code">'
    assert mend(name, 2) == '<a href="../../reference/codebook.html#nearest_code">'
    name = '<a href="https://rotvq.github.io/rotvq/layer/learning.html#learn_after">'
    assert mend(name) == '<a href="reference/layer/learning.html#learn_after">'
    script = '<script src="assets/rotvq.js"></script>'
    preview = (
        '<meta property="og:image" content="https://rotvq.github.io/rotvq/{}images/effect.png">'
    )
    for folder in ("", "book/", "reference/layer/"):
        assert mend(preview.format(folder)) == preview.format("")
    assert mend('<img src="a.png">') == '<img loading="lazy" src="a.png">'
    assert mend(script) == script and mend(script, 1) == script.replace("assets", "../assets")
    assert mend(f"<pre><code>{'word ' * 20}</code></pre>").startswith(
        '<pre class="sentences" tabindex="0"><code>word'
    )
    assert mend(f"<pre><code>{'column    ' * 10}</code></pre>").startswith(
        '<pre tabindex="0"><code>column'
    )
    assert (
        mend(
            '<meta property="og:image"'
            ' content="https://rotvq.github.io/rotvq/data:image/png;base64,iVBO">'
        )
        == '<meta property="og:image" content="https://rotvq.github.io/rotvq/images/effect.png">'
    )
    assert (
        mend('<a href="https://rotvq.github.io/rotvq/run/when.html">')
        == '<a href="https://rotvq.github.io/rotvq/run/when.html">'
    )
    held = {
        p.relative_to(NBS / "reference").as_posix(): p.read_text(encoding="utf-8")
        for p in below(NBS / "reference", "*.qmd")
    }
    assert held == reference.pages(), "run `make export`"
    listed = re.findall(
        r"href: reference/(\S+)", (ROOT / "_quarto.yml").read_text(encoding="utf-8")
    )
    assert set(listed) == set(held)
    assert (
        "(self, z: Tensor, mask: Tensor | None = None) -> Diagnosis" in held["layer/quantizer.qmd"]
    )
    assert (
        "    size: int = 64\n" in held["run/training.qmd"]
        and "    # side of the pictures, pixels\n" in held["run/training.qmd"]
        and "@dataclass(frozen=True)\nclass Config" in held["run/training.qmd"]
    )
    for name, text in held.items():
        anchors = re.findall(r"\{#(\S+)\}", text)
        assert len(anchors) == len(set(anchors)), name
    assert "    *,\n    estimator: str | Estimator" in held["layer/quantizer.qmd"].replace(
        "        ", "    "
    )
