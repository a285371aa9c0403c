r"""A reranker: a model that reads a query and a document together and gives a score, with LoRA on every linear layer.

    jaxtune train --config=configs/rerank.py --workdir=runs/rerank \
        --config.model.path=DIR_OR_ID --config.data.train=ranked.jsonl

Columns are query, positive and negative (a text or a list of them), or query, document and label (1 or 0).

Expected: `eval/loss` falls and `eval/accuracy`, the share of queries whose answer has the highest score, rises; the
export loads into sentence-transformers' CrossEncoder.

Not measured on real data.
"""

from common import recipe


def get_config():
    config = recipe("lora", lora={"r": 16, "lora_alpha": 32})
    config.objective = {"name": "reranking", "ranking": "binary"}
    config.data.overlength = "truncate"
    config.data.eval_fraction = 0.05
    config.optim.lr = 5e-4
    config.train.batch_size = 32
    return config
