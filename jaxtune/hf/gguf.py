"""GGUF out: one file with weights, tokenizer and chat template, for llama.cpp and what is built on it.

The format is described at github.com/ggml-org/ggml/blob/master/docs/gguf.md; what the keys and tensors of an
architecture mean, by llama.cpp's converter.
"""

import contextlib
import dataclasses
import json
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxtune import models
from jaxtune.errors import UserError
from jaxtune.files import atomic_file, refuse_existing, require_space
from jaxtune.hf.export import dtypes_of, hf_tensor, public_name, whole
from jaxtune.hf.stops import stop_ids
from jaxtune.models.rope import RULES, Rope
from jaxtune.models.spec import BlockSpec
from jaxtune.weights.leaf import plain, weights_by_path

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
# Features that a block may have besides sizes, a rope and an epsilon; everything else must be as in Llama.
_BLOCK = {"llama": {}, "qwen2": {"qkv_bias": True}, "qwen3": {"qk_norm": "head"}}
_SIZES = ("heads", "kv_heads", "head_dim", "mlp", "rope", "eps", "window")
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# How text is cut into words before merging -> llama.cpp's name for it. None: the byte-level pre-tokenizer's own regex.
_CUTS = {
    ("isolated", _WORDS % r"\p{N}"): "qwen2",
    ("isolated", _WORDS % r"\p{N}{1,3}"): "llama-bpe",
    None: "gpt-2",
}
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_SPACE = "▁"


def export_gguf(
    module: Any,
    params: Any,
    out: str | Path,
    *,
    base: str | Path,
    dtype: Any = None,
    tokenizer: str | Path | None = None,
    chat_template: str | None = None,
    tuned_from: str | None = None,
    ends: Collection[int] = (),
) -> list[str]:
    """Merge adapters and write the model as one GGUF file, atomically. Llama, Mistral, Qwen2 and Qwen3.

    Adapters are merged in float32 and every matrix is cast once; vectors are float32, as llama.cpp wants them.

    Args:
        module: the zoo module.
        params: its parameters; leaves may be polymorphic.
        out: the file; must not exist.
        base: directory of the model that was tuned. Gives the dtype and the tokenizer.
        dtype: of the matrices, "float32", "bfloat16" or "float16"; default: that of most of `base`'s tensors.
        tokenizer: directory of the tokenizer, if it is not in `base`.
        chat_template: Jinja text, if it is not the tokenizer's own.
        tuned_from: name of the model in the file; default: `base`.
        ends: tokens that end a trained turn, beside those at which `base` stops.

    Returns:
        Sentences that the user should read: a head that was untied, a tokenizer that was not found.

    Raises:
        UserError: `out` exists, the disk is full, gguf is not installed, or GGUF cannot express what the model or its
            tokenizer does; nothing is written then.
    """
    try:
        import gguf
    except ImportError:
        raise UserError("GGUF files need the package gguf: pip install 'jaxtune[gguf]'.") from None
    base, out = Path(base).expanduser(), Path(out).expanduser()
    _refuse(out)
    arch = check(module)
    params, notes = whole(module, params)
    leaves = weights_by_path(params)
    wanted = list(models.names(module).tensors(module.spec, set(leaves)))
    dtypes = dtypes_of(wanted, leaves, models.names(module).prefix, base, dtype)
    matrix = np.dtype(max(dtypes.values(), key=list(dtypes.values()).count))
    types = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
    if matrix.name not in types:
        raise UserError(f"The weights are {matrix.name}; give --dtype=float32, float16 or bfloat16 for a GGUF file.")
    block = module.spec.segments[0].pattern[0]

    source = Path(tokenizer or base)
    words = read_tokenizer(source, module.spec.vocab, chat_template)
    if not words:
        notes.append(f"No tokenizer was written: {source} has none.")
    elif turn := _end_of_turn({*ends, *stop_ids(base)} - {words.get("eos_token_id")}, words["token_list"], notes):
        words["eot_token_id"] = turn
    names = gguf.get_tensor_name_map(_arch(gguf, arch), module.spec.layers)

    with atomic_file(out) as temporary, contextlib.closing(gguf.GGUFWriter(temporary, arch)) as writer:
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name((tuned_from or public_name(base)).rstrip("/").rpartition("/")[2])
        kind = {"float32": "ALL_F32", "float16": "MOSTLY_F16", "bfloat16": "MOSTLY_BF16"}[matrix.name]
        writer.add_file_type(gguf.LlamaFileType[kind])
        for key, value in metadata(module, arch).items():
            getattr(writer, f"add_{key}")(value)
        for key, value in (words or {"tokenizer_model": "none"}).items():
            getattr(writer, f"add_{key}")(value)
        stored = {}
        for tensor in wanted:
            shape = tensor.part(plain(leaves[tensor.path]).shape)
            shape = shape[::-1] if tensor.transpose else shape
            own = matrix if len(shape) > 1 else np.dtype(np.float32)
            name = names.get_name(tensor.hf, try_suffixes=(".weight", ".bias"))
            stored[name] = (tensor, own, shape)
        factors = rope_factors(block.rope) if block.rope.kind == "llama3" else None
        if factors is not None:
            stored["rope_freqs.weight"] = (None, np.dtype(np.float32), factors.shape)
        require_space(temporary.parent, sum(math.prod(s) * d.itemsize for _, d, s in stored.values()))
        for name, (_, own, shape) in stored.items():
            nbytes = math.prod(shape) * own.itemsize
            writer.add_tensor_info(name, shape, own, nbytes, gguf.GGMLQuantizationType[types[own.name]])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor, own, _ in stored.values():  # one tensor at a time is merged and held
            if tensor is None:
                array = factors
            else:
                array = hf_tensor(tensor, leaves, own)
                if arch == "llama" and (heads := _rotated_heads(tensor.path, block)):
                    array = pairs_adjacent(array, heads)
            writer.write_tensor_data(np.ascontiguousarray(array).view(np.uint8))
        _refuse(out)
    return notes


