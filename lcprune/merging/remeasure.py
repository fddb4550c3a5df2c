"""What layers of a model do on text, measured again whenever the model has changed."""

from collections.abc import Sequence

from transformers import PreTrainedModel

from lcprune.merging.activity import Activity, kv_heads_of, recording
from lcprune.merging.architectures import layout_of
from lcprune.merging.calibration import Batch, evaluating, hidden_states


def measure_activity(model: PreTrainedModel, batches: Sequence[Batch], wanted: Sequence[int]) -> tuple[Activity, ...]:
    """The activity of the layers `wanted`, in the order named, in one forward pass over the batches."""
    layout = layout_of(model.config)
    layers = [layout.layers_of(model)[index] for index in wanted]
    with evaluating(model), recording(layers, layout, kv_heads_of(model.config)) as recorder:
        for batch in batches:
            recorder.mask_BT = batch.get("attention_mask")
            hidden_states(model, batch)
    return recorder.activities()
