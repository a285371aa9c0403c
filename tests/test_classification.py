"""Label heads, losses, metrics and whole runs of classification, against live transformers."""

import dataclasses
import functools
import json
import warnings

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_encoders
import zoo

from jaxtune import config
from jaxtune.config.recipe import open_model
from jaxtune.hf.export import export_model
from jaxtune.hf.load import load, read_params
from jaxtune.hf.peft import export_adapter, load_adapter
from jaxtune.methods.table import METHODS, head
from jaxtune.models import names
from jaxtune.models.classifier import SEQUENCE, TOKEN, Labels, pool, with_labels
from jaxtune.objectives.classification import classification, entity_counts, entity_tables, metrics
from jaxtune.tree import TRAIN, flatten

TOLERANCE = 1e-4
NAMES = ("cold", "cool", "warm")
ENCODERS = {name: test_encoders.ZOO[name] for name in ("bert", "roberta", "distilbert", "modernbert")}
ENCODERS |= {name: test_encoders.ZOO[name] for name in ("xlm-roberta", "camembert", "electra")}
ENCODERS |= {
    "modernbert-mean": (
        "modernbert",
        ENCODERS["modernbert"][1]
        | {"classifier_pooling": "mean", "classifier_bias": True, "norm_bias": True, "classifier_activation": "relu"},
    )
}
DECODERS = {
    "llama": ("llama", zoo.LLAMA | {"pad_token_id": 0}),
    "gpt2": ("gpt2", zoo.GPT2 | {"pad_token_id": 0}),
    "gpt_neox": ("gpt_neox", zoo.ZOO["gpt_neox"][1] | {"pad_token_id": 0}),
    "qwen3-tied": ("qwen3", zoo.LLAMA | {"pad_token_id": 0, "tie_word_embeddings": True, "head_dim": 8}),
}
ALIKE = ("arcee", "exaone4", "helium", "glm", "glm4", "gptj", "ministral3", "olmo3", "opt", "phi", "seed_oss")
DECODERS |= {name: (zoo.ZOO[name][0], zoo.ZOO[name][1] | {"pad_token_id": 0}) for name in ALIKE}
MODELS = ENCODERS | DECODERS
WITHOUT_TOKENS = ("gptj", "olmo3", "opt")  # transformers has no class of theirs for a label each token


@functools.cache
def torch_model(name, kind, problem=None):
    import torch
    import transformers

    family, values = MODELS[name]
    config = transformers.AutoConfig.for_model(family, **values)
    config.id2label = dict(enumerate(NAMES))
    config.label2id = {n: i for i, n in enumerate(NAMES)}
    config.problem_type = problem
    torch.manual_seed(0)
    auto = getattr(transformers, f"AutoModelFor{kind}")
    return test_encoders.enlarge(auto.from_config(config, attn_implementation="eager").float().eval())


@functools.cache
def directory(name, kind, problem=None):
    folder = zoo.scratch() / name
    torch_model(name, kind, problem).save_pretrained(folder)
    return folder


def torch_logits(model):
    import torch

    ids, there = test_encoders.rows()
    padded = torch.tensor(np.where(there, ids, model.config.pad_token_id), dtype=torch.long)
    with torch.no_grad():
        return model(padded, attention_mask=torch.tensor(there)).logits.numpy()


@functools.partial(jax.jit, static_argnums=0)
def _logits(module, params, ids, segments):
    return module.apply({"params": params}, ids, segments=segments)


def logits(module, params):
    ids, there = test_encoders.rows()
    return np.asarray(_logits(module, params, np.where(there, ids, 5), there.astype(np.int32)))


def assert_equal(got, want):
    """Logits agree, of tokens those that are there."""
    there = test_encoders.rows()[1][..., None] if got.ndim == 3 else 1
    assert zoo.apart(got * there, want * there) < TOLERANCE


LAYOUTS = [
    pytest.param(
        name, kind, marks=() if (name, kind) in {("bert", SEQUENCE), ("llama", SEQUENCE)} else pytest.mark.slow
    )
    for name in MODELS
    for kind in (SEQUENCE, TOKEN)
    if kind == SEQUENCE or name not in WITHOUT_TOKENS
]


