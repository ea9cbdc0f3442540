"""An actor that learns to balance a pole on a cart from a critic that learns how long it will stand."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import torch
from torch import Tensor, nn

from gym.data import REPORT, TUNING, Batch
from gym.training import Recipe, Training, Turn

NAME: Final = "actor_critic"
STEPS: Final = 400
_CARTS: Final = 64
_HORIZON: Final = 16
_DISCOUNT: Final = 0.97
# Half the pole's length in metres: another pole is another task.
_POLES: Final = {TUNING: 0.5, REPORT: 0.8}


class Carts:
    """Many carts, each with a pole that stands on it: Barto, Sutton and Anderson's problem (1983).

    Attributes:
        state: Place, speed, angle and its speed of each cart, ``[carts, 4]``.
    """

    def __init__(self, carts: int, half_pole: float) -> None:
        self._half_pole = half_pole
        self.state = self._upright(carts)

    @staticmethod
    def _upright(carts: int) -> Tensor:
        return torch.rand(carts, 4) * 0.1 - 0.05

    def push(self, to_the_right: Tensor) -> Tensor:
        """Push each cart for a fiftieth of a second; return which poles fell. They are put up again."""
        _, speed, angle, turning = self.state.unbind(1)
        force = torch.where(to_the_right, 10.0, -10.0)
        sine, cosine = angle.sin(), angle.cos()
        thrust = (force + 0.1 * self._half_pole * turning.square() * sine) / 1.1
        falling = (9.8 * sine - cosine * thrust) / (self._half_pole * (4 / 3 - 0.1 * cosine.square() / 1.1))
        gaining = thrust - 0.1 * self._half_pole * falling * cosine / 1.1
        self.state = self.state + 0.02 * torch.stack([speed, gaining, turning, falling], dim=1)
        fell = (self.state[:, 0].abs() > 2.4) | (self.state[:, 2].abs() > 0.21)
        self.state = torch.where(fell.unsqueeze(1), self._upright(len(fell)), self.state)
        return fell


def _tower(outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, outputs))


class ActorCritic(nn.Module):
    """States ``[n, 4]`` to logits of both pushes ``[n, 2]`` and the states' value ``[n]``."""

    def __init__(self) -> None:
        super().__init__()
        self.actor, self.critic = _tower(2), _tower(1)

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits and values."""
        scaled = states * torch.tensor([1.0, 1.0, 5.0, 1.0])
        return self.actor(scaled), self.critic(scaled).squeeze(-1)


def build(recipe: Recipe) -> Training:
    """See `gym.training.Family`. It logs how long a pole stands, in pushes."""
    model, carts = ActorCritic(), Carts(recipe.batch or _CARTS, _POLES[recipe.variant])
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3 * recipe.learning_rate)
    falls = [0.05]  # a share of all pushes, smoothed; at first about what a coin achieves

    def play() -> Batch:
        states, pushes, fallen = [], [], []
        with torch.no_grad():
            for _ in range(_HORIZON):
                states.append(carts.state)
                logits = model(carts.state)[0]
                pushes.append(torch.multinomial(logits.softmax(dim=1), 1).squeeze(1))
                fallen.append(carts.push(pushes[-1] == 1))
            worth = model(carts.state)[1]
        returns = []
        for fell in reversed(fallen):
            worth = torch.where(fell, 0.0, 1.0 + _DISCOUNT * worth)
            returns.append(worth)
        falls[0] = 0.95 * falls[0] + 0.05 * float(torch.stack(fallen).float().mean())
        return torch.cat(states), torch.cat(pushes), torch.cat(returns[::-1]) * (1 - _DISCOUNT)

    def episodes() -> Iterator[Batch]:
        for _ in range(recipe.steps):
            recipe.fetching()
            yield play()

    def loss(batch: Batch) -> Tensor:
        states, pushes, returns = batch
        logits, values = model(states)
        likely = logits.log_softmax(dim=1)
        gain = returns - values.detach()
        gain = (gain - gain.mean()) / (gain.std() + 1e-6)
        acted = -(likely.gather(1, pushes.unsqueeze(1)).squeeze(1) * gain).mean()
        entropy = -(likely.exp() * likely).sum(dim=1).mean()
        total: Tensor = acted - 0.01 * entropy + (values - returns).square().mean()
        return total

    def standing() -> dict[str, float]:
        return {"mean_return": 1 / max(falls[0], 1e-3)}

    return Training({"": model}, [Turn(model, optimizer, loss)], episodes(), standing, clip=0.5)