def _end_of_turn(stops: Collection[int], names: Sequence[str], notes: list[str]) -> int | None:
    """The token beside EOS at which the model stops; a GGUF file has one."""
    first, *others = sorted(i for i in stops if i < len(names)) or [None]
    if others:
        listed = ", ".join(f"{names[i]} ({i})" for i in others)
        notes.append(
            f"The model stops at {names[first]} ({first}), and also at {listed}, which a GGUF file has no key for: "
            "llama.cpp knows common ones by name."
        )
    return first


def _refuse(out: Path) -> None:
    if out.is_dir():
        raise UserError(f"{out} is a folder; name the GGUF file to write.")
    refuse_existing(out)


def _arch(gguf: Any, name: str) -> Any:
    return next(arch for arch, known in gguf.MODEL_ARCH_NAMES.items() if known == name)


def check(module: Any) -> str:
    """The GGUF architecture that describes a model completely.

    Raises:
        UserError: there is none; the feature that is missing is named.
    """
    spec = module.spec
    family = spec.hf_config["model_type"]
    if family not in ARCHITECTURES:
        raise UserError(
            f"GGUF is written for {', '.join(ARCHITECTURES)}; this is a {family!r}. Export a directory instead."
        )
    if module.label_head:
        raise UserError("GGUF files hold language models; this one has a label head. Export a directory instead.")
    arch = ARCHITECTURES[family]

    def refuse(what: str) -> UserError:
        return UserError(f"GGUF's architecture {arch!r} has no {what}. Export a directory instead.")

    for block in (b for s in spec.segments for b in s.pattern):
        if block.window is not None and block.window < spec.positions:
            raise refuse(f"sliding window (here {block.window} tokens of {spec.positions})")
        for field in dataclasses.fields(BlockSpec):
            expected = _BLOCK[arch].get(field.name, field.default)
            if field.name not in _SIZES and getattr(block, field.name) != expected:
                raise refuse(f"{field.name}={getattr(block, field.name)!r} (expected {expected!r})")
        if arch == "qwen2" and block.heads * block.head_dim != spec.width:
            raise refuse(f"heads of {block.head_dim} channels times {block.heads} apart from the width {spec.width}")
        _check_rope(block.rope, arch, refuse)
    return arch


def _check_rope(rope: Rope, arch: str, refuse: Any) -> None:
    kinds = ("default", "linear", "yarn") + (("llama3",) if arch == "llama" else ())
    if rope.kind not in kinds:
        raise refuse(f"rope type {rope.kind!r} (supported: {', '.join(kinds)})")
    rule = dict(rope.rule)
    if rope.kind != "yarn":
        return
    # llama.cpp's own: 1 + 0.1 log(factor), and channels by whole numbers.
    if not rule.get("truncate", True):
        raise refuse("yarn with truncate=false")
    factor, standard = RULES["yarn"](rope, None, **rule)[1], 1 + 0.1 * math.log(max(rule["factor"], 1))
    if abs(factor - standard) > 1e-6:
        raise refuse(
            f"yarn with an attention factor of {factor:.4f} (the standard one for this rope is {standard:.4f})"
        )


