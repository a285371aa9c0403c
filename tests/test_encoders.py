"""Encoders against live transformers: hidden states, padding, names, and mutations that the tolerance must see."""

import copy
import dataclasses
import functools
import json
import os
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from safetensors.numpy import load_file, save_file

from jaxtune import models
from jaxtune.errors import UserError
from jaxtune.hf.export import export_model
from jaxtune.hf.load import load
from jaxtune.hf.peft import export_adapter, load_adapter
from jaxtune.methods.table import lora
from jaxtune.models.attention import attend_tokens
from jaxtune.models.spec import Segment
from jaxtune.tree import TRAIN, flatten

TOLERANCE = 1e-4  # of the largest hidden state; never to be relaxed
T = 24
BERT = {
    "vocab_size": zoo.VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
}
DISTILBERT = {
    "vocab_size": zoo.VOCAB,
    "dim": 32,
    "n_layers": 2,
    "n_heads": 4,
    "hidden_dim": 48,
    "max_position_embeddings": 40,
}
MODERNBERT = BERT | {"num_hidden_layers": 8, "local_attention": 10, "pad_token_id": 0}
MODERNBERT |= dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 2)
# name -> (model_type, config). Between them: every switch that a family's file reads.
ZOO = {
    "bert": ("bert", BERT | {"layer_norm_eps": 1e-3}),
    "bert-tanh-one-type": ("bert", BERT | {"hidden_act": "gelu_new", "type_vocab_size": 1, "num_attention_heads": 2}),
    "roberta": ("roberta", BERT | {"type_vocab_size": 1, "pad_token_id": 1}),
    "roberta-pad-3": ("roberta", BERT | {"pad_token_id": 3, "hidden_act": "relu", "num_attention_heads": 8}),
    "xlm-roberta": ("xlm-roberta", BERT | {"pad_token_id": 1, "layer_norm_eps": 1e-5}),
    "xlm-roberta-one-type": ("xlm-roberta", BERT | {"type_vocab_size": 1, "pad_token_id": 0, "num_attention_heads": 2}),
    "camembert": ("camembert", BERT | {"type_vocab_size": 1, "pad_token_id": 1}),
    "camembert-relu": ("camembert", BERT | {"pad_token_id": 2, "hidden_act": "relu", "num_attention_heads": 1}),
    "electra": ("electra", BERT | {"embedding_size": 20, "layer_norm_eps": 1e-3}),
    "electra-one-width": ("electra", BERT | {"embedding_size": 32, "type_vocab_size": 1, "num_attention_heads": 2}),
    "distilbert": ("distilbert", DISTILBERT),
    "distilbert-relu": ("distilbert", DISTILBERT | {"activation": "relu", "n_heads": 1, "n_layers": 3}),
    "modernbert": ("modernbert", MODERNBERT),
    "modernbert-biases": (
        "modernbert",
        MODERNBERT
        | {
            **{"num_hidden_layers": 3, "norm_bias": True, "attention_bias": True, "mlp_bias": True},
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
}


def enlarge(model):
    """As `zoo.build` does: every term large enough to matter."""
    import torch

    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim >= 2:
                p *= 1 if "embed" in name else 16
            else:
                p += 0.3 * torch.randn_like(p)
    return model


@functools.cache
def torch_model(name):
    import torch
    from transformers import AutoConfig, AutoModel

    family, values = ZOO[name]
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **copy.deepcopy(values))
    return enlarge(AutoModel.from_config(config, attn_implementation="eager").float().eval())


@functools.cache
def directory(name):
    folder = zoo.scratch() / name
    torch_model(name).save_pretrained(folder)
    return folder


@functools.cache
def ours(name):
    return load(directory(name))


@functools.cache
def rows():
    """Ids without any padding token, and which of them are there: two rows end in padding."""
    ids = np.random.default_rng(0).integers(4, zoo.VOCAB, (3, T), dtype=np.int32)
    there = np.arange(T) < np.array([T, T // 2, 3])[:, None]
    return ids, there


@functools.cache
def reference(name):
    import torch

    ids, there = rows()
    pad = ZOO[name][1].get("pad_token_id", 0)
    with torch.no_grad():
        padded = torch.tensor(np.where(there, ids, pad), dtype=torch.long)
        return (
            torch_model(name)(padded, attention_mask=torch.tensor(there)).last_hidden_state.numpy() * there[..., None]
        )


@functools.partial(jax.jit, static_argnums=0)
def hidden(module, params, ids, segments):
    return module.apply({"params": params}, ids, segments=segments)


def states(module, params):
    ids, there = rows()
    return np.asarray(hidden(module, params, np.where(there, ids, 5), there.astype(np.int32))) * there[..., None]


default = {"bert", "roberta", "electra", "distilbert", "modernbert"}
every_encoder = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in default else pytest.mark.slow) for n in ZOO]
)


