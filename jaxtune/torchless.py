"""Keep torch out of commands that never use it: transformers imports it wherever it finds it, 2 s and 300 MiB."""

import os
import sys


def hide() -> None:
    """Say that there is no torch; before transformers is imported, which looks once."""
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # or it says so on every start


def unhide() -> None:
    """Take that back, before a library is imported that trips over it: datasets, and scipy.stats behind others."""
    if sys.modules.get("torch", "not asked for") is None:
        import transformers.utils.import_utils

        transformers.utils.import_utils.is_torch_available()  # it remembers the answer
        del sys.modules["torch"]
