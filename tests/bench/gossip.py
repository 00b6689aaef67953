"""Measures the membership protocol at several sizes: `python tests/bench/gossip.py --nodes 1000`.

Simulates the cores on virtual time (0.5 to 3 ms per message) and prints a markdown table for 10,
100 and the given number of members.  "rounds" is the longest chain of messages by which a change
reached anybody.
"""

import argparse
import gc
import math
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dfs.cluster.swim import TABLE, VERSION
from dfs.testing.gossip import Sim, everywhere, key_of

STEADY = 30.0  # virtual seconds measured with nothing to tell
CHANGES = 5


class Watch:
    """Follows what becomes known about one member."""

    def __init__(self):
        self.key = -1
        self.status = ""
        self.hops = {}
        self.times = {}
        self.false_deaths = self.views = 0

    def follow(self, number, status, source):
        self.key, self.status = key_of(number), status
        self.hops, self.times = {source: 0}, {}

    def __call__(self, sim, process, change):
        news = change.member.key == self.key and change.new == self.status
        if news and process.number not in self.times:
            self.times[process.number] = sim.now
            self.hops[process.number] = self.hops.get(sim.source, 0) + 1
        if change.new == "dead":
            self.views += 1


def traffic(sim, seconds):
    """(messages, bytes) sent per member and second over that time."""
    processes = sim.processes()
    sent = sum(p.sent for p in processes)
    size = sum(p.size for p in processes)
    sim.run_until(sim.now + seconds)
    per = len(processes) * seconds
    return (sum(p.sent for p in processes) - sent) / per, (
        sum(p.size for p in processes) - size
    ) / per


def acquaint(sim):
    """Everybody is told of everybody, as by a comparison of tables: a cluster that runs for long."""
    cores = [p.core for p in sim.processes()]
    claims = tuple(core.my_raw for core in cores)
    for process in sim.processes():
        teller = cores[0] if process.core is not cores[0] else cores[1]
        sim.deliver(
            process,
            (VERSION, TABLE, teller.my_raw, teller.my_vitals_raw, 0, (0, False), claims, ()),
        )
    keys = [core.me.key for core in cores]
    if any(core.status(key) != "alive" for core in cores for key in keys):
        raise SystemExit("the table did not arrive")


def wait(sim, done, limit=300.0):
    start = sim.now
    while not done():
        sim.run_until(sim.now + 0.05)
        if sim.now - start > limit:
            raise SystemExit(f"no end after {limit} virtual seconds")
    return sim.now - start


def total(sim, what):
    return sum(p.core.counts[what] for p in sim.processes())


def measure(n, minutes, loss):
    watch = Watch()
    sim = Sim(n, strict=False, on_change=watch)
    started = time.process_time()
    for number in range(n):
        sim.start(number, range(n))
    acquaint(sim)
    sim.run_until(15.0)  # what is still told comes to an end
    row = {"n": n, "log2 n": math.log2(n)}
    row["msg/s"], row["B/s"] = traffic(sim, STEADY)

    rounds, seconds = [], []
    chance = random.Random(n)
    for _ in range(CHANGES):
        number = chance.randrange(n)
        old = next(p for p in sim.processes() if p.number == number)
        sim.crash(old)
        watch.follow(number, "alive", number)  # its next boot is the change
        start = sim.now
        sim.start(number, range(n))
        wait(sim, lambda: len(watch.times) == n - 1)
        rounds.append(max(watch.hops.values()))
        seconds.append(max(watch.times.values()) - start)
        sim.run_until(sim.now + 10.0)
    row["rounds to all"] = f"{sum(rounds) / CHANGES:.1f} (max {max(rounds)})"
    row["seconds to all"] = sum(seconds) / CHANGES

    first, last = [], []
    for _ in range(3):
        number = chance.randrange(n)
        watch.follow(number, "dead", -1)
        sim.crash(next(p for p in sim.processes() if p.number == number))
        start = sim.now
        wait(sim, lambda number=number: everywhere(sim, number).get("dead", 0) == n - 1)
        first.append(min(watch.times.values()) - start)
        last.append(max(watch.times.values()) - start)
        sim.start(number, range(n))
        sim.run_until(sim.now + 10.0)
    row["crash: first dead, s"] = sum(first) / 3
    row["crash: all know, s"] = sum(last) / 3

    suspected, declared = total(sim, "suspected"), total(sim, "declared")
    watch.views = 0
    sim.loss = loss
    row["msg/s, loss"], row["B/s, loss"] = traffic(sim, 60.0 * minutes)
    hours = n * minutes / 60
    row["wrong suspicions per node-hour"] = (total(sim, "suspected") - suspected) / hours
    row["wrong deaths"] = total(sim, "declared") - declared
    row["node-hours"] = hours
    row["views of wrong deaths"] = watch.views
    row["CPU s"] = time.process_time() - started
    return row


def show(value):
    if isinstance(value, float):
        return f"{value:,.2f}" if value < 100 else f"{value:,.0f}"
    return str(value)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--nodes", type=int, default=1000)
    parser.add_argument(
        "--minutes", type=float, default=2.0, help="virtual, with loss, at the largest size"
    )
    parser.add_argument("--loss", type=float, default=0.05)
    options = parser.parse_args()
    gc.disable()  # millions of objects that live to the end
    sizes = sorted({n for n in (10, 100) if n < options.nodes} | {options.nodes})
    rows = []
    for n in sizes:
        # small clusters run longer, for as many node-hours
        minutes = options.minutes * min(20.0, options.nodes / n)
        rows.append(measure(n, minutes, options.loss))
        print(f"{n} members: {rows[-1]['CPU s']:.0f} s of CPU", file=sys.stderr)
    print(f"| | {' | '.join('n = ' + str(r['n']) for r in rows)} |")
    print("|---" * (len(rows) + 1) + "|")
    for name in rows[0]:
        if name != "n":
            print(f"| {name} | {' | '.join(show(r[name]) for r in rows)} |")


if __name__ == "__main__":
    main()