@pytest.mark.parity("load", "logits")
@every_encoder
def test_hidden_states_equal_transformers_with_and_without_padding(name):
    got = states(*ours(name))
    for row, want in zip(got, reference(name)):
        assert zoo.apart(row, want) < TOLERANCE


def first_layers(module, params, count):
    """The model without what lies above its first layers: every layer a segment of its own."""
    segments, kept = [], {k: v for k, v in params.items() if not k.startswith("segment_")}
    for i, segment in enumerate(module.spec.segments):
        for at in range(segment.layers):
            repeat, j = divmod(at, len(segment.pattern))
            if len(segments) < count:
                block = jax.tree.map(lambda x, at=repeat: x[at : at + 1], params[f"segment_{i}"][f"block_{j}"])
                kept[f"segment_{len(segments)}"] = {"block_0": block}
                segments.append(Segment((segment.pattern[j],), 1))
    return module.clone(spec=dataclasses.replace(module.spec, segments=tuple(segments))), kept


@every_encoder
def test_every_hidden_state_equals_transformers(name):
    import torch

    model, (ids, _), (module, params) = torch_model(name), rows(), ours(name)
    norm = model.final_norm if module.spec.last_norm else lambda x: x
    with torch.no_grad():
        out = model(torch.tensor(ids, dtype=torch.long), output_hidden_states=True).hidden_states
        want = [norm(x).numpy() for x in out[:-1]] + [out[-1].numpy()]  # the last is normalised
    assert len(want) == module.spec.layers + 1
    for layer, state in enumerate(want):
        got = hidden(*first_layers(module, params, layer), ids, np.ones_like(ids))
        assert zoo.apart(got, state) < TOLERANCE, layer


def change(module, **changes):
    """The module with every block changed, and the fields of the spec where they exist there."""
    spec = module.spec
    segments = tuple(
        Segment(tuple(dataclasses.replace(b, **changes) for b in s.pattern), s.repeats) for s in spec.segments
    )
    top = {k: v for k, v in changes.items() if k in ("eps",)}
    return module.clone(spec=dataclasses.replace(spec, segments=segments, **top))


def zeroed(params, *parts):
    """Set the leaves whose paths hold one of `parts` to 0."""
    return jax.tree_util.tree_map_with_path(
        lambda p, x: jnp.zeros_like(x) if any(part in jax.tree_util.keystr(p) for part in parts) else x, params
    )


def windows(module, by):
    spec = module.spec
    segments = tuple(
        Segment(tuple(dataclasses.replace(b, window=b.window and b.window + by) for b in s.pattern), s.repeats)
        for s in spec.segments
    )
    return module.clone(spec=dataclasses.replace(spec, segments=segments))


def thetas(module, theta):
    """The theta of the local layers set to another."""
    segments = tuple(
        Segment(
            tuple(
                dataclasses.replace(b, rope=dataclasses.replace(b.rope, theta=theta)) if b.window else b
                for b in s.pattern
            ),
            s.repeats,
        )
        for s in module.spec.segments
    )
    return module.clone(spec=dataclasses.replace(module.spec, segments=segments))


