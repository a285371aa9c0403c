"""Every family in and out: LoRA's gradients, adapters and whole models, against live peft and transformers."""

import copy
import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import families_table
import jax
import numpy as np
import pytest
import test_encoders
import test_gguf
import test_models
import test_seq2seq
import zoo
from safetensors.numpy import load_file
from test_models import FIRST, TOLERANCE

from jaxtune.hf.export import export_model
from jaxtune.hf.load import load
from jaxtune.hf.peft import export_adapter, load_adapter, tree_factors
from jaxtune.methods.table import places
from jaxtune.models import FAMILIES
from jaxtune.tree import combine, flatten, partition

pytestmark = pytest.mark.filterwarnings("ignore")  # peft warns of what it corrects by itself, and of torch's future

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
BERT = ["query", "key", "value", "intermediate.dense"]
MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss")
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
# Elsewhere "all-linear": that reaches routers in peft, not here, and in an encoder the pooler, which is a label head.
TARGETS = {
    **dict.fromkeys(MIXTURES, ATTENTION),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra"), BERT),
    "distilbert": ["q_lin", "v_lin", "out_lin", "lin1", "lin2"],
    "modernbert": ["Wqkv", "Wo", "Wi"],
}
# Through eight layers, float32's rounding alone moves a gradient by 1e-4 on some processors; four have both kinds.
SHALLOW = {"modernbert": {"num_hidden_layers": 4}}
ENCODERS = ("bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert", "modernbert")
every_family = pytest.mark.parametrize(
    "name",
    [n if n == "llama" else pytest.param(n, marks=pytest.mark.slow) for n in (*FIRST, *ENCODERS)],
    scope="module",  # one family after the other: its tests share models and a program
)


def base(name: str) -> tuple[Any, Path, Any, Any]:
    """`(transformers model, directory, module, params)`: a language model, or an encoder that classifies."""
    if name in ENCODERS:
        return classifier(name)
    return zoo.model(name), zoo.directory(name), *zoo.ours(name)


@functools.cache
def classifier(name: str) -> tuple[Any, Path, Any, Any]:
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    family, values = test_encoders.ZOO[name]
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **values | SHALLOW.get(name, {}), num_labels=3)
    model = AutoModelForSequenceClassification.from_config(config, attn_implementation="eager")
    model, folder = test_encoders.enlarge(model.float().eval()), zoo.scratch() / name
    model.save_pretrained(folder)
    return model, folder, *load(folder)


def tokens(name: str) -> np.ndarray:
    """Ids [2, 12], none of them padding."""
    return test_encoders.rows()[0][:2, :12] if name in ENCODERS else zoo.tokens(2, 12)


def slope(shape: tuple[int, ...]) -> np.ndarray:
    """The gradient that both sides start from: that of a random sum of logits."""
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


class Theirs(NamedTuple):
    """An adapter that live peft made: where it lies, its logits, and the gradients of its factors by peft's names."""

    folder: Path
    logits: np.ndarray
    gradients: dict[str, np.ndarray]


@functools.cache
def theirs(name: str) -> Theirs:
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model, directory, _, _ = base(name)
    settings = {"task_type": "SEQ_CLS" if name in ENCODERS else "CAUSAL_LM", "r": 2, "lora_alpha": 3}
    settings |= {"target_parameters": EXPERTS} if name in MIXTURES else {}
    targets = TARGETS.get(name, "all-linear")
    model = get_peft_model(copy.deepcopy(model), LoraConfig(target_modules=targets, **settings)).eval()
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    for p in trained.values():
        p.data += 0.3 * torch.randn_like(p)
    model.peft_config["default"].base_model_name_or_path = str(directory)
    folder = zoo.scratch() / name
    model.save_pretrained(folder)
    if name in (*ENCODERS, "gpt_oss"):  # in float32 a gradient of ModernBERT is 1.2e-4 from this, ours 0.4e-4
        if name in MIXTURES:
            model.get_base_model().config._experts_implementation = "eager"  # torch's grouped product has no float64
        model.double()
    logits = model(torch.tensor(tokens(name), dtype=torch.long)).logits
    (logits * torch.tensor(slope(logits.shape))).sum().backward()
    return Theirs(
        folder, logits.detach().numpy(), {key: p.grad.numpy() for key, p in trained.items() if "lora_" in key}
    )


@functools.partial(jax.jit, static_argnums=0)
def logits_and_gradient(module, parts, ids):
    def of(trainable):
        logits = module.apply({"params": combine(trainable, parts.member, parts.frozen)}, ids)
        return (logits * slope(logits.shape)).sum(), logits

    gradient, logits = jax.grad(of, has_aux=True)(parts.trainable)
    return logits, gradient


@functools.cache
def ours(name: str) -> tuple[Any, Any, Any]:
    """Theirs, loaded: `(params, mask, config)`."""
    _, directory, module, params = base(name)
    return load_adapter(module, params, theirs(name).folder, base=directory)


