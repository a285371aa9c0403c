import os
from pathlib import Path

import families_table
import pytest
from families_table import pytest_addoption  # noqa: F401


@pytest.fixture(scope="session")
def assets() -> Path:
    """Real models, tokenizers and data, from the folder $JAXTUNE_ASSETS (default: ../shared/assets)."""
    default = Path(__file__).resolve().parents[2] / "shared" / "assets"
    folder = Path(os.environ.get("JAXTUNE_ASSETS") or default)
    if not folder.is_dir():
        pytest.skip(f"no real data: JAXTUNE_ASSETS={folder} is not a folder")
    return folder


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    families_table.record(item, report)
    return report


def pytest_sessionfinish(session):
    if file := session.config.getoption("--families-table"):
        families_table.write(Path(file))
