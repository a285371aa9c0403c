"""Reward models: the loss, whole runs from pairs to scores, their exports in transformers, trl's trainer."""

import json
from functools import partial

import cards
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import trl_runs
from runs import adapter, command, home, read, write_jsonl  # noqa: F401

from jaxtune.cli import main
from jaxtune.objectives.reward import reward


def pairs(first, last, **more):
    return [{"prompt": f"{i} is ", "chosen": f"{i}.", "rejected": f"no {i}", **more} for i in range(first, last)]


@pytest.mark.parametrize("centering", [0.0, 0.2])
def test_the_loss_is_that_of_trl(centering):
    """-logsigmoid(chosen - rejected - margin) and the squared sum, as torch has them; missing pairs add 0."""
    import torch

    rng = np.random.default_rng(0)
    scores, margin = rng.normal(0, 2.0, (3, 2)).astype(np.float32), np.array([0.0, 0.5, 2.0], np.float32)

    class Fixed:
        def apply(self, variables, tokens, positions, segments, keys=None):
            return variables["params"].reshape(-1, 1)

    def ours(scores):
        number = jnp.array([1.0, 1.0, 1.0, 0.0])
        batch = {"weights": number, "margin": jnp.pad(margin, (0, 1))}
        batch |= {name: jnp.zeros((4, 2, 5), jnp.int32) for name in ("tokens", "positions", "segments")}
        (total, weight), aux = reward(Fixed(), centering)(jnp.pad(scores, ((0, 1), (0, 0))), batch, None)
        return total / weight, aux["means"]

    (value, means), grad = jax.value_and_grad(ours, has_aux=True)(jnp.asarray(scores))
    x = torch.tensor(scores, requires_grad=True)
    want = -torch.nn.functional.logsigmoid(x[:, 0] - x[:, 1] - torch.tensor(margin)).mean()
    want = want + centering * torch.mean((x[:, 0] + x[:, 1]) ** 2)
    want.backward()
    assert float(value) == pytest.approx(float(want.detach()), rel=1e-6)
    np.testing.assert_allclose(grad, x.grad.numpy(), atol=1e-6)
    right, count = means["accuracy"]
    assert float(right / count) == pytest.approx(np.mean(scores[:, 0] > scores[:, 1]))


