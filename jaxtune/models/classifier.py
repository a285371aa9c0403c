"""A label head on an encoder or a decoder, in the layouts of transformers' classes for classification.

    x [B,T,D] -- pooling -- [B,D] -- (dense -- act -- (norm)) -- out -- logits [B,C]      a label for each sequence
    x [B,T,D] ---------------------- (dense -- act -- (norm)) -- out -- logits [B,T,C]    a label for each token

The tree is the body's, without a language model's head, and beside it

    classifier/dense/kernel [D,D]       (dense/bias [D], norm/scale [D], ...)   what BERT calls its pooler
    classifier/out/kernel [D,C]         (out/bias [C])
"""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxtune.errors import UserError, nearest
from jaxtune.models.layers import ACTIVATIONS, Norm
from jaxtune.models.names import NameTable
from jaxtune.models.spec import Config
from jaxtune.tree import flatten
from jaxtune.weights.leaf import Array, Keys, dot, fold

# As the names of transformers' classes end.
SEQUENCE, TOKEN, IMAGE = "SequenceClassification", "TokenClassification", "ImageClassification"
TASK_TYPES = {SEQUENCE: "SEQ_CLS", TOKEN: "TOKEN_CLS", IMAGE: None}  # peft's
POOLINGS = ("cls", "mean", "last")
PROBLEMS = ("single_label_classification", "multi_label_classification", "regression")
PREFIX = "classifier/"
# Names of the heads of other tasks in checkpoints, which a new head replaces.
_OTHER_HEADS = r"(classifier|pre_classifier|score|head|qa_outputs)\..*"


@dataclasses.dataclass(frozen=True)
class HeadLayout:
    """A family's label head.

    Attributes:
        names: HF name -> path in the parameter tree.
        act: of a dense layer before the last one; None: there is no such layer.
        norm: whether a norm follows it, as the body's norms are.
        pooling: transformers' pooling; None: there is none.
        out_bias, dense_bias: whether the two layers have a bias.
    """

    names: Mapping[str, str] = dataclasses.field(hash=False)
    act: str | None = None
    norm: bool = False
    pooling: str | None = None
    out_bias: bool = True
    dense_bias: bool = True


@dataclasses.dataclass(frozen=True)
class Labels:
    """The labels of a model.

    Attributes:
        kind: SEQUENCE, TOKEN or IMAGE.
        names: of the labels, in the order of the logits.
        problem: one of PROBLEMS.
        pooling: of POOLINGS; None: the family's own.
        drawn: whether the head is newly initialised; a head in the checkpoint is then not read.
    """

    kind: str
    names: tuple[str, ...]
    problem: str = PROBLEMS[0]
    pooling: str | None = None
    drawn: bool = False


def decoder_layout(c: Config, kind: str) -> HeadLayout:
    """The head of nearly all decoders: one matrix `score` on the last token, or on every one."""
    if kind == SEQUENCE:
        return HeadLayout({"score.weight": "classifier/out/kernel"}, pooling="last", out_bias=False)
    return HeadLayout({"score.weight": "classifier/out/kernel", "score.bias": "classifier/out/bias"})


def older_decoder_layout(c: Config, kind: str) -> HeadLayout:
    """The head of GPT-2 and GPT-NeoX, which is `classifier` for labels of tokens."""
    if kind == SEQUENCE:
        return decoder_layout(c, kind)
    return HeadLayout({"classifier.weight": "classifier/out/kernel", "classifier.bias": "classifier/out/bias"})


def read_labels(config: Mapping[str, Any]) -> Labels | None:
    """The labels of a checkpoint that was made for classification; None for any other.

    Raises:
        UserError: id2label is malformed, or a setting is not supported.
    """
    c = Config(dict(config))
    kind = next((k for a in c.get("architectures", ()) for k in TASK_TYPES if str(a).endswith(f"For{k}")), None)
    if kind is None:
        return None
    count = c.get("num_labels", 2)
    table = c.get("id2label", {str(i): f"LABEL_{i}" for i in range(count)})
    try:
        names = tuple(str(table[str(i)]) for i in range(len(table)))
    except KeyError as e:
        raise UserError(f"config.json: id2label lacks {e}; it needs the ids 0 to {len(table) - 1}.") from None
    if kind == TOKEN:
        return Labels(kind, names)
    problem = c.choice("problem_type", PROBLEMS[2] if len(names) == 1 else PROBLEMS[0], PROBLEMS)
    return Labels(kind, names, problem, c.choice("classifier_pooling", None, (None, *POOLINGS)))


