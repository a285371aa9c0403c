"""Evaluate a traced program with polymorphic leaves in place of arrays, for `foreign.adapt`.

A rider goes through transposes, reshapes and casts, into `jit`, `scan`, `remat`, `cond` and `while`, until an operation
that is linear in it (a product, a convolution, a lookup) calls the leaf's method. No merged matrix is ever built.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core, source_info_util

from jaxtune.errors import UserError
from jaxtune.weights.leaf import (
    Keys,
    ShapedWeight,
    Weight,
    dot,
    embed,
    fold,
    merge_leaf,
    transposed_dot,
)

# ------------------------------------------------------------------------------------------------------------- views


class Axis(NamedTuple):
    """A part of one axis of a weight [*L, K, N].

    Attributes:
        group: "L", "K" or "N"; a probe has "L" only.
        index: which of the layer axes; 0 for K and N.
        stride: distance in the flattened group (or axis) between neighbours.
        size: number of entries.
    """

    group: str
    index: int
    stride: int
    size: int

    @property
    def order(self) -> tuple[int, int]:
        """A key that sorts the parts of a group in their order in memory."""
        return self.index, -self.stride


Dims = tuple[tuple[Axis, ...], ...]  # for each dimension of an array the parts it consists of, slowest first


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Rider:
    """A leaf in place of an array of the traced program.

    Attributes:
        weight: the leaf, [*L, K, N], with the layer axes not yet taken by a scan or an index.
        dims: the parts of the leaf's axes that make each of the array's dimensions.
        dtype: the array's.
        path: the leaf's, for messages.
    """

    weight: Any
    dims: Dims = dataclasses.field(metadata={"static": True})
    dtype: Any = dataclasses.field(metadata={"static": True})
    path: str = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(math.prod(part.size for part in dim) for dim in self.dims)

    def parts(self, group: str) -> list[Axis]:
        """The parts of "L", "K" or "N" in the order in which the leaf holds them."""
        return sorted((part for dim in self.dims for part in dim if part.group == group), key=lambda part: part.order)

    def at(self, dims: Dims) -> "Rider":
        return dataclasses.replace(self, dims=dims)

    def map(self, fn: Callable[[jax.Array], jax.Array]) -> "Rider":
        return dataclasses.replace(self, weight=jax.tree.map(fn, self.weight))

    def layer_axis(self, dim: int) -> int | None:
        """The axis of the leaf's fields that a dimension is, if it is one layer axis, undivided."""
        layers = self.parts("L")
        if len(self.dims[dim]) != 1 or self.dims[dim][0].group != "L":
            return None
        (part,) = self.dims[dim]
        return layers.index(part) if [p.index for p in layers].count(part.index) == 1 else None


def ride(leaf: Weight, path: str) -> Rider:
    """Wrap a leaf as the Rider that stands for it while the model is traced."""
    if isinstance(leaf, ShapedWeight):
        plain = jax.eval_shape(leaf.merge)
        dims: list[tuple[Axis, ...]] = [()] * len(plain.shape)
        for index, axis in enumerate(leaf.layers):
            dims[axis] = (Axis("L", index, 1, plain.shape[axis]),)
        for group, axes in (("K", leaf.inputs), ("N", leaf.outputs)):
            stride = 1
            for axis in reversed(axes):
                dims[axis] = _part(group, stride, plain.shape[axis])
                stride *= plain.shape[axis]
        return Rider(leaf.leaf, tuple(dims), plain.dtype, path)
    plain = jax.eval_shape(leaf.merge)
    *layers, k, n = plain.shape
    layer_dims = tuple((Axis("L", index, 1, size),) for index, size in enumerate(layers))
    return Rider(leaf, (*layer_dims, _part("K", 1, k), _part("N", 1, n)), plain.dtype, path)


def _part(group: str, stride: int, size: int) -> tuple[Axis, ...]:
    """One axis of K or N; an axis of size 1 has no part."""
    return (Axis(group, 0, stride, size),) if size > 1 else ()