MUTATIONS = {
    "causal": ("bert", lambda m, p: (change(m, causal=True), p)),
    "eps": ("bert", lambda m, p: (change(m, eps=1e-5), p)),
    "tanh gelu": ("bert", lambda m, p: (change(m, act="gelu_tanh"), p)),
    "pre-norm": ("distilbert", lambda m, p: (change(m, post_norm=False), p)),
    "no types": ("bert", lambda m, p: (m, zeroed(p, "embed_types"))),
    "no key bias would do nothing, no query bias": ("bert", lambda m, p: (m, zeroed(p, "q_proj']['bias"))),
    "no embedding norm bias": ("roberta", lambda m, p: (m, zeroed(p, "embed_norm']['bias"))),
    "first position": (
        "roberta",
        lambda m, p: (m.clone(spec=dataclasses.replace(m.spec, first_position=0, positions=40)), p),
    ),
    "no bias behind narrow embeddings": ("electra", lambda m, p: (m, zeroed(p, "embed_project']['bias"))),
    "window + 1": ("modernbert", lambda m, p: (windows(m, 1), p)),
    "window - 1": ("modernbert", lambda m, p: (windows(m, -1), p)),
    "local theta": ("modernbert", lambda m, p: (thetas(m, 160_000.0), p)),
    "act on the other half": ("modernbert", lambda m, p: (change(m, act="silu"), p)),
}


SLOW = ("window - 1", "act on the other half", "tanh gelu", "no embedding norm bias")


@pytest.mark.parametrize("mutation", [pytest.param(m, marks=pytest.mark.slow if m in SLOW else ()) for m in MUTATIONS])
def test_the_tolerance_sees_each_defect(mutation):
    name, mutate = MUTATIONS[mutation]
    assert zoo.apart(states(*mutate(*ours(name))), reference(name)) > 1.5 * TOLERANCE


def test_the_reference_sees_padding():
    """Attending to padding must be a visible defect."""
    ids, there = rows()
    module, params = ours("bert")
    blind = np.asarray(hidden(module, params, np.where(there, ids, 5), np.ones_like(ids))) * there[..., None]
    assert zoo.apart(blind, reference("bert")) > 1.5 * TOLERANCE


# --- attention in both directions


