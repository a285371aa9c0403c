"""From a resolved config to the pieces of a run. Each check comes before the compile, the cheapest first."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxtune import data, models, optim, tree
from jaxtune.errors import UserError
from jaxtune.files import cache_root
from jaxtune.hf import load as hf
from jaxtune.hf import tensors
from jaxtune.methods import tune
from jaxtune.models.decoder import Decoder
from jaxtune.objectives.causal_lm import causal_lm
from jaxtune.parallel import check_rows, make_mesh, replicate
from jaxtune.step import TrainState, init_state, make_eval_step, make_train_step
from jaxtune.weights import LoraWeight, is_weight

DEFAULT_LENGTH = 1024  # of data.max_length, where the model's own limit is higher


def use_compilation_cache() -> None:
    """Keep compiled programs on disk, unless the user has set JAX's own cache."""
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(cache_root() / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def compute_dtype(name: str) -> Any:
    """Resolve model.dtype."""
    if name == "auto":
        name = "bfloat16" if jax.default_backend() == "gpu" else "float32"
    return jnp.dtype(name)


@dataclass
class Model:
    """A model before its weights are read."""

    folder: Path
    module: Decoder
    init: str

    def load(self, seed: int) -> Any:
        """Read the weights, or draw them for model.init=random."""
        if self.init == "random":
            return jax.jit(self.module.init_params)(jax.random.key(seed))
        entries = tensors.index_dir(self.folder)
        wanted = self.module.abstract_params()
        places = hf.plan(models.names(self.module), self.module, wanted, entries, self.folder)
        return hf.read_tree(wanted, places)


def open_model(cfg: Any) -> Model:
    """Read the config of model.path; the weights come later."""
    folder = hf.resolve(cfg.model.path)
    module = models.build(
        hf.read_config(folder),
        dtype=compute_dtype(cfg.model.dtype),
        attention=cfg.model.attention,
        remat=cfg.model.remat,
        unroll=cfg.model.unroll,
    )
    if cfg.model.init == "pretrained":
        tensors.index_dir(folder)  # fail now if the weights are absent, pickled or cut short
    return Model(folder, module, cfg.model.init)


def max_length(cfg: Any, module: Decoder) -> int:
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


def open_data(cfg: Any, module: Decoder) -> Data:
    """Read and tokenise what data.train and data.eval name."""
    length = max_length(cfg, module)
    tokenizer = data.load_tokenizer(cfg.model.tokenizer, cfg.model.chat_template)
    train, held_out, report = data.prepare(
        tokenizer,
        cfg.data.train,
        eval=cfg.data.eval,
        eval_fraction=cfg.data.eval_fraction,
        format=cfg.data.format,
        columns=dict(cfg.data.columns),
        template=cfg.data.template,
        completion_from=cfg.data.completion_from,
        system=cfg.data.system,
        max_length=length,
        overlength=cfg.data.overlength,
        vocab_size=module.spec.vocab,
        cache=cfg.data.cache,
    )
    return Data(tokenizer, train, held_out, report, length)


def method_settings(cfg: Any) -> Mapping[str, Any]:
    """The method's own section, by its name: tune.lora for tune.method=lora; none for methods without settings."""
    section = cfg.tune.get(cfg.tune.method, None)
    return {} if section is None else dict(section)


def tuned(cfg: Any, model: Model, params: Any) -> tuple[Any, Any]:
    """Apply the method; what stays frozen is kept in the compute dtype."""
    params, mask = _apply(cfg, model, params)

    def cast(leaf, role):
        floating = jnp.issubdtype(leaf.dtype, jnp.floating)
        return leaf.astype(model.module.dtype) if role is tree.FROZEN and floating else leaf

    return jax.tree.map(cast, params, mask), mask


def as_stored(cfg: Any, model: Model, params: Any, mask: Any) -> Any:
    """Undo `tuned`'s cast for a whole model that is written: frozen leaves come from the base again, unrounded."""
    if tree.FROZEN not in jax.tree.leaves(mask):
        return params
    stored, _ = _apply(cfg, model, model.load(cfg.train.seed))
    return jax.tree.map(lambda new, old, role: old if role is tree.FROZEN else new, params, stored, mask)


def _apply(cfg: Any, model: Model, params: Any) -> tuple[Any, Any]:
    key = jax.random.fold_in(jax.random.key(cfg.train.seed), 1)
    return tune(cfg.tune.method, params, key, model.module, method_settings(cfg))


@dataclass
class Job:
    """All that the loop needs."""

    model: Model
    data: Data
    mask: Any
    counts: tree.Counts
    state: TrainState
    frozen: Any
    mesh: Any
    steps: int
    batches: data.Batches
    eval_batches: data.EvalBatches | None
    step_fn: Any
    eval_step: Any
    shape: Any  # of the learning rate

    @property
    def params(self) -> Any:
        return tree.combine(self.state.trainable, self.state.member, self.frozen)


def make_batches(cfg: Any, d: Data) -> tuple[data.Batches, data.EvalBatches | None, int]:
    """The training stream, the evaluation batches and the number of steps."""
    shared = {
        "batch_size": cfg.train.batch_size,
        "grad_accum": cfg.train.grad_accum,
        "max_length": d.length,
        "packing": cfg.data.packing,
    }
    batches = data.Batches(d.train, weights=cfg.data.weights, seed=cfg.train.seed, **shared)
    held_out = None if d.eval is None else data.EvalBatches(d.eval, **shared)
    return batches, held_out, cfg.train.steps or batches.steps(cfg.train.epochs)


def make_tx(cfg: Any, steps: int) -> tuple[Any, Any]:
    """The optimizer and the shape of its learning rate."""
    o = cfg.optim
    shape = optim.schedule(o.schedule, steps=steps, warmup=o.warmup, min_lr_ratio=o.min_lr_ratio)
    tx = optim.optimizer(
        o.name,
        lr=o.lr,
        shape=shape,
        weight_decay=o.weight_decay,
        grad_clip=o.grad_clip,
        b1=o.b1,
        b2=o.b2,
        eps=o.eps,
        momentum=o.momentum,
    )
    return tx, shape


def build(cfg: Any, model: Model, d: Data) -> Job:
    """Load the weights and put everything on the devices."""
    mesh = make_mesh()
    check_rows(cfg.train.batch_size // cfg.train.grad_accum, mesh)
    batches, held_out, steps = make_batches(cfg, d)
    params, mask = tuned(cfg, model, model.load(cfg.train.seed))
    part = tree.partition(params, mask)
    counts = tree.count(params, mask)
    del params
    tx, shape = make_tx(cfg, steps)
    key = jax.random.fold_in(jax.random.key(cfg.train.seed), 2)
    state = replicate(init_state(part.trainable, part.member, tx, key, copy=False), mesh)
    loss_fn = causal_lm(model.module, packed=cfg.data.packing, z_loss=cfg.objective.z_loss)
    return Job(
        model=model,
        data=d,
        mask=mask,
        counts=counts,
        state=state,
        frozen=replicate(part.frozen, mesh),
        mesh=mesh,
        steps=steps,
        batches=batches,
        eval_batches=held_out,
        step_fn=make_train_step(loss_fn, tx, mesh),
        eval_step=make_eval_step(loss_fn, mesh),
        shape=shape,
    )


def has_adapter(params: Any) -> bool:
    """Whether the result is an adapter rather than a whole model."""
    return any(isinstance(w, LoraWeight) for w in jax.tree.leaves(params, is_leaf=is_weight))


def _left_behind(name: str) -> bool:
    """Whether a file may be there before config.json: the log, the lock, and a config.json half written at a kill."""
    return name in ("jaxtune.log", ".lock") or (name.startswith(".config.json.") and name.endswith(".tmp"))


def check_workdir(workdir: Path, cfg: Any, fingerprint: str | None = None) -> bool:
    """Return whether the workdir holds a run of this config to go on with.

    Raises:
        UserError: it holds something else, or a run with another config or other data.
    """
    from jaxtune import config

    file = workdir / "config.json"
    if not file.exists():
        if workdir.exists() and not all(_left_behind(p.name) for p in workdir.iterdir()):
            raise UserError(f"--workdir={workdir} is not empty and holds no run (no config.json); nothing was changed.")
        return False
    text = file.read_text()
    config.check_resume(config.from_json(text, str(file)), cfg)
    before = json.loads(text).get("versions", {}).get("data")
    if fingerprint and before and before != fingerprint:
        raise UserError(
            f"The data of the run in {workdir} has changed since it started (fingerprint {before[:12]} -> "
            f"{fingerprint[:12]}); nothing was changed. Restore the files or give another --workdir."
        )
    return True


def check_room(workdir: Path, cfg: Any, j: Job) -> None:
    """Raise UserError unless the disk has room for the checkpoints (kept, best, being written) and the result."""
    from jaxtune.checkpoint import check_disk, state_bytes

    result = sum(leaf.size * 4 for leaf in jax.tree.leaves(j.state.trainable))
    check_disk(workdir, (cfg.train.keep + 2) * state_bytes(j.state) + result)


def remedies(cfg: Any, rows: int, length: int) -> list[str]:
    """The three cheapest ways to need less device memory, for this config."""
    ways = []
    if rows > 1:
        ways.append(f"--config.train.grad_accum={cfg.train.grad_accum * 2} (the same result, half the activations)")
    if cfg.model.remat != "full":
        ways.append("--config.model.remat=full (the same result, about a third slower)")
    if cfg.model.dtype == "float32":
        ways.append("--config.model.dtype=bfloat16 (half the bytes of frozen weights and activations)")
    if cfg.tune.method != "lora":
        ways.append("--config.tune.method=lora (no gradients or moments of the base)")
    ways.append(f"--config.data.max_length={max(16, length // 2)} (longer rows are dropped)")
    if cfg.train.batch_size > 1:
        ways.append(f"--config.train.batch_size={cfg.train.batch_size // 2}")
    return ways[:3]
