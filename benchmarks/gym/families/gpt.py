"""A small transformer that learns which character follows."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from gym.data import text
from gym.training import Recipe, Training, supervised

NAME: Final = "gpt"
STEPS: Final = 400
_LENGTH: Final = 48
_WIDTH: Final = 64
_HEADS: Final = 4


class _Block(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.before_mixing, self.before_thinking = nn.LayerNorm(_WIDTH), nn.LayerNorm(_WIDTH)
        self.qkv, self.mixed = nn.Linear(_WIDTH, 3 * _WIDTH), nn.Linear(_WIDTH, _WIDTH)
        self.widen, self.narrow = nn.Linear(_WIDTH, 4 * _WIDTH), nn.Linear(4 * _WIDTH, _WIDTH)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(self.before_mixing(x)).unflatten(-1, (3, _HEADS, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = heads
        seen = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.drop(self.mixed(seen.transpose(1, 2).flatten(2)))
        thought: Tensor = self.narrow(functional.gelu(self.widen(self.before_thinking(x))))
        thought = self.drop(thought)
        return x + thought


class Gpt(nn.Module):
    """Characters ``[batch, length]`` to logits of those that follow ``[batch, length, alphabet]``."""

    def __init__(self, alphabet: int, dropout: float) -> None:
        super().__init__()
        self.character, self.place = nn.Embedding(alphabet, _WIDTH), nn.Embedding(_LENGTH, _WIDTH)
        self.blocks = nn.Sequential(_Block(dropout), _Block(dropout))
        self.norm, self.head = nn.LayerNorm(_WIDTH), nn.Linear(_WIDTH, alphabet)

    def forward(self, codes: Tensor) -> Tensor:
        """Return logits."""
        x = self.character(codes) + self.place(torch.arange(codes.shape[1]))
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits


def _loss(logits: Tensor, following: Tensor) -> Tensor:
    return functional.cross_entropy(logits.flatten(0, 1), following.flatten())


def build(recipe: Recipe) -> Training:
    """See `gym.training.Family`."""
    train, validate, alphabet = text(recipe.variant, _LENGTH)
    model = Gpt(alphabet, dropout=0.1 if recipe.decay else 0.0)
    return supervised(recipe, model, (train, validate), _loss, learning_rate=2e-3, batch=16, clip=1.0)
