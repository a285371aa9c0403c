"""What a base is known by, and what is refused over another."""

import json
import shutil

import numpy as np
import pytest
import runs
from runs import command, compiled, everything, home  # noqa: F401
from safetensors.numpy import load_file, save_file

import jaxtune
from jaxtune.cli import main
from jaxtune.errors import UserError
from jaxtune.hf import digest
from jaxtune.hf.digest import RECORD, BaseFiles, carry_record


@pytest.fixture
def model(home, tmp_path):  # noqa: F811
    """A copy of the model, to change."""
    return shutil.copytree(home / "model", tmp_path / "model")


@pytest.fixture
def run(model, tmp_path):
    """A directory that says that a run began on it."""
    (tmp_path / "run").mkdir()
    BaseFiles(model).record(tmp_path / "run")
    return tmp_path / "run"


def flip(file, at=-1):
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def edit(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


CHANGES = {
    "config.json": lambda m: edit(m / "config.json", rms_norm_eps=1e-3),
    "tokenizer.json": lambda m: edit(m / "tokenizer.json", version="2.0"),
    "model.safetensors has": lambda m: flip(m / "model.safetensors"),
    "model.safetensors is gone": lambda m: (m / "model.safetensors").unlink(),
    "chat_template.jinja is new": lambda m: (m / "chat_template.jinja").write_text("{{ messages }}"),
    "tokenizer_config.json is gone": lambda m: (m / "tokenizer_config.json").unlink(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_base_is_refused_and_the_file_named(change, model, run):
    BaseFiles(model).check(run)
    CHANGES[change](model)
    with pytest.raises(UserError, match=change):
        BaseFiles(model).check(run)


def test_the_same_base_elsewhere_and_in_another_layout_is_the_same(model, run, tmp_path):
    moved = shutil.copytree(model, tmp_path / "moved")
    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps(config | {"transformers_version": "9"}, indent=8, sort_keys=True))
    (moved / "README.md").write_text("a card")
    with BaseFiles(moved).same(run):
        pass


def test_a_run_of_before_has_no_record_and_is_not_compared(model, run):
    (run / RECORD).unlink()
    flip(model / "model.safetensors")
    with BaseFiles(model).same(run):
        pass


def test_a_damaged_record_is_said(model, run):
    for text in ("{", "[]", '{"path": 3, "files": {}, "whole": {}}', '{"files": {}}'):
        (run / RECORD).write_text(text)
        with pytest.raises(UserError, match=r"base\.json is damaged"):
            BaseFiles(model).check(run)


def test_what_the_quick_hash_does_not_see_the_whole_one_does(tmp_path, monkeypatch):
    """A byte between the blocks of a file that is larger than they are together."""
    (tmp_path / "model").mkdir()
    (tmp_path / "run").mkdir()
    file = tmp_path / "model" / "model.safetensors"
    save_file({"a": np.arange(2**21, dtype=np.float32)}, file)
    BaseFiles(tmp_path / "model").record(tmp_path / "run")
    at = file.stat().st_size // 2 + digest.BLOCK // 2
    step = (file.stat().st_size - digest.BLOCK) / (digest.BLOCKS - 1)
    assert at % step > digest.BLOCK  # between blocks
    flip(file, at)
    base = BaseFiles(tmp_path / "model")
    base.check(tmp_path / "run")
    with pytest.raises(UserError, match=r"model\.safetensors has changed"):
        base.check(tmp_path / "run", whole=True)
    with (
        pytest.raises(UserError, match=r"model\.safetensors has changed"),
        BaseFiles(tmp_path / "model").same(tmp_path / "run"),
    ):
        pass


def test_every_byte_of_the_header_counts_and_the_size(tmp_path):
    file = tmp_path / "a.safetensors"
    save_file({f"{i:0900}": np.zeros(1, np.float32) for i in range(200)}, file)  # a header of three blocks
    whole, seen = file.read_bytes(), {digest._sampled(file)}
    for at in range(8, 180_000, 9_001):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        seen.add(digest._sampled(file))
    file.write_bytes(whole + b"\0")
    seen.add(digest._sampled(file))
    assert len(seen) == 22


def test_a_tokenizer_of_its_own_is_part_of_the_base(model, tmp_path, run):
    apart = shutil.copytree(
        model, tmp_path / "tokenizer", ignore=shutil.ignore_patterns("*.safetensors", "config.json")
    )
    (run / RECORD).unlink()
    BaseFiles(model, apart).record(run)
    edit(apart / "tokenizer.json", version="2.0")
    with pytest.raises(UserError, match=r"tokenizer/tokenizer\.json has changed"):
        BaseFiles(model, apart).check(run)


@pytest.fixture
def tuned(home, model, tmp_path):  # noqa: F811
    """A run with an adapter, over a copy of the model."""
    (tmp_path / "home").mkdir()
    shutil.move(model, tmp_path / "home" / "model")
    for name in ("train.jsonl", "eval.jsonl"):
        shutil.copy(home / name, tmp_path / "home")
    workdir = runs.write_run(tmp_path / "home", tmp_path / "run", eval=str(home / "eval.jsonl"))
    BaseFiles(tmp_path / "home" / "model").record(workdir)
    return workdir


def change_weights(folder):
    """Other weights of the same shapes."""
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor * 1.5 for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    "argv",
    [
        ["generate", "RUN", "--prompt=1 and 4 make ", "--max-new-tokens=1"],
        ["generate", "RUN/adapter", "--prompt=1 and 4 make ", "--max-new-tokens=1"],
        ["eval", "RUN"],
        ["export", "RUN", "OUT"],
        ["export", "RUN", "OUT", "--adapter"],
        ["export", "RUN/adapter", "OUT"],
    ],
)
def test_commands_refuse_another_base(argv, tuned, tmp_path, capsys):
    change_weights(tmp_path / "home" / "model")
    argv = [word.replace("RUN", str(tuned)).replace("OUT", str(tmp_path / "out")) for word in argv]
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert "model.safetensors has changed" in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


def adapter_elsewhere(tuned, tmp_path, how):
    """The adapter of a run, taken out of it."""
    if how == "exported":
        assert main(["export", str(tuned), str(tmp_path / "elsewhere"), "--adapter"]) == 0
        assert str(tmp_path) not in (tmp_path / "elsewhere" / RECORD).read_text()
    else:
        carry_record(tuned, tuned / "adapter")  # as a run does at its end
        shutil.copytree(tuned / "adapter", tmp_path / "elsewhere")
    return tmp_path / "elsewhere"


@pytest.mark.parametrize("how", ["copied", "exported"])
def test_an_adapter_taken_out_of_its_run_knows_its_base(how, tuned, home, tmp_path, capsys):  # noqa: F811
    adapter, base = adapter_elsewhere(tuned, tmp_path, how), tmp_path / "home" / "model"
    jaxtune.load(adapter)
    change_weights(base)
    said = rf"model.safetensors has changed: the adapter in .*elsewhere started from another base \(then in {'model'}"
    with pytest.raises(UserError, match=said):
        jaxtune.load(adapter)
    further = command(
        home, tmp_path / "further", model__path=adapter, tune__lora__r=None, tune__lora__lora_dropout=None
    )
    for argv in (["export", str(adapter), str(tmp_path / "out")], [*further, "--dry-run"]):
        assert main(argv) == 2
        assert "model.safetensors has changed" in capsys.readouterr().err
    jaxtune.load(adapter, base=base)  # said to be meant
    assert main(["export", str(adapter), str(tmp_path / "out"), "--allow-other-base"]) == 0


def test_a_run_with_a_tokenizer_of_its_own_and_its_adapter(tuned, tmp_path):
    """Of an adapter alone nobody knows which tokenizer its run had: config and weights are compared."""
    apart = tmp_path / "tokenizer"
    apart.mkdir()
    for file in (tmp_path / "home" / "model").glob("tokenizer*"):
        shutil.copy(file, apart)
    (tuned / RECORD).unlink()
    BaseFiles(tmp_path / "home" / "model", apart).record(tuned)
    carry_record(tuned, tuned / "adapter")
    jaxtune.load(tuned / "adapter")
    change_weights(tmp_path / "home" / "model")
    with pytest.raises(UserError, match=r"model\.safetensors has changed"):
        jaxtune.load(tuned / "adapter")


def test_another_base_may_be_asked_for(tuned, tmp_path):
    change_weights(tmp_path / "home" / "model")
    assert main(["export", str(tuned), str(tmp_path / "out"), "--allow-other-base"]) == 0


def test_a_run_goes_on_over_its_own_base_only(home, tmp_path, capsys):  # noqa: F811
    """Neither quickly nor, where only a whole file shows it, after loading; and a record of before is none."""
    folder = shutil.copytree(home / "model", tmp_path / "model")
    argv = command(home, tmp_path / "run", model__path=folder, train__steps=2)
    assert main(argv) == 0
    before = everything(tmp_path / "run")
    assert json.loads(before[RECORD])["files"]["config.json"]
    kept = (folder / "model.safetensors").read_bytes()
    change_weights(folder)
    assert main(argv) == 2
    assert "model.safetensors has changed" in capsys.readouterr().err
    assert everything(tmp_path / "run") == before
    (folder / "model.safetensors").write_bytes(kept)
    assert main(argv) == 0
