"""Labels by name, numbers, vectors; words and pairs of texts as transformers' tokenizers have them."""

import numpy as np
import pytest
from data_zoo import write_jsonl

from jaxtune.data import LabelForm, prepare, read
from jaxtune.data.label_counts import count_ids, count_labels
from jaxtune.data.label_rows import LabelAssembler
from jaxtune.errors import UserError

STARS = ("1 star", "2 stars", "3 stars", "4 stars", "5 stars")


def labels_of(path, form):
    """What each row's labels are read as."""
    source = read(str(path))
    convert = form.reader(source).convert
    return [convert(source.where(number), row)[1] for number, row in source]


def texts(tmp_path, labels, column="label"):
    return write_jsonl(tmp_path / "a.jsonl", [{"text": f"t{i}", column: label} for i, label in enumerate(labels)])


# ------------------------------------------------------------------------------------------------ names and numbers


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["b", "a", "b"], ("a", "b")),
        (["²", "1", "10"], ("1", "10", "²")),
        ([10, 9, "--5"], ("--5", "10", "9")),
        (["10", 9], ("9", "10")),
        ([True, "True", "TRUE ", False, "false"], ("false", "true")),
        ([1.0, 0.0], ("0", "1")),
    ],
)
def test_names_of_the_data(tmp_path, labels, names):
    form = LabelForm(False)
    form.names = count_labels([read(texts(tmp_path, labels))], form).names
    assert form.names == names
    assert len(labels_of(tmp_path / "a.jsonl", form)) == len(labels)


def test_names_are_matched_whatever_their_order(tmp_path):
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features(text=Value("string"), label=ClassLabel(names=["zebra", "ape", "never"]))
    table = Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}, features=features)
    table.save_to_disk(tmp_path / "d")
    own = LabelForm(False)
    assert count_labels([read(str(tmp_path / "d"))], own).names == ("zebra", "ape", "never")
    for names, expected in (
        (("zebra", "ape", "never"), [[0], [1]]),
        (("ape", "zebra"), [[1], [0]]),
        (("LABEL_0", "LABEL_1", "LABEL_2"), [[0], [1]]),  # no names: the order is all there is
    ):
        assert labels_of(tmp_path / "d", LabelForm(False, names)) == expected
    with pytest.raises(UserError, match="label 'zebra' is not one of the 2 labels"):
        labels_of(tmp_path / "d", LabelForm(False, ("cat", "dog")))


@pytest.mark.parametrize("write", [int, str])
def test_numbers_are_ids_only_where_they_begin_at_0_or_it_is_said(tmp_path, write):
    texts(tmp_path, map(write, [1, 0, 1]))
    form = LabelForm(False, ("neg", "pos"))
    assert labels_of(tmp_path / "a.jsonl", form) == [[1], [0], [1]]
    assert form.notes == ["numbers in column 'label' are read as the labels' ids: 0 = neg, 1 = pos"]
    later = texts(tmp_path, [write(1)] * 3)
    assert labels_of(later, form) == [[1]] * 3  # evaluation rows are numbered as those of training
    texts(tmp_path, map(write, [1, 2, 3, 4]))
    with pytest.raises(UserError, match=r"numbers 1 to 4 and no 0.*'1 star'.*Set objective\.first_label"):
        labels_of(tmp_path / "a.jsonl", LabelForm(False, STARS))
    assert labels_of(tmp_path / "a.jsonl", LabelForm(False, STARS, first=1)) == [[0], [1], [2], [3]]
    assert labels_of(tmp_path / "a.jsonl", LabelForm(False, STARS, first=0)) == [[1], [2], [3], [4]]
    assert labels_of(tmp_path / "a.jsonl", LabelForm(False, ("4", "3", "2", "1"))) == [[3], [2], [1], [0]]