def metadata(module: Any, arch: str) -> dict[str, Any]:
    """{NAME of GGUFWriter's method `add_NAME`: value}."""
    spec, block = module.spec, module.spec.segments[0].pattern[0]
    rule = dict(block.rope.rule)
    found = {
        "vocab_size": spec.vocab,
        "context_length": spec.positions,
        "embedding_length": spec.width,
        "block_count": spec.layers,
        "feed_forward_length": block.mlp,
        "head_count": block.heads,
        "head_count_kv": block.kv_heads,
        "key_length": block.head_dim,
        "value_length": block.head_dim,
        "layer_norm_rms_eps": block.eps,
        "rope_dimension_count": block.rope.dim,
        "rope_freq_base": block.rope.theta,
    }
    if block.rope.kind in ("linear", "yarn"):
        import gguf

        found["rope_scaling_type"] = gguf.RopeScalingType[block.rope.kind.upper()]
        found["rope_scaling_factor"] = float(rule["factor"])
    if block.rope.kind == "yarn":
        found["rope_scaling_orig_ctx_len"] = int(rule["original_max_position_embeddings"])
        for key in ("beta_fast", "beta_slow"):
            if rule.get(key):
                found[f"rope_scaling_yarn_{key}"] = float(rule[key])
    return found


def rope_factors(rope: Rope) -> np.ndarray:
    """The factors by which llama.cpp divides the plain frequencies, f32[dim/2]."""
    plain = RULES["default"](rope, None)[0]
    return (plain / RULES[rope.kind](rope, None, **dict(rope.rule))[0]).astype(np.float32)


def _rotated_heads(path: str, block: BlockSpec) -> int | None:
    """The number of heads in the rows of a tensor that rope rotates; None for other tensors."""
    return {"q_proj": block.heads, "k_proj": block.kv_heads}.get(path.split("/")[-2])


