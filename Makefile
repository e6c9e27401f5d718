# Everything here makes .venv by itself, with plain venv and pip, and does not install again while nothing has changed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OLDEST := .venv-oldest
DIST := .venv-dist
# compat: the package is found even from the folder above, where the clone itself has its name
PIP_FLAGS := --disable-pip-version-check -q --config-settings editable_mode=compat
PACKAGE := settings.ini setup.py pyproject.toml
# pip refuses where .venv is none (a bare link to Python, a lost pyvenv.cfg), and does not install into the system
export PIP_REQUIRE_VIRTUALENV ?= 1

.PHONY: help train check lint format test test-site test-peer test-integrations test-oldest test-twice gpu-check gpu-bundle full lab docs quarto export notebooks dist dist-check release-check clean
.DEFAULT_GOAL := help

help:
	@echo "make train              train straight-through, rotation and the rule side by side on ImageNet-10, print the table"
	@echo "make check              before every commit, a minute and a half: lint, and the tests that need no compiler, browser or process"
	@echo "make test               all notebooks and tests"
	@echo "make test-site          the rendered site, page by page, in Chromium (needs Quarto)"
	@echo "make test-integrations  ONNX, Lightning, accelerate, diffusers, transformers, encodec (installs them into .venv)"
	@echo "make test-peer          the own tests of vector_quantize_pytorch with this layer in the place of theirs (fetches them)"
	@echo "make test-oldest        the tests of the package with the oldest versions that settings.ini allows"
	@echo "make test-twice         each cell of the notebooks executed twice in a row, as readers do"
	@echo "make gpu-check          on a machine with a GPU, five minutes: tests, benchmarks, steps, the start of the full run, into gpu-check/"
	@echo "make gpu-bundle         what that check needs on a machine without network, into gpu-bundle/"
	@echo "make full               on a machine with a GPU: the full run, three seeds, and its figures in the chapter on the run"
	@echo "make lab                JupyterLab on the notebooks"
	@echo "make docs               the site, into _docs/ (needs Quarto)"
	@echo "make export             rotvq/, README.md and nbs/reference/ from the notebooks"
	@echo "make notebooks          execute all notebooks in place, on the bundled sample"
	@echo "make format             ruff's layout for all code but rotvq/, which is made from the notebooks"
	@echo "make dist               the package as it is released, into dist/; make dist-check installs and tries its two files"
	@echo "make clean              remove what can be made again (the environments .venv* too); data/ and runs/ stay"

# An existing .venv is used as it is, so another build of PyTorch can be put there first.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "rotvq needs Python 3.11 or newer, and %s is %s. Try: make PYTHON=python3.12 ..." % (sys.executable, sys.version.split()[0]))'
	@echo "==> making $(VENV)"
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "Python could not make $(VENV). On Debian and Ubuntu: apt install python3-venv"; exit 1; }

$(VENV)/train-ready: $(PACKAGE) | $(BIN)/python
	@echo "==> installing rotvq and PyTorch into $(VENV) (once; pip is quiet while it fetches PyTorch, which takes minutes)"
	@$(BIN)/python -m pip install $(PIP_FLAGS) -e '.[plots]'
	@touch $@

$(VENV)/dev-ready: $(PACKAGE) | $(BIN)/python
	@echo "==> installing rotvq, PyTorch and the tools for notebooks and tests into $(VENV) (once; pip is quiet, this takes minutes)"
	@$(BIN)/python -m pip install $(PIP_FLAGS) -e '.[dev]'
	@touch $@ $(VENV)/train-ready

$(VENV)/integrations-ready: $(VENV)/dev-ready
	@echo "==> installing the frameworks of settings.ini's integrations_requirements into $(VENV) (once)"
	@$(BIN)/python -m pip install $(PIP_FLAGS) -e '.[dev,integrations]'
	@touch $@

