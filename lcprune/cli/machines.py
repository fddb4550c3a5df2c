"""Recipes on another machine than the one they are meant for: their objects, where nothing is trained."""

import torch
from lightning.pytorch import Trainer

from lcprune.cli.training import RecipeCLI


class OneDevice(RecipeCLI):
    """For commands that work on one device, of the recipe's kind, however many it trains on."""

    def __init__(self, arguments: list[str]) -> None:
        super().__init__(arguments, run=False)

    def instantiate_trainer(self, **kwargs: object) -> Trainer:
        """A trainer of a single device."""
        return super().instantiate_trainer(**{"devices": 1, "num_nodes": 1, "strategy": "auto"} | kwargs)


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
