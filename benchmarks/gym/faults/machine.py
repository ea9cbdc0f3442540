"""What is wrong with processes and machines."""

from __future__ import annotations

import resource
import time

import psutil
import torch
from torch import Tensor

from gym import control_group
from gym.data import Batch
from gym.fault import Fault
from gym.training import Recipe

# The first rank is the one that reports for all, so that a fault on it would be no test of naming a rank.
_SICK_RANK = 1


class SlowRank(Fault):
    """One rank computes for longer than its peer in every step: by a tenth of a second, or by a fiftieth."""

    def batch(self, batch: Batch) -> Batch:
        """See `Fault`."""
        if self.is_on and self.rank == _SICK_RANK:
            time.sleep(0.1 if self.is_strong else 0.02)
        return batch


class HungRank(Fault):
    """One rank stops, and the other waits for it until somebody ends them. Weak: it goes on after a while."""

    def batch(self, batch: Batch) -> Batch:
        """See `Fault`."""
        if self.now == self.step and self.rank == _SICK_RANK:
            time.sleep(3600 if self.is_strong else 8)
        return batch


class MemoryLeak(Fault):
    """Something keeps what it should free, up to the limit of the process; or nearly.

    The process is put into a control group with so much memory, where this machine allows one to be made.
    """

    _MEBIBYTES = 900

    def cook(self, recipe: Recipe) -> Recipe:
        """See `Fault`."""
        self._group = control_group.join(self.folder, self._MEBIBYTES)
        self._kept: list[Tensor] = []
        self._steps = recipe.steps
        return recipe

    def begin(self) -> None:
        """See `Fault`."""
        if self.now == self.step:
            held = psutil.Process().memory_info()
            left = (self._MEBIBYTES << 20) - held.rss
            if self.is_strong:  # an exception, where the kernel would kill
                limit = held.vms + left * 97 // 100
                resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            share = 1.0 / 0.7 if self.is_strong else 0.9
            self._bytes = int(left * share / (self._steps - self.step))
        if self.is_on:
            self._kept.append(torch.ones(self._bytes // 4))


class Crash(Fault):
    """A bug in what the loop does at one step, which raises the same exception in every run."""

    def begin(self) -> None:
        """See `Fault`."""
        if self.now == self.step:
            {"digits": 10}["classes"]
