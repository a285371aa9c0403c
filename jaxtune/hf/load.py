"""HF model directories in: config.json and safetensors -> (module, params)."""

import contextlib
import functools
import math
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxtune import models
from jaxtune.errors import UserError
from jaxtune.hf import mxfp4, tensors
from jaxtune.models.names import NameTable, Tensor
from jaxtune.train.parallel import make_mesh, shardings
from jaxtune.train.processes import beat
from jaxtune.train.runtime import free_bytes
from jaxtune.tree import flatten
from jaxtune.weights.packed import packs

Pack = Callable[[jax.Array], Any]  # one layer's array -> its leaf
Lay = Callable[[Any], Any]  # a tree of arrays -> where each of them lies


ROOM = 1.2  # of a model's bytes, what a device needs to use it

# Files to download from a repository, without second copies of the weights in other layouts than transformers'.
WANTED = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
# Of the folders of sentence-transformers, those of dense layers (2_Dense) hold weights.
UNWANTED = ["original/*", "consolidated*", "*[!e]/*.safetensors", "onnx/*", "openvino/*", "*.gguf"]
UNWANTED += ["model.*.safetensors", "model-*-of-*.*.safetensors"]  # the same weights as a variant, such as fp16


def resolve(path_or_id: str | Path) -> Path:
    """Return the directory of a model: a local path, or a hub id that is downloaded (or already cached).

    Raises:
        UserError: neither exists.
    """
    text = str(path_or_id)
    try:
        path = Path(path_or_id).expanduser()
        if path.is_dir():
            return path
        there = path.exists()
    except (OSError, RuntimeError) as error:  # name too long, no permission, no such user
        shown = text if len(text) < 200 else f"{text[:200]}..."
        raise UserError(f"{shown!r} is not a model: {getattr(error, 'strerror', None) or error}.") from None
    if there:
        raise UserError(f"model.path={text!r} is a file; give the directory that holds config.json.")
    if text.count("/") != 1 or text.startswith((".", "/", "~")):
        raise UserError(
            f"The model directory {text!r} does not exist (looked in {Path.cwd()}); a hub id has the form 'owner/name'."
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(text, allow_patterns=WANTED, ignore_patterns=UNWANTED))
    except (HFValidationError, OSError) as e:  # OSError: every error of the hub, and no network
        raise UserError(f"{text!r} is neither a directory nor a model on the hub: {e}") from None


def read_config(folder: Path) -> dict:
    """Read config.json; if it ties the output head but the weights hold a different one, it is returned as untied.

    That is transformers' rule: the weights decide. Tools that train the head of a tied model leave such directories.
    """
    file = folder / "config.json"
    if not file.exists():
        raise UserError(f"{folder} is not a model directory: it has no config.json.")
    config = tensors.read_json(file)
    return config | {"tie_word_embeddings": False} if _has_another_head(config, folder) else config


def _has_another_head(config: dict, folder: Path) -> bool:
    """Whether the weights hold an output head different from the embedding, though the config ties them."""
    if config.get("tie_word_embeddings") not in (None, True) or str(config.get("model_type")) not in models.FAMILIES:
        return False
    top = {path: hf for hf, path in models.family(config).NAMES.top.items()}
    head, table = top.get("lm_head/kernel"), top.get("embed_tokens/embedding")
    if head is None or not tensors.has_weights(folder):
        return False
    entries = tensors.index_dir(folder)
    body = models.family(config).NAMES.prefix
    found = [entries.get(head), entries.get(table) or entries.get(table.removeprefix(body))]
    return None not in found and not tensors.equal(*found)


