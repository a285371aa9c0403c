import os
from pathlib import Path

import hypothesis
import pytest

hypothesis.settings.register_profile("jaxtune", deadline=None)  # compiles and busy machines take the time they take
hypothesis.settings.load_profile("jaxtune")


@pytest.fixture(scope="session")
def assets() -> Path:
    """Real models, tokenizers and data, from the folder $JAXTUNE_ASSETS (default: ../shared/assets)."""
    default = Path(__file__).resolve().parents[2] / "shared" / "assets"
    folder = Path(os.environ.get("JAXTUNE_ASSETS") or default)
    if not folder.is_dir():
        pytest.skip(f"no real data: JAXTUNE_ASSETS={folder} is not a folder")
    return folder


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """A headless chromium, where there is one."""
    from browser import start

    with start(tmp_path_factory.mktemp("profile")) as browser:
        yield browser
