"""What a result's card and a run's last lines say is code: it is executed here, for every kind of result."""

import dataclasses
import json
import re
import shutil

import jax
import numpy as np
import pytest
import test_encoders
import zoo
from cards import run
from test_export import write_tokenizer
from test_peft_io import shake

import jaxtune
from jaxtune import config, models
from jaxtune.cli import main
from jaxtune.config.recipe import experiment
from jaxtune.errors import UserError
from jaxtune.hf import card, export
from jaxtune.hf import load as hf
from jaxtune.methods.table import tune
from jaxtune.models.classifier import PROBLEMS, SEQUENCE, TOKEN, Labels, with_labels
from jaxtune.tree import partition

TOKENS = np.random.default_rng(0).integers(4, 90, (2, 9), dtype=np.int32)
FACTS = {"steps": 3, "a | b": ["x", {"y": 0.5}]}
NAMES = ("ham", "spam's", 'a "third"')
NEW = [zoo.VOCAB, zoo.VOCAB + 1]  # tokens that "resized" results add to their bases
LORA = {"r": 2, "target_modules": "all-linear"}
# kind: (base, method, its settings, the labels of a new head); no method: the whole model is written.
RESULTS = {
    "lora": ("llama", "lora", LORA, None),
    "ia3": ("llama", "ia3", {}, None),
    "prompt": ("llama", "prompt_tuning", {"num_virtual_tokens": 2}, None),
    "whole": ("llama", None, {}, None),
    "sequence": ("bert", "lora", {"r": 2, "target_modules": ["query"]}, Labels(SEQUENCE, NAMES, drawn=True)),
    "several": ("distilbert", "lora", {"r": 2, "target_modules": ["q_lin"]},
                Labels(SEQUENCE, NAMES, PROBLEMS[1], drawn=True)),
    "value": ("roberta", "lora", {"r": 2, "target_modules": ["query"]},
              Labels(SEQUENCE, ("LABEL_0",), PROBLEMS[2], drawn=True)),
    "token": ("modernbert", "lora", {"r": 2, "target_modules": ["Wqkv"]}, Labels(TOKEN, NAMES, drawn=True)),
    "decoder": ("llama", "lora", LORA, Labels(SEQUENCE, NAMES, drawn=True)),
    "decoder, token": ("llama", "lora", LORA, Labels(TOKEN, NAMES, drawn=True)),
    "whole head": ("bert", None, {}, Labels(SEQUENCE, NAMES, drawn=True)),
    "bare": ("bert", "lora", {"r": 2, "target_modules": ["query"]}, None),
    "dora": ("llama", "lora", LORA | {"use_dora": True, "use_rslora": True, "lora_alpha": 4}, None),
    "parts": ("llama", "lora", LORA | {"modules_to_save": ["lm_head"], "bias": "all"}, None),
    "tokens": ("qwen3", "lora", {"r": 2, "target_modules": ["q_proj"], "trainable_token_indices": [5, 7]}, None),
    "experts": ("mixtral", "lora", {"r": 2, "target_modules": ["q_proj", "v_proj"]}, None),
    "resized": ("llama", "lora", LORA | {"trainable_token_indices": NEW}, None),
    "resized, tied": ("qwen3", "lora", LORA | {"trainable_token_indices": NEW}, None),
    "untied": ("qwen3", "head", {}, None),
    "merged": ("llama", "merged", LORA, None),
    "merged, resized": ("qwen3", "merged", LORA | {"trainable_token_indices": NEW}, None),
    "merged head": ("distilbert", "merged", {"r": 2, "target_modules": ["q_lin"]},
                    Labels(SEQUENCE, NAMES, drawn=True)),
    "whole, token": ("roberta", None, {}, Labels(TOKEN, NAMES, drawn=True)),
    "whole, value": ("llama", None, {}, Labels(SEQUENCE, ("LABEL_0",), PROBLEMS[2], drawn=True)),
    "whole, bare": ("bert", None, {}, None),
    "image": ("vit", "lora", {"r": 2, "target_modules": ["query"], "modules_to_save": ["classifier"]}, None),
    "image head": ("vit", "head", {}, None),
}  # fmt: skip
ROWS = zoo.VOCAB + len(NEW)
DECODERS = ("llama", "qwen3", "mixtral")
QUICK = ("lora", "sequence", "token", "resized")
PROCESSOR = {"image_processor_type": "ViTImageProcessor", "size": {"height": 8, "width": 8}}