@dataclasses.dataclass(frozen=True)
class Classifier:
    """An encoder or a decoder with a label head; it has the interface of `Body`.

    `apply({"params": params}, tokens, ...)` gives logits: f32[B, C], or f32[B, T, C] for a label each token.

    Attributes:
        pooled: `apply` takes the output of `pooled_body`, [B, D], in place of tokens.
    """

    body: Any
    labels: Labels
    layout: HeadLayout
    pooled: bool = False

    @property
    def spec(self) -> Any:
        return self.body.spec

    @property
    def dtype(self) -> Any:
        return self.body.dtype

    continues = False
    reads_source = False
    label_head = True

    @property
    def is_encoder(self) -> bool:
        return self.body.is_encoder

    @property
    def new_head(self) -> bool:
        return self.labels.drawn

    @property
    def label_config(self) -> dict[str, Any]:
        return self.spec.hf_config

    @property
    def auto_class(self) -> str:
        return f"AutoModelFor{self.labels.kind}"

    @property
    def task_type(self) -> str | None:
        return TASK_TYPES[self.labels.kind]

    @property
    def remat(self) -> str:
        return self.body.remat

    @property
    def attention(self) -> str:
        return self.body.attention

    @property
    def most_segments(self) -> int:
        return self.body.most_segments

    @property
    def pooling(self) -> str | None:
        """How a sequence becomes one vector; None for a label each token."""
        return None if self.labels.kind == TOKEN else self.labels.pooling or self.layout.pooling

    def clone(self, **changes: Any) -> "Classifier":
        """As a Flax module's `clone`; `changes` are fields of the body."""
        return dataclasses.replace(self, body=self.body.clone(**changes))

    def apply(
        self,
        variables: Mapping[str, Any],
        tokens: Array,
        positions: Array | None = None,
        segments: Array | None = None,
        keys: Keys = None,
        types: Array | None = None,
        places: "Places | None" = None,
    ) -> Array:
        """tokens i32[B, T] -> logits f32[B, C], or f32[B, T, C].

        Args:
            variables: {"params": the parameters}.
            tokens: i32[B, T].
            positions: i32[B, T]; default 0..T-1.
            segments: i32[B, T], 1 where there is text and 0 in the padding, which lies on the right; None: all is text.
            keys: one PRNG key a row, [B]; None switches every dropout off.
            types: i32[B, T], the token types of pairs of texts, which a model without a table of them ignores.
            places: where N texts lie if rows hold several; then keys are [N], and logits f32[N, C] (or f32[B, T, C]).
        """
        params = variables["params"]
        x = tokens if self.pooled else self.pooled_body(params, tokens, positions, segments, types, keys, places)
        head = params["classifier"]
        if self.layout.act is not None:
            x = affine(x, head["dense"], fold(keys, "classifier/dense"))
            x = jnp.tanh(x) if self.layout.act == "tanh" else ACTIVATIONS[self.layout.act](x)
            if self.layout.norm:
                x = Norm(self.spec.norm, self.spec.eps, bias=self.spec.norm_bias).apply({"params": head["norm"]}, x)
        return affine(x, head["out"], fold(keys, "classifier/out")).astype(jnp.float32)

    def pooled_body(
        self, params: Any, tokens: Array, positions=None, segments=None, types=None, keys: Keys = None, places=None
    ) -> Array:
        """The input of the head, [B, D], or [B, T, D] for a label each token. Arguments as in `apply`."""
        body, seen = seeing(self.body, segments, places)
        typed = {"types": types} if self.is_encoder and self.spec.types > 1 else {}
        keys = None if keys is None else keys[: len(tokens)]  # of packed rows: lines are no more than rows
        x = body.apply({"params": params}, tokens, positions, seen, keys=keys, **typed, method="hidden")
        if self.pooling is None:
            return x
        return pool(x, jnp.ones(tokens.shape[:2], jnp.int32) if segments is None else segments, self.pooling, places)

    def init_params(self, key: Array) -> Any:
        """Random float32 parameters."""
        params = self.body.init_params(key)
        return {k: v for k, v in params.items() if k != "lm_head"} | {"classifier": self.init_head(key)}

    def init_head(self, key: Array) -> dict[str, Any]:
        """A new head, f32: matrices initialised as the body's, biases zero. It depends only on `key` and the shapes."""
        d, std = self.spec.width, self.spec.init_std
        keys = dict(zip(("dense", "out"), jax.random.split(jax.random.fold_in(key, 3))))

        def linear(name, n, bias):
            kernel = {"kernel": std * jax.random.normal(keys[name], (d, n))}
            return kernel | ({"bias": jnp.zeros(n)} if bias else {})

        head = {"out": linear("out", len(self.labels.names), self.layout.out_bias)}
        if self.layout.act is not None:
            head["dense"] = linear("dense", d, self.layout.dense_bias)
        if self.layout.norm:
            head["norm"] = {"scale": jnp.ones(d)} | ({"bias": jnp.zeros(d)} if self.spec.norm_bias else {})
        return head

    def abstract_params(self) -> Any:
        """Shapes and dtypes of `init_params`, nothing allocated."""
        return jax.eval_shape(self.init_params, jax.random.key(0))

    @property
    def saved_modules(self) -> list[str]:
        """The head's modules as peft's `modules_to_save` names them: BERT's are "pooler" and "classifier"."""
        from jaxtune.models import family

        prefix = family(self.spec.hf_config).NAMES.prefix
        return list(dict.fromkeys(hf.removeprefix(prefix).partition(".")[0] for hf in self.layout.names))

    @property
    def notes(self) -> list[str]:
        """Sentences on unexpected properties of the exported model."""
        if self.pooling == self.layout.pooling:
            return []
        return [
            f"The model pools by {self.pooling!r}, as jaxtune reads from config.json (classifier_pooling); "
            f"transformers' class pools by {self.layout.pooling!r} and gives other logits."
        ]

    def names(self, table: NameTable) -> NameTable:
        """The family's names with those of this head."""
        others = [re.escape(hf) for hf, path in table.top.items() if path.startswith("lm_head/")]
        if self.labels.drawn:
            others.append(_OTHER_HEADS)
        top = {hf: path for hf, path in table.top.items() if not path.startswith("lm_head/")}
        return dataclasses.replace(table, top=top | dict(self.layout.names), ignored="|".join([table.ignored, *others]))

    def drawn(self, entries: Mapping[str, Any], table: NameTable, key: Array | None) -> dict[str, Array]:
        """{path: array} of a new head's parameters that are not read from a checkpoint with these tensors: its last
        layer, and those that the checkpoint lacks. A pretrained pooler is kept."""
        if not self.labels.drawn:
            return {}
        there = {path for hf, path in self.layout.names.items() if {hf, hf.removeprefix(table.prefix)} & {*entries}}
        new = flatten({"classifier": self.init_head(key)})
        return {path: x for path, x in new.items() if path.startswith("classifier/out/") or path not in there}


