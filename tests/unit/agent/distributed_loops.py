"""Loops over two ranks. Beside each runs a dense model on all ranks' data, in this process alone: the truth."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from gradwatch.loop.budget import Budget
from tests.unit.agent.ranks import RANKS, Truth, Watch

STEPS = 4
BATCH = 6
GUILTY = (1, 2)  # the rank and the step whose batch is 100 times too large


def network(hidden: int = 5) -> nn.Sequential:
    # 5 and 1 rows over two ranks: one uneven shard, and one that is empty.
    return nn.Sequential(nn.Linear(4, hidden), nn.Tanh(), nn.Linear(hidden, 1))


def norm(tensors: Iterable[Tensor]) -> float:
    return math.sqrt(sum(float(tensor.detach().double().square().sum()) for tensor in tensors))


def norms_of(model: nn.Module) -> dict[str, float]:
    return {name: norm([p.grad]) for name, p in model.named_parameters() if p.grad is not None}


def batches(step: int) -> list[Tensor]:
    """The same on every rank; each takes its own."""
    generator = torch.Generator().manual_seed(step)
    parts = [torch.randn(BATCH, 4, generator=generator) for _ in range(RANKS)]
    if step == GUILTY[1]:
        parts[GUILTY[0]] *= 100.0
    return parts


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    loss: Tensor = (model(batch) - batch.sum(1, keepdim=True)).square().mean()
    return loss


class Dense:
    """The same model on one process, stepped with the mean gradient of all ranks' batches."""

    def __init__(self, model: nn.Module, truth: Truth) -> None:
        self.model = copy.deepcopy(model)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-4)
        self.truth = truth

    def step(self, rank: int, parts: list[list[Tensor]], clip: float | None = None) -> None:
        """``parts``: for each micro-batch the ranks' batches."""
        own = copy.deepcopy(self.model)
        own.zero_grad()
        for batch in parts:
            loss_of(own, batch[rank]).backward()
        self.truth.local.append(norm(p.grad for p in own.parameters() if p.grad is not None))
        self.truth.losses.append(sum(loss_of(self.model, batch[rank]).item() for batch in parts))
        self.optimizer.zero_grad()
        for batch in parts:
            (sum(loss_of(self.model, part) for part in batch) / RANKS).backward()
        self.truth.norms.append(norms_of(self.model))
        if clip is not None:
            clip_grad_norm_(self.model.parameters(), clip)
        self.optimizer.step()


def ddp(rank: int, watch: Watch, truth: Truth) -> Mapping[str, Tensor]:
    model = network()
    dense = Dense(model, truth)
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=1e-4)
    with watch(parallel, optimizer):
        for step in range(STEPS):
            dense.step(rank, [batches(step)])
            optimizer.zero_grad()
            loss_of(parallel, batches(step)[rank]).backward()
            optimizer.step()
    return model.state_dict()


def ddp_accumulating_without_sync(rank: int, watch: Watch, truth: Truth) -> Mapping[str, Tensor]:
    model = network()
    dense = Dense(model, truth)
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=1e-4)
    with watch(parallel, optimizer):
        for step in range(STEPS):
            parts = [batches(10 * step + micro) for micro in range(3)]
            dense.step(rank, parts)
            optimizer.zero_grad()
            with parallel.no_sync():
                for part in parts[:-1]:
                    loss_of(parallel, part[rank]).backward()
            loss_of(parallel, parts[-1][rank]).backward()
            optimizer.step()
    return model.state_dict()


def ddp_scaled(rank: int, watch: Watch, truth: Truth) -> Mapping[str, Tensor]:
    model = network()
    dense = Dense(model, truth)
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=1e-4)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    with watch(parallel, optimizer):
        for step in range(STEPS):
            dense.step(rank, [batches(step)], clip=0.5)
            optimizer.zero_grad()
            scaler.scale(loss_of(parallel, batches(step)[rank])).backward()
            scaler.unscale_(optimizer)
            clip_grad_norm_(parallel.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
    return model.state_dict()


def ddp_reducing_in_place(rank: int, watch: Watch, truth: Truth) -> Mapping[str, Tensor]:
    model = network()
    dense = Dense(model, truth)
    parallel = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=1e-4)
    with watch(parallel, optimizer):
        for step in range(STEPS):
            dense.step(rank, [batches(step)])
            optimizer.zero_grad()
            loss_of(parallel, batches(step)[rank]).backward()
            optimizer.step()
    return model.state_dict()


