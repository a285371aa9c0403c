"""From a resolved config to the pieces of a run. Each check comes before the compile, the cheapest first."""

import ctypes
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxtune import data, tree
from jaxtune.config import ADAPTERS, DEFAULT_LR
from jaxtune.curate import NOTE, DataReport, glance
from jaxtune.data.batches import GRAIN
from jaxtune.errors import RunFailed, UserError
from jaxtune.files import cache_root
from jaxtune.hf import load as hf
from jaxtune.hf import tensors
from jaxtune.hf.stops import added_line
from jaxtune.methods.table import tune, virtual_ids
from jaxtune.run import extract
from jaxtune.run.tasks import Task, open_task
from jaxtune.train import optim, watch
from jaxtune.train import stacked as sweep
from jaxtune.train.features import Extractor, above
from jaxtune.train.parallel import check_rows, make_mesh, replicate, shard_batch
from jaxtune.train.step import TrainState, init_state, make_eval_step, make_train_step
from jaxtune.weights.leaf import Adapter, Packed, is_weight
from jaxtune.weights.packed import quantize

DEFAULT_LENGTH = 1024  # of data.max_length, where the model's own limit is higher


def prepare_jax() -> None:
    """Keep compiled programs on disk, unless the user has set JAX's own cache; on a CPU, keep memory in the process.

    A step's working memory is one block. glibc gives a block of that size back to the system and maps it anew at each
    step, page by page: a tenth of a small model's step. It stays mapped if it comes from the main thread's heap. What
    the compiler used would stay as well, two or three times as much, so what is free goes back around each compile.
    """
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(cache_root() / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    jax.config.update("jax_cpu_enable_async_dispatch", False)  # so that it is the main thread that asks for memory
    if jax.default_backend() == "cpu" and platform.libc_ver()[0] == "glibc":
        trim_threshold, mmap_max = -1, -4  # malloc.h
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)
        _return_around_compiling()


@cache
def _return_around_compiling() -> None:
    """From now on, give freed memory back to the system before and after each compile of any size; glibc only.

    The compiler's threads cannot use what the main thread has freed, nor the main thread what they have.
    """
    around = ("/jax/core/compile/jaxpr_to_mlir_module_duration", "/jax/core/compile/backend_compile_duration")

    def listen(event: str, seconds: float, **_: Any) -> None:
        if event in around and seconds > 0.1:
            ctypes.CDLL(None).malloc_trim(0)

    jax.monitoring.register_event_duration_secs_listener(listen)


def compute_dtype(name: str) -> Any:
    """Resolve model.dtype."""
    if name == "auto":
        name = "bfloat16" if jax.default_backend() == "gpu" else "float32"
    return jnp.dtype(name)


@dataclass
class Model:
    """A model before its weights are read."""

    folder: Path
    task: Task
    init: str
    quantization: str = "none"

    @property
    def module(self) -> Any:
        return self.task.module

    def load(self, seed: int) -> Any:
        """Read the weights, or draw them for model.init=random."""
        key, kind = jax.random.key(seed), None if self.quantization == "none" else self.quantization
        if self.init == "random":
            return self._quantized(jax.jit(self.module.init_params)(key))
        return hf.read_params(self.module, self.folder, key=key, quantization=kind)

    def abstract(self) -> Any:
        """What `load` gives, without its numbers."""
        return jax.eval_shape(self._quantized, self.module.abstract_params())

    def _quantized(self, params: Any) -> Any:
        return params if self.quantization == "none" else quantize(params, self.quantization)


def open_model(cfg: Any) -> Model:
    """Read the config of model.path; the weights come later."""
    folder = hf.resolve(cfg.model.path)
    task = open_task(
        cfg,
        hf.read_config(folder),
        dtype=compute_dtype(cfg.model.dtype),
        attention=cfg.model.attention,
        remat=cfg.model.remat,
        unroll=cfg.model.unroll,
    )
    if cfg.model.init == "pretrained":
        tensors.index_dir(folder)  # fail now if the weights are absent, pickled or cut short
    return Model(folder, task, cfg.model.init, cfg.model.quantization)


def max_length(cfg: Any, module: Any) -> int:
    """Resolve data.max_length against the positions the model knows."""
    known, asked = module.spec.positions, cfg.data.max_length
    if asked is None:
        return min(known, DEFAULT_LENGTH)
    if asked > known:
        raise UserError(f"data.max_length={asked} exceeds the {known} positions that the model knows; lower it.")
    return asked