def inputs(kind):
    if kind.startswith("image"):
        return test_encoders.vit("vit")[-1]
    return np.concatenate([TOKENS, [NEW, NEW]], axis=1).astype(np.int32) if "resized" in kind else TOKENS


def logits(module, params, tokens=TOKENS):
    if prefix := jaxtune.virtual_tokens(params):
        tokens = np.concatenate([np.tile(prefix, (2, 1)), TOKENS], axis=1).astype(np.int32)
    return np.asarray(jax.jit(lambda p: module.apply({"params": p}, tokens))(params))


def made(kind, tmp_path):
    """A result of a kind beside its base: (folder, module, params)."""
    name, method, settings, labels = RESULTS[kind]
    of_images = kind.startswith("image")
    directory = (
        test_encoders.vit(name)[1] if of_images else (zoo if name in DECODERS else test_encoders).directory(name)
    )
    base, out = tmp_path / "the-base", tmp_path / "result"
    shutil.copytree(directory, base)
    if of_images:
        (base / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    else:
        write_tokenizer(base)
    values = hf.read_config(base) | ({} if of_images else {"architectures": None})
    module = models.build(values)
    if labels is not None:
        module = with_labels(models.build({"pad_token_id": 0} | values), labels)
    params = hf.read_params(module, base, key=jax.random.key(3))
    if "resized" in kind:
        module, params = jaxtune.resize(module, params, ROWS)
    mask = None
    if method is not None:
        params, mask = tune("lora" if method == "merged" else method, params, jax.random.key(0), module, settings)
        params = shake(params, mask)
    if method in (None, "merged", "head"):
        jaxtune.export_model(module, params, out, base=base, facts=FACTS)
        return out, module, params
    jaxtune.export_adapter(module, params, out, base=base, mask=mask, facts=FACTS)
    return out, module, params


@pytest.mark.parametrize("kind", [k if k in QUICK else pytest.param(k, marks=pytest.mark.slow) for k in RESULTS])
def test_the_code_of_a_card_loads_the_result(kind, tmp_path, monkeypatch):
    out, module, params = made(kind, tmp_path)
    given = inputs(kind)
    expected = logits(module, params, given)
    text = (out / "README.md").read_text()
    assert str(tmp_path) not in text  # no path of this machine
    blocks = re.findall(r"```python\n(.*?)\n```", text, re.DOTALL)
    assert len(blocks) == 2
    monkeypatch.chdir(tmp_path)
    adapter = (out / "adapter_config.json").exists()
    more = {"auto": module.auto_class, "config": module.label_config} | export.inputs(module, out)
    printed = card.loading(str(tmp_path / "the-base"), str(out), adapter=adapter, **more)  # by `train`, with paths
    import torch

    for theirs, ours in (map(run, blocks), map(run, printed.values())):
        with torch.no_grad():
            given_to = torch.tensor(given, dtype=torch.float32 if given.dtype.kind == "f" else torch.long)
            out_of_it = theirs["model"].eval()(given_to)
        got = out_of_it.logits if hasattr(out_of_it, "logits") else out_of_it.last_hidden_state
        assert zoo.apart(got.numpy(), expected) < 1e-4
        assert ("processor" if kind.startswith("image") else "tokenizer") in theirs
        assert zoo.apart(logits(ours["module"], ours["params"], given), expected) < 1e-5
        labels = RESULTS[kind][3]
        if labels is not None:
            assert ours["module"].labels == dataclasses.replace(labels, drawn=ours["module"].labels.drawn)
            assert tuple(theirs["model"].config.id2label[i] for i in range(len(labels.names))) == labels.names


def test_the_lines_of_a_run_name_the_base_and_the_labels():
    config = {"id2label": {"0": "a", "1": "b"}, "problem_type": "multi_label_classification", "pad_token_id": 3}
    auto = "AutoModelForSequenceClassification"
    lines = card.loading("org/base", "runs/a/adapter", adapter=True, auto=auto, config=config)["peft"]
    assert "labels = ['a', 'b']" in lines and 'from_pretrained("org/base", num_labels=len(labels)' in lines
    assert "problem_type='multi_label_classification'" in lines and "pad_token_id=3" in lines


@pytest.mark.parametrize("kind", ["sequence", pytest.param("decoder", marks=pytest.mark.slow)])
def test_the_adapter_of_a_label_head_is_exported_without_its_run(kind, tmp_path, capsys):
    out, module, params = made(kind, tmp_path)
    expected = logits(module, params)
    assert main(["export", str(out), str(tmp_path / "merged")]) == 0
    assert main(["export", str(out), str(tmp_path / "again"), "--adapter"]) == 0
    for folder in ("merged", "again"):
        got, weights = jaxtune.load(tmp_path / folder)
        assert got.labels.names == NAMES and zoo.apart(logits(got, weights), expected) < 1e-5
    assert main(["generate", str(out), "--prompt=w1"]) == 2
    assert "is for SEQ_CLS and does not continue text" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------- an adapter as model.path


@pytest.mark.parametrize("kind", ["lora", "ia3", "prompt", "sequence"])
def test_an_adapter_as_model_path_is_trained_further(kind, tmp_path):
    """Base, method, settings, labels and values are the adapter's; the run starts where it was left."""
    out, _, params = made(kind, tmp_path)
    _, method, settings, labels = RESULTS[kind]
    cfg = config.resolve({"model": {"path": str(out)}, "data": {"train": "rows.jsonl"}})
    assert cfg.model.path == str(tmp_path / "the-base") and cfg.model.adapter == cfg.model.tokenizer == str(out)
    assert cfg.tune.method == method
    assert all(dict(cfg.tune[method])[name] for name in settings)
    if labels is not None:
        assert (cfg.objective.name, cfg.objective.labels) == ("sequence_classification", labels.names)
    run = experiment(cfg)
    start = run.recipe.start(run.base.load(run.recipe))
    part = partition(params, start.mask)
    jax.tree.map(np.testing.assert_array_equal, start.state.trainable, part.trainable)
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), run.recipe.abstract.state.trainable)
    assert shapes == jax.tree.map(lambda x: (x.shape, x.dtype), start.state.trainable)


