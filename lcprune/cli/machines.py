"""Recipes on another machine than the one they are meant for: their objects, where nothing is trained."""

import torch
from lightning.pytorch import Trainer

from lcprune.cli.training import RecipeCLI


class OneDevice(RecipeCLI):
    """For commands that work on one device, however many the recipe trains on: `trainer.strategy.root_device`."""

    def __init__(self, arguments: list[str], device: str | None = None) -> None:
        """Parses and makes the objects.

        Args:
            arguments: The recipe's.
            device: cpu, cuda or cuda:1; default: of the recipe's kind where this machine has one, else what it has.
        """
        self._device = device
        super().__init__(arguments, run=False)

    def instantiate_trainer(self, **kwargs: object) -> Trainer:
        """A trainer of a single device."""
        kind, _, number = (self._device or self._usual).partition(":")
        devices = [int(number)] if number else 1
        one = {"accelerator": kind, "devices": devices, "num_nodes": 1, "strategy": "auto"}
        return super().instantiate_trainer(**one | kwargs)

    @property
    def _usual(self) -> str:
        named = str(self._get(self.config_init, "trainer", default={}).get("accelerator"))
        return "auto" if named in ("cuda", "gpu") and not torch.cuda.is_available() else named


class StandIns(RecipeCLI):
    """For reckoning alone: a CPU stands in for every device that the recipe asks for."""

    def __init__(self, arguments: list[str]) -> None:
        super().__init__(arguments, run=False)

    def instantiate_trainer(self, **kwargs: object) -> Trainer:
        """A trainer of as many devices."""
        settings = self._get(self.config_init, "trainer", default={})
        devices = _count(settings.get("devices"), settings.get("accelerator"))
        return super().instantiate_trainer(**{"accelerator": "cpu", "devices": devices} | kwargs)


def _count(devices: object, accelerator: object) -> int:
    """How many devices are meant by 8, "8", [0, 1], "0,1", -1 or "auto"; of the last two as many as there are here."""
    if isinstance(devices, list):
        return len(devices)
    if isinstance(devices, str) and "," in devices:
        return len([number for number in devices.split(",") if number.strip()])
    if str(devices).isdecimal():
        return int(str(devices))
    return 1 if accelerator == "cpu" else max(1, torch.cuda.device_count())