class Places(NamedTuple):
    """Where texts lie in rows that hold several; see `data.lines`.

    Attributes:
        at: i32[N], row * most + the text's segment - 1.
        most: segments of a row at most.
    """

    at: Array
    most: int


def seeing(body: Any, segments: Array | None, places: Places | None) -> tuple[Any, Array | None]:
    """The body, and the segments that it has to be told."""
    if places is not None:
        return body.clone(most_segments=places.most), segments
    return body, segments if body.is_encoder else None  # a decoder never sees the padding, which is on the right


def pool(x: Array, segments: Array, how: str, places: Places | None = None) -> Array:
    """x [B, T, D] -> [B, D]: the first token, the mean over the text, or its last token.

    segments i32[B, T] is above 0 where there is text. With `places` it is the number of a token's text, from 1, and the
    result is [N, D]; the mean of no tokens is 0.
    """
    if places is not None:
        here = segments[:, None] == jnp.arange(1, places.most + 1)[:, None]  # [B, most, T]
        if how == "mean":
            count = jnp.maximum(here.sum(-1, keepdims=True), 1).astype(jnp.float32)
            summed = jnp.einsum("bmt,btd->bmd", here.astype(x.dtype), x, preferred_element_type=jnp.float32)
            found = (summed / count).astype(x.dtype)
        else:
            at = here.argmax(-1) if how == "cls" else jnp.max(jnp.where(here, jnp.arange(x.shape[1]), 0), axis=-1)
            found = jnp.take_along_axis(x, at[..., None], axis=1)
        return found.reshape(-1, x.shape[-1])[places.at]
    if how == "cls":
        return x[:, 0]
    there = segments > 0
    if how == "mean":
        count = jnp.maximum(there.sum(1, keepdims=True), 1).astype(jnp.float32)
        summed = jnp.einsum("btd,bt->bd", x, there.astype(x.dtype), preferred_element_type=jnp.float32)
        return (summed / count).astype(x.dtype)
    last = jnp.max(jnp.where(there, jnp.arange(x.shape[1]), 0), axis=1)
    return jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0]


