"""What lcprune has to know about a family of models, as data: one record per family.

The defaults of `LayerLayout` describe the Llama shape, so that a family of that shape is one line in `LAYOUTS`;
another shape names its own module paths:

    LayerLayout("gpt_neox", layers="gpt_neox.layers", final_norm="gpt_neox.final_layer_norm", ...)

A family whose settings change the names inside a layer has a record per arrangement, told apart by `only`; settings
that no record lists are refused. What belongs here is only what differs between families and what surgery must know.
Legend: paths are dotted module names as `nn.Module.get_submodule` takes them; a layer's own names are relative to the
layer.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from lcprune.errors import InputError


@dataclass(frozen=True)
class Producer:
    """A projection whose output rows belong to a branch's units."""

    name: str
    """Module inside the layer, e.g. `self_attn.q_proj`."""
    blocks: Literal["one", "qkv", "halves"] = "one"
    """Rows from top to bottom: `one` block of equal slices per unit (query, key and value interleaved too);
    `qkv`: a block of queries, one of keys, one of values; `halves`: gate above up."""


@dataclass(frozen=True)
class Branch:
    """A way from the residual stream through N parallel units and back: attention (KV-head groups) or MLP (channels).

    Unit n owns a slice of rows in every block of every producer and a slice of the consumer's input columns.
    """

    producers: tuple[Producer, ...]
    """What reads the (normalised) stream."""
    consumer: str
    """The projection that writes into the stream, e.g. `mlp.down_proj`."""
    norm: str
    """The normalisation in front of the producers; empty where they read the stream as it is."""
    norm_after: str = ""
    """The normalisation between the consumer and the stream, in families that have one."""


_ATTENTION = Branch(
    (Producer("self_attn.q_proj"), Producer("self_attn.k_proj"), Producer("self_attn.v_proj")),
    consumer="self_attn.o_proj",
    norm="input_layernorm",
)
_MLP = Branch(
    (Producer("mlp.gate_proj"), Producer("mlp.up_proj")), consumer="mlp.down_proj", norm="post_attention_layernorm"
)


@dataclass(frozen=True)
class LayerLayout:
    """The names by which one family's models can be taken apart."""

    model_type: str
    """`config.model_type` of the family."""
    layers: str = "model.layers"
    """Path of the ModuleList of decoder layers, from the causal LM."""
    final_norm: str = "model.norm"
    """Path of the normalisation between the last layer and the head, from the causal LM."""
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    """Normalisation modules inside a layer; elementwise operators keep those of the base."""
    indexed: tuple[str, ...] = ("self_attn",)
    """Modules inside a layer that keep the layer's number as `layer_idx` (the key-value cache goes by it)."""
    depth_field: str = "num_hidden_layers"
    """Config field that holds the number of layers."""
    per_layer_fields: tuple[str, ...] = ("layer_types",)
    """Config fields that are lists with one entry per layer, where a config has them."""
    only: Mapping[str, tuple[object, ...]] = field(default_factory=dict, hash=False)
    """Config fields and the values of them for which the record holds; of a family's records the first that fits."""

    attention: Branch = _ATTENTION
    """Query, key, value and output projections; the units are KV heads with the query heads that share each."""
    mlp: Branch | None = _MLP
    """The MLP's projections; None where it consists of experts, which only elementwise operators and Drop can merge."""
    norm_offset: float = 0.0
    """Added to a stored norm weight before it multiplies (1 where the family stores the weight minus one)."""
    transposed: bool = False
    """Whether projections are stored as [inputs, outputs] (Conv1D) instead of [outputs, inputs]."""

    def layers_of(self, model: PreTrainedModel) -> nn.ModuleList:
        """The decoder layers of a causal LM of this family; raises InputError for a model that is none itself."""
        try:
            layers = model.get_submodule(self.layers)
        except AttributeError as error:
            raise InputError(
                f"{type(model).__name__} has no {self.layers}, where a causal LM of the family {self.model_type!r} has "
                "its layers: give that model itself, of a PeftModel what its merge_and_unload() returns."
            ) from error
        assert isinstance(layers, nn.ModuleList), f"{self.layers} of {self.model_type} is not a ModuleList"
        return layers

    def depth_of(self, config: PretrainedConfig) -> int:
        """Number of decoder layers that a config describes."""
        return int(getattr(config, self.depth_field))

    def is_norm(self, name: str) -> bool:
        """Whether a layer's parameter (e.g. `input_layernorm.weight`) belongs to a normalisation."""
        return name.rpartition(".")[0] in self.norms

    def kv_heads_of(self, config: PretrainedConfig) -> int:
        """Number of key-value heads of a layer: the units of its attention."""
        if getattr(config, "new_decoder_architecture", False):  # falcon's name for grouped queries
            return int(config.num_kv_heads)
        if getattr(config, "multi_query", False):
            return 1
        return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)

    def kind_of(self, config: PretrainedConfig, index: int) -> tuple[object, ...]:
        """What tells one layer's masks and positions from another's: its entries in the config's per-layer lists."""
        lists = (getattr(config, name, None) for name in self.per_layer_fields)
        return tuple(values[index] for values in lists if values is not None)

    def keep_layers(self, config: PretrainedConfig, kept: list[int]) -> None:
        """Mends a config in place so that it describes the layers `kept`, numbered as before.

        Every per-layer list is cut along with the depth: a stale one makes transformers 5 refuse to save.
        """
        setattr(config, self.depth_field, len(kept))
        for name in self.per_layer_fields:
            values = getattr(config, name, None)
            if values is not None:
                setattr(config, name, [values[index] for index in kept])