def reshape(dims: Dims, sizes: tuple[int, ...]) -> Dims | None:
    """The dimensions after a reshape to `sizes`; None: they cut across the parts."""
    parts = [part for dim in dims for part in dim]
    new: list[tuple[Axis, ...]] = []
    for size in sizes:
        taken: list[Axis] = []
        if size == 1 and parts and parts[0].size == 1:
            taken.append(parts.pop(0))
        while (have := math.prod(p.size for p in taken)) < size:
            if size % have:
                return None
            part, left = parts.pop(0), size // have
            if part.size > left and part.size % left == 0:  # the faster part is left for the next dimension
                rest = part.size // left
                parts.insert(0, part._replace(size=rest))
                part = part._replace(size=left, stride=part.stride * rest)
            taken.append(part)
        if have != size:
            return None
        new.append(tuple(taken))
    if parts and new:  # axes of size 1 that no dimension has
        new[-1] = (*new[-1], *parts)
    return tuple(new)


# --------------------------------------------------------------------------------------------------------- the rules


class _Foreign(Exception):
    """An operation that no rule rewrites; the message is the reason."""


class Scope(NamedTuple):
    """The context of a program's evaluation.

    Attributes:
        keys: dropout keys [B], or None.
        strict: raise for operations that cannot be rewritten; else merge the leaf there.
        probe: called with (rider, kind, contracted parts) at each linear operation, when layouts are looked for.
        site: the number of the equation, for the dropout keys.
        program: the one that is evaluated.
    """

    keys: Keys
    strict: bool
    probe: Callable | None = None
    site: str = ""
    program: Any = None


def _array(rider: Rider) -> jax.Array:
    """The plain array that a rider stands for, as the program sees it."""
    parts = [*rider.parts("L"), *rider.parts("K"), *rider.parts("N")]
    array = merge_leaf(rider.weight).reshape([part.size for part in parts]).astype(rider.dtype)
    order = [parts.index(part) for dim in rider.dims for part in dim]
    return array.transpose(order).reshape(rider.shape)


def _pass(scope, eqn, rider, *rest):
    return [rider]


def _transpose(scope, eqn, rider):
    return [rider.at(tuple(rider.dims[axis] for axis in eqn.params["permutation"]))]


def _convert(scope, eqn, rider):
    return [dataclasses.replace(rider, dtype=eqn.params["new_dtype"])]


def _reshaped(scope, eqn, rider):
    dims = reshape(rider.dims, eqn.outvars[0].aval.shape)
    if dims is None or eqn.params.get("dimensions") is not None:
        raise _Foreign(f"a reshape from {rider.shape} to {eqn.outvars[0].aval.shape} across its axes")
    return [rider.at(dims)]


def _broadcast(scope, eqn, rider, *rest):
    shape, where = eqn.params["shape"], eqn.params["broadcast_dimensions"]
    kept = dict(zip(where, rider.dims))
    if any(size != (rider.shape[where.index(axis)] if axis in kept else 1) for axis, size in enumerate(shape)):
        raise _Foreign(f"a broadcast from {rider.shape} to {shape}")
    return [rider.at(tuple(kept.get(axis, ()) for axis in range(len(shape))))]


def _squeeze(scope, eqn, rider):
    gone = eqn.params["dimensions"]
    for axis in sorted(gone, reverse=True):
        if rider.dims[axis]:
            at = rider.layer_axis(axis)
            if at is None:
                raise _Foreign("an axis of size 1 that is not of the array alone")
            rider = rider.map(functools.partial(jnp.squeeze, axis=at))
        rider = rider.at(rider.dims[:axis] + rider.dims[axis + 1 :])
    return [rider]


