"""Files as people have them: tables, tagged words, JSON, folders, compressed and saved data sets."""

import gzip
import json
import re
import subprocess

import pytest
from data_zoo import write_jsonl as write_lines

from jaxtune.data import read
from jaxtune.errors import UserError

ROWS = [{"prompt": "Hi", "completion": "Ho"}, {"prompt": "Yo", "completion": "Ya"}]


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_lines(path, rows)


def rows(path):
    return [row for _, row in read(str(path))]


def mended(path, message):
    """The rows of the file that the command in `message` writes; the command is its last part."""
    command = re.search(
        r"(?:: |example [^:]*: )((?:python -c|awk|mv|\(printf|grep|cut|cp|tail) .*)", message, re.DOTALL
    )[1]
    subprocess.run(command, shell=True, check=True)
    written = [p for p in path.parent.iterdir() if p.stat().st_mtime_ns >= 0 and p != path]
    assert len(written) == 1, written
    return rows(written[0])


# ---------------------------------------------------------------------------------------------------- tables

LABELLED = [{"text": "film 0", "label": "pos"}, {"text": "film 1", "label": "neg"}]


@pytest.mark.parametrize(
    ("name", "content", "said", "then"),
    [
        ("a.csv", "text;label\nfilm 0;pos\nfilm 1;neg\n", "separated by ';'", LABELLED),
        ("a.csv", "text|label\nfilm 0|pos\nfilm 1|neg\n", r"separated by '\|'", LABELLED),
        ("a.csv", "text\tlabel\nfilm 0\tpos\nfilm 1\tneg\n", r"separated by '\\t'", LABELLED),
        ("a.csv", ",text,label\n0,film 0,pos\n1,film 1,neg\n", "first column has no name", LABELLED),
        ("a.tsv", "\ttext\tlabel\n0\tfilm 0\tpos\n1\tfilm 1\tneg\n", "first column has no name", LABELLED),
        ("a.csv", "text,label,\nfilm 0,pos,\nfilm 1,neg,\n", "the header ends in a comma", LABELLED),
        (
            "a.csv",
            'text,label\n"He said \\"hi\\" to me",pos\n"b",neg\n',
            r'malformed csv.* not \\"',
            [{"text": 'He said "hi" to me', "label": "pos"}, {"text": "b", "label": "neg"}],
        ),
        ("a.csv", "text,label\nfilm 0,pos\ntext,label\nfilm 1,neg\n", r"csv:3: the header is repeated here", LABELLED),
        ("a.csv", "sep=,\ntext,label\nfilm 0,pos\nfilm 1,neg\n", "'sep=' is for Excel alone", LABELLED),
        ("it's a.csv", "text;label\nfilm 0;pos\nfilm 1;neg\n", "separated by ';'", LABELLED),
    ],
)  # fmt: skip
def test_the_command_that_mends_a_table_mends_it(tmp_path, name, content, said, then):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(UserError, match=said) as error:
        rows(path)
    assert mended(path, str(error.value)) == then


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        ('text\tlabel\n" I am fine\tpos\nit was bad . "\tneg\ngood\tpos\n', ['" I am fine', 'it was bad . "', "good"]),
        ('text\tlabel\n"quoted" start\tneg\ngood\tpos\n', ['"quoted" start', "good"]),
        ('text\tlabel\n"a" and "b"\tneg\n', ['"a" and "b"']),
        ('text\tlabel\n"he said ""no"""\tneg\n"a\tb"\tpos\n', ['he said "no"', "a\tb"]),
        ('text\tlabel\n"two\nlines"\tneg\nb\tpos\n', ["two\nlines", "b"]),
        ('text\tlabel\r\n"whole"\tneg\r\n', ["whole"]),
        ("text\tlabel\n'\tneg\n", ["'"]),
    ],
)
def test_cells_of_a_tsv_are_literal_unless_all_quotes_are_those_of_a_table(tmp_path, content, texts):
    (tmp_path / "a.tsv").write_bytes(content.encode())
    assert [row["text"] for row in rows(tmp_path / "a.tsv")] == texts


