"""The only writer of a model's structure and merged weights.

    apply     a merge for good: the operator's tensors move into the base's own Parameters, the absorbed layers leave
    trial     the same merge for the length of a `with` block; afterwards the model is as it was, bit for bit
    replay    a history's structure without its weights: what a checkpoint needs before it can be loaded

Everything happens in place on the base layer: optimizers, DDP hooks and the output-capture hooks that transformers
installs once per model hold on to that module and to its Parameters. The base's `.data` gets new storage, so that a
teacher which shares tensors with the student is never written to, and so that undoing a trial is a matter of putting
the old tensors back. For the same reason the config is replaced, not written to: models may have been built from one
object, and transformers runs as many layers as it says. Where members are of different kinds (sliding and full
attention), the base takes over the settings of the member that `Operator.source` names. Nothing copies a model: a
merge needs room for one layer.
"""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from lcprune.errors import InputError
from lcprune.merging.activity import Measure
from lcprune.merging.architectures import LayerLayout, layout_of
from lcprune.merging.concat import Concat  # noqa: F401 - plans may name it
from lcprune.merging.lineage import MergeHistory, MergeStep
from lcprune.merging.operators import LayerTensors, Operator, from_spec


@dataclass(frozen=True)
class Outcome:
    """What a merge touched, for whoever keeps something by Parameter (an optimizer)."""

    merged: tuple[nn.Parameter, ...]
    """The base's Parameters, the same objects as before with new values."""
    removed: tuple[nn.Parameter, ...]
    """Parameters of the absorbed layers, no longer in the model."""


def apply(model: PreTrainedModel, step: MergeStep, measure: Measure | None = None) -> Outcome:
    """Merges the layers of `step.group` into the first of them, in place.

    Args:
        model: A causal LM of a known family.
        step: What merges, and how.
        measure: Gives the activity of layers of the model as it stands; only asked where the operator needs it.

    Raises:
        InputError: If the step does not fit the model's depth, names no operator or one that does not fit the
            family, or needs activity that nobody measures; or if the operator's tensors are not those of a layer.
            Nothing has changed then.
    """
    layout = layout_of(model.config)
    layers = layout.layers_of(model)
    _check(step, layers)
    operator = from_spec(step.operator)
    operator.check(layout)
    if operator.needs_activity and measure is None:
        raise InputError(
            f"operator {type(operator).__name__} of group {list(step.group)} chooses by what layers do on text, and "
            "there is none: give calibration batches."
        )
    members = [layers[index] for index in step.group]
    activity = measure(step.group) if operator.needs_activity and measure is not None else ()
    # Under autocast (a merge during training) an operator's sums would be taken in the run's precision.
    with torch.no_grad(), torch.autocast(model.device.type, enabled=False):
        tensors = [dict(member.named_parameters()) for member in members]
        merged = operator.merge(tensors, step.shares, layout, activity)
        _check_merged(operator, merged, tensors[0])
        for name, parameter in members[0].named_parameters():
            parameter.data = merged[name].to(parameter)  # an operator of the user's own may have summed in float32
    _remove(model, layout, step)
    removed = tuple(parameter for member in members[1:] for parameter in member.parameters())
    return Outcome(tuple(members[0].parameters()), removed)


def apply_all(model: PreTrainedModel, steps: Iterable[MergeStep], measure: Measure | None = None) -> None:
    """Executes a plan's steps in order; `measure` as for `apply`."""
    for step in steps:
        apply(model, step, measure)


@contextmanager
def trial(model: PreTrainedModel, *steps: MergeStep, measure: Measure | None = None) -> Iterator[None]:
    """The model with `steps` applied, inside the block only; restored bit for bit even when the body raises.

    Operators that need activity need `measure`, as for `apply`.

    Example:
        >>> with trial(model, step):
        ...     loss = evaluate(model)
    """
    memory, layers = Memory(model), layout_of(model.config).layers_of(model)
    try:
        for step in steps:
            _check(step, layers)
            memory.note(layers[step.base])
            apply(model, step, measure)
        yield
    finally:
        memory.restore()