@pytest.mark.parametrize(
    ("form", "segmented", "window", "t"),
    [
        ("mapped", True, None, 100),  # two blocks of queries
        ("mapped", True, 5, 100),
        ("xla", True, 5, 9),
        *(pytest.param("mapped", s, w, 9, marks=pytest.mark.slow) for s in (False, True) for w in (None, 5)),
        *(pytest.param("xla", s, w, 100, marks=pytest.mark.slow) for s in (False, True) for w in (None, 5)),
    ],
)
def test_bidirectional_attention_and_its_gradient_equal_the_definition(form, segmented, window, t):
    rng = np.random.default_rng(0)
    q, k, v, g = (rng.standard_normal((2, t, h, 8)).astype(np.float32) for h in (4, 2, 2, 4))
    segments = (np.arange(t) > np.array([[t // 3], [t // 2]])).astype(np.int32) if segmented else None
    i = np.arange(t)
    seen = np.ones((2, t, t), bool) if window is None else (abs(i[:, None] - i) < window) & np.ones((2, 1, 1), bool)
    if segmented:
        seen = seen & (segments[:, :, None] == segments[:, None])

    def definition(q, k, v):
        scores = jnp.einsum("bthc,bshc->bhts", q, jnp.repeat(k, 2, axis=2), precision="highest") * 0.3
        scores = jnp.where(seen[:, None], scores, -jnp.inf)
        return jnp.einsum("bhts,bshc->bthc", jax.nn.softmax(scores), jnp.repeat(v, 2, axis=2), precision="highest")

    def form_of(q, k, v):
        return attend_tokens(q, k, v, segments=segments, scale=0.3, window=window, implementation=form, causal=False)

    want, pull = jax.vjp(definition, q, k, v)
    got, pull_got = jax.vjp(jax.jit(form_of), q, k, v)
    assert zoo.apart(got, want) < 1e-5
    for a, b in zip(pull_got(jnp.asarray(g)), pull(jnp.asarray(g))):
        assert zoo.apart(a, b) < 1e-5


# --- names


@every_encoder
def test_the_name_table_is_a_bijection_with_transformers_parameters(name):
    module, params = ours(name)
    paths = set(flatten(params))
    listed = list(models.names(module).tensors(module.spec, paths))
    prefix = models.names(module).prefix
    theirs = {prefix + n for n in torch_model(name).state_dict() if not n.startswith("pooler.")}
    assert [t.hf for t in listed] == list(dict.fromkeys(t.hf for t in listed)) and {t.hf for t in listed} == theirs
    assert len({(t.path, t.index) for t in listed}) == len(listed) and {t.path for t in listed} == paths


@every_encoder
def test_an_export_is_what_was_loaded(name, tmp_path):
    from transformers import AutoModel

    module, params = ours(name)
    export_model(module, params, tmp_path / "out", base=directory(name))
    again, prefix = load_file(tmp_path / "out" / "model.safetensors"), models.names(module).prefix
    for key, value in torch_model(name).state_dict().items():
        if not key.startswith("pooler."):
            assert np.array_equal(again.pop(prefix + key), value.numpy()), key
    assert not again
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    base = json.loads((directory(name) / "config.json").read_text())
    assert config == base
    AutoModel.from_pretrained(tmp_path / "out")


def test_old_names_and_the_heads_of_pretraining_are_understood(tmp_path):
    tensors = load_file(directory("bert") / "model.safetensors")
    old = {
        "bert." + k.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): v
        for k, v in tensors.items()
    }
    old |= {"cls.predictions.bias": np.zeros(zoo.VOCAB, np.float32)}
    (tmp_path / "config.json").write_text((directory("bert") / "config.json").read_text())
    save_file(old, tmp_path / "model.safetensors")
    _, params = load(tmp_path)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), params, ours("bert")[1]))

    save_file({k: v for k, v in old.items() if "layer.1.output.dense" not in k}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"missing +bert.encoder.layer.1.output.dense.weight"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("bert", {"hidden_act": "mish"}, "hidden_act='mish'"),
        ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key'"),
        ("bert", {"is_decoder": True}, "is_decoder=True"),
        ("modernbert", {"layer_types": ["chunked"] * 8}, "layer_types='chunked'"),
        ("modernbert", {"layer_types": ["full_attention"]}, "layer_types lists 1 layers"),
    ],
)
def test_what_is_not_supported_is_named(name, changes, said):
    config = json.loads((directory(name) / "config.json").read_text())
    with pytest.raises(UserError) as error:
        models.build(config | changes)
    assert said in str(error.value)


def test_a_config_of_transformers_4_is_the_same_model():
    """answerdotai/ModernBERT-base has no layer_types and no rope_parameters."""
    config = json.loads((directory("modernbert") / "config.json").read_text())
    old = {k: v for k, v in config.items() if k not in ("layer_types", "rope_parameters")}
    old |= {"global_attn_every_n_layers": 3, "global_rope_theta": 160000.0, "local_rope_theta": 10000.0}
    assert models.build(old).spec.segments == ours("modernbert")[0].spec.segments
    assert [s.repeats for s in models.build(old).spec.segments] == [1, 2, 1]


# --- images

VIT = {k: v for k, v in BERT.items() if k not in ("vocab_size", "max_position_embeddings")} | {
    "image_size": 16,
    "patch_size": 4,
    "layer_norm_eps": 1e-3,
}
IMAGES = {
    "vit": VIT | {"num_hidden_layers": 4},  # one gelu for another shows after some layers only
    "vit-oblong": VIT | {"image_size": [8, 16], "patch_size": [4, 2], "num_channels": 1, "num_attention_heads": 2},
    "vit-no-bias": VIT
    | {"qkv_bias": False, "hidden_act": "gelu_new", "num_hidden_layers": 3, "num_attention_heads": 1},
}


