"""The losses over answers by name: what each reads, and its defaults. Nothing here imports jax.

The losses themselves are in `preference`.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Loss(NamedTuple):
    """A loss over pairs.

    Attributes:
        beta: the default of objective.beta.
        reads: the other numbers it takes, of objective.
        reference: it compares with a reference.
        by_token: its margins are of means a token.
        sft: the default of objective.sft_weight.
    """

    beta: float = 0.1
    reads: tuple[str, ...] = ()
    reference: bool = True
    by_token: bool = False
    sft: float = 0.0


PAIR_LOSSES = {
    "sigmoid": Loss(reads=("label_smoothing",)),
    "sigmoid_norm": Loss(beta=5.0, reads=("label_smoothing",), by_token=True),
    "robust": Loss(reads=("label_smoothing",)),
    "hinge": Loss(),
    "ipo": Loss(by_token=True),
    "apo_zero": Loss(),
    "apo_down": Loss(),
    "nca": Loss(beta=0.01),
    "sppo": Loss(beta=0.001),
    "simpo": Loss(beta=2.0, reads=("gamma", "label_smoothing"), reference=False, by_token=True),
    "cpo": Loss(reads=("label_smoothing",), reference=False, sft=1.0),
    "orpo": Loss(reference=False, by_token=True, sft=1.0),
}


def chosen(values: Mapping[str, Any]) -> list[Loss]:
    """The losses that a config names in objective.loss, settings by path; those that there are not are left out."""
    return [PAIR_LOSSES[name] for name in values["objective.loss"] or () if name in PAIR_LOSSES]


def needs_reference(values: Mapping[str, Any]) -> bool:
    """Whether a config's objective compares with a reference."""
    name = values["objective.name"]
    return name == "kto" or (name == "preference" and any(loss.reference for loss in chosen(values)))


def default_beta(values: Mapping[str, Any]) -> float | None:
    """The beta of the first loss of a config; None: its objective has no such losses."""
    if values["objective.name"] != "preference":
        return 0.1 if values["objective.name"] == "kto" else None
    return next((loss.beta for loss in chosen(values)), None)


def default_sft(values: Mapping[str, Any]) -> float | None:
    """How much of the loss on the chosen answers a config's losses add."""
    if values["objective.name"] != "preference":
        return None
    return max((loss.sft for loss in chosen(values)), default=0.0)


def unread(values: Mapping[str, Any]) -> tuple[str, ...]:
    """The settings of objective that the losses of a config do not read."""
    if values["objective.name"] != "preference":
        return () if needs_reference(values) else ("objective.reference",)
    losses = chosen(values)
    idle = [name for name in ("gamma", "label_smoothing") if not any(name in loss.reads for loss in losses)]
    idle += [] if needs_reference(values) else ["reference"]
    idle += [] if len(values["objective.loss"] or ()) > 1 else ["loss_weights"]
    return tuple(f"objective.{name}" for name in idle)


def problems(values: Mapping[str, Any]) -> list[str]:
    """What is wrong with the losses that a config names, a sentence each."""
    if values["objective.name"] != "preference":
        return []
    names, weights = values["objective.loss"] or (), values["objective.loss_weights"] or ()
    found = []
    for name in names:
        if name not in PAIR_LOSSES:
            found.append(f"objective.loss: no loss is called {name!r}; choose from {', '.join(PAIR_LOSSES)}")
        elif names.count(name) > 1:
            found.append(f"objective.loss has {name!r} twice; give it once, with its weight in objective.loss_weights")
            break
    if weights and len(names) > 1 and len(weights) != len(names):
        found.append(
            f"objective.loss_weights has {len(weights)} numbers and objective.loss {len(names)} losses; one each"
        )
    smoothing = values["objective.label_smoothing"]
    if "robust" in names and smoothing >= 0.5:
        found.append(f"objective.label_smoothing={smoothing:g}: the robust loss divides by 1 - 2 of it; below 0.5")
    return found
