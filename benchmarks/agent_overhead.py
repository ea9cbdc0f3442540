"""What watching costs, beside what peers cost: five models, in one process, interleaved block by block.

    python benchmarks/agent_overhead.py [--short] [--threads 1 2] [--models mlp gpt] [--json FILE]
    python benchmarks/agent_overhead.py --device cuda

Blocks of all contenders follow each other in shuffled order, so that a noisy machine hits all alike. A ratio
is the median over rounds of (block / mean of the two blocks without a hook of the same round), with a
bootstrap 95 % interval; the second of the two against the first is the A/A control, which shows what the
method cannot resolve. gradwatch exports over OTLP/HTTP to a receiver in a process of its own. Prints markdown;
progress goes to a terminal's standard error. On a GPU, the loop also runs with synchronisation forbidden.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import gradwatch
from overhead import report
from overhead.blocks import Tell, run
from overhead.contenders import PEERS, Peer
from overhead.models import MODELS, build
from overhead.plan import HAS_OUR_CLIP, SHORT, Plan, measure
from overhead.sink import Sink, running_sink


class Complaints(logging.Handler):
    """Keeps what gradwatch warns about: figures of an agent that is ill are worth nothing."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a message."""
        self.said.append(record.getMessage())


def main() -> int:
    """Measure and print."""
    arguments = _arguments()
    complaints = Complaints()
    logging.getLogger("gradwatch").addHandler(complaints)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device here", file=sys.stderr)
        return 2
    plan = SHORT if arguments.short else Plan()
    plan = dataclasses.replace(
        plan,
        **{
            name: value
            for name in ("rounds", "fine_seconds", "clip_seconds")
            if (value := getattr(arguments, name)) is not None
        },
    )
    peers: Sequence[Peer] = () if arguments.no_peers else PEERS
    notes = [report.machine(arguments.device)]
    if arguments.short:
        notes.append("A short run: it shows that everything works, and no figure is worth keeping.")
    notes += [f"{peer.name}: not installed, skipped." for peer in peers if not peer.is_here]
    if not HAS_OUR_CLIP:
        notes.append("watch.clip_grad_norm_: not in this gradwatch, skipped.")
    peers = [peer for peer in peers if peer.is_here]
    with running_sink() as sink:
        if arguments.device == "cuda":
            notes += [_forbid_synchronisation(name, sink) for name in arguments.models]
        results = [
            measure(name, arguments.device, threads, plan, peers, sink, _teller(name, threads))
            for threads in arguments.threads
            for name in arguments.models
        ]
    _tell("")
    notes += [f"**Not to be trusted**: gradwatch said {said!r}." for said in complaints.said[:3]]
    if arguments.json is not None:
        raw = {
            "notes": notes,
            "plan": dataclasses.asdict(plan),
            "results": [dataclasses.asdict(r) for r in results],
        }
        arguments.json.write_text(json.dumps(raw))
    print(report.report(results, notes))
    return 1 if complaints.said else 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cores = os.cpu_count() or 1
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, nargs="+", help=f"torch threads (default 1 {cores}; on a GPU 1)")
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), default=list(MODELS), metavar="MODEL",
                        help=f"some of {', '.join(MODELS)}")  # fmt: skip
    parser.add_argument(
        "--short", action="store_true", help="under a minute in all, one thread: does it work at all"
    )
    parser.add_argument("--rounds", type=int, help=f"rounds of long blocks (default {Plan.rounds})")
    parser.add_argument(
        "--fine-seconds", type=float, help=f"for short blocks (default {Plan.fine_seconds:.0f})"
    )
    parser.add_argument("--clip-seconds", type=float, help=f"for clipping (default {Plan.clip_seconds:.0f})")
    parser.add_argument("--no-peers", action="store_true", help="gradwatch only")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every block to FILE")
    arguments = parser.parse_args()
    if arguments.threads is None:
        one = arguments.short or arguments.device == "cuda"
        arguments.threads = [1] if one else list(dict.fromkeys((1, cores)))
    return arguments


def _tell(text: str) -> None:
    """Show progress on a terminal; an empty text wipes it away."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def _teller(name: str, threads: int) -> Tell:
    return lambda text: _tell(f"{name}, {threads} thread(s), {text}")


def _forbid_synchronisation(name: str, sink: Sink) -> str:
    """Train a little with the agent on and every synchronisation an error."""
    workload = build(name, "cuda")
    run(workload, 0.0, 3)
    workload.synchronize()
    with gradwatch.watch(
        workload.model, workload.optimizer, every=1, endpoint=sink.endpoint, export_interval=0.2
    ):
        torch.cuda.set_sync_debug_mode("error")
        try:
            run(workload, 0.5, 20)
            said = "passed"
        except RuntimeError as error:
            said = f"FAILED: {str(error).splitlines()[0]}"
        finally:
            torch.cuda.set_sync_debug_mode("default")
    workload.synchronize()
    sink.take()
    return f'{workload.name}: torch.cuda.set_sync_debug_mode("error") with the agent on {said}.'


if __name__ == "__main__":
    sys.exit(main())
