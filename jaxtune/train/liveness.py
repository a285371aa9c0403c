"""The most bytes that a traced function holds at once, as a compiler that fuses would lay it out: from shapes alone.

    y = convert(x * scale)     fused: costs nothing, unless a product, a loop or the caller reads it
    z = dot(y, w)              reads whole arrays, writes a whole array
    u = z + dot(a, b)          the product adds to z
    scan(body, ...)            its outputs, and the most that one turn of its body holds

Operations stay in the order in which they were traced. An array is born where it is computed, and gone after the last
operation that reads it, be it through fused ones.
"""

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np

# These give their operand another name or another shape: the same bytes.
VIEWS = {"reshape", "squeeze", "expand_dims", "name", "copy", "copy_p", "stop_gradient", "optimization_barrier"}
# These read whole arrays and write whole arrays. All others but sums are fused with what reads them.
WHOLE = {
    "dot_general",
    "ragged_dot_general",
    "conv_general_dilated",
    "sort",
    "top_k",
    "cumsum",
    "scatter",
    "scatter-add",
}
IN_PLACE = {"dynamic_update_slice", "scatter", "scatter-add"}
SUMS = ("reduce_", "arg")
LOOPS = {"scan", "while", "cond"}


@dataclass(eq=False)
class _Array:
    """A value.

    Attributes:
        size: bytes.
        whole: it is in memory; otherwise fused with what reads it.
    """

    size: int = 0
    whole: bool = False


@dataclass(eq=False)
class _Op:
    """An operation.

    Attributes:
        name: of its primitive.
        reads, writes: values.
        inner: bytes that it holds beside them.
        in_place: its output may take the place of what it read.
    """

    name: str
    reads: list[_Array]
    writes: list[_Array]
    inner: int
    in_place: bool


def peak(jaxpr: Any) -> int:
    """The most bytes held at once beside the arguments; the results are counted.

    Args:
        jaxpr: of the function.
    """
    ops: list[_Op] = []
    inputs = [_Array(whole=True) for _ in jaxpr.invars]  # they are the caller's: 0 bytes
    results = _trace(jaxpr, inputs, ops)
    needed, kept = set(results), []
    for op in reversed(ops):  # what nobody reads is not computed
        if any(x in needed for x in op.writes):
            needed.update(op.reads)
            kept.append(op)
    ops = kept[::-1]
    for x in results:
        x.whole = True
    _accumulate(ops, results)
    behind: dict[_Array, set[_Array]] = {}  # what is in memory of which a fused value is made

    def buffers(values: list[_Array]) -> set[_Array]:
        return {x for value in values for x in ((value,) if value.whole else behind[value])}

    last: dict[_Array, int] = {}
    reads = []
    for i, op in enumerate(ops):
        reads.append(buffers(op.reads))
        behind.update(dict.fromkeys((x for x in op.writes if not x.whole), reads[i]))
        if any(x.whole for x in op.writes):
            last.update(dict.fromkeys(reads[i], i))
    last.update(dict.fromkeys(results, len(ops)))
    live = most = 0
    for i, op in enumerate(ops):
        born = sum(x.size for x in op.writes if x.whole)
        gone = sum(x.size for x in reads[i] if last.get(x) == i)
        most = max(most, live + born - (min(born, gone) if op.in_place else 0) + op.inner)
        live += born - gone - sum(x.size for x in op.writes if x.whole and x not in last)
    return most


def returned(jaxpr: Any) -> set[Any]:
    """The variables that a function returns and was not given; of equal ones that a scan stacks, one."""
    made = {v: eqn for eqn in jaxpr.eqns for v in eqn.outvars}
    found = {}
    for v in jaxpr.outvars:
        if isinstance(v, jax.extend.core.Literal) or v not in made:
            continue
        eqn, key = made[v], v
        if eqn.primitive.name == "scan":
            i, body = eqn.outvars.index(v), eqn.params["jaxpr"].jaxpr
            if i >= eqn.params["num_carry"]:
                key = id(eqn), _first_equals(body).get(body.outvars[i], body.outvars[i])
        found.setdefault(key, v)
    return set(found.values())


