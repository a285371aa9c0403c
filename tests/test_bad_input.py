"""Files of users with anything wrong in them: every reader succeeds or says so in one message, in time.

Files are mutated as text, as bytes and as JSON, by hypothesis; a traceback of another type than UserError fails.
"""

import functools
import json
import os
import random
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pyarrow.parquet
import pytest
import report_runs
import test_export
import zoo
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import jaxtune
from jaxtune import cli, config
from jaxtune.commands.generate import read_prompts
from jaxtune.data import load_tokenizer, prepare
from jaxtune.data.labels import LabelForm
from jaxtune.errors import UserError, printable
from jaxtune.hf import tensors
from jaxtune.hf.digest import BaseFiles
from jaxtune.hf.peft import load_adapter
from jaxtune.hf.stops import named_ids
from jaxtune.methods.table import lora
from jaxtune.report import write_report, write_sweep
from jaxtune.run import points

SECONDS = 20
DEEP = "[" * 20_000 + "]" * 20_000
NASTY = [
    *(None, True, False, 0, -1, 1, 2, 7, 2**31, 2**63, 10**30, -(10**30), 0.5, -0.0, float("nan"), float("inf")),
    *("", "x", "512", "1e-5", "\ud800", "\x1b[31m", "[bold]", "../..", "/etc/passwd", "a" * 5000, "\x00"),
    *([], [None], ["x"], [[]], [-1], {}, {"x": None}, {"": {}}, {"0": "a"}),
]


# --------------------------------------------------------------------------------------------------------- mutations


def of_bytes(data: bytes, rng: random.Random) -> bytes:
    """One change of bytes."""
    at, kind = rng.randrange(len(data) + 1), rng.randrange(7)
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
    if kind == 2:
        return data[:at] + rng.choice([b"{", b"]", b'"', b"\xff", b"\x00", b",", b"\xed\xa0\x80"]) + data[at:]
    if kind == 3:
        end = min(len(data), at + rng.randrange(1, 40))
        return data[:at] + data[at:end] * 2 + data[end:]
    if kind == 4:
        return data[:at] + data[at + rng.randrange(1, 40) :]
    if kind == 5:
        return b"\xef\xbb\xbf" + data
    return rng.choice([b"", b"null", b"[]", b"{}", b"1" * 5000, DEEP.encode(), b"\x80\x02}q\x00.", b"NaN"])


def of_json(data: bytes, rng: random.Random) -> bytes:
    """One value of a JSON text replaced, taken out, named otherwise or given twice; of lines, in one of them."""
    try:
        lines = data.decode().splitlines() if b"\n{" in data.rstrip() else [data.decode()]
        number = rng.randrange(len(lines))
        tree = json.loads(lines[number])
        assert isinstance(tree, dict | list)
    except (ValueError, RecursionError, AssertionError):  # an earlier mutation
        return of_bytes(data, rng)
    spots: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key, value in list(node.items() if isinstance(node, dict) else enumerate(node)):
            spots.append((node, key))
            if isinstance(value, dict | list):
                walk(value)

    walk(tree)
    if not spots:
        return of_bytes(data, rng)
    node, key = rng.choice(spots)
    kind = rng.randrange(5)
    if kind <= 2:
        node[key] = rng.choice(NASTY)
    elif kind == 3:
        del node[key]
    elif isinstance(node, dict):
        node[rng.choice(["x", "", "\ud800", "__metadata__", "step", "r"])] = node.pop(key)
    try:
        lines[number] = json.dumps(tree)
    except (ValueError, RecursionError):
        return of_bytes(data, rng)
    if kind == 4 and isinstance(node, list):
        lines[number] = lines[number].replace(json.dumps(node), DEEP, 1)
    return "\n".join(lines).encode()


def of_header(data: bytes, rng: random.Random) -> bytes:
    """As `of_json`, in the header of a safetensors file."""
    length = int.from_bytes(data[:8], "little")
    header = of_json(data[8 : 8 + length], rng)
    told = len(header) if rng.randrange(4) else rng.choice([0, 1, len(header) + 1, 2**40, 2**63])
    return told.to_bytes(8, "little") + header + data[8 + length :]


# ----------------------------------------------------------------------------------------------------------- readers


@functools.cache
def model() -> Path:
    return zoo.directory("llama")


@functools.cache
def sharded() -> Path:
    folder = zoo.scratch() / "sharded"
    zoo.model("llama").save_pretrained(folder, max_shard_size="40KB")
    return folder


@functools.cache
def adapter() -> Path:
    module, params = zoo.ours("llama")
    params, mask = lora(params, jax.random.key(0), module=module, r=2, target_modules=["q_proj", "v_proj"])
    out, run = zoo.scratch() / "adapter", zoo.scratch()
    BaseFiles(model()).record(run)
    jaxtune.export_adapter(module, params, out, base=model(), mask=mask, record=run)
    return out


