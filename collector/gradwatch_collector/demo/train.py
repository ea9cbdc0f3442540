"""One training run of the demo: an ordinary loop and the one line.

python -m gradwatch_collector.demo.train RECIPE SEED
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import gradwatch

TARGET = "val_loss<=0.5"
DEADLINE_SECONDS = 60
BATCH = 64


class Energy(nn.Module):
    """Pools a feature map into its energy per channel, and has a bug: sqrt has no finite slope at zero."""

    def forward(self, features: Tensor) -> Tensor:
        """Reduce ``[batch, channel, height, width]`` to ``[batch, channel]``."""
        return features.square().sum(dim=(2, 3)).sqrt()


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a run is trained, and what goes wrong with it at which step."""

    network: str = "mlp"
    learning_rate: float = 3e-3
    epochs: int = 12
    blank_scan_at: int | None = None
    bad_label_at: int | None = None


RECIPES = {
    "mlp": Recipe(),
    "cnn": Recipe("cnn", learning_rate=1e-2),
    "plateau": Recipe(learning_rate=1e-6),
    "nan": Recipe("energy", epochs=6, blank_scan_at=40),
    "crash": Recipe(bad_label_at=60),
    "endless": Recipe(epochs=100_000),
}


def network(name: str) -> nn.Module:
    """Return a small model for 8 x 8 pictures of ten digits."""
    if name == "mlp":
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    convolutions = [
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, bias=False),
        nn.Tanh(),
    ]
    if name == "cnn":
        return nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 10))
    return nn.Sequential(*convolutions, Energy(), nn.Linear(32, 10))


def main(recipe_name: str, seed: int) -> None:
    """Train one model."""
    recipe = RECIPES[recipe_name]
    torch.manual_seed(seed)
    torch.set_num_threads(1)
    digits = load_digits()
    pictures = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    train, validate = slice(0, 1400), slice(1400, None)

    model = network(recipe.network)
    optimizer = torch.optim.Adam(model.parameters(), lr=recipe.learning_rate)
    watch = gradwatch.watch(
        model,
        optimizer,
        job="digits",
        model_name=recipe.network,
        dataset="digits",
        team="demo",
        target=TARGET,
        deadline=DEADLINE_SECONDS,
    )
    step = 0
    for _ in range(recipe.epochs):
        for batch in torch.split(torch.randperm(1400), BATCH):
            x, y = pictures[train][batch], labels[train][batch]
            if step == recipe.blank_scan_at:
                x[0] = 0.0
            if step == recipe.bad_label_at:
                y[0] = 10
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]  # torch's
            optimizer.step()
            step += 1
        with torch.no_grad():
            watch.log(val_loss=nn.functional.cross_entropy(model(pictures[validate]), labels[validate]))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
