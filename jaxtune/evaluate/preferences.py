"""Pairs and judged answers on held-out rows: which answer a model prefers, and how far it has moved from its base."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtune.errors import UserError
from jaxtune.evaluate import evaluation, statistics
from jaxtune.evaluate.comparison import Column
from jaxtune.evaluate.evaluation import Options, Progress
from jaxtune.evaluate.kept import Kept, in_batches, key_of
from jaxtune.evaluate.known import KNOWN
from jaxtune.evaluate.rows import data_names, group_values, tokenised
from jaxtune.evaluate.systems import System, systems
from jaxtune.infer.logprobs import batches_by_length, most_tokens, score_batch
from jaxtune.infer.source import Tuned, tokenizer_of
from jaxtune.objectives.answers import PAIR_LOSSES
from jaxtune.objectives.preference import LOSSES, Pairs, Strength, kto


class Preferences:
    """The `jaxtune.evaluate.evaluation.Evaluator` of runs over pairs or judged answers.

    The base is the reference, as in the run; of a base every implicit reward is 0, and its accuracy a half.
    """

    def __init__(self, source: Tuned, cfg: Any, options: Options):
        from jaxtune.config.recipe import experiment

        self.objective = cfg.objective
        kind = f"a run of objective.name={cfg.objective.name}"
        options.refuse(("format", "metrics", "schema", "scorer", "labels", "max_new_tokens"), kind)
        self.source, self.dtype = source, evaluation.dtype_of(cfg)
        self.tokenizer = tokenizer_of(source)
        of_run = experiment(cfg, weights=False)
        form = of_run.task.form
        if options.columns is not None:
            form.columns = dict(options.columns)
        self.pairs, self.compares = form.pairs, of_run.task.reference is not None
        _, sources, fraction = evaluation.sources(source, cfg, options)
        self.rows, self.lines = tokenised(
            self.tokenizer,
            sources,
            options.rows,
            eval_fraction=fraction,
            labels=form,
            max_length=of_run.recipe.batch.length - len(of_run.prefix),
            overlength=of_run.data.overlength,
            vocab_size=of_run.module.spec.vocab,
            cache=of_run.data.cache,
        )
        self.names = data_names(sources)
        self.groups = group_values(self.rows, self.names, options.group_by) if options.group_by else None
        self.tokens = sum(int((np.asarray(side[i][1][1:]) > 0).sum()) for side in self.texts for i in range(len(side)))
        self.base, self.notes = evaluation.base_to_compare(cfg, options)
        if self.compares and not self.base:
            raise UserError(
                f"{kind} is measured against its base: leave out --tuned-only."
                if not self.notes
                else f"{kind} is measured against its base. {self.notes[0]}"
            )

    @property
    def texts(self) -> tuple[Any, ...]:
        """The rows, and of pairs the rejected ones; what KTO takes its KL from is not measured here."""
        return self.rows.sides if self.pairs else (self.rows,)

    def systems(self) -> Iterator[System]:
        yield from systems(self.source, base=self.base, dtype=self.dtype)

    def measure(self, system: System, kept: Kept, progress: Progress) -> np.ndarray:
        """Sums of log-probabilities and numbers of tokens, f64[texts a row, N, 2]."""
        every = [side[i] for side in self.texts for i in range(len(side))]

        def scored(batch):
            rows = [every[i][0].tolist() for i in batch]
            masks = [(np.asarray(every[i][1][1:]) > 0).tolist() for i in batch]
            found = score_batch(system.module, system.params, rows, masks=masks)
            return [[float(logprobs.sum()), sum(mask)] for (logprobs, _), mask in zip(found, masks, strict=True)]

        keys = [key_of("answers", system.identity, ids.tolist(), np.asarray(mask).tolist()) for ids, mask in every]
        batches = batches_by_length([len(ids) for ids, _ in every], most_tokens())
        found = in_batches(kept, keys, batches, scored, progress(f"{system.name}: answers", len(every)))
        return np.array(found).reshape(len(self.texts), len(self.rows), 2)

    def columns(self, measured: Mapping[str, np.ndarray]) -> dict[str, Column]:
        every = np.arange(len(self.rows))
        reference = measured["base"] if self.compares else None
        told = {who: self._of(found, reference) for who, found in measured.items()}
        names = next(iter(told.values()))
        columns = {}
        for name in names:
            label, better, share = KNOWN.get(name, (OWN.get(name, name.replace("_", " ")), 0, False))
            columns[name] = Column(label, better, share, statistics.mean, {w: t[name] for w, t in told.items()}, every)
        return columns

    def _of(self, found: np.ndarray, reference: np.ndarray | None) -> dict[str, np.ndarray]:
        """Per row, what one model comes to."""
        sums, tokens = found[..., 0], np.maximum(found[..., 1], 1)
        ref = np.zeros_like(sums) if reference is None else reference[..., 0]
        beta = self.objective.beta
        if not self.pairs:
            good = self.rows.target[:, 0] > 0
            weights = self.objective.desirable_weight, self.objective.undesirable_weight
            each = kto(jnp.asarray(sums[0]), jnp.asarray(ref[0]), jnp.asarray(good), jnp.float32(0), beta, weights)
            reward = beta * (sums[0] - ref[0])
            return {
                "loss": np.asarray(each, np.float64),
                "accuracy": _right(np.where(good, reward, -reward)),
                "rewards": np.where(good, reward, -reward),
                "logps": sums[0],
            }
        losses = dict(zip(self.objective.loss, self.objective.loss_weights or (1.0,) * len(self.objective.loss)))
        pairs = Pairs(*map(jnp.asarray, (*sums, *ref, *tokens)))
        strength = Strength(beta, self.objective.gamma, self.objective.label_smoothing)
        each = sum(weight * LOSSES[name](pairs, strength) for name, weight in losses.items())
        each = jax.device_get(each) - self.objective.sft_weight * sums[0] / tokens[0]
        rewards = beta * (sums - ref) / (tokens if PAIR_LOSSES[self.objective.loss[0]].by_token else 1)
        return {
            "loss": np.asarray(each, np.float64),
            "accuracy": _right(rewards[0] - rewards[1]),
            "margins": rewards[0] - rewards[1],
            "likelier": _right(sums[0] / tokens[0] - sums[1] / tokens[1]),
            "logps/chosen": sums[0],
            "logps/rejected": sums[1],
        }

    def records(self, measured: Mapping[str, np.ndarray], found: Mapping[str, Column]) -> Iterable[dict[str, Any]]:
        for i in range(len(self.rows)):
            (ids, mask), decode = self.rows[i], self.tokenizer.decode
            first = int(np.argmax(mask > 0))
            record = {
                "where": self.rows.where(i),
                "prompt": decode(ids[:first].tolist()),
                "expected": decode(ids[first:].tolist(), skip_special_tokens=True).strip(),
            }
            if self.groups is not None:
                record["group"] = self.groups[i]
            for who in measured:
                record[who] = {name: float(column.values[who][i]) for name, column in found.items()}
            yield record

    def confusion(self, measured: Mapping[str, np.ndarray]) -> None:
        return None


OWN = {
    "likelier": "chosen answer likelier, a token",
    "rewards": "reward, bad answers counted backwards",
    "logps": "log-probability",
}


def _right(margins: np.ndarray) -> np.ndarray:
    """1 where a margin is above 0, a half where it is 0."""
    return 0.5 * (np.sign(margins) + 1)
