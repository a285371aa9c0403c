"""The parts of a run's step as plain values, made once from a config; training, planning and sweeps all use it.

    recipe.abstract      the shapes of state and frozen parameters       plan, micro-batches, memory of a sweep
    recipe.start(base)   the same with values                            training, sweeps
    recipe.programs()    the compiled step and evaluation                training, sweeps, features above a cut

Members of a sweep are recipes that differ in values only; `start_group` and `Recipe.programs(members=K)` are for them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jaxtune import tree
from jaxtune.objectives.task import OBJECTIVE, BatchShape, Task
from jaxtune.train import optim, stacked, watch
from jaxtune.train.step import TrainState, init_state, make_eval_step, make_train_step
from jaxtune.weights.packed import Packed, quantize


class Start(NamedTuple):
    """A run before its first step.

    Attributes:
        state: what training changes.
        frozen: what it does not, in the module's dtype or quantised.
        mask: the role of each parameter.
        counts: numbers of parameters.
    """

    state: TrainState
    frozen: tree.PyTree
    mask: tree.PyTree
    counts: tree.Counts


@dataclass(frozen=True, eq=False)
class Recipe:
    """One run's step.

    Attributes:
        module: the model; its dtype, remat policy and attention are those of the step.
        task: loss, batches and metrics.
        method: (params, key, module) -> (params, mask).
        optimizer: (shape=step -> multiplier of the learning rate) -> transformation.
        batch: rows (of a micro-batch), tokens a row and micro-batches.
        schedule: (steps=steps of the run) -> that shape; default: constant.
        seed: of the method's initial values and of dropout.
        steps: of the run.
        quantization: of the frozen weights, as model.quantization; "none": none.
        goes_on: the method goes on with an adapter, so that the run does not begin as the base.
        weights: dtype in which trained arrays are kept, "float32" or "bfloat16".
    """

    module: Any
    task: Task
    method: Callable[[Any, jax.Array, Any], tuple[Any, Any]]
    optimizer: Callable[..., optax.GradientTransformation]
    batch: BatchShape
    schedule: Callable[..., Callable[[Any], Any]] = optim.schedule
    seed: int = 0
    steps: int = 100
    quantization: str = "none"
    goes_on: bool = False
    weights: str = "float32"

    @cached_property
    def shape(self) -> Callable[[Any], Any]:
        """The shape of the learning rate over the run: step -> multiplier."""
        return self.schedule(steps=self.steps)

    @cached_property
    def tx(self) -> optax.GradientTransformation:
        """The optimizer."""
        return self.optimizer(shape=self.shape)

    @cached_property
    def abstract(self) -> Start:
        """`start` of abstract arrays, with what lies beside the frozen ones: nothing is allocated."""
        starts: list[Start] = []

        def shapes(base):
            starts.append(self.start(base))
            return starts[0].state, starts[0].frozen

        state, frozen = jax.eval_shape(shapes, self.abstract_base())
        return Start(state, self.abstract_given(frozen), starts[0].mask, starts[0].counts)

    def abstract_given(self, frozen: tree.PyTree) -> tree.PyTree:
        """What a step takes as frozen: with the shapes of the task's companion beside it, where it has one."""
        companion = self.task.companion
        return frozen if companion is None else tree.Beside(frozen, companion.abstract())

    def given(self, frozen: tree.PyTree) -> tree.PyTree:
        """The same, with numbers: the companion is read."""
        companion = self.task.companion
        return frozen if companion is None else tree.Beside(frozen, companion.load())

    def abstract_base(self) -> tree.PyTree:
        """The shapes of the parameters before the method."""
        return jax.eval_shape(self.quantized, self.module.abstract_params())

    def quantized(self, params: tree.PyTree) -> tree.PyTree:
        """Quantise plain parameters as the recipe sets."""
        return params if self.quantization == "none" else quantize(params, self.quantization)

    def tuned(self, params: tree.PyTree) -> tuple[tree.PyTree, tree.PyTree]:
        """Apply the method: (params, mask). The task's own layers are beside the model's."""
        if self.task.layers is not None:
            params = params | self.task.layers(self.seed)
        return self.method(params, jax.random.fold_in(jax.random.key(self.seed), 1), self.module)

    def start(self, base: tree.PyTree) -> Start:
        """Apply method and optimizer to the base's parameters, which are not copied."""
        params, mask = self.tuned(base)
        part, counts = tree.partition(params, mask), tree.count(params, mask)
        told = {name: jnp.float32(value) for name, value in self.task.values.items()}
        if told:  # the loss's own numbers lie beside the parameters, and a sweep may vary them
            roles = dict.fromkeys(told, tree.MEMBER)
            part = tree.partition(params | {OBJECTIVE: told}, mask | {OBJECTIVE: roles})
        key = jax.random.fold_in(jax.random.key(self.seed), 2)
        trainable = jax.tree.map(lambda w: w.astype(self.weights), part.trainable)
        state = init_state(trainable, part.member, self.tx, key, copy=False)
        return Start(state, in_dtype(part.frozen, self.module.dtype), mask, counts)

    def loss(self, module: Any = None, members: int = 1) -> Callable[..., Any]:
        """The loss over the module, or over another form of it: above a cut, or with another remat policy."""
        return self.task.loss(module or self.module, members)

    def programs(
        self, mesh: Mesh | None = None, *, members: int | None = None, shared_batch: bool = True, above: Any = None
    ) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """Return the train step and the evaluation step.

        Args:
            mesh: of devices; None: one.
            members: how many runs of a sweep the state stacks; None: a single run.
            shared_batch: whether members see the same batches.
            above: the part of the module above a cut, which takes features as input; None: the whole module.
        """
        loss_fn = self.loss(above, members or 1)
        if members is None:
            return make_train_step(loss_fn, self.tx, mesh, group=watch.group), make_eval_step(loss_fn, mesh)
        step = stacked.make_sweep_step(loss_fn, self.tx, mesh, shared_batch=shared_batch, group=watch.group)
        return step, stacked.make_sweep_eval_step(loss_fn, mesh)

    def with_module(self, **fields: Any) -> "Recipe":
        """The recipe with other fields of the module, such as `remat`."""
        return replace(self, module=self.module.clone(**fields))


