"""Runs of an encoder-decoder by the command line: from rows to a directory that transformers and peft load."""

import json
import shutil

import numpy as np
import pytest
from runs import write_jsonl

from jaxtune import tiny
from jaxtune.cli import main

pytestmark = pytest.mark.filterwarnings("ignore")  # peft warns of what it corrects by itself

CONFIG = {
    **{"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True},
    **{"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "feed_forward_proj": "gated-gelu"},
    **{"relative_attention_num_buckets": 8, "relative_attention_max_distance": 16, "tie_word_embeddings": True},
    **{"pad_token_id": 1, "decoder_start_token_id": 1},
}
WORDS = ["mugs", "lamps", "kettles", "towels", "boxes", "spoons"]


def rows(count: int = 24) -> list[dict]:
    return [
        {"document": f"Order {n}: {n % 7} blue {WORDS[n % 6]} and a lamp.", "summary": f"{n % 7} {WORDS[n % 6]}"}
        for n in range(count)
    ]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A T5 of random weights, saved by transformers, with the packaged tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("t5")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tiny.BASE / name, folder / name)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    values = {k: v for k, v in CONFIG.items() if k not in ("model_type", "architectures")}
    config = AutoConfig.for_model("t5", **values, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    torch.manual_seed(0)
    AutoModelForSeq2SeqLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_jsonl(tmp_path_factory.mktemp("rows") / "rows.jsonl", rows())


def flags(base, data, **more) -> list[str]:
    settings = {
        **{"model.path": base, "data.train": data, "objective.name": "seq2seq", "data.eval_fraction": 0.2},
        **{"train.steps": 2, "train.batch_size": 4, "optim.lr": 0.01, "tune.lora.r": 2, "log.tensorboard": False},
        **{"data.max_length": 64, "data.max_target_length": 16, "data.cache": False},
        **more,
    }
    return [f"--config.{path}={value}" for path, value in settings.items() if value is not None]


@pytest.fixture(scope="module")
def run(base, data, tmp_path_factory):
    """A LoRA run with samples and metrics."""
    folder = tmp_path_factory.mktemp("run") / "run"
    more = {"evaluate.samples": 1, "evaluate.metrics": "exact_match,rouge_l", "evaluate.max_new_tokens": 8}
    done(["train", *flags(base, data, **more), f"--workdir={folder}"])
    return folder


def test_a_run_ends_with_an_adapter_that_peft_loads(run, base):
    from peft import PeftModel, PeftModelForSeq2SeqLM
    from transformers import AutoModelForSeq2SeqLM

    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_2_SEQ_LM"
    assert {"q", "k", "v", "o", "wi_0", "wi_1", "wo"} == set(config["target_modules"])
    model = PeftModel.from_pretrained(AutoModelForSeq2SeqLM.from_pretrained(base), str(run / "adapter"))
    assert isinstance(model, PeftModelForSeq2SeqLM)
    card = (run / "adapter" / "README.md").read_text()
    assert "AutoModelForSeq2SeqLM.from_pretrained" in card and "text2text-generation" in card
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert any("eval/perplexity" in line for line in lines) and any("eval/rouge_l" in line for line in lines)


def test_its_loss_is_that_of_transformers(run, base, data):
    """The first evaluation, before a step: the mean over the targets' tokens of the held-out rows."""
    import torch
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    from jaxtune.data import load_tokenizer, prepare
    from jaxtune.data.seq2seq import Seq2SeqAssembler, Seq2SeqForm
    from jaxtune.hf.load import load
    from jaxtune.objectives.seq2seq import seq2seq

    own = load_tokenizer(str(base))
    (train,), _, _ = prepare(own, [str(data)], labels=Seq2SeqForm(longest=64, target=16), max_length=64, cache=False)
    assembler = Seq2SeqAssembler([train], 8, 1, 64, False)
    batch = {k: v[0] for k, v in assembler.assemble([np.array([i]) for i in range(5)]).items()}
    module, params = load(base)
    (total, weight), _ = seq2seq(module)(params, batch, None)

    tokenizer, model = AutoTokenizer.from_pretrained(base), AutoModelForSeq2SeqLM.from_pretrained(base).eval()
    pairs = [(row["document"], row["summary"]) for row in rows()[:5]]
    source = tokenizer([a for a, _ in pairs], padding=True, return_tensors="pt")
    targets = [[*tokenizer(text_target=b).input_ids, tokenizer.eos_token_id] for _, b in pairs]
    wide = max(map(len, targets))
    labels = torch.tensor([ids + [-100] * (wide - len(ids)) for ids in targets])
    with torch.no_grad():
        out = model(input_ids=source.input_ids, attention_mask=source.attention_mask, labels=labels)
    assert weight == sum(map(len, targets))
    assert float(total / weight) == pytest.approx(float(out.loss), rel=1e-5)


def test_eval_generate_and_export_of_a_run(run, base, data, tmp_path, capsys):
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    done(["eval", str(run), "--metrics=loss,exact_match"])
    report = json.loads((run / "eval.json").read_text())["held_out"]
    assert {"loss", "exact_match"} <= report["metrics"].keys()
    prompt = rows()[3]["document"]
    done(["export", str(run), f"{tmp_path}/merged"])
    capsys.readouterr()
    done(["generate", str(run), f"--prompt={prompt}", "--max-new-tokens=6"])
    found = capsys.readouterr().out
    tokenizer, model = (auto.from_pretrained(tmp_path / "merged") for auto in (AutoTokenizer, AutoModelForSeq2SeqLM))
    ids = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=6, do_sample=False)[0]
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() in found


def last(folder, name: str = "eval/loss") -> float:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line][-1]


