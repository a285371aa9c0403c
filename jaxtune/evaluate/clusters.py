"""What vectors of texts tell of their classes: clusters, and a linear probe."""

import warnings

import numpy as np

FOLDS = 5
DRAWS = 4  # starts of k-means


def clusters(x: np.ndarray, k: int, seed: int = 0) -> np.ndarray:
    """The cluster of each vector f32[N, D], i64[N]: k-means from k-means++ (Arthur & Vassilvitskii 2007), the best of 4
    starts by the sum of squared distances.
    """
    from scipy.cluster.vq import kmeans2  # takes a third of a second

    found = []
    for draw in range(DRAWS):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a cluster that is empty
            centres, own = kmeans2(
                x.astype(np.float64), k, iter=30, minit="++", rng=np.random.default_rng([seed, draw])
            )
        found.append((float(np.square(x - centres[own]).sum()), draw, own))
    return min(found, key=lambda one: one[:2])[2].astype(np.int64)


def v_measure(rows: np.ndarray) -> float:
    """The harmonic mean of homogeneity and completeness (Rosenberg & Hirschberg 2007, aclanthology.org/D07-1043, eq. 1
    to 3), of rows [N, 2]: the class and the cluster of each, counted from 0.
    """
    classes, own = rows.astype(np.int64).T
    wide = own.max() + 1
    joint = np.bincount(classes * wide + own, minlength=(classes.max() + 1) * wide).reshape(-1, wide) / len(rows)

    def entropy(p):
        p = p[p > 0]
        return float(-(p * np.log(p)).sum())

    both, of_class, of_cluster = entropy(joint), entropy(joint.sum(1)), entropy(joint.sum(0))
    shared = of_class + of_cluster - both  # their mutual information
    homogeneity, completeness = (shared / h if h > 0 else 1.0 for h in (of_class, of_cluster))
    total = homogeneity + completeness
    return 2 * homogeneity * completeness / total if total > 0 else 0.0


def folds(classes: np.ndarray) -> np.ndarray:
    """A fold for each row, i64[N], the rows of a class spread over all."""
    order, fold = np.argsort(classes, kind="stable"), np.zeros(len(classes), np.int64)
    fold[order] = np.arange(len(classes)) % FOLDS
    return fold


def probe(x: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """The class of each vector by a linear probe that did not see it, i64[N]: logistic regression by `FOLDS`-fold
    cross-validation (Alain & Bengio 2017, arXiv:1610.01644).
    """
    fold, found = folds(classes), np.zeros(len(classes), np.int64)
    for one in range(FOLDS):
        here = fold == one
        if here.any() and not here.all():
            found[here] = logistic(x[~here], classes[~here])(x[here])
    return found


def logistic(x: np.ndarray, classes: np.ndarray):
    """Fit multinomial logistic regression, sum of losses plus half the squared weights (scikit-learn's C=1); return
    the function that classifies vectors.
    """
    from scipy.optimize import minimize  # takes a third of a second

    names, y = np.unique(classes, return_inverse=True)
    n, d = x.shape
    x1, rows = np.hstack([x, np.ones((n, 1), x.dtype)]).astype(np.float64), np.arange(n)

    def loss(flat):
        w = flat.reshape(d + 1, len(names))
        logits = x1 @ w
        logits -= logits.max(1, keepdims=True)
        p = np.exp(logits)
        norm = p.sum(1, keepdims=True)
        value = (np.log(norm[:, 0]) - logits[rows, y]).sum() + 0.5 * np.square(w[:-1]).sum()
        p /= norm
        p[rows, y] -= 1
        grad = x1.T @ p
        grad[:-1] += w[:-1]
        return value, grad.ravel()

    start = np.zeros((d + 1) * len(names))
    w = minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 200}).x.reshape(d + 1, -1)
    return lambda more: names[(more @ w[:-1] + w[-1]).argmax(1)]
