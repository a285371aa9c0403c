"""HF directories in: every layout that holds the same numbers gives the same tree; every other is refused by name."""

import dataclasses
import json
import re
import shlex
import shutil
import struct
import time

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import zoo
from safetensors.numpy import load_file, save_file

from jaxtune import models
from jaxtune.errors import UserError
from jaxtune.hf import load as hf_load
from jaxtune.hf import tensors
from jaxtune.hf.load import UNWANTED, WANTED, load, resolve
from jaxtune.models.spec import Config
from jaxtune.tree import flatten


@pytest.fixture
def folder(tmp_path):
    """A copy of a zoo model's directory to damage."""
    return shutil.copytree(zoo.directory("llama"), tmp_path / "model")


def rewrite(folder, change, file="model.safetensors"):
    """Pass the tensors of a directory through `change`."""
    arrays = load_file(folder / file)
    save_file(change(arrays), folder / file, metadata={"format": "pt"})


def same_tree(got, want):
    got, want = flatten(got), flatten(want)
    assert got.keys() == want.keys()
    for path, leaf in want.items():
        assert np.array_equal(got[path], leaf), path
        assert got[path].dtype == leaf.dtype, path


# --- layouts


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_one_file_and_many_give_the_same_tree(name, tmp_path):
    zoo.model(name).save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert not (tmp_path / "model.safetensors").exists()
    same_tree(load(tmp_path)[1], zoo.ours(name)[1])


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_a_device_that_is_no_cpu_is_given_the_same_tree(name, monkeypatch):
    """There each layer is laid and put into its stack on the device; here the CPU is that device."""
    used = []
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(hf_load, "_in_place", lambda sources, *args: used.append(len(sources)) or {})
    _, params = load(zoo.directory(name))
    assert used == [0]
    monkeypatch.undo()
    same_tree(params, zoo.ours(name)[1])


def test_every_tensor_lands_in_its_layer_and_orientation():
    module, params = zoo.ours("llama")
    torch_state = zoo.model("llama").state_dict()
    for i in range(3):
        want = torch_state[f"model.layers.{i}.mlp.up_proj.weight"].numpy().T
        assert np.array_equal(params["segment_0"]["block_0"]["mlp"]["up_proj"]["kernel"][i], want)
    assert np.array_equal(params["lm_head"]["kernel"], torch_state["lm_head.weight"].numpy().T)
    assert module.spec.layers == 3


def test_bfloat16_checkpoints_keep_their_type_unless_asked(tmp_path):
    import torch

    zoo.build("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), zoo.ours("llama")[1])
    same_tree(load(tmp_path)[1], rounded)
    same_tree(load(tmp_path, param_dtype=jnp.float32)[1], jax.tree.map(lambda x: x.astype(jnp.float32), rounded))
    module, params = load(tmp_path, dtype=jnp.bfloat16)
    assert module.apply({"params": params}, zoo.tokens(1, 4), method="hidden").dtype == jnp.bfloat16


def test_layers_stored_in_two_types_are_stacked_in_the_wider(folder):
    name = "model.layers.0.mlp.up_proj.weight"
    rewrite(folder, lambda t: t | {name: t[name].astype(ml_dtypes.bfloat16)})
    leaf = load(folder)[1]["segment_0"]["block_0"]["mlp"]["up_proj"]["kernel"]
    want = zoo.ours("llama")[1]["segment_0"]["block_0"]["mlp"]["up_proj"]["kernel"]
    assert leaf.dtype == jnp.float32
    assert np.array_equal(leaf[1:], want[1:])
    assert np.array_equal(leaf[0], want[0].astype(jnp.bfloat16).astype(jnp.float32))


@pytest.mark.parametrize("name, body", [("gpt2", "transformer"), ("qwen3", "model")])
def test_checkpoints_of_the_bare_body_lack_the_prefix(name, body, tmp_path):
    getattr(zoo.model(name), body).save_pretrained(tmp_path)
    assert not any(key.startswith(body + ".") for key in load_file(tmp_path / "model.safetensors"))
    same_tree(load(tmp_path)[1], zoo.ours(name)[1])


def test_a_redundant_head_of_a_tied_model_is_passed_over(tmp_path):
    folder = shutil.copytree(zoo.directory("qwen2"), tmp_path / "model")
    rewrite(folder, lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"].copy()})
    _, params = load(folder)
    assert "lm_head" not in params
    same_tree(params, zoo.ours("qwen2")[1])


def test_buffers_of_old_checkpoints_are_passed_over(folder, tmp_path):
    rewrite(folder, lambda t: t | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)})
    same_tree(load(folder)[1], zoo.ours("llama")[1])
    gpt2 = shutil.copytree(zoo.directory("gpt2"), tmp_path / "gpt2")
    rewrite(gpt2, lambda t: t | {"transformer.h.0.attn.bias": np.ones((1, 1, 64, 64), np.bool_)})
    same_tree(load(gpt2)[1], zoo.ours("gpt2")[1])


