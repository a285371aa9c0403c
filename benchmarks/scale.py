"""What a step sends over a mesh: collectives of programs compiled for GPUs that are not there, beside `jaxtune plan`.

    python benchmarks/scale.py [--only=replicated] [--json=OUT]
    python benchmarks/scale.py --speed [--repeats=3] [--json=OUT]      on two processors of this machine, with torch

The first needs the CUDA wheels, as `gpu_programs.py` says; nothing runs. A collective in a loop counts as often as the
loop turns. Bytes are those that a device sends in a ring: of what is gathered or scattered (n - 1) / n, of what is
summed twice that. The second measures a step of one device with and without a mesh, in one process, and a run of two
processes with a processor each beside one of one process with both.
"""

import argparse
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import common
from gpu_programs import CARDS, Case, recipe


class Over(NamedTuple):
    """A case over a mesh of devices along data, fsdp and model; rows are those of all."""

    case: Case
    mesh: tuple[int, int, int]


CASES = {
    "8b lora, replicated, 8": Over(Case("8b", "lora", 8, 2048, "full"), (8, 1, 1)),
    "70b/10 lora, sharded, 8": Over(Case("70b", "lora", 8, 2048, "full"), (1, 8, 1)),
    "70b/10 qlora, sharded, 2": Over(Case("70b", "lora", 2, 2048, "full", quantization="nf4"), (1, 2, 1)),
    "8b full, sharded, 8": Over(Case("8b", "full", 8, 2048, "full"), (1, 8, 1)),
    "8b full, sharded, 2 x 8": Over(Case("8b", "full", 16, 2048, "full"), (2, 8, 1)),
    "8b lora, sharded, 4 x model 2": Over(Case("8b", "lora", 4, 2048, "full"), (1, 4, 2)),
}
BYTES = {"pred": 1, "s8": 1, "u8": 1, "f8e4m3fn": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8}
KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


class Collective(NamedTuple):
    kind: str
    bytes: int  # of all its results
    group: int  # devices
    times: int  # in a step


def collectives(text: str) -> list[Collective]:
    """The collectives of a compiled program, with how often each runs."""
    bodies, lines = {}, None
    for line in text.splitlines():
        if found := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            lines = bodies.setdefault(found[1], [])
        elif lines is not None:
            lines.append(line)
    times: Counter[str] = Counter()

    def visit(name: str, turns: int) -> None:
        times[name] += turns
        for line in bodies.get(name, ()):
            count = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
            for key, inner in re.findall(r"(body|condition|calls|to_apply)=%?([\w.\-]+)", line):
                if key != "to_apply":
                    visit(inner, turns * (int(count[1]) if count and key == "body" else 1))

    visit(re.search(r"^ENTRY %?([\w.\-]+)", text, re.M)[1], 1)
    found = []
    for name, inside in bodies.items():
        for line in inside:
            op = re.search(rf"= (.*?) ({'|'.join(KINDS)})(?:-start)?\(", line)
            if op and times[name]:
                found.append(Collective(op[2], _bytes(op[2], op[1]), _group(line), times[name]))
    return found


def _bytes(kind: str, shapes: str) -> int:
    """Bytes of results; a start also has its operands there, which are the smaller half of a gather."""
    sizes = []
    for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", shapes):
        size = BYTES.get(dtype, 4)
        for n in filter(None, shape.split(",")):
            size *= int(n)
        sizes.append(size)
    return sum(sizes)


def _group(line: str) -> int:
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]", line):
        return int(found[2])
    return found[1].count(",") + 1 if (found := re.search(r"replica_groups=\{\{([\d,]+)\}", line)) else 1


