"""Where a Hugging Face causal LM keeps its decoder layers, and what must change when some of them go.

A family is data: one `LayerLayout` per `config.model_type`. The defaults describe the Llama shape, so that a family
of that shape is one line in `LAYOUTS`; another shape names its own module paths:

    LayerLayout("gpt_neox", layers="gpt_neox.layers", final_norm="gpt_neox.final_layer_norm", ...)

What belongs here is only what differs between families and what surgery must know. Legend: paths are dotted module
names as `nn.Module.get_submodule` takes them; a layer's own names are relative to the layer.
"""

from dataclasses import dataclass
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

    attention: Branch = _ATTENTION
    """Query, key, value and output projections; the units are KV heads with the query heads that share each."""
    mlp: Branch | None = _MLP
    """The MLP's projections; None where it consists of experts."""
    norm_offset: float = 0.0
    """Added to a stored norm weight before it multiplies (1 where the family stores the weight minus one)."""
    transposed: bool = False
    """Whether projections are stored as [inputs, outputs] (Conv1D) instead of [outputs, inputs]."""

    def layers_of(self, model: PreTrainedModel) -> nn.ModuleList:
        """The decoder layers of a causal LM of this family."""
        layers = model.get_submodule(self.layers)
        assert isinstance(layers, nn.ModuleList), f"{self.layers} of {self.model_type} is not a ModuleList"
        return layers

    def depth_of(self, config: PretrainedConfig) -> int:
        """Number of decoder layers that a config describes."""
        return int(getattr(config, self.depth_field))

    def is_norm(self, name: str) -> bool:
        """Whether a layer's parameter (e.g. `input_layernorm.weight`) belongs to a normalisation."""
        return name.rpartition(".")[0] in self.norms

    def keep_layers(self, config: PretrainedConfig, kept: list[int]) -> None:
        """Mends a config in place so that it describes the layers `kept`, numbered as before.

        Every per-layer list is cut along with the depth: a stale one makes transformers 5 refuse to save.
        """
        setattr(config, self.depth_field, len(kept))
        for name in self.per_layer_fields:
            values = getattr(config, name, None)
            if values is not None:
                setattr(config, name, [values[index] for index in kept])


_QK_NORMS = ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm")

LAYOUTS: tuple[LayerLayout, ...] = (
    LayerLayout("llama"),
    LayerLayout("mistral"),
    LayerLayout("qwen2"),
    LayerLayout("qwen3", norms=_QK_NORMS),
)
"""Every family that can be merged; add a record to add a family."""


def layout_of(config: PretrainedConfig) -> LayerLayout:
    """The record of a config's family; raises InputError for a family that has none."""
    for layout in LAYOUTS:
        if layout.model_type == config.model_type:
            return layout
    known = ", ".join(layout.model_type for layout in LAYOUTS)
    raise InputError(
        f"model_type={config.model_type!r} is a family lcprune does not know; it knows {known}: "
        "choose a model of one of these or add a LayerLayout record to lcprune/merging/architectures.py."
    )
