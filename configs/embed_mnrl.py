r"""Vectors of texts from pairs that belong together, with in-batch negatives and LoRA on every linear layer.

    jaxtune train --config=configs/embed_mnrl.py --workdir=runs/embed \
        --config.model.path=DIR_OR_ID --config.data.train=pairs.jsonl

Columns are anchor and positive (or query, question; document, passage, answer), and may be negative, a text or a list.
A batch is compared as a whole, however many micro-batches it is split into: raise train.batch_size and, to keep the
memory, train.grad_accum.

Expected: `eval/loss` falls from below log(batch size); `jaxtune eval runs/embed` ranks the held-out texts by the base
and by the result, and `adapter/` loads into sentence-transformers.

Measured (`benchmarks/embeddings.py`, all-MiniLM-L6-v2 on banking77): 1.35 times the pairs a second of
sentence-transformers in 0.52 of its memory, one turn beside other work. After 16 steps at 1e-4 to 1e-3
both have the same retrieval within the noise (one seed, MRR@10 0.876 at 3e-4; base 0.877): see benchmarks/RESULTS.md.
"""

from common import recipe


def get_config():
    config = recipe("lora", lora={"r": 16, "lora_alpha": 32})
    config.objective = {"name": "embedding", "contrast": "infonce", "temperature": 0.05}
    config.data.overlength = "truncate"
    config.data.eval_fraction = 0.05
    config.optim.lr = 5e-4
    config.train.batch_size = 64
    return config