def test_a_sweep_in_one_step_gives_the_run_and_a_run_goes_on(run, base, data, tmp_path):
    arguments = [flag for flag in flags(base, data) if not flag.startswith("--config.optim.lr")]
    done(["sweep", *arguments, "--sweep.optim.lr=0.01,0.02", f"--workdir={tmp_path}/sweep"])
    members = [path.parent for path in sorted((tmp_path / "sweep").glob("*/metrics.jsonl"))]
    assert len(members) == 2
    assert min(abs(last(member) / last(run) - 1) for member in members) < 1e-4
    shutil.copytree(run, tmp_path / "run")
    more = {"evaluate.samples": 1, "evaluate.metrics": "exact_match,rouge_l", "evaluate.max_new_tokens": 8}
    done(["train", *flags(base, data, **more | {"train.steps": 3}), f"--workdir={tmp_path}/run"])
    assert last(tmp_path / "run", "step") == 3 and last(tmp_path / "run") < last(run)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"tune.method": "full"},
        {"tune.method": "head"},
        {"tune.method": "ia3", "tune.ia3.target_modules": "k,v,wo", "tune.ia3.feedforward_modules": "wo"},
        {"tune.method": "lora", "tune.lora.use_dora": True},
        {"tune.method": "lora", "model.quantization": "nf4"},
        {"tune.method": "last_n", "tune.last_n.layers": 1},
        {"tune.method": "norms"},
    ],
    ids=lambda settings: "-".join(str(v) for v in settings.values()),
)
def test_methods(settings, base, data, tmp_path):
    settings = dict(settings)
    more = {} if settings["tune.method"] == "lora" else {"tune.lora.r": None}
    done(["train", *flags(base, data, **more, **settings), f"--workdir={tmp_path}/run"])
    done(["generate", f"{tmp_path}/run", "--prompt=Order 3: 3 blue lamps.", "--max-new-tokens=4"])


@pytest.fixture
def refused(capsys):
    """Run a command that ends with one message, and return that."""

    def run(arguments: list[str]) -> str:
        assert main(arguments) == 2
        said = capsys.readouterr().err
        assert "Traceback" not in said
        return said

    return run


def done(arguments: list[str]) -> None:
    assert main(arguments) == 0


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"source": "two mugs", "target": "  "}, "rows.jsonl:2: the target is empty"),
        ({"source": "", "target": "mugs"}, "rows.jsonl:2: the source is empty"),
        ({"source": "two mugs"}, "target"),
        ({"source": ["two"], "target": "mugs"}, "source"),
    ],
)
def test_bad_rows_are_refused_by_place(row, says, base, tmp_path, refused):
    file = write_jsonl(tmp_path / "rows.jsonl", [{"source": "a mug", "target": "mug"}, row])
    assert says in refused(["train", *flags(base, file), "--dry-run"])