@dataclass
class Data:
    tokenizer: Any
    train: list[data.Rows]
    eval: data.Rows | None
    report: data.Report
    length: int
    prefix: Sequence[int] = ()  # virtual tokens before each row, within `length`
    form: data.LabelForm | None = None

    @property
    def ends(self) -> list[int]:
        """The tokens that end what is trained."""
        return sorted(token for token in self.report.ends if token >= 0)

    @property
    def stops(self) -> tuple[int, ...]:
        """The tokens at which a generated text ends: these, and the tokenizer's own."""
        own = self.tokenizer.eos_token_id
        return tuple(sorted({*self.ends, *([] if own is None else [own])}))

    @cached_property
    def glance(self) -> DataReport:
        """What is wrong with the rows, as far as their tokens say."""
        return glance(self.tokenizer, self.train, self.eval, self.report, self.form)


def open_data(cfg: Any, model: Model) -> Data:
    """Read and tokenise what data.train and data.eval name."""
    length, prefix = max_length(cfg, model.module), virtual_ids(model.module, method_settings(cfg))
    if length - len(prefix) < 2:
        raise UserError(
            f"data.max_length={length} leaves no room for text after {len(prefix)} virtual tokens; raise it."
        )
    tokenizer = data.load_tokenizer(cfg.model.tokenizer, cfg.model.chat_template)
    train, held_out, report = data.prepare(
        tokenizer,
        cfg.data.train,
        eval=cfg.data.eval,
        eval_fraction=cfg.data.eval_fraction,
        **data.reading(cfg.data),
        labels=model.task.form,
        max_length=length - len(prefix),
        overlength=cfg.data.overlength,
        vocab_size=model.module.spec.vocab,
        cache=cfg.data.cache,
    )
    return Data(tokenizer, train, held_out, report, length, prefix, model.task.form)


def data_lines(cfg: Any, d: Data, model: Model) -> list[str]:
    """What was read, and what was done with it."""
    lines = d.report.lines()
    if cfg.data.max_length is None:
        known = model.module.spec.positions
        lines.append(f"data.max_length is {d.length} by default (the model knows {known}).")
    lines += added_line(d.tokenizer, model.folder, d.ends)
    lines += [f"{f.severity}: {f.message}: {f.fix}." for f in d.glance.findings if f.severity != NOTE]
    return lines


def method_settings(cfg: Any) -> Mapping[str, Any]:
    """The method's own section, by its name: tune.lora for tune.method=lora; none for methods without settings."""
    section = cfg.tune.get(cfg.tune.method, None)
    return {} if section is None else dict(section)


def as_stored(cfg: Any, model: Model, params: Any, mask: Any) -> Any:
    """For a whole model that is written, undo the cast to the compute dtype: frozen leaves come from the base again."""
    if tree.FROZEN not in jax.tree.leaves(mask):
        return params
    stored, _ = tuned(cfg, model, model.load(cfg.train.seed))
    return jax.tree.map(lambda new, old, role: old if role is tree.FROZEN else new, params, stored, mask)


def tuned(cfg: Any, model: Model, params: Any) -> tuple[Any, Any]:
    """Apply the method of the config: (params, mask)."""
    key = jax.random.fold_in(jax.random.key(cfg.train.seed), 1)
    return tune(cfg.tune.method, params, key, model.module, method_settings(cfg))


@dataclass
class Member:
    """One run of a job: alone, or one of those that share a step.

    Attributes:
        like: its state as it is alone, abstract.
        batches: its own order of the rows.
    """

    cfg: Any
    mask: Any
    counts: tree.Counts
    like: TrainState
    batches: data.Batches


@dataclass
class Job:
    """All that the loop needs. `state` is that of the one member, or theirs, stacked."""

    model: Model
    data: Data
    members: list[Member]
    stacked: bool
    state: TrainState
    frozen: Any
    mesh: Any
    steps: int
    batch_at: Callable[[int], Any]
    put: Callable[[Any, list[int]], Any]
    eval_batches: data.EvalBatches | None
    step_fn: Any
    eval_step: Any
    shape: Any  # of the learning rate
    features: Extractor | None = None  # what lies below all that is trained is to be computed once
    note: str | None = None  # on that

    def alone(self, state: TrainState, lane: int, member: Member) -> TrainState:
        """The state of `member`, which is in `lane` of a state of this job."""
        return sweep.unstack(state, lane, member.like) if self.stacked else state

    def params(self, state: TrainState) -> Any:
        """The parameters of a run alone."""
        return tree.combine(state.trainable, state.member, self.frozen)


