import os

import pytest
from hypothesis import settings

# Tests never download: the sample stands in where ROTVQ_DATA names no pictures.
os.environ.setdefault("ROTVQ_DATA", "sample")
os.environ["ROTVQ_PRESET"] = "smoke"
settings.register_profile("rotvq", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("rotvq")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    "Decoded pictures of the tests stay out of the user's cache."
    before = os.environ.get("ROTVQ_CACHE")
    os.environ["ROTVQ_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None:
        del os.environ["ROTVQ_CACHE"]
    else:
        os.environ["ROTVQ_CACHE"] = before