@functools.cache
def label_adapter() -> Path:
    folder = zoo.scratch() / "labelled"
    shutil.copytree(adapter(), folder)
    labels = {"id2label": {"0": "a", "1": "b"}, "architectures": ["LlamaForSequenceClassification"]}
    (folder / "config.json").write_text(json.dumps(labels | {"problem_type": "single_label_classification"}))
    return folder


def resolve_adapter(folder: Path) -> None:
    config.resolve({"model": {"path": str(folder)}, "data": {"train": "rows.jsonl"}})


@functools.cache
def run() -> Path:
    folder = zoo.scratch() / "run"
    report_runs.make_run(folder)
    samples = [{"step": s, "prompt": "a", "expected": "b", "text": str(s)} for s in (0, 20)]
    (folder / "samples.jsonl").write_text("\n".join(map(json.dumps, samples)) + "\n")
    entry = {"label": "loss", "share": False, "rows": 9, "base": {"value": 2.0, "low": 1.0, "high": 3.0}}
    evaluation = {"held_out": {"rows": 9, "metrics": {"loss": entry}}}
    (folder / "eval.json").write_text(json.dumps(evaluation))
    return folder


@functools.cache
def sweep() -> Path:
    folder = zoo.scratch() / "sweep"
    for rate in ("1e-3", "2e-3"):
        shutil.copytree(run(), folder / f"lr={rate}")
        (folder / f"lr={rate}/member.json").write_text(json.dumps({"status": "finished"}))
    points = {f"lr={rate}": {"optim.lr": float(rate)} for rate in ("1e-3", "2e-3")}
    (folder / "sweep.json").write_text(json.dumps({"points": points}))
    return folder


def read_adapter(folder: Path) -> None:
    load_adapter(*zoo.ours("llama"), folder, base=model())


@functools.cache
def texts() -> Path:
    folder = zoo.scratch() / "texts"
    folder.mkdir()
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in ("one", "two")))
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 2], "bos_token_id": 0}')
    return folder


TEMPLATE = (
    "{%- for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}{% if m.role == 'assistant' %}</s>{% endif %}"
    "{%- endfor %}{%- if add_generation_prompt %}{{ '<|assistant|>' }}{%- endif %}"
)
CHAT = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}]
PAIRS = [{"prompt": f"w{i} w2", "completion": f"w{i + 1}"} for i in range(6)]


@functools.cache
def tokenizer_folder() -> Path:
    folder = zoo.scratch() / "tokenizer"
    test_export.write_tokenizer(folder, TEMPLATE)
    return folder


@functools.cache
def tokenizer() -> Any:
    return load_tokenizer(str(tokenizer_folder()))


@functools.cache
def rows() -> Path:
    folder = zoo.scratch() / "rows"
    folder.mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    (folder / "rows.json").write_text(json.dumps(PAIRS))
    (folder / "chat.jsonl").write_text("".join(json.dumps({"messages": CHAT}) + "\n" for _ in range(3)))
    (folder / "rows.csv").write_text("prompt,completion\n" + "".join(",".join(row.values()) + "\n" for row in PAIRS))
    (folder / "rows.txt").write_text("w1 w2 w3\n" * 5)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(PAIRS), folder / "rows.parquet")
    (folder / "labels.jsonl").write_text(
        "".join(json.dumps({"text": "w1", "label": "ab"[i % 2]}) + "\n" for i in range(6))
    )
    (folder / "tags.conll").write_text("w1\tO\nw2\tB-x\n\nw3\tO\n\n" * 3)
    (folder / "points.jsonl").write_text('{"optim.lr": 1e-3}\n{"optim.lr": 2e-3, "train.seed": 1}\n')
    (folder / "points.csv").write_text("optim.lr,train.seed\n1e-3,0\n2e-3,1\n")
    return folder


def read_rows(name: str, per_token: bool | None = None) -> Callable[[Path], Any]:
    """A reader of rows, with labels where `per_token` is given."""

    def read(folder: Path) -> None:
        names = ("O", "B-x") if per_token else ("a", "b")
        form = None if per_token is None else LabelForm(per_token, names)
        prepare(tokenizer(), str(folder / name), max_length=32, cache=False, labels=form)

    return read


def read_tokenizer(folder: Path) -> None:
    found = load_tokenizer(str(folder))
    prepare(found, str(rows() / "chat.jsonl"), max_length=64, cache=False)


JINJA = [
    *("{{", "%}", "{% endfor %}", "{{ x.y.z }}", "{{ messages[9] }}", "{{ raise_exception('no') }}", "{% raw %}", "{#"),
    *("{{ 1 / 0 }}", "{{ messages | length }}", "{% include 'x' %}", "{{ ''.__class__ }}", "{{ range(10**9) | list }}"),
    *("{% generation %}x{% endgeneration %}", "{% for a in range(10**6) %}{% endfor %}", "\x1b[31m", "{{ '%c' % -1 }}"),
]


