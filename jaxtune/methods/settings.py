"""The settings of each tuning method: frozen, with their defaults, named as peft names them. Nothing here imports jax.

`read` makes them from options by name, from a config's section or a caller. An option that the method
does not have is an error.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from jaxtune.errors import UserError, nearest

Pattern = Mapping[str, Any] | Sequence[tuple[str, Any]]


@dataclasses.dataclass(frozen=True)
class Nothing:
    """A method without settings."""


@dataclasses.dataclass(frozen=True)
class Lora:
    """The settings of LoRA, as in peft's LoraConfig.

    Attributes:
        r, lora_alpha: rank, and the numerator of the scale alpha / r.
        lora_dropout: rate on the input of `a`.
        target_modules: names, a regex over whole names, or "all-linear"; see `places.resolve_targets`.
        bias: "none", "all" biases of the model, or "lora_only" those of targets are trained too.
        use_rslora: scale alpha / sqrt(r) (Kalajdzievski 2023, arXiv:2312.03732).
        use_dora: leaves become `DoraWeight` (arXiv:2402.09353).
        init_lora_weights: True or "default": a ~ U(+-1/sqrt(K)), b = 0; "gaussian": a ~ N(0, 1/r^2), b = 0; "pissa":
            the base's largest singular vectors (Meng et al. 2024, arXiv:2404.02948, eq. 2-3), subtracted from the base.
        rank_pattern, alpha_pattern: pairs (regex over the end of a name, value), or a mapping; the first match wins.
        layers_to_transform: indices of the layers to adapt; `layers_pattern` names their list where it is ambiguous.
        exclude_modules: names or a regex; these win over the targets.
        modules_to_save: ends of names of modules to train in full. A tied head or embedding named here is untied.
        trainable_token_indices: rows of the token embedding that are trained, absolute values; a tied head follows. Or
            {module's name: ids}, for rows of the output head as well.
        target_parameters: ends of names of experts' matrices, which are no modules: "mlp.experts.gate_up_proj". Each
            expert has factors of its own. With it `target_modules` may be ().
    """

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    target_modules: str | Sequence[str] = "all-linear"
    bias: str = "none"
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: bool | str = True
    rank_pattern: Pattern = ()
    alpha_pattern: Pattern = ()
    layers_to_transform: int | Sequence[int] | None = None
    layers_pattern: str | Sequence[str] | None = None
    exclude_modules: str | Sequence[str] | None = None
    modules_to_save: Sequence[str] | None = None
    trainable_token_indices: Sequence[int] | Mapping[str, Sequence[int]] | None = None
    target_parameters: Sequence[str] | None = None

    def as_lora(self) -> "Lora":
        """These settings."""
        return self


@dataclasses.dataclass(frozen=True)
class LinearTargets:
    """The settings that methods for linear modules share.

    Attributes:
        target_modules, exclude_modules, modules_to_save, layers_to_transform, layers_pattern: as in `Lora`; linear
            modules only.
    """

    target_modules: str | Sequence[str] = "all-linear"
    exclude_modules: str | Sequence[str] | None = None
    modules_to_save: Sequence[str] | None = None
    layers_to_transform: int | Sequence[int] | None = None
    layers_pattern: str | Sequence[str] | None = None

    def _lora(self, r: int, dropout: float, **own: Any) -> Lora:
        """The settings of LoRA with the same modules, rank `r`, and a scale of 1."""
        shared = {name: getattr(self, name) for name in names(LinearTargets)}
        return Lora(r=r, lora_alpha=r, lora_dropout=dropout, **shared, **own)


@dataclasses.dataclass(frozen=True)
class Hira(LinearTargets):
    """The settings of HiRA, as in peft's HiraConfig, without rank_pattern, which peft 0.21 ignores.

    Attributes:
        r: rank of the product a b.
        hira_dropout: rate on the input of the update.
        init_weights: True or "default", or "gaussian"; as `Lora.init_lora_weights`.
    """

    r: int = 32
    hira_dropout: float = 0.0
    init_weights: bool | str = True

    def as_lora(self) -> Lora:
        """The settings of LoRA with the same modules, ranks and initial factors, and a scale of 1."""
        return self._lora(self.r, self.hira_dropout, init_lora_weights=self.init_weights)


@dataclasses.dataclass(frozen=True)
class Miss(LinearTargets):
    """The settings of MiSS, as in peft's MissConfig, in its default variant.

    Attributes:
        r: length of a shard of the input, and rows of the trained matrix.
        miss_dropout: rate on the input of the update.
    """

    r: int = 64
    miss_dropout: float = 0.0

    def as_lora(self) -> Lora:
        """The settings of LoRA with the same modules, r and zeros, and a scale of 1."""
        return self._lora(self.r, self.miss_dropout)


@dataclasses.dataclass(frozen=True)
class Ia3:
    """The settings of (IA)^3, as in peft's IA3Config.

    Attributes:
        target_modules: as in `Lora`; None: peft's for the model's family, or Llama's for a family without one.
        feedforward_modules: targets whose input is scaled instead of the output; None: as above.
        exclude_modules, modules_to_save: as in `Lora`.
    """

    target_modules: str | Sequence[str] | None = None
    feedforward_modules: str | Sequence[str] | None = None
    exclude_modules: str | Sequence[str] | None = None
    modules_to_save: Sequence[str] | None = None


@dataclasses.dataclass(frozen=True)
class PromptTuning:
    """The settings of prompt tuning.

    Attributes:
        num_virtual_tokens: vectors before each row.
        init: "vocab", rows of the table drawn at random, or "random", N(0, 1) as peft's RANDOM.
    """

    num_virtual_tokens: int = 20
    init: str = "vocab"


@dataclasses.dataclass(frozen=True)
class LastN:
    """Attributes:
    layers: how many blocks from the top.
    """

    layers: int = 2


@dataclasses.dataclass(frozen=True)
class Regex:
    """Attributes:
    pattern: a regex over whole HF names; of a foreign tree over its paths with dots.
    """

    pattern: str = ".*"


class Row(NamedTuple):
    """The part of a method that needs no jax; its functions are in `table.METHODS`.

    Attributes:
        settings: the class of its settings.
        lr: its default rate with AdamW.
        adapter: whether its result is a PEFT directory.
    """

    settings: type
    lr: float
    adapter: bool = False


ROWS: dict[str, Row] = {
    "lora": Row(Lora, 2e-4, adapter=True),
    "hira": Row(Hira, 1e-3, adapter=True),
    "miss": Row(Miss, 2e-4, adapter=True),
    "ia3": Row(Ia3, 3e-3, adapter=True),
    "prompt_tuning": Row(PromptTuning, 3e-2, adapter=True),
    "full": Row(Nothing, 1e-5),
    "head": Row(Nothing, 1e-3),
    "bitfit": Row(Nothing, 1e-3),
    "norms": Row(Nothing, 1e-3),
    "embeddings": Row(Nothing, 1e-4),
    "last_n": Row(LastN, 1e-5),
    "regex": Row(Regex, 1e-5),
}

T = TypeVar("T")


def names(kind: type) -> list[str]:
    """The options of a method, from the class of its settings."""
    return [field.name for field in dataclasses.fields(kind)]


def read(method: str, kind: type[T], options: Mapping[str, Any]) -> T:
    """Make a method's settings from options by name.

    Raises:
        UserError: an option that the method does not have.
    """
    known = names(kind)
    if lost := [name for name in options if name not in known]:
        raise UserError(
            f"{method}: {lost[0]!r} is not one of its options.{nearest(lost[0], known)} "
            f"Options: {', '.join(known) or 'none'}."
        )
    return kind(**options)