@functools.cache
def vit(name):
    """`(torch model, directory, module, params, pixels)`."""
    import torch
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(**IMAGES[name], id2label=dict(enumerate("abc")))
    config._attn_implementation = "eager"
    model, folder = enlarge(ViTForImageClassification(config).float().eval()), zoo.scratch() / name
    with torch.no_grad():
        model.vit.embeddings.patch_embeddings.projection.weight /= 4  # it is no embedding table, but of their size
    model.save_pretrained(folder)
    module, params = load(folder)
    shape = (3, module.spec.channels, *module.spec.image)
    return model, folder, module, params, np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@functools.partial(jax.jit, static_argnums=0)
def of_images(module, params, pixels):
    return module.apply({"params": params}, pixels)


def vit_logits(model, pixels):
    import torch

    with torch.no_grad():
        return model(torch.tensor(pixels)).logits.numpy()


@pytest.mark.parity("load", "logits")
@pytest.mark.parametrize("name", IMAGES)
def test_images_equal_transformers(name):
    """Logits, and every layer's hidden states: the body is cut above it."""
    import torch

    model, _, module, params, pixels = vit(name)
    assert zoo.apart(of_images(module, params, pixels), vit_logits(model, pixels)) < TOLERANCE
    with torch.no_grad():
        states = model.vit(torch.tensor(pixels), output_hidden_states=True).hidden_states
        want = [model.vit.layernorm(state).numpy() for state in states]
    assert len(want) == module.spec.layers + 1
    for layer, state in enumerate(want[:-1]):
        still = jax.tree_util.tree_map_with_path(
            lambda p, x, layer=layer: x.at[layer:].set(0) if p[-2].key in ("o_proj", "down_proj") else x, params
        )
        assert zoo.apart(of_images(module.body, still, pixels), state) < TOLERANCE, layer


def move_positions(m, p):
    """The class token's position given to the last patch."""
    return m, p | {"embed_positions": {"table": jnp.roll(p["embed_positions"]["table"], 1, axis=1)}}


def body(module, **changes):
    return dataclasses.replace(module, body=change(module.body, **changes))


VIT_MUTATIONS = {
    "eps": ("vit", lambda m, p: (body(m, eps=1e-5), p)),
    "tanh gelu": ("vit", lambda m, p: (body(m, act="gelu_tanh"), p)),
    "causal": ("vit", lambda m, p: (body(m, causal=True), p)),
    "post-norm": ("vit", lambda m, p: (body(m, post_norm=True), p)),
    "no class token": ("vit", lambda m, p: (m, zeroed(p, "embed_class"))),
    "no patch bias": ("vit", lambda m, p: (m, zeroed(p, "embed_patches']['bias"))),
    "positions": ("vit", move_positions),
    "no query bias": ("vit", lambda m, p: (m, zeroed(p, "q_proj']['bias"))),
}


@pytest.mark.parametrize("mutation", VIT_MUTATIONS)
def test_the_tolerance_sees_each_defect_in_images(mutation):
    name, mutate = VIT_MUTATIONS[mutation]
    model, _, module, params, pixels = vit(name)
    assert zoo.apart(of_images(*mutate(module, params), pixels), vit_logits(model, pixels)) > 1.5 * TOLERANCE


@pytest.mark.parity("full export")
@pytest.mark.parametrize("name", ["vit", "vit-oblong"])
def test_an_image_classifier_goes_out_as_it_came_in(name, tmp_path):
    from transformers import AutoModelForImageClassification

    model, folder, module, params, pixels = vit(name)
    changed = jax.tree.map(lambda x: x * 1.1, params)
    export_model(module, changed, tmp_path / "out", base=folder)
    again, info = AutoModelForImageClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert again.config.id2label == model.config.id2label
    assert zoo.apart(vit_logits(again.eval(), pixels), of_images(module, changed, pixels)) < TOLERANCE
    assert zoo.apart(vit_logits(again, pixels), vit_logits(model, pixels)) > 1e-2


