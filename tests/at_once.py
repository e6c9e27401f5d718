"""A plugin for pytest: each failure is written, with its traceback, as soon as it happens, so that
a time limit loses none.

PYTHONPATH=tests python -m pytest -p at_once --traceback-file FILE
"""

from pathlib import Path


def pytest_addoption(parser):
    parser.addoption("--traceback-file", type=Path)


def pytest_configure(config):
    file = config.getoption("--traceback-file")
    if file:
        config.pluginmanager.register(AtOnce(file))


class AtOnce:
    def __init__(self, file: Path):
        self.file, self.counts = file, {"passed": 0, "failed": 0, "skipped": 0}
        self.file.write_text("", encoding="utf-8")

    def write(self, text: str) -> None:
        with open(self.file, "a", encoding="utf-8") as file:
            file.write(text + "\n")

    def pytest_collectreport(self, report):
        if report.failed:
            self.write(f"FAILED to collect {report.nodeid}\n{report.longreprtext}")

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            self.counts[report.outcome] += 1
        if report.failed:
            self.write(f"FAILED {report.nodeid} ({report.when})\n{report.longreprtext}\n")

    def pytest_sessionfinish(self):
        self.write(", ".join(f"{count} {word}" for word, count in self.counts.items()))