def test_a_ragged_tsv_names_its_line(tmp_path):
    (tmp_path / "a.tsv").write_text('text\tlabel\n"a\tpos\nb\n')
    with pytest.raises(UserError, match=r"a\.tsv:3: 1 fields, but the header has 2"):
        rows(tmp_path / "a.tsv")


def test_a_file_without_a_header_gets_one(tmp_path):
    from jaxtune.data import LabelForm
    from jaxtune.data.formats import make_reader
    from jaxtune.run.recognise import recognise

    path = tmp_path / "a.csv"
    for content in (
        "pos,film 0\npos,film 1\n",
        "pos,pos\npos,film 1\n",
    ):  # the label first, or the header twice the same
        path.write_text(content)
        with pytest.raises(UserError, match="If the first line is no header") as error:
            LabelForm(False).reader(read(str(path)))
        assert [row["label"] for row in mended(path, str(error.value))] == ["pos", "pos"]
        (tmp_path / "a.clean.csv").unlink()
    path.write_text("film 0,pos\nfilm 1,neg\n")
    for refuse in (LabelForm(False).reader, make_reader, recognise):
        with pytest.raises(UserError, match="If the first line is no header") as error:
            refuse(read(str(path)))
        assert mended(path, str(error.value)) == LABELLED
        (tmp_path / "a.clean.csv").unlink()


def test_each_source_may_have_columns_of_its_own(tmp_path):
    from jaxtune.data.formats import make_reader

    rows = {
        "a": {"prompt": "Hi", "completion": "Ho"},
        "b": {"question": "Hi", "answer": "Ho"},
        "c": {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]},
    }
    columns = {"prompt": "question|prompt", "completion": "answer|completion"}
    found = []
    for name, row in rows.items():
        source = read(write_lines(tmp_path / f"{name}.jsonl", [row]))
        reader = make_reader(source, columns=columns)
        found.append((reader.format, reader.convert("", row)))
    assert [format for format, _ in found] == ["prompt_completion", "prompt_completion", "chat"]
    assert found[0][1] == found[1][1]
    named = {"prompt": "question@b.jsonl|prompt", "completion": "answer@b.jsonl|completion"}
    assert [make_reader(read(str(tmp_path / f"{n}.jsonl")), columns=named).format for n in "ab"] == [found[0][0]] * 2
    with pytest.raises(UserError, match=r"Where sources differ, name both: prompt=question\|prompt"):
        make_reader(read(str(tmp_path / "a.jsonl")), columns={"prompt": "question", "completion": "answer"})


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        (
            {"prompt": "qestion|promt"},
            r"no source has one of these columns\. Did you mean 'question'",
        ),
        ({"prompt": "question@c.jsonl|prompt"}, r"'c\.jsonl' is none of the sources\. Did you mean 'b\.jsonl'"),
        ({"prompt": "question|prompt", "completion": "answer|completion"}, None),
    ],
)
def test_alternatives_that_no_source_has_are_refused(tmp_path, columns, said):
    from data_zoo import byte_tokenizer

    from jaxtune import curate, data

    rows = {"a": {"prompt": "Hi", "completion": "Ho"}, "b": {"question": "Hi", "answer": "Ho"}}
    train = [write_jsonl(tmp_path / f"{name}.jsonl", [row]) for name, row in rows.items()]
    settings = {"max_length": 64, "columns": columns}
    if said is None:
        assert data.prepare(byte_tokenizer(), train, cache=False, **settings)[2].train_rows == 2
        return
    for read_all in (data.prepare, curate.examine):
        with pytest.raises(UserError, match=said):
            read_all(byte_tokenizer(), train, **settings)


