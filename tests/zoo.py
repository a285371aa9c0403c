"""The oracle of the parity tests: tiny random transformers models, and the same weights in ours.

A freshly initialised model hides defects: its matrices are so small that a missing bias, another epsilon or the wrong
GELU change nothing a tolerance would see. `build` therefore scales matrices up and moves norms and biases off their
defaults (`test_models.py` proves by mutation that this is enough).
"""

import atexit
import copy
import functools
import shutil
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.weights import LoraWeight

VOCAB = 96
LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
GPT2 = {"vocab_size": VOCAB, "n_positions": 64, "n_embd": 32, "n_layer": 3, "n_head": 4} | dict.fromkeys(
    ("bos_token_id", "eos_token_id"), 0
)
WINDOWS = {"use_sliding_window": True, "sliding_window": 6}

# name -> (model_type, config). Between them: every switch that a family's file reads.
ZOO: dict[str, tuple[str, dict]] = {
    "llama": ("llama", LLAMA | {"head_dim": 16}),
    "llama-mha-biases": (
        "llama",
        LLAMA | {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "llama-mqa-rope3": (
        "llama",
        LLAMA | {"num_key_value_heads": 1, "rope_parameters": LLAMA3_ROPE, "max_position_embeddings": 256},
    ),
    "mistral": ("mistral", LLAMA | {"sliding_window": 6}),
    "mistral-global": ("mistral", LLAMA | {"sliding_window": None, "head_dim": 4, "tie_word_embeddings": True}),
    "qwen2": ("qwen2", LLAMA | {"tie_word_embeddings": True}),
    "qwen2-upper-windows": ("qwen2", LLAMA | WINDOWS | {"max_window_layers": 1}),
    "qwen2-mixed-windows": (
        "qwen2",
        LLAMA | WINDOWS | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "qwen3": ("qwen3", LLAMA | {"head_dim": 16, "tie_word_embeddings": True}),
    "qwen3-biases-windows": (
        "qwen3",
        LLAMA | WINDOWS | {"head_dim": 4, "attention_bias": True, "max_window_layers": 2},
    ),
    "gpt2": ("gpt2", GPT2),
    "gpt2-untied-relu": (
        "gpt2",
        GPT2 | {"tie_word_embeddings": False, "n_inner": 40, "activation_function": "relu", "n_head": 2},
    ),
}


def config(name: str, **changes: Any) -> Any:
    """The transformers config of a zoo model."""
    from transformers import AutoConfig

    family, values = ZOO[name]
    return AutoConfig.for_model(family, **copy.deepcopy(values | changes))


def build(name: str, seed: int = 0, **changes: Any) -> Any:
    """A zoo model in torch: float32, eager attention, evaluation mode, every term large enough to matter."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    with torch.no_grad():
        model = AutoModelForCausalLM.from_config(config(name, **changes), attn_implementation="eager").float().eval()
        for parameter_name, p in model.named_parameters():
            if p.ndim >= 2:
                # Activations of size 1 at this width; a residual stream small enough for the norms' epsilon to matter.
                p *= 1 if "embed" in parameter_name or ".wte" in parameter_name else 16
            else:
                p += 0.3 * torch.randn_like(p)
    return model


@functools.cache
def model(name: str) -> Any:
    """`build`, once a session. Do not change it."""
    return build(name)


def scratch() -> Path:
    """A new folder that lives as long as the process."""
    folder = Path(tempfile.mkdtemp(prefix="jaxtune-zoo-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def directory(name: str) -> Path:
    """The HF directory of a zoo model, without a tokenizer, once a session. Do not change it."""
    folder = scratch() / name
    model(name).save_pretrained(folder)
    return folder


@functools.cache
def ours(name: str) -> tuple[Any, Any]:
    """`(module, params)` of a zoo model, through `jaxtune.load`."""
    from jaxtune.hf.load import load

    return load(directory(name))


def tokens(batch: int, length: int, seed: int = 0, vocab: int = VOCAB) -> np.ndarray:
    """Random ids i32[batch, length]."""
    return np.random.default_rng(seed).integers(0, vocab, (batch, length), dtype=np.int32)


def torch_logits(torch_model: Any, ids: np.ndarray) -> np.ndarray:
    """transformers' logits f32[B, T, V]."""
    import torch

    with torch.no_grad():
        return torch_model(torch.tensor(ids, dtype=torch.long)).logits.numpy()


def apart(got: Any, want: Any) -> float:
    """The largest difference, relative to the largest number expected."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, (got.shape, want.shape)
    return float(np.abs(got - want).max() / np.abs(want).max())


def random_like(abstract: Any, seed: int = 0, std: float = 0.2) -> Any:
    """Normal float32 arrays of an abstract tree's shapes."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: jnp.asarray(std * rng.standard_normal(s.shape), jnp.float32), abstract)


def with_lora(params: Any, key: jax.Array, r: int = 2, dropout: float | None = None, scale: float = 0.5) -> Any:
    """`params` with a LoraWeight, a and b random, at every matrix of the body (stacked `kernel` leaves)."""
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))  # numpy: nothing to compile

    def wrap(path, w):
        if path[-1].key != "kernel" or w.ndim != 3:
            return w
        n, k, m = w.shape
        a, b = (jnp.asarray(0.3 * rng.standard_normal(s), jnp.float32) for s in ((n, k, r), (n, r, m)))
        rate = None if dropout is None else jnp.full((n,), dropout)
        return LoraWeight(w, a, b, jnp.full((n,), scale), rate)

    return jax.tree_util.tree_map_with_path(wrap, params)
