"""Tokenizers as they lie in directories, and templates that write the day."""

import base64
import datetime
import io
import json
import re
import subprocess

import pytest
import transformers
from data_zoo import CHATML, byte_tokenizer, trained_runs, write_jsonl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers.utils.chat_template_utils import render_jinja_template

from jaxtune import data
from jaxtune.data.chat import uses_date, with_date, without_date
from jaxtune.data.tokenizer import load_tokenizer
from jaxtune.errors import UserError

TEXT = "How are you doing today?"
BERT = "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "how", "are", "you", "doing", "today", "?", "##s", ""])
BYTES = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}


def write(folder, **files):
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(content)
    return str(folder)


def test_older_files_are_read_as_transformers_converts_them(tmp_path):
    tokenizer = load_tokenizer(write(tmp_path / "bert", vocab__txt=BERT, config__json='{"model_type": "bert"}'))
    assert tokenizer.tokenize(TEXT) == ["how", "are", "you", "doing", "today", "?"]
    vocab = json.dumps(BYTES | {"<|endoftext|>": 256, "He": 257})
    files = {"vocab__json": vocab, "merges__txt": "#version: 0.2\nH e\n", "config__json": '{"model_type": "gpt2"}'}
    tokenizer = load_tokenizer(write(tmp_path / "gpt2", **files))
    assert tokenizer.decode(tokenizer("He has 😀").input_ids) == "He has 😀" and tokenizer("He").input_ids == [257]


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"vocab__txt": BERT}, r'vocab\.txt and no tokenizer\.json.*a config\.json such as \{"model_type": "bert"\}'),
        ({"tokenizer__model": "x"}, r"tokenizer\.model and no tokenizer\.json.*pip install sentencepiece.*python -c"),
        ({"vocab__json": "{}"}, r"no tokenizer here \(tokenizer\.json\)"),
    ],
)
def test_files_that_say_too_little_are_refused_with_what_mends_them(tmp_path, files, said):
    with pytest.raises(UserError, match=said):
        load_tokenizer(write(tmp_path / "x", **files))


@pytest.mark.parametrize(
    ("kind", "name", "settings"),
    [
        ("llama", "tokenizer.model", {"model_type": "bpe", "byte_fallback": True}),
        ("t5", "spiece.model", {"model_type": "unigram", "pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}),
        ("xlm-roberta", "sentencepiece.bpe.model", {"model_type": "unigram"}),
    ],
)
def test_sentencepiece_models_give_its_pieces(tmp_path, kind, name, settings):
    sentencepiece = pytest.importorskip("sentencepiece")
    lines = [TEXT, "def f(n):", "    return n", "the quick brown fox jumps over the lazy dog"] * 20
    trained = io.BytesIO()
    settings |= {"vocab_size": 320, "hard_vocab_limit": False, "minloglevel": 2, "model_writer": trained}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), **settings)
    folder = tmp_path / "x"
    folder.mkdir()
    (folder / name).write_bytes(trained.getvalue())
    if kind != "llama":
        with pytest.raises(UserError, match=r"and a config\.json such as") as error:
            load_tokenizer(str(folder))
        (folder / "config.json").write_text(re.search(r"such as (\{.*?\})", str(error.value))[1])
        assert json.loads((folder / "config.json").read_text()) == {"model_type": kind}
        code = re.search(r'python -c "(.*)"', str(error.value))[1].replace("'OUT'", repr(str(tmp_path / "made")))
        exec(code)
        assert (tmp_path / "made" / "tokenizer.json").is_file()
    tokenizer = load_tokenizer(str(folder))
    pieces = sentencepiece.SentencePieceProcessor(model_proto=trained.getvalue())
    for text in (TEXT, "foxes, 😀 and def f(n)"):
        theirs = [pieces.id_to_piece(i) for i in pieces.encode(text)]
        assert tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False).input_ids) == theirs


def test_tiktoken_files_give_its_ids(tmp_path):
    tiktoken = pytest.importorskip("tiktoken")
    ranks = {bytes([i]): i for i in range(256)} | {b"ow": 256, b" a": 257, b" are": 258, b"re": 259}
    lines = "".join(f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items())
    folder = write(tmp_path / "x", tiktoken__model=lines)
    with pytest.raises(UserError, match=r"tiktoken\.model is read as tokenizer\.model") as error:
        load_tokenizer(folder)
    subprocess.run(str(error.value).partition("tokens: ")[2], shell=True, check=True)
    pattern = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"  # that of cl100k and Llama 3
    pattern += r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    own = tiktoken.Encoding("x", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    tokenizer = load_tokenizer(folder)
    for text in (TEXT, "def f(n):\n    return 12345 😀"):
        assert tokenizer(text, add_special_tokens=False).input_ids == own.encode(text)


def test_a_tokenizer_that_loses_text_is_refused(tmp_path, monkeypatch):
    """As transformers 5 read byte-level files under the class of another tokenizer: without the spaces."""
    byte_tokenizer().save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path))("a b").input_ids
    broken = byte_tokenizer()
    broken.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *args, **kwargs: broken)
    with pytest.raises(UserError, match=rf"loses text as transformers {transformers.__version__} reads it: 'How are"):
        load_tokenizer(str(tmp_path))


def test_characters_that_vanish_are_refused_and_those_counted_as_unknown_are_not(tmp_path):
    vocab = {c: i for i, c in enumerate(map(chr, range(32, 127)))}
    for name, unknown in (("silent", None), ("counted", "<unk>")):
        backend = Tokenizer(models.BPE(vocab | ({unknown: 95} if unknown else {}), [], unk_token=unknown))
        backend.decoder = decoders.Fuse()
        made = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token=unknown, eos_token="~")
        made.save_pretrained(tmp_path / name)
    load_tokenizer(str(tmp_path / "counted"))
    with pytest.raises(UserError, match="loses text"):
        load_tokenizer(str(tmp_path / "silent"))


FORM = "%d %b %Y, %A %-d %% %H:%M"
DATED = f"\n{{% set d = strftime_now('{FORM}') %}}<|im_start|>system\nToday: {{{{ d }}}}<|im_end|>\n{CHATML}"


def test_the_date_of_a_template_is_that_of_the_run(tmp_path):
    date = datetime.date(2024, 2, 3)
    assert without_date(with_date(DATED, date)) == DATED and without_date(CHATML) == CHATML
    assert uses_date(DATED) and uses_date({"default": DATED}) and not uses_date(CHATML) and not uses_date(None)
    row = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    (text,), _ = render_jinja_template([row], chat_template=with_date(DATED, date))
    said = datetime.datetime.combine(date, datetime.time()).strftime(FORM)
    (expected,), _ = render_jinja_template([row], chat_template=DATED.replace(f"strftime_now('{FORM}')", repr(said)))
    assert text == expected and "Saturday 3 % 00:00" in text

    byte_tokenizer(DATED, eos="<|im_end|>").save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path), date="2024-02-03")
    path = write_jsonl(tmp_path / "d.jsonl", [{"messages": row}])
    (rows,), _, _ = data.prepare(tokenizer, path, max_length=512, cache=False)
    assert tokenizer.decode(rows[0][0]) == expected and trained_runs(tokenizer, *rows[0]) == ["Ho<|im_end|>"]
    today = load_tokenizer(str(tmp_path)).chat_template
    assert today in [with_date(DATED, datetime.date.today() - datetime.timedelta(days=d)) for d in (0, 1)]
    with pytest.raises(UserError, match=r"data.date: 'soon' is no date; expected YYYY-MM-DD"):
        load_tokenizer(str(tmp_path), date="soon")