@pytest.mark.parametrize("shard_bytes", [10**9, 100])
def test_what_we_write_the_safetensors_library_reads(shard_bytes, tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        "a": rng.normal(size=(3, 4)).astype(np.float32).T,
        "b": rng.normal(size=7).astype(ml_dtypes.bfloat16),
        "c": np.arange(6, dtype=np.int64),
        "empty": np.zeros((0, 3), np.float32),
    }
    tensors.write(tmp_path, arrays, shard_bytes=shard_bytes)
    files = list(tmp_path.glob("*.safetensors"))
    assert len(files) == (1 if shard_bytes > 100 else 2)
    theirs = {k: v for f in files for k, v in load_file(f).items()}
    ours = {k: tensors.read(e) for k, e in tensors.index_dir(tmp_path).items()}
    for found in (theirs, ours):
        assert found.keys() == arrays.keys()
        assert all(np.array_equal(found[k], v) and found[k].dtype == v.dtype for k, v in arrays.items())


def test_what_is_made_while_it_is_written_gives_the_bytes_of_the_safetensors_library(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {"b": rng.normal(size=(3, 4)).astype(np.float32), "é": np.float32(3)[None], "none": np.zeros((0, 3), "f4")}
    arrays |= {"a": rng.normal(size=(2, 5)).astype(ml_dtypes.bfloat16), "i": np.arange(6, dtype=np.int64)}
    made = {k: tensors.Made(v.dtype, v.shape, lambda v=v: v) for k, v in arrays.items()}
    tensors.write(tmp_path, made)
    save_file(arrays, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "theirs").read_bytes()


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize(
    "part",
    [np.s_[2:5, :, :], np.s_[:, 3:7, :], np.s_[1:6, :, 2:3], np.s_[:, :, :], np.s_[2:2, 0:3, :], np.s_[3:7, 5:5, :]],
)
def test_a_part_of_a_tensor_is_read_in_few_bytes(dtype, part, tmp_path, monkeypatch):
    array = np.random.default_rng(0).normal(size=(7, 9, 4)).astype(dtype)
    tensors.write(tmp_path, {"w": array})
    [entry] = tensors.index_dir(tmp_path).values()
    real, sizes = tensors.read, []
    monkeypatch.setattr(tensors, "read", lambda entry, out=None: sizes.append(entry.nbytes) or real(entry, out))
    found = tensors.read_part(entry, part, block=2 * array[0].nbytes)
    assert found.dtype == dtype and np.array_equal(found, array[part])
    assert sum(sizes) == array[part[0]].nbytes if found.size else sum(sizes) <= array[part[0]].nbytes
    if part[1:] != np.s_[:, :]:
        assert max(sizes, default=0) <= 2 * array[0].nbytes


# --- weights that do not fit


def test_all_that_does_not_fit_is_listed_at_once(folder):
    def damage(t):
        t = dict(t)
        t["model.norm.wait"] = t.pop("model.norm.weight")
        t["model.layers.1.mlp.up_proj.weight"] = np.zeros((48, 31), np.float32)
        t["model.layers.0.self_attn.q_proj.bias"] = np.zeros(64, np.float32)
        t["model.layers.2.mlp.down_proj.weight"] = t["model.layers.2.mlp.down_proj.weight"].astype(np.int8)
        return t

    rewrite(folder, damage)
    with pytest.raises(UserError) as e:
        load(folder)
    lines = str(e.value).splitlines()
    assert str(folder) in lines[0]
    assert {" ".join(line.split()) for line in lines[1:]} == {
        "missing model.norm.weight [32]",
        "extra model.norm.wait [32]",
        "misshapen model.layers.1.mlp.up_proj.weight [48, 31], expected [48, 32]",
        "extra model.layers.0.self_attn.q_proj.bias [64]",
        "quantised model.layers.2.mlp.down_proj.weight int8, expected floating point",
    }


def test_a_long_list_is_cut(folder):
    rewrite(folder, lambda t: {k: v for k, v in t.items() if ".layers." not in k})
    with pytest.raises(UserError, match="and 7 more"):  # 3 layers of 9 tensors
        load(folder)


def test_a_deeper_checkpoint_than_the_config_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))
    with pytest.raises(UserError, match=r"extra +model\.layers\.2\."):
        load(folder)


