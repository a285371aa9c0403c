"""What LoRA could learn of real pairs to first order: logistic regression over the gradients of log-probabilities.

    python benchmarks/preference_probe.py --model=DIR --dpo=dpo_en_demo.json

Near its start, training moves an answer's log-probability by the product of its gradient with the change of the
weights, so that DPO is logistic regression over the difference of both answers' gradients: of sums over an answer's
tokens (`sigmoid`), or of means (`sigmoid_norm`). It costs one backward pass an answer, and tells before any run whether
held-out pairs can be told apart, and by which of the two. Rows and folds are those of `preference_gains.py`. Loss and
strength are chosen within the training folds, by four-fold cross-validation, three times.
"""

import argparse
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from preference_gains import FOLDS, read

import jaxtune
from jaxtune import data
from jaxtune.data.formats import Document
from jaxtune.data.tokenize import Encoder
from jaxtune.models.decoder import head_leaf, head_logits
from jaxtune.objectives.token_nats import token_nats

LENGTH, AT_ONCE = 512, 8
STRENGTHS = (1.0, 0.1, 0.01, 0.001)


def gradients(model: str, texts: list[tuple[str, str]]) -> tuple[np.ndarray, np.ndarray]:
    """Of the sum of an answer's log-probabilities, by all trained weights of LoRA r=16: (f32[N, P], tokens i64[N])."""
    examples = [Document([(f"{prompt}\n", False), (answer, True)]) for prompt, answer in texts]
    rows = list(Encoder(data.load_tokenizer(model)).encode(["row"] * len(texts), examples))
    tokens, targets = (np.zeros((len(rows), LENGTH), np.int32) for _ in range(2))
    weights = np.zeros((len(rows), LENGTH), np.float32)
    for i, (ids, mask) in enumerate(rows):
        ids, mask = ids[:LENGTH], mask[:LENGTH]
        tokens[i, : len(ids)], targets[i, : len(ids) - 1], weights[i, : len(ids) - 1] = ids, ids[1:], mask[1:]
    module, params = jaxtune.load(model)
    params, mask = jaxtune.lora(params, jax.random.key(0), module=module, r=16, lora_alpha=32)
    trainable, member, frozen = jaxtune.partition(params, mask)

    def logprob(trainable, x, y, w):
        p = jaxtune.combine(trainable, member, frozen)
        x = module.apply({"params": p}, x[None], jnp.arange(LENGTH)[None], None, method="hidden")
        nats = token_nats(functools.partial(head_logits, spec=module.spec), head_leaf(p), x, y[None], w[None])
        return -(nats * w).sum()

    of = jax.jit(jax.vmap(jax.grad(logprob), in_axes=(None, 0, 0, 0)))
    found = []
    for i in range(0, len(rows), AT_ONCE):
        part = slice(i, i + AT_ONCE)
        leaves = jax.tree.leaves(of(trainable, tokens[part], targets[part], weights[part]))
        found.append(np.concatenate([np.asarray(leaf).reshape(len(leaf), -1) for leaf in leaves], 1))
    return np.concatenate(found), weights.sum(1)


def fit(kernel: np.ndarray, strength: float) -> np.ndarray:
    """Logistic regression of pairs that are all the right way round: margins are kernel @ what is returned."""
    found = np.zeros(len(kernel))
    for _ in range(25):  # Newton's method
        wrong = 1 / (1 + np.exp(kernel @ found))
        hessian = (wrong * (1 - wrong) / len(kernel))[:, None] * kernel + strength * np.eye(len(kernel))
        found -= np.linalg.solve(hessian, strength * found - wrong / len(kernel))
    return found


def margins(kernel: np.ndarray, train: np.ndarray, held_out: np.ndarray, strength: float) -> np.ndarray:
    return kernel[np.ix_(held_out, train)] @ fit(kernel[np.ix_(train, train)], strength)


def within(kernel: np.ndarray, rows: np.ndarray, strength: float) -> float:
    """The loss of held-out parts of `rows`."""
    rng, losses = np.random.default_rng(1), []
    for _ in range(3):
        part = rng.permutation(len(rows)) % 4
        losses += [np.logaddexp(0, -margins(kernel, rows[part != i], rows[part == i], strength)) for i in range(4)]
    return float(np.concatenate(losses).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--dpo", type=Path, required=True)
    parser.add_argument("--rows", type=int, help="the first ones alone")
    a = parser.parse_args()
    rows = read(a.dpo)[: a.rows]
    folds = np.array([fold for fold, _ in rows])
    found, tokens = gradients(
        a.model, [(row["prompt"], row[side]) for _, row in rows for side in ("chosen", "rejected")]
    )
    kernels = {}
    for name, per in (("sigmoid", 1), ("sigmoid_norm", np.maximum(tokens, 1)[:, None])):
        pairs = (found / per)[0::2] - (found / per)[1::2]
        kernel = (pairs @ pairs.T).astype(np.float64)
        kernels[name] = kernel / np.diag(kernel).mean()
    every = {name: np.zeros(len(rows)) for name in kernels}
    for fold in range(FOLDS):
        train, held_out = np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)
        for name, kernel in kernels.items():
            losses = {strength: within(kernel, train, strength) for strength in STRENGTHS}
            best = min(losses, key=losses.get)
            own = margins(kernel, train, held_out, best)
            every[name][held_out] = own
            print(
                f"fold {fold} {name}: strength {best:g}, loss in the training folds {losses[best]:.4f}; held out "
                f"{len(own)} pairs, {(own > 0).mean():.1%} right, mean margin {own.mean() / own.std():.3f} deviations",
                flush=True,
            )
    for name, own in every.items():
        print(f"{name}: {len(own)} pairs, {(own > 0).mean():.1%} right")


if __name__ == "__main__":
    main()
