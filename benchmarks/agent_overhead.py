"""What watching costs, beside what peers cost: five models, in one process, interleaved block by block.

    python benchmarks/agent_overhead.py [--models mlp,gpt] [--threads 1,2] [--rounds 10] [--no-peers]
    python benchmarks/agent_overhead.py --short
    python benchmarks/agent_overhead.py --device cuda
    python benchmarks/agent_overhead.py --tables

Blocks of all contenders follow each other in shuffled order, so that a noisy machine hits all alike; each runs
untimed for the same while before it is timed. A ratio is the median over rounds of (block / mean of the two
blocks without a hook of the same round), with a bootstrap 95 % interval; the second of the two against the
first is the A/A control, which shows what the method cannot resolve. gradwatch exports over OTLP/HTTP to a
receiver in a process of its own. On a GPU, the loop also runs with synchronisation forbidden.

What is measured takes the place of what docs/benchmarks.json held for the same model, number of threads and
device, and the tables in docs/benchmarks.md are made anew from all of it. A short run writes neither, and
prints its tables.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from overhead import report
from overhead.contenders import PEERS
from overhead.models import MODELS
from overhead.plan import SHORT, Plan, measure
from overhead.progress import Progress
from overhead.results import RESULTS, Results, load
from overhead.sink import running_sink
from page import PAGE, write


class Complaints(logging.Handler):
    """Keeps what gradwatch warns about: figures of an agent that is ill are worth nothing."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a message."""
        self._said.append(record.getMessage())

    def take(self) -> tuple[str, ...]:
        """The first few since the last call."""
        said, self._said = self._said, []
        return tuple(said[:3])


def main() -> int:
    """Measure and write."""
    arguments = _arguments()
    if arguments.tables:
        write(PAGE, report.parts(load(RESULTS)))
        return 0
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device here", file=sys.stderr)
        return 2
    plan = SHORT if arguments.short else Plan()
    if arguments.rounds is not None:
        plan = dataclasses.replace(plan, rounds=arguments.rounds)
    complaints = Complaints()
    logging.getLogger("gradwatch").addHandler(complaints)
    peers = [peer for peer in PEERS if peer.is_here and not arguments.no_peers]
    for peer in PEERS:
        if not peer.is_here:
            print(f"{peer.name}: not installed, skipped", file=sys.stderr)
    runs = [(name, threads) for threads in arguments.threads for name in arguments.models]
    progress = Progress(len(runs) * plan.seconds(len(peers)))
    results = Results() if arguments.short else load(RESULTS)
    is_ill = False
    with running_sink() as sink:
        for name, threads in runs:
            tell = progress.part(f"{name}, {threads} thread(s)", plan.seconds(len(peers)))
            found = measure(name, arguments.device, threads, plan, peers, sink, tell)
            found = dataclasses.replace(found, ill=complaints.take())
            is_ill |= bool(found.ill)
            results.add([found])
            if not arguments.short:
                # After each, so that a run that is cut off has not been for nothing.
                results.save(RESULTS)
    progress.end()
    if arguments.short:
        print("A short run: it shows that everything works, and no figure is worth keeping.\n")
        print("\n\n".join(report.parts(results).values()))
    else:
        write(PAGE, report.parts(load(RESULTS)))
    return 1 if is_ill else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cores = os.cpu_count() or 1
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--threads", type=_list(int), metavar="N,N", help=f"torch threads (default 1,{cores}; on a GPU 1)"
    )
    parser.add_argument(
        "--models", type=_list(_model), default=list(MODELS), metavar="MODEL,MODEL",
        help=f"some of {','.join(MODELS)}",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, help=f"rounds of long blocks (default {Plan.rounds})")
    parser.add_argument("--no-peers", action="store_true", help="gradwatch only")
    parser.add_argument("--short", action="store_true", help="a minute in all, one thread: does it work at all")
    parser.add_argument("--tables", action="store_true", help="measure nothing, make the tables anew")
    arguments = parser.parse_args()
    if arguments.threads is None:
        one = arguments.short or arguments.device == "cuda"
        arguments.threads = [1] if one else list(dict.fromkeys((1, cores)))
    return arguments


def _list(of: Callable[[str], Any]) -> Callable[[str], Sequence[Any]]:
    def parse(text: str) -> Sequence[Any]:
        return [of(each) for each in text.split(",")]

    parse.__name__ = "list"  # argparse says "invalid list value"
    return parse


def _model(name: str) -> str:
    if name not in MODELS:
        raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(MODELS)}")
    return name


if __name__ == "__main__":
    sys.exit(main())
