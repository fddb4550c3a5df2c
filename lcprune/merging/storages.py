"""Whether a model's weights are the ones that were measured: what is known of a model holds no longer than they do."""

import weakref

from torch import nn


class Storages:
    """Where a model's weights lay and how often each was written to; keeps none of them alive."""

    def __init__(self, model: nn.Module) -> None:
        """Looks at every Parameter, at no weight.

        Args:
            model: As it stands.
        """
        # A storage that is freed takes its reference along: another at the same address is not taken for it.
        self._seen = [(weakref.ref(each.untyped_storage()), each._version) for each in model.parameters()]

    def are_those_of(self, model: nn.Module) -> bool:
        """Whether the model still holds all of them, in order and unwritten.

        What writes through `.data` in place goes unnoticed, as it does with autograd.
        """
        now = [(each.untyped_storage(), each._version) for each in model.parameters()]
        return len(now) == len(self._seen) and all(
            storage() is held and version == written
            for (storage, version), (held, written) in zip(self._seen, now, strict=True)
        )