def compiled(over: Over, name: str = "h100") -> dict[str, Any]:
    os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "CUDA_VISIBLE_DEVICES": ""}
    os.environ["XLA_FLAGS"] = "--xla_gpu_autotune_level=0"
    import jax
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from jaxtune.train import cost, parallel

    card, r = CARDS[name], recipe(over.case)
    sizes = dict(zip(("data", "fsdp", "model"), over.mesh, strict=True))
    count = int(np.prod(over.mesh))
    topology = topologies.get_topology_desc(
        platform="cuda",
        topology_name=name,
        topology=f"{max(1, count // 8)} x 1 x {min(count, 8)}",
        target_config=card.described(name.upper()),
    )
    kept = {axis: n for axis, n in sizes.items() if n > 1 or axis == "data"}
    mesh = Mesh(np.array(topology.devices[:count]).reshape(*kept.values()), tuple(kept))
    jax.default_backend = lambda: "gpu"
    r = r.with_module(attention="blocks")
    known, batch = r.abstract, r.task.batch_like(r.batch)
    rows = NamedSharding(mesh, PartitionSpec(None, parallel.row_axes(mesh)))

    def laid(tree):
        where = parallel.shardings(tree, mesh)
        return jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), tree, where)

    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows), batch)
    step = r.programs(mesh)[0]
    executable = step.trace(laid(known.state), laid(known.frozen), batch).lower(lowering_platforms=("cuda",)).compile()
    plan = executable.memory_analysis()
    counted, sent = Counter(), Counter()
    for c in collectives(executable.as_text()):
        if c.bytes * c.times > 2**16:  # the loss's sums aside
            counted[c.kind] += c.times
            whole = c.bytes * (c.group if c.kind == "reduce-scatter" else 1)
            sent[c.kind] += c.times * whole * cost.ring(c.group) * (2 if c.kind == "all-reduce" else 1)
    said = cost.wire(r, known, sizes, r.batch.rows // parallel.row_parts(sizes))
    total = plan.argument_size_in_bytes + plan.temp_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes
    on = cost.on_mesh(cost.measure(r, "gpu"), known, sizes).bytes(r.batch.rows // parallel.row_parts(sizes)).total
    return {
        "layers": r.module.spec.layers,
        "counted": counted,
        "sent": {kind: round(n / 1e6, 1) for kind, n in sent.items()},
        "sent MB": round(sum(sent.values()) / 1e6, 1),
        "plan MB": round(sum(said) / 1e6, 1),
        "GiB": round(total / 2**30, 1),
        "plan GiB": round(on / 2**30, 1),
    }


def overhead(a: argparse.Namespace) -> dict[str, float]:
    """Seconds of a step on one device with a mesh of it and without, taking turns."""
    import jax
    import numpy as np
    import optax

    from jaxtune import models, tree
    from jaxtune.methods.table import METHODS
    from jaxtune.objectives.causal_lm import causal_lm
    from jaxtune.train.parallel import make_mesh, place, shard_batch
    from jaxtune.train.step import init_state, make_train_step

    config = {"model_type": "llama", "vocab_size": 8192, "hidden_size": a.hidden, "intermediate_size": 2 * a.hidden}
    config |= {"num_hidden_layers": a.layers, "num_attention_heads": a.hidden // 64, "num_key_value_heads": 4}
    module = models.build(config | {"max_position_embeddings": 4096, "tie_word_embeddings": True})
    params, mask = METHODS["lora"](jax.jit(module.init_params)(jax.random.key(0)), jax.random.key(1), module, {"r": 16})
    part, tx = tree.partition(params, mask), optax.adamw(1e-3)
    ids = np.random.default_rng(0).integers(0, 8192, (1, 4, 257), np.int32)
    batch = {
        "tokens": ids[..., :-1],
        "targets": ids[..., 1:],
        "positions": np.broadcast_to(np.arange(256), (1, 4, 256)),
    }
    batch |= {"segments": np.ones((1, 4, 256), np.int32), "weights": np.ones((1, 4, 256), np.float32)}
    batch["row"] = np.arange(4, dtype=np.int32)[None]
    sides = {}
    for name, mesh in (("without", None), ("with", make_mesh(1))):
        state, frozen = init_state(part.trainable, part.member, tx, jax.random.key(2)), part.frozen
        rows = jax.device_put(batch)
        if mesh is not None:
            state, frozen, rows = place(state, mesh), place(frozen, mesh), shard_batch(batch, mesh)
        step = make_train_step(causal_lm(module), tx, mesh).lower(state, frozen, rows).compile()
        sides[name] = [step, state, frozen, rows, []]
    for i in range(2 * a.steps):
        for name in sorted(sides, reverse=i % 2 == 0):
            step, state, frozen, rows, seconds = sides[name]
            began = time.perf_counter()
            sides[name][1] = jax.block_until_ready(step(state, frozen, rows)[0])
            seconds.append(time.perf_counter() - began)
    programs = {
        name: [line.split(", metadata")[0] for line in side[0].as_text().splitlines()] for name, side in sides.items()
    }
    medians = {f"seconds {name}": statistics.median(side[-1][2:]) for name, side in sides.items()}
    return medians | {f"instructions {name}": sum(" = " in line for line in lines) for name, lines in programs.items()}


def shared(folder: Path, count: int, a: argparse.Namespace) -> dict[str, float]:
    """Tokens/s of a run of `count` processes, each with as many of two processors as there are for it."""
    workdir = Path(tempfile.mkdtemp(dir=folder))
    command = common.jaxtune(
        "train",
        f"--config={common.ROOT}/configs/lora_sft.py",
        f"--workdir={workdir}",
        f"--config.model.path={folder / 'model'}",
        f"--config.data.train={folder / 'rows.jsonl'}",
        f"--config.data.max_length={a.length}",
        f"--config.train.batch_size={a.batch}",
        "--config.train.epochs=none",
        f"--config.train.steps={a.steps}",
        "--config.log.every=1",
        "--config.log.progress=false",
    )
    processors, running = sorted(os.sched_getaffinity(0))[:2], []
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    for i in range(count):
        own = [f"--coordinator=localhost:{port}", f"--num-processes={count}", f"--process-id={i}"] if count > 1 else []
        env = os.environ | {
            "PYTHONPATH": str(common.ROOT),
            "JAXTUNE_CACHE": str(folder / "cache"),
            "JAX_PLATFORMS": "cpu",
        }
        mine = processors if count == 1 else [processors[i]]
        running.append(
            subprocess.Popen(
                [*command, *own],
                env=env,
                stdout=subprocess.DEVNULL,
                preexec_fn=lambda mine=mine: os.sched_setaffinity(0, mine),
            )
        )
    if any(statuses := [process.wait() for process in running]):
        raise SystemExit(f"exit {statuses}")
    rows = [m for m in common.read_metrics(workdir) if "train/loss" in m]
    seconds = [a.batch * a.length / m["train/tokens_per_second"] for m in rows][max(1, a.steps // 5) :]
    return {"tokens/s": a.batch * a.length / statistics.median(seconds), "last loss": rows[-1]["train/loss"]}


def speed(a: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sizes = {"hidden_size": a.hidden, "intermediate_size": a.hidden * 43 // 16, "num_hidden_layers": a.layers}
        heads = {"num_attention_heads": a.hidden // 64, "num_key_value_heads": a.hidden // 128}
        common.make_llama(folder / "model", vocab_size=8192, max_position_embeddings=a.length, **sizes, **heads)
        rows = a.batch * a.steps
        common.make_rows(folder / "rows.jsonl", rows=rows, length=a.length, prompt=64, vocab=8192)
        own = [f"--{name}={getattr(a, name)}" for name in ("hidden", "layers", "steps")]
        sides = {
            "one device": lambda: common.last_json(
                common.run([sys.executable, __file__, "--overhead", *own], 2, JAX_PLATFORMS="cpu").stdout
            ),
            "1 process x 2": lambda: shared(folder, 1, a),
            "2 processes x 1": lambda: shared(folder, 2, a),
        }
        found = common.alternate(sides, a.repeats)
    alone = found["one device"]
    ratios = {
        "a step with a mesh of one device / without": (
            statistics.median(alone["seconds with"]) / statistics.median(alone["seconds without"]),
            "<= 1.01",
        ),
        "2 processes x 1 / 1 process x 2, tokens/s": (
            common.ratio(found, "tokens/s", "2 processes x 1", "1 process x 2"),
            ">= 0.85",
        ),
    }
    common.report("Devices and processes", found, ratios, a.json)
    return 0


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", help="cases whose name contains this")
    p.add_argument("--case", help="one case, in this process; prints JSON")
    p.add_argument("--json", type=Path, help="a file for the figures")
    p.add_argument("--speed", action="store_true", help="measure on this machine")
    p.add_argument("--overhead", action="store_true", help="the step of one device alone; prints JSON")
    for name, value in {"repeats": 3, "hidden": 512, "layers": 4, "length": 512, "batch": 4, "steps": 15}.items():
        p.add_argument(f"--{name}", type=int, default=value)
    a = p.parse_args()
    if a.overhead:
        print(json.dumps(overhead(a)))
        return 0
    if a.speed:
        return speed(a)
    if a.case:
        print(json.dumps(compiled(CASES[a.case])))
        return 0
    found = {}
    for name in CASES:
        if a.only and a.only not in name:
            continue
        found[name] = common.last_json(common.run([sys.executable, __file__, f"--case={name}"], 2).stdout)
        print(f"{name}: {json.dumps(found[name])}", flush=True)
    if a.json:
        a.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