def load(
    path_or_id: str | Path,
    dtype: Any = None,
    param_dtype: Any = None,
    quantization: str | None = None,
    base: str | Path | None = None,
    **settings: Any,
) -> tuple[Any, Any]:
    """Load a pretrained model, or an adapter over its base.

    Args:
        path_or_id: a directory with config.json and safetensors, a PEFT directory, or a hub id of either.
        dtype: of activations; default float32.
        param_dtype: of parameters; default: as stored in the checkpoint.
        quantization: as the kind of `quantize`: the body's matrices are quantised one by one as they are read.
        base: for an adapter, directory or hub id of its base, under any name; None: the one that it names.
        settings: `Decoder`'s other fields (attention, remat, unroll).

    Returns:
        `(module, params)`: `module.apply({"params": params}, tokens)` gives logits f32[B, T, V]. An adapter is not
        merged; `jaxtune.merge` does that.

    Raises:
        UserError: the family or a setting is not supported, the weights are absent, pickled or cut short, or tensors
            are missing, extra or misshapen (all named at once).
    """
    folder = resolve(path_or_id)
    settings["dtype"] = dtype or jnp.float32
    if (folder / "adapter_config.json").is_file():
        from jaxtune.hf.peft import open_adapter  # which imports this module

        kinds = {"param_dtype": param_dtype, "quantization": quantization}
        return open_adapter(folder, base=base, any_base=base is not None, **kinds, **settings)[:2]
    if base is not None:
        raise UserError(f"{folder} is a whole model; a base belongs to an adapter only.")
    module = open_module(read_config(folder), folder, **settings)
    return module, read_params(module, folder, param_dtype, quantization=quantization)


def open_module(config: dict, folder: Path, **settings: Any) -> Any:
    """The module of a model directory; a decoder saved as its bare body ("LlamaModel") has no output head."""
    module, classes = models.build(config, **settings), " ".join(map(str, config.get("architectures") or ["For"]))
    if not module.continues or module.spec.tied or re.search("For|Head", classes):
        return module
    heads = {hf for hf, path in models.names(module).top.items() if path == "lm_head/kernel"}
    return module if heads & tensors.index_dir(folder).keys() else module.without_head()


def read_params(
    module: Any,
    folder: Path,
    dtype: Any = None,
    key: Any = None,
    quantization: str | None = None,
    lay: Lay | None = None,
) -> Any:
    """Read the parameters of `module` from a directory; `key` draws a label head that is new. `lay`: as `read_tree`.

    Without it, a model for which the first device has no room lies split over all of them.

    Raises:
        UserError: as `load`.
    """
    entries, table = tensors.index_dir(folder), models.names(module)
    wanted = module.abstract_params()
    fresh = module.drawn(entries, table, key)
    places = plan(table, module, wanted, entries, folder, fresh.keys())
    pack = packs(wanted, quantization) if quantization else {}
    return read_tree(wanted, places, dtype, fresh, pack, lay or _where_there_is_room(wanted, places, pack, dtype))


def _where_there_is_room(wanted: Any, places: list[tuple[Tensor, tensors.Entry]], pack: Mapping[str, Pack], dtype: Any):
    """Where a model lies for which the first device has no room: split over all as along `model`; else None."""
    if jax.local_device_count() == 1 or jax.process_count() > 1:
        return None
    dtypes = {tensor.path: np.dtype(dtype or entry.dtype) for tensor, entry in places}
    plain = {path: jax.ShapeDtypeStruct(x.shape, dtypes.get(path, x.dtype)) for path, x in flatten(wanted).items()}
    held = [jax.eval_shape(pack[path], x) if path in pack else x for path, x in plain.items()]
    if ROOM * sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(held)) < free_bytes():
        return None
    return functools.partial(shardings, mesh=make_mesh(data=1, model=-1))


