"""ViT (Dosovitskiy et al. 2020, arXiv:2010.11929): an encoder over the patches of an image, behind a class token."""

import dataclasses
import json

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxtune.errors import UserError
from jaxtune.models.classifier import IMAGE, HeadLayout
from jaxtune.models.encoder import Encoder, EncoderBlockSpec, EncoderSpec
from jaxtune.models.families.bert import linear, norm
from jaxtune.models.layers import HF_ACTIVATIONS, leaf
from jaxtune.models.names import NameTable
from jaxtune.models.spec import Config, uniform
from jaxtune.weights.leaf import Array, Keys

NAMES = NameTable(
    top={
        "vit.embeddings.cls_token": "embed_class/token",
        "vit.embeddings.position_embeddings": "embed_positions/table",
        "vit.embeddings.patch_embeddings.projection.weight": "embed_patches/filter",
        "vit.embeddings.patch_embeddings.projection.bias": "embed_patches/bias",
    }
    | norm("vit.layernorm", "norm"),
    block=norm("layernorm_before", "attn_norm")
    | linear("attention.attention.query", "self_attn/q_proj")
    | linear("attention.attention.key", "self_attn/k_proj")
    | linear("attention.attention.value", "self_attn/v_proj")
    | linear("attention.output.dense", "self_attn/o_proj")
    | norm("layernorm_after", "mlp_norm")
    | linear("intermediate.dense", "mlp/up_proj")
    | linear("output.dense", "mlp/down_proj"),
    layer="vit.encoder.layer.{}.",
    prefix="vit.",
    in_memory=(
        (r"encoder\.layer\.", "layers."),
        (r"attention\.attention\.([qkv])\w+", r"attention.\1_proj"),
        (r"attention\.output\.dense", "attention.o_proj"),
        (r"intermediate\.dense", "mlp.fc1"),
        (r"output\.dense", "mlp.fc2"),
    ),
    # A layer that only some tasks use, and what only pretraining does.
    ignored=r"vit\.pooler\..*|vit\.embeddings\.mask_token|decoder\..*",
)


@dataclasses.dataclass(frozen=True)
class ImageSpec(EncoderSpec):
    """An encoder of images of one size.

    Attributes:
        image, patch: height and width in pixels.
        channels: of a pixel.
    """

    image: tuple[int, int] = (224, 224)
    patch: tuple[int, int] = (16, 16)
    channels: int = 3


class ImageEncoder(Encoder):
    """An encoder whose `tokens` are pixels f32[B, C, height, width].

    The parameters are `Encoder`'s, without a norm of the embeddings and with

        embed_patches/filter [D,C,patch,patch], bias [D]
        embed_class/token [1,1,D], embed_positions/table [1,1+patches,D]
    """

    @nn.compact
    def hidden(self, tokens: Array, positions=None, segments=None, keys: Keys = None, types=None) -> Array:
        """Pixels f32[B, C, height, width] -> the last hidden states [B, 1 + patches, D], the class token's first.

        Raises:
            UserError: the images have another shape than the model was made for.
        """
        s = self.spec
        if tokens.ndim != 4 or tokens.shape[1:] != (s.channels, *s.image):
            raise UserError(
                f"The model takes images of shape [B, {s.channels}, {s.image[0]}, {s.image[1]}], "
                f"this is {list(tokens.shape)}."
            )
        x = Patches(s, name="embed_patches")(tokens.astype(self.dtype))
        first = Single("token", (1, 1, s.width), s.init_std, name="embed_class")().astype(self.dtype)
        x = jnp.concatenate([jnp.broadcast_to(first, (len(x), 1, s.width)), x], axis=1)
        x += Single("table", (1, s.positions, s.width), s.init_std, name="embed_positions")().astype(self.dtype)
        return self.blocks(x, jnp.broadcast_to(jnp.arange(s.positions), x.shape[:2]), None, keys)

    def init_params(self, key: Array) -> dict:
        """Random float32 parameters, as for pretraining."""
        s = self.spec
        return self.init(key, jnp.zeros((1, s.channels, *s.image)), method="hidden")["params"]


class Patches(nn.Module):
    """Pixels [B, C, H, W] -> [B, patches, D], row by row."""

    spec: ImageSpec

    @nn.compact
    def __call__(self, x: Array) -> Array:
        s = self.spec
        shape = (s.width, s.channels, *s.patch)
        filters = leaf(self, "filter", nn.initializers.normal(s.init_std), shape).astype(x.dtype)
        bias = leaf(self, "bias", nn.initializers.zeros, (s.width,)).astype(x.dtype)
        y = jax.lax.conv_general_dilated(x, filters, window_strides=s.patch, padding="VALID")
        return y.reshape(*y.shape[:2], -1).swapaxes(1, 2) + bias


class Single(nn.Module):
    """A module with one parameter."""

    parameter: str
    shape: tuple[int, ...]
    std: float

    @nn.compact
    def __call__(self) -> Array:
        return leaf(self, self.parameter, nn.initializers.normal(self.std), self.shape)


MODULE = ImageEncoder


def spec(c: Config) -> ImageSpec:
    width, heads, eps = c.need("hidden_size"), c.need("num_attention_heads"), c.get("layer_norm_eps", 1e-12)
    image, patch = _pair(c.get("image_size", 224)), _pair(c.get("patch_size", 16))
    block = EncoderBlockSpec(
        heads=heads,
        kv_heads=heads,
        head_dim=width // heads,
        mlp=c.need("intermediate_size"),
        rope=None,
        eps=eps,
        act=c.choice("hidden_act", "gelu", HF_ACTIVATIONS),
        qkv_bias=c.get("qkv_bias", True),
        post_norm=False,
    )
    return ImageSpec(
        vocab=0,
        width=width,
        segments=uniform(block, c.need("num_hidden_layers")),
        positions=1 + (image[0] // patch[0]) * (image[1] // patch[1]),
        config=json.dumps(c.values, sort_keys=True),
        last_norm=True,
        eps=eps,
        init_std=c.get("initializer_range", 0.02),
        image=image,
        patch=patch,
        channels=c.get("num_channels", 3),
    )


def _pair(size: int | list[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def label_layout(c: Config, kind: str) -> HeadLayout:
    if kind != IMAGE:
        raise UserError(f"A model of images (model_type={c.model_type!r}) has no AutoModelFor{kind}.")
    return HeadLayout(linear("classifier", "classifier/out"), pooling="cls")
