"""GGUF files, read back by gguf and, apart from that, by transformers."""

import json
from pathlib import Path

import gguf
import jax
import numpy as np
import pytest
import zoo
from test_export import live
from test_peft_io import TOKENS, shake
from test_peft_io import our_logits as logits

import jaxtune
from jaxtune.cli import main
from jaxtune.errors import UserError
from jaxtune.hf import gguf as ours
from jaxtune.hf.tensors import index_dir as index
from jaxtune.hf.tensors import read
from jaxtune.models import FAMILIES

# transformers takes a head of 128 channels for granted in a Qwen3 file.
MODELS = {"llama": {}, "mistral-global": {}, "qwen2": {}, "qwen3": {"head_dim": 128}}
DIGITS = {"type": "Digits", "individual_digits": True}  # as SmolLM2's
WORDPIECE = {"unk_token": "a", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100}
TEXTS = ["Once upon a time, there was a girl.", "  two spaces\n\nand 12345 naïve 東京 🙂 lines", "it's"]


def tuned_base(name, folder, **changes):
    """A base on disk, ours with an adapter on it."""
    zoo.build(name, **changes).save_pretrained(folder)
    module, params = jaxtune.load(folder)
    params, mask = jaxtune.lora(params, jax.random.key(0), r=2, module=module)
    return module, shake(params, mask)


def value(reader, key):
    return reader.get_field(key).contents()


def transformers_of(file, **settings):
    return live(file.parent, gguf_file=file.name, attn_implementation="eager", **settings)


