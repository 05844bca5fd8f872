"""Makes the simulated counter traces in this folder: ``python simulate.py [FOLDER]``.

A board as it was measured and reported, and nothing of the program that is tested: this script imports no
part of hestctl, so that a trace holds none of its assumptions. Figures measured on an H100 80GB HBM3: the
counter steps about every 100 ms and shows mJ; idle 119-132 W; fp16 matmuls at the 700 W limit, decoding at
420-480 W; counter against integrated power 1.004. Reported of the A100 and H100 (Yang et al., SC'24): the
sensor sees 25 ms of every 100 ms. Set here, within what was seen: jitter, lag, late steps, wander, ramps.
No sine and no exponential: the same bytes come out on every platform.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

IDLE_W, MATMUL_W, DECODE_W = 125.5, 700.0, 450.0
RISE_W_PER_MS, FALL_W_PER_MS = 60.0, 240.0
"""From idle to full power in 10 ms, and back in 3: a clock takes longer to raise than to stop."""
WANDER, WANDER_MS = 0.02, 500
"""Clocks and with them power wander by +-2 % on the scale of half a second."""
CYCLE_MS, SEEN_MS = 100, 25
"""The board takes the mean power of a part of every cycle for that of the whole."""
LAG_MS, JITTER_MS = 6.0, 4.0
LATE_SHARE = 0.02
"""One step in fifty is not shown; the next one carries both."""
GAIN, GAIN_CYCLES = 0.01, 40
POWER_RATIO = 1.004
COUNTER_J = 184_467.2
"""What the counter had reached before the trace began."""

Row = list[float] | dict[str, Any]


class Work:
    """What runs on the board, millisecond by millisecond, with the stretches that are judged."""

    def __init__(self, name: str, note: str) -> None:
        self.name = name
        self.note = note
        self.rng = random.Random(f"{name} 1")
        self.wanted_w: list[float] = []
        self.windows: list[tuple[int, int, float]] = []
        self.conditions: list[Row] = [conditions(0)]

    def run(self, ms: int, watts: float) -> None:
        self.wanted_w += [watts] * ms

    def rest(self, ms: int) -> None:
        self.run(ms, IDLE_W)

    def sample(self, *parts: tuple[int, float]) -> None:
        """A judged stretch of (ms, W) parts; its relative work is what they would draw without wander."""
        start_ms = len(self.wanted_w)
        for ms, watts in parts:
            self.run(ms, watts)
        work = sum(ms * watts for ms, watts in parts) / 1000
        self.windows.append((start_ms, len(self.wanted_w), work))

    def drawn_w(self) -> list[float]:
        """Power as it is really drawn: it wanders, and changes no faster than a board can."""
        wander = wandering(self.rng, len(self.wanted_w), WANDER, WANDER_MS)
        drawn, now_w = [], IDLE_W
        for wanted_w, factor in zip(self.wanted_w, wander, strict=True):
            change_w = wanted_w * factor - now_w
            now_w += max(-FALL_W_PER_MS, min(RISE_W_PER_MS, change_w))
            drawn.append(now_w)
        return drawn


def wandering(rng: random.Random, count: int, width: float, scale: int) -> list[float]:
    """``count`` factors around 1, straight between random ones within ``width`` every ``scale``."""
    knots = [rng.uniform(1 - width, 1 + width) for _ in range(count // scale + 2)]
    return [
        knots[i // scale] + (knots[i // scale + 1] - knots[i // scale]) * (i % scale) / scale
        for i in range(count)
    ]


def counted(rng: random.Random, drawn_w: list[float]) -> Iterator[tuple[float, float, float]]:
    """The counter's steps as the host sees them: time (s), joules, and instant power (W) then."""
    begin_ms, seen_from_ms = rng.randrange(CYCLE_MS), rng.randrange(CYCLE_MS - SEEN_MS)
    cycles = range(begin_ms, len(drawn_w) - CYCLE_MS, CYCLE_MS)
    gain = wandering(rng, len(cycles), GAIN, GAIN_CYCLES)
    # What is constant in a board's gain cancels in every ratio on it, so none is put in.
    mean_gain = sum(gain) / len(gain)
    joules = COUNTER_J
    for cycle_ms, factor in zip(cycles, gain, strict=True):
        seen = drawn_w[cycle_ms + seen_from_ms : cycle_ms + seen_from_ms + SEEN_MS]
        joules += sum(seen) / SEEN_MS * CYCLE_MS / 1000 * factor / mean_gain
        shown_ms = cycle_ms + CYCLE_MS + LAG_MS + rng.uniform(-JITTER_MS, JITTER_MS)
        if rng.random() >= LATE_SHARE:
            yield shown_ms / 1000, joules, seen[-1] / POWER_RATIO


def conditions(ms: int, **state: Any) -> Row:
    usual = {"temperature_c": 58, "sm_clock_mhz": 1755, "throttled": None, "foreign_processes": 0}
    return {"t_s": ms / 1000, **usual, **state}


