"""A recurrent network that foretells the next pixel in the lines of a photograph."""

from __future__ import annotations

from typing import Final

from torch import Tensor, nn
from torch.nn import functional

from gym.data import scan_lines
from gym.training import Recipe, Training, supervised

NAME: Final = "lstm"
STEPS: Final = 600
_LENGTH: Final = 24


class Recurrent(nn.Module):
    """Sequences ``[batch, length, 1]`` to the numbers that follow each of theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lstm, self.head = nn.Linear(1, 16), nn.LSTM(16, 48, batch_first=True), nn.Linear(48, 1)

    def forward(self, line: Tensor) -> Tensor:
        """Return what follows."""
        following: Tensor = self.head(self.lstm(self.embed(line))[0])
        return following


def build(recipe: Recipe) -> Training:
    """See `gym.training.Family`."""
    return supervised(
        recipe,
        Recurrent(),
        scan_lines(recipe.variant, _LENGTH),
        functional.mse_loss,
        learning_rate=3e-3,
        batch=64,
        clip=1.0,
    )
