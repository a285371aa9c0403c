"""The metrics that tasks log at evaluations, as pages and tables name them."""

from collections.abc import Mapping, Sequence

LOSS = "held-out loss"
SURENESS = {  # confidence of an answer
    "mean": "mean token probability",
    "lowest": "lowest token probability",
    "agreement": "agreement of samples",
}
CLASSES = ("HighlyKnown", "MaybeKnown", "WeaklyKnown", "Unknown")  # of questions, by what the base knows
KNOWN = {  # metric that an evaluation logs -> label, what is better, whether it is a share
    "loss": (LOSS, -1, False),
    "perplexity": ("perplexity", -1, False),
    "general_loss": ("loss on general text", -1, False),
    "accuracy": ("accuracy", 1, True),
    "macro_f1": ("macro-F1", 1, True),
    "entity_f1": ("entity F1", 1, True),
    "entity_precision": ("entity precision", 1, True),
    "entity_recall": ("entity recall", 1, True),
    "margins": ("margin of the rewards", 1, False),
    "rewards/chosen": ("reward of chosen answers", 0, False),
    "rewards/rejected": ("reward of rejected answers", 0, False),
    "logps/chosen": ("log-probability of chosen answers", 0, False),
    "logps/rejected": ("log-probability of rejected answers", 0, False),
    "kl": ("KL to the reference or teacher", 0, False),
    "hit@1": ("nearest text is relevant", 1, True),
    "recall@10": ("recall among the nearest 10", 1, True),
    "mrr@10": ("MRR among the nearest 10", 1, True),
    "ndcg@10": ("nDCG among the nearest 10", 1, True),
    "map@100": ("MAP among the nearest 100", 1, True),
    "spearman": ("Spearman's correlation with the scores", 1, False),
    "pearson": ("Pearson's correlation with the scores", 1, False),
    "v_measure": ("V-measure of k-means clusters", 1, True),
    "probe": ("accuracy of a linear probe", 1, True),
    "triplets": ("positive nearer than the negative", 1, True),
    "json_valid": ("valid JSON", 1, True),
    "json_exact": ("every field right", 1, True),
}


def sure_from(ps: Mapping[int, Sequence[float]], level: float = 0.05) -> int | None:
    """The step from whose evaluation on, until the last, one of its tests is sure at a level for all of them together.

    Args:
        ps: step -> p-values.
        level: of all tests, by Bonferroni.
    """
    tests, first = sum(map(len, ps.values())), None
    for step in sorted(ps):
        sure = any(p * tests < level for p in ps[step])
        first = (step if first is None else first) if sure else None
    return first


def memory_from(metrics: Sequence[Mapping[str, float]]) -> dict[str, int | None]:
    """From which step the rows of evaluate.memory are told apart: by what goes on word for word, and by their losses.

    Args:
        metrics: the lines that a run logged.
    """
    found = {}
    for name in ("verbatim", "auc"):
        key = f"eval/memory/{name}_p"
        lines = [m for m in metrics if "phase" not in m and isinstance(m.get(key), int | float)]
        found[name] = sure_from({m["step"]: [m[key]] for m in lines})
    return found