def _sliced(rider: Rider, cut: Callable[[jax.Array, int, int], jax.Array], sizes) -> list[Rider]:
    """Slices of whole layer axes: `cut(field, its axis, dimension)`."""
    dims = list(rider.dims)
    for axis, (old, new) in enumerate(zip(rider.shape, sizes)):
        if old == new:
            continue
        at = rider.layer_axis(axis)
        if at is None:
            raise _Foreign("a part of its input or output axis")
        rider = rider.map(lambda x, at=at, axis=axis: cut(x, at, axis))
        dims[axis] = (dims[axis][0]._replace(size=new),)
    return [rider.at(tuple(dims))]


def _slice(scope, eqn, rider):
    start, limit = eqn.params["start_indices"], eqn.params["limit_indices"]
    strides = eqn.params["strides"] or (1,) * len(start)

    def cut(x, at, axis):
        return lax.slice_in_dim(x, start[axis], limit[axis], strides[axis], axis=at)

    return _sliced(rider, cut, eqn.outvars[0].aval.shape)


def _dynamic_slice(scope, eqn, rider, *starts):
    def cut(x, at, axis):
        return lax.dynamic_slice_in_dim(x, starts[axis], eqn.params["slice_sizes"][axis], axis=at)

    return _sliced(rider, cut, eqn.params["slice_sizes"])


def _dot_general(scope, eqn, lhs, rhs):
    (lc, rc), (lb, rb) = eqn.params["dimension_numbers"]
    if isinstance(lhs, Rider) and isinstance(rhs, Rider):
        raise _Foreign("a product of two adapted weights")
    first = isinstance(lhs, Rider)  # the weight is the first operand
    x, rider = (rhs, lhs) if first else (lhs, rhs)
    xc, wc, xb, wb = (rc, lc, rb, lb) if first else (lc, rc, lb, rb)

    inside = [part for axis in wc for part in rider.dims[axis]]
    if scope.probe:
        scope.probe(rider, "product", inside, [part for axis in wb for part in rider.dims[axis]])
        return [_bind(scope, eqn, [_array(v) if isinstance(v, Rider) else v for v in (lhs, rhs)])]
    group = _whole(rider, inside)
    batch = [rider.layer_axis(axis) for axis in wb]
    if None in batch or len(batch) != len(rider.parts("L")):
        raise _Foreign("a product that mixes its layers")

    # x becomes [*layers, *rest, K], in the leaf's order of layers and of the parts of K.
    rest = [axis for axis in range(x.ndim) if axis not in (*xc, *xb)]
    layers = [axis for _, axis in sorted(zip(batch, xb))]
    x = x.transpose(*layers, *rest, *xc)
    lead = x.shape[: len(layers) + len(rest)]
    order = sorted(range(len(inside)), key=lambda i: inside[i].order)
    x = x.reshape(*lead, *(part.size for part in inside))
    x = x.transpose(*range(len(lead)), *(len(lead) + i for i in order)).reshape(*lead, -1)

    wanted = eqn.outvars[0].aval.dtype
    product = functools.partial(_product, precision=eqn.params["precision"], wanted=wanted)
    keys = None if not _drops(rider) else fold(scope.keys, f"{rider.path}:{scope.site}")
    if keys is not None and (layers or not rest or rest[0] != 0 or x.shape[0] != keys.shape[0]):
        raise _Foreign(f"dropout needs the {keys.shape[0]} rows of the batch on the first axis of its input {x.shape}")

    def call(x, weight):
        return dot(x, weight, keys, product) if group == "K" else transposed_dot(x, weight, product)

    for _ in layers:
        call = jax.vmap(call)
    y = call(x.astype(jnp.promote_types(x.dtype, rider.dtype)), rider.weight).astype(wanted)

    # y [*layers, *rest, N] takes the order of dot_general: batch, first operand's free axes, second's.
    outside = [part for axis in range(len(rider.dims)) if axis not in (*wc, *wb) for part in rider.dims[axis]]
    held = rider.parts("N" if group == "K" else "K")
    y = y.reshape(*lead, *(part.size for part in held))
    y = y.transpose(*range(len(lead)), *(len(lead) + held.index(part) for part in outside))
    y = y.reshape(*lead, *(rider.shape[axis] for axis in range(len(rider.dims)) if axis not in (*wc, *wb)))
    to_batch = [layers.index(axis) for axis in xb]
    free = list(range(len(layers), len(lead)))
    out = list(range(len(lead), y.ndim))
    return [y.transpose(*to_batch, *(out + free if first else free + out))]