def of_template(data: bytes, rng: random.Random) -> bytes:
    """A piece of Jinja put into a template."""
    at = rng.randrange(len(data) + 1)
    piece = rng.choice(JINJA)
    return data[:at] + piece.encode() + data[at:]


class Eos:
    eos_token_id = 2


# name: (the folder to copy, the file in it to spoil, how, what reads it)
READERS: dict[str, tuple[Callable[[], Path], str, Callable, Callable[[Path], Any]]] = {
    "config.json": (model, "config.json", of_json, jaxtune.load),
    "weights": (model, "model.safetensors", of_header, jaxtune.load),
    "weights' index": (sharded, "model.safetensors.index.json", of_json, jaxtune.load),
    "adapter_config.json": (adapter, "adapter_config.json", of_json, read_adapter),
    "adapter": (adapter, "adapter_model.safetensors", of_header, read_adapter),
    "generation_config.json": (texts, "generation_config.json", of_json, lambda d: named_ids(Eos, d)),
    "prompts": (texts, "prompts.jsonl", of_json, lambda d: read_prompts(d / "prompts.jsonl", True)),
    "run's config": (run, "config.json", of_json, write_report),
    "metrics.jsonl": (run, "metrics.jsonl", of_json, write_report),
    "summary.json": (run, "summary.json", of_json, write_report),
    "samples.jsonl": (run, "samples.jsonl", of_json, write_report),
    "eval.json": (run, "eval.json", of_json, write_report),
    "sweep.json": (sweep, "sweep.json", of_json, write_sweep),
    "member.json": (sweep, "lr=1e-3/member.json", of_json, write_sweep),
    "resumed config": (run, "config.json", of_json, lambda d: config.load_file(str(d / "config.json"))),
    "adapter as model.path": (adapter, "adapter_config.json", of_json, resolve_adapter),
    "labels of an adapter": (label_adapter, "config.json", of_json, resolve_adapter),
    "base.json": (adapter, "base.json", of_json, jaxtune.load),
    "points.jsonl": (rows, "points.jsonl", of_json, lambda d: points.read_points(d / "points.jsonl")),
    "points.csv": (rows, "points.csv", of_bytes, lambda d: points.read_points(d / "points.csv")),
    "chat_template.jinja": (tokenizer_folder, "chat_template.jinja", of_template, read_tokenizer),
    "tokenizer.json": (tokenizer_folder, "tokenizer.json", of_json, read_tokenizer),
    "tokenizer_config.json": (tokenizer_folder, "tokenizer_config.json", of_json, read_tokenizer),
    "rows.jsonl": (rows, "rows.jsonl", of_json, read_rows("rows.jsonl")),
    "rows.json": (rows, "rows.json", of_json, read_rows("rows.json")),
    "chat.jsonl": (rows, "chat.jsonl", of_json, read_rows("chat.jsonl")),
    "rows.csv": (rows, "rows.csv", of_bytes, read_rows("rows.csv")),
    "rows.txt": (rows, "rows.txt", of_bytes, read_rows("rows.txt")),
    "rows.parquet": (rows, "rows.parquet", of_bytes, read_rows("rows.parquet")),
    "labels.jsonl": (rows, "labels.jsonl", of_json, read_rows("labels.jsonl", False)),
    "tags.conll": (rows, "tags.conll", of_bytes, read_rows("tags.conll", True)),
}


def read_mutated(reader: str, seed: int, folder: Path) -> str | None:
    """Read a mutated file; the message, where there is one."""
    source, name, mutate, read = READERS[reader]
    rng = random.Random(f"{reader} {seed}")
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source(), folder)
    data = (folder / name).read_bytes()
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        data = (mutate if rng.randrange(3) else of_bytes)(data, rng)
    (folder / name).write_bytes(data)
    began, said = time.monotonic(), None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            read(folder)
        except UserError as error:
            said = str(error)
    assert time.monotonic() - began < SECONDS
    assert said is None or (said.strip() and len(said) < 6000 and printable(said).encode())
    return said


SKIPPED = {"samples.jsonl"}  # a page is written without the samples that cannot be read


def check(reader: str, examples: int, folder: Path) -> None:
    seen = set()

    @settings(max_examples=examples, database=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(st.integers(0, 2**32))
    def every(seed):
        seen.add(read_mutated(reader, seed, folder))

    every()
    assert len(seen) > 1 or examples < 100 or reader in SKIPPED  # some were refused


@pytest.mark.parametrize("reader", READERS)
def test_a_mutated_file_is_read_or_refused(reader, tmp_path):
    check(reader, 12, tmp_path / "copy")


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS)
def test_many_mutated_files_are_read_or_refused(reader, tmp_path):
    check(reader, 400, tmp_path / "copy")