class Memory:
    """A model's structure as it is, and the tensors of layers that may be about to change, by reference.

    Whoever changes weights gives them new storage, so that nothing is copied: what a merge replaces stays alive for as
    long as this does.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        """Knows the layers and the config; `note` the layers whose tensors will be replaced.

        Args:
            model: A causal LM of a known family.
        """
        self._layout, self._config, self._configured = layout_of(model.config), model.config, _configured(model)
        self._layers = self._layout.layers_of(model)
        self._modules = list(self._layers)
        self._tensors: list[tuple[nn.Parameter, torch.Tensor]] = []
        self._settings: list[tuple[nn.Module, dict[str, object]]] = []

    def note(self, *layers: nn.Module) -> None:
        """Keeps the tensors and settings that these layers have now."""
        for layer in layers:
            self._tensors += [(parameter, parameter.data) for parameter in layer.parameters()]
            self._settings += [(module, _settings(module)) for module in layer.modules()]

    def restore(self) -> None:
        """Makes the model what it was, bit for bit and with the same Parameters."""
        for parameter, data in reversed(self._tensors):
            parameter.data = data
        for module, plain in reversed(self._settings):
            vars(module).update(plain)
        del self._layers[:]
        self._layers.extend(self._modules)
        for module in self._configured:
            vars(module)["config"] = self._config
        _renumber(self._layers, self._layout)


def replay(model: PreTrainedModel, history: MergeHistory) -> None:
    """Gives an unmerged model the structure that `history` left behind; weights are the loader's business.

    Raises:
        InputError: If the model does not have the teacher's depth, or a step merges layers that differ in shape.
    """
    layout = layout_of(model.config)
    layers = layout.layers_of(model)
    if len(layers) != history.teacher_depth:
        raise InputError(
            f"The history starts from a model of {history.teacher_depth} layers, this one has {len(layers)}: "
            f"name the model it belongs to{f' ({history.teacher})' if history.teacher else ''}."
        )
    for step in history.steps:
        _check(step, layers)
        _remove(model, layout, step)


def second_view(model: PreTrainedModel) -> PreTrainedModel:
    """A model of its own structure and its own Parameters whose tensors are the given model's.

    Modules, config and buffers are copied, parameters' storage is shared. Before a shared parameter is written to in
    place, it must be given storage of its own.
    """
    shared = {id(p): nn.Parameter(p.detach(), requires_grad=p.requires_grad) for p in model.parameters()}
    view = copy.deepcopy(model, dict(shared))
    assert isinstance(view, PreTrainedModel)
    return view


def mend_config(config: PretrainedConfig, steps: Iterable[MergeStep]) -> None:
    """Makes an unmerged model's config describe the model that `steps` lead to, in place."""
    layout = layout_of(config)
    for step in steps:
        layout.keep_layers(config, _kept(config, layout, step))


def _check(step: MergeStep, layers: nn.ModuleList) -> None:
    depth = len(layers)
    if step.group[-1] >= depth:
        raise InputError(f"group={list(step.group)} does not fit a model of {depth} layers (0 to {depth - 1}).")
    shapes = [{name: theta.shape for name, theta in layers[index].named_parameters()} for index in step.group]
    if any(member != shapes[0] for member in shapes):
        raise InputError(
            f"group={list(step.group)} holds layers whose weights differ in name or shape (such as dense ones and ones "
            "of experts), which cannot become one layer: choose groups of layers that are built alike."
        )


def _check_merged(operator: Operator, merged: LayerTensors, base: LayerTensors) -> None:
    """Refuses what a user's own operator returns, before any of it is taken over, where it is no layer's tensors."""
    what = f"operator {type(operator).__name__}"
    if missing := [name for name in base if name not in merged]:
        raise InputError(f"{what} returns no tensor {missing[0]!r}: it must return one for every name of its members.")
    if surplus := [name for name in merged if name not in base]:
        raise InputError(f"{what} returns a tensor {surplus[0]!r}, which the layer does not have: leave it out.")
    for name, theta in base.items():
        if merged[name].shape != theta.shape:
            raise InputError(
                f"{what} returns {name!r} of shape {list(merged[name].shape)}, in the layer it is "
                f"{list(theta.shape)}: keep the members' shapes."
            )


def _kept(config: PretrainedConfig, layout: LayerLayout, step: MergeStep) -> list[int]:
    """For every layer after the merge the number of the layer, before it, whose kind it is of."""
    chosen = step.base
    if len({layout.kind_of(config, index) for index in step.group}) > 1:
        chosen = step.group[from_spec(step.operator).source(step.shares)]
    return [*range(step.base), chosen, *range(step.group[-1] + 1, layout.depth_of(config))]


def _remove(model: PreTrainedModel, layout: LayerLayout, step: MergeStep) -> None:
    """Takes the absorbed layers out of the model, its config and the layers' own numbering."""
    layers = layout.layers_of(model)
    kept = _kept(model.config, layout, step)
    if kept[step.base] != step.base:
        for module, chosen in zip(layers[step.base].modules(), layers[kept[step.base]].modules(), strict=True):
            vars(module).update(_settings(chosen))
    own = copy.deepcopy(model.config)
    layout.keep_layers(own, kept)
    for module in _configured(model):
        vars(module)["config"] = own
    del layers[step.group[1] : step.group[-1] + 1]
    _renumber(layers, layout)


def _configured(model: PreTrainedModel) -> list[nn.Module]:
    """The modules that go by the model's config, itself among them."""
    return [module for module in model.modules() if vars(module).get("config") is model.config]


def _settings(module: nn.Module) -> dict[str, object]:
    """The plain values that a module computes with: `sliding_window`, `layer_type`, `use_rope` and the like."""
    plain = (bool, int, float, str, type(None))
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, plain) and name != "training" and not name.startswith("_")
    }


def _renumber(layers: nn.ModuleList, layout: LayerLayout) -> None:
    for index, layer in enumerate(layers):
        for name in layout.indexed:
            setattr(layer.get_submodule(name), "layer_idx", index)  # noqa: B010 - mypy knows no such attribute
