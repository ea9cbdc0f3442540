"""Real data from scikit-learn, in two variants that have nothing in common: to tune on, and to report on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.resources import files
from typing import Final

import torch
from sklearn.datasets import load_digits, load_sample_image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

TUNING: Final = "tuning"
REPORT: Final = "report"

# Digits are stored in the order in which people wrote them: other rows are other hands.
_DIGITS: Final = {TUNING: slice(0, 900), REPORT: slice(900, None)}
_PICTURES: Final = {TUNING: "china.jpg", REPORT: "flower.jpg"}
_TEXTS: Final = {
    TUNING: ("digits", "breast_cancer", "wine_data", "iris", "lfw"),
    REPORT: ("twenty_newsgroups", "diabetes", "kddcup99"),
}

Batch = tuple[Tensor, ...]


def digits(variant: str) -> tuple[Batch, Batch]:
    """Pictures ``[n, 1, 8, 8]`` in 0 to 1 and labels ``[n]``, to train and to validate."""
    rows = load_digits()
    pictures = torch.tensor(rows.images[_DIGITS[variant]], dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(rows.target[_DIGITS[variant]])
    return (pictures[:-200], labels[:-200]), (pictures[-200:], labels[-200:])


def scan_lines(variant: str, length: int) -> tuple[Batch, Batch]:
    """Stretches of a photograph's lines ``[n, length, 1]``, and the pixel that follows each of theirs."""
    grey = torch.tensor(load_sample_image(_PICTURES[variant]), dtype=torch.float32).mean(dim=2)
    grey = (grey - grey.mean()) / grey.std()
    stretches = grey.unfold(1, length + 1, length).reshape(-1, length + 1, 1)
    inputs, targets = stretches[:, :-1], stretches[:, 1:]
    return (inputs[:-500], targets[:-500]), (inputs[-500:], targets[-500:])


def text(variant: str, length: int) -> tuple[Batch, Batch, int]:
    """Windows of characters ``[n, length]`` and the characters that follow; and how many characters there are.

    The last tenth of the text validates.
    """
    folder = files("sklearn.datasets") / "descr"
    read = "".join((folder / f"{name}.rst").read_text(encoding="utf-8") for name in _TEXTS[variant])
    alphabet = sorted(set(read))
    codes = torch.tensor([alphabet.index(character) for character in read])
    windows = codes.unfold(0, length + 1, 1)
    border = len(windows) * 9 // 10
    train, validate = windows[: border - length], windows[border::length]
    return (train[:, :-1], train[:, 1:]), (validate[:, :-1], validate[:, 1:]), len(alphabet)


class _Samples(Dataset[Batch]):
    def __init__(self, tensors: Batch, fetching: Callable[[], None]) -> None:
        self._tensors = tensors
        self._fetching = fetching

    def __getitem__(self, rows: Tensor) -> Batch:
        self._fetching()
        return tuple(tensor[rows] for tensor in self._tensors)


class _Draws(Sampler[Tensor]):
    """Rows of as many batches as asked for, each epoch in an order of its own."""

    def __init__(self, rows: int, size: int, batches: int) -> None:
        self._rows, self._size, self._batches = rows, min(size, rows), batches

    def __iter__(self) -> Iterator[Tensor]:
        left = self._batches
        while left:
            whole = torch.split(torch.randperm(self._rows), self._size)
            for rows in whole[: min(left, self._rows // self._size)]:
                yield rows
                left -= 1


def loader(tensors: Batch, size: int, batches: int, fetching: Callable[[], None]) -> DataLoader[Batch]:
    """Batches through torch's own loader; ``fetching`` is called where each is read."""
    draws = _Draws(len(tensors[0]), size, batches)
    return DataLoader(_Samples(tensors, fetching), sampler=draws, batch_size=None)