@pytest.mark.parametrize(("name", "kind"), LAYOUTS)
def test_their_model_gives_our_logits_and_ours_theirs(name, kind, tmp_path):
    import transformers

    module, params = load(directory(name, kind))
    assert module.labels.names == NAMES
    assert_equal(logits(module, params), torch_logits(torch_model(name, kind)))

    changed = jax.tree.map(lambda x: x * 1.1, params)
    export_model(module, changed, tmp_path / "out", base=directory(name, kind))
    auto = getattr(transformers, f"AutoModelFor{kind}")
    again, info = auto.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert again.config.id2label == dict(enumerate(NAMES))
    assert_equal(logits(module, changed), torch_logits(again.eval()))


# --- losses


def bert(kind, problem=None):
    """BERT's oracle and ours, with the same weights."""
    return torch_model("bert", kind, problem), *load(directory("bert", kind, problem))


def batch_of(**more):
    ids, there = test_encoders.rows()
    ids = np.where(there, ids, 0).astype(np.int32)
    positions = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)
    batch = {"tokens": ids, "positions": positions, "segments": there.astype(np.int32)}
    return batch | {"row": np.arange(len(ids), dtype=np.int32), "weights": np.ones(len(ids), np.float32)} | more


LABELS = {
    "single_label_classification": np.array([[2], [0], [1]], np.float32),
    "multi_label_classification": np.array([[1, 0, 1], [0, 0, 0], [0, 1, 1]], np.float32),
    "regression": np.array([[0.5, 1.0, -2.0], [3.0, 0.0, 0.25], [-1.0, 2.0, 0.0]], np.float32),
}


def torch_loss(model, labels, backward=False):
    import torch

    batch = batch_of()
    ids, there = (torch.tensor(batch[k], dtype=torch.long) for k in ("tokens", "segments"))
    loss = model(ids, attention_mask=there, labels=labels).loss
    if backward:
        loss.backward()
    return float(loss.detach())


def test_pairs_of_texts_give_their_logits():
    """Token types change what BERT says."""
    import torch

    model = torch_model("bert", SEQUENCE)
    module, params = load(directory("bert", SEQUENCE))
    ids, there = test_encoders.rows()
    types = ((np.arange(ids.shape[1]) > 2) & there).astype(np.int32)
    with torch.no_grad():
        want = model(
            torch.tensor(np.where(there, ids, model.config.pad_token_id), dtype=torch.long),
            attention_mask=torch.tensor(there),
            token_type_ids=torch.tensor(types, dtype=torch.long),
        ).logits.numpy()
    segments = there.astype(np.int32)
    apply = jax.jit(lambda params, types: module.apply({"params": params}, ids, segments=segments, types=types))
    assert zoo.apart(np.asarray(apply(params, types)), want) < TOLERANCE
    assert zoo.apart(np.asarray(apply(params, 0 * types)), want) > 0.01


@pytest.mark.parametrize("problem", LABELS)
def test_losses_equal_transformers(problem):
    import torch

    model, module, params = bert(SEQUENCE, problem)
    label = LABELS[problem]
    theirs = torch.tensor(label[:, 0], dtype=torch.long) if problem.startswith("single") else torch.tensor(label)
    (total, weight), _ = jax.jit(classification(module))(params, batch_of(label=label), None)
    assert float(total / weight) == pytest.approx(torch_loss(model, theirs), rel=1e-4)


def test_the_loss_and_gradients_of_tokens_equal_transformers():
    import torch

    model, module, params = bert(TOKEN)
    rng = np.random.default_rng(0)
    there = test_encoders.rows()[1]
    weights = (there & (rng.random(there.shape) < 0.6)).astype(np.float32)
    targets = rng.integers(0, 3, there.shape).astype(np.int32)
    batch = batch_of(targets=targets, weights=weights)
    want = torch_loss(model, torch.tensor(np.where(weights > 0, targets, -100), dtype=torch.long), backward=True)
    loss = jax.jit(jax.value_and_grad(lambda p: (lambda s: s[0] / s[1])(classification(module)(p, batch, None)[0])))
    got, grads = loss(params)
    assert float(got) == pytest.approx(want, rel=1e-4)
    theirs = {name: p.grad.numpy() for name, p in model.named_parameters()}
    model.zero_grad()
    leaves = flatten(grads)
    largest = max(np.abs(g).max() for g in theirs.values())
    for t in names(module).tensors(module.spec, set(leaves)):
        mine = np.asarray(leaves[t.path] if t.index is None else leaves[t.path][t.index])
        assert np.abs((mine.T if t.transpose else mine) - theirs[t.hf]).max() < 1e-4 * largest, t.hf