def test_rows_without_a_label_are_refused(tmp_path):
    for label, said in ((-1, "-1, as data sets mark"), (None, "is null; expected a label"), (" ", "is empty")):
        with pytest.raises(UserError, match=rf"a\.jsonl:2: .*{said}"):
            labels_of(texts(tmp_path, [0, label]), LabelForm(False, ("neg", "pos")))
    with pytest.raises(UserError, match="problem_type=multi_label_classification"):
        count_labels([read(texts(tmp_path, [["a"], ["b"]]))], LabelForm(False))


def test_names_that_differ_in_case_or_space_are_told(tmp_path):
    counted = count_labels(
        [read(texts(tmp_path, ["pos", "Pos", "neg", "neg ", "very_good", "very good"]))], LabelForm(False)
    )
    assert counted.names == ("Pos", "neg", "pos", "very good", "very_good")
    assert [note for note in counted.notes if "differ in case" in note and "'Pos' and 'pos'" in note]
    assert [note for note in counted.notes if "'very good' and 'very_good'" in note]
    assert "labels with white space around them are read without it: neg" in counted.notes
    assert not count_labels([read(texts(tmp_path, ["a", "b"]))], LabelForm(False)).notes


def test_a_column_of_labels_may_be_called_so(tmp_path):
    assert labels_of(texts(tmp_path, ["b", "a"], "labels"), LabelForm(False, ("a", "b"))) == [[1], [0]]
    form = LabelForm(False, ("a", "b"), columns={"label": "gold|labels"})
    assert labels_of(tmp_path / "a.jsonl", form) == [[1], [0]]


# ------------------------------------------------------------------------------------------------ several labels


@pytest.mark.parametrize("write", [int, float, bool])
def test_vectors_of_0_and_1_say_which_labels_are_there(tmp_path, write):
    vectors = [[1, 0, 1], [0, 1, 0], [0, 0, 1], [0, 0, 0]]
    path = texts(tmp_path, [list(map(write, vector)) for vector in vectors])
    assert labels_of(path, LabelForm(False, ("a", "b", "c"), several=True)) == vectors
    counted = count_labels([read(path)], LabelForm(False, several=True))
    assert counted.names == ("LABEL_0", "LABEL_1", "LABEL_2")
    assert counted.labels == {"LABEL_0": 1, "LABEL_1": 1, "LABEL_2": 2}
    with pytest.raises(UserError, match="has 3 numbers 0 and 1 in each row, and there are 2 labels"):
        labels_of(path, LabelForm(False, ("a", "b"), several=True))


def test_lists_of_names_and_of_ids_are_no_vectors(tmp_path):
    form = LabelForm(False, ("a", "b", "c"), several=True)
    assert labels_of(texts(tmp_path, [["a", "c"], []]), form) == [[1, 0, 1], [0, 0, 0]]
    assert labels_of(texts(tmp_path, [[0, 2], [1]]), form) == [[1, 0, 1], [0, 1, 0]]
    assert labels_of(texts(tmp_path, ["[0, 2]", "[1]"]), form) == [[1, 0, 1], [0, 1, 0]]
    with pytest.raises(UserError, match="a label twice"):
        labels_of(texts(tmp_path, [[0, 1, 1], [0]]), form)


def test_counts_are_by_the_models_names(tmp_path):
    path = texts(tmp_path, [0, 1, 1])
    assert count_ids([read(path)], LabelForm(False, ("neg", "pos"))).labels == {"neg": 1, "pos": 2}


# ------------------------------------------------------------------------------------------------ words


def tagged(tmp_path, rows):
    return write_jsonl(tmp_path / "a.jsonl", [{"tokens": words, "labels": tags} for words, tags in rows])


