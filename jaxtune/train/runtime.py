"""The process that trains: JAX's settings and the available memory."""

import ctypes
import platform
from functools import cache
from pathlib import Path
from typing import Any

import jax

from jaxtune.errors import disk_trouble
from jaxtune.files import cache_root, is_ours


def prepare_jax() -> None:
    """Keep compiled programs on disk, unless the user has set JAX's own cache; on a CPU, keep memory in the process.

    A step's working memory is one block. glibc returns a block of that size to the system and maps it again at each
    step, page by page, which takes a tenth of a small model's step. On the main thread's heap it stays mapped. Memory
    that the compiler used, two or three times as much, would stay as well, so it is returned around each compile.
    """
    if not jax.config.jax_compilation_cache_dir and is_ours(cache_root()):
        jax.config.update("jax_compilation_cache_dir", str(cache_root() / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    jax.config.update("jax_cpu_enable_async_dispatch", False)  # so that the main thread allocates the memory
    if jax.default_backend() == "cpu" and platform.libc_ver()[0] == "glibc":
        trim_threshold, mmap_max = -1, -4  # malloc.h
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)
        _return_around_compiling()


@cache
def _return_around_compiling() -> None:
    """From now on, return freed memory to the system before and after each large compile; glibc only.

    The compiler's threads cannot use what the main thread has freed, nor the main thread what they have.
    """
    around = ("/jax/core/compile/jaxpr_to_mlir_module_duration", "/jax/core/compile/backend_compile_duration")

    def listen(event: str, seconds: float, **_: Any) -> None:
        if event in around and seconds > 0.1:
            ctypes.CDLL(None).malloc_trim(0)

    jax.monitoring.register_event_duration_secs_listener(listen)


def free_bytes() -> int:
    """Bytes that a step may take: free memory of the device, or of the machine if it has none."""
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    if limit:
        return int(0.9 * limit)
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(0.7 * 1024 * int(lines["MemAvailable"].split()[0]))


def out_of_memory(error: BaseException) -> bool:
    """Whether a JAX error says that the device has no memory left."""
    if disk_trouble(error) is not None:  # tensorstore reports these as RESOURCE_EXHAUSTED, too
        return False
    return "RESOURCE_EXHAUSTED" in str(error) or "out of memory" in str(error).lower()
