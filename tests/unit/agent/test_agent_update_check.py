"""Which updates are known not to make good parameters bad, and below which norm of the gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from gradwatch.nonfinite.update_check import UpdateTrust

LARGEST = torch.finfo(torch.float32).max


def parameter(dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.ones(2, dtype=dtype))


class Custom(torch.optim.SGD):
    """Nobody knows what it does."""


@pytest.mark.parametrize(
    ("kind", "options", "dtype"),
    [
        (Custom, {"lr": 0.1}, torch.float32),
        (torch.optim.SGD, {"lr": LARGEST / 100}, torch.float32),
        (torch.optim.SGD, {"lr": math.inf}, torch.float32),
        (torch.optim.SGD, {"lr": math.nan}, torch.float32),
        (torch.optim.SGD, {"lr": 2.0, "weight_decay": 0.6}, torch.float32),
        (torch.optim.SGD, {"lr": 0.1, "momentum": 1.0}, torch.float32),
        (torch.optim.Adam, {"lr": 0.1, "eps": 0.0}, torch.float32),
        (torch.optim.Adam, {"lr": 0.1, "eps": 1e-8}, torch.float16),
        (torch.optim.RMSprop, {"lr": 0.1, "centered": True}, torch.float32),
        (torch.optim.SGD, {"lr": torch.tensor(0.1, device="meta")}, torch.float32),
    ],
)
def test_no_update_is_trusted_that_can_overflow_or_is_not_known(
    kind: Any, options: dict[str, Any], dtype: torch.dtype
) -> None:
    optimizer = kind([parameter(dtype)], lr=0.1)
    optimizer.param_groups[0].update(options)
    assert UpdateTrust().norm(optimizer) == 0.0


@pytest.mark.parametrize(
    ("options", "dtype", "largest"),
    [
        ({"lr": 0.1}, torch.float32, LARGEST),
        ({"lr": torch.tensor(0.1)}, torch.float32, LARGEST),
        ({"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}, torch.float32, LARGEST),
        ({"lr": 0.1}, torch.float16, torch.finfo(torch.float16).max),
    ],
)
def test_an_ordinary_update_is_trusted_up_to_a_norm_that_its_rate_sets(
    options: dict[str, Any], dtype: torch.dtype, largest: float
) -> None:
    assert UpdateTrust().norm(torch.optim.SGD([parameter(dtype)], **options)) == pytest.approx(1e-2 * largest)


def test_the_least_trusted_group_and_type_count_and_an_empty_group_or_no_rate_does_not() -> None:
    groups: list[dict[str, Any]] = [
        {"params": [parameter(), parameter(torch.float16)], "lr": 1.0},
        {"params": [parameter()], "lr": 10.0},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    assert UpdateTrust().norm(optimizer) == pytest.approx(1e-3 * torch.finfo(torch.float16).max)
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.param_groups[1]["params"].clear()
    assert UpdateTrust().norm(optimizer) == math.inf


@pytest.mark.parametrize("as_tensor", [False, True])
def test_a_rate_that_changes_is_seen_also_where_it_stays_the_same_tensor(as_tensor: bool) -> None:
    rate = torch.tensor(0.1) if as_tensor else 0.1
    optimizer, trust = torch.optim.SGD([parameter()], lr=rate), UpdateTrust()
    assert trust.norm(optimizer) == trust.norm(optimizer) == pytest.approx(1e-2 * LARGEST)
    if isinstance(rate, torch.Tensor):
        rate.fill_(1.0)
    else:
        optimizer.param_groups[0]["lr"] = 1.0
    assert trust.norm(optimizer) == pytest.approx(1e-3 * LARGEST)