def make_batches(
    cfg: Any, model: Model, d: Data, *, grain: int = GRAIN
) -> tuple[data.Batches, data.EvalBatches | None, int]:
    """The training stream, the evaluation batches and the number of steps."""
    shared = {
        "grain": grain,
        "batch_size": cfg.train.batch_size,
        "grad_accum": cfg.train.grad_accum,
        "max_length": d.length,
        "packing": cfg.data.packing,
        "assembler": model.task.assembler,
    }
    train = [rows.prefixed(d.prefix) for rows in d.train]
    order = {"weights": cfg.data.weights, "seed": cfg.train.seed, "group_by_length": cfg.data.group_by_length}
    batches = data.Batches(train, **order, **shared)
    held_out = None if d.eval is None else data.EvalBatches(d.eval.prefixed(d.prefix), **shared)
    return batches, held_out, cfg.train.steps or batches.steps(cfg.train.epochs)


def make_shape(cfg: Any, steps: int) -> Callable[[Any], Any]:
    """The shape of the learning rate over the run."""
    o = cfg.optim
    return optim.schedule(o.schedule, steps=steps, warmup=o.warmup, min_lr_ratio=o.min_lr_ratio)


def make_tx(cfg: Any, shape: Callable[[Any], Any]) -> Any:
    """The optimizer."""
    o = cfg.optim
    return optim.optimizer(
        o.name,
        lr=o.lr,
        shape=shape,
        weight_decay=o.weight_decay,
        grad_clip=o.grad_clip,
        b1=o.b1,
        b2=o.b2,
        eps=o.eps,
        momentum=o.momentum,
        loraplus_lr_ratio=o.loraplus_lr_ratio,
    )


def rate_hint(cfg: Any, model: Model) -> list[watch.Finding]:
    """What is to be said of the learning rate before the run."""
    if cfg.optim.name != "adamw" or cfg.model.init == "random":  # a model that knows nothing takes other rates
        return []
    settings = method_settings(cfg)
    scale = settings["lora_alpha"] / settings["r"] if "lora_alpha" in settings else 1.0
    return watch.rate_hint(cfg.optim.lr, cfg.tune.method, DEFAULT_LR, width=model.module.spec.width, scale=scale)


def build(cfg: Any, model: Model, d: Data) -> Job:
    """Load the weights and put everything on the devices, for one run."""
    return _build([cfg], model, d, stacked=False)


def build_group(cfgs: Sequence[Any], model: Model, d: Data) -> Job:
    """As `build`, for runs that differ in values only and train in one step; see `commands.points.IN_STEP`."""
    return _build(cfgs, model, d, stacked=True)


