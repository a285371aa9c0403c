"""Whole runs over pairs and judged answers: the command line from init to eval, and what holds of every run."""

import json
from functools import partial

import cards
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import adapter, command, home, read, write_jsonl  # noqa: F401

from jaxtune import tree
from jaxtune.cli import main
from jaxtune.config import resolve
from jaxtune.config.recipe import experiment
from jaxtune.data.packing import pack
from jaxtune.run import training
from jaxtune.run.experiment import open_data
from jaxtune.train.step import value_and_grad


def pairs(first, last):
    return [{"prompt": f"{i} is ", "chosen": f"{i}.", "rejected": f"no {i}"} for i in range(first, last)]


def judged(first, last):
    rows = [
        {"prompt": f"{i} is ", "completion": f"{i}." if good else f"no {i}", "label": good}
        for i in range(first, last)
        for good in (True, False)
    ]
    return rows[1:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("answers")
    for name, rows in (("preference", pairs), ("kto", judged)):
        write_jsonl(folder / f"{name}.jsonl", rows(0, 24))
        write_jsonl(folder / f"{name}_eval.jsonl", rows(24, 32))
    return folder


@pytest.fixture(scope="module")
def argv(home, folder):  # noqa: F811
    def argv(workdir, *flags, objective="preference", **settings):
        data = {"data__train": folder / f"{objective}.jsonl", "data__eval": folder / f"{objective}_eval.jsonl"}
        defaults = {"objective__name": objective, "train__save_every": 4, "optim__lr": 3e-3}
        return command(home, workdir, *flags, **data | defaults | settings)

    return argv


@pytest.fixture(scope="module")
def trained(argv, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "dpo"
    workdir.with_suffix(".json").write_text(json.dumps(cards.trained(argv(workdir))))
    return workdir


def evaluations(workdir):
    return [line for line in read(workdir) if "eval/loss" in line]


def test_dpo_learns_and_says_what(trained):
    first, *_, last = evaluations(trained)
    assert first["eval/loss"] == pytest.approx(np.log(2), abs=1e-5) and first["eval/margins"] == pytest.approx(
        0, abs=1e-5
    )
    assert last["eval/loss"] < first["eval/loss"] and last["eval/accuracy"] == 1 and last["eval/margins"] > 0
    assert first["eval/accuracy"] == 0.5  # whatever rounding makes of equal answers
    assert last["eval/rewards/chosen"] - last["eval/rewards/rejected"] == pytest.approx(last["eval/margins"], abs=1e-5)
    step = next(line for line in read(trained) if "train/loss" in line)
    assert {"train/margins", "train/accuracy", "train/rewards/chosen", "train/logps/rejected"} <= step.keys()


def loads(workdir, printed, monkeypatch):
    monkeypatch.chdir(workdir)
    for code in (cards.card(workdir / "adapter"), printed.values()):
        theirs, _ = cards.theirs_as_ours(code, [[3, 20, 7, 2], [9, 8, 50, 1]])
        assert type(theirs["base"]).__name__ == "LlamaForCausalLM"


def test_the_page_and_the_adapter(trained, monkeypatch):
    page = (trained / "report.html").read_text()
    assert "Margin of the rewards" in page and "jaxtune generate" in page
    loads(trained, json.loads(trained.with_suffix(".json").read_text()), monkeypatch)
    saved = json.loads((trained / "summary.json").read_text())
    assert saved["best"]["step"] == 12 and saved["cost"]["flops"] > 0


def test_it_resumes_to_the_same_bytes(argv, tmp_path):
    settings = {"optim__schedule": "constant", "optim__warmup": 0}
    assert main(argv(tmp_path / "whole", **settings)) == 0
    assert main(argv(tmp_path / "cut", **settings, train__steps=4)) == 0
    assert main(argv(tmp_path / "cut", **settings)) == 0
    assert adapter(tmp_path / "whole") == adapter(tmp_path / "cut")


def test_eval_compares_with_the_base(trained, capsys):
    assert main(["eval", str(trained)]) == 0
    found = json.loads((trained / "eval.json").read_text())["held_out"]["metrics"]
    assert found["accuracy"]["base"]["value"] == 0.5 and found["accuracy"]["tuned"]["value"] == 1
    assert found["margins"]["tuned"]["value"] == pytest.approx(evaluations(trained)[-1]["eval/margins"], rel=1e-3)
    assert found["loss"]["tuned"]["value"] == pytest.approx(evaluations(trained)[-1]["eval/loss"], rel=1e-3)
    assert main(["eval", str(trained), "--tuned-only"]) == 2 and "against its base" in capsys.readouterr().err


def test_it_generates(trained, capsys):
    assert main(["generate", str(trained), "--prompt=3 is", "--max-new-tokens=2"]) == 0


def test_beta_is_swept_in_one_step(argv, tmp_path, capsys):
    flags = argv(tmp_path / "sweep", "--sweep.objective.beta=0.1,0.5", "--config.train.best=eval/accuracy")
    assert main(["sweep", *flags[1:]]) == 0
    assert "2 in one step" in capsys.readouterr().out
    assert main(argv(tmp_path / "alone", "--config.objective.beta=0.5")) == 0
    alone, member = (evaluations(tmp_path / name)[-1] for name in ("alone", "sweep/beta=0.5"))
    assert member["eval/margins"] == pytest.approx(alone["eval/margins"], rel=1e-3)
    assert member["eval/margins"] != pytest.approx(evaluations(tmp_path / "sweep" / "beta=0.1")[-1]["eval/margins"])


@pytest.mark.parametrize("objective", ["preference", "kto"])
def test_live_and_precomputed_references_agree(argv, tmp_path, objective):
    found = []
    for how in ("precomputed", "live"):
        workdir = tmp_path / how
        assert main(argv(workdir, objective=objective, objective__reference=how, train__steps=4)) == 0
        found.append(read(workdir))
    for a, b in zip(*found, strict=True):
        assert objective == "kto" or ("eval/kl" in b) == ("eval/loss" in b)  # exact, where the base is at hand
        for name in ("train/loss", "eval/loss", *(["eval/kl"] if objective == "kto" else [])):
            assert a.get(name) == pytest.approx(b.get(name), abs=1e-5)


def test_kto_learns(argv, tmp_path, monkeypatch):
    printed = cards.trained(argv(tmp_path / "kto", objective="kto", train__best="eval/accuracy"))
    loads(tmp_path / "kto", printed, monkeypatch)
    first, *_, last = evaluations(tmp_path / "kto")
    assert last["eval/loss"] < first["eval/loss"] and last["eval/accuracy"] > first["eval/accuracy"] == 0.5
    assert last["eval/rewards/chosen"] > last["eval/rewards/rejected"] and "eval/kl" in last
    assert main(["eval", str(tmp_path / "kto")]) == 0
    found = json.loads((tmp_path / "kto" / "eval.json").read_text())["held_out"]["metrics"]
    assert found["accuracy"]["tuned"]["value"] > found["accuracy"]["base"]["value"] == 0.5


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        (
            "full",
            [
                *("--config.tune.method=full", "--config.optim.lr=1e-3"),
                *("--config.objective.loss=sigmoid,ipo", "--config.objective.loss_weights=1,0.1"),
            ],
        ),
        ("dora", ["--config.tune.lora.use_dora=true", "--config.model.quantization=nf4"]),
        ("orpo", ["--config.objective.loss=orpo"]),
        ("shared", ["--config.data.packing=true", "--config.objective.share_prompt=true"]),
        (
            "above a cut",
            ["--config.tune.lora.layers_to_transform=1", "--config.train.cache_features=on"],
        ),
    ],
)  # fmt: skip
def test_methods_and_losses(argv, tmp_path, name, flags):
    settings = {"tune__lora__r": None, "tune__lora__lora_dropout": None} if name == "full" else {}
    assert main(argv(tmp_path / "run", *flags, **settings)) == 0
    first, *_, last = evaluations(tmp_path / "run")
    assert last["eval/loss"] < first["eval/loss"] and last["eval/margins"] > first["eval/margins"]


