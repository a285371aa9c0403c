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

from jaxtune.weights.adapters import LoraWeight

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


def rope(kind: str, **rule: Any) -> dict:
    """`rope_parameters` of a scaling."""
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0} | rule}


# At this size both ends of YaRN's range fall inside the channels, and between whole ones.
YARN = {"original_max_position_embeddings": 32, "beta_fast": 0.5, "beta_slow": 0.1}
GEMMA = LLAMA | {"head_dim": 16, "tie_word_embeddings": True, "pad_token_id": 0}
# Caps and a scale that bite at the scores and logits of these models; 5 = 2*2+1 layers.
GEMMA2 = GEMMA | {
    "num_hidden_layers": 5,
    "sliding_window": 6,
    "query_pre_attn_scalar": 24,
    "attn_logit_softcapping": 4.0,
    "final_logit_softcapping": 1.0,
}
# 8 = 2*3+2 layers.
GEMMA3 = GEMMA | {
    "num_hidden_layers": 8,
    "sliding_window": 6,
    "sliding_window_pattern": 3,
    "query_pre_attn_scalar": 24,
}
GEMMA3_ROPES = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 100000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
}
PHI3 = LLAMA | {"pad_token_id": 0, "original_max_position_embeddings": 16}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.3, 1.6],
    "long_factor": [1.2, 2.0, 4.0, 8.0],
}
SHORTER = {"short_factor": [1.5, 2.0], "long_factor": [3.0, 9.0]}
SMOLLM3 = LLAMA | {"num_hidden_layers": 5, "tie_word_embeddings": True, "pad_token_id": 0}
GRANITE = LLAMA | {
    "embedding_multiplier": 3.0,
    "logits_scaling": 5.0,
    "residual_multiplier": 0.4,
    "attention_multiplier": 0.2,
}
STARCODER2 = {k: v for k, v in LLAMA.items() if k not in ("rms_norm_eps", "tie_word_embeddings")} | {
    "sliding_window": 6,
    "norm_epsilon": 1e-4,
}
MIXTRAL = LLAMA | {"num_local_experts": 5, "num_experts_per_tok": 2}
# Two layers: through three, float32's rounding moves a gradient by 1e-4 here, and by 3e-4 in torch.
GPT_OSS = MIXTRAL | {"head_dim": 8, "sliding_window": 6, "pad_token_id": 0, "swiglu_limit": 1.5, "num_hidden_layers": 2}
QWEN2_MOE = LLAMA | {
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
}
QWEN3_MOE = LLAMA | {"head_dim": 12, "num_experts": 5, "num_experts_per_tok": 3, "moe_intermediate_size": 24}
STABLELM = LLAMA | {"layer_norm_eps": 1e-4}
NEOX = {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"} | {"rotary_pct": 0.5, "layer_norm_eps": 1e-4}

HEATED = {"original_max_position_embeddings": 8, "beta_fast": 0.5, "beta_slow": 0.1, "llama_4_scaling_beta": 0.4}
MINISTRAL3 = LLAMA | {"head_dim": 16} | rope("yarn", factor=4.0, **HEATED)
COHERE = {k: v for k, v in LLAMA.items() if k not in ("rms_norm_eps", "tie_word_embeddings")} | {
    "layer_norm_eps": 1e-4,
    "logit_scale": 0.25,
    "pad_token_id": 0,
}
COHERE2 = COHERE | {"num_hidden_layers": 5, "sliding_window": 6, "sliding_window_pattern": 2}
GLM = LLAMA | {"head_dim": 16, "pad_token_id": 0, "eos_token_id": 2}
PHI = {k: v for k, v in LLAMA.items() if k not in ("rms_norm_eps", "tie_word_embeddings")} | {"layer_norm_eps": 1e-4}
OPT = {k: v for k, v in LLAMA.items() if k not in ("rms_norm_eps", "tie_word_embeddings", "intermediate_size")} | {
    "ffn_dim": 48,
    "pad_token_id": 0,
}
EXAONE4 = LLAMA | {"num_hidden_layers": 5, "sliding_window": 6, "sliding_window_pattern": 2}
OLMOE = LLAMA | {"num_experts": 5, "num_experts_per_tok": 2, "pad_token_id": 0}
GPTJ = GPT2 | {"rotary_dim": 4, "tie_word_embeddings": False}

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
    "llama-linear": ("llama", LLAMA | rope("linear", factor=4.0)),
    "llama-dynamic": ("llama", LLAMA | rope("dynamic", factor=2.0) | {"max_position_embeddings": 16}),
    "qwen2-yarn": (
        "qwen2",
        LLAMA | {"head_dim": 16} | rope("yarn", factor=4.0, **YARN),
    ),
    "qwen3-yarn-mscale": (
        "qwen3",
        LLAMA | {"head_dim": 16} | rope("yarn", factor=4.0, mscale=1.5, mscale_all_dim=0.5, truncate=False, **YARN),
    ),
    "gemma": ("gemma", GEMMA | {"num_key_value_heads": 1}),
    "gemma-untied-biases": (
        "gemma",
        GEMMA | {"head_dim": 8, "num_key_value_heads": 4, "tie_word_embeddings": False, "attention_bias": True},
    ),
    "gemma-gqa": ("gemma", GEMMA | {"num_attention_heads": 8, "head_dim": 4, "hidden_act": "gelu"}),
    "gemma2": ("gemma2", GEMMA2),
    "gemma2-global-untied": (
        "gemma2",
        GEMMA2
        | {"tie_word_embeddings": False, "attn_logit_softcapping": None, "num_key_value_heads": 4, "head_dim": 8}
        | {"layer_types": ["full_attention"] * 3, "attention_bias": True, "num_hidden_layers": 3},
    ),
    "gemma2-mqa": ("gemma2", GEMMA2 | {"num_key_value_heads": 1, "final_logit_softcapping": None, "sliding_window": 3}),
    "gemma3": ("gemma3_text", GEMMA3),
    "gemma3-untied-linear": (
        "gemma3_text",
        GEMMA3
        | {"tie_word_embeddings": False, "num_key_value_heads": 4, "attention_bias": True, "head_dim": 8}
        | {"rope_parameters": GEMMA3_ROPES, "num_hidden_layers": 5},
    ),
    "gemma3-mqa": ("gemma3_text", GEMMA3 | {"num_key_value_heads": 1, "sliding_window_pattern": 2}),
    "phi3": ("phi3", PHI3 | {"rope_parameters": LONGROPE | {"partial_rotary_factor": 1.0}}),
    "phi3-short-partial": (
        "phi3",
        PHI3
        | {"original_max_position_embeddings": 56, "num_key_value_heads": 4, "tie_word_embeddings": True}
        | {"rope_parameters": LONGROPE | {"partial_rotary_factor": 0.5} | SHORTER},
    ),
    "phi3-window": ("phi3", PHI3 | {"sliding_window": 6, "num_key_value_heads": 1, "num_attention_heads": 2}),
    "olmo2": ("olmo2", LLAMA),
    "olmo2-mha-biases": ("olmo2", LLAMA | {"num_key_value_heads": 4, "attention_bias": True, "head_dim": 12}),
    "olmo2-mqa": ("olmo2", LLAMA | {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "smollm3": ("smollm3", SMOLLM3),
    "smollm3-windows-biases": (
        "smollm3",
        SMOLLM3
        | WINDOWS
        | {"attention_bias": True, "mlp_bias": True, "no_rope_layer_interval": 2, "num_key_value_heads": 4},
    ),
    "smollm3-list": (
        "smollm3",
        SMOLLM3
        | {"no_rope_layers": [0, 1, 1, 0, 1], "head_dim": 12, "num_key_value_heads": 1}
        | {"tie_word_embeddings": False},
    ),
    "granite": ("granite", GRANITE),
    "granite-mha-biases": (
        "granite",
        GRANITE | {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "granite-mqa": ("granite", GRANITE | {"num_key_value_heads": 1, "head_dim": 12}),
    "starcoder2": ("starcoder2", STARCODER2),
    "starcoder2-untied-mha": (
        "starcoder2",
        STARCODER2 | {"tie_word_embeddings": False, "num_key_value_heads": 4, "use_bias": False},
    ),
    "starcoder2-mqa": (
        "starcoder2",
        STARCODER2 | {"num_key_value_heads": 1, "sliding_window": None, "head_dim": 12, "hidden_act": "gelu"},
    ),
    "mixtral": ("mixtral", MIXTRAL),
    "mixtral-window": ("mixtral", MIXTRAL | {"sliding_window": 6, "num_key_value_heads": 1, "num_experts_per_tok": 1}),
    "mixtral-tied": ("mixtral", MIXTRAL | {"num_key_value_heads": 4, "head_dim": 12, "tie_word_embeddings": True}),
    "qwen2_moe": ("qwen2_moe", QWEN2_MOE),
    "qwen2_moe-mixed": (
        "qwen2_moe",
        QWEN2_MOE | {"mlp_only_layers": [0], "norm_topk_prob": True, "num_key_value_heads": 1, "qkv_bias": False},
    ),
    "qwen2_moe-windows": (
        "qwen2_moe",
        QWEN2_MOE | WINDOWS | {"max_window_layers": 2, "num_key_value_heads": 4, "tie_word_embeddings": True},
    ),
    "qwen3_moe": ("qwen3_moe", QWEN3_MOE),
    "qwen3_moe-sparse-step": (
        "qwen3_moe",
        QWEN3_MOE
        | {"decoder_sparse_step": 2, "num_hidden_layers": 4, "num_key_value_heads": 4, "attention_bias": True},
    ),
    "qwen3_moe-window": (
        "qwen3_moe",
        QWEN3_MOE | WINDOWS | {"num_key_value_heads": 1, "norm_topk_prob": True, "tie_word_embeddings": True},
    ),
    "stablelm": ("stablelm", STABLELM),
    "stablelm-parallel": (
        "stablelm",
        STABLELM
        | {"use_parallel_residual": True, "num_key_value_heads": 4, "use_qkv_bias": True, "tie_word_embeddings": True},
    ),
    "stablelm-qk-norm": (
        "stablelm",
        STABLELM | {"qk_layernorm": True, "partial_rotary_factor": 0.5, "num_attention_heads": 2},
    ),
    "gpt_neox": ("gpt_neox", NEOX),
    "gpt_neox-serial": (
        "gpt_neox",
        NEOX | {"use_parallel_residual": False, "rotary_pct": 1.0, "attention_bias": False},
    ),
    "gpt_neox-tied": (
        "gpt_neox",
        NEOX | {"tie_word_embeddings": True, "num_attention_heads": 2, "rotary_emb_base": 500, "hidden_act": "relu"},
    ),
    "olmo3": ("olmo3", LLAMA | {"sliding_window": 6, "num_hidden_layers": 5, "pad_token_id": 0}),
    "olmo3-mha-biases": (
        "olmo3",
        LLAMA
        | {"num_key_value_heads": 4, "attention_bias": True, "head_dim": 12, "sliding_window": 5, "pad_token_id": 0}
        | {"rope_parameters": GEMMA3_ROPES, "layer_types": ["full_attention", *["sliding_attention"] * 2]},
    ),
    "olmo3-mqa": (
        "olmo3",
        LLAMA
        | {"num_key_value_heads": 1, "tie_word_embeddings": True, "layer_types": ["full_attention"] * 3}
        | {"pad_token_id": 0},
    ),
    "seed_oss": ("seed_oss", LLAMA | {"head_dim": 16}),
    "seed_oss-mha-biases": (
        "seed_oss",
        LLAMA | {"head_dim": 8, "num_key_value_heads": 4, "attention_out_bias": True, "mlp_bias": True},
    ),
    "seed_oss-mqa": (
        "seed_oss",
        LLAMA | {"head_dim": 12, "num_key_value_heads": 1, "attention_bias": False, "tie_word_embeddings": True},
    ),
    "arcee": ("arcee", LLAMA),
    "arcee-mha-biases": (
        "arcee",
        LLAMA | {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "arcee-mqa": ("arcee", LLAMA | {"num_key_value_heads": 1, "head_dim": 12, "hidden_act": "gelu"}),
    "ministral3": ("ministral3", MINISTRAL3 | {"pad_token_id": 0}),
    "ministral3-window": (
        "ministral3",
        MINISTRAL3 | {"num_key_value_heads": 1, "sliding_window": 6, "tie_word_embeddings": True, "pad_token_id": 0},
    ),
    "ministral3-mscale": (
        "ministral3",
        MINISTRAL3
        | {"num_key_value_heads": 4, "head_dim": 8, "pad_token_id": 0}
        | rope("yarn", factor=2.0, mscale=1.5, mscale_all_dim=0.5, **HEATED | {"llama_4_scaling_beta": 0.1}),
    ),
    "cohere": ("cohere", COHERE),
    "cohere-qk-norm": (
        "cohere",
        COHERE | {"use_qk_norm": True, "num_key_value_heads": 1, "tie_word_embeddings": False, "logit_scale": 0.3},
    ),
    "cohere-mha-biases": ("cohere", COHERE | {"attention_bias": True, "num_key_value_heads": 4, "head_dim": 12}),
    "cohere2": ("cohere2", COHERE2),
    "cohere2-mqa": (
        "cohere2",
        COHERE2 | {"num_key_value_heads": 1, "tie_word_embeddings": False, "sliding_window": 3},
    ),
    "cohere2-mha-biases": (
        "cohere2",
        COHERE2
        | {"attention_bias": True, "num_key_value_heads": 4, "num_hidden_layers": 3}
        | {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"]},
    ),
    "glm": ("glm", GLM),
    "glm-mha": ("glm", GLM | {"num_key_value_heads": 4, "head_dim": 8, "attention_bias": False}),
    "glm-mqa": (
        "glm",
        GLM | {"num_key_value_heads": 1, "tie_word_embeddings": True} | rope("default", partial_rotary_factor=1.0),
    ),
    "glm4": ("glm4", GLM),
    "glm4-mha": ("glm4", GLM | {"num_key_value_heads": 4, "head_dim": 8, "attention_bias": False}),
    "glm4-mqa": (
        "glm4",
        GLM | {"num_key_value_heads": 1, "tie_word_embeddings": True} | rope("default", partial_rotary_factor=0.25),
    ),
    "phi": ("phi", PHI),
    "phi-qk-norm": ("phi", PHI | {"qk_layernorm": True, "num_key_value_heads": 1, "hidden_act": "gelu"}),
    "phi-mha": ("phi", PHI | {"num_key_value_heads": 4} | rope("linear", factor=2.0, partial_rotary_factor=0.25)),
    "opt": ("opt", OPT),
    "opt-untied": ("opt", OPT | {"tie_word_embeddings": False, "num_attention_heads": 2, "enable_bias": False}),
    "opt-gelu": ("opt", OPT | {"activation_function": "gelu", "num_attention_heads": 1, "ffn_dim": 40}),
    "gptj": ("gptj", GPTJ),
    "gptj-whole": ("gptj", GPTJ | {"rotary_dim": 8, "n_inner": 40}),
    "gptj-relu": ("gptj", GPTJ | {"n_head": 2, "activation_function": "relu", "rotary_dim": 10}),
    "ernie4_5": ("ernie4_5", LLAMA | {"head_dim": 16}),
    "ernie4_5-mha-biases": (
        "ernie4_5",
        LLAMA | {"head_dim": None, "num_key_value_heads": 4, "use_bias": True, "tie_word_embeddings": True},
    ),
    "ernie4_5-mqa": ("ernie4_5", LLAMA | {"head_dim": 12, "num_key_value_heads": 1} | rope("linear", factor=2.0)),
    "helium": ("helium", LLAMA | {"head_dim": 8, "pad_token_id": 0}),
    "helium-mha-biases": (
        "helium",
        LLAMA
        | {"head_dim": 8, "num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True, "pad_token_id": 0}
        | {"tie_word_embeddings": True},
    ),
    "helium-mqa": (
        "helium",
        LLAMA | {"num_attention_heads": 2, "head_dim": 16, "num_key_value_heads": 1, "pad_token_id": 0},
    ),
    "vaultgemma": ("vaultgemma", GEMMA2),
    "vaultgemma-global-untied": (
        "vaultgemma",
        GEMMA2
        | {"tie_word_embeddings": False, "attn_logit_softcapping": None, "num_key_value_heads": 4, "head_dim": 8}
        | {"layer_types": ["full_attention"] * 3, "attention_bias": True, "num_hidden_layers": 3},
    ),
    "vaultgemma-mqa": (
        "vaultgemma",
        GEMMA2 | {"num_key_value_heads": 1, "final_logit_softcapping": None, "sliding_window": 3},
    ),
    "exaone4": ("exaone4", EXAONE4),
    "exaone4-global": (
        "exaone4",
        LLAMA
        | {"sliding_window": None, "layer_types": ["full_attention"] * 3, "num_key_value_heads": 4}
        | {"tie_word_embeddings": True},
    ),
    "exaone4-mqa": (
        "exaone4",
        EXAONE4
        | {"num_key_value_heads": 1, "head_dim": 12, "num_hidden_layers": 3, "sliding_window": 3}
        | {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"]},
    ),
    "olmoe": ("olmoe", OLMOE),
    "olmoe-mha-biases": (
        "olmoe",
        OLMOE | {"num_key_value_heads": 4, "attention_bias": True, "norm_topk_prob": True, "num_experts_per_tok": 3},
    ),
    "gpt_oss": ("gpt_oss", GPT_OSS),
    "gpt_oss-mqa-tied": (
        "gpt_oss",
        GPT_OSS
        | {"num_key_value_heads": 1, "head_dim": 12, "tie_word_embeddings": True, "attention_bias": False}
        | {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"], "num_hidden_layers": 3}
        | {"num_experts_per_tok": 1},
    ),
    "gpt_oss-mha": (
        "gpt_oss",
        GPT_OSS
        | {"num_key_value_heads": 4, "num_hidden_layers": 4, "num_experts_per_tok": 3, "swiglu_alpha": 1.1}
        | rope("default"),
    ),
    "olmoe-mqa": ("olmoe", OLMOE | {"num_key_value_heads": 1, "tie_word_embeddings": True, "num_experts_per_tok": 1}),
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
            if p.ndim >= 2 and not parameter_name.endswith("bias"):
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
    return jax.tree.map(lambda s: jax.device_put(np.float32(std * rng.standard_normal(s.shape))), abstract)


def with_lora(params: Any, key: jax.Array, r: int = 2, dropout: float | None = None, scale: float = 0.5) -> Any:
    """`params` with a LoraWeight, a and b random, at every matrix of the body (stacked `kernel` leaves)."""
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))  # numpy: nothing to compile

    def wrap(path, w):
        if path[-1].key != "kernel" or w.ndim != 3:
            return w
        n, k, m = w.shape
        a, b = (jax.device_put(np.float32(0.3 * rng.standard_normal(s))) for s in ((n, k, r), (n, r, m)))
        rate = None if dropout is None else jnp.full((n,), dropout)
        return LoraWeight(w, a, b, jnp.full((n,), scale), rate)

    return jax.tree_util.tree_map_with_path(wrap, params)
