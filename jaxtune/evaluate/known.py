"""The metrics that tasks log at evaluations, as pages and tables name them."""

LOSS = "held-out loss"
KNOWN = {  # metric that an evaluation logs -> label, what is better, whether it is a share
    "loss": (LOSS, -1, False),
    "perplexity": ("perplexity", -1, False),
    "accuracy": ("accuracy", 1, True),
    "macro_f1": ("macro-F1", 1, True),
    "entity_f1": ("entity F1", 1, True),
    "entity_precision": ("entity precision", 1, True),
    "entity_recall": ("entity recall", 1, True),
    "json_valid": ("valid JSON", 1, True),
    "json_exact": ("every field right", 1, True),
}
