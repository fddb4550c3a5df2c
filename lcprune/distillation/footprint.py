"""What a training step holds in memory and how much it computes, from shapes alone.

    weights of the teacher, and what of the student's is not the teacher's own memory
  + running averages of the weights
  + the optimizer's state
  + activations that the backward pass needs
  + the teacher's states that the student is held to
  + the loss: logits of a chunk, the gradient of the output layer
  + gradients: of the micro-batches before; and what the backward pass makes, as far as it is more than what it frees
  = what is held at most, where the backward pass begins or where it ends

Not in it: libraries, the allocator's holes, planning, refits and validation, and loading. Legend: `B` rows, `T` tokens,
`D` hidden, `V` vocabulary, `C` tokens of a chunk.
"""

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.nn import Parameter
from transformers import PretrainedConfig, PreTrainedModel

from lcprune.distillation.adapters import Lora
from lcprune.distillation.fused import CHUNK
from lcprune.distillation.levels import Boundary, Labels, Level, Local, Logits, only
from lcprune.distillation.pair import Storage
from lcprune.distillation.quantized import BLOCK
from lcprune.distillation.teacher import DtypeName
from lcprune.distillation.tracing import LayerCost, Shape
from lcprune.distillation.trained import BESIDE_PREFIX, Trained, trained_layers, trained_parameters, trains_adapters
from lcprune.merging.architectures import layout_of
from lcprune.merging.budget import on_meta
from lcprune.merging.lineage import Lineage

FLOAT = 4
"""Bytes of a float32."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one device, where a training step holds most."""

    teacher: int
    """The original's weights."""
    student: int
    """The student's weights that are not the teacher's own memory; adapters."""
    averages: int
    """Running averages of the student's weights."""
    gathered: int
    """What is whole at a time where each device has a part: two layers, and all that is no layer."""
    optimizer: int
    """What the optimizer keeps per trained Parameter."""
    activations: int
    """What the backward pass needs, copies of weights in the type of the products included."""
    states: int
    """What the teacher's pass leaves for the loss."""
    loss: int
    """Logits of a chunk of tokens, and the output layer's gradient."""
    gradients: int
    """Beside all this: what accumulates, DDP's buckets, and what the backward pass makes beyond what it frees."""

    @property
    def total(self) -> int:
        """All of it."""
        return sum(asdict(self).values())


@dataclass(frozen=True)
class Step:
    """How a run trains, as far as it decides memory and work."""

    config: PretrainedConfig
    """The teacher's."""
    shape: Shape
    """The batch of one device."""
    layer: LayerCost
    """Of one layer, for this batch."""
    student: Storage
    """How the student's weights are held."""
    teacher: Storage
    """How the teacher's are."""
    trained_dtype: torch.dtype
    """Weights that are trained are held in this."""
    optimizer: float
    """Bytes of state per trained Parameter's element."""
    lora: Lora | None
    """The adapters, where adapters are trained; None = those of the defaults."""
    recompute: bool
    """Whether layers are run again on the way back instead of keeping what they saved."""
    cached: bool
    """Whether the teacher's answers come from a cache; its weights stay in memory for validation and planning."""
    gradients_made: int = 1
    """Copies of the gradients where the backward pass ends; 2 under DDP, whose buckets are as large."""
    gradients_kept: int = 0
    """Copies of them that are there where it begins: accumulated ones, DDP's buckets."""
    parts: int = 1
    """Into how many weights, gradients and the optimizer's state are cut, a device has one each (FSDP2)."""
    averages: int = 0
    """Callbacks that average the student's weights."""
    cast: DtypeName | None = None
    """What Lightning casts the loaded student to; None = it does not."""

    def itemsize(self, what: Trained) -> int:
        """Bytes of one number that is trained."""
        adapters = trains_adapters(what) and self.cast is None
        return FLOAT if adapters else self.trained_dtype.itemsize


@dataclass(frozen=True)
class At:
    """Where in a run: which student trains how."""

    depth: int
    """The student's layers."""
    levels: Sequence[Level]
    """What is optimized."""
    train: Trained
    """Which Parameters are trained."""
    lineage: Lineage | None
    """Teacher layers of every layer; None = only planning will tell."""

    @property
    def at_most(self) -> bool:
        """Whether less may be trained than is counted, because nobody knows yet which layers merge."""
        return self.lineage is None and self.train in BESIDE_PREFIX

    @property
    def alone(self) -> bool:
        """Whether every merged layer learns alone."""
        return all(isinstance(level, Local) for level in self.levels)

    @property
    def first(self) -> int:
        """The first layer that the backward pass reaches."""
        if self.train not in BESIDE_PREFIX or self.lineage is None:
            return 0
        return min(trained_layers(self.train, self.lineage), default=self.depth)

    def merged(self, teacher_depth: int) -> int:
        """How many layers descend from several, at most."""
        if self.lineage is None:
            return min(self.depth, teacher_depth - self.depth)
        return sum(len(ancestors) > 1 for ancestors in self.lineage)


