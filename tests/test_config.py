"""The schema, what is refused and how it is said, config files, and going on with a run."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict, config_dict

from jaxtune.config import merge as c
from jaxtune.config import schema as schema
from jaxtune.errors import UserError
from jaxtune.objectives.task import TASKS

REPO = Path(__file__).parent.parent
GIVEN = {"model.path": "m", "data.train": "a.jsonl"}


def resolve(overrides=None, **flags):
    return c.resolve(overrides, GIVEN | {k.replace("__", "."): v for k, v in flags.items()}, source="my.py")


def refused(overrides=None, flags=None, **more):
    with pytest.raises(UserError) as error:
        c.resolve(overrides, GIVEN | (flags or {}), source="my.py", **more)
    return str(error.value)


# ------------------------------------------------------------------------------------------------------ the schema


def test_each_setting_has_a_section_a_meaning_and_a_default_that_passes_its_own_check():
    assert len(schema.BY_PATH) == len(schema.SETTINGS)
    for setting in schema.SETTINGS:
        assert setting.section in schema.SECTIONS
        assert setting.doc
        if setting.default not in (None, {}):
            assert c.read_value(setting.path, setting.default, "schema") == setting.default
    assert {s.section for s in schema.SETTINGS} == set(schema.SECTIONS)


def test_the_tables_beside_the_schema_name_settings_that_exist():
    known = set(schema.BY_PATH) | set(schema.SECTIONS)
    assert set(schema.OTHER_NAMES.values()) <= set(schema.BY_PATH)
    assert not set(schema.OTHER_NAMES) & {s.key for s in schema.SETTINGS}
    assert {*schema.DERIVED, *schema.REQUIRED} <= set(schema.BY_PATH)
    assert known >= schema.RESUMABLE
    assert known >= {path for idle in schema.IDLE if isinstance(idle.paths, tuple) for path in idle.paths}
    assert known >= {path for entry in TASKS.values() for path in entry.settings}
    assert set(schema.DEFAULT_LR) == set(schema.BY_PATH["tune.method"].choices)


def test_schema_is_a_locked_config_dict_of_the_defaults():
    defaults = c.defaults()
    assert isinstance(defaults, ConfigDict)
    assert defaults.tune.lora.r == 8
    with pytest.raises(AttributeError, match="rank"):
        defaults.tune.lora.rank = 4


# -------------------------------------------------------------------------------------------------------- merging


def test_the_command_line_overrides_the_file_which_overrides_the_default():
    cfg = resolve(ConfigDict({"tune": {"lora": {"r": 4, "lora_alpha": 16}}}), tune__lora__r="2")
    assert (cfg.tune.lora.r, cfg.tune.lora.lora_alpha, cfg.tune.lora.lora_dropout) == (2, 16.0, 0.0)
    with pytest.raises(AttributeError):
        cfg.tune.lora.r = 3


@pytest.mark.parametrize("method", ["full", "lora", "head"])
def test_the_learning_rate_follows_the_method_and_the_log_says_so(method):
    cfg = resolve(tune__method=method)
    assert cfg.optim.lr == {"full": 1e-5, "lora": 2e-4, "head": 1e-3}[method]
    assert any("optim.lr" in note and f"{cfg.optim.lr:g}" in note and method in note for note in c.notes(cfg))
    assert not any("optim.lr" in note for note in c.notes(resolve(tune__method=method, optim__lr="3e-3")))


def test_one_epoch_unless_steps_or_epochs_are_given():
    assert (resolve().train.epochs, resolve().train.steps) == (1.0, None)
    assert (resolve(train__steps="7").train.epochs, resolve(train__steps="7").train.steps) == (None, 7)
    assert resolve(train__epochs="0.5").train.epochs == 0.5


def test_none_takes_back_what_a_file_says():
    cfg = resolve({"train": {"epochs": 3}, "tune": {"lora": {"r": 4}}}, train__epochs="none", train__steps="5")
    assert (cfg.train.epochs, cfg.train.steps) == (None, 5)
    cfg = resolve({"tune": {"lora": {"r": 4}}}, tune__lora__r="none", tune__method="full")
    assert cfg.tune.lora.r == 8
    assert resolve({"train": {"keep": None}}).train.keep == 2


@pytest.mark.parametrize(
    ("path", "text", "value"),
    [
        ("optim.lr", "2e-5", 2e-5),
        ("optim.grad_clip", "1", 1.0),
        ("data.packing", "TRUE", True),
        ("data.train", "a.jsonl,b.jsonl", ("a.jsonl", "b.jsonl")),
        ("data.columns", "prompt=question,completion=a=b", {"prompt": "question", "completion": "a=b"}),
        ("data.template", r"Q: {q}\nA: {a}\\n", "Q: {q}\nA: {a}\\n"),
        ("data.train", r"dir\new", (r"dir\new",)),
        ("tune.lora.target_modules", "q_proj,v_proj", ("q_proj", "v_proj")),
        ("tune.lora.target_modules", "q_proj", ("q_proj",)),
        ("tune.lora.target_modules", "all-linear", "all-linear"),
        ("tune.lora.target_modules", r".*\.(q|v)_proj", r".*\.(q|v)_proj"),
        ("model.path", "~/m", str(Path.home() / "m")),
    ],
)
def test_text_of_the_command_line_becomes_the_setting_s_type(path, text, value):
    cfg = dict(c._flat(c.resolve({}, GIVEN | {path: text})))
    assert cfg[path] == value
    assert type(cfg[path]) is type(value)


@pytest.mark.parametrize(
    ("path", "raw", "value"),
    [
        ("optim.lr", 1, 1.0),
        ("optim.lr", np.float32(0.5), 0.5),
        ("train.batch_size", np.int64(4), 4),
        ("data.weights", [1, 2.5], (1.0, 2.5)),
        ("data.train", Path("a.jsonl"), ("a.jsonl",)),
        ("data.train", ("a,b.jsonl", "c.jsonl"), ("a,b.jsonl", "c.jsonl")),
        ("tune.lora.target_modules", ["q_proj"], ("q_proj",)),
        ("data.columns", {"prompt": "q"}, {"prompt": "q"}),
    ],
)
def test_values_of_a_file_are_taken_where_nothing_is_lost(path, raw, value):
    overrides = ConfigDict(c._nested({"model.path": "m", "data.train": ("a", "b"), path: raw}))
    assert dict(c._flat(c.resolve(overrides)))[path] == value


def test_a_field_reference_in_a_file_counts_as_its_value():
    overrides = ConfigDict({"tune": {"lora": {"r": 4}}})
    overrides.tune.lora.lora_alpha = overrides.tune.lora.get_ref("r") * 2.0
    assert resolve(overrides).tune.lora.lora_alpha == 8.0
    assert resolve(ConfigDict({"optim": {"lr": config_dict.placeholder(float)}})).optim.lr == 2e-4


# ---------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"optim": {"learning_rate": 1e-4}}, ["my.py", "no setting optim.learning_rate", "'optim.lr'", "weight_decay"]),
        ({"optim": {"weigth_decay": 1.0}}, ["'optim.weight_decay'"]),
        ({"optimizer": {"lr": 1.0}}, ["no setting optimizer", "Sections: model, tune, data"]),
        ({"tune": {"r": 4}}, ["no setting tune.r", "'tune.lora.r'", "Settings in tune: method, lora"]),
        ({"optim": "adamw"}, ["optim is a section", "name, lr"]),
        ({"model": {"path": {"to": "m"}}}, ["model.path", "expected a path or hub id"]),
        (
            {"optim": {"lr": "2e-5"}},
            ["my.py: optim.lr is '2e-5' (str)", "a finite number", "write 2e-5 without the quotes"],
        ),
        ({"train": {"batch_size": "8"}}, ["an integer", "write 8 without the quotes"]),
        ({"train": {"batch_size": 8.0}}, ["8.0 (float)", "an integer"]),
        ({"train": {"batch_size": True}}, ["True (bool)", "an integer"]),
        ({"optim": {"lr": True}}, ["True (bool)", "a finite number"]),
        ({"optim": {"lr": float("nan")}}, ["a finite number"]),
        ({"data": {"packing": 1}}, ["1 (int)", "true or false"]),
        ({"data": {"packing": "false"}}, ["write False without the quotes"]),
        ({"model": {"tokenizer": ""}}, ["a path or hub id"]),
        ({"data": {"columns": "prompt=q"}}, ["data.columns", "a dict in a file"]),
        ({"data": {"eval": ()}}, ["data.eval", "paths"]),
        ({"data": {"weights": ("1",)}}, ["data.weights", "finite numbers"]),
        ({"tune": {"lora": {"target_modules": "(q_proj"}}}, ["regular expression", "malformed"]),
        ({"optim": {"schedule": "cos"}}, ["'cos'", "constant, linear, cosine", "Did you mean 'cosine'?"]),
    ],
)
def test_wrong_keys_and_types_in_a_file(overrides, message):
    said = refused(overrides)
    assert all(part in said for part in message), said


@pytest.mark.parametrize(
    ("path", "text", "words"),
    [
        ("tune.lora.r", "0", "1 or more"),
        ("tune.lora.lora_alpha", "0", "above 0"),
        ("tune.lora.lora_dropout", "1.0", "below 1"),
        ("data.eval_fraction", "1", "below 1"),
        ("data.max_length", "1", "2 or more"),
        ("data.weights", "1,0", "above 0"),
        ("optim.lr", "-1", "above 0"),
        ("optim.lr", "inf", "a finite number"),
        ("optim.warmup", "1.5", "whole number of steps"),
        ("optim.min_lr_ratio", "1.1", "from 0 to 1"),
        ("optim.b1", "1", "below 1"),
        ("train.batch_size", "0", "1 or more"),
        ("train.steps", "1e3", "an integer"),
        ("train.seed", "-1", "0 or more"),
        ("data.columns", "prompt", "a=b,c=d"),
        ("data.columns", "prompt=a,prompt=b", "given twice"),
        ("model.path", "", "a path or hub id"),
    ],
)
def test_wrong_values_on_the_command_line(path, text, words):
    said = refused({}, {path: text})
    assert words in said
    assert f"--config.{path}={text}" in said


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"train.steps": "5", "train.epochs": "2"}, ["train.steps=5", "train.epochs=2", "keep one"]),
        ({"train.batch_size": "8", "train.grad_accum": "3"}, ["train.batch_size=8", "train.grad_accum=3", "divisor"]),
        ({"data.train": "a,b", "data.weights": "1,2,3"}, ["3 numbers", "2 sources"]),
    ],
)
def test_settings_that_contradict_each_other(flags, message):
    said = refused({}, flags)
    assert all(part in said for part in message), said


@pytest.mark.parametrize(
    ("flags", "idle", "because"),
    [
        ({"tune.method": "full", "tune.lora.r": "4"}, "tune.lora.r", "tune.method is full"),
        ({"tune.method": "head", "tune.lora.r": "8"}, "tune.lora.r", "tune.method is head"),
        ({"optim.name": "sgd", "optim.b1": "0.8"}, "optim.b1", "sgd"),
        ({"optim.name": "lion", "optim.eps": "1e-6"}, "optim.eps", "lion"),
        ({"optim.momentum": "0.8"}, "optim.momentum", "adamw"),
        ({"optim.schedule": "constant", "optim.min_lr_ratio": "0.1"}, "optim.min_lr_ratio", "constant"),
        ({"data.eval": "b", "data.eval_fraction": "0.1"}, "data.eval_fraction", "data.eval"),
        ({"data.weights": "1"}, "data.weights", "one source"),
        ({"data.format": "text", "data.system": "Be kind."}, "data.system", "text"),
        ({"data.format": "chat", "data.completion_from": "A:"}, "data.completion_from", "chat"),
        ({"data.template": "{a}", "data.columns": "prompt=a"}, "data.columns", "data.template"),
        ({"data.template": "{a}", "data.format": "chat"}, "data.format", "data.template"),
        ({"train.early_stop": "2"}, "train.early_stop", "data.eval_fraction"),
        ({"evaluate.rows": "5"}, "evaluate.rows", "evaluate.metrics"),
    ],
)
def test_a_setting_without_effect_is_an_error(flags, idle, because):
    said = refused({}, flags)
    assert f"{idle} has no effect" in said
    assert because in said.partition("has no effect")[2]


def test_a_setting_without_effect_in_a_file_can_be_taken_back():
    file = {"tune": {"method": "full", "lora": {"r": 16}}}
    said = refused(file, {})
    assert "my.py: tune.lora.r" in said
    assert "--config.tune.lora.r=none" in said
    assert resolve(file, **{"tune.lora.r": "none"}).tune.lora.r == 8


def test_a_retired_setting_names_its_successor_and_lives_on_in_older_runs():
    assert "evaluate.metrics=json_valid,json_exact" in refused({"evaluate": {"json": True}}, {})
    older = json.loads(c.to_json(resolve({"data": {"eval": "b"}})))
    del older["evaluate"]["metrics"]
    for said, became in ((True, ("json_valid", "json_exact")), (False, None)):
        older["evaluate"]["json"] = said
        assert c.from_json(json.dumps(older), "config.json").evaluate.metrics == became


def test_a_flag_takes_back_what_it_leaves_without_effect_in_the_file():
    file = {"tune": {"lora": {"r": 16}}, "evaluate": {"metrics": ["json_valid"], "rows": 5}, "data": {"eval": "b"}}
    resolved = resolve(file, **{"tune.method": "full", "evaluate.metrics": "none"})
    assert (resolved.tune.lora.r, resolved.evaluate.rows) == (8, 100)
    said = refused(file, {"tune.method": "full", "tune.lora.r": "16"})  # what is typed is meant
    assert "tune.lora.r has no effect" in said


def test_a_setting_that_is_off_needs_no_effect():
    resolve(tune__method="full", tune__lora__lora_dropout="0", optim__schedule="constant", optim__min_lr_ratio="0")
    resolve(train__early_stop="0", data__template="{a}", data__format="auto")


def test_what_is_required_is_named_together():
    with pytest.raises(UserError) as error:
        c.resolve()
    assert "--config.model.path=" in str(error.value)
    assert "--config.data.train=" in str(error.value)
    assert c.resolve(required=()).model.path is None


def test_all_problems_come_in_one_message():
    said = refused({"optim": {"lr": "1e-4", "warm": 1}, "train": {"keep": 0}})
    assert said.startswith("3 problems")
    assert all(part in said for part in ("optim.lr", "optim.warm", "train.keep"))


# ----------------------------------------------------------------------------------------------------- config.json


RANDOM_FLAGS = st.fixed_dictionaries(
    {},
    optional={
        "tune.method": st.sampled_from(["full", "lora", "head"]),
        "optim.lr": st.floats(1e-8, 1.0).map(repr),
        "optim.warmup": st.floats(0, 0.99).map(repr),
        "train.steps": st.integers(1, 10**9).map(str),
        "train.seed": st.integers(0, 2**32 - 1).map(str),
        "data.train": st.lists(st.from_regex(r"[a-z][\wäß./ -]*", fullmatch=True), min_size=1).map(",".join),
        "data.columns": st.dictionaries(
            st.from_regex(r"[a-z]+", fullmatch=True), st.from_regex(r"[^,\x00-\x1f]+", fullmatch=True), min_size=1
        ).map(lambda pairs: ",".join(f"{k}={v}" for k, v in pairs.items())),
        "data.system": st.text(st.characters(exclude_categories=["Cs"]), min_size=1),
        "data.packing": st.sampled_from(["true", "false"]),
    },
)


@given(RANDOM_FLAGS)
def test_config_json_round_trip(flags):
    cfg = c.resolve({}, GIVEN | flags)
    text = c.to_json(cfg, versions={"jax": "0.10"})
    assert json.loads(text)["versions"] == {"jax": "0.10"}
    assert c.from_json(text) == cfg
    assert c.changes(cfg, c.from_json(text)) == []


def test_config_json_as_config_leaves_derived_values_derived(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(c.to_json(resolve(optim__weight_decay="0.1")))
    overrides, source = c.load_file(str(path))
    cfg = c.resolve(overrides, {"tune.method": "full", "train.steps": "3", "model.path": "other"}, source=source)
    assert (cfg.optim.lr, cfg.train.epochs, cfg.model.tokenizer) == (1e-5, None, "other")
    assert (cfg.optim.weight_decay, cfg.data.train) == (0.1, ("a.jsonl",))


def test_config_json_that_is_not_one():
    with pytest.raises(UserError, match=r"run/config\.json:2: not valid JSON"):
        c.from_json('{"model": {},\n', source="run/config.json")
    with pytest.raises(UserError, match=r"expected an object of sections.*list"):
        c.from_json("[]")
    with pytest.raises(UserError, match=r"no setting model_type"):
        c.from_json('{"model_type": "llama"}')


# -------------------------------------------------------------------------------------------------------- resuming


def test_changes_are_listed_in_schema_order():
    old, new = resolve(), resolve(train__seed="1", tune__lora__r="4", data__columns="prompt=q")
    assert c.changes(old, new) == [
        ("tune.lora.r", 8, 4),
        ("data.columns", {}, {"prompt": "q"}),
        ("train.seed", 0, 1),
    ]


def test_a_run_may_go_on_longer_and_with_other_logging():
    c.check_resume(resolve(), resolve(train__steps="9", log__every="1", log__progress="false", data__cache="false"))


def test_a_run_may_not_go_on_as_another():
    with pytest.raises(UserError) as error:
        c.check_resume(resolve(), resolve(train__steps="9", optim__lr="1e-3", data__train="b.jsonl"))
    said = str(error.value)
    assert "optim.lr: 0.0002 -> 0.001" in said
    assert "data.train: ('a.jsonl',) -> ('b.jsonl',)" in said
    assert "train.steps" not in said
    assert "--workdir" in said


# ---------------------------------------------------------------------------------------------------- config files


def write(folder, text, name="mine.py"):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    return str(folder / name)


def test_a_file_imports_what_lies_beside_it_and_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    body = "from common import R\ndef get_config():\n    import common\n    return {'tune': {'lora': {'r': R}}}\n"
    before = list(sys.path), set(sys.modules)
    for name, r in (("one", 1), ("two", 2)):
        write(tmp_path / name, f"R = {r}\n", "common.py")
        overrides, _ = c.load_file(write(tmp_path / name, body))
        assert overrides == {"tune": {"lora": {"r": r}}}
    assert (list(sys.path), set(sys.modules)) == before
    assert not list(tmp_path.rglob("__pycache__"))


def test_an_argument_reaches_get_config(tmp_path):
    path = write(tmp_path, "def get_config(arg=None):\n    return {'tune': {'method': arg or 'lora'}}\n")
    assert c.load_file(f"{path}:head")[0] == {"tune": {"method": "head"}}
    assert c.load_file(path)[0] == {"tune": {"method": "lora"}}


@pytest.mark.parametrize(
    ("text", "spec", "message"),
    [
        ("def get_config():\n    return {}\n", ":small", "takes no argument"),
        ("x = 1\n", "", "defines get_config()"),
        ("def get_config():\n    pass\n", "", "returned NoneType"),
        ("def get_config():\n    return 1 / 0\n", "", "mine.py:2: ZeroDivisionError: division by zero"),
        ("import jaxtuna\n", "", "mine.py:1: ModuleNotFoundError: No module named 'jaxtuna'"),
        ("def get_config(:\n", "", "mine.py:1: SyntaxError"),
        (
            "from ml_collections import ConfigDict\ndef get_config():\n    c = ConfigDict()\n    c.optim.lr = 1\n",
            "",
            "mine.py:4: AttributeError",
        ),
    ],
)
def test_an_error_in_a_file_is_named_by_file_and_line(tmp_path, text, spec, message):
    with pytest.raises(UserError) as error:
        c.load_file(write(tmp_path, text) + spec)
    assert message in str(error.value)


def test_an_error_in_a_file_beside_is_named_there(tmp_path):
    write(tmp_path, "\nraise KeyError('x')\n", "common.py")
    with pytest.raises(UserError, match=r"common\.py:2: KeyError"):
        c.load_file(write(tmp_path, "import common\n"))


def test_a_file_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "configs", "", "lora_sft.py")
    for spec in ("configs/lora_stf.py", "lora_sft.py", "lora_sft", "config/lora_sft.py"):
        with pytest.raises(UserError, match=r"no such file\. Did you mean 'configs/lora_sft\.py'\?"):
            c.load_file(spec)
    write(tmp_path / "run", "{}", "config.json")
    with pytest.raises(UserError, match=r"Did you mean 'run/config\.json'"):
        c.load_file("run")
    with pytest.raises(UserError, match=r"expected a \.py file"):
        c.load_file(write(tmp_path, "", "mine.yaml"))


@pytest.mark.parametrize("name", ["lora_sft", "chat_lora", "full_ft", "head", "continued_pretraining"])
def test_the_shipped_configs_resolve_and_say_how_to_run_them(name):
    path = REPO / "configs" / f"{name}.py"
    overrides, source = c.load_file(str(path))
    c.resolve(overrides, GIVEN, source=source)
    text = path.read_text()
    assert f"--config=configs/{name}.py" in text
    assert "Expected:" in text
    with pytest.raises(UserError, match=r"--config\.model\.path"):
        c.resolve(overrides, source=source)


def test_a_batch_is_split_by_parts_or_by_rows():
    def split(flags):
        t = c.resolve({}, GIVEN | flags).train
        return t.grad_accum, t.micro_batch

    assert split({}) == (1, 8)
    assert split({"train.grad_accum": "4"}) == (4, 2)
    assert split({"train.micro_batch": "2"}) == (4, 2)
    assert split({"train.micro_batch": "auto"}) == (1, "auto")
    for flags, said in (
        ({"train.micro_batch": "3"}, "choose a divisor"),
        ({"train.micro_batch": "2", "train.grad_accum": "4"}, "keep one"),
        ({"train.micro_batch": "0"}, "1 or more"),
        ({"train.micro_batch": "most"}, "auto, or an integer"),
    ):
        with pytest.raises(UserError, match=said):
            split(flags)


def test_how_a_batch_was_split_survives_config_json():
    cfg = resolve(train__micro_batch="2")
    assert c.from_json(c.to_json(cfg)) == cfg