def plan(
    table: NameTable,
    module: Any,
    wanted: Any,
    entries: dict[str, tensors.Entry],
    folder: Path,
    drawn: Set[str] = frozenset(),
) -> list[tuple[Tensor, tensors.Entry]]:
    """Pair every tensor of the tree with its entry in the files; raise one error that lists all mismatches.

    `drawn`: paths that are initialised instead of read, whatever the checkpoint has there.
    """
    shapes = {path: leaf.shape for path, leaf in flatten(wanted).items()}
    entries = {table.modern(name): entry for name, entry in mxfp4.paired(entries).items()}
    if not any(name.startswith(table.prefix) for name in entries):
        entries = {name if name in table.top else table.prefix + name: e for name, e in entries.items()}
    tied = {hf for hf, path in table.top.items() if path == "lm_head/kernel" and module.spec.tied}
    problems, places, used = [], [], set()
    for tensor in table.tensors(module.spec, set(shapes)):
        shape = tensor.part(shapes[tensor.path])
        expected = shape[::-1] if tensor.transpose else shape
        used.add(tensor.hf)
        if tensor.path in drawn:
            continue
        if tensor.hf not in entries and tensor.path == "embed_tokens/embedding" and tied & entries.keys():
            entries[tensor.hf] = entries[min(tied & entries.keys())]  # one tensor under its other name
        if tensor.hf not in entries:
            problems.append(f"missing    {tensor.hf} {list(expected)}")
        elif entries[tensor.hf].shape != expected:
            problems.append(f"misshapen  {tensor.hf} {list(entries[tensor.hf].shape)}, expected {list(expected)}")
        elif not jnp.issubdtype(entries[tensor.hf].dtype, jnp.floating):
            problems.append(f"quantised  {tensor.hf} {entries[tensor.hf].dtype}, expected floating point")
        else:
            places.append((tensor, entries[tensor.hf]))
    extra = [n for n in entries if n not in used | tied and not table.is_ignored(n)]
    problems += [f"extra      {name} {list(entries[name].shape)}" for name in extra]
    if problems:
        shown = "\n  ".join(problems[:20]) + (f"\n  ... and {len(problems) - 20} more" if len(problems) > 20 else "")
        raise UserError(f"The weights in {folder} are not those its config.json describes:\n  {shown}")
    return places


def read_tree(
    wanted: Any,
    places: list[tuple[Tensor, tensors.Entry]],
    dtype: Any = None,
    fresh: Mapping[str, jax.Array] | None = None,
    pack: Mapping[str, Pack] | None = None,
    lay: Lay | None = None,
) -> Any:
    """Read planned tensors into a tree of `wanted`'s structure.

    Args:
        wanted: abstract parameters.
        places: from `plan`.
        dtype: of the parameters; default: as stored.
        fresh: {path: array} of leaves that are not read.
        pack: {path: what becomes of each layer's plain array [K, N]}, such as a quantised leaf.
        lay: (tree) -> the `NamedSharding` of each array, where it is put as it is read; None: the first device.
    """
    shapes = {path: leaf.shape for path, leaf in flatten(wanted).items()}
    leaves: dict[str, Any] = dict(fresh or {})
    sources = {path: [] for path in shapes if path not in leaves}
    for tensor, entry in places:
        sources[tensor.path].append((tensor, entry))
    for pairs in sources.values():  # the halves of a place one after the other
        if any(tensor.half is not None for tensor, _ in pairs):
            pairs.sort(key=lambda pair: (pair[0].index, pair[0].half))
    dtypes = {
        path: np.dtype(dtype or functools.reduce(np.promote_types, (entry.dtype for _, entry in pairs)))
        for path, pairs in sources.items()
    }
    on_host = [p for p in sources if p not in (pack or {})] if jax.default_backend() == "cpu" and not lay else []
    with _progress(sum(entry.nbytes for _, entry in places)) as done:
        leaves |= _in_place({path: sources.pop(path) for path in on_host}, shapes, dtypes, done)
        leaves |= _on_device(sources, shapes, dtypes, pack or {}, done, lay)
    return jax.tree.unflatten(jax.tree.structure(wanted), [leaves[path] for path in shapes])


Sources = Mapping[str, list[tuple[Tensor, tensors.Entry]]]