def _product(x, w, precision, wanted):
    """x [..., K] times w [K, M], as the program's own product: its precision, summed in its dtype."""
    flat = x.reshape(-1, x.shape[-1])
    y = lax.dot_general(flat, w, (((1,), (0,)), ((), ())), precision=precision, preferred_element_type=wanted)
    return y.reshape(*x.shape[:-1], w.shape[-1])


def _drops(rider: Rider) -> bool:
    return getattr(rider.weight, "dropout", None) is not None


def _whole(rider: Rider, inside: list[Axis]) -> str:
    """The group of which a product sums over all parts."""
    for group in ("K", "N"):
        if sorted(inside) == sorted(rider.parts(group)):
            return group
    raise _Foreign(
        "a sum over other axes than the leaf's input axes: give `lora` the model's layouts "
        "(layouts=adapt(apply_fn).layouts(params, ...))"
    )


def _gather(scope, eqn, rider, indices):
    numbers = eqn.params["dimension_numbers"]
    plain = (
        isinstance(rider, Rider)
        and not isinstance(indices, Rider)
        and numbers.collapsed_slice_dims == numbers.start_index_map == (0,)
        and not numbers.operand_batching_dims
        and tuple(eqn.params["slice_sizes"]) == (1, *rider.shape[1:])
        and indices.shape[-1] == 1
    )
    if not plain:
        raise _Foreign("a gather that is not a lookup of whole rows")
    if scope.probe:
        scope.probe(rider, "lookup", list(rider.dims[0]), [])
        return [_bind(scope, eqn, [_array(rider), indices])]
    if rider.parts("L") or sorted(rider.dims[0]) != rider.parts("K") or list(rider.dims[0]) != rider.parts("K"):
        raise _Foreign("a lookup along another axis than its rows")
    rows, ids = rider.shape[0], indices[..., 0]
    y = embed(jnp.clip(ids, 0, rows - 1), rider.weight).astype(rider.dtype)
    held = rider.parts("N")
    lead = ids.ndim
    y = y.reshape(*ids.shape, *(part.size for part in held))
    y = y.transpose(*range(lead), *(lead + held.index(part) for dim in rider.dims[1:] for part in dim))
    y = y.reshape(*ids.shape, *rider.shape[1:])
    if eqn.params["mode"] == lax.GatherScatterMode.FILL_OR_DROP:
        fill = eqn.params["fill_value"]
        fill = jnp.nan if fill is None else fill
        known = ((ids >= 0) & (ids < rows)).reshape(*ids.shape, *(1,) * (y.ndim - lead))
        y = jnp.where(known, y, jnp.asarray(fill, y.dtype))
    offset = numbers.offset_dims
    rest = [axis for axis in range(y.ndim) if axis not in offset]
    place = {axis: i for i, axis in enumerate([*rest, *offset])}
    return [y.transpose(*(place[axis] for axis in range(y.ndim)))]


