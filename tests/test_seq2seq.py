"""Encoder-decoders against live transformers and peft."""

import copy
import functools
import json
from typing import Any

import jax
import numpy as np
import pytest
import zoo

from jaxtune import models
from jaxtune.errors import UserError
from jaxtune.hf.export import export_model
from jaxtune.hf.load import load
from jaxtune.hf.peft import export_adapter, load_adapter
from jaxtune.infer.continuations import scorer, sharing_pays
from jaxtune.infer.generation import generate
from jaxtune.methods.adapters import lora, untie
from jaxtune.methods.table import places
from jaxtune.methods.vocabulary import resize
from jaxtune.models.spec import Relative
from jaxtune.tree import TRAIN, combine, flatten, partition

pytestmark = pytest.mark.filterwarnings("ignore")  # peft warns of what it corrects by itself

TOLERANCE = 1e-4  # of the largest logit; never to be relaxed
T5 = {
    **{"vocab_size": 96, "d_model": 32, "d_kv": 12, "d_ff": 48, "num_layers": 3, "num_heads": 4},
    **{"relative_attention_num_buckets": 12, "relative_attention_max_distance": 20, "decoder_start_token_id": 0},
}
BART = {
    **{"vocab_size": 96, "d_model": 32, "max_position_embeddings": 64, "pad_token_id": 1, "eos_token_id": 2},
    **{f"{part}_{name}": n for part in ("encoder", "decoder") for name, n in {"layers": 2, "ffn_dim": 48}.items()},
    **{"encoder_attention_heads": 4, "decoder_attention_heads": 4, "decoder_start_token_id": 0},
    **{"forced_eos_token_id": None, "forced_bos_token_id": None},
}
ZOO: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("t5", T5),
    "t5-gated-untied": ("t5", T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "t5-uneven": (
        "t5",
        T5 | {"num_heads": 3, "d_kv": 16, "num_decoder_layers": 2, "feed_forward_proj": "gated-silu"},
    ),
    "mt5": ("mt5", T5),
    "mt5-relu": ("mt5", T5 | {"feed_forward_proj": "relu", "num_heads": 5, "num_decoder_layers": 4}),
    "bart": ("bart", BART),
    "bart-scaled": ("bart", BART | {"scale_embedding": True, "decoder_attention_heads": 2, "decoder_layers": 1}),
    "bart-relu": ("bart", BART | {"activation_function": "relu", "encoder_layers": 1, "encoder_ffn_dim": 40}),
    "mbart": ("mbart", BART),
    "mbart-scaled": ("mbart", BART | {"scale_embedding": True, "encoder_attention_heads": 1, "decoder_layers": 3}),
    "mbart-relu": ("mbart", BART | {"activation_function": "relu", "encoder_layers": 3, "decoder_ffn_dim": 24}),
    "mt5-far": ("mt5", T5 | {"d_kv": 4, "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128}),
}
FIRST = ("t5", "mt5", "bart", "mbart")
slow = functools.partial(pytest.param, marks=pytest.mark.slow)
every = pytest.mark.parametrize("name", [name if name in FIRST else slow(name) for name in ZOO])


@functools.cache
def theirs(name: str) -> Any:
    """A model in torch, with every term large enough to matter."""
    import torch
    from transformers import AutoConfig, AutoModelForSeq2SeqLM

    family, values = ZOO[name]
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **values)
    with torch.no_grad():
        model = AutoModelForSeq2SeqLM.from_config(config, attn_implementation="eager").float().eval()
        for parameter, p in model.named_parameters():
            if p.ndim < 2:
                p += 0.3 * torch.randn_like(p)
            elif "embed" in parameter:
                p.copy_(torch.randn_like(p))
            elif "bias" in parameter:
                p.copy_(2 * torch.randn_like(p))
            elif "shared" not in parameter and "lm_head" not in parameter:
                # T5's scores are not scaled, so queries are smaller by what other families divide them by.
                p.copy_(torch.randn_like(p) * (0.3 if parameter.endswith(".q.weight") else 1.2) / p.shape[1] ** 0.5)
        for name, buffer in model.named_buffers():
            if name == "final_logits_bias":
                buffer += torch.randn_like(buffer)
    return model


@functools.cache
def folder(name: str) -> Any:
    path = zoo.scratch() / name
    theirs(name).save_pretrained(path)
    return path


ours = functools.cache(lambda name: load(folder(name)))


def rows() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(source i32[3, 26], its mask, target i32[3, 23]); the second and third source are padded."""
    draw = np.random.default_rng(0)
    source, target = draw.integers(2, 96, (3, 26)), draw.integers(2, 96, (3, 23))
    mask = (np.arange(26) < np.array([26, 19, 1])[:, None]).astype(np.int32)
    target[:, 0] = 0
    return (source * mask).astype(np.int32), mask, target.astype(np.int32)


@functools.partial(jax.jit, static_argnums=0)
def logits(module, params, tokens, source):
    return module.apply({"params": params}, tokens, source=source)


def torch_logits(model: Any) -> np.ndarray:
    import torch

    source, mask, target = (torch.tensor(x, dtype=torch.long) for x in rows())
    with torch.no_grad():
        return model(input_ids=source, attention_mask=mask, decoder_input_ids=target).logits.numpy()


@pytest.mark.parity("logits")
@every
def test_logits_are_those_of_transformers(name):
    module, params = ours(name)
    source, mask, target = rows()
    found, expected = np.asarray(logits(module, params, target, (source, mask))), torch_logits(theirs(name))
    assert zoo.apart(found, expected) < TOLERANCE


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("buckets", "distance"), [(32, 128), (12, 20), (8, 64), (5, 9)])
def test_distances_fall_into_the_buckets_of_transformers(causal, buckets, distance):
    import torch
    from transformers.models.t5.modeling_t5 import T5Attention

    ahead = torch.arange(-distance, distance + 1)
    expected = T5Attention._relative_position_bucket(ahead, not causal, buckets, distance)
    assert np.array_equal(Relative(buckets, distance).of(causal), expected.numpy())


def test_new_tokens_of_bart_and_its_bias_of_logits():
    """The bias is a buffer in transformers, which grows by zeros and which peft's `bias` leaves."""
    module, params = ours("bart")
    source, mask, target = rows()
    before = np.asarray(logits(module, params, target, (source, mask)))
    wider, grown = resize(module, params, module.spec.vocab + 3)
    after = np.asarray(logits(wider, grown, target, (source, mask)))
    assert after.shape[-1] == 99 and zoo.apart(after[..., :96], before) < 1e-6
    _, trained = lora(params, jax.random.key(0), module=module, bias="all", r=2)
    roles = flatten(trained)
    assert roles["logits_bias/bias"] is not TRAIN and roles["segment_0/block_0/mlp/up_proj/bias"] is TRAIN
    pairs = [([5] * 40, [6, 7]), ([5] * 40, [8])]  # a source that two targets share
    assert not sharing_pays(module, params, pairs) and len(scorer(module, params, pairs)[0]) >= 1
    with pytest.raises(UserError, match="without its output head"):
        module.without_head()


@pytest.mark.parity("load")
@every
def test_every_tensor_of_a_checkpoint_has_its_place(name):
    from safetensors.numpy import load_file

    module, params = ours(name)
    stored = load_file(folder(name) / "model.safetensors")
    shared = {f"{prefix}{part}.embed_tokens.weight" for prefix in ("", "model.") for part in ("encoder", "decoder")}
    shared |= {"lm_head.weight"}
    assert {t.hf for t in models.names(module).tensors(module.spec, set(flatten(params)))} | shared == set(
        stored
    ) | shared


@pytest.mark.parity("generate")
@every
def test_greedy_answers_are_those_of_transformers(name):
    """Sources of unequal lengths in one batch, token for token."""
    import torch

    module, params = ours(name)
    source, mask, _ = rows()
    # With a cache transformers has as many slots as encoder layers, and fails where the decoder has more.
    given = {"max_new_tokens": 32, "do_sample": False, "eos_token_id": None, "use_cache": name != "mt5-relu"}
    tokens, seen = (torch.tensor(x, dtype=torch.long) for x in (source, mask))
    expected = theirs(name).generate(input_ids=tokens, attention_mask=seen, **given)[:, 1:].tolist()
    prompts = [row[: int(n)].tolist() for row, n in zip(source, mask.sum(1), strict=True)]
    assert generate(module, params, prompts, max_new_tokens=32) == expected


# --- adapters


@functools.cache
def adapter(name: str) -> Any:
    """(its directory, its logits, the gradients of its factors by peft's names) of a LoRA that live peft made."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    settings = {"task_type": "SEQ_2_SEQ_LM", "r": 2, "lora_alpha": 3, "target_modules": "all-linear"}
    model = get_peft_model(copy.deepcopy(theirs(name)), LoraConfig(**settings)).eval()
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    for p in trained.values():
        p.data += 0.1 * torch.randn_like(p)
    model.peft_config["default"].base_model_name_or_path = str(folder(name))
    path = zoo.scratch() / f"{name}-adapter"
    model.save_pretrained(path)
    source, mask, target = (torch.tensor(x, dtype=torch.long) for x in rows())
    model.double()  # in float32 their own rounding moves a gradient by more than the tolerance
    found = model(input_ids=source, attention_mask=mask, decoder_input_ids=target).logits
    (found * torch.tensor(slope(found.shape))).sum().backward()
    return path, found.detach().numpy(), {key: p.grad.numpy() for key, p in trained.items()}


def slope(shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


@functools.partial(jax.jit, static_argnums=0)
def logits_and_gradient(module, parts, tokens, source):
    def of(trainable):
        found = module.apply({"params": combine(trainable, parts.member, parts.frozen)}, tokens, source=source)
        return (found * slope(found.shape)).sum(), found

    gradient, found = jax.grad(of, has_aux=True)(parts.trainable)
    return found, gradient


@functools.cache
def adapted(name: str) -> Any:
    module, params = ours(name)
    return load_adapter(module, params, adapter(name)[0], base=folder(name))


def run(name: str, params: Any) -> Any:
    source, mask, target = rows()
    return logits_and_gradient(ours(name)[0], partition(params, adapted(name)[1]), target, (source, mask))


@pytest.mark.parity("adapter in", "LoRA gradients")
@every
def test_an_adapter_of_peft_gives_its_logits_and_gradients(name):
    module, _ = ours(name)
    params, _, _ = adapted(name)
    _, expected, slopes = adapter(name)
    found, gradient = run(name, params)
    assert zoo.apart(found, expected) < TOLERANCE
    assert zoo.apart(torch_logits(theirs(name)), expected) > 0.01  # the adapter matters
    gradient = {path: leaf for path, leaf in flatten(gradient).items() if leaf is not None}
    seen = 0
    for place in places(params, module):
        for field, key in (("a", "lora_A"), ("b", "lora_B")):
            own = slopes.get(f"base_model.model.{place.name}.{key}.default.weight")
            if own is not None:
                seen += 1
                assert zoo.apart(gradient[f"{place.path}/{field}"][place.index].T, own) < 1e-5
    assert seen == len(slopes) > 0


def moved(name: str) -> Any:
    """As training would: everything trained is another number."""
    params, mask, _ = adapted(name)
    parts = partition(params, mask)
    return combine(jax.tree.map(lambda x: 1.1 * x, parts.trainable), parts.member, parts.frozen)


@pytest.mark.parity("adapter out")
@every
def test_an_adapter_is_written_as_it_was_and_peft_gives_our_logits(name, tmp_path):
    from peft import PeftModel, PeftModelForSeq2SeqLM
    from safetensors.numpy import load_file

    module, _ = ours(name)
    params, mask, config = adapted(name)
    where = {"base": folder(name), "config": config, "mask": mask}
    export_adapter(module, params, tmp_path / "again", **where)
    before, after = (load_file(f / "adapter_model.safetensors") for f in (adapter(name)[0], tmp_path / "again"))
    assert before.keys() == after.keys() and all(np.array_equal(before[key], after[key]) for key in before)
    before, after = (
        json.loads((f / "adapter_config.json").read_text()) for f in (adapter(name)[0], tmp_path / "again")
    )
    assert before == after and after["task_type"] == "SEQ_2_SEQ_LM"
    export_adapter(module, moved(name), tmp_path / "moved", base=folder(name), mask=mask)
    again = PeftModel.from_pretrained(copy.deepcopy(theirs(name)), str(tmp_path / "moved")).eval()
    assert isinstance(again, PeftModelForSeq2SeqLM)
    assert zoo.apart(torch_logits(again), run(name, moved(name))[0]) < TOLERANCE


@pytest.mark.parity("full export")
@every
@pytest.mark.parametrize("head", ["as it was", "trained"])
def test_a_merged_model_gives_our_logits_in_transformers(name, head, tmp_path):
    """Also with a head that was tied and is now a matrix of its own, as the method `head` leaves it."""
    from transformers import AutoModelForSeq2SeqLM

    module, params = ours(name)[0], moved(name)
    if head == "trained":
        params = untie(params)
        kernel = params["lm_head"]["kernel"]
        params = params | {"lm_head": {"kernel": kernel + 0.1 * slope(kernel.shape)}}
    export_model(module, params, tmp_path / "out", base=folder(name))
    model, info = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    source, mask, target = rows()
    expected = np.asarray(logits(module, params, target, (source, mask)))
    assert zoo.apart(torch_logits(model.eval()), expected) < TOLERANCE
    again, tree = load(tmp_path / "out")
    assert zoo.apart(np.asarray(logits(again, tree, target, (source, mask))), expected) < TOLERANCE
