"""The five training loops that are measured, from a 1 ms step of small tensors to one that moves 43 MB."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(slots=True)
class Workload:
    """A model, its optimizer and one fixed batch.

    Attributes:
        name: What the report calls it.
        loss: Computes the loss of the batch.
        clip: Called between the backward pass and the update, and timed, when there is one.
        clip_seconds: How long each call of ``clip`` took.
    """

    name: str
    device: torch.device
    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss: Callable[[], Tensor]
    clip: Callable[[], object] | None = None
    clip_seconds: list[float] = field(default_factory=list)

    def step(self) -> None:
        """One step as people write it."""
        self.optimizer.zero_grad()
        self.loss().backward()  # type: ignore[no-untyped-call] # torch
        if self.clip is not None:
            start = time.perf_counter()
            self.clip()
            self.clip_seconds.append(time.perf_counter() - start)
        self.optimizer.step()

    def synchronize(self) -> None:
        """Wait for the device; nothing to wait for on the CPU."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @property
    def tensors(self) -> int:
        """Number of parameter tensors."""
        return len(list(self.model.parameters()))

    @property
    def parameters(self) -> int:
        """Number of scalar parameters."""
        return sum(parameter.numel() for parameter in self.model.parameters())


class TransformerBlock(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Attend, then transform: shape [batch, time, width] to the same."""
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, width))
        widened: Tensor = self.down(functional.gelu(self.up(self.norm2(x))))
        return x + widened


class Gpt(nn.Module):
    """A small GPT."""

    def __init__(self, vocabulary: int, width: int, layers: int, heads: int, length: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        """Next-token logits: shape [batch, time] to [batch, time, vocabulary]."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        logits: Tensor = self.head(self.norm(self.blocks(self.tokens(tokens) + self.places(places))))
        return logits


class Residual(nn.Module):
    """Two convolutions with batch norm and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.shortcut = nn.Identity() if stride == 1 else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Shape [batch, inputs, height, width] to [batch, outputs, height / stride, width / stride]."""
        inner = self.norm2(self.conv2(functional.relu(self.norm1(self.conv1(x)))))
        return functional.relu(inner + self.shortcut(x))


class Lstm(nn.Module):
    """A two-layer LSTM language model."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.cells = nn.LSTM(width, width, num_layers=2, batch_first=True)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        """Next-token logits: shape [batch, time] to [batch, time, vocabulary]."""
        logits: Tensor = self.head(self.cells(self.tokens(tokens))[0])
        return logits


def _language(
    name: str, model: nn.Module, device: torch.device, vocabulary: int, shape: tuple[int, int]
) -> Workload:
    model = model.to(device)
    text = torch.randint(vocabulary, (shape[0], shape[1] + 1), device=device)
    tokens, targets = text[:, :-1], text[:, 1:].flatten()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    return Workload(
        name, device, model, optimizer, lambda: functional.cross_entropy(model(tokens).flatten(0, 1), targets)
    )


def _classifier(name: str, model: nn.Module, device: torch.device, inputs: Tensor) -> Workload:
    model, inputs = model.to(device), inputs.to(device)
    labels = torch.randint(10, (len(inputs),), device=device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    return Workload(name, device, model, optimizer, lambda: functional.cross_entropy(model(inputs), labels))


def mlp(device: torch.device) -> Workload:
    """34 k parameters in 18 tensors, about 1 ms a step: the hardest case for a fixed cost."""
    widths = [64, *[64] * 8, 10]
    layers = [m for a, b in pairwise(widths) for m in (nn.Linear(a, b), nn.ReLU())]
    return _classifier("MLP 34 k", nn.Sequential(*layers[:-1]), device, torch.randn(64, 64))


def gpt(device: torch.device) -> Workload:
    """0.8 M parameters in 54 tensors, on bytes."""
    return _language("GPT 0.8 M", Gpt(256, 128, layers=4, heads=4, length=64), device, 256, (5, 64))


def gpt_large(device: torch.device) -> Workload:
    """10.8 M parameters in 78 tensors: reading 43 MB of gradients is most of the cost."""
    return _language("GPT 10.8 M", Gpt(256, 384, layers=6, heads=6, length=128), device, 256, (2, 128))


def conv(device: torch.device) -> Workload:
    """A ResNet-like net on 32 x 32 images, about 10 ms a step."""
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, 1, 1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        Residual(16, 16, stride=1),
        Residual(16, 16, stride=1),
        Residual(16, 32, stride=2),
        Residual(32, 32, stride=1),
        Residual(32, 64, stride=2),
        Residual(64, 64, stride=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )
    return _classifier("ResNet-like", net, device, torch.randn(4, 3, 32, 32))


def lstm(device: torch.device) -> Workload:
    """Two layers, on bytes, a few ms a step."""
    return _language("LSTM", Lstm(256, 64), device, 256, (8, 16))


MODELS: Final[dict[str, Callable[[torch.device], Workload]]] = {
    "mlp": mlp,
    "gpt": gpt,
    "gpt-large": gpt_large,
    "conv": conv,
    "lstm": lstm,
}


def build(name: str, device: str) -> Workload:
    """Make one of ``MODELS``, the same each time."""
    torch.manual_seed(0)
    return MODELS[name](torch.device(device))