def ddp_thinned(rank: int, watch: Watch, truth: Truth) -> Mapping[str, Tensor]:
    """The ranks' budgets would choose every third and every fifth step."""
    model = network()
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=1e-4)
    with patch.object(Budget, "interval", lambda _: 3 + 2 * rank), watch(parallel, optimizer):
        for step in range(17):
            optimizer.zero_grad()
            loss_of(parallel, batches(step)[rank]).backward()
            optimizer.step()
    return model.state_dict()


def ddp_beside_a_plain_model(rank: int, watch: Watch, truth: Truth) -> Mapping[str, Tensor]:
    model, plain = network(), network()
    parallel = DistributedDataParallel(model)
    optimizers = [torch.optim.SGD(each.parameters(), lr=1e-4) for each in (parallel, plain)]
    with watch({"parallel": parallel, "plain": plain}, optimizers):
        for step in range(STEPS):
            for each, optimizer in zip((parallel, plain), optimizers, strict=True):
                optimizer.zero_grad()
                loss_of(each, batches(step)[rank]).backward()
                optimizer.step()
    return {**model.state_dict(), **{f"plain.{name}": w for name, w in plain.state_dict().items()}}


def zero_redundancy(rank: int, watch: Watch, truth: Truth) -> Mapping[str, Tensor]:
    from torch.distributed.optim import ZeroRedundancyOptimizer  # warns of its own use of torch.jit

    model = network()
    dense = Dense(model, truth)
    parallel = DistributedDataParallel(model)
    optimizer = ZeroRedundancyOptimizer(parallel.parameters(), torch.optim.SGD, lr=1e-4)
    with watch(parallel, optimizer):
        for step in range(STEPS):
            dense.step(rank, [batches(step)])
            optimizer.zero_grad()
            loss_of(parallel, batches(step)[rank]).backward()
            optimizer.step()
    return model.state_dict()


def _sharded(model: nn.Module, rank: int, watch: Watch, dense: Dense, clip: float | None) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    with watch(model, optimizer):
        for step in range(STEPS):
            dense.step(rank, [batches(step)], clip)
            optimizer.zero_grad()
            loss_of(model, batches(step)[rank]).backward()
            if clip is not None:
                clip_grad_norm_(model.parameters(), clip)
            optimizer.step()


def fsdp(rank: int, watch: Watch, truth: Truth) -> Mapping[str, Tensor]:
    model = network()
    dense = Dense(model, truth)
    mesh = init_device_mesh("cpu", (RANKS,))
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    _sharded(model, rank, watch, dense, clip=None)
    return model.state_dict()


def fsdp_accumulating(rank: int, watch: Watch, truth: Truth) -> Mapping[str, Tensor]:
    model = network()
    dense = Dense(model, truth)
    fully_shard(model, mesh=init_device_mesh("cpu", (RANKS,)))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    with watch(model, optimizer):
        for step in range(STEPS):
            parts = [batches(10 * step + micro) for micro in range(3)]
            dense.step(rank, parts)
            optimizer.zero_grad()
            for part in parts:
                model.set_requires_gradient_sync(part is parts[-1])
                loss_of(model, part[rank]).backward()
            optimizer.step()
    return model.state_dict()


def flattened(rank: int, watch: Watch, truth: Truth) -> Mapping[str, Tensor]:
    """The older FullyShardedDataParallel: plain tensors, each a piece of everything."""
    from torch.distributed.fsdp import FullyShardedDataParallel  # warns of its age

    model = network()
    dense = Dense(model, truth)
    parallel = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    optimizer = torch.optim.SGD(parallel.parameters(), lr=1e-4)
    with watch(parallel, optimizer):
        for step in range(STEPS):
            dense.step(rank, [batches(step)])
            optimizer.zero_grad()
            loss_of(parallel, batches(step)[rank]).backward()
            optimizer.step()
    with FullyShardedDataParallel.summon_full_params(parallel):
        return {name: p.detach().clone() for name, p in parallel.named_parameters()}


def fsdp_clipped(rank: int, watch: Watch, truth: Truth) -> Mapping[str, Tensor]:
    model = network()
    dense = Dense(model, truth)
    fully_shard(model, mesh=init_device_mesh("cpu", (RANKS,)))
    _sharded(model, rank, watch, dense, clip=0.1)
    return model.state_dict()