def test_another_word_on_what_an_adapter_says_is_refused(tmp_path):
    out, _, _ = made("lora", tmp_path)
    with pytest.raises(UserError, match=r"the adapter in model.path, which is trained further, has 2"):
        config.resolve({"model": {"path": str(out)}, "data": {"train": "d"}, "tune": {"lora": {"r": 4}}})
    with pytest.raises(UserError, match=r"tune.method='full', but the adapter"):
        config.resolve({"model": {"path": str(out)}, "data": {"train": "d"}}, {"tune.method": "full"})


def test_an_adapter_beside_a_base_that_lies_elsewhere(tmp_path):
    out, _, params = made("lora", tmp_path)
    (tmp_path / "the-base").rename(tmp_path / "moved")
    given = {"model": {"path": str(tmp_path / "moved"), "adapter": str(out)}, "data": {"train": "d"}}
    cfg = config.resolve(given)
    assert cfg.model.path == str(tmp_path / "moved") and cfg.tune.lora.r == 2
    run = experiment(cfg)
    start = run.recipe.start(run.base.load(run.recipe))
    jax.tree.map(np.testing.assert_array_equal, start.state.trainable, partition(params, start.mask).trainable)
    with pytest.raises(UserError, match="is no PEFT directory"):
        config.resolve({"model": {"path": "m", "adapter": str(tmp_path)}, "data": {"train": "d"}})
