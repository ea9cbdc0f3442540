"""Weight norms and update ratios against a dense computation in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import Shard, distribute_tensor

from gradwatch.measures.weights import COPY_BYTES, Weight, WeightRounds

Truth = dict[int, tuple[float, float]]


def dense(before: Tensor, after: Tensor) -> tuple[float, float]:
    wide = torch.complex128 if before.is_complex() else torch.float64
    old, new = before.to(wide), after.to(wide)
    norm = old.abs().square().sum().sqrt().item()
    return norm, (new - old).abs().square().sum().sqrt().item() / norm if norm else math.nan


def one_round(
    parameters: Sequence[Tensor], step: Callable[[], Any]
) -> tuple[dict[int, Weight], list[dict[int, tuple[float, float]]], int]:
    """All weights of a round, the truth at each of its steps, and the number of steps it took."""
    rounds = WeightRounds()
    rounds.begin_round(parameters)
    found: dict[int, Weight] = {}
    steps = 0
    truths: list[Truth] = []
    while rounds.active:
        before = [parameter.detach().clone() for parameter in parameters]
        rounds.before_step(parameters)
        step()
        reading = rounds.after_step()
        assert reading is not None
        truth = {i: dense(b, p.detach()) for i, (b, p) in enumerate(zip(before, parameters, strict=True))}
        truths.append({index: truth[index] for index in reading.indices})
        found |= {weight.parameter: weight for weight in reading.weights(reading.vector.tolist())}
        steps += 1
    return found, truths, steps


def trained(model: nn.Module, optimizer: torch.optim.Optimizer, features: int) -> Callable[[], None]:
    dtype = next(model.parameters()).dtype

    def step() -> None:
        optimizer.zero_grad()
        x = torch.randn(8, features, dtype=dtype)
        model(x).abs().square().mean().backward()
        optimizer.step()

    return step


def check(found: dict[int, Weight], truths: list[Truth], rel: float = 1e-5) -> None:
    truth = {index: value for step in truths for index, value in step.items()}
    assert found.keys() == truth.keys()
    for index, (norm, ratio) in truth.items():
        assert found[index].norm == pytest.approx(norm, rel=rel)
        assert found[index].ratio == pytest.approx(ratio, rel=rel)


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01),
    "foreach": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, foreach=True),
    "fused": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, fused=True),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_optimizer_s_update_is_what_the_parameters_moved(kind: str, dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 3)).to(dtype)
    optimizer = OPTIMIZERS[kind](model.parameters())
    found, truths, steps = one_round(tuple(model.parameters()), trained(model, optimizer, 6))
    assert steps == 1
    zero = {i for i, (norm, _) in truths[0].items() if norm == 0}  # the layer norm's bias starts at zero
    assert zero == {3}
    assert found.pop(3) == Weight(3, 0.0, None)
    check(found, [{index: truth for index, truth in truths[0].items() if index not in zero}])


def test_several_groups_of_several_types_take_a_step_each() -> None:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4).double()
    optimizer = torch.optim.SGD(
        [{"params": first.parameters(), "lr": 0.1}, {"params": second.parameters(), "lr": 0.001}]
    )

    def step() -> None:
        optimizer.zero_grad()
        x = torch.randn(8, 4)
        (first(x).square().mean() + second(x.double()).square().mean()).backward()
        optimizer.step()

    found, truths, steps = one_round([*first.parameters(), *second.parameters()], step)
    assert steps == 2
    check(found, truths)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_computed_in_float32(dtype: torch.dtype) -> None:
    parameter = nn.Parameter(torch.full((300, 300), 200.0, dtype=dtype))  # its norm is past fp16's largest

    def step() -> None:
        parameter.grad = torch.ones_like(parameter)
        with torch.no_grad():
            parameter.sub_(torch.rand(300, 300, dtype=dtype) * 4)

    found, truths, _ = one_round([parameter], step)
    assert found[0].norm == pytest.approx(60_000)
    check(found, truths)


def test_complex_parameters_have_the_norm_of_their_moduli() -> None:
    parameter = nn.Parameter(torch.randn(5, 3, dtype=torch.complex64))
    optimizer = torch.optim.SGD([parameter], lr=0.1)

    def step() -> None:
        optimizer.zero_grad()
        parameter.abs().square().sum().backward()
        optimizer.step()

    found, truths, _ = one_round([parameter], step)
    check(found, truths)


def test_a_frozen_parameter_has_a_norm_and_no_ratio() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    model[0].requires_grad_(False)
    unused = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([*model.parameters(), unused], lr=0.1)
    found, truths, _ = one_round([*model.parameters(), unused], trained(model, optimizer, 4))
    assert [found[i].ratio is None for i in range(5)] == [True, True, False, False, True]
    assert found[4].norm == pytest.approx(math.sqrt(3))
    check({2: found[2], 3: found[3]}, [{2: truths[0][2], 3: truths[0][3]}])


def test_a_closure_s_update_is_seen_though_its_gradients_come_late() -> None:
    model = nn.Linear(4, 1)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
    x = torch.randn(8, 4)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    found, truths, _ = one_round(tuple(model.parameters()), lambda: optimizer.step(closure))  # type: ignore[arg-type]
    check(found, truths)


@pytest.mark.parametrize("shape", [(1000, 1000), (1, 1_000_000), (3, 5, 100_000), (250_000, 4)])
def test_a_large_tensor_takes_part_with_what_fits_and_has_the_norm_of_the_whole(
    shape: tuple[int, ...],
) -> None:
    parameter = nn.Parameter(torch.randn(shape))
    if len(shape) == 2:
        parameter = nn.Parameter(torch.randn(*reversed(shape)).t())  # a layout that no flat view has
    before = parameter.detach().clone()
    parameter.grad = torch.ones_like(parameter)
    rounds = WeightRounds()
    rounds.begin_round([parameter])
    rounds.before_step([parameter])
    with torch.no_grad():
        parameter.mul_(1.25)  # the same ratio whatever part is looked at
    reading = rounds.after_step()
    assert reading is not None
    (weight,) = reading.weights(reading.vector.tolist())
    # torch's own float32 norm of a million elements on the CPU is right to four digits or so.
    assert weight.norm == pytest.approx(before.double().norm().item(), rel=1e-4)
    assert weight.ratio == pytest.approx(0.25, rel=1e-4)


def test_a_round_copies_every_parameter_once_and_never_more_than_its_share() -> None:
    generator = torch.Generator().manual_seed(1)
    sizes = torch.randint(1, 300_000, (40,), generator=generator).tolist()
    parameters = [nn.Parameter(torch.ones(size)) for size in sizes]
    rounds = WeightRounds()
    rounds.begin_round(parameters)
    seen: list[int] = []
    while rounds.active:
        rounds.before_step(parameters)
        copied = rounds._copied
        assert copied is not None
        assert sum(copy.numel() * copy.element_size() for copy in copied.copies) <= COPY_BYTES
        reading = rounds.after_step()
        assert reading is not None
        seen += reading.indices
    assert sorted(seen) == list(range(40))


def test_what_cannot_be_read_is_left_out_and_what_is_taken_away_in_between_is_forgotten() -> None:
    sparse = torch.eye(3).to_sparse().requires_grad_()
    parameters: list[Tensor] = [
        nn.Parameter(torch.ones(2)),
        nn.Parameter(torch.empty(0)),
        sparse,
        torch.ones(2, dtype=torch.int64),
        nn.Parameter(torch.ones(300_000)),
    ]
    rounds = WeightRounds()
    rounds.begin_round(parameters)
    rounds.before_step(parameters)
    reading = rounds.after_step()
    assert reading is not None
    assert reading.indices == (0,)
    rounds.before_step(parameters[:2])
    assert rounds.after_step() is None
    assert not rounds.active


def test_sharded_parameters_are_left_out(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = dist.init_device_mesh("cpu", (1,))
        sharded = nn.Parameter(distribute_tensor(torch.ones(4, 2), mesh, [Shard(0)]))
        rounds = WeightRounds()
        rounds.begin_round([sharded, nn.Parameter(torch.ones(2))])
        rounds.before_step([sharded, nn.Parameter(torch.ones(2))])
        reading = rounds.after_step()
    finally:
        dist.destroy_process_group()
    assert reading is not None
    assert reading.indices == (1,)