def model_of_depth(config: PretrainedConfig, depth: int) -> PreTrainedModel:
    """A student of that depth with shapes and no weights."""
    config = copy.deepcopy(config)
    layout_of(config).keep_layers(config, list(range(depth)))
    return on_meta(config)


def state_bytes(make_optimizer: OptimizerCallable, dtype: torch.dtype) -> float:
    """What an optimizer keeps per trained element, in bytes; found by one step on a few of them."""
    parameter = Parameter(torch.zeros(64, 64, dtype=dtype))
    parameter.grad = torch.zeros_like(parameter)
    optimizer = make_optimizer(iter([parameter]))
    if type(optimizer).__name__.endswith("8bit"):  # two states of one byte; its kernels may want a GPU
        return 2.0
    optimizer.step()
    kept = [value for value in optimizer.state[parameter].values() if isinstance(value, Tensor) and value.numel() > 1]
    return sum(value.nbytes for value in kept) / parameter.numel()


def trained_elements(student: PreTrainedModel, at: At, lora: Lora | None) -> int:
    """How many numbers are trained; where only planning will tell, as many as it can be at most."""
    lineage = at.lineage if at.lineage is not None else tuple((index,) for index in range(at.depth))
    what: Trained = at.train if not at.at_most else ("lora" if trains_adapters(at.train) else "layers")
    if trains_adapters(what):
        return _adapters(student, len(trained_layers(what, lineage)), lora or Lora())
    return sum(parameter.numel() for parameter in trained_parameters(student, what, lineage))


def memory(step: Step, at: At) -> Memory:
    """What a step holds at a point of a run."""
    teacher = on_meta(step.config)
    depth = len(layout_of(step.config).layers_of(teacher))
    student = model_of_depth(step.config, at.depth)
    trained = trained_elements(student, at, step.lora)
    bytes_trained = trained * step.itemsize(at.train) // step.parts
    activations, states, loss = _activations(step, at, depth), _states(step, at, depth), _loss(step, at)
    made, kept = bytes_trained * step.gradients_made, bytes_trained * step.gradients_kept
    return Memory(
        teacher=_weights(teacher, step.teacher) // step.parts,
        student=_own(student, step, at, trained) // step.parts,
        averages=step.averages * student.num_parameters() * step.trained_dtype.itemsize,
        gathered=_gathered(student, step) if step.parts > 1 else 0,
        optimizer=int(trained * step.optimizer) // step.parts,
        activations=activations,
        states=states,
        loss=loss,
        gradients=max(kept, made - activations - states - loss),
    )


def whole(step: Step, depth: int) -> int:
    """Bytes that a packed or a sharded student takes more for as long as its layers merge."""
    student = model_of_depth(step.config, depth)
    if step.parts > 1:
        size = _weights(student, step.student)
        return size - size // step.parts
    if step.student.packed is None:
        return 0
    packed = _projections(student)
    elements = sum(parameter.numel() for parameter in student.parameters() if id(parameter) in packed)
    return elements * getattr(torch, step.student.dtype).itemsize


def operations(step: Step, at: At) -> int:
    """Floating-point operations of a batch on one device, forward and backward; of planning and validation none."""
    one, depth = step.layer.flops, layout_of(step.config).depth_of(step.config)
    heads = 2 * step.shape.rows * step.shape.length * _head(step.config)
    backward = 1 if trains_adapters(at.train) else 2  # towards the states, and towards the weights
    taught = not step.cached and any(not isinstance(level, Labels) for level in at.levels)
    if at.alone:
        return taught * depth * one + at.merged(depth) * (1 + backward + step.recompute) * one
    reached = at.depth - at.first
    layers = taught * depth + at.depth + reached * (backward + step.recompute)
    logits = taught and only(at.levels, Logits) is not None
    return layers * one + heads * (2 + (at.train == "all") + logits)


def _head(config: PretrainedConfig) -> int:
    """Elements of the output layer, V * D."""
    text = config.get_text_config()
    return text.vocab_size * text.hidden_size


def _projections(model: PreTrainedModel) -> set[int]:
    """Identities of the weights that packing packs."""
    layers = layout_of(model.config).layers_of(model)
    return {id(module.weight) for module in layers.modules() if isinstance(module, nn.Linear)}


