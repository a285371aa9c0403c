"""The losses of embeddings by name: what a row holds for each, and its defaults. Nothing here imports jax."""

from collections.abc import Mapping
from typing import Any, NamedTuple

NOTHING, SCORE, BINARY, CLASS, SCORES = "nothing", "score", "binary", "class", "scores"


class Contrast(NamedTuple):
    """A loss over vectors.

    Attributes:
        label: what it reads beside the texts: NOTHING; SCORE, a number; BINARY, 0 or 1; CLASS, a name; SCORES, a
            teacher's number for each text after the first (of margins: one fewer).
        least, most: how many texts a row has; None: any number from `least` on.
        temperature: the default of objective.temperature; None: it reads none.
        margin: the default of objective.margin; None: it reads none.
        symmetric: whether objective.symmetric has a meaning.
        alone: whether one row already teaches something, without others in the batch.
    """

    label: str = NOTHING
    least: int = 2
    most: int | None = 2
    temperature: float | None = None
    margin: float | None = None
    symmetric: bool = False
    alone: bool = True


CONTRASTS = {
    "infonce": Contrast(most=None, temperature=0.05, symmetric=True, alone=False),
    "cosent": Contrast(SCORE, temperature=0.05, alone=False),
    "angle": Contrast(SCORE, temperature=0.05, alone=False),
    "cosine_mse": Contrast(SCORE),
    "triplet": Contrast(least=3, most=3, margin=5.0),
    "contrastive": Contrast(BINARY, margin=0.5),
    "batch_hard": Contrast(CLASS, 1, 1, margin=5.0, alone=False),
    "margin_mse": Contrast(SCORES, 3, None),
    "kl": Contrast(SCORES, 3, None, temperature=1.0),
}
TASK = "embedding"


def chosen(values: Mapping[str, Any]) -> Contrast | None:
    """The loss that a config names in objective.contrast; None: its task has none."""
    return CONTRASTS.get(values["objective.contrast"]) if values["objective.name"] == TASK else None


def default_temperature(values: Mapping[str, Any]) -> float | None:
    """The default of objective.temperature; 1 for tasks without these losses."""
    loss = chosen(values)
    return 1.0 if loss is None or loss.temperature is None else loss.temperature


def default_margin(values: Mapping[str, Any]) -> float | None:
    """The default of objective.margin."""
    loss = chosen(values)
    return None if loss is None else loss.margin


def unread(values: Mapping[str, Any]) -> tuple[str, ...]:
    """The settings of objective that the loss of a config does not read."""
    loss = chosen(values)
    if loss is None:
        return ()
    idle = {"temperature": loss.temperature is None, "margin": loss.margin is None, "symmetric": not loss.symmetric}
    return tuple(f"objective.{name}" for name, there in idle.items() if there)


def problems(values: Mapping[str, Any]) -> list[str]:
    """Sentences on settings of an embedding task that contradict one another."""
    loss = chosen(values)
    if loss is None:
        return []
    found = []
    if not loss.alone and values["train.batch_size"] == 1:
        found.append(
            f"train.batch_size=1 has no meaning for objective.contrast={values['objective.contrast']}, which compares "
            "the rows of a batch: one row has nothing to be told from; choose 2 or more"
        )
    if values["tune.method"] == "prompt_tuning":
        found.append("tune.method=prompt_tuning has no place in a directory of vectors; choose lora, full or last_n")
    widths = values["objective.matryoshka"] or ()
    if len(set(widths)) < len(widths):
        found.append(f"objective.matryoshka={list(widths)} names a width twice")
    return found