# ---------------------------------------------------------------------------------------------------- tagged words


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("New\tB-LOC\nYork\tE-LOC\n\nBob\tS-PER\n", [(["New", "York"], ["B-LOC", "E-LOC"]), (["Bob"], ["S-PER"])]),
        (
            "-DOCSTART- -X- -X- O\n\nEU NNP B-NP B-ORG\nsays VBZ B-VP O\n\nPeter NNP B-NP B-PER\n",
            [(["EU", "says"], ["B-ORG", "O"]), (["Peter"], ["B-PER"])],
        ),
        (
            "#\thttp://x.org [2009]\n1\tBerlin\tB-LOC\tO\n2\tschläft\tO\tO\n\n# y\n1\tAnna\tB-PER\tB-LOC\n",
            [(["Berlin", "schläft"], ["B-LOC", "O"]), (["Anna"], ["B-PER"])],
        ),
        ("1 Bob NNP B-NP B-PER\n2 ran VBD X O\n\n1 A NN B-NP O\n", [(["Bob", "ran"], ["B-PER", "O"]), (["A"], ["O"])]),
        ("0\tBob\tB-PER\n1\tran\tO\n", [(["Bob", "ran"], ["B-PER", "O"])]),
        ("O\tThe\nB-LOC\tRome\n\nO\tA\n", [(["The", "Rome"], ["O", "B-LOC"]), (["A"], ["O"])]),
        ("# a comment here\n# O\n1 O\n1999 O\n", [(["#", "1", "1999"], ["O", "O", "O"])]),
        ("New York\tB-LOC\nis\tO\n", [(["New York", "is"], ["B-LOC", "O"])]),
        ("The DT\ndog NN\n", [(["The", "dog"], ["DT", "NN"])]),
    ],
)  # fmt: skip
def test_tagged_words_in_the_layouts_people_have(tmp_path, content, expected):
    (tmp_path / "a.conll").write_text(content)
    assert [(row["tokens"], row["labels"]) for row in rows(tmp_path / "a.conll")] == expected


@pytest.mark.parametrize("name", ["eng.train.txt", "a.tsv", "a.txt"])
def test_tagged_words_under_another_name_are_copied(tmp_path, name):
    from jaxtune.run.recognise import open_source

    path = tmp_path / name
    path.write_text("-DOCSTART- -X- O O\n\nEU NNP B-ORG\nsays VBZ O\n\nPeter NNP B-PER\n")
    with pytest.raises(UserError, match=r"such a file is called \.conll") as error:
        open_source(str(path))
    assert [row["labels"] for row in mended(path, str(error.value))] == [["B-ORG", "O"], ["B-PER"]]
    for text in ("Vitamin O\nis no vitamin\n", "one O\n", "a O\nb O\nc O\n"):
        path.write_text(text)
        open_source(str(path))


def test_conll_u_is_refused_with_the_command_that_mends_it(tmp_path):
    path = tmp_path / "a.conll"
    path.write_text(
        "# sent_id = 1\n1\tBob\tBob\tPROPN\tNNP\t_\t2\tnsubj\t_\t_\n2\tran\trun\tVERB\tVBD\t_\t0\troot\t_\t_\n"
    )
    with pytest.raises(UserError, match=r"10 fields a line \(CoNLL-U\)") as error:
        rows(path)
    assert mended(path, str(error.value)) == [{"tokens": ["Bob", "ran"], "labels": ["PROPN", "VERB"]}]


def test_many_fields_are_refused_with_the_command_that_mends_them(tmp_path):
    path = tmp_path / "a.conll"
    for divider in " \t":
        path.write_text("bc/cctv 0 0 Bob NNP (NP) B-PER\nbc/cctv 0 1 ran VBD * O\n".replace(" ", divider))
        with pytest.raises(UserError, match="7 fields a line") as error:
            rows(path)
        assert mended(path, str(error.value)) == [{"tokens": ["Bob", "ran"], "labels": ["B-PER", "O"]}]
        (tmp_path / "a.clean.conll").unlink()


def test_a_label_before_several_fields_is_refused_with_the_command_that_mends_it(tmp_path):
    path = tmp_path / "a.conll"
    for divider in " \t":
        path.write_text("B-PER Bob NNP x\nO ran VBD y\n".replace(" ", divider))
        with pytest.raises(UserError, match="the label comes first, and 3 fields follow") as error:
            rows(path)
        command = str(error.value).partition("word: ")[2]
        subprocess.run(command, shell=True, check=True)
        assert rows(tmp_path / "a.clean.conll") == [{"tokens": ["Bob", "ran"], "labels": ["B-PER", "O"]}]


# ---------------------------------------------------------------------------------------------------- JSON