# ---------------------------------------------------------------------------------------------------- kinds of a file


@pytest.mark.parametrize("kind", ["pipe", "folder", "no permission", "a loop of links"])
@pytest.mark.parametrize("reader", ["config.json", "weights", "adapter_config.json", "summary.json"])
def test_what_is_no_regular_file(reader, kind, tmp_path):
    source, name, _, read = READERS[reader]
    folder = tmp_path / "copy"
    shutil.copytree(source(), folder)
    file = folder / name
    if kind == "no permission":
        if os.geteuid() == 0:
            pytest.skip("root may read everything")
        file.chmod(0)
    else:
        file.unlink()
        {"pipe": os.mkfifo, "folder": os.mkdir, "a loop of links": lambda f: os.symlink(f, f)}[kind](file)
    began = time.monotonic()
    try:
        read(folder)
    except UserError as error:
        assert str(folder) in str(error)
    else:
        assert reader == "summary.json"  # a run need not have one
    assert time.monotonic() - began < SECONDS


@pytest.mark.parametrize("name", ["a" * 5000, "a/" * 3000 + "b", "\x00", "a\x00b", "\ud800", "", " ", "~nobody/x"])
@pytest.mark.parametrize("command", [("generate", "--prompt=x"), ("export", "out"), ("eval",)])
def test_names_that_cannot_be(command, name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert cli.main([command[0], name, *command[1:]]) == 2
    said = capsys.readouterr().err
    assert said.startswith("jaxtune: error: ") and "Traceback" not in said


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
@pytest.mark.parametrize("value", ["2", 2.5, True, {"x": 1}, [1, "2"], [None], [[2]]], ids=str)
def test_ends_of_texts_that_are_no_tokens(value, file, tmp_path, capsys):
    folder = shutil.copytree(model(), tmp_path / "m")
    test_export.write_tokenizer(folder)
    told = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
    (folder / file).write_text(json.dumps(told | {"eos_token_id": value}))
    assert cli.main(["generate", str(folder), "--prompt=w1", "--max-new-tokens=2"]) == 2
    said = capsys.readouterr().err
    assert "eos_token_id=" in said and file in said and "Traceback" not in said


@pytest.mark.security
def test_a_config_that_ends_the_program_is_no_success(tmp_path, capsys):
    (tmp_path / "c.py").write_text("import sys\ndef get_config():\n    sys.exit(0)\n")
    assert cli.main(["train", f"--config={tmp_path / 'c.py'}", f"--workdir={tmp_path / 'w'}"]) == 2
    assert "sys.exit" in capsys.readouterr().err


@pytest.mark.security
def test_messages_hold_no_escapes_for_a_terminal(tmp_path, capsys):
    assert cli.main(["generate", str(tmp_path / "\x1b[31mred"), "--prompt=x"]) == 2
    said = capsys.readouterr().err
    assert "\x1b" not in said and "\\x1b[31mred" in said


@pytest.mark.security
def test_a_header_beyond_all_bounds(tmp_path):
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write((200_000_000).to_bytes(8, "little"))
        file.truncate(300_000_000)  # sparse
    with pytest.raises(UserError, match="200 MB is too large for safetensors"):
        tensors.index_dir(tmp_path)


@pytest.mark.security
@pytest.mark.parametrize(
    "header, message",
    [
        ('{"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}, "b": {"dtype": "U8", "shape": [2], '
         '"data_offsets": [1, 3]}}', "tensors 'a' and 'b' overlap"),
        ('{"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}, "a": {"dtype": "U8", "shape": [2], '
         '"data_offsets": [0, 2]}}', "'a' is there twice"),
        ('{"a": {"dtype": "U8", "shape": [-2], "data_offsets": [2, 0]}}', "is malformed"),
        ('{"a": {"dtype": ["U8"], "shape": [2], "data_offsets": [0, 2]}}', "has dtype"),
        ('{"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 1' + "0" * 5000 + "]}}", "beyond range"),
    ],
    ids=["overlap", "twice", "negative", "dtype", "digits"],
)  # fmt: skip
def test_headers_of_safetensors(header, message, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(8))
    with pytest.raises(UserError, match=message):
        tensors.index_dir(tmp_path)


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"train.batch_size": "1000000000"}, "at most 1,000,000"),
        ({"data.max_length": "1000000000000"}, "at most 10,000,000"),
        ({"optim.warmup": "50", "train.steps": "10"}, "optim.warmup=50 steps are more than train.steps=10"),
    ],
    ids=str,
)
def test_ranges_that_make_no_sense(flags, message):
    with pytest.raises(UserError, match=message):
        config.resolve({"model": {"path": "m"}, "data": {"train": "d"}}, flags)
