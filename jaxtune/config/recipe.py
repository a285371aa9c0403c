"""From a resolved config to plain values: `experiment` is the one place where settings become the objects of a run.

Code below it takes plain arguments and knows no ConfigDict.
"""

from collections import namedtuple
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxtune.config import ADAPTERS, default_lr, to_json
from jaxtune.data.tokenizer import ids_of_new
from jaxtune.errors import UserError
from jaxtune.hf import load as hf
from jaxtune.hf import tensors
from jaxtune.hf.digest import BaseFiles, recorded
from jaxtune.hf.peft import load_adapter, rows_in
from jaxtune.hf.vectors import MODULES
from jaxtune.methods.table import cut, tune, virtual_ids
from jaxtune.methods.vocabulary import with_rows
from jaxtune.models import names
from jaxtune.models.attention import check_cudnn
from jaxtune.models.cudnn import capability
from jaxtune.objectives.task import BatchShape, Task, TaskInput, open_task, row_length
from jaxtune.run.experiment import Base, Experiment
from jaxtune.train import optim
from jaxtune.train.optimizers import SETTINGS
from jaxtune.train.recipe import Recipe


def experiment(cfg: Any, *, backend: str | None = None, weights: bool = True, **defaults: Any) -> Experiment:
    """Read the model's config.json and make the model, task and recipe of a run; no weights or rows are read.

    Args:
        cfg: a resolved config.
        backend: to plan for, "cpu" or "gpu"; default: JAX's own.
        weights: refuse a model whose weights are absent, pickled or cut short.
        defaults: values for keys that config.json lacks or leaves null.

    Raises:
        UserError: the model, the task and the method do not fit one another.
    """
    folder = hf.resolve(cfg.model.path)
    module, task = open_model(cfg, folder, backend=backend, **defaults)
    if weights and cfg.model.init == "pretrained":
        tensors.index_dir(folder)
    if cfg.model.adapter is not None and (record := recorded(Path(cfg.model.adapter).expanduser())):
        BaseFiles(folder).check(record)
    check_cudnn(module, cfg.data.packing, backend or jax.default_backend())
    _check_card(cfg.model.quantization)
    settings = method_settings(cfg)
    length, prefix = row_length(cfg.data.max_length, module, task.length), virtual_ids(module, settings)
    if length - len(prefix) < 2:
        raise UserError(
            f"data.max_length={length} leaves no room for text after {len(prefix)} virtual tokens; raise it."
        )
    o, t = cfg.optim, cfg.train
    recipe = Recipe(
        module=module,
        task=task,
        method=partial(tune, cfg.tune.method, settings=settings)
        if cfg.model.adapter is None
        else partial(_adapted, Path(cfg.model.adapter).expanduser(), folder),
        optimizer=partial(
            optim.optimizer,
            o.name,
            lr=o.lr,
            weight_decay=o.weight_decay,
            grad_clip=o.grad_clip,
            loraplus_lr_ratio=o.loraplus_lr_ratio,
            state=o.state,
            **{name: o[name] for name in SETTINGS},
        ),
        schedule=partial(optim.schedule, o.schedule, warmup=o.warmup, min_lr_ratio=o.min_lr_ratio),
        batch=BatchShape(t.batch_size // t.grad_accum, length, t.grad_accum, cfg.data.packing),
        seed=t.seed,
        quantization=cfg.model.quantization,
        weights=o.weights,
        goes_on=cfg.model.adapter is not None,
    )
    return Experiment(
        recipe=recipe,
        base=Base(
            *(str(cfg.model.path), folder, cfg.model.init, cfg.model.tokenizer, cfg.model.chat_template),
            tuple(cfg.model.new_tokens or ()),
        ),
        method=cfg.tune.method,
        settings=settings,
        adapter=cfg.tune.method in ADAPTERS,
        optimizer=o.name,
        lr=o.lr,
        default_lr=default_lr(cfg.objective.name),
        prefix=prefix,
        data=section(cfg, "data"),
        train=section(cfg, "train"),
        mesh=section(cfg, "mesh"),
        log=section(cfg, "log"),
        evaluate=section(cfg, "evaluate"),
        text=to_json(cfg),
    )


def _check_card(quantization: str) -> None:
    """Raise UserError if this machine's GPU has no such products; a CPU computes them as any others."""
    if quantization == "fp8_matmul" and jax.default_backend() == "gpu" and (card := capability()) < (8, 9):
        raise UserError(
            "model.quantization=fp8_matmul needs a card of compute capability 8.9 (Ada, Hopper) or later; this one has "
            f"{card[0]}.{card[1]}. With fp8 the weights are stored so and multiplied in bfloat16."
        )


def open_model(
    cfg: Any, folder: Any = None, *, backend: str | None = None, dtype: Any = None, **defaults: Any
) -> tuple[Any, Task]:
    """The module of a config, split where its method asks for that, and its task.

    Args:
        cfg: a resolved config.
        folder: of the model; default: the one of model.path.
        backend: decides model.dtype=auto; default: JAX's own.
        dtype: of activations; default: model.dtype.
        defaults: values for keys that config.json lacks or leaves null.
    """
    folder = folder or hf.resolve(cfg.model.path)
    backend = backend or jax.default_backend()
    fields = {"attention": cfg.model.attention, "remat": cfg.model.remat}
    fields["most_segments"] = (cfg.data.packing and cfg.data.max_segments) or 0
    values = hf.read_config(folder)
    values |= {key: value for key, value in defaults.items() if values.get(key) is None}
    fields |= {"dtype": dtype or compute_dtype(cfg.model.dtype, backend)}
    adapter = cfg.model.adapter and Path(cfg.model.adapter).expanduser()
    made = adapter if adapter and (adapter / MODULES).is_file() else folder  # how vectors are made
    given = TaskInput(values, fields, _plain(cfg.objective), _plain(cfg.data), cfg.model.tokenizer, made)
    module, task = open_task(cfg.objective.name, given)
    return cut(cfg.tune.method, _with_new_tokens(cfg, module), method_settings(cfg)), task


def _with_new_tokens(cfg: Any, module: Any) -> Any:
    """The module with rows for model.new_tokens, and for those that the adapter which is trained on was made with.

    Raises:
        UserError: its table takes none.
    """
    rows = max(_new_ids(cfg), default=-1) + 1
    if cfg.model.adapter is not None:
        rows = max(rows, rows_in(Path(cfg.model.adapter).expanduser(), module))
    if rows <= getattr(module.spec, "vocab", rows):
        return module
    if not hasattr(module.spec, "new_tokens"):
        raise UserError(f"model.new_tokens: the table of {cfg.model.path} is an encoder's, which is given no rows.")
    return with_rows(module, rows)


def _new_ids(cfg: Any) -> tuple[int, ...]:
    """The ids of model.new_tokens."""
    return ids_of_new(cfg.model.tokenizer, tuple(cfg.model.new_tokens)) if cfg.model.new_tokens else ()


def compute_dtype(name: str = "auto", backend: str | None = None) -> Any:
    """Resolve model.dtype for a backend; default: JAX's own."""
    if name == "auto":
        name = "float32" if (backend or jax.default_backend()) == "cpu" else "bfloat16"
    return jnp.dtype(name)


def _adapted(adapter: Path, folder: Path, params: Any, key: jax.Array, module: Any) -> tuple[Any, Any]:
    """The method of a run that trains an adapter further; a label head that the base lacks comes from the adapter."""
    drawn = None
    if module.label_head:
        drawn = module.drawn(tensors.index_dir(folder), names(module), jax.random.key(0)).keys()
    params, mask, _ = load_adapter(module, params, adapter, drawn=drawn)
    return params, mask


def method_settings(cfg: Any) -> Mapping[str, Any]:
    """The section of the method, tune.lora for tune.method=lora; empty for methods without settings.

    The rows of new tokens are trained where the section does not say how the table is.
    """
    chosen = cfg.tune.get(cfg.tune.method, None)
    settings = {} if chosen is None else dict(chosen)
    told = "embed_tokens" in (settings.get("modules_to_save") or ())
    if settings.get("trainable_token_indices", ()) is None and not told and (new := _new_ids(cfg)):
        settings["trainable_token_indices"] = new
    return settings


def section(cfg: Any, name: str) -> Any:
    """A section of a config as a plain named tuple."""
    values = _plain(cfg[name])
    return namedtuple(name.title(), values)(**values)


def _plain(values: Any) -> dict[str, Any]:
    return {key: dict(value) if hasattr(value, "items") else value for key, value in values.items()}