def test_an_untied_model_without_its_head_is_refused(folder):
    rewrite(folder, lambda t: {k: v for k, v in t.items() if k != "lm_head.weight"})
    with pytest.raises(UserError, match=r"missing +lm_head\.weight \[96, 32\]"):
        load(folder)


# --- files that are not what they should be


@pytest.mark.security
def test_pickles_are_never_read_and_the_command_that_converts_them_works(tmp_path):
    import torch

    zoo.config("qwen3").save_pretrained(tmp_path / "old")
    torch.save(zoo.model("qwen3").state_dict(), tmp_path / "old" / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pickle \(pytorch_model\.bin\), which can run code") as e:
        load(tmp_path / "old")
    python, flag, code = shlex.split(re.search(r"python -c .*", str(e.value)).group())
    assert (python, flag) == ("python", "-c")
    exec(code, {})
    same_tree(load(tmp_path / "old-safetensors")[1], zoo.ours("qwen3")[1])


def test_a_directory_without_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"holds no weights: neither model\.safetensors nor model\.safetensors\.index"):
        load(folder)


def test_a_missing_shard_is_named(tmp_path):
    zoo.model("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    gone = sorted(tmp_path.glob("model-*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(UserError, match=rf"1 missing shard\(s\): {gone.name}"):
        load(tmp_path)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_file_cut_short_is_refused(folder, keep):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"model\.safetensors is .*cut short.*Fetch it again"):
        load(folder)


def test_a_file_that_shrinks_while_it_is_read_is_refused(folder):
    file = folder / "model.safetensors"
    entry = list(tensors.index(file).values())[-1]
    file.write_bytes(file.read_bytes()[: entry.offset + 4])
    with pytest.raises(UserError, match="became shorter"):
        tensors.read(entry)


def write_raw(file, header, body=b"\0" * 16):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + body)


F32 = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
HEADERS = {
    "no json": (b"\x80\x02}q\x00.", "its header is no JSON"),
    "no object": ([1], "its header is no JSON object"),
    "no offsets": ({"w": {"dtype": "F32", "shape": [4]}}, "entry for tensor 'w' is malformed"),
    "unknown dtype": ({"w": F32 | {"dtype": "F4"}}, "tensor 'w' has dtype F4, which is not supported"),
    "beyond the end": ({"w": F32 | {"shape": [8], "data_offsets": [0, 32]}}, "cut short: tensor 'w'"),
    "another size": ({"w": F32 | {"shape": [3, 2]}}, r"'w' is F32\[3, 2\] but takes 16 bytes"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_malformed_headers_are_refused(case, tmp_path):
    header, message = HEADERS[case]
    write_raw(tmp_path / "model.safetensors", header)
    with pytest.raises(UserError, match=message):
        tensors.index_dir(tmp_path)


def test_a_well_formed_header_is_read(tmp_path):
    body = np.arange(4, dtype="<f4").tobytes()
    write_raw(tmp_path / "model.safetensors", {"w": F32, "__metadata__": {"format": "pt"}}, body)
    (entry,) = tensors.index_dir(tmp_path).values()
    assert np.array_equal(tensors.read(entry), [[0, 1], [2, 3]])


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"a": 1,\n "b" 2}', r"config\.json:2: not valid JSON"),
        ("[1, 2]", r"config\.json holds a list, expected a JSON object"),
        (b"\xff\xfe\x00", r"config\.json is not a text file"),
    ],
)
def test_a_malformed_config_is_named_with_its_line(folder, text, message):
    (folder / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message):
        load(folder)


@pytest.mark.parametrize("text, message", [("{", "not valid JSON"), ("{}", "has no 'weight_map'")])
def test_a_malformed_index_is_named(folder, text, message):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UserError, match=rf"model\.safetensors\.index\.json.*{message}"):
        load(folder)


def test_unsupported_families_are_refused_before_the_weights_are_looked_at(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "model.safetensors").unlink()
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "qwen"}))
    message = r"model_type='qwen' is not supported.*nearest supported architecture is 'qwen[23]'"
    with pytest.raises(UserError, match=message):
        load(folder)


# --- paths and hub ids


def test_paths_that_are_no_model(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: pytest.fail("asked the hub"))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file; give the directory"):
        load(tmp_path / "file")
    with pytest.raises(UserError, match=r"it has no config\.json"):
        load(tmp_path)
    for absent in (tmp_path / "none", "./runs/model", "~/no-such-model", "a/b/c", "gpt2"):
        with pytest.raises(UserError, match=r"does not exist \(looked in"):
            load(absent)