def test_class_weights_are_torchs():
    import torch

    model, module, params = bert(SEQUENCE, "single_label_classification")
    logits_ = torch.tensor(torch_logits(model))
    weights = (0.5, 2.0, 3.0)
    want = torch.nn.CrossEntropyLoss(weight=torch.tensor(weights))(logits_, torch.tensor([2, 0, 1]))
    batch = batch_of(label=LABELS["single_label_classification"])
    (total, weight), _ = jax.jit(classification(module, weights))(params, batch, None)
    assert float(total / weight) == pytest.approx(float(want), rel=1e-4)

    model, module, params = bert(SEQUENCE, "multi_label_classification")
    want = torch.nn.BCEWithLogitsLoss(pos_weight=torch.tensor(weights))(
        torch.tensor(torch_logits(model)), torch.tensor(LABELS["multi_label_classification"])
    )
    batch = batch_of(label=LABELS["multi_label_classification"])
    (total, weight), _ = jax.jit(classification(module, weights))(params, batch, None)
    assert float(total / weight) == pytest.approx(float(want), rel=1e-4)


@pytest.mark.parametrize("how", ["cls", "mean", "last"])
def test_pooling(how):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, 3)), jnp.float32)
    segments = jnp.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    want = {"cls": x[:, 0], "mean": jnp.stack([x[0, :3].mean(0), x[1].mean(0)]), "last": jnp.stack([x[0, 2], x[1, 4]])}
    assert zoo.apart(pool(x, segments, how), want[how]) < 1e-6


def test_a_pooling_that_transformers_has_not_is_kept_and_told(tmp_path):
    labels = Labels(SEQUENCE, NAMES, pooling="mean", drawn=True)
    module = with_labels(load(test_encoders.directory("bert"))[0], labels)
    params = read_params(module, test_encoders.directory("bert"), key=jax.random.key(0))
    notes = export_model(module, params, tmp_path / "out", base=test_encoders.directory("bert"))
    assert any("pools by 'mean'" in note for note in notes)
    again, reread = load(tmp_path / "out")
    assert again.pooling == "mean"
    assert np.array_equal(logits(again, reread), logits(module, params))
    by_cls = dataclasses.replace(again, labels=Labels(SEQUENCE, NAMES))
    assert zoo.apart(logits(by_cls, params), logits(again, params)) > 1e-3

    flags = {"model.path": tmp_path / "out", "data.train": "rows.jsonl", "objective.name": "sequence_classification"}
    cfg = config.resolve(flags={path: str(value) for path, value in flags.items()})
    assert open_model(cfg)[0].pooling == "mean"  # tuned further


def test_a_new_head_is_drawn_by_the_seed_and_a_pooler_is_kept():
    folder = test_encoders.directory("bert")
    module = with_labels(load(folder)[0], Labels(SEQUENCE, NAMES, drawn=True))
    a, b, c = (read_params(module, folder, key=jax.random.key(seed))["classifier"] for seed in (0, 0, 1))
    assert np.array_equal(a["out"]["kernel"], b["out"]["kernel"])
    assert not np.array_equal(a["out"]["kernel"], c["out"]["kernel"])
    pooler = test_encoders.torch_model("bert").pooler.dense.weight.detach().numpy()
    assert np.array_equal(a["dense"]["kernel"].T, pooler) and np.array_equal(c["dense"]["kernel"].T, pooler)


# --- metrics


def test_accuracy_and_macro_f1_are_scikit_learns():
    rng = np.random.default_rng(0)
    there, said = rng.integers(0, 4, (2, 60))  # of five labels, one is neither there nor said
    one = np.eye(5)
    counts = {
        "hits": (one[there] * one[said]).sum(0),
        "said": one[said].sum(0),
        "there": one[there].sum(0),
        "right": (there == said).sum(),
        "rows": 60,
    }
    f1 = []
    for c in range(4):
        tp = np.sum((there == c) & (said == c))
        precision, recall = tp / np.sum(said == c), tp / np.sum(there == c)
        f1.append(2 * precision * recall / (precision + recall))
    got = metrics(counts)
    assert got["eval/accuracy"] == pytest.approx(np.mean(there == said))
    assert got["eval/macro_f1"] == pytest.approx(np.mean(f1))


