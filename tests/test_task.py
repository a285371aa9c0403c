"""A third task, registered from outside: it trains, evaluates, sweeps, plans, resumes, and writes page and card."""

import dataclasses
import hashlib
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import adapter, command, home, write_jsonl  # noqa: F401

from jaxtune import data, models
from jaxtune.cli import main
from jaxtune.data.batches import Assembler
from jaxtune.data.formats import Reader
from jaxtune.data.rows import ROW
from jaxtune.data.tokenize import check_unicode
from jaxtune.models.classifier import PROBLEMS, SEQUENCE, Labels, with_labels
from jaxtune.objectives import task as tasks
from jaxtune.weights.leaf import row_keys

# -------------------------------------------------------------------------- the whole of the task: rows, batches, loss


class PairEncoder:
    FIRST, MARK, ROW = 0, np.dtype("u1"), ROW

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def encode(self, places, examples):
        for place, pair in zip(places, examples):
            check_unicode(place, "".join(pair))
            ids = [self.tokenizer.encode(text) for text in pair]
            yield ids[0] + ids[1], [1] * len(ids[0]) + [2] * len(ids[1])

    def closed(self, rows, max_length, whole):
        return rows


class Pairs(data.RowForm):
    """Rows of two texts, `better` and `worse`, laid as one; a mark of 1 or 2 says whose a token is."""

    @property
    def settings(self):
        return {"form": "pairs"}

    def reader(self, source):
        return Reader("pairs", ("better", "worse"), lambda where, row: (row["better"], row["worse"]))

    def encoder(self, tokenizer):
        return PairEncoder(tokenizer)

    def sides(self, example):
        return example[1], example[0]

    def answers(self, rows):
        return np.array([int(hashlib.md5(rows[i][1].tobytes()).hexdigest()[:12], 16) for i in range(len(rows))])


class PairAssembler(Assembler):
    """tokens, positions, segments i32[A, B, 2, T], the better text first; weights f32[A, B]."""

    def assemble(self, plan, width=None):
        n, t = self.batch_size, width or self.width(plan)
        tokens, positions, segments = (np.zeros((n, 2, t), np.int32) for _ in range(3))
        weights = np.zeros(n, np.float32)
        for b, (member,) in enumerate(plan):
            ids, marks = self.rows[self.source[member]][self.index[member]]
            for side in (1, 2):
                own = ids[marks == side]
                tokens[b, side - 1, : len(own)], segments[b, side - 1, : len(own)] = own, 1
                positions[b, side - 1, : len(own)] = np.arange(len(own))
            weights[b] = 1
        arrays = {"tokens": tokens, "positions": positions, "segments": segments, "weights": weights}
        return self._finished(arrays, plan, t)


def pairwise(module):
    """-log sigmoid(score of the better - score of the worse), summed over pairs (Bradley & Terry 1952)."""

    def loss_fn(params, batch, key):
        flat = {k: batch[k].reshape(-1, batch[k].shape[-1]) for k in ("tokens", "positions", "segments")}
        keys = None if key is None else row_keys(key, jnp.repeat(batch["row"], 2))
        scores = module.apply({"params": params}, flat["tokens"], flat["positions"], flat["segments"], keys=keys)
        margin = scores.reshape(-1, 2)[:, 0] - scores.reshape(-1, 2)[:, 1]
        right = ((margin > 0) * batch["weights"]).sum()
        return ((jax.nn.softplus(-margin) * batch["weights"]).sum(), batch["weights"].sum()), {"right": right}

    return loss_fn


def batch_like(shape):
    rows = (shape.micros, shape.rows)
    tokens = jax.ShapeDtypeStruct((*rows, 2, shape.length), jnp.int32)
    weights, row = (jax.ShapeDtypeStruct(rows, dtype) for dtype in (jnp.float32, jnp.int32))
    return {"tokens": tokens, "positions": tokens, "segments": tokens, "weights": weights, "row": row}


def open_pairs(given):
    labels = Labels(SEQUENCE, ("score",), PROBLEMS[2], drawn=True)
    module = with_labels(
        models.build({**given.config, "architectures": None, "pad_token_id": 0}, **given.fields), labels
    )
    return module, tasks.Task(
        loss=lambda module, members: pairwise(module),
        batch_like=batch_like,
        metrics=lambda loss, weight, aux: {"eval/accuracy": float(aux["right"] / weight)},
        assembler=PairAssembler,
        form=Pairs(),
        features=False,
    )


# ------------------------------------------------------------------------------------------------------------- the use


@pytest.fixture(scope="module")
def task():
    tasks.register("pairs", open_pairs, auto_class="AutoModelForSequenceClassification")
    yield "pairs"
    del tasks.TASKS["pairs"]