# An environment of its own. The oldest versions come last and by themselves: libraries of the tests may ask for newer ones.
$(OLDEST)/ready: $(PACKAGE)
	@echo "==> installing the oldest versions into $(OLDEST) (once; several GB)"
	@rm -rf $(OLDEST)
	@$(PYTHON) -m venv $(OLDEST)
	@oldest=$$($(OLDEST)/bin/python -c "import configparser as c; s = c.ConfigParser(); s.read('settings.ini'); print(s['DEFAULT']['requirements'].replace('>=', '=='))"); \
	torch=$$(echo "$$oldest" | tr ' ' '\n' | grep ^torch); numpy=$$(echo "$$oldest" | tr ' ' '\n' | grep ^numpy); \
	$(OLDEST)/bin/python -m pip install --disable-pip-version-check -q $$torch $$numpy matplotlib pytest hypothesis pyyaml vector-quantize-pytorch && \
	$(OLDEST)/bin/python -m pip install --disable-pip-version-check -q --no-deps $$oldest && \
	$(OLDEST)/bin/python -m pip install --disable-pip-version-check -q --no-deps --config-settings editable_mode=compat -e .
	@touch $@

train: $(VENV)/train-ready
	@echo "==> rotvq train"
	@$(BIN)/rotvq train

lint: $(VENV)/dev-ready
	@$(BIN)/ruff check -q .
	@$(BIN)/ruff format -q --check . || { echo "make format lays them out"; exit 1; }

format: $(VENV)/dev-ready
	@$(BIN)/ruff check -q --fix .
	@$(BIN)/ruff format -q .
	@$(BIN)/nbdev_clean
	@$(BIN)/nbdev_export

# The real pictures where ROTVQ_DATA names them, else the bundled sample: tests never download. The notebooks run in
# their own folders, so a relative one is made absolute first. Notebooks and files of tests run two at a time, with one thread each.
TESTING = set -e; PATH="$(CURDIR)/$(BIN):$$PATH"; export PATH ROTVQ_PRESET=smoke ROTVQ_CACHE="$(CURDIR)/$(VENV)/cache" ROTVQ_DATA="$${ROTVQ_DATA:-sample}"; \
	if [ -d "$$ROTVQ_DATA" ]; then ROTVQ_DATA=$$(cd "$$ROTVQ_DATA" && pwd); fi; \
	export OMP_NUM_THREADS=1

check: lint
	@$(TESTING); ROTVQ_DATA=sample python -m pytest -q -n 2 --dist worksteal -m "not slow"

test: lint
	@$(TESTING); \
	echo "==> executing the notebooks (pictures: $$ROTVQ_DATA)"; nbdev_test --n_workers 2 --do_print --timing; \
	echo "==> pytest"; python -m pytest -n 2 --dist loadfile --durations 20

test-site: quarto $(VENV)/dev-ready
	@PATH="$(CURDIR)/$(BIN):$$PATH" python -m pytest tests/test_site.py

# PEER: a clone of that repository
PEER ?= $(VENV)/vector-quantize-pytorch
test-peer: $(VENV)/dev-ready
	@[ -d "$(PEER)" ] || git clone -q --depth 1 https://github.com/lucidrains/vector-quantize-pytorch "$(PEER)"
	@PYTHONPATH=tests/peer $(BIN)/python -m pytest -p adapter -p no:cacheprovider --rootdir "$(PEER)" -rs "$(PEER)/tests/test_readme.py"

test-integrations: $(VENV)/integrations-ready
	@$(BIN)/python -m pytest tests/integrations

# Without the tests of the project itself, which need nbdev.
test-oldest: $(OLDEST)/ready
	@PATH="$(CURDIR)/$(OLDEST)/bin:$$PATH" python -m pytest $(foreach t,project package gpu_check claims mutations explorables playground compatibility site jupyterlab,--ignore tests/test_$(t).py)

test-twice: $(VENV)/dev-ready
	@$(BIN)/python tools/twice.py

gpu-check: $(VENV)/dev-ready
	@$(BIN)/python benchmarks/gpu_check.py --minutes $(or $(MINUTES),5)

gpu-bundle: $(VENV)/dev-ready
	@$(BIN)/python tools/gpu_bundle.py $(BUNDLE)

