"""Files of strangers: none is executed, none leads out of its directory, none writes to the terminal.

Each attack would leave a file behind, or show a secret. Other tests with the mark `security` lie with what they test.
"""

import json
import os
import pickle
import shutil

import numpy as np
import pytest
import runs
from runs import compiled, home  # noqa: F401

from jaxtune.cli import main
from jaxtune.data import load_tokenizer

pytestmark = pytest.mark.security


class Bomb:
    """Pickled, it makes a folder when it is loaded."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


@pytest.fixture
def canary(tmp_path):
    return tmp_path / "ran"


@pytest.fixture
def model(home, tmp_path):  # noqa: F811
    return shutil.copytree(home / "model", tmp_path / "model")


def edit(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def code(folder, canary):
    """A module of remote code, under every name that it is asked for by."""
    (folder / "evil.py").write_text(
        f"import os\nos.mkdir({str(canary)!r})\n"
        "from transformers import *\nclass Config(PretrainedConfig):\n  model_type = 'llama'\n"
        "class Model(PreTrainedModel): pass\nclass Tokenizer(PreTrainedTokenizerFast): pass\n"
    )


def pickled(file, canary):
    file.write_bytes(pickle.dumps({"lm_head.weight": Bomb(canary)}))


def of_weights(model, canary):
    (model / "model.safetensors").unlink()
    pickled(model / "pytorch_model.bin", canary)


def beside_weights(model, canary):
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "rng_state.pth", "scheduler.pt"):
        pickled(model / name, canary)


def of_model(model, canary):
    code(model, canary)
    edit(model / "config.json", auto_map={f"Auto{kind}": f"evil.{kind}" for kind in ("Config", "Model")})


def of_causal_model(model, canary):
    code(model, canary)
    edit(model / "config.json", auto_map={"AutoModelForCausalLM": "evil.Model"}, architectures=["evil.Model"])


def of_another_repository(model, canary):
    edit(model / "config.json", auto_map={"AutoConfig": "evil/evil--evil.Config"})


def of_unknown_type(model, canary):
    code(model, canary)
    edit(model / "config.json", auto_map={"AutoConfig": "evil.Config"}, model_type="evil")


def of_tokenizer(model, canary):
    code(model, canary)
    auto = {"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]}
    edit(model / "tokenizer_config.json", auto_map=auto, tokenizer_class="Tokenizer")


def of_generation(model, canary):
    (model / "custom_generate").mkdir()
    code(model / "custom_generate", canary)
    (model / "generation_config.json").write_text('{"custom_generate": "evil", "eos_token_id": 257}')


BASES = [of_weights, beside_weights, of_model, of_causal_model, of_another_repository, of_unknown_type]
BASES += [of_tokenizer, of_generation]


@pytest.mark.parametrize("attack", BASES)
def test_no_code_of_a_base_runs(attack, model, canary, home, tmp_path, capsys):  # noqa: F811
    attack(model, canary)
    train = [*runs.command(home, None, "--dry-run", model__path=model)]
    commands = [
        ["generate", str(model), "--prompt=1", "--max-new-tokens=1"],
        ["export", str(model), str(tmp_path / "o")],
    ]
    for argv in (*commands, train):
        assert main(argv) in (0, 2)
        assert "Traceback" not in capsys.readouterr().err
    assert not canary.exists()
    assert not list((tmp_path / "o").glob("*.py")) and not list((tmp_path / "o").glob("*.bin"))


def test_no_code_of_an_adapter_runs(home, canary, tmp_path, capsys):  # noqa: F811
    run = runs.write_run(home, tmp_path / "run")
    pickled(run / "adapter" / "training_args.bin", canary)
    code(run / "adapter", canary)
    config = {"auto_mapping": {"base_model_class": "Model", "parent_library": "evil"}}
    edit(run / "adapter" / "adapter_config.json", **config)
    assert main(["export", str(run), str(tmp_path / "out")]) in (0, 2)
    (run / "adapter" / "adapter_model.safetensors").unlink()
    pickled(run / "adapter" / "adapter_model.bin", canary)
    assert main(["export", str(run), str(tmp_path / "again")]) == 2
    assert "pickle" in capsys.readouterr().err and not canary.exists()


def numpy_bomb(file, canary):
    np.save(file, np.array([Bomb(canary)], object), allow_pickle=True)


def script(folder, canary):
    folder.mkdir()
    code(folder, canary)
    (folder / "evil.py").rename(folder / f"{folder.name}.py")


DATA = {
    "rows.pkl": pickled,
    "rows.npy": numpy_bomb,
    "rows.pt": pickled,
    "rows.jsonl.pkl": pickled,
    "rows.jsonl": pickled,
    "rows.parquet": pickled,
    "rows.arrow": pickled,
    "folder": script,
}


@pytest.mark.parametrize("name", DATA)
def test_no_code_in_data_runs(name, canary, home, tmp_path, capsys):  # noqa: F811
    DATA[name](tmp_path / name, canary)
    assert main(runs.command(home, None, "--dry-run", data__train=tmp_path / name)) == 2
    assert "Traceback" not in capsys.readouterr().err and not canary.exists()


def test_no_code_in_a_cache_runs(canary, home, tmp_path, capsys, monkeypatch):  # noqa: F811
    """Also where whoever wrote it knew the checksums."""
    from jaxtune.data import cache

    monkeypatch.setenv("JAXTUNE_CACHE", str(tmp_path / "cache"))
    dry = runs.command(home, None, "--dry-run")
    assert main(dry) == 0
    for folder in {file.parent for file in (tmp_path / "cache").rglob(cache.ROWS)}:
        numpy_bomb(folder / cache.ROWS, canary)
        found = json.loads((folder / cache.CHECKSUMS).read_text())
        (folder / cache.CHECKSUMS).write_text(json.dumps(found | {cache.ROWS: cache.hash_of(folder / cache.ROWS)}))
    capsys.readouterr()
    assert main(dry) in (0, 2)
    assert "Traceback" not in capsys.readouterr().err and not canary.exists()


TEMPLATES = [
    "{{ cycler.__init__.__globals__.os.mkdir(CANARY) }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ namespace.__init__.__globals__['__builtins__']['open'](CANARY, 'w') }}",
    "{{ strftime_now.__globals__['sys'].modules['os'].mkdir(CANARY) }}",
    "{{ raise_exception.__globals__ }}",
    "{% include '/etc/hostname' %}",
    "{% import '/etc/hostname' as x %}{{ x }}",
    "{{ (messages | map(attribute='__class__.__base__.__subclasses__') | first)() }}",
    "{{ lipsum.__globals__ }}",
    "{% set x = messages.append(messages) %}",
]


@pytest.mark.parametrize("attack", TEMPLATES)
def test_a_template_stays_in_its_sandbox(attack, canary, model, capsys):
    (model / "chat_template.jinja").write_text(attack.replace("CANARY", json.dumps(str(canary))) + "{{ messages }}")
    status = main(["generate", str(model), "--chat", "--prompt=1", "--max-new-tokens=1"])
    said = capsys.readouterr()
    assert "Traceback" not in said.err and "<class" not in said.out + said.err and not canary.exists()
    if status == 0:  # what may not be read is empty
        text = load_tokenizer(str(model)).apply_chat_template([{"role": "user", "content": "1"}], tokenize=False)
        assert text == "[{'role': 'user', 'content': '1'}]"
    else:
        assert status == 2 and "the chat template refuses this conversation" in said.err


@pytest.mark.parametrize("text", ["\x1b]0;title\x07", "\x1b[2J", "\x9b31m", "[bold red]x[/]", "[/]", "\r\x08"])
@pytest.mark.parametrize("column", ["prompt", "completion"])
def test_rows_do_not_write_to_the_terminal(column, text, home, tmp_path, capsys):  # noqa: F811
    rows = [{"prompt": f"{i} and", "completion": str(i)} | {column: f"{i} {text} x"} for i in range(8)]
    train = runs.write_jsonl(tmp_path / "rows.jsonl", rows)
    assert main(runs.command(home, None, "--dry-run", data__train=train)) == 0
    out = "".join(capsys.readouterr())
    assert not set("\x1b\x07\x9b\x08\r") & set(out.replace("\x1b[1m", ""))
    assert "[" not in text or "\x1b" in text or text in out  # markup is text
    assert main(["data", f"--config.data.train={train}", f"--config.model.path={home / 'model'}"]) in (0, 2)
    assert not set("\x1b\x07\x9b\x08\r") & set("".join(capsys.readouterr()))
