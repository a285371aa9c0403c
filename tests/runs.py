"""Whole runs of the command line on a model of two narrow layers: its directory, its data, its commands."""

import json
import multiprocessing
import os
import sys
from multiprocessing.reduction import DupFd
from pathlib import Path

import jax
import numpy as np
import pytest
import small
from safetensors.numpy import save_file

from jaxtune import models
from jaxtune.cli import main
from jaxtune.tree import flatten

REPO = Path(__file__).parent.parent
CONFIG = small.CONFIG | {"vocab_size": 258, "architectures": ["LlamaForCausalLM"], "eos_token_id": 257}
STEPS = 12


def write_model(folder, **changes):
    """An HF directory: config.json, random weights and a tokenizer with one token a byte, "</s>" at the end."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens(["<pad>", "</s>"])
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="<pad>").save_pretrained(folder)
    return write_weights(folder, CONFIG | changes)


def write_weights(folder, config):
    """config.json and random weights."""
    (folder / "config.json").write_text(json.dumps(config))
    module = models.build(config)
    params = jax.tree.map(np.asarray, jax.jit(module.init_params)(jax.random.key(0)))
    leaves = flatten(params)
    tensors = {}
    for t in models.names(module).tensors(module.spec, set(leaves)):
        leaf = leaves[t.path] if t.index is None else leaves[t.path][t.index]
        tensors[t.hf] = np.ascontiguousarray(leaf.T if t.transpose else leaf)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sums(first, last):
    """Rows of 12 to 16 tokens."""
    return [{"prompt": f"{i} and {i + 3} make ", "completion": str(2 * i + 3)} for i in range(first, last)]


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """A folder with model/, train.jsonl and eval.jsonl. Do not change it."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "model").mkdir()
    write_model(folder / "model")
    write_jsonl(folder / "train.jsonl", sums(0, 40))
    write_jsonl(folder / "eval.jsonl", sums(40, 48))
    return folder


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory):
    """Keep tokens, and whatever else a command keeps for the next, in a folder of the session."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXTUNE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        yield


def write_run(home, workdir, **data):
    """The directory of a LoRA run that nobody trained: its adapter is drawn."""
    import zoo

    from jaxtune import config
    from jaxtune.hf.load import load
    from jaxtune.hf.peft import export_adapter

    module, params = load(home / "model")
    overrides = {
        "model": {"path": str(home / "model")},
        "data": {"train": str(home / "train.jsonl"), "cache": False, **data},
    }
    workdir.mkdir()
    (workdir / "config.json").write_text(config.to_json(config.resolve(overrides)))
    (workdir / "metrics.jsonl").write_text('{"step": 1, "train/loss": 2.0}\n')
    tuned = zoo.with_lora(params, jax.random.key(0), r=2)
    facts = {"method": "lora"}
    export_adapter(module, tuned, workdir / "adapter", base=str(home / "model"), facts=facts)
    return workdir


def command(home, workdir, *flags, **settings):
    """`train ...` for the runs here; settings are written with two underscores for a dot, None takes one away."""
    chosen = {
        "model__path": home / "model",
        "data__train": home / "train.jsonl",
        "data__eval": home / "eval.jsonl",
        "tune__lora__r": 2,
        "tune__lora__lora_dropout": 0.1,
        "optim__lr": 0.01,
        "train__steps": STEPS,
        "train__batch_size": 4,
        "train__eval_every": 4,
        "train__save_every": 3,
        "log__every": 1,
        "log__tensorboard": "false",
        "log__progress": "false",
    } | settings
    words = [f"--config.{k.replace('__', '.')}={v}" for k, v in chosen.items() if v is not None]
    return ["train", *words, *([] if workdir is None else [f"--workdir={workdir}"]), *flags]


def start(argv):
    """The command in a process of its own, to be killed: forked from one that has imported what it needs (warm.py).

    It shares the cache and XLA's flags. What it prints is read from `.stdout`.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["warm"])
    ours, its = os.pipe()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(REPO), str(REPO / "tests")]))  # where the server finds it
        process = context.Process(target=_command, args=(argv, dict(os.environ), DupFd(its)))
        process.start()
    os.close(its)
    process.stdout = os.fdopen(ours)
    return process


def _command(argv, env, out):
    os.environ.update(env)
    for stream in (1, 2):
        os.dup2(out.detach() if stream == 1 else 1, stream)
    sys.stdout.reconfigure(line_buffering=True)
    sys.exit(main(argv))


def read(workdir):
    """metrics.jsonl without what the clock decides."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in m.items() if k != "train/tokens_per_second"} for m in lines]


def adapter(workdir):
    """The bytes of the result."""
    return (workdir / "adapter" / "adapter_model.safetensors").read_bytes()


def checkpoints(workdir):
    return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())


def everything(folder):
    """{path: bytes} below a folder; {} where there is none."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
