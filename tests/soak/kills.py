"""A collector that is killed again and again while it takes data in: what it acknowledged is stored, once.

Senders post OTLP requests, each until it is acknowledged and now and then once more, while the collector is
killed with SIGKILL at random moments and started again. Then what is stored is held against what was sent.

    python -m tests.soak.kills [--kills 500] [--db URL]
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import tempfile
import time
from dataclasses import dataclass

from gradwatch_collector.storage import database as db
from tests.collector_process import collector, free_port
from tests.crowd import Crowd, lost_and_twice


@dataclass(frozen=True)
class Figures:
    """What was seen. Points and events that were acknowledged, of those the lost and those stored twice."""

    kills: int
    acknowledged: int
    unanswered: int
    lost: int
    twice: int


def kills(database: str, count: int, seed: int = 0, senders: int = 3, longest: float = 0.5) -> Figures:
    """Kill the collector ``count`` times, each at most ``longest`` seconds after it began to answer."""
    dice = random.Random(seed)
    engine = db.connect(database)
    db.upgrade(engine)
    engine.dispose()
    port = free_port()
    crowd = Crowd(f"http://127.0.0.1:{port}", count=senders, seed=seed)
    done = 0
    try:
        while done < count:
            with collector(database, "--listen", f"127.0.0.1:{port}") as running:
                time.sleep(dice.uniform(0, longest))
                running.process.send_signal(signal.SIGKILL)
                running.process.wait()
            done += 1
            if sys.stderr.isatty():
                print(f"\r{done} of {count} kills", end="", file=sys.stderr, flush=True)
        with collector(database, "--listen", f"127.0.0.1:{port}"):
            crowd.finish()
    finally:
        crowd.give_up()
    lost, twice = lost_and_twice(database, crowd.sent)
    return Figures(done, crowd.acknowledged, crowd.unanswered, lost, twice)


def main() -> None:
    """Print the figures; exit with 1 if anything is lost or doubled."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=500, help="how often the collector dies")
    parser.add_argument("--db", help="an empty database; a new SQLite file without")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        seen = kills(options.db or f"sqlite:///{folder}/gradwatch.db", options.kills, options.seed)
    print(f"kills                            {seen.kills}, in {time.monotonic() - began:.0f} s")
    print(f"points and events acknowledged   {seen.acknowledged}")
    print(f"requests without an answer       {seen.unanswered}")
    print(f"acknowledged and lost            {seen.lost}")
    print(f"stored twice                     {seen.twice}")
    sys.exit(bool(seen.lost or seen.twice))


if __name__ == "__main__":
    main()
