"""Whole models out, against live transformers; the export command; atomic writes; the model card."""

import json
import os
import shutil
import stat

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import zoo
from safetensors.numpy import load_file
from test_peft_io import TOKENS, shake, tuned
from test_peft_io import our_logits as logits

import jaxtune
from jaxtune import files
from jaxtune.cli import main
from jaxtune.errors import UserError
from jaxtune.evaluate.systems import systems
from jaxtune.hf.card import model_card
from jaxtune.hf.stops import stop_ids
from jaxtune.hf.tensors import index_dir
from jaxtune.infer.source import find, open_source
from jaxtune.methods.table import full, head
from jaxtune.report.card import run_facts
from jaxtune.weights.packed import QuantWeight


def live(folder, **settings):
    """transformers' model of a directory, and what it complained about."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **settings)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


def check(module, params, out):
    """transformers and jaxtune both load `out` and give our logits."""
    expected = logits(module, params)
    assert zoo.apart(zoo.torch_logits(live(out), TOKENS), expected) < 1e-4
    assert zoo.apart(logits(*jaxtune.load(out)), expected) < 1e-5


def has_head(folder):
    return "lm_head.weight" in index_dir(folder)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "gpt2-untied-relu", "qwen2-mixed-windows"])
def test_merged_adapter(name, tmp_path):
    module, params, _ = tuned(name, r=4)
    assert jaxtune.export_model(module, params, tmp_path / "out", base=zoo.directory(name)) == [
        f"No tokenizer was copied: {name} has none."
    ]
    check(module, params, tmp_path / "out")
    before, after = (json.loads((d / "config.json").read_text()) for d in (zoo.directory(name), tmp_path / "out"))
    assert after == {"tie_word_embeddings": module.spec.tied} | before
    assert has_head(tmp_path / "out") != module.spec.tied


@pytest.mark.parametrize("name", ["qwen3", "gpt2"])
def test_full_weights_keep_a_tied_head_tied(name, tmp_path):
    module, params = zoo.ours(name)
    params = shake(*full(params))
    jaxtune.export_model(module, params, tmp_path / "out", base=zoo.directory(name))
    assert not has_head(tmp_path / "out")
    check(module, params, tmp_path / "out")


@pytest.mark.parametrize("name", ["qwen3", "gpt2"])
def test_head_that_was_trained_apart_is_untied(name, tmp_path):
    module, params = zoo.ours(name)
    params = shake(*head(params))
    notes = jaxtune.export_model(module, params, tmp_path / "out", base=zoo.directory(name))
    assert "it was trained" in notes[0]
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False
    check(module, params, tmp_path / "out")


@pytest.mark.parametrize("name, table", [("qwen3", "embed_tokens"), ("gpt2", "wte")])
def test_adapted_embedding_unties_the_head(name, table, tmp_path):
    module, params, _ = tuned(name, r=4, target_modules=(table,))
    notes = jaxtune.export_model(module, params, tmp_path / "out", base=zoo.directory(name))
    assert "the embedding was adapted" in notes[0]
    assert notes[0] in (tmp_path / "out/README.md").read_text()
    check(module, params, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("asked, expected", [(None, "bfloat16"), ("float32", "float32"), ("float16", "float16")])
def test_merged_in_float32_and_cast_once_to_the_bases_dtype(asked, expected, tmp_path):
    zoo.build("llama").bfloat16().save_pretrained(tmp_path / "base")
    module, params = jaxtune.load(tmp_path / "base")
    params, mask = jaxtune.methods.table.lora(params, jax.random.key(0), r=2, module=module)
    params = shake(params, mask)
    jaxtune.export_model(module, params, tmp_path / "out", base=tmp_path / "base", dtype=asked)
    stored = load_file(tmp_path / "out/model.safetensors")
    assert {v.dtype.name for v in stored.values()} == {expected}
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["dtype"] == expected and "torch_dtype" not in config
    leaf = params["segment_0"]["block_0"]["self_attn"]["q_proj"]["kernel"]
    w, a, b, s = (np.asarray(x[1], np.float64) for x in (leaf.w, leaf.a, leaf.b, leaf.scale))
    got = np.asarray(stored["model.layers.1.self_attn.q_proj.weight"], np.float64)
    exact = (w + s * a @ b).T
    rounding = {"bfloat16": 2**-8, "float16": 2**-11, "float32": 2**-22}[expected]
    assert np.all(np.abs(got - exact) <= 1.001 * rounding * np.abs(exact) + 1e-6)


def test_new_head_gets_the_bases_dtype(tmp_path):
    zoo.build("qwen3").bfloat16().save_pretrained(tmp_path / "base")
    module, params = jaxtune.load(tmp_path / "base")
    jaxtune.export_model(module, head(params)[0], tmp_path / "out", base=tmp_path / "base")
    assert {e.dtype.name for e in index_dir(tmp_path / "out").values()} == {"bfloat16"}


def test_new_head_is_not_of_integers_where_the_base_has_a_buffer_of_them(tmp_path):
    import torch
    from safetensors import torch as safetensors

    zoo.build("qwen3").bfloat16().save_pretrained(tmp_path / "base")
    module, params = jaxtune.load(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    safetensors.save_file(safetensors.load_file(file) | {"model.position_ids": torch.arange(8)}, file)
    assert next(iter(index_dir(tmp_path / "base").values())).dtype == np.int64  # wider types come first in a file
    jaxtune.export_model(module, head(params)[0], tmp_path / "out", base=tmp_path / "base")
    assert {e.dtype.name for e in index_dir(tmp_path / "out").values()} == {"bfloat16"}


def test_without_the_bases_weights_the_dtypes_are_the_trees(tmp_path):
    module, params = zoo.ours("llama")
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    jaxtune.export_model(module, half, tmp_path / "out", base=tmp_path / "nowhere")
    assert {e.dtype.name for e in index_dir(tmp_path / "out").values()} == {"bfloat16"}


def test_quantised_base_is_written_plain(tmp_path):
    module, params, _ = tuned("llama", r=2, target_modules=("q_proj",))
    leaf = params["segment_0"]["block_0"]["self_attn"]["q_proj"]["kernel"]
    leaf.w = QuantWeight.quantize(leaf.w)
    jaxtune.export_model(module, params, tmp_path / "out", base=zoo.directory("llama"))
    check(module, params, tmp_path / "out")


def test_shards_with_an_index(tmp_path):
    module, params, _ = tuned("llama", r=2)
    jaxtune.export_model(module, params, tmp_path / "out", base=zoo.directory("llama"), shard_bytes=20_000)
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 2
    check(module, params, tmp_path / "out")


def write_tokenizer(folder, template=None):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(90)} | {"<unk>": 90, "</s>": 91}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)


@pytest.fixture
def base(tmp_path):
    """A base with everything that travels with a model."""
    folder = tmp_path / "tiny-base"
    shutil.copytree(zoo.directory("llama"), folder)
    write_tokenizer(folder, "{{ messages[0].content }} old")
    (folder / "generation_config.json").write_text('{"eos_token_id": 91, "max_new_tokens": 7}')
    return folder


def test_what_travels_with_a_model(base, tmp_path):
    from transformers import AutoTokenizer

    module, params, mask = tuned("llama", r=2)
    assert jaxtune.export_model(module, params, tmp_path / "model", base=base) == []
    jaxtune.export_adapter(
        module, params, tmp_path / "adapter", base=base, mask=mask, chat_template="{{ messages[0].content }} new"
    )
    assert live(tmp_path / "model").generation_config.max_new_tokens == 7
    for name, text in {"model": "w1 old", "adapter": "w1 new"}.items():
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / name)
        assert tokenizer("w3 w4").input_ids == [3, 4]
        assert tokenizer.apply_chat_template([{"role": "user", "content": "w1"}], tokenize=False) == text
    assert not (tmp_path / "adapter/generation_config.json").exists()


def test_tokens_that_end_trained_turns_are_stops_of_what_is_exported(base, tmp_path):
    module, params, mask = tuned("llama", r=2)
    jaxtune.export_model(module, params, tmp_path / "model", base=base, ends=[5, 91])
    config = live(tmp_path / "model").generation_config
    assert (config.eos_token_id, config.max_new_tokens) == ([5, 91], 7)
    jaxtune.export_adapter(module, params, tmp_path / "adapter", base=base, mask=mask, ends=[91])
    assert not (tmp_path / "adapter/generation_config.json").exists()
    jaxtune.export_adapter(module, params, tmp_path / "more", base="a/hub-id", base_folder=base, mask=mask, ends=[5])
    assert stop_ids(tmp_path / "more") == {5, 91}
    (base / "generation_config.json").unlink()  # then config.json says where transformers stops
    told = json.loads((base / "config.json").read_text()) | {"eos_token_id": 91, "pad_token_id": 0}
    (base / "config.json").write_text(json.dumps(told))
    jaxtune.export_model(module, params, tmp_path / "as-before", base=base, ends=[91])
    assert not (tmp_path / "as-before/generation_config.json").exists()
    jaxtune.export_model(module, params, tmp_path / "without", base=base, ends=[5])
    config = live(tmp_path / "without").generation_config
    assert (config.eos_token_id, config.pad_token_id) == ([5, 91], 0)


# ------------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def run(base, tmp_path):
    """A run directory as `jaxtune train` leaves it: (folder, module, params)."""
    module, params, mask = tuned("llama", r=2)
    folder = tmp_path / "run"
    folder.mkdir()
    jaxtune.export_adapter(module, params, folder / "adapter", base=base, mask=mask)
    from jaxtune import config

    resolved = config.resolve(
        {
            "model": {"path": str(base)},
            "data": {"train": "rows.jsonl"},
            "tune": {"lora": {"r": 2}},
            "train": {"steps": 9},
        }
    )
    (folder / "config.json").write_text(config.to_json(resolved, {"jax": "1.2.3"}))
    records = [{"step": 1, "train/loss": 4.0}, {"step": 9, "train/loss": 2.5}, {"step": 9, "eval/loss": 2.75}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records) + '{"step": 10, "tr')
    return folder, module, params


def test_export_merges_a_run(run, tmp_path, capsys):
    folder, module, params = run
    assert main(["export", str(folder), str(tmp_path / "out")]) == 0
    check(module, params, tmp_path / "out")
    text = (tmp_path / "out/README.md").read_text()
    for fact in ("rows.jsonl", "4.0000 (step 1) to 2.5000 (step 9)", "2.7500 (step 9)", "jax 1.2.3", "| r | 2 |"):
        assert fact in text
    assert "version of `tiny-base`" in text and str(tmp_path) not in text  # whose folders are nobody's business
    assert (tmp_path / "out/tokenizer.json").exists()
    # Refuses what is there, whatever the source.
    assert main(["export", str(folder), str(tmp_path / "out")]) == 2
    assert "exists" in capsys.readouterr().err


def test_a_run_over_a_quantised_base(run, base, tmp_path, capsys):
    """Its adapter was trained over rounded numbers: over these it is used, and into these it is merged."""
    folder, module, _ = run
    config = json.loads((folder / "config.json").read_text())
    config["model"]["quantization"] = "nf4"
    (folder / "config.json").write_text(json.dumps(config))
    _, params, _ = open_source(find(folder))
    _, packed = jaxtune.load(base, quantization="nf4")
    _, plain = jaxtune.load(base)
    got = params["segment_0"]["block_0"]["self_attn"]["q_proj"]["kernel"]
    assert np.array_equal(got.w.codes, packed["segment_0"]["block_0"]["self_attn"]["q_proj"]["kernel"].codes)

    assert main(["export", str(folder), str(tmp_path / "out")]) == 0
    check(module, params, tmp_path / "out")
    body, rounded = (jax.tree.leaves(tree["segment_0"]) for tree in (plain, jaxtune.merge(packed)))
    pairs = [(a, b) for a, b in zip(body, rounded, strict=True) if a.ndim == 3]
    lost, all_ = (sum(np.square(x).sum() for x in part) for part in ([a - b for a, b in pairs], [a for a, _ in pairs]))
    assert f"differ from the published matrices by {(lost / all_) ** 0.5:.2%}" in capsys.readouterr().out
    assert main(["export", str(folder), str(tmp_path / "alone"), "--adapter"]) == 0
    assert "nf4" not in capsys.readouterr().out

    compared = {system.name: system for system in systems(find(folder))}
    config["model"]["quantization"] = "none"
    (folder / "config.json").write_text(json.dumps(config))
    for system in systems(find(folder)):
        assert system.identity != compared[system.name].identity


def test_export_of_an_adapter_alone(run, tmp_path):
    folder, _, _ = run
    assert main(["export", str(folder), str(tmp_path / "out"), "--adapter"]) == 0
    assert main(["export", str(folder / "adapter"), str(tmp_path / "out2"), "--adapter"]) == 0
    for out in ("out", "out2"):
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            assert (tmp_path / out / name).read_bytes() == (folder / "adapter" / name).read_bytes()


def test_export_casts_a_model(base, tmp_path):
    assert main(["export", str(base), str(tmp_path / "out"), "--dtype=bfloat16"]) == 0
    assert {e.dtype.name for e in index_dir(tmp_path / "out").values()} == {"bfloat16"}
    assert live(tmp_path / "out").dtype.is_floating_point


def test_export_of_a_run_of_full_weights(base, run, tmp_path):
    folder, module, _ = run
    shutil.rmtree(folder / "adapter")
    params = shake(*full(zoo.ours("llama")[1]))
    jaxtune.export_model(module, params, folder / "model", base=base)
    shutil.rmtree(base)  # no longer needed
    assert main(["export", str(folder), str(tmp_path / "out")]) == 0
    check(module, params, tmp_path / "out")
    assert f"`{base.name}`" in (tmp_path / "out/README.md").read_text()


def test_export_to_another_base_needs_saying(run, base, tmp_path, capsys):
    folder, module, params = run
    shutil.copytree(base, tmp_path / "elsewhere")
    command = ["export", str(folder / "adapter"), str(tmp_path / "out"), f"--base={tmp_path / 'elsewhere'}"]
    assert main(command) == 2
    assert "other base" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert main([*command, "--allow-other-base"]) == 0
    check(module, params, tmp_path / "out")


@pytest.mark.parametrize(
    "spoil, arguments, message",
    [
        (None, ["--merge", "--adapter"], "exclude each other"),
        (None, ["--adapter", "--dtype=bfloat16"], "no effect"),
        (None, ["--dtype=int8"], "choose from"),
        (lambda run: shutil.rmtree(run / "adapter"), [], "no result yet"),
        (lambda run: (run / "config.json").unlink(), [], "neither a run"),
        (lambda run: (run / "adapter/adapter_model.safetensors").unlink(), [], "no weights"),
        (lambda run: shutil.rmtree(run.parent / "tiny-base"), [], "--base"),
    ],
)
def test_bad_input(run, tmp_path, capsys, spoil, arguments, message):
    if spoil:
        spoil(run[0])
    assert main(["export", str(run[0]), str(tmp_path / "out"), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_whole_model_takes_no_adapter_flags(base, tmp_path, capsys):
    for flag in ("--merge", "--adapter"):
        assert main(["export", str(base), str(tmp_path / "out"), flag]) == 2
        assert "whole model" in capsys.readouterr().err
    with pytest.raises(UserError, match="belongs to an adapter"):
        find(base, base)


# ------------------------------------------------------------------------------------------------------ atomic writes


def test_a_failed_write_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), files.atomic_dir(tmp_path / "deep/out") as folder:
        (folder / "half").write_text("x")
        raise RuntimeError
    assert list((tmp_path / "deep").iterdir()) == []


def test_a_failed_replacement_leaves_the_old(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/old").write_text("x")
    with pytest.raises(RuntimeError), files.atomic_dir(tmp_path / "out", overwrite=True) as folder:
        (folder / "new").write_text("y")
        raise RuntimeError
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["old"]


@pytest.mark.parametrize("one_step", [True, False], ids=["exchange", "two renames"])
def test_replacement(tmp_path, monkeypatch, one_step):
    if not one_step:
        monkeypatch.setattr(files, "_exchange", lambda a, b: False)
    (tmp_path / ".out.0123.tmp").mkdir()  # left by a killed writer
    for name in ("first", "second"):
        with files.atomic_dir(tmp_path / "out", overwrite=True) as folder:
            (folder / name).write_text(name)
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")] == ["out", "out/second"]


def test_exchange_swaps_in_one_step(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text(name)
    if not files._exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this file system cannot exchange two names")
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b"]


def test_targets_that_are_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").write_text("x")
    for name in ("file", "full"):
        with pytest.raises(UserError, match="exists"), files.atomic_dir(tmp_path / name):
            pass
    with pytest.raises(UserError, match="cannot be written"), files.atomic_dir(tmp_path / "file/out"):
        pass
    (tmp_path / "empty").mkdir()
    with files.atomic_dir(tmp_path / "empty") as folder:
        (folder / "x").write_text("x")
    assert (tmp_path / "empty/x").exists()


def test_a_full_disk(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="No room"):
        files.require_space(tmp_path, 10**18)

    def full_disk(*args, **kwargs):
        raise OSError(28, os.strerror(28))

    module, params = zoo.ours("llama")
    monkeypatch.setattr("jaxtune.hf.export.hf_tensor", full_disk)
    with pytest.raises(UserError, match="No room"):
        jaxtune.export_model(module, params, tmp_path / "out", base=zoo.directory("llama"))
    assert list(tmp_path.iterdir()) == []


def test_weights_are_as_readable_as_the_folder(tmp_path):
    module, params = zoo.ours("llama")
    jaxtune.export_model(module, params, tmp_path / "out", base=zoo.directory("llama"))
    mode = stat.S_IMODE((tmp_path / "out/model.safetensors").stat().st_mode)
    assert mode == stat.S_IMODE((tmp_path / "out").stat().st_mode) & 0o666


def test_text_is_replaced_whole(tmp_path):
    files.atomic_write_text(tmp_path / "a", "one")
    files.atomic_write_text(tmp_path / "a", "zwei ü")
    assert (tmp_path / "a").read_text(encoding="utf-8") == "zwei ü"
    assert len(list(tmp_path.iterdir())) == 1


# ----------------------------------------------------------------------------------------------------- the model card


def test_card_has_front_matter_that_the_hub_reads():
    from huggingface_hub import ModelCard

    facts = {"data": ("a|b.jsonl", "c"), "loss": 0.123456789, "best": {"step": 3, "loss": 1.5}}
    card = ModelCard(model_card(name="x", base="org/model", adapter="lora", facts=facts, notes=["A note."]))
    assert card.data.base_model == "org/model" and card.data.library_name == "peft" and "jaxtune" in card.data.tags
    assert r"| data | a\|b.jsonl, c |" in card.text and "| loss | 0.123457 |" in card.text
    assert "| best | step 3, loss 1.5 |" in card.text and "A note." in card.text
    assert "peft" not in model_card(name="x", base="org/model", adapter=None)


def test_facts_of_a_full_run_without_held_out_data():
    from jaxtune import config

    cfg = config.resolve({"model": {"path": "m"}, "data": {"train": "d"}, "tune": {"method": "full"}})
    facts = run_facts(json.loads(config.to_json(cfg)), [], {"trainable": 1000, "all": 2000})
    assert facts["held-out data"] == "none" and "r" not in facts
    assert facts["trained"] == "50% (1,000 of 2,000 parameters)"
    assert any(v.startswith("jax ") for v in facts["versions"])


# ------------------------------------------------------------------------------------------------------------ security


@pytest.mark.security
def test_links_out_of_a_model_are_not_followed(base, tmp_path):
    (tmp_path / "secret").write_text("key")
    (base / "vocab.json").symlink_to(tmp_path / "secret")
    (base / "merges.txt").symlink_to(base / "config.json")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates/x.jinja").symlink_to(tmp_path / "secret")
    module, params = zoo.ours("llama")
    notes = jaxtune.export_model(module, params, tmp_path / "out", base=base)
    assert len([note for note in notes if "is a link to a file outside" in note]) == 2
    assert not any(f.read_text() == "key" for f in (tmp_path / "out").rglob("*.j*") if f.is_file())
    assert (tmp_path / "out/merges.txt").is_file() and (tmp_path / "out/tokenizer.json").is_file()


@pytest.mark.security
def test_a_generation_config_that_is_a_link_to_elsewhere_is_not_copied(base, tmp_path):
    """Its stops are read, as transformers would; nothing else of it."""
    (tmp_path / "secret").write_text('{"eos_token_id": 5, "key": "secret"}')
    (base / "generation_config.json").unlink()
    (base / "generation_config.json").symlink_to(tmp_path / "secret")
    module, params = zoo.ours("llama")
    notes = jaxtune.export_model(module, params, tmp_path / "out", base=base)
    assert [note for note in notes if note.startswith("generation_config.json is a link to a file outside")]
    assert not (tmp_path / "out/generation_config.json").exists()
    jaxtune.export_model(module, params, tmp_path / "again", base=base, ends=[7])
    written = json.loads((tmp_path / "again/generation_config.json").read_text())
    assert written["eos_token_id"] == [5, 7] and "key" not in written


@pytest.mark.security
def test_links_of_the_hubs_cache_are(base, tmp_path):
    blobs, snapshot = tmp_path / "models--o--n/blobs", tmp_path / "models--o--n/snapshots/abc"
    shutil.copytree(base, blobs)
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    module, params = zoo.ours("llama")
    assert jaxtune.export_model(module, params, tmp_path / "out", base=snapshot) == []
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


@pytest.mark.security
@pytest.mark.parametrize("kind", ["a full folder", "a file", "nowhere", "itself"])
@pytest.mark.parametrize("name", ["link", "link.gguf"])
def test_links_that_nothing_is_written_through(kind, name, base, tmp_path, capsys):
    precious, link = tmp_path / "precious", tmp_path / name
    if kind == "a full folder":
        precious.mkdir()
        (precious / "a").write_text("kept")
    elif kind == "a file":
        precious.write_text("kept")
    link.symlink_to(link if kind == "itself" else precious)
    assert main(["export", str(base), str(link)]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said and said.count("jaxtune: error: ") == 1 and name in said
    assert link.is_symlink() and precious.exists() == (kind not in ("nowhere", "itself"))
    assert (precious / "a" if precious.is_dir() else precious).read_text() == "kept" if precious.exists() else True


def test_a_link_to_an_empty_folder_is_written_into(base, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert main(["export", str(base), str(tmp_path / "link")]) == 0
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real/model.safetensors").is_file()


@pytest.mark.filterwarnings("ignore")
def test_new_tokens_get_rows(base, tmp_path, capsys):
    from transformers import AutoTokenizer

    names = [f"<new{i}>" for i in range(6)]  # the tokenizer has 92, the table 96
    assert main(["export", str(base), str(tmp_path / "out"), f"--new-tokens={','.join(names)}"]) == 0
    assert "trainable_token_indices=92,93,94,95,96,97" in capsys.readouterr().out
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("w1 <new5>").input_ids == [1, 97]
    tokens = zoo.tokens(2, 7)
    want = zoo.torch_logits(live(base), tokens)
    got = zoo.torch_logits(live(tmp_path / "out"), tokens)
    assert got.shape[-1] == 98 and zoo.apart(got[..., :96], want) < 1e-5
    assert main(["export", str(base), str(tmp_path / "again"), "--new-tokens=w1"]) == 2
    assert "'w1' is a token already" in capsys.readouterr().err