def qwen_like():
    """A byte-level tokenizer behind a splitter, as Qwen's and Llama 3's are, that has learnt some words."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    pattern = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+"
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(["the river in Rome, Anna lives in Rome in 2017"] * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="!", pad_token="!")


def test_words_are_tokens_as_they_stand_in_a_text(tmp_path):
    tokenizer = qwen_like()
    words = ["Anna", "lives", "in", "Rome", "in", "2017", ",", "in", "Rome"]
    form = LabelForm(True, ("O", "X"))
    path = tagged(tmp_path, [(words, ["X"] * len(words)), (["in"], ["O"])])
    (rows,), _, _ = prepare(tokenizer, [path], labels=form, max_length=64, cache=False)
    ids, marks = rows[0]
    assert ids.tolist() == tokenizer(" " + " ".join(words))["input_ids"]
    first = [tokenizer.convert_ids_to_tokens(int(i)) for i in ids[marks > 0]]
    assert len(first) == len(words)
    assert "Ġ" not in first  # what carries the label is of the word, not the space before it
    assert [token.lstrip("Ġ")[0] for token in first] == [word[0] for word in words]


@pytest.mark.parametrize("name", ["bert-base-uncased", "gpt2", "qwen3"])
def test_words_of_real_tokenizers_are_tokens_of_a_text(tmp_path, assets, name):
    from jaxtune.data import load_tokenizer

    tokenizer = load_tokenizer(str(assets / "tokenizers" / name))
    words = ["Anna", "lives", "in", "Rome", "since", "2017", ",", "near", "the", "Colosseum", "."]
    path = tagged(tmp_path, [(words, ["X"] * len(words)), (["in"], ["O"])])
    (rows,), _, _ = prepare(tokenizer, [path], labels=LabelForm(True, ("O", "X")), max_length=64, cache=False)
    ids, marks = rows[0]
    text = " ".join(words) if name.startswith("bert") else " " + " ".join(words)
    assert ids.tolist() == tokenizer(text)["input_ids"]
    assert int((marks > 0).sum()) == len(words)


def test_ignored_words_and_words_without_a_token(tmp_path):
    tokenizer = word_tokenizer()
    rows = [(["a", "b", "​", "c"], ["B-X", -100, "O", "O"]), (["​", "a"], ["B-X", "B-X"])]
    path = tagged(tmp_path, [(words, tags) for words, tags in rows])
    form = LabelForm(True, ("O", "B-X"))
    source = read(path)
    convert = form.reader(source).convert
    assert convert("", dict(next(iter(source))[1]))[1] == [1, None, 0, 0]
    # A column of names with a number in it is refused as any column of two types is; ids are what -100 stands among.
    path = tagged(tmp_path, [(words, [{"O": 0, "B-X": 1}.get(tag, tag) for tag in tags]) for words, tags in rows])
    (found,), _, report = prepare(tokenizer, [path], labels=form, max_length=64, cache=False)
    marks = [found[i][1][found[i][1] > 0].tolist() for i in range(2)]
    assert marks == [[2, 1], [2]]
    assert report.sources[0].lost == 2
    assert "2 labelled words give no token and are not trained" in report.sources[0].line()


# ------------------------------------------------------------------------------------------------ pairs


def word_tokenizer():
    """BERT's: words, [CLS] a [SEP] b [SEP], token types; marks without width are dropped."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocab = {token: i for i, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefghijklmnop"])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(
        **{"tokenizer_object": backend, "pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]"},
        **{
            "sep_token": "[SEP]",
            "eos_token": "[SEP]",
            "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
        },
    )