def entities(tags):
    """Spans by conlleval's words: a chunk ends before B, O, S or another type, and after E or S."""
    found, start = set(), None
    for i, tag in enumerate([*tags, "O"]):
        before = tags[i - 1] if i else "O"
        same = tag != "O" and before != "O" and tag[2:] == before[2:]
        goes_on = same and tag[0] in "IE" and before[0] in "BI"
        if start is not None and not goes_on:
            found.add((start, i - 1, before[2:]))
            start = None
        if tag != "O" and not goes_on:
            start = i
    return found


TAGS = ("O", "B-x", "I-x", "E-x", "S-x", "B-y", "I-y")


@hypothesis.given(
    st.lists(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6), st.booleans()), max_size=8), max_size=3)
)
@hypothesis.settings(max_examples=60, deadline=None)
def test_entities_are_conllevals(sentences):
    said, there, weights = np.zeros((3, 8), np.int32), np.zeros((3, 8), np.int32), np.zeros((3, 8), np.float32)
    want = np.zeros(3)
    for row, sentence in enumerate(sentences):
        for at, (a, b, counted) in enumerate(sentence):
            said[row, at], there[row, at], weights[row, at] = a, b, counted
        a, b = (entities([TAGS[pair[i]] for pair in sentence if pair[2]]) for i in (0, 1))
        want += [len(a & b), len(a), len(b)]
    got = _entities(said, there, weights)
    assert np.array_equal(got, want)


_entities = jax.jit(functools.partial(entity_counts, entity_tables(TAGS)))


def test_tags_that_are_no_entities():
    assert entity_tables(("NOUN", "VERB")) is None
    assert entity_tables(("O",)) is None


# --- methods and adapters


@functools.cache
def with_head(name="bert", kind=SEQUENCE):
    """A base without a label head, and a new one on it."""
    folder = test_encoders.directory(name) if name in ENCODERS else zoo.directory(name)
    module = with_labels(load(folder)[0], Labels(kind, NAMES, drawn=True))
    return folder, module, read_params(module, folder, key=jax.random.key(0))


def test_head_trains_the_label_head_alone():
    _, _, params = with_head()
    tuned, mask = head(params)
    trained = {path for path, role in flatten(mask).items() if role is TRAIN}
    assert trained == {f"classifier/{layer}/{leaf}" for layer in ("dense", "out") for leaf in ("kernel", "bias")}
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), params, tuned))


ADAPTED = [
    ("bert", SEQUENCE, "lora"),
    ("modernbert", TOKEN, "lora"),
    ("roberta", SEQUENCE, "lora"),
    ("distilbert", SEQUENCE, "lora"),
    ("llama", SEQUENCE, "lora"),
    ("bert", SEQUENCE, "ia3"),
    ("roberta", TOKEN, "ia3"),
    ("llama", SEQUENCE, "ia3"),
]


@pytest.mark.parametrize(
    ("name", "kind", "method"), [pytest.param(*m, marks=pytest.mark.slow if i else ()) for i, m in enumerate(ADAPTED)]
)
def test_an_adapter_with_its_label_head_gives_our_logits_in_peft(name, kind, method, tmp_path):
    import transformers
    from peft import PeftModel

    folder, module, params = with_head(name, kind)
    params, mask = METHODS[method](params, jax.random.key(1), module, {"r": 2} if method == "lora" else {})
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x, role: x + 0.2 * rng.standard_normal(x.shape).astype(np.float32) if role is TRAIN else x, params, mask
    )
    export_adapter(module, params, tmp_path / "adapter", base=folder, mask=mask)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["task_type"] == {SEQUENCE: "SEQ_CLS", TOKEN: "TOKEN_CLS"}[kind]
    auto = getattr(transformers, f"AutoModelFor{kind}")
    padding = {} if name in ENCODERS else {"pad_token_id": 0}
    base = auto.from_pretrained(folder, num_labels=len(NAMES), **padding)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)  # peft asks transformers by an old name
        theirs = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert_equal(logits(module, params), torch_logits(theirs))

    again, _, _ = load_adapter(module, with_head(name, kind)[2], tmp_path / "adapter", base=folder)
    assert np.array_equal(logits(module, again), logits(module, params))