def _first_equals(jaxpr: Any) -> dict[Any, Any]:
    """For variables that are computed as another was before, of the same: that one."""
    same: dict[Any, Any] = {}
    seen: dict[Any, Any] = {}
    for eqn in jaxpr.eqns:
        if any(hasattr(getattr(value, "jaxpr", value), "eqns") for value in eqn.params.values()):
            continue
        given = tuple(str(v) if isinstance(v, jax.extend.core.Literal) else same.get(v, v) for v in eqn.invars)
        before = seen.setdefault((eqn.primitive.name, given, str(eqn.params)), eqn)
        if before is not eqn:
            same.update(zip(eqn.outvars, before.outvars, strict=True))
    return same


def size(aval: Any) -> int:
    """Bytes of an abstract array."""
    if not hasattr(aval, "dtype"):
        return 0
    itemsize = 8 if jnp.issubdtype(aval.dtype, jax.dtypes.extended) else np.dtype(aval.dtype).itemsize
    return math.prod(aval.shape) * itemsize


def _accumulate(ops: list[_Op], results: list[_Array]) -> None:
    """Let a product whose one reader adds it to something add by itself, as libraries' products do."""
    readers = Counter(x for op in ops for x in op.reads) + Counter(results)
    products = {op.writes[0]: op for op in ops if op.name == "dot_general"}
    for op in ops:
        if op.name not in ("add", "add_any"):
            continue
        for x in reversed(op.reads):
            if x in products and readers[x] == 1:
                x.whole, op.writes[0].whole = False, True
                break


def _trace(jaxpr: Any, inputs: list[_Array], ops: list[_Op]) -> list[_Array]:
    """Add the operations of a jaxpr, with those that it calls, and return its results."""
    env = dict(zip(jaxpr.invars, inputs, strict=True)) | {v: _Array(whole=True) for v in jaxpr.constvars}

    def read(v):
        if isinstance(v, jax.extend.core.Literal):
            return _Array(whole=True)
        return env[v]

    for eqn in jaxpr.eqns:
        given, name = [read(v) for v in eqn.invars], eqn.primitive.name
        if name in VIEWS or (name == "transpose" and eqn.invars[0].aval.ndim <= 2):
            env.update(zip(eqn.outvars, given, strict=True))
            continue
        called = None if name in LOOPS else _called(eqn)
        if called is not None:
            env.update(zip(eqn.outvars, _trace(called, given, ops), strict=True))
            continue
        written = [_Array(0 if on_host(v.aval) else size(v.aval)) for v in eqn.outvars]
        env.update(zip(eqn.outvars, written, strict=True))
        whole = name in WHOLE or name in LOOPS or "call" in name or name.startswith("dot_product")
        if whole:
            for x in given:
                x.whole = True
        for x in written:
            x.whole = whole or name.startswith(SUMS) or name in IN_PLACE
        inner = _inner(eqn) if name in LOOPS else 0
        ops.append(_Op(name, given, written, inner, in_place=not whole or name in IN_PLACE))
    return [read(v) for v in jaxpr.outvars]


def _inner(eqn: Any) -> int:
    """What one turn of a loop, or the larger branch, holds."""
    if eqn.primitive.name == "cond":
        return max(peak(branch.jaxpr) for branch in eqn.params["branches"])
    if eqn.primitive.name == "while":
        return peak(eqn.params["body_jaxpr"].jaxpr)
    return peak(eqn.params["jaxpr"].jaxpr)  # the slices of a turn are read where they lie


def _called(eqn: Any) -> Any:
    """The jaxpr that an equation only calls; None: it does something itself."""
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr", "call"):
        found = eqn.params.get(key)
        if found is not None:
            found = getattr(found, "jaxpr", found)
            return found if hasattr(found, "eqns") and len(found.invars) == len(eqn.invars) else None
    return None


def on_host(aval: Any) -> bool:
    """Whether an abstract array lies in the host's memory."""
    return getattr(aval, "memory_space", None) == jax.memory.Space.Host