def _in_place(sources: Sources, shapes, dtypes, done: Callable[[int], None]) -> dict[str, jax.Array]:
    """Read each tensor into host memory that then is the array, without a copy: for a CPU."""
    hosts = {path: _aligned(shapes[path], dtypes[path]) for path in sources}

    def place(tensor: Tensor) -> np.ndarray:
        part = tensor.within(hosts[tensor.path])
        return part.T if tensor.transpose else part

    tensors.read_all([(entry, place(t)) for pairs in sources.values() for t, entry in pairs], done=done)
    with ThreadPoolExecutor(4) as pool:
        for (path, pairs), sound in zip(sources.items(), pool.map(tensors.finite, hosts.values()), strict=True):
            if not sound:
                warnings.warn(
                    f"{pairs[0][1].file}: the weights {path} have numbers that are not finite (NaN or infinity); what "
                    "the model computes may be as well.",
                    stacklevel=2,
                )
    return {path: jax.device_put(host) for path, host in hosts.items()}


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Memory at a multiple of 64 bytes, which JAX's CPU backend uses without a copy."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def _on_device(
    sources: Sources,
    shapes,
    dtypes,
    pack: Mapping[str, Pack],
    done: Callable[[int], None],
    lay: Lay | None = None,
) -> dict[str, Any]:
    """Read layers ahead; transpose, cast and pack them on the devices, and put them into their stack in place.

    Host memory holds about one layer of tensors at a time, a device its part of the tree and of one tensor. With `lay`
    a process reads the parts that its own devices hold, each once.
    """
    leaves: dict[str, Any] = {}
    halves: list[jax.Array] = []
    where: dict[str, tuple[Any, ...] | None] = dict.fromkeys(sources)
    order = [pair for pairs in sources.values() for pair in pairs]
    places = [_file_place(lay, *pair, shapes, dtypes) if lay else None for pair in order]
    parts = [_own_part(place, e.shape) for (_, e), place in zip(order, places, strict=True)] if lay else None
    ahead = tensors.read_ahead([entry for _, entry in order], limit=_layer_bytes(order), parts=parts)
    for i, ((tensor, entry), raw) in enumerate(zip(order, ahead, strict=True)):
        path = tensor.path
        if lay:
            raw = _over_devices(raw, parts[i], entry.shape, places[i])
        done(entry.nbytes)
        halves.append(raw)
        if tensor.half == 0:
            continue
        raws, halves = tuple(halves), []
        fields = {"transpose": tensor.transpose, "dtype": dtypes[path], "pack": pack.get(path)}
        at = () if tensor.index is None else tuple(np.atleast_1d(tensor.index).tolist())
        if path not in leaves:
            lead = shapes[path][: len(at)]
            one = jax.eval_shape(functools.partial(_laid, **fields), raws)
            whole = jax.tree.map(lambda x, lead=lead: jax.ShapeDtypeStruct((*lead, *x.shape), x.dtype), one)
            where[path] = lay and tuple(jax.tree.leaves(lay({path: whole})))
            leaves[path] = _zeros(whole, where[path]) if at else None
        leaves[path] = (
            _put(leaves[path], raws, at, **fields, where=where[path]) if at else _lay(raws, **fields, where=where[path])
        )
        if lay:
            # Else the host's arrays wait for the devices. Threads read the next ones meanwhile.
            jax.block_until_ready(leaves[path])
            beat(f"{path} was read")
    return leaves


def _zeros(whole: Any, where: tuple[Any, ...] | None) -> Any:
    leaves, structure = jax.tree.flatten(whole)
    places = where or [None] * len(leaves)
    return jax.tree.unflatten(
        structure, [jnp.zeros(x.shape, x.dtype, device=at) for x, at in zip(leaves, places, strict=True)]
    )