@pytest.mark.security
def test_a_hub_id_is_downloaded_without_pickles_or_code(monkeypatch):
    asked = {}

    def snapshot_download(repo, **settings):
        asked.update(settings, repo=repo)
        return str(zoo.directory("llama"))

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    same_tree(load("someone/llama")[1], zoo.ours("llama")[1])
    assert asked["repo"] == "someone/llama"
    assert not any("bin" in p or ".py" in p or p == "*" for p in asked["allow_patterns"])


def hub_errors():
    from huggingface_hub import errors

    class NotFound(errors.RepositoryNotFoundError):
        def __init__(self):  # the real one wants an HTTP response
            pass

    return [
        errors.LocalEntryNotFoundError("no snapshot"),
        errors.OfflineModeIsEnabled("offline"),
        NotFound(),
        OSError(28, "No space left on device"),
    ]


@pytest.mark.parametrize("case", range(4))
def test_a_hub_that_does_not_answer_is_one_message(case, monkeypatch):
    error = hub_errors()[case]

    def snapshot_download(*args, **kwargs):
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(UserError, match="'no-one/no-model' is neither a directory nor a model on the hub"):
        resolve("no-one/no-model")


def test_an_offline_hub_answers_at_once(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    start = time.perf_counter()
    with pytest.raises(UserError, match="neither a directory nor a model on the hub"):
        resolve("no-one/no-model")
    assert time.perf_counter() - start < 5


def test_a_name_that_the_hub_cannot_have(tmp_path):
    with pytest.raises(UserError, match="'my models/llama 3' is neither a directory nor a model"):
        resolve("my models/llama 3")


# --------------------------------------------------------------------------------- what transformers makes of a folder


def logits_of(folder):
    module, params = load(folder)
    return module.apply({"params": params}, zoo.tokens(2, 9))


def theirs_of(folder):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype="float32").eval()
    return zoo.torch_logits(model, zoo.tokens(2, 9))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("change", ["another head", "the same head", "the head alone"])