def _bytes(parameter: Tensor, storage: Storage, packed: bool) -> int:
    if packed and storage.packed == "nf4":
        return parameter.numel() // 2 + parameter.numel() // BLOCK * FLOAT
    if packed and storage.packed == "int8":
        return parameter.numel() + len(parameter) * FLOAT
    return parameter.numel() * getattr(torch, storage.dtype).itemsize


def _weights(model: PreTrainedModel, storage: Storage) -> int:
    packed = _projections(model)
    return sum(_bytes(parameter, storage, id(parameter) in packed) for parameter in model.parameters())


def _gathered(student: PreTrainedModel, step: Step) -> int:
    layers = layout_of(student.config).layers_of(student)
    inside = {id(parameter) for parameter in layers.parameters()}
    outside = sum(parameter.numel() for parameter in student.parameters() if id(parameter) not in inside)
    layer = sum(parameter.numel() for parameter in layers[0].parameters())
    mine, theirs = (getattr(torch, storage.dtype).itemsize for storage in (step.student, step.teacher))
    return (2 * layer + outside) * mine + outside * theirs


def _own(student: PreTrainedModel, step: Step, at: At, trained: int) -> int:
    """Weights of the student that are no memory of the teacher's, and adapters."""
    packed = _projections(student)
    held = step.student if step.cast is None else replace(step.student, dtype=step.cast)
    if trains_adapters(at.train):
        chosen: set[int] = set()
        own = _adapters(student, at.depth, step.lora or Lora()) * step.itemsize(at.train)
        # A layer that has merged is frozen, but no longer the teacher's.
        one = layout_of(student.config).layers_of(student)[0]
        shared = [parameter for parameter in one.parameters() if _alike(parameter, step, packed)]
        merged = at.merged(layout_of(step.config).depth_of(step.config))
        own += merged * sum(_bytes(parameter, held, id(parameter) in packed) for parameter in shared)
    else:
        lineage = at.lineage if at.lineage is not None else tuple((index,) for index in range(at.depth))
        what: Trained = "layers" if at.at_most else at.train
        chosen = {id(parameter) for parameter in trained_parameters(student, what, lineage)}
        own = trained * step.itemsize(at.train)
    for parameter in student.parameters():
        if id(parameter) not in chosen and not _alike(parameter, step, packed):
            own += _bytes(parameter, held, id(parameter) in packed)
    return own


def _alike(parameter: Parameter, step: Step, packed: set[int]) -> bool:
    """Whether student and teacher hold a weight in the same way, so that they can share it."""
    return step.student == step.teacher if id(parameter) in packed else step.student.dtype == step.teacher.dtype


def _adapters(student: PreTrainedModel, layers: int, lora: Lora) -> int:
    layout = layout_of(student.config)
    layer = layout.layers_of(student)[0]
    shapes = [layer.get_parameter(f"{name}.weight").shape for name in lora.projections(layout)]
    head = sum(student.get_output_embeddings().weight.shape) if lora.adapts_head else 0
    return lora.rank * (layers * sum(map(sum, shapes)) + head)


def _activations(step: Step, at: At, teacher_depth: int) -> int:
    reached = at.merged(teacher_depth) if at.alone else at.depth - at.first
    outside = 0 if at.alone else step.layer.outside
    if step.recompute:
        return outside + reached * step.layer.state + min(reached, 1) * step.layer.saved
    return outside + reached * step.layer.saved


def _states(step: Step, at: At, teacher_depth: int) -> int:
    """The teacher's last state and those that Boundary and Local look at."""
    boundary = only(at.levels, Boundary)
    held = 0 if boundary is None else at.depth if boundary.layers == "all" else at.merged(teacher_depth)
    if only(at.levels, Local) is not None:
        held = max(held, 2 * at.merged(teacher_depth))
    held += only(at.levels, Logits) is not None
    hidden = step.config.get_text_config().hidden_size
    return held * step.shape.rows * step.shape.length * hidden * getattr(torch, step.teacher.dtype).itemsize


def _loss(step: Step, at: At) -> int:
    """As fused.py holds it: buffers [C, V], the heads in the type of the products, gradients of states and head.

    Buffers as on a CPU: on a GPU a chunk is four times as long, and there are two in the type of the products.
    """
    if only(at.levels, Logits) is None and only(at.levels, Labels) is None:
        return 0
    text, low = step.config.get_text_config(), step.shape.autocast
    tokens = step.shape.rows * step.shape.length
    buffers = 4 if only(at.levels, Logits) is not None and not step.cached else 2
    product = 0 if low is None else low.itemsize
    chunk = min(CHUNK, tokens) * text.vocab_size * (buffers * FLOAT + product)
    head = _head(step.config)
    cast = 0 if low is None or getattr(torch, step.student.dtype) == low else head * low.itemsize
    return chunk + cast + tokens * text.hidden_size * FLOAT + head * FLOAT * (at.train == "all")
