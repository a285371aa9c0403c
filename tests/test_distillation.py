"""Distillation: trl's divergence, exact gradients without logits of the batch, files of the teacher, whole runs."""

import json
from functools import partial

import cards
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import adapter, command, compiled, home, write_model  # noqa: F401
from safetensors.numpy import load_file, save_file

from jaxtune import models
from jaxtune.cli import main
from jaxtune.models.decoder import head_logits
from jaxtune.objectives import distillation as d
from jaxtune.objectives.task import Draws
from jaxtune.run import drawing
from jaxtune.tree import Beside

RNG = np.random.default_rng(0)
P, Q = RNG.normal(0, 3.0, (2, 7, 50)).astype(np.float32)  # logits of a teacher and a student
KINDS = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.3}  # and what trl's beta is for them


@pytest.mark.filterwarnings("ignore")  # trl's own
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("kind", KINDS)
def test_divergence_is_that_of_trl(kind, temperature):
    import torch
    from trl.experimental.gkd import GKDTrainer

    student = torch.tensor(Q[None], requires_grad=True)
    want = GKDTrainer.generalized_jsd_loss(
        student, torch.tensor(P[None]), beta=KINDS[kind], temperature=temperature, reduction="sum"
    )
    want.backward()

    def ours(q):
        log_p, log_q = (jax.nn.log_softmax(z / temperature, -1) for z in (P, q))
        return d.divergence(log_p, log_q, kind, KINDS[kind]).sum()

    value, grad = jax.value_and_grad(ours)(Q)
    assert float(value) == pytest.approx(float(want.detach()), rel=1e-5)
    assert small.apart(grad, student.grad.numpy()[0]) < 1e-5


# ------------------------------------------------------------ a teacher of another shape, in the step

TEACHER = models.build(small.CONFIG | {"hidden_size": 24, "tie_word_embeddings": False, "num_hidden_layers": 1})
ITS = jax.jit(TEACHER.init_params)(jax.random.key(5))
STRENGTHS = {
    "forward": d.Strength(),
    "reverse": d.Strength("reverse_kl", temperature=2.0),
    "mixed": d.Strength("jsd", 0.2, 1.5, 0.25),
}


def teacher(vocab=small.VOCAB):
    return d.Teacher(None, TEACHER, vocab)


def batch(**changes):
    return {k: v[0] for k, v in small.batch(**changes).items()}


@partial(jax.jit, static_argnames=("strength", "packed"))
def at_once(params, b, strength, packed=False):
    """The same loss from the logits of the whole batch."""
    where = b["positions"], b["segments"] if packed else None
    q = small.decoder().apply({"params": params}, b["tokens"], *where)
    p = TEACHER.apply({"params": ITS}, b["tokens"], *where)
    log_p, log_q = (jax.nn.log_softmax(z / strength.temperature, -1) for z in (p, q))
    nats = -jnp.take_along_axis(jax.nn.log_softmax(q, -1), b["targets"][..., None], -1)[..., 0]
    apart = d.divergence(log_p, log_q, strength.divergence, strength.beta)
    return (b["weights"] * ((1 - strength.ce_weight) * apart + strength.ce_weight * nats)).sum()


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("strength", STRENGTHS.values(), ids=STRENGTHS)
def test_loss_and_gradient_are_those_of_whole_logits(strength, packed):
    if packed and strength is not STRENGTHS["mixed"]:
        pytest.skip("one of them says it")
    loss_fn = d.distillation(small.decoder(), teacher(), strength, packed=packed)
    b = batch()

    def ours(params):
        (total, weight), aux = loss_fn(Beside(params, ITS), b, None)
        return total, (weight, aux["means"])

    (value, (weight, means)), grads = jax.jit(jax.value_and_grad(ours, has_aux=True))(small.weights())
    want, its = jax.jit(jax.value_and_grad(partial(at_once, b=b, strength=strength, packed=packed)))(small.weights())
    assert float(value) == pytest.approx(float(want), rel=1e-5)
    assert small.apart(grads, its) < 1e-5
    assert float(weight) == b["weights"].sum()
    plain = at_once(small.weights(), b, d.Strength(temperature=strength.temperature), packed=packed)
    assert float(means["kl"][0]) == pytest.approx(float(plain), rel=1e-5)
    assert float(means["ce"][0]) == pytest.approx(
        float(at_once(small.weights(), b, d.Strength(ce_weight=1.0), packed=packed)), rel=1e-5
    )


def test_a_student_equal_to_its_teacher_has_nothing_to_learn():
    loss_fn = d.distillation(small.decoder(), d.Teacher(None, small.decoder(), small.VOCAB), d.Strength())
    b = batch()
    both = jax.value_and_grad(lambda p: loss_fn(Beside(p, small.weights()), b, None)[0][0])
    value, grads = jax.jit(both)(small.weights())
    assert abs(float(value)) < 1e-4
    assert max(np.abs(np.asarray(g)).max() for g in jax.tree.leaves(grads)) < 1e-4


def test_members_under_vmap_are_as_alone():
    stack = jax.tree.map(lambda x: np.stack([x, np.float32(0.5) * x]), jax.device_get(small.weights()))
    b = batch()

    def one(params, members):
        loss_fn = d.distillation(small.decoder(), teacher(), STRENGTHS["mixed"], members=members)
        return jax.value_and_grad(lambda p: loss_fn(Beside(p, ITS), b, None)[0][0])(params)

    both, by_itself = jax.jit(jax.vmap(partial(one, members=2)))(stack), jax.jit(partial(one, members=1))
    for i in range(2):
        alone = by_itself(jax.tree.map(lambda x, i=i: x[i], stack))
        assert small.apart(jax.tree.map(lambda x, i=i: x[i], both), alone) < 1e-5


@pytest.mark.parametrize("trained", ["body", "head"])
def test_no_logits_of_the_whole_batch(trained):
    from test_objectives import largest

    b, t, width, v = 4, 1024, 8, 64_000
    shape = jax.ShapeDtypeStruct
    args = shape((width, v), jnp.float32), shape((b, t, width), jnp.float32), shape((b, t), jnp.int32)

    class Other:
        logits = staticmethod(lambda head, hidden: head_logits(head, hidden))

    def loss(head, x, targets):
        def score(logits, targets, given):
            log_p = jax.nn.log_softmax(Other.logits(given.shared, given.tokens), -1)
            return d._score(STRENGTHS["mixed"], logits, targets, log_p, jax.nn.log_softmax(logits, -1))

        told = d.Given(jax.lax.stop_gradient(x), {"kernel": jax.lax.stop_gradient(head)})
        weights = jnp.ones(targets.shape)
        return d.token_loss(head_logits, {"kernel": head}, x, targets, weights, score, told)[0]

    argnum = 1 if trained == "body" else 0
    assert largest(jax.value_and_grad(loss, argnums=argnum), *args) <= 512 * v


# ----------------------------------------------------------------------------------------------- the student's own rows


@pytest.fixture(scope="module")
def own_rows():
    """A batch, and the same with answers of the student."""
    b = small.batch()
    told = drawing.answers(Draws(0.6, max_new_tokens=9), small.decoder(), small.weights(), b, (3, 5), 24, [7])
    return b, told, drawing.lay(b, told, 24)


def test_drawn_rows_keep_their_prompts_and_are_trained_behind_them(own_rows):
    before, told, after = own_rows
    assert 2 <= len(told) <= 7 and 3 not in told  # which has no answer
    width = after["tokens"].shape[-1]
    for row in range(8):
        tokens, weights = after["tokens"][0, row], after["weights"][0, row]
        if row not in told:
            assert np.array_equal(tokens[: small.T], before["tokens"][0, row]) and not tokens[small.T :].any()
            assert np.array_equal(weights[: small.T], before["weights"][0, row])
            continue
        ids, prompt = told[row]
        assert prompt == before["weights"][0, row].argmax() + 1
        assert np.array_equal(ids[:prompt], before["tokens"][0, row, :prompt])
        assert ids[-1] == 7 or len(ids) == min(prompt + 9, width)
        assert np.array_equal(tokens[: len(ids)], ids) and not tokens[len(ids) :].any()
        assert np.flatnonzero(weights).tolist() == list(range(prompt - 1, len(ids) - 1))
        assert np.array_equal(after["targets"][0, row, prompt - 1 : len(ids) - 1], ids[prompt:])
        assert after["positions"][0, row, : len(ids)].tolist() == list(range(len(ids)))


def test_what_is_drawn_depends_on_seed_and_step(own_rows):
    again = partial(drawing.answers, Draws(0.6, max_new_tokens=9), small.decoder(), small.weights(), own_rows[0])
    assert again((3, 5), 24, [7]) == own_rows[1]
    assert again((3, 6), 24, [7]) != own_rows[1] != again((4, 5), 24, [7])


@pytest.mark.filterwarnings("ignore")  # trl's own
def test_loss_on_drawn_rows_is_that_of_trl(own_rows):
    import torch
    from trl.experimental.gkd import GKDTrainer

    b = {k: v[0] for k, v in own_rows[2].items()}
    loss_fn = d.distillation(small.decoder(), teacher(), d.Strength("jsd", 0.3, 1.5))
    (value, weight), _ = loss_fn(Beside(small.weights(), ITS), b, None)
    student, its = (
        torch.tensor(np.asarray(module.apply({"params": params}, b["tokens"], b["positions"], b["segments"])))
        for module, params in ((small.decoder(), small.weights()), (TEACHER, ITS))
    )
    labels = torch.tensor(np.where(b["weights"] > 0, b["targets"], -100).astype(np.int64))
    want = GKDTrainer.generalized_jsd_loss(student, its, labels=labels, beta=0.3, temperature=1.5)
    assert float(value / weight) == pytest.approx(float(want), rel=1e-5)


# ----------------------------------------------------------------------------------------------------- the likeliest k


@pytest.mark.parametrize("vocab", [61, 2**16 + 100], ids=["ids of 16 bits", "of 32"])
def test_what_is_kept_comes_back(vocab):
    log_p = jax.nn.log_softmax(jnp.asarray(RNG.normal(0, 4.0, (5, vocab)), jnp.float32), -1)
    kept = d.packed(log_p, vocab, 8)
    assert kept.shape == (5, d.packed_width(vocab, 8)) and kept.dtype == jnp.uint16
    found, ids = d.unpacked(kept, 8)
    order = np.argsort(-np.asarray(log_p), -1)[:, :8]
    assert np.array_equal(ids, order)
    p = np.take_along_axis(np.exp(np.asarray(log_p, np.float64)), order, -1)
    np.testing.assert_allclose(np.exp(found)[:, :8], p, rtol=2e-2)  # bfloat16 of a log-probability
    np.testing.assert_allclose(np.exp(found).sum(-1), 1, rtol=1e-5)
    np.testing.assert_allclose(np.exp(found)[:, 8], 1 - p.sum(-1), atol=1e-2)


@partial(jax.jit, static_argnums=1)
def some_and_whole(logits, k):
    """The divergences of every kind, of k tokens told apart and of all."""
    log_p, log_q = jax.nn.log_softmax(logits, -1)
    _, ids = jax.lax.top_k(log_p, k)
    few = d.coarse(log_p, ids), d.coarse(log_q, ids)
    return [(d.divergence(*few, kind), d.divergence(log_p, log_q, kind)) for kind in sorted(KINDS)]


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1), st.sampled_from((1, 2, 7, 18, 19)))
def test_tokens_taken_together_bound_the_divergence_from_below(seed, k):
    """The data-processing inequality; equal where every token but one is told apart."""
    rng = np.random.default_rng(seed)
    for some, whole in jax.device_get(some_and_whole(rng.normal(0, 3.0, (2, 3, 20)).astype(np.float32), k)):
        assert (some <= whole + 1e-5).all() and (some >= -1e-5).all()
        if k == 19:
            np.testing.assert_allclose(some, whole, rtol=1e-3, atol=1e-5)


def test_loss_over_what_is_kept_is_near_that_in_the_step():
    b, k = batch(), small.VOCAB - 1
    kept = d.top_k_of(TEACHER, ITS, b["tokens"], b["positions"], small.VOCAB, k, 1.5)
    params = small.weights()

    def grads(top_k, b):
        loss_fn = d.distillation(small.decoder(), teacher(), STRENGTHS["mixed"], top_k=top_k)
        given_ = (lambda p: p) if top_k else (lambda p: Beside(p, ITS))
        return jax.jit(jax.value_and_grad(lambda p: loss_fn(given_(p), b, None)[0][0]))(params)

    (some, got), (whole, want) = grads(k, b | {"teacher": kept}), grads(0, b)
    assert float(some) == pytest.approx(float(whole), rel=1e-2)
    assert small.apart(got, want) < 2e-2


# ---------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def argv(home, tmp_path_factory):  # noqa: F811
    """A command that distils the small model's sums from a wider one that was drawn."""
    folder = tmp_path_factory.mktemp("teacher")
    write_model(folder, hidden_size=24, num_hidden_layers=3, initializer_range=0.5)
    chosen = {"objective__name": "distillation", "objective__teacher": folder, "tune__lora__lora_dropout": 0.0}
    return partial(command, home, **chosen)


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module", params=[0, 16], ids=["in the step", "kept"])
def trained(request, argv, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "run"
    printed = cards.trained(argv(workdir, objective__top_k=request.param))
    workdir.with_suffix(".json").write_text(json.dumps(printed))
    return workdir, request.param


def test_a_run_comes_nearer_to_its_teacher(trained):
    found = [line for line in lines(trained[0]) if "eval/kl" in line]
    assert found[-1]["eval/kl"] < 0.97 * found[0]["eval/kl"]
    assert found[-1]["eval/loss"] == pytest.approx(found[-1]["eval/kl"], rel=1e-5)
    assert found[-1]["eval/perplexity"] == pytest.approx(np.exp(found[-1]["eval/ce"]), rel=1e-5)


def test_it_writes_page_and_card_and_goes_on_as_text(trained, capsys, monkeypatch):
    workdir, _ = trained
    monkeypatch.chdir(workdir)
    for code in (cards.card(workdir / "adapter"), json.loads(workdir.with_suffix(".json").read_text()).values()):
        cards.theirs_as_ours(code, [[3, 20, 7, 2], [9, 8, 50, 1]])
    assert "jaxtune generate" in (workdir / "report.html").read_text()
    assert main(["generate", str(workdir), "--prompt=1 and 4 make ", "--max-new-tokens=2"]) == 0


def test_it_resumes_to_the_same_bytes(argv, tmp_path, trained):
    given_ = {"objective__top_k": trained[1], "optim__schedule": "constant"}
    assert main(argv(tmp_path / "alone", **given_)) == 0
    assert main(argv(tmp_path / "run", train__steps=4, **given_)) == 0
    assert main(argv(tmp_path / "run", **given_)) == 0
    assert adapter(tmp_path / "run") == adapter(tmp_path / "alone")


def test_a_run_on_rows_of_its_own_resumes_to_the_same_bytes(argv, tmp_path, monkeypatch):
    """Every second step draws; the run is stopped before one that does and before one that does not."""
    seen = []

    def counted(*given_, **how):
        seen.append(given_[4])
        return own(*given_, **how)

    own = drawing.answers
    monkeypatch.setattr(drawing, "answers", counted)
    given_ = {"objective__lmbda": 0.7, "objective__draw_every": 2, "objective__max_new_tokens": 6}
    given_ |= {"optim__schedule": "constant", "train__eval_every": None}
    assert main(argv(tmp_path / "alone", train__steps=6, **given_)) == 0
    assert seen == [(0, 1), (0, 3), (0, 5)]
    for steps in (2, 3, 6):
        assert main(argv(tmp_path / "run", train__steps=steps, **given_)) == 0
    assert seen[3:] == seen[:3]
    assert adapter(tmp_path / "run") == adapter(tmp_path / "alone")


def test_the_size_of_what_is_kept_is_said_before(argv, capsys):
    assert main([*argv(None, objective__top_k=16), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "The teacher's top-16 log-probabilities of 48 rows (" in out and "GiB) are found in" in out


@pytest.mark.parametrize("share", [0, 1], ids=["the data's rows", "their own"])
def test_it_sweeps(argv, tmp_path, share):
    own = {"objective__lmbda": share, "objective__max_new_tokens": 6, "train__steps": 4} if share else {}
    flags = argv(tmp_path / "sweep", "--sweep.optim.lr=1e-3,3e-3", **own)
    assert main(["sweep", *[flag for flag in flags[1:] if not flag.startswith("--config.optim.lr")]]) == 0
    for member in ("lr=0.001", "lr=0.003"):
        assert lines(tmp_path / "sweep" / member)[-1]["eval/kl"] > 0


def test_full_tuning_in_micro_batches_of_packed_rows(argv, tmp_path):
    settings_ = {"tune__lora__r": None, "tune__lora__lora_dropout": None, "optim__lr": 1e-3, "train__steps": 4}
    more = {"tune__method": "full", "data__packing": "true", "data__max_length": 64, "train__grad_accum": 2}
    last = []
    for top_k in (0, 200):
        workdir = tmp_path / str(top_k)
        assert main(argv(workdir, **settings_, **more, objective__top_k=top_k, objective__ce_weight=0.3)) == 0
        last.append(lines(workdir)[-1]["eval/loss"])
    assert last[0] == pytest.approx(last[1], rel=2e-2)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"objective__teacher": None}, "needs objective.teacher"),
        ({"objective__teacher": "/nowhere/at/all"}, "objective.teacher=/nowhere/at/all"),
        ({"objective__top_k": 258}, "objective.top_k=258 of a vocabulary of 258"),
        ({"objective__jsd_beta": 0.1}, "objective.jsd_beta has no effect"),
        ({"objective__divergence": "jsd", "objective__jsd_beta": 0}, "above 0 and below 1"),
        ({"objective__temperature": 0}, "above 0"),
        ({"objective__z_loss": 0.1}, "objective.z_loss has no effect"),
        ({"objective__name": None}, "objective.teacher has no effect"),
        ({"objective__draw_every": 4}, "objective.draw_every has no effect: objective.lmbda is 0"),
        ({"objective__lmbda": 0.5, "objective__top_k": 8}, "objective.top_k does not go with objective.lmbda"),
        ({"objective__lmbda": 0.5, "data__packing": "true"}, "data.packing does not go with objective.lmbda"),
        ({"objective__lmbda": 1, "objective__ce_weight": 0.1}, "objective.ce_weight does not go with objective.lmbda"),
        ({"objective__lmbda": 1, "objective__max_new_tokens": 64}, "leaves no room for a prompt in rows of 64 tokens"),
    ],
    ids=str,
)
def test_what_is_refused_before_the_run(argv, tmp_path, capsys, changes, words):
    assert main(argv(tmp_path / "no", **changes)) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "no").exists()


def test_a_teacher_of_another_vocabulary_is_refused(argv, tmp_path, capsys):
    (tmp_path / "other").mkdir()
    write_model(tmp_path / "other")
    file = tmp_path / "other" / "tokenizer.json"
    told = json.loads(file.read_text())
    vocab = told["model"]["vocab"]
    a, b = list(vocab)[:2]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    file.write_text(json.dumps(told))
    assert main(argv(tmp_path / "no", objective__teacher=tmp_path / "other")) == 2
    err = capsys.readouterr().err
    assert "has another vocabulary" in err and "shares the student's tokenizer" in err
    file.unlink()
    (tmp_path / "other" / "config.json").write_text(
        json.dumps(json.loads((tmp_path / "other" / "config.json").read_text()) | {"vocab_size": 300})
    )
    assert main(argv(tmp_path / "no", objective__teacher=tmp_path / "other")) == 2
    assert "300 tokens, the student 258" in capsys.readouterr().err


def test_another_teacher_is_refused_on_resume(argv, tmp_path, capsys):
    folder = tmp_path / "teacher"
    folder.mkdir()
    write_model(folder)
    settings_ = {"objective__teacher": folder, "optim__schedule": "constant", "train__eval_every": None}
    assert main(argv(tmp_path / "run", train__steps=2, **settings_)) == 0
    weights = load_file(folder / "model.safetensors")
    save_file({name: 2 * array for name, array in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    before = (tmp_path / "run" / "config.json").read_bytes()
    assert main(argv(tmp_path / "run", train__steps=3, **settings_)) == 2
    assert "objective.teacher: its files are not those" in capsys.readouterr().err
    assert (tmp_path / "run" / "config.json").read_bytes() == before


def test_a_wider_table_of_the_same_tokens_is_no_hindrance(argv, tmp_path):
    (tmp_path / "padded").mkdir()
    write_model(tmp_path / "padded", vocab_size=264)
    assert main(argv(tmp_path / "run", objective__teacher=tmp_path / "padded", train__steps=2)) == 0