def in_dtype(frozen: tree.PyTree, dtype: Any) -> tree.PyTree:
    """Cast frozen parameters to the compute dtype; quantised ones stay."""

    def cast(leaf):
        plain = not isinstance(leaf, Packed) and jnp.issubdtype(leaf.dtype, jnp.floating)
        return leaf.astype(dtype) if plain else leaf

    return jax.tree.map(cast, frozen, is_leaf=lambda leaf: isinstance(leaf, Packed))


def start_group(recipes: Sequence[Recipe], base: tree.PyTree) -> tuple[TrainState, list[Start]]:
    """Return the members' states, stacked, and each one's start; they share the first one's frozen parameters."""
    starts = []
    for recipe in recipes:
        start = recipe.start(base)
        starts.append(start._replace(frozen=starts[0].frozen) if starts else start)
    return stacked.stack([start.state for start in starts]), starts


def compiled_bytes(recipes: Sequence[Recipe], *, shared_batch: bool = True, alone: bool = False) -> int:
    """Compile a step and return the device memory that its program plans, counting donated buffers once.

    Args:
        recipes: the members of a sweep; with `alone`, one run.
        shared_batch: see `Recipe.programs`.
        alone: plan the first recipe as a single run, without a member axis.
    """
    first = recipes[0]
    if alone:
        state, frozen = first.abstract.state, first.abstract.frozen
    else:

        def group(base):
            state, starts = start_group(recipes, base)
            return state, starts[0].frozen

        state, frozen = jax.eval_shape(group, first.abstract_base())
        frozen = first.abstract_given(frozen)
    batch = first.task.batch_like(first.batch)
    if not shared_batch:
        wide = lambda x: jax.ShapeDtypeStruct((len(recipes), *x.shape), x.dtype)  # noqa: E731
        batch = jax.tree.map(wide, batch)
    step, _ = first.programs(members=None if alone else len(recipes), shared_batch=shared_batch)
    return planned_bytes(step.lower(state, frozen, batch).compile())


def planned_bytes(executable: Any) -> int:
    """Return the device memory of a compiled program, donated buffers once."""
    plan = executable.memory_analysis()
    return plan.argument_size_in_bytes + plan.temp_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes
