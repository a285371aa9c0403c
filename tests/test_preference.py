"""Losses over pairs against trl's own, run on the same numbers: value and gradient."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from jaxtune.models.decoder import head_leaf, head_logits
from jaxtune.objectives.preference import FREE, LOSSES, Pairs, Strength, answer_logprobs, kto, preference
from jaxtune.objectives.task import OBJECTIVE
from jaxtune.objectives.token_nats import token_nats

R, T = 4, 6
NAMES = {"nca": "nca_pair", "sppo": "sppo_hard"}  # in trl


def numbers(seed=0):
    """Log-probabilities of tokens f32[2R, T] (chosen, then rejected), their mask, and the references' sums."""
    rng = np.random.default_rng(seed)
    mask = np.arange(T) < rng.integers(1, T + 1, (2 * R, 1))
    logps = -rng.exponential(1.0, (2 * R, T)) * mask
    reference = logps.sum(-1) + rng.normal(0, 2.0, 2 * R)
    return logps.astype(np.float32), mask, reference.astype(np.float32)


def pairs(logps, mask, reference):
    sums, tokens = logps.sum(-1), jnp.asarray(mask.sum(-1), jnp.float32)
    return Pairs(sums[:R], sums[R:], reference[:R], reference[R:], tokens[:R], tokens[R:])


def ours(name, strength, logps, mask, reference):
    return jax.value_and_grad(lambda x: LOSSES[name](pairs(x, mask, reference), strength).mean())(jnp.asarray(logps))


def dpo(name, strength, logps, mask, reference):
    """trl's DPOTrainer on a model that answers with these log-probabilities."""
    import torch
    from trl import DPOTrainer

    x = torch.tensor(logps, requires_grad=True)
    still = torch.zeros(2 * R, T)
    outputs = types.SimpleNamespace(log_probs=x, entropy=still, mean_logits=still, is_top1=still.bool())
    whole = torch.cat([torch.zeros(2 * R, 1), torch.tensor(mask).float()], dim=1)  # a prompt of one token
    me = types.SimpleNamespace(
        model=types.SimpleNamespace(training=True),
        accelerator=types.SimpleNamespace(device="cpu", gather=lambda t: t, gather_for_metrics=lambda t: t),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[NAMES.get(name, name)],
        loss_weights=[1.0],
        beta=strength.beta,
        label_smoothing=strength.label_smoothing,
        use_weighting=False,
        _tp_size=1,
        _total_train_tokens=0,
        _metrics={"train": {k: [] for k in METRICS}},
    )
    inputs = {
        "input_ids": whole.long(),
        "attention_mask": torch.ones_like(whole),
        "completion_mask": whole,
        "ref_chosen_logps": torch.tensor(reference[:R]),
        "ref_rejected_logps": torch.tensor(reference[R:]),
    }
    loss = DPOTrainer._compute_loss(me, lambda **kwargs: outputs, inputs, False)
    loss.backward()
    return float(loss.detach()), x.grad.numpy()


METRICS = (
    *("entropy", "num_tokens", "logits/chosen", "logits/rejected", "mean_token_accuracy", "rewards/chosen"),
    *("rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected"),
)


def free(name, strength, logps, mask):
    """trl's CPO and ORPO, which take the log-probabilities of answers: means for SimPO and ORPO."""
    import torch
    from trl.experimental.cpo import CPOTrainer
    from trl.experimental.orpo import ORPOTrainer

    x = torch.tensor(logps, requires_grad=True)
    answers = x.sum(-1) / (1 if name == "cpo" else torch.tensor(mask.sum(-1)))
    me = types.SimpleNamespace(
        beta=strength.beta,
        label_smoothing=strength.label_smoothing,
        simpo_gamma=strength.gamma,
        alpha=0.0,
        loss_type="simpo" if name == "simpo" else "sigmoid",
        accelerator=types.SimpleNamespace(device="cpu"),
    )
    if name == "orpo":
        loss = -ORPOTrainer.odds_ratio_loss(me, answers[:R], answers[R:])[0].mean()
    else:
        loss = CPOTrainer.cpo_loss(me, answers[:R], answers[R:])[0].mean()
    loss.backward()
    return float(loss.detach()), x.grad.numpy()


# trl's DPO smooths labels in its robust loss alone; our smoothed sigmoid is that of its CPO.
TOLD = {"beta": jnp.float32(0.1), "gamma": jnp.float32(0.5), "label_smoothing": jnp.float32(0.0)}


@jax.jit
def log_softmax(params, ids, positions=None):
    return jax.nn.log_softmax(small.decoder().apply({"params": params}, ids, positions))


def test_the_loss_on_chosen_answers_is_a_mean_of_means():
    """Of ORPO and CPO; over a decoder's whole logits, in numpy."""
    b = {k: v[0] for k, v in small.pairs().items()}
    params = small.weights() | {OBJECTIVE: TOLD}
    losses = {sft: preference(small.decoder(), {"orpo": 1.0}, sft=sft) for sft in (0.0, 2.0)}
    value = jax.jit(lambda p: {sft: loss_fn(p, b, None)[0][0] for sft, loss_fn in losses.items()})(params)
    logits = log_softmax(small.weights(), b["tokens"][:, 0], b["positions"][:, 0])
    logp = np.take_along_axis(np.asarray(logits), b["targets"][:, 0, :, None], -1)[..., 0]
    where = b["answer"][:, 0]
    each = -(logp * where).sum(-1) / np.maximum(where.sum(-1), 1)
    assert float(value[2.0]) - float(value[0.0]) == pytest.approx(2 * float((b["weights"] * each).sum()), rel=1e-5)


def test_the_kl_to_the_base_is_that_of_whole_logits():
    part, _ = small.tuned(r=2)
    params, b = small.combine(*part), {k: v[0] for k, v in small.pairs().items()}
    loss_fn = preference(small.decoder(), {"sigmoid": 1.0}, reference="live")
    found, answers = jax.jit(lambda p: loss_fn(p, b, None)[1]["means"]["kl"])(params | {OBJECTIVE: TOLD})
    ids = b["tokens"].reshape(-1, small.T)
    log_p, log_q = (np.asarray(log_softmax(tree, ids)) for tree in (params, small.weights()))
    each = (np.exp(log_p) * (log_p - log_q)).sum(-1).reshape(b["answer"].shape)
    assert float(found) == pytest.approx(float((each * b["answer"]).sum()), rel=1e-5)
    assert float(answers) == 2 * b["weights"].sum()


CASES = [(name, 0.0) for name in LOSSES] + [(name, 0.2) for name in ("robust", "simpo", "cpo")]


@pytest.mark.filterwarnings("ignore")  # trl's own, as it is imported
@pytest.mark.parametrize(("name", "smoothing"), CASES)
def test_losses_are_those_of_trl(name, smoothing):
    strength = Strength(beta=0.3, gamma=0.7, label_smoothing=smoothing)
    logps, mask, reference = numbers()
    value, grad = ours(name, strength, logps, mask, reference)
    want, their_grad = (
        free(name, strength, logps, mask) if name in FREE else dpo(name, strength, logps, mask, reference)
    )
    assert float(value) == pytest.approx(want, rel=1e-5)
    assert small.apart(grad * mask, their_grad * mask) < 1e-5


def test_smoothed_dpo_is_the_mean_over_both_orders():
    logps, mask, reference = numbers(1)
    there = pairs(jnp.asarray(logps), mask, reference)
    back = Pairs(there.rejected, there.chosen, there.ref_rejected, there.ref_chosen, *there[:3:-1])
    one, other = (LOSSES["sigmoid"](p, Strength(beta=0.3)) for p in (there, back))
    smoothed = LOSSES["sigmoid"](there, Strength(beta=0.3, label_smoothing=0.2))
    np.testing.assert_allclose(smoothed, 0.8 * one + 0.2 * other, rtol=1e-5)


def test_kto_by_its_equation():
    """v = w (1 - sigmoid(beta (r - z))) of a good answer, of a bad one with the sign turned; z is a constant."""
    rng = np.random.default_rng(2)
    policy, reference = rng.normal(-8, 3, (2, R)).astype(np.float32)
    good = np.array([True, False, False, True])
    for kl in (0.4, -0.4):
        z = max(kl, 0.0)
        r = policy - reference
        want = np.where(good, 1.5 / (1 + np.exp(0.3 * (r - z))), 0.5 / (1 + np.exp(0.3 * (z - r))))
        got = kto(policy, reference, good, jnp.float32(kl), 0.3, (1.5, 0.5))
        np.testing.assert_allclose(got, want, rtol=1e-5)
    slope = jax.grad(lambda z: kto(policy, reference, good, z).sum())(0.4)
    assert float(slope) == 0.0


def test_extreme_answers_have_finite_losses_and_gradients():
    ends = jnp.asarray([-1e-12, -1e-3, -300.0, -3e4], jnp.float32)
    ones = jnp.ones(4)

    def total(chosen, rejected, name):
        return LOSSES[name](Pairs(chosen, rejected, 0 * ones, 0 * ones, ones, ones), Strength()).sum()

    for name in LOSSES:
        value, grads = jax.value_and_grad(total, argnums=(0, 1))(ends, ends[::-1], name)
        assert all(np.isfinite(x).all() for x in (value, *grads)), name


@pytest.mark.parametrize("packed", [False, True])
def test_answers_are_summed_over_rows_or_segments(packed):
    """DPO through the chunked nats of a model, against every logit at once."""
    module, params = small.decoder(), small.weights()
    batch = {k: v[0] for k, v in small.batch(rows=4).items()}
    where, targets = jnp.asarray(batch["weights"]), jnp.asarray(batch["targets"])
    answer = np.repeat(np.arange(4)[:, None], small.T, 1)
    if packed:
        answer[:, small.T // 2 :] += 4
    count = 8 if packed else 4
    there = (np.asarray(where) > 0).astype(np.float32)
    onehot = (answer[..., None] == np.arange(count)) * there[..., None]

    def loss(head, chunked):
        x = module.apply({"params": params}, batch["tokens"], method="hidden")
        if chunked:
            nats = token_nats(lambda h, x: head_logits(h, x), head, x, targets, where, chunk=8)
            sums, tokens = answer_logprobs(nats, where, *((jnp.asarray(answer), count) if packed else ()))
        else:
            logps = jnp.take_along_axis(jax.nn.log_softmax(head_logits(head, x)), targets[..., None], -1)[..., 0]
            sums, tokens = jnp.einsum("bt,bta->a", logps, onehot), jnp.asarray(onehot.sum((0, 1)))
        half = count // 2
        zeros = jnp.zeros(half)
        p = Pairs(sums[:half], sums[half:], zeros - 9, zeros - 8, tokens[:half], tokens[half:])
        return LOSSES["ipo"](p, Strength()).sum() + LOSSES["sigmoid"](p, Strength()).sum()

    got, want = (jax.jit(jax.value_and_grad(loss), static_argnums=1)(head_leaf(params), c) for c in (True, False))
    assert float(got[0]) == pytest.approx(float(want[0]), rel=1e-5)
    assert small.apart(got[1], want[1]) < 1e-5