def hybrid_sharded(rank: int, watch: Watch, truth: Truth) -> Mapping[str, Tensor]:
    """Replicated over two ranks and sharded over one: both hold everything."""
    model = network()
    dense = Dense(model, truth)
    fully_shard(model, mesh=init_device_mesh("cpu", (RANKS, 1), mesh_dim_names=("replicate", "shard")))
    _sharded(model, rank, watch, dense, clip=None)
    return model.state_dict()


def mixed(rank: int, watch: Watch, truth: Truth) -> Mapping[str, Tensor]:
    """The last bias is left out of the sharding, and averaged by hand."""
    model = network()
    dense = Dense(model, truth)
    plain = model[2].bias
    fully_shard(model, mesh=init_device_mesh("cpu", (RANKS,)), ignored_params={plain})
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    with watch(model, optimizer):
        for step in range(STEPS):
            dense.step(rank, [batches(step)])
            optimizer.zero_grad()
            loss_of(model, batches(step)[rank]).backward()
            dist.all_reduce(plain.grad)
            plain.grad /= RANKS
            optimizer.step()
    return model.state_dict()


def _tensor_parallel(model: nn.Module, watch: Watch, truth: Truth, plan: dict[str, Any]) -> None:
    """All ranks see the same batch."""
    dense = Dense(model, truth)
    parallelize_module(model, init_device_mesh("cpu", (RANKS,)), plan)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    with watch(model, optimizer):
        for step in range(STEPS):
            batch = batches(step)[0]
            dense.step(0, [[batch] * RANKS])
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            optimizer.step()


def tensor_parallel(rank: int, watch: Watch, truth: Truth) -> Mapping[str, Tensor]:
    model = network(hidden=6)
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    _tensor_parallel(model, watch, truth, plan)
    return model.state_dict()


def sequence_parallel(rank: int, watch: Watch, truth: Truth) -> Mapping[str, Tensor]:
    """The norm's gradients are sums that no rank has made when the optimizer steps."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 4), nn.LayerNorm(4))

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            out = self.inner(x)
            whole: Tensor = out.full_tensor() if hasattr(out, "full_tensor") else out
            return whole

    plan = {
        "inner.0": ColwiseParallel(),
        "inner.1": RowwiseParallel(output_layouts=Shard(0)),
        "inner.2": SequenceParallel(sequence_dim=0),
    }
    _tensor_parallel(Whole(), watch, truth, plan)
    return {name: p.redistribute(placements=[Replicate()]) for name, p in model.named_parameters()}


def fsdp_poisoned(rank: int, watch: Watch, truth: Truth) -> Mapping[str, Tensor]:
    """One element of one rank's shard turns NaN."""
    model = network()
    fully_shard(model, mesh=init_device_mesh("cpu", (RANKS,)))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    with watch(model, optimizer):
        for step in range(STEPS):
            optimizer.zero_grad()
            loss_of(model, batches(step)[rank]).backward()
            if step == STEPS - 1 and rank == 1:
                model[0].weight.grad.to_local()[0, 0] = math.nan
            optimizer.step()
    return model.state_dict()


def fsdp_thinned(rank: int, watch: Watch, truth: Truth) -> Mapping[str, Tensor]:
    """The ranks' budgets would choose every third and every fifth step."""
    model = network()
    fully_shard(model, mesh=init_device_mesh("cpu", (RANKS,)))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    with patch.object(Budget, "interval", lambda _: 3 + 2 * rank), watch(model, optimizer):
        for step in range(17):
            optimizer.zero_grad()
            loss_of(model, batches(step)[rank]).backward()
            optimizer.step()
    return model.state_dict()


DATA_PARALLEL = {
    loop.__name__: loop
    for loop in (
        ddp,
        ddp_accumulating_without_sync,
        ddp_scaled,
        ddp_reducing_in_place,
        ddp_thinned,
        ddp_beside_a_plain_model,
        zero_redundancy,
    )
}
SHARDED = {
    loop.__name__: loop
    for loop in (
        fsdp,
        fsdp_accumulating,
        fsdp_clipped,
        flattened,
        hybrid_sharded,
        mixed,
        tensor_parallel,
        sequence_parallel,
        fsdp_poisoned,
        fsdp_thinned,
    )
}
