"""FSDP2: every process holds a shard of student and teacher, and layers merge all the same.

    shard(model, mesh)          layer by layer, then what is left: embeddings, final norm, head
    with whole(student):        full tensors for planners, operators and refits; what they change goes into the shards

Teacher and student are sharded each for itself, so unfrozen or not, nothing is shared between them: both are there
once, cut into as many parts as there are processes. A layer's parameters are gathered when it is called and let go
behind it. Those outside the layers stay gathered from the model's call to the end of the backward pass, because the
loss reads the head's weights themselves; of the teacher, which has no backward pass, they stay gathered for good.

For the length of a merge every process holds the student whole, the teacher only layer by layer. Merged values are
computed on every process, agree bit for bit (a refit's are those of rank 0), and each keeps its part: the sharded
Parameters are the same objects afterwards, as optimizer and FSDP hold on to them.
"""

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MethodType

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from lcprune.merging.architectures import layout_of
from lcprune.merging.calibration import evaluating, hidden_states
from lcprune.merging.surgery import Outcome


def shard(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """Cuts a model's parameters along their first dimension, in place; each process keeps one part.

    Args:
        model: On the CPU or on the mesh's device.
        mesh: Of one dimension.
    """
    for layer in layout_of(model.config).layers_of(model):
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    _call_by_the_root(model)


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` has been there."""
    return isinstance(model, FSDPModule)


def _call_by_the_root(model: PreTrainedModel) -> None:
    """FSDP gathers what belongs to a module when it is called, and here only the decoder below the root is."""
    decoder = model.get_decoder()

    def decode(self: PreTrainedModel, **inputs: object) -> object:
        return decoder(**inputs)

    vars(model)["decode"] = MethodType(decode, model)
    register_fsdp_forward_method(model, "decode")
    vars(model)["get_decoder"] = lambda: vars(model)["decode"]


@dataclass(frozen=True)
class Shards:
    """Which Parameters of a model stand for which while it is whole."""

    held: dict[int, nn.Parameter] = field(default_factory=dict)
    """Identity of a full Parameter -> the one that the optimizer holds; empty where nothing is sharded."""

    def of(self, outcome: Outcome) -> Outcome:
        """The same outcome in the Parameters that the optimizer holds."""
        merged, removed = (
            tuple(self.held.get(id(parameter), parameter) for parameter in parameters)
            for parameters in (outcome.merged, outcome.removed)
        )
        return Outcome(merged, removed)


_Place = tuple[nn.Module, str]
"""A Parameter by its module and its name there: layers change their numbers when others leave."""


@contextmanager
def whole(student: PreTrainedModel) -> Iterator[Shards]:
    """The student with full tensors for the length of the block, on every process; what has changed is kept.

    All processes have to enter it. Layers that leave the model meanwhile are let go of by FSDP too. Of a model that
    is not sharded nothing is done.
    """
    if not isinstance(student, FSDPModule):
        yield Shards()
        return
    parts = [module for module in student.modules() if isinstance(module, FSDPModule)]
    _begin(student, parts)
    shards = _places(student)
    student.set_reshard_after_forward(False)
    for part in parts:
        part.unshard()
    full = _places(student)
    before = {place: parameter.data for place, parameter in full.items()}
    try:
        yield Shards({id(parameter): shards[place] for place, parameter in full.items()})
    finally:
        alive = set(student.modules())
        for place, parameter in full.items():
            now, parameter.data = parameter.data, before[place]  # FSDP gathers into the storage that it knows
            if place[0] in alive and now.data_ptr() != before[place].data_ptr():
                _write(shards[place], now)
        _end(student, parts, [part for part in parts if part not in alive])


def _places(model: nn.Module) -> dict[_Place, nn.Parameter]:
    return {
        (module, name): parameter
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
    }


@torch.no_grad()
def _write(parameter: nn.Parameter, full: Tensor) -> None:
    """Puts this process's part of a full tensor into a sharded Parameter."""
    sharded = parameter.data
    assert isinstance(sharded, DTensor)
    # Every process has the same tensor: nothing need be sent.
    part = distribute_tensor(full, sharded.device_mesh, sharded.placements, src_data_rank=None)
    sharded.to_local().copy_(part.to_local())


def _begin(student: PreTrainedModel, parts: Sequence[FSDPModule]) -> None:
    """Everything in shards: FSDP sets itself up in the first call, and the last one may have left the root whole."""
    with evaluating(student):
        hidden_states(student, {"input_ids": torch.zeros(1, 1, dtype=torch.long)})
    for part in parts:
        part.reshard()


def _end(student: PreTrainedModel, parts: Sequence[FSDPModule], gone: Sequence[FSDPModule]) -> None:
    """Everything in shards again, without the parts that are gone."""
    for part in parts:
        part.reshard()
        if part is not student:
            part.set_reshard_after_forward(True, recurse=False)
    _forget(student, gone)


def _forget(student: nn.Module, gone: Sequence[FSDPModule]) -> None:
    """Takes layers out of FSDP's own lists, which would keep their memory; no public function does that."""
    assert isinstance(student, FSDPModule)
    states = {id(part._get_fsdp_state()) for part in gone}
    root = student._get_fsdp_state()
    everyone = root._state_ctx.all_states
    everyone[:] = [state for state in everyone if id(state) not in states]
    for state in everyone:
        for ahead in (state._states_to_forward_prefetch, state._states_to_backward_prefetch):
            ahead[:] = [other for other in ahead if id(other) not in states]
    root._comm_ctx.post_forward_order.clear()  # of passes that are over; one without a backward pass leaves it full


def let_go(student: nn.Module) -> None:
    """Frees the layers that have left a sharded model; without it they wait for Python's collector of circles.

    FSDP's records of a layer refer to each other, and what they hold is found only once they are gone.
    """
    if is_sharded(student):
        gc.collect()
        gc.collect()


def full_state(student: PreTrainedModel) -> dict[str, Tensor]:
    """All weights, whole and on the CPU, on rank 0; nothing elsewhere. All processes have to call it."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    state = get_model_state_dict(student, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    return {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}
