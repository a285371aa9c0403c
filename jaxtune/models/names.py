"""The bijection between a family's HF tensor names and the paths of our tree.

One table serves load, export, adapter keys and the resolution of targets, so that they cannot drift apart.
"""

import dataclasses
import re
from collections.abc import Iterator
from typing import NamedTuple

from jaxtune.models.spec import DecoderSpec


class Tensor(NamedTuple):
    """One HF tensor and its place.

    Attributes:
        hf: name in the checkpoint, "model.layers.3.self_attn.q_proj.weight".
        path: leaf in our tree, "segment_0/block_0/self_attn/q_proj/kernel".
        index: row of the stacked leaf; None where the leaf is not stacked.
        transpose: whether HF keeps the matrix as (out, in), torch's Linear; ours are (in, out).
    """

    hf: str
    path: str
    index: int | None
    transpose: bool

    @property
    def module(self) -> str:
        """The HF module that owns the tensor."""
        return self.hf.rpartition(".")[0]


@dataclasses.dataclass(frozen=True)
class NameTable:
    """A family's names.

    Attributes:
        top: HF name -> path, for what is not in a block.
        block: HF name within a layer -> path within a block.
        layer: prefix of a layer's names, with {} for its number.
        prefix: what HF puts before the names of the body; checkpoints saved from the bare body lack it.
        conv1d: matrices are stored (in, out), as GPT-2's Conv1D does (peft's fan_in_fan_out).
        ignored: regex of tensors in old checkpoints that hold no parameter (buffers).
    """

    top: dict[str, str]
    block: dict[str, str]
    layer: str
    prefix: str
    conv1d: bool = False
    ignored: str = r".*rotary_emb\.inv_freq"

    def tensors(self, spec: DecoderSpec, paths: set[str] | None = None) -> Iterator[Tensor]:
        """Yield every HF tensor of a model in the order of its layers; with `paths`, only those leaves that exist."""

        def known(path):
            return paths is None or path in paths

        for hf, path in self.top.items():
            if known(path):
                yield Tensor(hf, path, None, path == "lm_head/kernel")
        number = 0
        for i, segment in enumerate(spec.segments):
            for repeat in range(segment.repeats):
                for j in range(len(segment.pattern)):
                    for hf, path in self.block.items():
                        full = f"segment_{i}/block_{j}/{path}"
                        if known(full):
                            turn = path.endswith("/kernel") and not self.conv1d
                            yield Tensor(self.layer.format(number) + hf, full, repeat, turn)
                    number += 1

    def is_ignored(self, hf: str) -> bool:
        return re.fullmatch(self.ignored, hf) is not None


def llama_block(**extra: str) -> dict[str, str]:
    """The names that Llama's descendants share; `extra` adds "q_norm" and the like, dots written as in HF."""
    names = {
        "input_layernorm.weight": "input_norm/scale",
        "post_attention_layernorm.weight": "post_attention_norm/scale",
    }
    for parent, modules in {
        "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
        "mlp": ("gate_proj", "up_proj", "down_proj"),
    }.items():
        for module in modules:
            names[f"{parent}.{module}.weight"] = f"{parent}/{module}/kernel"
            names[f"{parent}.{module}.bias"] = f"{parent}/{module}/bias"
    return names | extra


LLAMA_TOP = {
    "model.embed_tokens.weight": "embed_tokens/embedding",
    "model.norm.weight": "norm/scale",
    "lm_head.weight": "lm_head/kernel",
}
LLAMA = NameTable(top=LLAMA_TOP, block=llama_block(), layer="model.layers.{}.", prefix="model.")
