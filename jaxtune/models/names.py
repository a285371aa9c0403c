"""The bijection between a family's HF tensor names and the paths of the parameter tree.

One table serves load, export, adapter keys and the resolution of targets, so that they cannot drift apart.
"""

import dataclasses
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from jaxtune.models.spec import DecoderSpec


class Tensor(NamedTuple):
    """One HF tensor and its place.

    Attributes:
        hf: name in the checkpoint, "model.layers.3.self_attn.q_proj.weight".
        path: leaf of the parameter tree, "segment_0/block_0/self_attn/q_proj/kernel".
        index: row of the stacked leaf; two numbers if each layer's part is stacked, too; None if nothing is.
        transpose: whether HF stores the matrix as (out, in), as torch's Linear; here matrices are (in, out).
        name: its name in a loaded model, where transformers renames tensors; targets and adapters use it.
        half: 0 or 1 if it is that half of the columns of the place, which two tensors fill; None: all of it.
    """

    hf: str
    path: str
    index: int | tuple[int, int] | None
    transpose: bool
    name: str
    half: int | None = None

    @property
    def module(self) -> str:
        """The HF module, in memory, that owns the tensor."""
        return self.name.rpartition(".")[0]

    def part(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of its place in a leaf of `shape`."""
        shape = shape[0 if self.index is None else np.size(self.index) :]
        return shape if self.half is None else (*shape[:-1], shape[-1] // 2)

    def within(self, array: Any) -> Any:
        """Its place in a leaf's array, a view of a NumPy array."""
        place = array[() if self.index is None else self.index]
        return place if self.half is None else np.split(place, 2, axis=-1)[self.half]


@dataclasses.dataclass(frozen=True)
class NameTable:
    """A family's names.

    Attributes:
        top: HF name -> path, for what is not in a block.
        block: HF name within a layer -> path within a block. A field of `BlockSpec` in braces stands for the numbers
            below it: that many tensors are stacked on an axis after that of the layers. "[0]" or "[1]" at the end of a
            path: the tensor is the first or the second half of the leaf's columns.
        layer: prefix of a layer's names, with {} for its number.
        prefix: what HF puts before the names of the body; checkpoints saved from the bare body lack it.
        conv1d: matrices are stored (in, out), as GPT-2's Conv1D does (peft's fan_in_fan_out).
        ignored: regex of tensors in checkpoints that are not parameters: buffers, pretraining heads.
        renamed: ends of names in old checkpoints -> their current names.
        in_memory: (regex over a checkpoint's name, its replacement in a loaded model), applied in turn.
        bare: whether names in a loaded model lack the prefix.
        encoder: the names of an encoder-decoder's encoder, whose paths are below "encoder/".
    """

    top: dict[str, str]
    block: dict[str, str]
    layer: str
    prefix: str
    conv1d: bool = False
    ignored: str = r".*rotary_emb\.inv_freq"
    renamed: dict[str, str] = dataclasses.field(default_factory=dict)
    in_memory: tuple[tuple[str, str], ...] = ()
    bare: bool = False
    encoder: "NameTable | None" = None

    def tensors(self, spec: DecoderSpec, paths: set[str] | None = None) -> Iterator[Tensor]:
        """Yield every HF tensor of a model in the order of its layers; with `paths`, only those leaves that exist."""

        def known(path):
            return paths is None or path in paths

        def tensor(hf, *fields, half=None):
            return Tensor(hf, *fields, self.loaded(hf), half)

        for hf, path in self.top.items():
            if known(path):
                yield tensor(hf, path, None, path.endswith("/kernel"))
        number = 0
        for i, segment in enumerate(spec.segments):
            for repeat in range(segment.repeats):
                for j in range(len(segment.pattern)):
                    for hf, path in self.block.items():
                        path, _, half = path.removesuffix("]").partition("[")
                        half = int(half) if half else None
                        full = f"segment_{i}/block_{j}/{path}"
                        if not known(full):
                            continue
                        counted, last = re.search(r"{(\w+)}", hf), path.rpartition("/")[2]
                        turn = not (self.conv1d or last in ("scale", "bias") or last.endswith("_bias"))
                        turn &= counted is not None or not last.endswith("_experts")  # stacked: (in, out)
                        name = self.layer.format(number) + hf
                        if counted:
                            for k in range(getattr(segment.pattern[j], counted[1])):
                                yield tensor(name.replace(counted[0], str(k)), full, (repeat, k), turn, half=half)
                        else:
                            yield tensor(name, full, repeat, turn)
                    number += 1
        if self.encoder is not None:
            own = None if paths is None else {p.removeprefix("encoder/") for p in paths if p.startswith("encoder/")}
            for t in self.encoder.tensors(spec.encoder, own):
                yield t._replace(path=f"encoder/{t.path}", name=self.loaded(t.hf))

    def modern(self, hf: str) -> str:
        """The current name of a tensor in a checkpoint."""
        return next((hf.removesuffix(old) + new for old, new in self.renamed.items() if hf.endswith(old)), hf)

    def loaded(self, hf: str) -> str:
        """The name of a checkpoint's tensor in a loaded model."""
        for pattern, now in self.in_memory:
            hf = re.sub(pattern, now, hf)
        return hf.removeprefix(self.prefix) if self.bare else hf

    def is_ignored(self, hf: str) -> bool:
        return re.fullmatch(self.ignored, hf) is not None


def linears(modules: dict[str, str]) -> dict[str, str]:
    """Names of weight and bias for each {HF module: ours}."""
    ends = (("weight", "kernel"), ("bias", "bias"))
    return {f"{hf}.{a}": f"{ours}/{b}" for hf, ours in modules.items() for a, b in ends}


def norms(modules: dict[str, str]) -> dict[str, str]:
    """Names of weight and bias for each {HF module: ours}."""
    ends = (("weight", "scale"), ("bias", "bias"))
    return {f"{hf}.{a}": f"{ours}/{b}" for hf, ours in modules.items() for a, b in ends}


NORMS = {"input_layernorm": "input_norm", "post_attention_layernorm": "post_attention_norm"}
QK_NORMS = {"self_attn.q_norm": "self_attn/q_norm", "self_attn.k_norm": "self_attn/k_norm"}
PROJECTIONS = {
    f"{parent}.{name}": f"{parent}/{name}"
    for parent, names in {
        "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
        "mlp": ("gate_proj", "up_proj", "down_proj"),
    }.items()
    for name in names
}
LLAMA = NameTable(
    top={"model.embed_tokens.weight": "embed_tokens/embedding"}
    | norms({"model.norm": "norm"})
    | {"lm_head.weight": "lm_head/kernel"},
    block=norms(NORMS) | linears(PROJECTIONS),
    layer="model.layers.{}.",
    prefix="model.",
)
