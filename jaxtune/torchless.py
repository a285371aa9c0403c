"""Keep torch out of commands that never use it: transformers imports it if it is installed, 2 s and 300 MiB."""

import os
import sys


def hide() -> None:
    """Make torch look absent. Call it before transformers is imported, which looks only once."""
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # else it warns on every start


def unhide() -> None:
    """Undo `hide`, before importing a library that fails under it: datasets, and scipy.stats through others."""
    if sys.modules.get("torch", "not asked for") is None:
        import transformers.utils.import_utils

        transformers.utils.import_utils.is_torch_available()  # it caches the answer
        del sys.modules["torch"]