@pytest.fixture(scope="module")
def argv(task, home, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("pairs")

    def rows(first, last):
        return [{"better": f"{i} and more", "worse": f"less than {i}"} for i in range(first, last)]

    settings = {
        "data__train": write_jsonl(folder / "train.jsonl", rows(0, 40)),
        "data__eval": write_jsonl(folder / "eval.jsonl", rows(40, 56)),
        "objective__name": task,
        "train__save_every": 4,
        "optim__lr": 3e-3,
    }
    return partial(command, home, **settings)


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(argv, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "pairs"
    assert main(argv(workdir)) == 0
    return workdir


def test_it_trains_and_evaluates(trained):
    found = [line for line in lines(trained) if "eval/accuracy" in line]
    assert found[-1]["eval/accuracy"] == 1.0 and found[-1]["eval/loss"] < found[0]["eval/loss"]


def test_the_loss_is_the_closed_form(trained, task):
    """At step 0, from the two scores of each row as the model gives them."""
    scores = jnp.array([[2.0, 0.5], [0.0, 1.0]])

    class Fixed:
        def apply(self, variables, tokens, positions, segments, keys=None):
            return scores.reshape(-1, 1)

    batch = jax.tree.map(lambda x: jnp.zeros(x.shape[1:], x.dtype), batch_like(tasks.BatchShape(2, 4)))
    (total, weight), _ = pairwise(Fixed())({}, batch | {"weights": jnp.ones(2)}, None)
    assert float(total / weight) == pytest.approx(np.mean(np.log1p(np.exp([-1.5, 1.0]))), rel=1e-6)


def test_it_writes_adapter_card_and_page(trained):
    assert (trained / "adapter" / "adapter_model.safetensors").is_file()
    assert "AutoModelForSequenceClassification" in (trained / "adapter" / "README.md").read_text()
    page = (trained / "report.html").read_text()
    assert "accuracy" in page and "jaxtune generate" not in page
    assert main(["report", str(trained)]) == 0


def test_it_resumes_to_the_same_bytes(argv, trained, tmp_path):
    assert main(argv(tmp_path / "run", train__steps=4)) == 0
    assert main(argv(tmp_path / "run")) == 0
    # The schedule of four steps is another, so the run alone is made the same way.
    assert main(argv(tmp_path / "again", train__steps=4)) == 0
    assert main(argv(tmp_path / "again")) == 0
    assert adapter(tmp_path / "run") == adapter(tmp_path / "again")


def test_it_is_evaluated(trained):
    """Row by row: together they are what training logged; the base has no score to compare with."""
    assert main(["eval", str(trained)]) == 0
    found = json.loads((trained / "eval.json").read_text())["held_out"]
    assert found["rows"] == 16 and any("no head" in note for note in found["notes"])
    rows = [json.loads(line) for line in (trained / "eval" / "rows.jsonl").read_text().splitlines()]
    assert found["metrics"]["accuracy"]["tuned"]["value"] == np.mean([row["tuned"]["accuracy"] for row in rows]) == 1
    logged = min(line["eval/loss"] for line in lines(trained) if "eval/loss" in line)
    assert found["metrics"]["loss"]["tuned"]["value"] == pytest.approx(logged, rel=1e-4)
    assert "accuracy" in (trained / "report.html").read_text()


def test_it_is_checked_before_the_run(argv, capsys):
    assert main([*argv(None), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "0 and moreless than 0" in out and "nothing was compiled" in out


def test_settings_of_other_tasks_are_refused(argv, tmp_path, capsys):
    assert main(argv(tmp_path / "no", data__packing="true")) == 2
    assert "data.packing has no effect: objective.name is pairs" in capsys.readouterr().err


def test_flags_of_other_tasks_are_refused(trained, capsys):
    assert main(["eval", str(trained), "--metrics=exact_match"]) == 2
    assert "--metrics has no effect on a run of objective.name=pairs" in capsys.readouterr().err


def test_it_sweeps(argv, tmp_path, capsys):
    flags = argv(tmp_path / "sweep", "--sweep.optim.lr=1e-3,3e-3")
    assert main(["sweep", *[flag for flag in flags[1:] if not flag.startswith("--config.optim.lr")]]) == 0
    for member in ("lr=0.001", "lr=0.003"):
        assert lines(tmp_path / "sweep" / member)[-1]["eval/accuracy"] > 0.5
    assert (tmp_path / "sweep" / "report.html").is_file()


def test_it_is_planned(argv, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("jaxtune.train.cost.POLICIES", ("none", "full"))
    file = tmp_path / "plan.py"
    flags = [flag.removeprefix("--config.") for flag in argv(None) if flag.startswith("--config.")]
    given = dict(flag.split("=", 1) for flag in flags)
    file.write_text(
        "def get_config():\n"
        f"    return {{'model': {{'path': {given['model.path']!r}}}, 'objective': {{'name': 'pairs'}},\n"
        "            'data': {'max_length': 64}, 'train': {'batch_size': 4}}\n"
    )
    capsys.readouterr()
    assert main(["plan", str(file), "--gpu=l4", "--json"]) == 0
    [found] = json.loads(capsys.readouterr().out)
    assert found["fits"] and found["policies"]["none"]["bytes"]["logits"] == 0


def test_a_name_is_given_once(task):
    with pytest.raises(ValueError, match="already"):
        tasks.register(task, open_pairs)
    assert dataclasses.is_dataclass(tasks.Task)