# The notebook reads the results that the script writes; both go on where they were stopped.
full: $(VENV)/dev-ready
	@$(BIN)/python benchmarks/convergence.py --preset cuda
	@cd nbs/book && ROTVQ_DATA=sample ROTVQ_PRESET=smoke ROTVQ_STATIC=1 ../../$(BIN)/jupyter nbconvert --log-level=ERROR --to notebook --execute --inplace --ExecutePreprocessor.record_timing=False 11_run.ipynb
	@$(BIN)/nbdev_clean

# In a container one is often root, where JupyterLab does not start unless told to.
lab: $(VENV)/dev-ready
	@$(BIN)/jupyter lab --notebook-dir nbs $$([ "$$(id -u)" = 0 ] && echo --allow-root)

docs: quarto $(VENV)/dev-ready
	@touch README.md  # it comes from `make export`; nbdev would render its own when it looks old
	@PATH="$(CURDIR)/$(BIN):$$PATH" nbdev_docs
	@echo "==> open _docs/index.html"

quarto:
	@command -v quarto >/dev/null || { echo "The site needs Quarto 1.7 or newer, which is not on PATH. Get it from https://quarto.org/docs/download/"; exit 1; }

export: $(VENV)/dev-ready
	@$(BIN)/nbdev_export
	@$(BIN)/python tools/readme.py
	@$(BIN)/python tools/reference.py

notebooks: export ROTVQ_DATA := sample
notebooks: export ROTVQ_PRESET := smoke
# the moving figures as the site needs them, not as sliders
notebooks: export ROTVQ_STATIC := 1
notebooks: export
	@for n in $$(find nbs -name '*.ipynb' -not -path '*/.*' | sort); do echo "==> $$n"; \
	  $(BIN)/jupyter nbconvert --log-level=ERROR --to notebook --execute --inplace --ExecutePreprocessor.record_timing=False $$n || exit 1; done
	@$(BIN)/nbdev_clean
	@$(BIN)/python tools/readme.py

# An environment of its own: who releases needs neither PyTorch nor notebooks.
$(DIST)/ready: settings.ini
	@rm -rf $(DIST)
	@$(PYTHON) -m venv $(DIST)
	@$(DIST)/bin/python -m pip install --disable-pip-version-check -q $$(sed -n 's/^dist_requirements = //p' settings.ini)
	@touch $@

dist: $(DIST)/ready
	@rm -rf dist build rotvq.egg-info
	@$(DIST)/bin/python -m build -q
	@$(DIST)/bin/python -m twine check --strict dist/*

# Each file installed as a user would, away from the clone, and a picture through the model that it ships.
dist-check: dist
	@set -e; trial=$$(mktemp -d); trap 'rm -rf "$$trial"' EXIT; $(PYTHON) -m venv "$$trial/venv"; \
	for file in "$(CURDIR)"/dist/*.whl "$(CURDIR)"/dist/*.tar.gz; do \
	  echo "==> $${file##*/}"; \
	  (cd "$$trial"; rm -f *.png; venv/bin/python -m pip uninstall -q -y rotvq 2>/dev/null; venv/bin/python -m pip install --disable-pip-version-check -q "$$file"; \
	   venv/bin/rotvq --version; \
	   sample=$$(venv/bin/python -c 'import rotvq, pathlib; print(pathlib.Path(rotvq.__file__).parent / "sample")'); \
	   venv/bin/rotvq reconstruct "$$sample"/val/*/*.jpg; test -s reconstruction.png); \
	done

release-check:
	@test "$(TAG)" = "v$$(sed -n 's/^version = //p' settings.ini)" || { echo "TAG is '$(TAG)', and settings.ini has version $$(sed -n 's/^version = //p' settings.ini)"; exit 1; }

clean:
	rm -rf $(VENV) $(OLDEST) $(DIST) _docs _proc build dist gpu-bundle .gpu-site *.egg-info nbs/nbdev.yml nbs/.last_checked .pytest_cache .hypothesis .ruff_cache nbs/.ruff_cache
	find rotvq nbs tests tools benchmarks \( -name __pycache__ -o -name .ipynb_checkpoints \) -prune -exec rm -rf {} +
