"""Loading: a sharded checkpoint into memory, against transformers, and against safetensors with torch alone.

    python benchmarks/load.py [--width=2048 --layers=16 ...]     # a synthetic Llama of 2.3 GB in bfloat16

Each side is a process of its own. "safetensors" is `load_file` of each shard and a copy into memory of the process's
own, which training and other devices need; "transformers, mapped" is from_pretrained as it is: on a CPU its parameters
are views of the page cache, of which one byte a page is read, so that it did read the files. "cold": the files were
dropped from the page cache before the start. Before each start another process uses as much memory and ends: a virtual
machine that has given memory back takes seconds to get it again, whoever asks first.
Memory is the peak of the resident set during the load, less what was resident before it and the parameters' own size;
pages of mapped files count, as they do to a container's limit.
"""

import argparse
import json
import os
import sys
import tempfile
import threading
import time
from pathlib import Path

import common
import numpy as np


def make_checkpoint(folder: Path, a: argparse.Namespace) -> None:
    """Write a Llama of random bfloat16 numbers in shards, with an index."""
    import ml_dtypes

    from jaxtune import models
    from jaxtune.hf import tensors
    from jaxtune.tree import flatten

    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": a.vocab,
        "hidden_size": a.width,
        "intermediate_size": 4 * a.width,
        "num_hidden_layers": a.layers,
        "num_attention_heads": a.width // 64,
        "num_key_value_heads": a.width // 256,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    module = models.build(config)
    shapes = {path: leaf.shape for path, leaf in flatten(module.abstract_params()).items()}
    rng, arrays = np.random.default_rng(0), {}
    for t in models.names(module).tensors(module.spec, set(shapes)):
        shape = t.part(shapes[t.path])[:: -1 if t.transpose else 1]
        arrays[t.hf] = (0.02 * rng.standard_normal(shape, np.float32)).astype(ml_dtypes.bfloat16)
    tensors.write(folder, arrays, shard_bytes=a.shard_mib * 2**20)
    (folder / "config.json").write_text(json.dumps(config))


def facts(folder: Path) -> dict[str, float]:
    """MiB of all parameters, of the largest layer and of the largest tensor."""
    from jaxtune.hf import tensors

    sizes = {name: entry.nbytes / 2**20 for name, entry in tensors.index_dir(folder).items()}
    layers: dict[str, float] = {}
    for name, size in sizes.items():
        if ".layers." in name:
            number = name.split(".")[2]
            layers[number] = layers.get(number, 0) + size
    return {"parameters": sum(sizes.values()), "layer": max(layers.values()), "tensor": max(sizes.values())}


def evict(folder: Path) -> None:
    """Drop a directory's files from the page cache."""
    for file in folder.glob("*.safetensors"):
        fd = os.open(file, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


# --- one side, in its own process


def resident() -> float:
    """MiB in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


class Peak(threading.Thread):
    """Watches the resident set."""

    def __init__(self):
        super().__init__(daemon=True)
        self.before = self.highest = resident()
        self.over = threading.Event()
        self.start()

    def run(self):
        while not self.over.wait(0.002):
            self.highest = max(self.highest, resident())


def side_jaxtune(folder: Path):
    import jax
    import jax.numpy as jnp

    import jaxtune.models.classifier
    import jaxtune.models.families.llama  # noqa: F401  (as with transformers below, imports are not counted)
    from jaxtune.hf.load import load

    jnp.zeros(8).block_until_ready()  # the backend is up

    def measured():
        return jax.block_until_ready(load(folder)[1])

    return measured, lambda params: sum(x.nbytes for x in jax.tree.leaves(params))


def side_transformers(folder: Path):
    import torch
    from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401  (the class is imported lazily)

    def measured():
        values = [p.data for p in AutoModelForCausalLM.from_pretrained(folder, dtype="auto").parameters()]
        for tensor in values:
            tensor.reshape(-1).view(torch.uint8)[:: os.sysconf("SC_PAGE_SIZE")].sum()
        return values

    return measured, lambda values: sum(p.nbytes for p in values)


def side_safetensors(folder: Path):
    import torch  # noqa: F401
    from safetensors.torch import load_file

    def measured():
        return [t.clone() for file in sorted(folder.glob("*.safetensors")) for t in load_file(file).values()]

    return measured, lambda values: sum(p.nbytes for p in values)


SIDES = {"jaxtune": side_jaxtune, "safetensors": side_safetensors, "transformers, mapped": side_transformers}


def measure(name: str, folder: Path) -> None:
    measured, nbytes = SIDES[name](folder)
    watch, began = Peak(), time.monotonic()
    kept = measured()
    seconds = time.monotonic() - began
    watch.over.set()
    above = watch.highest - watch.before - nbytes(kept) / 2**20
    print(json.dumps({"seconds": seconds, "MiB above the parameters": above}))


# --- all of them


def main() -> None:
    p = common.parser(__doc__)
    p.add_argument("--width", type=int, default=2048)
    p.add_argument("--layers", type=int, default=16)
    p.add_argument("--vocab", type=int, default=32000)
    p.add_argument("--shard-mib", type=int, default=500)
    p.add_argument("--folder", type=Path, help="where to keep the checkpoint; default: a temporary one")
    p.add_argument("--side", choices=SIDES, help="load once, print the figures, and nothing else")
    a = p.parse_args()
    if a.side:
        return measure(a.side, a.folder)
    with tempfile.TemporaryDirectory() as temporary:
        folder = a.folder or Path(temporary)
        if not (folder / "config.json").exists():
            folder.mkdir(exist_ok=True, parents=True)
            make_checkpoint(folder, a)
        size = facts(folder)
        cache = str(Path(temporary) / "cache")

        take = f"import numpy; numpy.ones({int(1.5 * size['parameters'] * 2**20)}, 'u1')"

        def once(name: str, cold: bool) -> dict[str, float]:
            common.run([sys.executable, "-c", take], a.threads)
            if cold:
                evict(folder)
            else:
                for file in folder.glob("*.safetensors"):
                    with file.open("rb", buffering=0) as f:
                        while f.read(2**24):
                            pass
            command = [sys.executable, __file__, f"--side={name}", f"--folder={folder}"]
            return common.last_json(common.run(command, a.threads, JAX_COMPILATION_CACHE_DIR=cache).stdout)

        sides = {
            f"{name}, {state}": lambda n=name, s=state: once(n, s == "cold")
            for state in ("warm", "cold")
            for name in SIDES
        }
        found = common.alternate(sides, a.repeats)
        ratios = {
            f"seconds, jaxtune / {other}, {state}": (
                common.ratio(found, "seconds", f"jaxtune, {state}", f"{other}, {state}"),
                "<= 1.0",
            )
            for state in ("warm", "cold")
            for other in list(SIDES)[1:]
        }
        allowed = size["layer"] + size["tensor"]
        above = max(max(found[f"jaxtune, {s}"]["MiB above the parameters"]) for s in ("warm", "cold"))
        ratios["memory above the parameters / (one layer + one tensor)"] = (above / allowed, "<= 1.0")
        print(", ".join(f"{k} {v:,.0f} MiB" for k, v in size.items()))
        common.report("Loading", found, ratios, a.json)


if __name__ == "__main__":
    main()
