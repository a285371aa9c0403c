"""What a result's card and a run's last lines say is code: it is executed here, for every kind of result."""

import dataclasses
import re
import shutil
import warnings

import jax
import numpy as np
import pytest
import test_encoders
import zoo
from test_export import write_tokenizer
from test_peft_io import shake

import jaxtune
from jaxtune import models
from jaxtune.hf import card
from jaxtune.hf import load as hf
from jaxtune.methods.table import tune
from jaxtune.models.classifier import PROBLEMS, SEQUENCE, TOKEN, Labels, with_labels

TOKENS = np.random.default_rng(0).integers(4, 90, (2, 9), dtype=np.int32)
NAMES = ("ham", "spam's", 'a "third"')
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
}  # fmt: skip
QUICK = ("lora", "sequence", "token")


def logits(module, params, out=None):
    tokens = TOKENS
    if prefix := jaxtune.virtual_tokens(params):
        tokens = np.concatenate([np.tile(prefix, (2, 1)), TOKENS], axis=1).astype(np.int32)
    return np.asarray(jax.jit(lambda p: module.apply({"params": p}, tokens))(params))


def made(kind, tmp_path):
    """A result of a kind beside its base: (folder, module, params)."""
    name, method, settings, labels = RESULTS[kind]
    directory = zoo.directory(name) if name == "llama" else test_encoders.directory(name)
    base, out = tmp_path / "the-base", tmp_path / "result"
    shutil.copytree(directory, base)
    write_tokenizer(base)
    config = hf.read_config(base)
    module = models.build(config | {"architectures": None})
    if labels is not None:
        module = with_labels(models.build(config | {"architectures": None, "pad_token_id": 0}), labels)
    params = hf.read_params(module, base, key=jax.random.key(3))
    if method is None:
        jaxtune.export_model(module, params, out, base=base)
        return out, module, params
    params, mask = tune(method, params, jax.random.key(0), module, settings)
    params = shake(params, mask)
    jaxtune.export_adapter(module, params, out, base=base, mask=mask)
    return out, module, params


def run(code):
    names = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(code, names)
    return names


@pytest.mark.parametrize("kind", [k if k in QUICK else pytest.param(k, marks=pytest.mark.slow) for k in RESULTS])
def test_the_code_of_a_card_loads_the_result(kind, tmp_path, monkeypatch):
    out, module, params = made(kind, tmp_path)
    expected = logits(module, params)
    text = (out / "README.md").read_text()
    assert str(tmp_path) not in text  # no path of this machine
    blocks = re.findall(r"```python\n(.*?)\n```", text, re.DOTALL)
    assert len(blocks) == 2
    monkeypatch.chdir(tmp_path)
    theirs, ours = (run(code) for code in blocks)
    import torch

    with torch.no_grad():
        out_of_it = theirs["model"].eval()(torch.tensor(TOKENS, dtype=torch.long))
    got = out_of_it.logits if hasattr(out_of_it, "logits") else out_of_it.last_hidden_state
    assert zoo.apart(got.numpy(), expected) < 1e-4
    assert "tokenizer" in theirs
    assert zoo.apart(logits(ours["module"], ours["params"]), expected) < 1e-5
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