def test_a_tied_model_with_a_head_in_its_file(change, tmp_path):
    """transformers' rule: another head is used, the same one is tied, and a head alone is the table."""
    folder = tmp_path / "m"
    shutil.copytree(zoo.directory("qwen3"), folder)
    weights = load_file(folder / "model.safetensors")
    table = weights["model.embed_tokens.weight"]
    weights["lm_head.weight"] = table[::-1].copy() if change == "another head" else table.copy()
    if change == "the head alone":
        del weights["model.embed_tokens.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert zoo.apart(logits_of(folder), theirs_of(folder)) < 1e-4
    assert load(folder)[0].spec.tied == (change != "another head")


def test_one_file_goes_before_shards_beside_it(tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(zoo.directory("llama"), folder)
    other = {name: -array for name, array in load_file(folder / "model.safetensors").items()}
    save_file(other, folder / "model-00001-of-00001.safetensors", metadata={"format": "pt"})
    shards = dict.fromkeys(other, "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    assert zoo.apart(logits_of(folder), theirs_of(folder)) < 1e-4


def test_a_mistral_with_layer_types_is_what_transformers_makes_of_it(tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(zoo.directory("mistral"), folder)
    rewrite_config(folder, layer_types=["sliding_attention", "full_attention", "full_attention"])
    assert zoo.apart(logits_of(folder), theirs_of(folder)) < 1e-4
    assert zoo.apart(logits_of(folder), logits_of(zoo.directory("mistral"))) > 1e-3


def rewrite_config(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"is_causal": False}, "is_causal=False is not supported"),
        ({"layer_types": ["sliding_attention"] * 3}, r"layer_types=.* is not supported for this model_type"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention=True is not supported"),
        ({"vocab_size": "96"}, "vocab_size='96', expected a whole number"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps='1e-5', expected a finite number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan, expected a finite number"),
        ({"num_attention_heads": 0}, "num_attention_heads=0, expected a whole number above 0"),
        ({"num_attention_heads": 3, "head_dim": None}, "3 heads do not divide the width"),
        ({"num_key_value_heads": 3}, "3 key and value heads do not divide 4 heads"),
        ({"hidden_size": -32}, "hidden_size=-32, expected a whole number above 0"),
        ({"num_hidden_layers": 10**7}, "num_hidden_layers=10000000, expected a whole number from 1 to 10,000"),
        ({"rope_scaling": {"rope_type": ["x"]}}, "rope"),
        ({"model_type": ["llama"]}, "model_type="),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings='no', expected true or false"),
        ({"rope_scaling": ["x"]}, r"rope_scaling=\['x'\], expected an object"),
        ({"quantization_config": ["x"]}, "the weights are quantised"),
        ({"architectures": "LlamaForCausalLM"}, "architectures='LlamaForCausalLM', expected a list"),
        ({"hidden_act": 3}, "hidden_act=3, expected text"),
        ({"head_dim": 8}, "misshapen"),
        ({"head_dim": 7}, "rotate 7 of the 7 channels of a head, expected an even number"),
    ],
    ids=str,
)
def test_what_a_config_cannot_hold_is_named(changes, message, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(zoo.directory("llama"), folder)
    rewrite_config(folder, **changes)
    with pytest.raises(UserError, match=message):
        load(folder)


@pytest.mark.parametrize("family", sorted(models.FAMILIES))
def test_every_setting_of_transformers_config_is_read_or_known_to_change_nothing(family):
    """A field of the family's own config class that no code of ours asks for would be passed over."""
    from transformers import AutoConfig, PretrainedConfig

    values = json.loads(json.dumps(AutoConfig.for_model(family).to_dict())) | {"model_type": family}
    if family.endswith("_moe"):
        values.setdefault("num_experts", 4)
    config = Config(values)
    models.family(values).spec(config)
    common = {field.name for field in dataclasses.fields(PretrainedConfig)}
    inert = re.compile(
        r"_name_or_path|_sliding_window_pattern|\w+_token_id|model_type|output_attentions|use_cache"
        r"|\w*dropout\w*|\w+_pdrop|initializer_\w+|router_aux_loss_coef|\w*layerdrop"  # of training
        r"|reorder_and_upcast_attn|summary_\w+|encoder_stride|pooler_\w+|decoder_bias|deterministic_flash_attn"
        r"|sparse_\w+|classifier_\w+|sinusoidal_pos_embds|is_decoder|add_cross_attention"  # of heads, or refused
        r"|max_window_layers|sliding_window|original_max_position_embeddings|num_experts"
        r"|tie_word_embeddings|max_position_embeddings"  # encoders have no head; theirs do not end
        r"|dense_act_fn|is_gated_act"  # what T5's class makes of feed_forward_proj
    )
    left = {key for key in values if key not in config.values.asked | common and not inert.fullmatch(key)}
    assert not left


# ------------------------------------------------------------------------------------------------------------ security


@pytest.mark.security
@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "a/b.safetensors", "..", ""])
def test_shards_lie_beside_their_index(name, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(zoo.directory("llama"), folder)
    (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(UserError, match="shards must be next to their index"):
        load(folder)


@pytest.mark.security
def test_the_second_copies_of_weights_are_not_downloaded():
    from huggingface_hub.utils import filter_repo_objects

    files = [
        *("config.json", "consolidated.safetensors", "model-00001-of-00003.safetensors", "consolidated.00.safetensors"),
        *("model.safetensors.index.json", "original/x.safetensors", "original/params.json", "onnx/model.onnx"),
        *("tokenizer.json", "adapter_model.safetensors", "pytorch_model.bin", "model.fp16.safetensors"),
        *("model.fp16-00001-of-00002.safetensors", "model-00001-of-00002.bf16.safetensors"),
        *("modules.json", "1_Pooling/config.json", "2_Dense/model.safetensors", "openvino/model.safetensors"),
    ]
    wanted = filter_repo_objects(files, allow_patterns=WANTED, ignore_patterns=UNWANTED)
    assert set(wanted) == {
        *("config.json", "model-00001-of-00003.safetensors", "model.safetensors.index.json"),
        *("tokenizer.json", "adapter_model.safetensors"),
        *("modules.json", "1_Pooling/config.json", "2_Dense/model.safetensors"),
    }


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("value", [np.nan, -np.inf, 3e4, None])
def test_weights_that_are_not_finite_are_said(dtype, value, tmp_path):
    folder = tmp_path / "m"
    shutil.copytree(zoo.directory("llama"), folder)

    def spoil(arrays):
        arrays = {name: array.astype(jnp.dtype(dtype)) for name, array in arrays.items()}
        if value is not None:
            arrays["model.layers.1.mlp.up_proj.weight"][3, 5] = value
        return arrays

    rewrite(folder, spoil)
    if value is None or np.isfinite(value):
        load(folder)
    else:
        with pytest.warns(UserWarning, match="up_proj/kernel have numbers that are not finite"):
            load(folder)