def test_lines_of_other_names_and_compressed_ones_are_the_same_rows(tmp_path):
    import pyarrow as pa

    text = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    (tmp_path / "a.ndjson").write_bytes(text)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(text))
    with pa.output_stream(str(tmp_path / "a.jsonl.zst"), compression="zstd") as file:
        file.write(text)
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(b"prompt,completion\nHi,Ho\nYo,Ya\n"))
    (tmp_path / "list.json.gz").write_bytes(gzip.compress(json.dumps(ROWS).encode()))
    (tmp_path / "pretty.jsonl").write_text("\n".join(json.dumps(row, indent=1) for row in ROWS))
    for name in ("a.ndjson", "a.jsonl.gz", "a.jsonl.zst", "a.csv.gz", "list.json.gz", "pretty.jsonl"):
        assert rows(tmp_path / name) == ROWS, name
    source = read(str(tmp_path / "pretty.jsonl"))
    assert [source.where(number)[-2:] for number, _ in source] == [":1", ":5"]
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(text)[:-9])
    with pytest.raises(UserError, match=r"cut\.jsonl\.gz: not a readable \.gz file"):
        rows(tmp_path / "cut.jsonl.gz")


@pytest.mark.parametrize("content", [json.dumps(ROWS), "[\n" + ",\n".join(map(json.dumps, ROWS)) + "\n]"])
def test_a_list_in_a_file_of_lines_is_renamed(tmp_path, content):
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=r"a\.jsonl:1: a JSON list") as error:
        rows(path)
    assert mended(path, str(error.value)) == ROWS


def test_rows_within_an_object_are_named_by_their_key(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"version": 1, "train": ROWS, "test": ROWS[:1]}))
    with pytest.raises(UserError, match=r"rows under 'train', 'test'\. Name them: \S+a\.json:train"):
        rows(path)
    assert rows(f"{path}:train") == ROWS
    assert rows(f"{path}:test") == ROWS[:1]
    with pytest.raises(UserError, match=r"no rows under 'dev'\. Found: train, test"):
        rows(f"{path}:dev")
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "Hi"}]}, indent=1))
    assert len(rows(path)) == 1  # one row over the whole file


@pytest.mark.parametrize("orient", ["columns", "split"])
def test_a_table_that_pandas_wrote_is_converted(tmp_path, orient):
    import pandas

    path = tmp_path / "a.json"
    pandas.DataFrame(ROWS).to_json(path, orient=orient)
    with pytest.raises(UserError, match="as pandas writes it") as error:
        rows(path)
    assert mended(path, str(error.value)) == ROWS


def test_nan_is_a_missing_value(tmp_path):
    import pandas
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "a.jsonl").write_text('{"text": NaN, "label": 1.5, "more": {"x": NaN}}\n')
    assert rows(tmp_path / "a.jsonl") == [{"text": None, "label": 1.5, "more": {"x": None}}]
    pq.write_table(pa.Table.from_pandas(pandas.DataFrame({"x": [1.0, float("nan")]})), tmp_path / "a.parquet")
    pq.write_table(pa.table({"x": pa.array([1.0, float("nan")])}), tmp_path / "b.parquet")
    assert rows(tmp_path / "a.parquet") == rows(tmp_path / "b.parquet") == [{"x": 1.0}, {"x": None}]


# ---------------------------------------------------------------------------------------------------- arrow


def test_fields_that_other_rows_have_are_not_there(tmp_path):
    from datasets import Dataset

    def turn(name, arguments):
        return {
            "messages": [{"role": "assistant", "tool_calls": [{"name": name, "arguments": arguments}]}],
            "tools": None,
        }

    given = [turn("weather", {"city": "Rome"}), turn("book", {"hour": 8})]
    expected = given
    table = Dataset.from_list(given)
    table.to_parquet(tmp_path / "a.parquet")
    table.save_to_disk(tmp_path / "saved")
    for name in ("a.parquet", "saved", "saved/data-00000-of-00001.arrow"):
        assert rows(tmp_path / name) == expected, name