@pytest.fixture(scope="module")
def job(argv):
    """A job of a LoRA run, its batches with the reference in them, and one batch of eight rows."""

    def job(objective, parts):
        words = argv(
            None, objective=objective, train__batch_size=8, train__grad_accum=parts, tune__lora__lora_dropout=0
        )
        given = {w.removeprefix("--config.").split("=", 1)[0]: w.split("=", 1)[1] for w in words[1:]}
        opened = experiment(resolve({}, given))
        made = training.build([opened], open_data(opened))
        return training.with_reference(made, lambda line: None, lambda: False)

    return job


@pytest.mark.parametrize("objective", ["preference", "kto"])
def test_micro_batches_change_nothing(job, objective):
    found = []
    for parts in (1, 4):
        made = job(objective, parts)
        loss, state = made.experiment.recipe.loss(), made.state
        # A step away from the base, where the gradient of every part is not zero.
        trainable = jax.tree.map(lambda x: x + 0.01, state.trainable)
        grads = jax.jit(value_and_grad(loss, made.mesh))
        batch = made.put(made.batch_at(0), [0])
        found.append(grads(trainable, state.member, made.frozen, batch, jax.random.key(1)))
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("attention", ["mapped", "xla"])
def test_packed_and_shared_rows_change_nothing(job, attention):
    """Loss and gradient of the same pairs, each text in a row of its own, packed, and with prompts laid once."""
    from jaxtune.data.pairs import PairAssembler, SharedAssembler

    made = job("preference", 1)
    rows, state = made.rows.train, made.state
    trainable = jax.tree.map(lambda x: x + 0.01, state.trainable)
    reference = np.random.default_rng(0).normal(-20, 3, (2, len(rows[0]))).astype(np.float32)
    module = made.module.clone(attention=attention)
    loss = made.experiment.task.loss(module, 1)
    found, tokens = [], []
    for laid, size, width, packing in (
        (PairAssembler, len(rows[0]), 32, False),
        (PairAssembler, 8, 100, True),
        (SharedAssembler, 8, 100, True),
    ):
        laid = laid(rows, size, 1, width, packing)
        laid.reference = reference
        plan = pack(laid.length, width) if packing else [[i] for i in range(size)]
        batch = jax.tree.map(lambda x: x[0], laid.assemble([np.asarray(p) for p in plan]))
        assert batch["weights"].sum() == len(rows[0])
        tokens.append(int((batch["segments"] > 0).sum()))

        def value(trainable, batch=batch):
            return loss(tree.combine(trainable, state.member, made.frozen), batch, None)[0][0]

        found.append(jax.jit(jax.value_and_grad(value))(trainable))
    assert tokens[2] < tokens[1] == tokens[0]
    for other in found[1:]:
        for a, b in zip(jax.tree.leaves(found[0]), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(jnp.abs(a).max()))


