"""What a step sends over a mesh: collectives of programs compiled for GPUs that are not there, beside `jaxtune plan`.

    python benchmarks/scale.py [--only=replicated] [--json=OUT]

Needs the CUDA wheels, as `gpu_programs.py` says; nothing runs. A collective in a loop counts as often as the loop
turns. Bytes are those that a device sends in a ring: of what is gathered or scattered (n - 1) / n, of what is summed
twice that.
"""

import argparse
import json
import os
import re
import sys
from collections import Counter
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


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", help="cases whose name contains this")
    p.add_argument("--case", help="one case, in this process; prints JSON")
    p.add_argument("--json", help="a file for the figures")
    a = p.parse_args()
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
        common.Path(a.json).write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