@pytest.mark.parametrize(
    ("first", "second"),
    [("text", "text_pair"), ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question", "sentence")],
)
def test_pairs_are_two_segments_with_types(tmp_path, first, second):
    pairs = [("a b c", "d e"), ("a", "b c d e"), ("f g", "h")]
    path = write_jsonl(
        tmp_path / "a.jsonl", [{"id": i, first: a, second: b, "label": i % 2} for i, (a, b) in enumerate(pairs)]
    )
    tokenizer = word_tokenizer()
    form = LabelForm(False, ("0", "1"))
    (rows,), _, report = prepare(tokenizer, [path], labels=form, max_length=64, cache=False)
    assert report.sources[0].format == "two texts and label"
    laid = LabelAssembler([rows], 3, 1, 64, False).assemble(np.arange(3)[:, None])
    theirs = tokenizer(
        *map(list, zip(*pairs)), padding="max_length", max_length=laid["tokens"].shape[-1], return_tensors="np"
    )
    np.testing.assert_array_equal(laid["tokens"][0], theirs["input_ids"])
    np.testing.assert_array_equal(laid["types"][0], theirs["token_type_ids"])
    np.testing.assert_array_equal(laid["segments"][0], theirs["attention_mask"])
    assert "types" not in LabelAssembler([single_texts(tmp_path)], 2, 1, 64, False).assemble(np.arange(2)[:, None])


def single_texts(tmp_path):
    path = write_jsonl(tmp_path / "b.jsonl", [{"text": "a", "label": 0}, {"text": "b", "label": 1}])
    (rows,), _, _ = prepare(word_tokenizer(), [path], labels=LabelForm(False, ("0", "1")), max_length=64, cache=False)
    return rows


def test_a_tokenizer_that_cannot_divide_two_texts_is_refused(tmp_path):
    from tokenizers import processors

    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a", "text_pair": "b", "label": i} for i in (0, 1)])
    tokenizer = word_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    with pytest.raises(UserError, match="nothing would divide two texts"):
        prepare(tokenizer, [path], labels=LabelForm(False, ("0", "1")), max_length=9, cache=False)


def test_of_a_pair_that_is_too_long_the_longer_text_is_cut_first(tmp_path):
    from itertools import product

    pairs = [(" ".join("abcdefgh"[:n]), " ".join("ijklmnop"[:m])) for n, m in product((1, 2, 3, 4, 5, 8), repeat=2)]
    path = write_jsonl(
        tmp_path / "a.jsonl", [{"text": a, "text_pair": b, "label": i % 2} for i, (a, b) in enumerate(pairs)]
    )
    tokenizer = word_tokenizer()
    for length in (5, 8, 9):
        (rows,), _, _ = prepare(
            tokenizer,
            [path],
            labels=LabelForm(False, ("0", "1")),
            max_length=length,
            overlength="truncate",
            cache=False,
        )
        theirs = tokenizer(*map(list, zip(*pairs)), truncation="longest_first", max_length=length)
        assert [rows[i][0].tolist() for i in range(len(rows))] == theirs["input_ids"]
        assert [((rows[i][1] - 1) & 1).tolist() for i in range(len(rows))] == theirs["token_type_ids"]


def test_a_decoder_reads_a_pair_as_one_text(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"premise": "a", "hypothesis": "b", "label": i} for i in (0, 1)])
    form = LabelForm(False, ("0", "1"), joined="\n")
    source = read(path)
    assert form.reader(source).convert("", next(iter(source))[1]) == ("a\nb", [0])
    assert form.notes == ["premise and hypothesis are joined to one text for a decoder, with '\\n' between them"]


def test_a_second_text_that_the_first_row_has_not_is_no_silence(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a", "label": 0}, {"text": "a", "text_pair": "b", "label": 1}])
    with pytest.raises(UserError, match=r"a\.jsonl:2: a second text in column 'text_pair'"):
        labels_of(path, LabelForm(False, ("0", "1")))
    assert labels_of(path, LabelForm(False, ("0", "1"), columns={"text": "text"})) == [[0], [1]]


def test_columns_of_pairs_are_mapped(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"q": "a", "p": "b", "label": 0}])
    form = LabelForm(False, ("0", "1"), columns={"text": "q", "text_pair": "p"})
    source = read(path)
    assert form.reader(source).convert("", next(iter(source))[1]) == (("a", "b"), [0])
    with pytest.raises(UserError, match="no column 'text'"):
        LabelForm(False, ("0", "1")).reader(source)
