"""The table of optimizers: adding one takes one row. Nothing here imports jax until a row is built.

A row gives the direction of a step; `optim.optimizer` adds decay, schedule, LoRA+ and rate. One that works by matrix is
written for a single matrix [K, N] or vector [N]: layer axes are vmapped over it.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple


class Optimizer(NamedTuple):
    """A row.

    Attributes:
        build: its settings as keyword arguments -> an optax transformation of gradients to directions.
        settings: its settings, optim.* in a config, with their defaults.
        elementwise: the update of an entry depends only on that entry (apart from clipping), so that zeros that pad a
            factor stay zero, and members of different ranks share a step.
        by_matrix: `build` is for one matrix.
        vector: builds the transformation of vectors, if `build` is for matrices only.
    """

    build: Callable[..., Any]
    settings: Mapping[str, float]
    elementwise: bool = True
    by_matrix: bool = False
    vector: Callable[[], Any] | None = None


def _adamw(b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> Any:
    """Adam (Kingma & Ba 2015) with decoupled decay (Loshchilov & Hutter 2019, arXiv:1711.05101)."""
    import optax

    return optax.scale_by_adam(b1, b2, eps)


def _sgd(momentum: float) -> Any:
    """v = momentum v + g, as in torch."""
    import optax

    return optax.trace(momentum) if momentum else optax.identity()


def _lion(b1: float, b2: float) -> Any:
    """Chen et al. 2023 (arXiv:2302.06675)."""
    import optax

    return optax.scale_by_lion(b1, b2)


def _muon(momentum: float, eps: float) -> Any:
    """Jordan 2024; times 0.2 sqrt(max(K, N)), to be as large as Adam's (Liu et al. 2025, arXiv:2502.16982, eq. 4)."""
    import optax
    import optax.contrib

    def scale(updates, params=None):
        return 0.2 * max(updates.shape) ** 0.5 * updates

    return optax.chain(optax.contrib.scale_by_muon(beta=momentum, eps=eps), optax.stateless(scale))


def _adafactor() -> Any:
    """Shazeer & Stern 2018 (arXiv:1804.04235) at a rate that is given, without a first moment: the second one is kept
    by row and column, of matrices with both sides of 128 or more, and updates are clipped to a root mean square of 1.
    """
    import optax

    return optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))


OPTIMIZERS: dict[str, Optimizer] = {
    "adamw": Optimizer(_adamw, {"b1": 0.9, "b2": 0.999, "eps": 1e-8}),
    "sgd": Optimizer(_sgd, {"momentum": 0.9}),
    "lion": Optimizer(_lion, {"b1": 0.9, "b2": 0.999}),
    "muon": Optimizer(_muon, {"momentum": 0.95, "eps": 1e-8}, elementwise=False, by_matrix=True, vector=_adamw),
    "adafactor": Optimizer(_adafactor, {}, elementwise=False, by_matrix=True),
}

SETTINGS = tuple(sorted({key for row in OPTIMIZERS.values() for key in row.settings}))


def defaults(setting: str) -> dict[str, float]:
    """{optimizer: its default} of the optimizers that have a setting."""
    return {name: row.settings[setting] for name, row in OPTIMIZERS.items() if setting in row.settings}