def test_class_ids_are_read_as_names(tmp_path):
    from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value

    features = Features(
        text=Value("string"), label=ClassLabel(names=["pos", "neg"]), tags=List(ClassLabel(names=["O", "B"]))
    )
    table = Dataset.from_dict({"text": ["a", "b"], "label": [1, -1], "tags": [[0, 1], []]}, features=features)
    expected = [{"text": "a", "label": "neg", "tags": ["O", "B"]}, {"text": "b", "label": -1, "tags": []}]
    DatasetDict(train=table).save_to_disk(tmp_path / "saved")
    table.to_parquet(tmp_path / "a.parquet")
    for name in ("saved", "saved:train", "saved/train/data-00000-of-00001.arrow", "a.parquet"):
        source = read(str(tmp_path / name))
        assert [row for _, row in source] == expected, name
        assert source.classes == {"label": ("pos", "neg"), "tags": ("O", "B")}, name


# ---------------------------------------------------------------------------------------------------- folders


def test_a_folder_and_a_pattern_are_their_files(tmp_path):
    for name in ("b", "a"):
        write_jsonl(tmp_path / "f" / f"{name}.jsonl", [{"text": name}])
    (tmp_path / "f" / "README.txt.bak").write_text("x")
    for name in ("f", "f/*.jsonl", "*/[ab].jsonl"):
        source = read(str(tmp_path / name))
        assert [row["text"] for _, row in source] == ["a", "b"]
        assert [source.where(number) for number, _ in source] == [f"{tmp_path}/f/a.jsonl:1", f"{tmp_path}/f/b.jsonl:1"]
    assert read(str(tmp_path / "f")).digest() == read(str(tmp_path / "f/*.jsonl")).digest()
    with pytest.raises(UserError, match="no file fits this pattern"):
        read(str(tmp_path / "*.csv"))
    (tmp_path / "f" / "c.csv").write_text("text\nc\n")
    with pytest.raises(UserError, match=r"several kinds \(\.csv, \.jsonl\)"):
        read(str(tmp_path / "f"))


def test_a_folder_is_never_read_with_its_test_files(tmp_path):
    for name in ("data/train-00000-of-00001", "data/dev-00000-of-00001", "data/test-00000-of-00001"):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"text": name[5:8]}])
    assert [row["text"] for row in rows(tmp_path)] == ["tra"]
    assert [row["text"] for row in rows(f"{tmp_path}:validation")] == ["dev"]
    assert [row["text"] for row in rows(f"{tmp_path}:dev")] == ["dev"]
    with pytest.raises(UserError, match=r"no split 'tset'\. Found: validation, test, train"):
        read(f"{tmp_path}:tset")
    (tmp_path / "data/train-00000-of-00001.jsonl").unlink()
    with pytest.raises(UserError, match="none is for training"):
        read(str(tmp_path))


def test_configurations_of_a_folder_laid_out_as_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    home = tmp_path / "gsm8k"
    for config in ("main", "socratic"):
        for split in ("train", "test"):
            write_jsonl(home / config / f"{split}.jsonl", [{"text": f"{config} {split}"}])
    assert rows(f"{home}:main:test") == [{"text": "main test"}]  # folders, without a card
    card = ["---", "configs:"]
    for config in ("main", "socratic"):
        card += [f"- config_name: {config}", "  data_files:"]
        card += [f"  - split: {split}\n    path: {config}/{split}.jsonl" for split in ("train", "test")]
    (home / "README.md").write_text("\n".join([*card, "---", ""]))
    assert rows(f"{home}:socratic:test") == [{"text": "socratic test"}]
    assert rows(f"{home}:main:train[:1]") == [{"text": "main train"}]
    with pytest.raises(UserError, match=r"main.*socratic.*Choose with \S+gsm8k:CONFIG:SPLIT"):
        rows(f"{home}:test")


def test_a_configuration_of_the_hub_is_handed_on(monkeypatch):
    import datasets

    asked = []

    def load_dataset(*names, split):
        asked.append((*names, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for name in ("openai/gsm8k:main:test", "glue:sst2:train[:10%]", "squad:train[:2]"):
        assert rows(name) == ROWS
    assert asked == [("openai/gsm8k", "main", "test"), ("glue", "sst2", "train[:10%]"), ("squad", "train[:2]")]