def test_packed_judged_answers_change_nothing(job):
    """KTO's loss and gradient, its KL among them, with each answer in a row of its own, and packed."""
    from jaxtune.data.pairs import JudgedAssembler

    made = job("kto", 1)
    rows, state = made.rows.train, made.state
    trainable = jax.tree.map(lambda x: x + 0.01, state.trainable)
    reference = np.random.default_rng(0).normal(-20, 3, (2, len(rows[0]))).astype(np.float32)
    loss, found = made.experiment.task.loss(made.module, 1), []
    for size, width, packing in ((len(rows[0]), 32, False), (8, 100, True)):
        laid = JudgedAssembler(rows, size, 1, width, packing)
        laid.reference = reference
        plan = pack(laid.length, width) if packing else np.arange(size)[:, None]
        batch = jax.tree.map(lambda x: x[0], laid.assemble(plan))
        assert batch["weights"].sum() == len(rows[0])
        assert batch["tokens"].shape[:2] == (size, 2) and (batch["segments"].max() > 1) == packing

        def value(trainable, batch=batch):
            params = tree.combine(trainable, state.member, made.frozen)
            sums = jax.lax.stop_gradient(loss.sums(params, batch, None))
            (total, weight), aux = loss.loss(params, batch, None, sums)
            return total, (weight, sums, aux)

        found.append(jax.jit(jax.value_and_grad(value, has_aux=True))(trainable))
    assert found[0][0][1][1][0] != 0  # the KL is seen
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(jnp.abs(a).max()))


def test_the_reference_is_that_of_the_base(job):
    made = job("preference", 1)
    batch = jax.tree.map(lambda x: jnp.asarray(x[0]), made.batch_at(0))
    from jaxtune.objectives.preference import answers, base_of

    params = tree.combine(made.state.trainable, made.state.member, made.frozen)
    sums, _ = jax.jit(partial(answers, made.module, key=None))(base_of(params), batch)
    np.testing.assert_allclose(sums, batch["reference"], rtol=1e-5, atol=1e-5)


def test_the_reference_is_found_again(argv, tmp_path, capsys, monkeypatch):
    from jaxtune.train.reference import Reference

    monkeypatch.setattr(Reference, "_pass", lambda *args: pytest.fail("it was computed again"))
    assert main(argv(tmp_path / "again", train__steps=1)) == 0


