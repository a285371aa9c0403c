import ctypes
import gc
import os
import platform
import resource
import shutil
import sys
import tempfile
from pathlib import Path

import families_table
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


@pytest.fixture(autouse=True)
def memory():
    """Give back what compiled programs took, where it became much; what is needed again lies in the cache."""
    yield
    if "jax" in sys.modules and _resident() > max(1536 * 2**20, _left[0] + 256 * 2**20):
        sys.modules["jax"].clear_caches()
        gc.collect()
        gc.freeze()  # what is left is torch, transformers and fixtures: the next time need not look through them
        if platform.libc_ver()[0] == "glibc":
            ctypes.CDLL(None).malloc_trim(0)
        _left[0] = _resident()


@pytest.fixture(scope="module", autouse=True)
def keeping(request):
    """Keep programs where commands run, which compile what another has; writing takes nearly as long as compiling."""
    if os.environ.get("JAX_COMPILATION_CACHE_DIR") == os.environ.get("JAXTUNE_TESTS_XLA"):
        import jax

        runs = any(hasattr(request.module, name) for name in ("main", "cli"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0 if runs else 1e6)


@pytest.fixture(scope="session", autouse=True)
def contexts():
    """Build many programs in one MLIR context: making one takes as long as lowering an operation in it twice.

    A new one now and then gives back what the constants of its programs took.
    """
    from jax._src.interpreters import mlir

    make, kept = mlir.make_ir_context, []

    def shared():
        if len(kept) == PROGRAMS:
            kept.clear()
        kept.append(kept[0] if kept else make())
        return kept[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mlir, "make_ir_context", shared)
        yield


PROGRAMS = 64  # of a context
_left = [0]  # bytes after the last time: some of them stay, such as torch's models


def _resident():
    """Bytes of this process in memory."""
    file = Path("/proc/self/statm")
    return int(file.read_text().split()[1]) * resource.getpagesize() if file.exists() else 0


# A third of the time to compile, and less memory; what is compiled here runs a few times only.
QUICK = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"


def pytest_addoption(parser):
    families_table.add_option(parser)
    parser.addoption("--optimised", action="store_true", help="compile as users do; takes three times as long")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    gc.set_threshold(50_000, 20, 100)  # tracing makes many objects that stay: looking through them takes time
    if not config.getoption("--optimised") and QUICK not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK}".strip()  # also of processes started here
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # torch's models are tiny: threads take more time than they save
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # one for both workers and all processes
        folder = tempfile.mkdtemp(prefix="jaxtune-xla-")
        os.environ |= {"JAX_COMPILATION_CACHE_DIR": folder, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        os.environ["JAXTUNE_TESTS_XLA"] = folder
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    if config.getoption("--families-table") and config.getoption("numprocesses", None):
        raise pytest.UsageError("--families-table goes with -n 0: one process has to see all tests")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    families_table.record(item, report)
    return report


def pytest_sessionfinish(session):
    if file := session.config.getoption("--families-table"):
        families_table.write(Path(file))