def residual_scale(config: PretrainedConfig) -> float:
    """By what a model multiplies all that its branches write into the stream (transformers' GraniteDecoderLayer)."""
    return float(getattr(config, "residual_multiplier", 1.0))


_NORMS = ("input_layernorm", "post_attention_layernorm")
_QK_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
_SANDWICH_NORMS = (*_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")
_SANDWICH_ATTENTION = replace(_ATTENTION, norm_after="post_attention_layernorm")
_SANDWICH_MLP = replace(_MLP, norm="pre_feedforward_layernorm", norm_after="post_feedforward_layernorm")


def _fused_attention(module: str, norm: str = "input_layernorm") -> Branch:
    """Query, key and value of a head side by side in the rows of one projection."""
    return Branch((Producer(f"{module}.query_key_value"),), consumer=f"{module}.dense", norm=norm)


def _dense_mlp(norm: str = "post_attention_layernorm") -> Branch:
    """An MLP without a gate."""
    return Branch((Producer("mlp.dense_h_to_4h"),), consumer="mlp.dense_4h_to_h", norm=norm)


def _falcon(attention_norm: str, mlp_norm: str, only: Mapping[str, tuple[object, ...]]) -> LayerLayout:
    """One of falcon's three arrangements of norms."""
    return LayerLayout(
        "falcon",
        layers="transformer.h",
        final_norm="transformer.ln_f",
        norms=tuple(dict.fromkeys((attention_norm, mlp_norm))),
        indexed=("self_attention",),
        attention=_fused_attention("self_attention", attention_norm),
        mlp=_dense_mlp(mlp_norm),
        only=only,
    )


LAYOUTS: tuple[LayerLayout, ...] = (
    LayerLayout("llama"),
    LayerLayout("mistral"),
    LayerLayout("qwen2"),
    LayerLayout("qwen3", norms=(*_NORMS, *_QK_NORMS)),
    LayerLayout("smollm3", per_layer_fields=("layer_types", "no_rope_layers")),
    LayerLayout("gemma", norm_offset=1.0),
    LayerLayout("gemma2", norms=_SANDWICH_NORMS, attention=_SANDWICH_ATTENTION, mlp=_SANDWICH_MLP, norm_offset=1.0),
    LayerLayout(
        "gemma3_text",
        norms=(*_SANDWICH_NORMS, *_QK_NORMS),
        indexed=("", "self_attn"),
        attention=_SANDWICH_ATTENTION,
        mlp=_SANDWICH_MLP,
        norm_offset=1.0,
    ),
    LayerLayout(
        "olmo2",
        norms=("post_attention_layernorm", "post_feedforward_layernorm", *_QK_NORMS),
        attention=replace(_SANDWICH_ATTENTION, norm=""),
        mlp=replace(_SANDWICH_MLP, norm=""),
    ),
    LayerLayout(
        "phi",
        final_norm="model.final_layernorm",
        norms=("input_layernorm", "self_attn.q_layernorm", "self_attn.k_layernorm"),
        attention=replace(_ATTENTION, consumer="self_attn.dense"),
        mlp=Branch((Producer("mlp.fc1"),), consumer="mlp.fc2", norm="input_layernorm"),
    ),
    LayerLayout(
        "phi3",
        attention=replace(_ATTENTION, producers=(Producer("self_attn.qkv_proj", "qkv"),)),
        mlp=replace(_MLP, producers=(Producer("mlp.gate_up_proj", "halves"),)),
    ),
    LayerLayout("mixtral", mlp=None),
    LayerLayout(
        "qwen3_moe",
        norms=(*_NORMS, *_QK_NORMS),
        mlp=None,
        # Else dense layers stand between those of experts: no shape in common, and the config counts in steps.
        only={"decoder_sparse_step": (1,), "mlp_only_layers": ([],)},
    ),
    LayerLayout(
        "opt",
        layers="model.decoder.layers",
        final_norm="model.decoder.final_layer_norm",
        norms=("self_attn_layer_norm", "final_layer_norm"),
        attention=replace(_ATTENTION, consumer="self_attn.out_proj", norm="self_attn_layer_norm"),
        mlp=Branch((Producer("fc1"),), consumer="fc2", norm="final_layer_norm"),
        only={"do_layer_norm_before": (True,), "_remove_final_layer_norm": (False,)},  # all but opt-350m
    ),
    LayerLayout(
        "gpt2",
        layers="transformer.h",
        final_norm="transformer.ln_f",
        norms=("ln_1", "ln_2"),
        indexed=("attn",),
        depth_field="n_layer",
        attention=Branch((Producer("attn.c_attn", "qkv"),), consumer="attn.c_proj", norm="ln_1"),
        mlp=Branch((Producer("mlp.c_fc"),), consumer="mlp.c_proj", norm="ln_2"),
        transposed=True,
        only={"scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,)},
    ),
    LayerLayout(
        "gpt_neox",
        layers="gpt_neox.layers",
        final_norm="gpt_neox.final_layer_norm",
        indexed=("attention",),
        attention=_fused_attention("attention"),
        mlp=_dense_mlp(),
    ),
    LayerLayout(
        "bloom",
        layers="transformer.h",
        final_norm="transformer.ln_f",
        indexed=("self_attention",),
        depth_field="n_layer",
        attention=_fused_attention("self_attention"),
        mlp=_dense_mlp(),
        only={"apply_residual_connection_post_layernorm": (False,)},
    ),
    _falcon(
        "ln_attn",
        "ln_mlp",
        {"parallel_attn": (True,), "new_decoder_architecture": (True,), "num_ln_in_parallel_attn": (None, 2)},
    ),
    _falcon("input_layernorm", "input_layernorm", {"parallel_attn": (True,)}),
    _falcon("input_layernorm", "post_attention_layernorm", {"parallel_attn": (False,)}),
)
"""Every family that can be merged; add a record to add a family.

From outside: `families.LAYOUTS = (*families.LAYOUTS, LayerLayout("my-family", ...))`.
"""