def _conv(scope, eqn, x, rider):
    if not isinstance(rider, Rider) or isinstance(x, Rider):
        raise _Foreign("a convolution of an adapted weight")
    params = dict(eqn.params)
    numbers = params["dimension_numbers"]
    out, *inside = numbers.rhs_spec
    parts = [part for axis in sorted(inside) for part in rider.dims[axis]]
    if params["feature_group_count"] != 1 or params["batch_group_count"] != 1:
        raise _Foreign("a convolution in groups")
    if scope.probe:
        scope.probe(rider, "product", parts, [])
        return [_bind(scope, eqn, [x, _array(rider)])]
    if rider.parts("L") or parts != rider.parts("K") or list(rider.dims[out]) != rider.parts("N"):
        _whole(rider, parts)
        raise _Foreign("a convolution that holds its kernel in another order")
    shape = [rider.shape[axis] for axis in sorted(inside)]
    feature = numbers.out_spec[1]

    def op(x, w):  # w [K, M]: the same convolution with M channels out
        kernel = jnp.moveaxis(w.reshape(*shape, w.shape[-1]), -1, out)
        y = lax.conv_general_dilated_p.bind(x, kernel, **params)
        return jnp.moveaxis(y, feature, -1)

    keys = None if not _drops(rider) else fold(scope.keys, f"{rider.path}:{scope.site}")
    if keys is not None and (numbers.lhs_spec[0] != 0 or x.shape[0] != keys.shape[0]):
        raise _Foreign(f"dropout needs the {keys.shape[0]} rows of the batch on the first axis of its input {x.shape}")
    y = dot(x, rider.weight, keys, op)
    return [jnp.moveaxis(y, -1, feature).astype(eqn.outvars[0].aval.dtype)]


def _call(scope, eqn, *args):
    closed = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
    return evaluate(scope, closed.jaxpr, closed.consts, args)


def _remat(scope, eqn, *args):
    fn = _program(scope, eqn.params["jaxpr"], ())
    fn = jax.checkpoint(fn, prevent_cse=eqn.params["prevent_cse"], policy=eqn.params["policy"])
    return fn(*args)


def _scan(scope, eqn, *args):
    p = eqn.params
    n, c = p["num_consts"], p["num_carry"]
    consts, carry, xs = args[:n], args[n : n + c], args[n + c :]
    if any(isinstance(value, Rider) for value in carry):
        raise _Foreign("a scan that carries it")
    inside: list[Dims | None] = []
    moved = []
    for value in xs:
        if isinstance(value, Rider):
            at = value.layer_axis(0)
            if at is None:
                raise _Foreign("a scan over its input or output axis")
            inside.append(value.dims[1:])
            value = value.map(functools.partial(jnp.moveaxis, source=at, destination=0))
        else:
            inside.append(None)
        moved.append(value)
    closed = p["jaxpr"]

    def body(carry, x):
        index, *x = x
        rows = [value if dims is None else value.at(dims) for value, dims in zip(x, inside)]
        below = scope if scope.keys is None else scope._replace(keys=fold(scope.keys, index))
        out = evaluate(below, closed.jaxpr, closed.consts, (*consts, *carry, *rows))
        return out[:c], out[c:]

    steps = jnp.arange(p["length"])
    carry, ys = lax.scan(body, list(carry), (steps, *moved), p["length"], reverse=p["reverse"], unroll=p["unroll"])
    return [*carry, *ys]


def _cond(scope, eqn, index, *args):
    branches = [_program(scope, closed.jaxpr, closed.consts) for closed in eqn.params["branches"]]
    return lax.switch(index, branches, *args)


def _while(scope, eqn, *args):
    p = eqn.params
    n, m = p["cond_nconsts"], p["body_nconsts"]
    test, body, carry = args[:n], args[n : n + m], args[n + m :]
    if any(isinstance(value, Rider) for value in carry):
        raise _Foreign("a loop that carries it")
    still, then = p["cond_jaxpr"], p["body_jaxpr"]
    return lax.while_loop(
        lambda state: evaluate(scope, still.jaxpr, still.consts, (*test, *state))[0],
        lambda state: evaluate(scope, then.jaxpr, then.consts, (*body, *state)),
        list(carry),
    )


def _stop(scope, eqn, rider):
    return [rider.map(lax.stop_gradient)]