@pytest.mark.parity("GGUF")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", [n if n in ("llama", "qwen3") else pytest.param(n, marks=pytest.mark.slow) for n in MODELS]
)
def test_transformers_gives_our_logits_and_every_tensor_is_there(name, tmp_path):
    module, params = tuned_base(name, tmp_path / "base", **MODELS[name])
    file = tmp_path / "deep/model.gguf"
    notes = jaxtune.export_gguf(module, params, file, base=tmp_path / "base")
    assert notes == [f"No tokenizer was written: {tmp_path / 'base'} has none."]
    assert [p.name for p in file.parent.iterdir()] == ["model.gguf"]
    expected = logits(module, params)
    assert zoo.apart(zoo.torch_logits(transformers_of(file), TOKENS), expected) < 1e-4
    assert zoo.apart(zoo.torch_logits(live(tmp_path / "base"), TOKENS), expected) > 0.01  # the adapter matters

    jaxtune.export_model(module, params, tmp_path / "merged", base=tmp_path / "base")
    reader = gguf.GGUFReader(file)
    found = {t.name: np.asarray(t.data) for t in reader.tensors}
    merged = {k: read(e) for k, e in index(tmp_path / "merged").items()}
    arch = value(reader, "general.architecture")
    known = gguf.get_tensor_name_map(ours._arch(gguf, arch), module.spec.layers)
    assert len(found) == len(merged)
    for hf, want in merged.items():
        got = found[known.get_name(hf, try_suffixes=(".weight", ".bias"))]
        if arch == "llama" and (".q_proj" in hf or ".k_proj" in hf):  # row 2i+j is HF's j*C/2+i
            c = module.spec.segments[0].pattern[0].head_dim
            rows = [h + j * c // 2 + i for h in range(0, len(want), c) for i in range(c // 2) for j in range(2)]
            want = want[rows]
        assert np.array_equal(got, want), hf
    assert value(reader, f"{arch}.attention.head_count_kv") == 2
    assert value(reader, f"{arch}.rope.freq_base") == 10000.0
    assert ("output.weight" in found) != module.spec.tied


def test_without_the_permutation_the_logits_differ(tmp_path, monkeypatch):
    """The tests above see it."""
    module, params = zoo.ours("llama")
    monkeypatch.setattr(ours, "pairs_adjacent", lambda array, heads: array)
    jaxtune.export_gguf(module, params, tmp_path / "m.gguf", base=zoo.directory("llama"))
    got = zoo.torch_logits(transformers_of(tmp_path / "m.gguf"), TOKENS)
    assert zoo.apart(got, logits(module, params)) > 0.01


def test_rope_scalings(tmp_path):
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    for name, kind in {"llama-linear": "linear", "qwen2-yarn": "yarn", "llama-mqa-rope3": "llama3"}.items():
        changes = {"head_dim": 8} if kind == "yarn" else {}
        zoo.build(name, **changes).save_pretrained(tmp_path / name)
        module, params = jaxtune.load(tmp_path / name)
        jaxtune.export_gguf(module, params, tmp_path / f"{name}.gguf", base=tmp_path / name)
        reader = gguf.GGUFReader(tmp_path / f"{name}.gguf")
        arch = value(reader, "general.architecture")
        if kind == "llama3":
            factors = next(t.data for t in reader.tensors if t.name == "rope_freqs.weight")
            want, _ = ROPE_INIT_FUNCTIONS["llama3"](zoo.config(name), "cpu")
            plain = 1 / 10000 ** (torch.arange(0, 8, 2) / 8)
            assert np.allclose(plain.numpy() / factors, want.numpy(), rtol=1e-6) and factors.max() == 8
            assert reader.get_field(f"{arch}.rope.scaling.type") is None
            continue
        assert value(reader, f"{arch}.rope.scaling.type") == kind
        assert value(reader, f"{arch}.rope.scaling.factor") == 4.0
        if kind == "yarn":
            assert value(reader, f"{arch}.rope.scaling.original_context_length") == 32
            assert value(reader, f"{arch}.rope.scaling.yarn_beta_fast") == 0.5


@pytest.mark.parametrize("dtype, kind", [("float16", "F16"), ("bfloat16", "BF16"), (None, "F32")])
def test_matrices_are_cast_and_vectors_stay_float32(dtype, kind, tmp_path):
    module, params = zoo.ours("llama")
    jaxtune.export_gguf(module, params, tmp_path / "m.gguf", base=zoo.directory("llama"), dtype=dtype)
    for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors:
        assert tensor.tensor_type.name == ("F32" if "norm" in tensor.name else kind)
    table = next(t for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors if t.name == "token_embd.weight")
    got = gguf.dequantize(table.data, table.tensor_type)
    want = np.asarray(params["embed_tokens"]["embedding"].astype(dtype or "float32").astype("float32"))
    assert np.array_equal(got, want)


@pytest.mark.parametrize(
    "name, message",
    [
        ("gpt2", "'gpt2'"),
        ("mistral", "sliding window"),
        ("llama-mha-biases", "qkv_bias"),
        ("llama-dynamic", "'dynamic'"),
        ("qwen2-yarn", "apart from the width"),
        ("qwen3-yarn-mscale", "truncate"),
        ("qwen2-upper-windows", "sliding window"),
        ("qwen3-biases-windows", "sliding window|qkv_bias"),
    ],
)
def test_what_gguf_cannot_say_is_refused(name, message, tmp_path):
    module, params = zoo.ours(name)
    with pytest.raises(UserError, match=message):
        jaxtune.export_gguf(module, params, tmp_path / "out/m.gguf", base=zoo.directory(name))
    assert list(tmp_path.iterdir()) == []


def test_the_command(tmp_path, capsys):
    base, out = str(zoo.directory("qwen2")), tmp_path / "m.gguf"
    assert main(["export", base, str(out), "--dtype=bfloat16"]) == 0
    assert value(gguf.GGUFReader(out), "general.file_type") == gguf.LlamaFileType.MOSTLY_BF16
    before = out.read_bytes()
    assert main(["export", base, str(out)]) == 2
    assert "exists" in capsys.readouterr().err and out.read_bytes() == before
    assert main(["export", base, str(tmp_path / "n.gguf"), "--adapter"]) == 2
    assert "--adapter" in capsys.readouterr().err


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    module, params = zoo.ours("llama")

    def fail(*args):
        raise RuntimeError

    monkeypatch.setattr(ours, "hf_tensor", fail)
    with pytest.raises(RuntimeError):
        jaxtune.export_gguf(module, params, tmp_path / "m.gguf", base=zoo.directory("llama"))
    assert list(tmp_path.iterdir()) == []


# --------------------------------------------------------------------------------------------------------- tokenizers


def with_tokenizer(tmp_path, made, vocab, **settings):
    """A Llama with a tokenizer, as a GGUF file, and both tokenizers: the one that was put in, the one that came out."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    folder = tmp_path / "base"
    zoo.build("llama", vocab_size=vocab).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=made, **settings).save_pretrained(folder)
    module, params = jaxtune.load(folder)
    assert jaxtune.export_gguf(module, params, tmp_path / "m.gguf", base=folder) == []
    return (
        gguf.GGUFReader(tmp_path / "m.gguf"),
        AutoTokenizer.from_pretrained(folder),
        AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf"),
    )


def byte_level(split=None):
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    if split:
        made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(split), "isolated"), level])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator([*TEXTS, "the cat and the dog and the girl"] * 3, trainer)
    return made


@pytest.mark.parametrize(
    ("stops", "ends", "turn"), [([], [], None), ([300], [], 300), ([], [301], 301), ([300], [301], 300)]
)
def test_the_token_that_ends_a_turn(stops, ends, turn, tmp_path):
    from transformers import PreTrainedTokenizerFast

    zoo.build("llama", vocab_size=310).save_pretrained(tmp_path / "base")
    made = byte_level()
    made.add_special_tokens(["<|im_end|>", "<|call|>", "</s>"])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>")
    first, second, eos = (tokenizer.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<|call|>", "</s>"))
    ids = {300: first, 301: second, None: None}
    tokenizer.save_pretrained(tmp_path / "base")
    stored = {"eos_token_id": [eos, *(ids[i] for i in stops)]}
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps(stored))
    module, params = jaxtune.load(tmp_path / "base")
    where = {"base": tmp_path / "base", "ends": [ids[i] for i in ends]}
    notes = jaxtune.export_gguf(module, params, tmp_path / "m.gguf", **where)
    field = gguf.GGUFReader(tmp_path / "m.gguf").get_field("tokenizer.ggml.eot_token_id")
    assert (field and field.contents()) == ids[turn]
    assert len(notes) == (len(stops) + len(ends) > 1)
    assert not notes or f"also at <|call|> ({second})" in notes[0]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["gpt-2", "qwen2", "llama-bpe"])
def test_byte_level_tokenizers(name, tmp_path):
    split = next(key for key, known in ours._CUTS.items() if known == name)
    made = byte_level(split and split[1])
    made.add_special_tokens(["<|end|>"])
    made.add_tokens(["<think>"])
    size = made.get_vocab_size()
    template = "{{ messages[0].content }}"
    settings = {"eos_token": "<|end|>", "pad_token": "<|end|>", "chat_template": template}
    reader, before, after = with_tokenizer(tmp_path, made, size + 3, **settings)
    assert value(reader, "tokenizer.ggml.model") == "gpt2" and value(reader, "tokenizer.ggml.pre") == name
    assert value(reader, "tokenizer.ggml.eos_token_id") == value(reader, "tokenizer.ggml.padding_token_id") == size - 2
    assert value(reader, "tokenizer.ggml.add_bos_token") is False
    assert value(reader, "tokenizer.chat_template") == template
    types = value(reader, "tokenizer.ggml.token_type")
    assert types[-5:] == [3, 4, 5, 5, 5] and set(types[:-5]) == {1}
    for text in [*TEXTS, "the girl<|end|>and <think> the 1234567 cats"]:
        assert before(text).input_ids == after(text).input_ids


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda told: told["pre_tokenizer"].update(add_prefix_space=True), "no name for"),
        (lambda told: told.update(normalizer={"type": "Lowercase"}), "no name for"),
        (
            lambda told: told.update(
                pre_tokenizer={"type": "Sequence", "pretokenizers": [DIGITS, told["pre_tokenizer"]]}
            ),
            "no name for",
        ),
        (lambda told: told.update(pre_tokenizer=None), "neither byte-level nor like SentencePiece|loses text"),
        (lambda told: told["model"].update(end_of_word_suffix="</w>"), "end_of_word_suffix|loses text"),
        (lambda told: told["model"].update(ignore_merges=True), "ignore_merges"),
        (
            lambda told: told.update(model={"type": "WordPiece", "vocab": told["model"]["vocab"]} | WORDPIECE),
            "WordPiece",
        ),
    ],
)
def test_tokenizers_that_are_refused(spoil, message, tmp_path):
    told = json.loads(byte_level().to_str())
    spoil(told)
    (tmp_path / "tokenizer.json").write_text(json.dumps(told))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(UserError, match=message):
        ours.read_tokenizer(tmp_path, 400)


def test_an_unknown_cut_and_a_small_table_are_refused(tmp_path):
    byte_level(r"\p{N}{2}|\s+|\S+").save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    with pytest.raises(UserError, match="Known: qwen2, llama-bpe, gpt-2"):
        ours.read_tokenizer(tmp_path, 400)
    with pytest.raises(UserError, match="only 100 rows"):
        ours.read_tokenizer(tmp_path, 100)


def test_merges_that_are_no_order_of_tokens_are_refused():
    vocab = {t: i for i, t in enumerate(["a", "b", "c", "ab", "bc", "abc"])}
    merges = [("a", "b"), ("b", "c"), ("ab", "c"), ("a", "bc")]
    assert ours._scores(merges, vocab, "x") == {"ab": 0, "bc": -1, "abc": -2, "a": -3, "b": -3, "c": -3}
    with pytest.raises(UserError, match="not among the merges"):
        ours._scores(merges[:3], vocab, "x")
    with pytest.raises(UserError, match="lie apart"):
        ours._scores([merges[0], merges[2], merges[1], merges[3]], vocab, "x")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_real_model_of_sentencepiece_kind(assets, tmp_path):
    from transformers import AutoTokenizer

    folder = assets / "models/stories260k"
    assert main(["export", str(folder), str(tmp_path / "m.gguf")]) == 0
    module, params = jaxtune.load(folder)
    before = AutoTokenizer.from_pretrained(folder)
    after = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    assert value(reader, "tokenizer.ggml.model") == "llama"
    assert value(reader, "tokenizer.ggml.add_bos_token") and value(reader, "tokenizer.ggml.add_space_prefix")
    types = value(reader, "tokenizer.ggml.token_type")
    assert types[:3] == [2, 3, 3] and types[3:259] == [6] * 256 and set(types[259:]) == {1}
    story = (assets / "data/tinystories/tinystories_sample.txt").read_text()[:3000]
    assert before(story).input_ids == after(story).input_ids
    ids = np.asarray([before(story).input_ids[:64]], np.int32)
    got = zoo.torch_logits(transformers_of(tmp_path / "m.gguf"), ids)
    assert zoo.apart(got, module.apply({"params": params}, ids)) < 1e-4


def test_the_document_names_what_is_written():
    text = (Path(__file__).resolve().parents[1] / "docs/gguf.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    written = {name.strip("`"): row[1].strip("`") for row in rows if len(row) == 2 for name in row[0].split(", ")}
    assert {k: v for k, v in written.items() if k in FAMILIES} == ours.ARCHITECTURES
    assert {row[1].strip("`") for row in rows if row[0] == "byte-level"} == set(ours._CUTS.values())