@pytest.fixture(scope="module")
def argv(home, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("pairs")
    held_out = [row | {"kind": "even" if i % 2 == 0 else "odd"} for i, row in enumerate(pairs(24, 36))]
    chosen = {
        "data__train": write_jsonl(folder / "train.jsonl", pairs(0, 24)),
        "data__eval": write_jsonl(folder / "eval.jsonl", held_out),
        **{"objective__name": "reward", "optim__lr": 5e-3, "train__save_every": 4},
    }
    return partial(command, home, **chosen)


@pytest.fixture(scope="module")
def trained(argv, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "reward"
    workdir.with_suffix(".json").write_text(json.dumps(cards.trained(argv(workdir))))
    return workdir


def evaluations(workdir):
    return [line for line in read(workdir) if "eval/loss" in line]


def test_it_learns_which_answer_is_better(trained):
    first, *_, last = evaluations(trained)
    assert last["eval/loss"] < first["eval/loss"] and last["eval/accuracy"] == 1
    assert last["eval/margins"] == pytest.approx(last["eval/rewards/chosen"] - last["eval/rewards/rejected"], abs=1e-5)


def test_page_and_card(trained, monkeypatch):
    monkeypatch.chdir(trained)
    printed = json.loads(trained.with_suffix(".json").read_text())
    for code in (cards.card(trained / "adapter"), printed.values()):
        theirs, ours = cards.theirs_as_ours(code, [[3, 20, 7, 257], [9, 8, 50, 257]])
        assert (
            type(theirs["base"]).__name__ == "LlamaForSequenceClassification" and theirs["base"].config.num_labels == 1
        )
        assert len(ours["module"].labels.names) == 1
    page = (trained / "report.html").read_text()
    assert "accuracy" in page and "jaxtune generate" not in page


def test_it_resumes_to_the_same_bytes(argv, tmp_path):
    given = {"optim__schedule": "constant", "optim__warmup": 0}
    assert main(argv(tmp_path / "whole", **given)) == 0
    assert main(argv(tmp_path / "cut", train__steps=4, **given)) == 0
    assert main(argv(tmp_path / "cut", **given)) == 0
    assert adapter(tmp_path / "whole") == adapter(tmp_path / "cut")


def test_an_export_scores_the_same_in_transformers(trained, tmp_path):
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from jaxtune.infer.source import find, open_source

    assert main(["export", str(trained), str(tmp_path / "model")]) == 0
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    module, params, _ = open_source(find(trained))
    for text in ("3 is 3.</s>", "31 is no 31</s>"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        padded = np.array([ids + [theirs.config.pad_token_id] * 3])
        with torch.no_grad():
            want = theirs(torch.tensor(padded)).logits.numpy()
        there = (np.arange(padded.shape[1]) < len(ids)).astype(np.int32)[None]
        got = module.apply({"params": params}, padded, jnp.arange(padded.shape[1])[None], there)
        np.testing.assert_allclose(got, want, atol=1e-4)


def test_eval_gives_the_accuracy_of_pairs_with_its_interval_and_by_group(trained):
    assert main(["eval", str(trained), "--group-by=kind"]) == 0
    found = json.loads((trained / "eval.json").read_text())["held_out"]
    told = found["metrics"]["accuracy"]["tuned"]
    assert told["value"] == 1 and told["low"] < 1 <= told["high"]
    assert found["groups"]["rows"] == {"even": 6, "odd": 6}
    assert found["metrics"]["loss"]["tuned"]["value"] == pytest.approx(evaluations(trained)[-1]["eval/loss"], rel=1e-3)


def test_it_scores_the_answers_of_another_model(home, trained, tmp_path):  # noqa: F811
    workdir = tmp_path / "sft"
    assert main(command(home, workdir, train__steps=2)) == 0
    assert (
        main(["eval", str(workdir), f"--scorer=reward:{trained}", "--max-new-tokens=4", "--metrics=exact_match"]) == 0
    )
    found = json.loads((workdir / "eval.json").read_text())["held_out"]["metrics"]["reward"]
    assert np.isfinite(found["base"]["value"]) and np.isfinite(found["tuned"]["value"])


def test_what_is_no_reward_model_is_refused(home, trained, tmp_path, capsys):  # noqa: F811
    assert main(["eval", str(home / "model"), f"--data={home}/eval.jsonl", f"--scorer=reward:{home}/model"]) == 2
    assert "is no reward model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"objective__centering": -1}, "0 or more"),
        ({"data__packing": "true"}, "data.packing has no effect"),
        ({"objective__beta": 0.5}, "objective.beta has no effect"),
        ({"data__overlength": "split"}, "split has no meaning"),
    ],
    ids=str,
)
def test_what_is_refused_before_the_run(argv, tmp_path, capsys, changes, words):
    assert main(argv(tmp_path / "no", **changes)) == 2
    assert words in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # trl's own
def test_thirty_steps_are_those_of_trl(home, tmp_path):  # noqa: F811
    """Every step takes all rows, so that their order does not matter; both begin with one head."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from trl import RewardConfig, RewardTrainer

    rows, start = pairs(0, 8), tmp_path / "start"
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(home / "model", num_labels=1, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(home / "model")
    model.config.pad_token_id, model.config.problem_type = tokenizer.pad_token_id, "regression"
    model.save_pretrained(start)
    tokenizer.save_pretrained(start)
    model = AutoModelForSequenceClassification.from_pretrained(start, dtype=torch.float32)
    theirs = trl_runs.losses(
        RewardTrainer, RewardConfig, model, rows, tmp_path / "trl", center_rewards_coefficient=0.01
    )
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    settings = trl_runs.OURS | {"model__path": start, "data__train": file, "train__batch_size": len(rows)}
    settings |= {"objective__name": "reward", "objective__centering": 0.01}
    assert main(command(home, tmp_path / "run", **settings)) == 0
    found = [line["train/loss"] for line in read(tmp_path / "run") if "train/loss" in line]
    assert len(found) == len(theirs) == trl_runs.STEPS and found[-1] < found[0]
    assert found == pytest.approx(theirs, abs=1e-4)