RULES: dict[str, Callable] = {
    "dot_general": _dot_general,
    "conv_general_dilated": _conv,
    "gather": _gather,
    "transpose": _transpose,
    "reshape": _reshaped,
    "squeeze": _squeeze,
    "broadcast_in_dim": _broadcast,
    "convert_element_type": _convert,
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "copy": _pass,
    "copy_p": _pass,
    "name": _pass,
    "sharding_constraint": _pass,  # a hint about an array that is never built
    "stop_gradient": _stop,
    "jit": _call,
    "pjit": _call,
    "closed_call": _call,
    "remat2": _remat,
    "checkpoint": _remat,
    "scan": _scan,
    "cond": _cond,
    "while": _while,
}


# ------------------------------------------------------------------------------------------------------- evaluation


def _bind(scope: Scope, eqn: core.JaxprEqn, args: list) -> Any:
    """Evaluate one equation of the scope's program on arrays."""
    free = [(v, x) for v, x in zip(eqn.invars, args) if not isinstance(v, core.Literal)]
    outs = [v for v in eqn.outvars if not isinstance(v, core.DropVar)]
    jaxpr = scope.program.replace(
        constvars=(), invars=[v for v, _ in free], outvars=outs, eqns=[eqn], effects=eqn.effects
    )
    values = iter(core.jaxpr_as_fun(core.ClosedJaxpr(jaxpr, ()))(*(x for _, x in free)))
    out = [None if isinstance(v, core.DropVar) else next(values) for v in eqn.outvars]
    return out if eqn.primitive.multiple_results else out[0]


def evaluate(scope: Scope, jaxpr: core.Jaxpr, consts, args) -> list:
    """Evaluate a program whose arguments may be riders.

    Raises:
        UserError: an operation cannot be rewritten, and the scope is strict.
    """
    scope, env = scope._replace(program=jaxpr), {}
    env.update(zip(jaxpr.constvars, consts))
    env.update(zip(jaxpr.invars, args))
    last = {v: number for number, eqn in enumerate(jaxpr.eqns) for v in eqn.invars if isinstance(v, core.Var)}
    kept = {v for v in jaxpr.outvars if isinstance(v, core.Var)}

    def read(v):
        return v.val if isinstance(v, core.Literal) else env[v]

    for number, eqn in enumerate(jaxpr.eqns):
        values = [read(v) for v in eqn.invars]
        if any(isinstance(value, Rider) for value in values):
            out = _rewrite(scope._replace(site=f"{scope.site}.{number}"), eqn, values)
        else:
            out = _bind(scope, eqn, values)
        env.update(zip(eqn.outvars, out if isinstance(out, list | tuple) else [out]))
        for v in {v for v in eqn.invars if isinstance(v, core.Var)} - kept:
            if last[v] == number:
                del env[v]
    out = [read(v) for v in jaxpr.outvars]
    return [_array(v) if isinstance(v, Rider) and not scope.strict else v for v in out]


def _program(scope: Scope, jaxpr: core.Jaxpr, consts) -> Callable[..., list]:
    """The program as a function of its arguments."""
    return lambda *args: evaluate(scope, jaxpr, consts, args)


def _rewrite(scope: Scope, eqn: core.JaxprEqn, values: list) -> list:
    name = eqn.primitive.name
    try:
        if name not in RULES:
            raise _Foreign("no rule for it")
        return RULES[name](scope, eqn, *values)
    except _Foreign as why:
        if scope.strict:
            rider = next(value for value in values if isinstance(value, Rider))
            shown = "x".join(map(str, rider.shape))
            raise UserError(
                f"adapt cannot rewrite {name!r} at {source_info_util.summarize(eqn.source_info)} over the "
                f"adapted weight {rider.path!r} [{shown}]: {why}. Leave this weight out of the targets, or use "
                "adapt(..., strict=False), which builds the merged weight there."
            ) from None
        if scope.probe:
            for value in values:
                if isinstance(value, Rider):
                    scope.probe(value, "other", [], [])
        out = _bind(scope, eqn, [_array(value) if isinstance(value, Rider) else value for value in values])
        return out if eqn.primitive.multiple_results else [out]