def _build(cfgs: Sequence[Any], model: Model, d: Data, *, stacked: bool) -> Job:
    cfg, mesh = cfgs[0], make_mesh()
    check_rows(cfg.train.batch_size // cfg.train.grad_accum, mesh)
    # XLA's products on a CPU give a member the same bits in a group of any size where rows are of 32 tokens, not of 24.
    grain = 32 if stacked else GRAIN
    streams = {c.train.seed: make_batches(c, model, d, grain=grain) for c in cfgs}
    batches, held_out, steps = streams[cfg.train.seed]
    shape = make_shape(cfg, steps)
    starts, frozen = _starts(cfgs, model, model.load(cfg.train.seed), shape)
    step_fn, eval_step = _programs(cfgs, model, mesh, shape, stacked=stacked)

    def put(batch, lanes):
        if len(streams) == 1:
            return shard_batch(batch, mesh)
        return sweep.shard_lanes({k: v[lanes] for k, v in batch.items()}, mesh)

    members = []
    for c, (state, mask, counts) in zip(cfgs, starts, strict=True):
        like = jax.eval_shape(lambda state: state, state)
        members.append(Member(c, mask, counts, like, streams[c.train.seed][0]))
    frozen = replicate(frozen, mesh)
    passes = extract.passes(cfg, d, batches, held_out, steps)
    features, note = extract.plan(cfg, model.module, d, members[0].mask, frozen, passes)
    return Job(
        model=model,
        data=d,
        members=members,
        stacked=stacked,
        state=replicate(sweep.stack([state for state, _, _ in starts]) if stacked else starts[0][0], mesh),
        frozen=frozen,
        mesh=mesh,
        steps=steps,
        batch_at=_batch_at(members),
        put=put,
        eval_batches=held_out,
        step_fn=step_fn,
        eval_step=eval_step,
        shape=shape,
        features=features,
        note=note,
    )


def _batch_at(members: Sequence[Member]) -> Callable[[int], Any]:
    """The batch of a step: one for all, or for each member its own."""
    if _one_order([m.cfg for m in members]):
        return members[0].batches.batch
    return data.side_by_side([m.batches for m in members])


def with_features(j: Job, say: Callable[[str], None], stop: Callable[[], bool]) -> Job:
    """The same job over features in place of tokens, which are computed if they are not there.

    Raises:
        Interrupted: `stop` said so; what is done is kept.
    """
    if j.features is None:
        return j
    began = time.monotonic()

    def progress(done, total):
        say(f"features: {done:,} of {total:,} tokens, {done / (time.monotonic() - began):,.0f} tokens/s")

    train, *rest = (j.features.open(rows, stop, progress) for rows in extract.sets(j.data))
    say(f"features: ready after {time.monotonic() - began:.1f} s")
    streams = {id(m.batches): data.with_features(m.batches, train) for m in j.members}
    members = [replace(m, batches=streams[id(m.batches)]) for m in j.members]
    module = above(j.model.module, j.features.cut)
    step_fn, eval_step = _programs([m.cfg for m in members], j.model, j.mesh, j.shape, stacked=j.stacked, module=module)
    return replace(
        j,
        members=members,
        batch_at=_batch_at(members),
        eval_batches=None if j.eval_batches is None else data.with_features(j.eval_batches, *rest),
        step_fn=step_fn,
        eval_step=eval_step,
    )


def over_features_found(j: Job) -> Job:
    """`with_features` where they are there: the job as it ran."""
    if j.features is None:
        return j
    sizes = {j.features.key(rows): j.features.layout(rows).nbytes for rows in extract.sets(j.data)}
    found = all(j.features.store.has(key, size) for key, size in sizes.items())
    return with_features(j, lambda line: None, lambda: False) if found else j


def _starts(
    cfgs: Sequence[Any], model: Model, base: Any, shape: Callable[[Any], Any]
) -> tuple[list[tuple[TrainState, Any, tree.Counts]], Any]:
    """For each config its first state, mask and counts; and the frozen part that they share."""
    found, frozen = [], None
    for cfg in cfgs:
        params, mask = tuned(cfg, model, base)
        part = tree.partition(params, mask)
        key = jax.random.fold_in(jax.random.key(cfg.train.seed), 2)
        state = init_state(part.trainable, part.member, make_tx(cfg, shape), key, copy=False)
        found.append((state, mask, tree.count(params, mask)))
        frozen = part.frozen if frozen is None else frozen
    return found, _in_dtype(frozen, model)


def _programs(
    cfgs: Sequence[Any], model: Model, mesh: Any, shape: Callable[[Any], Any], *, stacked: bool, module: Any = None
) -> tuple[Any, Any]:
    """The train step and the evaluation step of a group; `module`: of the part of the model above a cut."""
    cfg = cfgs[0]
    loss_fn = model.task.loss(module or model.module, cfg, len(cfgs))
    tx = make_tx(cfg, shape)
    if not stacked:
        return make_train_step(loss_fn, tx, mesh, group=watch.group), make_eval_step(loss_fn, mesh)
    step = sweep.make_sweep_step(loss_fn, tx, mesh, shared_batch=_one_order(cfgs), group=watch.group)
    return step, sweep.make_sweep_eval_step(loss_fn, mesh)


def _one_order(cfgs: Sequence[Any]) -> bool:
    """Whether all see the same batches."""
    return len({cfg.train.seed for cfg in cfgs}) == 1


def free_bytes() -> int:
    """Memory that a step may take: of the device, or of a machine without one."""
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    if limit:
        return int(0.9 * limit)
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(0.7 * 1024 * int(lines["MemAvailable"].split()[0]))


def step_bytes(cfgs: Sequence[Any], model: Model, d: Data) -> int:
    """Memory of a group's step on one device, as its compiled program plans it. Compiles it."""
    mesh = make_mesh()
    batches, _, steps = make_batches(cfgs[0], model, d)
    shape = make_shape(cfgs[0], steps)

    def first(base):
        starts, frozen = _starts(cfgs, model, base, shape)
        return sweep.stack([state for state, _, _ in starts]), frozen

    state, frozen = jax.eval_shape(first, model.abstract())
    lead = () if _one_order(cfgs) else (len(cfgs),)

    def wide(name, x):
        tail = x.shape[2:] if name == "label" else x.shape[2:] and (d.length,)
        return jax.ShapeDtypeStruct((*lead, *x.shape[:2], *tail), x.dtype)

    batch = {name: wide(name, x) for name, x in batches.batch(0).items()}
    step, _ = _programs(cfgs, model, mesh, shape, stacked=True)
    plan = step.lower(state, frozen, batch).compile().memory_analysis()
    return plan.argument_size_in_bytes + plan.temp_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes


def step_bytes_bound(cfgs: Sequence[Any], model: Model, d: Data) -> int:
    """More than `step_bytes`, without compiling: every activation of every layer in float32, and states three times."""
    spec, cfg = model.module.spec, cfgs[0]
    abstract = model.module.abstract_params()
    base = sum(x.size * 4 for x in jax.tree.leaves(abstract))
    shape = make_shape(cfg, 1)
    own = 0
    for c in cfgs:
        starts = jax.eval_shape(lambda p, c=c: _starts([c], model, p, shape)[0][0][0], abstract)
        own += 3 * sum(x.size * 4 for x in jax.tree.leaves(starts))
    tokens = cfg.train.batch_size // cfg.train.grad_accum * d.length
    widest = max(int(x.shape[-1]) for x in jax.tree.leaves(abstract) if len(x.shape) >= 2)
    layers = sum(segment.layers for segment in spec.segments)
    heads = max(block.heads for segment in spec.segments for block in segment.pattern)
    activations = 4 * tokens * (layers * 20 * min(widest, 8 * spec.width) + 4 * min(widest, spec.vocab))
    scores = 4 * 4 * d.length**2 * heads
    return base + own + len(cfgs) * (activations + scores)


def _in_dtype(frozen: Any, model: Model) -> Any:
    """What stays frozen is kept in the compute dtype, or quantised."""

    def cast(leaf):
        plain = not isinstance(leaf, Packed) and jnp.issubdtype(leaf.dtype, jnp.floating)
        return leaf.astype(model.module.dtype) if plain else leaf

    return jax.tree.map(cast, frozen, is_leaf=lambda leaf: isinstance(leaf, Packed))


def has_adapter(params: Any) -> bool:
    """Whether the result is an adapter rather than a whole model."""
    return any(isinstance(w, Adapter) for w in jax.tree.leaves(params, is_leaf=is_weight))


@contextmanager
def explained_memory(cfg: Any, length: int) -> Iterator[None]:
    """Turn an error that says the device is out of memory into one that says what to do."""
    from jaxtune.train.loop import out_of_memory

    try:
        yield
    except Exception as error:
        if not out_of_memory(error):
            raise
        ways = "\n  ".join(remedies(cfg, cfg.train.batch_size // cfg.train.grad_accum, length))
        raise RunFailed(f"The device has not enough memory for this run. The cheapest remedies:\n  {ways}") from None


def remedies(cfg: Any, rows: int, length: int) -> list[str]:
    """The three cheapest ways to need less device memory, for this config."""
    ways = []
    if rows > 1:
        ways.append(f"--config.train.grad_accum={cfg.train.grad_accum * 2} (the same result, half the activations)")
    if cfg.model.remat != "full":
        ways.append("--config.model.remat=full (the same result, about a third slower)")
    if cfg.model.dtype == "float32":
        ways.append("--config.model.dtype=bfloat16 (half the bytes of frozen weights and activations)")
    if cfg.tune.method not in ADAPTERS:
        ways.append("--config.tune.method=lora (no gradients or moments of the base)")
    ways.append(f"--config.data.max_length={max(16, length // 2)} (longer rows are dropped)")
    if cfg.train.batch_size > 1:
        ways.append(f"--config.train.batch_size={cfg.train.batch_size // 2}")
    return ways[:3]