BAD = {
    "beta of 0": (["--config.objective.beta=0"], "it must be above 0"),
    "unknown loss": (["--config.objective.loss=dpo"], "no loss is called 'dpo'"),
    "a loss twice": (["--config.objective.loss=ipo,ipo"], "twice"),
    "gamma of dpo": (["--config.objective.gamma=1"], "objective.gamma has no effect: objective.loss is"),
    "smoothing of ipo": (["--config.objective.loss=ipo", "--config.objective.label_smoothing=0.1"], "has no effect"),
    "reference of orpo": (["--config.objective.loss=orpo", "--config.objective.reference=live"], "has no effect"),
    "weights of one": (["--config.objective.loss_weights=2"], "has no effect"),
    "too few weights": (
        ["--config.objective.loss=ipo,hinge", "--config.objective.loss_weights=1"], "1 numbers and objective.loss 2"
    ),
    "robust": (["--config.objective.loss=robust", "--config.objective.label_smoothing=0.5"], "below 0.5"),
    "shared without packing": (["--config.objective.share_prompt=true"], "data.packing is off"),
    "packed and cut": (["--config.data.packing=true", "--config.data.overlength=truncate"], "packed pairs"),
    "split": (["--config.data.overlength=split"], "choose drop or truncate"),
    "live over full": (
        ["--config.tune.method=full", "--config.objective.reference=live"], "objective.reference=live: tune.method=full"
    ),
    "live over a saved module": (
        ["--config.tune.lora.modules_to_save=lm_head", "--config.objective.reference=live"], "so that the base is not"
    ),
    "best": (["--config.train.best=eval/acuracy"], "Did you mean 'eval/accuracy'"),
    "kto's weights": (["--config.objective.desirable_weight=2"], "has no effect: objective.name is preference"),
}  # fmt: skip


@pytest.mark.parametrize(("flags", "said"), BAD.values(), ids=BAD)
def test_bad_input_is_told_before_the_run(argv, capsys, flags, said):
    full = any("method=full" in flag for flag in flags)
    settings = {"tune__lora__r": None, "tune__lora__lora_dropout": None} if full else {}
    assert main(argv(None, *flags, "--dry-run", **settings)) == 2
    assert said in capsys.readouterr().err


def test_dry_run_shows_a_pair(argv, capsys):
    assert main(argv(None, "--dry-run")) == 0
    out = capsys.readouterr().out
    assert "⟦0.</s>⟧" in out and "⟦no 0</s>⟧" in out and "nothing was compiled" in out


@pytest.mark.parametrize("objective", ["preference", "kto"])
def test_data_is_examined(argv, tmp_path, objective):
    rows = pairs(0, 30) if objective == "preference" else judged(0, 30)[::2] + judged(0, 3)
    if objective == "preference":
        rows += [rows[0] | {"chosen": rows[0]["rejected"]}, rows[1] | {"chosen": "no 1", "rejected": "1."}]
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    flags = argv(None, objective=objective, data__train=file)[1:]
    assert main(["data", *flags, f"--workdir={tmp_path / 'report'}"]) == 0
    found = {
        f["check"]: f["message"] for f in json.loads((tmp_path / "report" / "data_report.json").read_text())["findings"]
    }
    if objective == "preference":
        assert "1 row" in found["equal_pairs"] and "1 row" in found["swapped_pairs"]
        assert "longer one in" in found["length_bias"] and "conflicts" not in found
    else:
        assert "good answers" in found["imbalance"]


@pytest.mark.parametrize("objective", ["preference", "kto"])
def test_init_proposes_the_objective(home, folder, tmp_path, objective):  # noqa: F811
    out = tmp_path / "config.py"
    argv = ["init", f"--model={home / 'model'}", f"--data={folder / f'{objective}.jsonl'}", f"--out={out}"]
    assert main(argv) == 0
    assert f'config.objective.name = "{objective}"' in out.read_text()
    assert main(["train", f"--config={out}", "--dry-run"]) == 0


def test_it_is_planned(argv, home, tmp_path, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setattr("jaxtune.train.cost.POLICIES", ("none", "full"))
    for objective in ("preference", "kto"):
        file = tmp_path / f"{objective}.py"
        file.write_text(
            "def get_config():\n"
            f"    return {{'model': {{'path': {str(home / 'model')!r}}}, 'objective': {{'name': {objective!r}}},\n"
            "            'data': {'max_length': 64}, 'train': {'batch_size': 4}}\n"
        )
        assert main(["plan", str(file), "--gpu=l4", "--json"]) == 0
        [found] = json.loads(capsys.readouterr().out)
        assert found["fits"]


def test_other_objectives_name_this_one(argv, folder, capsys):
    flags = argv(None, "--dry-run", objective="preference", objective__name="causal_lm")
    assert main(flags) == 2 and "set objective.name=preference" in capsys.readouterr().err
    flags = argv(None, "--dry-run", objective="kto", objective__name="causal_lm")
    assert main(flags) == 2 and "set objective.name=kto" in capsys.readouterr().err
