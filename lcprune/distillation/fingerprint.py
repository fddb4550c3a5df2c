"""What tells one model from another without looking at weights."""

from collections.abc import Collection, Mapping

from transformers import PretrainedConfig

Fingerprint = dict[str, object]
DEPTH = "num_hidden_layers"
FINGERPRINT = (
    "model_type",
    DEPTH,
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "tie_word_embeddings",
)
"""Config fields by which a teacher is recognised."""


def fingerprint_of(config: PretrainedConfig) -> Fingerprint:
    """These fields of a config, None where it has none."""
    return {name: getattr(config, name, None) for name in FINGERPRINT}


def differences(
    one: Mapping[str, object], other: Mapping[str, object], passing: Collection[str] = ()
) -> tuple[str, str] | None:
    """What the first says where the second says otherwise, and what that says; None where they agree.

    Args:
        one: A fingerprint.
        other: Another.
        passing: Fields that may differ.
    """
    differing = [name for name, value in one.items() if other.get(name) != value and name not in passing]
    if not differing:
        return None
    told, instead = (", ".join(f"{name} {each.get(name)}" for name in differing) for each in (one, other))
    return told, instead