def pairs_adjacent(array: np.ndarray, heads: int) -> np.ndarray:
    """Reorder the rows of [heads * C, ...] so that each rotated pair is adjacent: HF keeps heads in halves."""
    return array.reshape(heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


# --------------------------------------------------------------------------------------------------------- tokenizers


def read_tokenizer(folder: Path, vocab: int, chat_template: str | None = None) -> dict[str, Any]:
    """The tokenizer of a directory as {NAME of GGUFWriter's method `add_NAME`: value}; empty where there is none.

    Args:
        folder: an HF directory.
        vocab: rows of the model's embedding; unused tokens are added up to it.
        chat_template: Jinja text; default: the tokenizer's own.

    Raises:
        UserError: it is of a kind, or has a part, that GGUF cannot express.
    """
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        return {}
    from jaxtune.data.chat import without_date
    from jaxtune.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(str(folder))
    where, parsed = f"The tokenizer in {folder}", json.loads(tokenizer.backend_tokenizer.to_str())
    model, cuts = parsed["model"], _parts(parsed["pre_tokenizer"], "pretokenizers")
    tokens: dict[int, str] = {i: token for token, i in tokenizer.get_vocab().items()}
    if max(tokens) >= vocab:
        raise UserError(f"{where} has ids up to {max(tokens)}, the model's table only {vocab} rows.")
    if model["type"] != "BPE":
        raise UserError(f"{where} is of type {model['type']}; GGUF files are written with BPE tokenizers only.")
    for field in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(field):
            raise UserError(f"{where} has {field}={model[field]!r}, which GGUF cannot express.")
    merges = [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model["merges"]]
    types = dict.fromkeys(tokens, _NORMAL)
    for added in parsed["added_tokens"]:
        types[added["id"]] = _CONTROL if added["special"] else _USER_DEFINED
    if any(part["type"] == "ByteLevel" for part in cuts):
        found = {"tokenizer_model": "gpt2", "tokenizer_pre": _cut_name(parsed, cuts, where)}
        found["token_merges"] = [" ".join(pair) for pair in merges]
    else:
        found = {"tokenizer_model": "llama", "tokenizer_pre": "default"}
        found["add_space_prefix"] = _space_prefix(parsed, cuts, where)
        scores = _scores(merges, model["vocab"], where)
        found["token_scores"] = [scores.get(tokens.get(i), 0.0) for i in range(vocab)]
        types |= {i: _BYTE for i, t in tokens.items() if len(t) == 6 and t.startswith("<0x") and t.endswith(">")}
        if tokenizer.unk_token_id is not None:
            types[tokenizer.unk_token_id] = _UNKNOWN
    if (
        model.get("ignore_merges") and found["tokenizer_pre"] != "llama-bpe"
    ):  # llama.cpp ignores merges for that name only
        raise UserError(f"{where} has ignore_merges=True, which GGUF's {found['tokenizer_pre']!r} does not do.")
    found["token_list"] = [tokens.get(i, f"[PAD{i}]") for i in range(vocab)]
    found["token_types"] = [types.get(i, _UNUSED) for i in range(vocab)]
    for key in ("bos", "eos", "unk", "pad"):
        if (number := getattr(tokenizer, f"{key}_token_id")) is not None:
            found[f"{key}_token_id"] = number
    around = tokenizer("a").input_ids
    found["add_bos_token"] = tokenizer.bos_token_id is not None and around[0] == tokenizer.bos_token_id
    found["add_eos_token"] = tokenizer.eos_token_id is not None and around[-1] == tokenizer.eos_token_id
    template = chat_template or tokenizer.chat_template
    if isinstance(template, str):
        template = without_date(template)
    if isinstance(template, Mapping):
        template = [{"name": name, "template": text} for name, text in template.items()]
    return found | ({"chat_template": template} if template else {})


def _parts(parsed: dict | None, inside: str) -> list[dict]:
    """The parts of a normalizer or pre-tokenizer, which may be one, several in a sequence, or absent."""
    return [] if parsed is None else parsed[inside] if parsed["type"] == "Sequence" else [parsed]


def _cut_name(parsed: dict, cuts: list[dict], where: str) -> str:
    """llama.cpp's name for the rule by which a byte-level tokenizer splits text into words."""
    normal = [
        part for part in _parts(parsed["normalizer"], "normalizers") if part["type"] != "NFC"
    ]  # as all Qwen files
    *splits, last = cuts
    if normal or last["type"] != "ByteLevel" or last["add_prefix_space"] or len(splits) > 1:
        raise UserError(f"{where} changes or cuts text in a way that GGUF has no name for: {normal or cuts}.")
    key = None
    if splits:
        key = (splits[0].get("behavior", "").lower(), splits[0].get("pattern", {}).get("Regex"))
    if key not in _CUTS or last["use_regex"] != (key is None):
        raise UserError(
            f"{where} cuts text into words by a rule that llama.cpp has no name for: {cuts}. "
            f"Known: {', '.join(_CUTS.values())}."
        )
    return _CUTS[key]


def _space_prefix(parsed: dict, cuts: list[dict], where: str) -> bool:
    """Whether a SentencePiece-like tokenizer puts a space before the text."""
    normal = _parts(parsed["normalizer"], "normalizers")
    replaces = any(p["type"] == "Replace" and p.get("content") == _SPACE for p in normal)
    spaces = [p for p in cuts if p["type"] == "Metaspace"]
    odd = [p for p in normal if p["type"] not in ("Prepend", "Replace")] + [p for p in cuts if p["type"] != "Metaspace"]
    if odd or not (replaces or spaces) or not parsed["model"].get("byte_fallback"):
        raise UserError(
            f"{where} is neither byte-level nor like SentencePiece (spaces as {_SPACE!r}, bytes for the unknown): "
            f"{odd or parsed['model']['type']}. GGUF has no name for it."
        )
    return any(p["type"] == "Prepend" for p in normal) or any(p.get("prepend_scheme") != "never" for p in spaces)


def _scores(merges: list[tuple[str, str]], vocab: dict[str, int], where: str) -> dict[str, float]:
    """{token: score} such that merging the pair with the best-scored result follows the order of `merges`.

    Raises:
        UserError: no scores of tokens give that order.
    """
    scores: dict[str, float] = {}
    for a, b in merges:
        scores.setdefault(a + b, -float(len(scores)))
    made = [scores[a + b] for a, b in merges]
    known = set(merges)
    pairs = ((t[:i], t[i:]) for t in scores for i in range(1, len(t)))
    lost = next((p for p in pairs if p[0] in vocab and p[1] in vocab and p not in known), None)
    if lost or made != sorted(made, reverse=True):
        why = f"the pair {lost} makes a token but is not among the merges" if lost else "merges of one token lie apart"
        raise UserError(f"{where}: GGUF orders merges by scores of tokens, and this order is none: {why}.")
    lowest = -float(len(scores))
    return {token: scores.get(token, lowest) for token in vocab}