def test_a_bare_image_encoder(tmp_path):
    """ViTModel has no head, no prefix, and a pooler that is passed over."""
    import torch
    from transformers import ViTModel

    torch.manual_seed(0)
    config = vit("vit")[0].config
    model = enlarge(ViTModel(config).float().eval())
    model.save_pretrained(tmp_path)
    module, params = load(tmp_path)
    pixels = vit("vit")[-1]
    with torch.no_grad():
        want = model(torch.tensor(pixels)).last_hidden_state.numpy()
    assert zoo.apart(of_images(module, params, pixels), want) < TOLERANCE


def test_images_of_another_shape_are_refused():
    _, _, module, params, pixels = vit("vit")
    with pytest.raises(UserError, match=r"takes images of shape \[B, 3, 16, 16\], this is \[3, 3, 8, 16\]"):
        module.apply({"params": params}, pixels[:, :, :8])
    with pytest.raises(UserError, match="takes images"):
        module.apply({"params": params}, np.zeros((2, 5), np.int32))


# --- a real encoder


def test_a_real_encoder_equals_transformers():
    folder = Path(os.environ.get("JAXTUNE_MINILM", "/nowhere"))
    if not (folder / "model.safetensors").is_file():
        pytest.skip("JAXTUNE_MINILM does not name the folder of all-MiniLM-L6-v2")
    import torch
    from transformers import AutoModel, AutoTokenizer

    encoded = AutoTokenizer.from_pretrained(folder)(["A card.", "How do I locate my new card?"], padding=True)
    ids, there = np.array(encoded["input_ids"], np.int32), np.array(encoded["attention_mask"], np.int32)
    with torch.no_grad():
        model = AutoModel.from_pretrained(folder)
        want = model(torch.tensor(ids), attention_mask=torch.tensor(there)).last_hidden_state.numpy()
    got = hidden(*load(folder), ids, there) * there[..., None]
    assert zoo.apart(got, want * there[..., None]) < TOLERANCE


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("targets", [["query", "dense"], ["q_proj", "fc1"]], ids=str)
def test_adapters_of_an_image_classifier_both_ways(targets, tmp_path):
    """transformers 5 has other names for ViT's modules than files and older adapters; either names a target."""
    import peft
    import torch

    model, folder, module, params, pixels = vit("vit")
    tuned, mask = lora(params, jax.random.key(0), module=module, target_modules=targets, r=2)
    rng = np.random.default_rng(0)
    tuned = jax.tree.map(
        lambda x, role: x + 0.1 * rng.standard_normal(x.shape).astype(np.float32) if role is TRAIN else x, tuned, mask
    )
    settings = {"target_modules": targets, "r": 2}
    export_adapter(module, tuned, tmp_path / "ours", base=folder, mask=mask, config=settings)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path / "ours")).eval()
    assert zoo.apart(vit_logits(theirs, pixels), of_images(module, tuned, pixels)) < TOLERANCE

    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=["q_proj", "fc2"], modules_to_save=["classifier"], r=2)
    theirs = peft.get_peft_model(copy.deepcopy(model), config).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p += 0.1 * torch.randn_like(p)
    theirs.save_pretrained(tmp_path / "theirs")
    loaded, _, _ = load_adapter(module, params, tmp_path / "theirs")
    assert zoo.apart(of_images(module, loaded, pixels), vit_logits(theirs, pixels)) < TOLERANCE

    # An adapter of transformers 4 has the old names in its keys, too.
    old = {}
    for key, value in load_file(tmp_path / "theirs/adapter_model.safetensors").items():
        key = re.sub(r"vit\.layers\.(\d+)\.attention\.q_proj", r"vit.encoder.layer.\1.attention.attention.query", key)
        old[re.sub(r"vit\.layers\.(\d+)\.mlp\.fc2", r"vit.encoder.layer.\1.output.dense", key)] = value
    save_file(old, tmp_path / "theirs/adapter_model.safetensors", metadata={"format": "pt"})
    file = tmp_path / "theirs/adapter_config.json"
    named = {"target_modules": ["query", "output.dense"], "exclude_modules": ["attention.output.dense"]}
    file.write_text(json.dumps(json.loads(file.read_text()) | named))
    again, _, _ = load_adapter(module, params, tmp_path / "theirs")
    jax.tree.map(np.testing.assert_array_equal, again, loaded)