def affine(x: Array, layer: Mapping[str, Any], keys: Keys = None) -> Array:
    """x [..., K] -> [..., N] by a dense layer {"kernel": [K, N], maybe "bias": [N]}."""
    y = dot(x, layer["kernel"], keys)
    return y + layer["bias"].astype(y.dtype) if "bias" in layer else y


def with_labels(body: Any, labels: Labels) -> Classifier:
    """Put a label head on an encoder or a decoder.

    The config that an export writes tells transformers its class, labels, problem and padding.

    Raises:
        UserError: the pooling is unknown, or the model is an encoder-decoder.
    """
    from jaxtune.models import family  # which imports this module

    config = body.spec.hf_config
    if body.reads_source:
        raise UserError(
            f"The model (model_type={config['model_type']!r}) is an encoder-decoder, on which jaxtune puts no label "
            "head; it writes labels as text with objective.name=seq2seq."
        )
    module = family(config)
    layout = getattr(module, "label_layout", decoder_layout)(Config(config), labels.kind)
    if labels.pooling not in (None, *POOLINGS):
        raise UserError(
            f"pooling={labels.pooling!r} is not one of {', '.join(POOLINGS)}.{nearest(labels.pooling, POOLINGS)}"
        )
    if labels.kind == TOKEN and labels.pooling is not None:
        raise UserError("Pooling has no effect on a label for each token; leave it out.")
    body = body.clone(spec=dataclasses.replace(body.spec, config=_config_text(config, labels, layout, body)))
    return Classifier(body, labels, layout)


def _config_text(config: dict[str, Any], labels: Labels, layout: HeadLayout, body: Any) -> str:
    names = labels.names
    config = config | {
        "architectures": [transformers_class(config["model_type"], labels.kind)],
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
    }
    config.pop("num_labels", None)
    if labels.kind == SEQUENCE:
        config["problem_type"] = labels.problem
        if labels.pooling is not None:
            config["classifier_pooling"] = labels.pooling
    if layout.pooling == "last" and config.get("pad_token_id") is None and config.get("eos_token_id") is not None:
        # transformers finds the last token by the id of padding.
        eos = config["eos_token_id"]
        config["pad_token_id"] = eos[0] if isinstance(eos, Sequence) else eos
    return json.dumps(config, sort_keys=True)


def transformers_class(model_type: str, kind: str) -> str:
    """The class of transformers that loads a family's classifiers.

    Raises:
        UserError: there is none.
    """
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    name = f"{CONFIG_MAPPING_NAMES[model_type].removesuffix('Config')}For{kind}"
    if name not in dir(transformers):  # listed without being imported, which takes seconds
        raise UserError(f"transformers has no {name}, so that nothing could load the result.")
    return name