def _file_place(lay: Lay, tensor: Tensor, entry: tensors.Entry, shapes, dtypes) -> NamedSharding:
    """Where a file's tensor goes, a layer of a stack or half of its columns."""
    shape = shapes[tensor.path]
    [of_stack] = jax.tree.leaves(lay({tensor.path: jax.ShapeDtypeStruct(shape, dtypes[tensor.path])}))
    axes = [*of_stack.spec, *[None] * len(shape)][: len(shape)][len(shape) - len(entry.shape) :]
    axes = axes[::-1] if tensor.transpose else axes
    even = [
        axis if axis and n % of_stack.mesh.shape[axis] == 0 else None for axis, n in zip(axes, entry.shape, strict=True)
    ]
    return NamedSharding(of_stack.mesh, PartitionSpec(*even))


def _own_part(place: NamedSharding, shape: tuple[int, ...]) -> tuple[slice, ...]:
    """The part of an array that this process's devices hold, and what lies between."""
    held = place.addressable_devices_indices_map(shape).values()
    spans = ([index[axis].indices(n) for index in held] for axis, n in enumerate(shape))
    return tuple(slice(min(s[0] for s in of), max(s[1] for s in of)) for of in spans)


def _over_devices(raw: np.ndarray, part: tuple[slice, ...], shape: tuple[int, ...], place: NamedSharding) -> jax.Array:
    """The array of `shape` of which this process has a part."""

    def at(index):
        spans = [(*s.indices(n)[:2], p.start) for s, n, p in zip(index, shape, part, strict=True)]
        return raw[tuple(slice(start - own, stop - own) for start, stop, own in spans)]

    return jax.make_array_from_callback(shape, place, at)


def _layer_bytes(order: list[tuple[Tensor, tensors.Entry]]) -> int:
    """Bytes of the largest layer."""
    layers: Counter[tuple[str, int]] = Counter()
    for tensor, entry in order:
        if tensor.index is not None:
            block = "/".join(tensor.path.split("/")[:2])
            layers[block, np.atleast_1d(tensor.index)[0]] += entry.nbytes
    return max(layers.values(), default=0)


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    """Show a bar for a model of 1 GB or more, on a terminal; yield a function to call with the bytes just read."""
    if total < 10**9 or not sys.stderr.isatty():
        yield lambda n: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = ("loading", BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("loading", total=total)
        yield lambda n: bar.advance(task, n)


def _laid(raws: tuple[jax.Array, ...], transpose: bool, dtype: np.dtype, pack: Pack | None) -> Any:
    """One layer's leaf of its tensor, or of the two halves of its columns."""
    parts = [(raw.T if transpose else raw).astype(dtype) for raw in raws]
    plain = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)
    return plain if pack is None else pack(plain)


_STATIC = ("transpose", "dtype", "pack", "where")


def _stay(leaf: Any, where: tuple[Any, ...] | None) -> Any:
    if where is None:
        return leaf
    arrays, structure = jax.tree.flatten(leaf)
    return jax.tree.unflatten(structure, map(jax.lax.with_sharding_constraint, arrays, where))


@functools.partial(jax.jit, static_argnames=_STATIC)
def _lay(
    raws: tuple[jax.Array, ...],
    transpose: bool,
    dtype: np.dtype,
    pack: Pack | None,
    where: tuple[Any, ...] | None = None,
) -> Any:
    return _stay(_laid(raws, transpose, dtype, pack), where)


@functools.partial(jax.jit, static_argnames=_STATIC, donate_argnums=0)
def _put(
    stack: Any,
    raws: tuple[jax.Array, ...],
    at: tuple[int, ...],
    transpose: bool,
    dtype: np.dtype,
    pack: Pack | None,
    where: tuple[Any, ...] | None = None,
) -> Any:
    """Write one layer (of one expert) into its place in a stacked leaf, which lies as `where` says of its arrays."""
    one = _laid(raws, transpose, dtype, pack)

    def put(s, x):
        return jax.lax.dynamic_update_slice(s, x.reshape((1,) * len(at) + x.shape), (*at, *(0,) * x.ndim))

    return _stay(jax.tree.map(put, stack, one), where)