def test_what_does_not_fit_is_refused_in_one_message(base, data, refused):
    def train(**more):
        return refused(["train", *flags(base, data, **more), "--dry-run"])

    text = {"objective.name": "causal_lm", "data.columns": "prompt=document,completion=summary"}
    assert "set objective.name=seq2seq" in train(**text, **{"data.max_target_length": None})
    assert "set objective.name=causal_lm" in train(**{"model.path": tiny.BASE})
    assert "data.max_target_length=2" in train(**{"data.max_target_length": 2})
    assert "data.max_length=4" in train(**{"data.max_length": 4})
    assert "drop or truncate" in train(**{"data.overlength": "split"})
    assert "data.packing" in train(**{"data.packing": True})
    assert "prompt_tuning" in train(**{"tune.method": "prompt_tuning", "tune.lora.r": None})
    for name in ("preference", "embedding"):
        assert "encoder-decoder" in train(**{"objective.name": name, "data.max_target_length": None})
    for flag in (
        "--forgetting=rows",
        "--frontier=rows",
        "--memory",
        "--tasks=arc_easy",
        "--confidence --unpaired=text",
    ):
        assert f"{flag.partition('=')[0].split()[-1]} is not for encoder-decoders" in refused(
            ["eval", str(base), *flag.split()]
        )
    assert "decide is not for encoder-decoders" in refused(["decide", f"--model={base}", f"--data={data}"])


def test_rows_are_cut_on_each_side(base, tmp_path):
    """Whatever both sides have together, neither is cut by the limit of the other; the end token stays."""
    from jaxtune.data import load_tokenizer, prepare
    from jaxtune.data.seq2seq import Seq2SeqForm, split
    from jaxtune.evaluate.rows import read_rows

    tokenizer = load_tokenizer(str(base))
    file = write_jsonl(tmp_path / "long.jsonl", [{"source": "mugs " * n, "target": "lamps " * 30} for n in (9, 90)])
    form = Seq2SeqForm(longest=24, target=20, cuts=True)
    (train,), _, _ = prepare(tokenizer, [str(file)], labels=form, max_length=24, overlength="truncate", cache=False)
    sides = [split(*train[i]) for i in range(len(train))]
    assert [len(target) for _, target in sides] == [20, 20] and len(sides[1][0]) == 24
    assert all(target[-1] == tokenizer.eos_token_id for _, target in sides)
    write_jsonl(file, [{"source": "mugs " * 90, "target": "lamps " * n} for n in (2, 30)])
    found, _ = read_rows(tokenizer, [str(file)], labels=form, max_length=24, overlength="truncate", cache=False)
    assert [row.prompt is not None for row in found] == [True, False]  # a whole answer is compared with


def test_init_recognises_the_base_and_its_config_trains(base, tmp_path, capsys):
    data = write_jsonl(tmp_path / "rows.jsonl", [*rows(200), {"document": "A lamp.", "summary": "lamps " * 30}])
    done(["init", f"--model={base}", f"--data={data}", f"--out={tmp_path}/config.py"])
    text = (tmp_path / "config.py").read_text()
    assert 'objective.name = "seq2seq"' in text and "data.max_target_length = 16" in text
    assert "147,483" not in text
    capsys.readouterr()
    done(["train", f"--config={tmp_path}/config.py", "--dry-run"])
    assert "⟦" in capsys.readouterr().out
    file = write_jsonl(
        tmp_path / "asked.jsonl",
        [{"question": "How many?", "context": row["document"], "answer": row["summary"]} for row in rows()],
    )
    done(["init", f"--model={base}", f"--data={file}", f"--out={tmp_path}/asked.py"])


def test_init_names_both_sides(base, tmp_path, refused):
    file = write_jsonl(tmp_path / "rows.jsonl", [{"text": "hello there"}] * 9)
    said = refused(["init", f"--model={base}", f"--data={file}", f"--out={tmp_path}/config.py"])
    assert "--columns=source=THEIRS,target=THEIRS" in said