def logits(name: str, params: Any) -> np.ndarray:
    module, mask = base(name)[2], ours(name)[1]
    return np.asarray(logits_and_gradient(module, partition(params, mask), tokens(name))[0])


@pytest.mark.parity("adapter in", "LoRA gradients")
@every_family
def test_an_adapter_of_peft_gives_its_logits_and_gradients(name):
    model, _, module, _ = base(name)
    params, mask, _ = ours(name)
    got, gradient = logits_and_gradient(module, partition(params, mask), tokens(name))
    want = theirs(name)
    assert zoo.apart(got, want.logits) < TOLERANCE
    assert zoo.apart(zoo.torch_logits(model, tokens(name)), want.logits) > 0.01  # the adapter matters
    assert len(want.gradients) == 2 * len(tree_factors(module, params))
    gradient = {path: leaf for path, leaf in flatten(gradient).items() if leaf is not None}
    for place in places(params, module):
        of = place.name
        if place.parameter:  # the wrapper of the first lies within that of the second
            of = of.replace(".gate_up_proj", ".base_layer").replace(".down_proj", "")
        for field, key in (("a", "lora_A"), ("b", "lora_B")):
            slope = want.gradients.get(f"base_model.model.{of}.{key}.default.weight")
            if slope is not None:
                got = gradient[f"{place.path}/{field}"][place.index].swapaxes(-1, -2)
                if place.parameter:  # [E r, K] and [N, r E]
                    got = (got if field == "a" else np.moveaxis(got, 0, 2)).reshape(slope.shape)
                assert zoo.apart(got, slope) < TOLERANCE


def moved(params: Any, mask: Any) -> Any:
    """As training would: everything trained is another number."""
    parts = partition(params, mask)
    return combine(
        jax.tree.map(lambda x: jax.device_put(1.1 * np.asarray(x)), parts.trainable), parts.member, parts.frozen
    )


@pytest.mark.parity("adapter out")
@every_family
def test_an_adapter_is_written_as_it_was_and_peft_gives_our_logits(name, tmp_path):
    import torch
    from peft import PeftModel

    model, directory, module, _ = base(name)
    params, mask, config = ours(name)
    where = {"base": directory, "config": config, "mask": mask}
    export_adapter(module, params, tmp_path / "again", **where)
    folders = (theirs(name).folder, tmp_path / "again")
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in folders)
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[key], after[key]) for key in before)
    before, after = (json.loads((folder / "adapter_config.json").read_text()) for folder in folders)
    assert before == after

    params = moved(params, mask)
    export_adapter(module, params, tmp_path / "moved", **where)
    again = PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path / "moved")).eval()
    with torch.no_grad():
        got = again(torch.tensor(tokens(name), dtype=torch.long)).logits.numpy()
    assert zoo.apart(got, logits(name, params)) < TOLERANCE
    assert zoo.apart(got, theirs(name).logits) > 0.01


@pytest.mark.parity("full export")
@every_family
def test_a_merged_model_gives_our_logits_in_transformers(name, tmp_path):
    import torch
    import transformers

    _, directory, module, _ = base(name)
    params, mask, _ = ours(name)
    params = moved(params, mask)
    export_model(module, params, tmp_path / "out", base=directory)
    auto = transformers.AutoModelForSequenceClassification if name in ENCODERS else transformers.AutoModelForCausalLM
    model, info = auto.from_pretrained(tmp_path / "out", output_loading_info=True, attn_implementation="eager")
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    with torch.no_grad():
        got = model.eval()(torch.tensor(tokens(name), dtype=torch.long)).logits.numpy()
    assert zoo.apart(got, logits(name, params)) < TOLERANCE


# --- the table in the documents


def test_the_table_of_families_is_what_the_tests_claim():
    """A row for each family; a check where there is a test, and nowhere else. That it passed is what writing proves."""
    file = Path(__file__).resolve().parents[1] / "docs" / "families.md"
    table = families_table.read(file.read_text(encoding="utf-8"))
    assert list(table) == sorted(FAMILIES)
    assert all(tuple(row) == families_table.COLUMNS for row in table.values())
    checked = {(family, column) for family, row in table.items() for column, cell in row.items() if cell == "✓"}
    here = __import__(__name__)
    assert checked == families_table.claims(test_models, test_encoders, test_gguf, test_seq2seq, here)
    assert {cell for row in table.values() for cell in row.values()} <= {"✓", "", "–"}


def test_a_cell_of_a_failed_or_absent_test_stays_empty(tmp_path, monkeypatch):
    monkeypatch.setattr(families_table, "_passed", {("llama", "load"): True, ("llama", "logits"): False})
    families_table.write(tmp_path / "table.md")
    table = families_table.read((tmp_path / "table.md").read_text(encoding="utf-8"))
    assert table["llama"] | {"load": "✓"} == dict.fromkeys(families_table.COLUMNS, "") | {"load": "✓"}
    assert not any(cell == "✓" for family, row in table.items() for cell in row.values() if family != "llama")