def trace(work: Work, *, power: bool = False, refused: str | None = None) -> list[Row]:
    """The lines of the trace: header, rows in order of time, windows."""
    header: dict[str, Any] = {
        "hestctl_trace": 1,
        "origin": "simulated",
        "note": f"{work.note}; simulated, from figures measured on an H100 and reported of it",
        "counter": "NVML total energy",
        "device_name": "NVIDIA H100 80GB HBM3",
        "device_uuid": "GPU-simulated",
        "driver": "simulated",
        "step_s": 0.1,
        "max_w": 875.0,
    }
    if refused is not None:
        return [header | {"refused": refused}]
    drawn_w = work.drawn_w()
    true_j = list(accumulate((watts / 1000 for watts in drawn_w), initial=0.0))
    rows: list[Row] = [[0.0, COUNTER_J], *work.conditions]
    for t_s, joules, watts in counted(work.rng, drawn_w):
        rows.append([round(t_s, 4), round(joules, 3)])
        if power:
            rows.append({"t_s": round(t_s, 4), "power_w": round(watts, 3)})
    whole = (work.windows[0][0], work.windows[-1][1], sum(relative for _, _, relative in work.windows))
    windows: list[Row] = [
        {
            "window": name,
            "start_s": start_ms / 1000,
            "end_s": end_ms / 1000,
            "work": round(relative, 4),
            "true_j": round(true_j[end_ms] - true_j[start_ms], 4),
        }
        for name, (start_ms, end_ms, relative) in [
            *((f"s-{index}", window) for index, window in enumerate(work.windows)),
            ("all", whole),
        ]
    ]
    return [header, *sorted(rows, key=time_of), *windows]


def time_of(row: Row) -> float:
    return float(row["t_s"] if isinstance(row, dict) else row[0])


def back_to_back(work: Work, count: int, ms: int, watts: float) -> Work:
    """Rest, then ``count`` samples of equal length without gaps, then rest."""
    work.rest(1000)
    work.run(700, watts)
    for _ in range(count):
        work.sample((ms, watts))
    work.run(700, watts)
    work.rest(500)
    return work


def samples() -> list[Row]:
    work = Work("samples", "fp16 matmuls for 0.15-1.0 s a sample, 1-5 ms between samples")
    lengths = random.Random(0)
    # Those with which the naive error of 5-6 % was measured: it depends on them alone.
    measured = [round(lengths.uniform(150, 1000)) for _ in range(30)]
    work.rest(1000)
    work.run(1000, MATMUL_W)
    for ms in [*measured, *measured]:
        work.rest(work.rng.randint(1, 5))
        work.sample((ms, MATMUL_W))
    work.run(500, MATMUL_W)
    work.rest(500)
    return trace(work)


def generation() -> list[Row]:
    work = Work("generation", "prompts of varying length at 700 W, then 0.25-1.25 s of decoding at 450 W")
    work.rest(1000)
    work.run(60, MATMUL_W)
    work.run(500, DECODE_W)
    for _ in range(66):
        work.rest(work.rng.randint(1, 5))
        work.sample((work.rng.randint(20, 150), MATMUL_W), (work.rng.randint(250, 1250), DECODE_W))
    work.run(500, DECODE_W)
    work.rest(500)
    return trace(work)


def bursts() -> list[Row]:
    work = Work("bursts", "matmuls for 37 ms and what of a kernel is left then, 63 ms of rest")
    work.rest(1000)
    for _ in range(130):
        work.sample((37 + work.rng.randint(0, 6), MATMUL_W), (63, IDLE_W))
    work.rest(500)
    return trace(work)


def steady() -> list[Row]:
    work = Work("steady", "3 s of rest, then 12 s of matmuls, with instant power")
    work.rest(3000)
    work.sample((12_000, MATMUL_W))
    work.rest(500)
    return trace(work, power=True)


def reset() -> list[Row]:
    lines = trace(
        back_to_back(Work("reset", "decoding; the driver is loaded anew after 5 s"), 16, 500, DECODE_W)
    )
    before_j = max(row[1] for row in lines if isinstance(row, list) and row[0] < 5.0)
    return [
        [row[0], round(row[1] - before_j, 3)] if isinstance(row, list) and row[0] >= 5.0 else row
        for row in lines
    ]


def stuck() -> list[Row]:
    lines = trace(back_to_back(Work("stuck", "decoding; no step for 1.5 s after 5 s"), 16, 500, DECODE_W))
    return [row for row in lines if not isinstance(row, list) or not 5.0 <= row[0] < 6.5]


def lost() -> list[Row]:
    lines = trace(
        back_to_back(Work("lost", "decoding; the GPU falls off the bus after 5 s"), 16, 500, DECODE_W)
    )
    kept = [row for row in lines if isinstance(row, dict) or row[0] < 5.0]
    kept.append({"t_s": 5.0, "error": "the energy counter cannot be read: GPU is lost"})
    return kept


def foreign() -> list[Row]:
    work = Work("foreign", "decoding; another process from 5 s to 7 s, thermal slowdown from 10 s to 12 s")
    work.conditions += [
        conditions(5000, foreign_processes=1),
        conditions(7000, temperature_c=71),
        conditions(10_000, temperature_c=86, sm_clock_mhz=1410, throttled="HW thermal slowdown"),
        conditions(12_000, temperature_c=74),
    ]
    back_to_back(work, 28, 500, DECODE_W)
    for ms in range(5000, 7000):
        work.wanted_w[ms] += 150
    for ms in range(10_000, 12_000):
        work.wanted_w[ms] -= 90
    return trace(work)


def mig() -> list[Row]:
    refused = "MIG is enabled: the energy counter tells of the whole GPU, not of a slice"
    return trace(Work("mig", "nothing ran"), refused=refused)


TRACES = (samples, generation, bursts, steady, reset, stuck, lost, foreign, mig)


def main(folder: Path) -> None:
    for make in TRACES:
        lines = "".join(json.dumps(line) + "\n" for line in make())
        (folder / f"simulated-h100-{make.__name__}.jsonl").write_text(lines, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
