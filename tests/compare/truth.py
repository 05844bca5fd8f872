"""Planted truths through the comparison: how often it is wrong, and how often it finds what is there.

``python tests/compare/truth.py [repetitions]`` prints the table of examples/verdicts.md. Every repetition
draws new articles, batches and trainings, makes runs of them, and takes the road of ``hestctl compare``.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from simulated_runs import a_run

from hestctl.compare.decisions import ALPHA, REPEATABILITY
from hestctl.compare.loading import Loaded, Samples, entries
from hestctl.compare.pairs import compare_pairs
from hestctl.compare.results import Pair, Repeatability
from hestctl.records import Run

BATCH = 4
MARGIN = 1.0
SIZES = (20, 100, 500)
EDGE = 1 / (1 + REPEATABILITY)
"""Joules that are less by just what two runs of one model may differ by."""
GRANTED = Repeatability(REPEATABILITY, "fixed")
UNMEASURED = (
    "scope_energy_j",
    "emax_j",
    "energy_net_j",
    "prefill_j",
    "decode_j",
    "nll",
    "answer_tokens",
    "latency_s",
)
HEST = a_run("hest", 1)
TABS = a_run("tabs", 2)
FAMILY = (
    a_run("hest", 1),
    a_run("hest", 2, emax_ratio=0.4),
    a_run("tabs", 3),
    a_run("bhsp", 4),
    a_run("lora", 5),
    a_run("lora", 6, settings={"backbone": {"precision": "int8"}}),
)
"""Two budgets against three baselines and a control: eight pairs."""


@dataclass(frozen=True)
class World:
    """How much chance there is, and how many samples and seeds.

    ``batch`` and ``seed`` are the spreads of the logarithm of joules, of a batch and of a training;
    ``score`` and ``seed_points`` those of points, of a sample and of a training. ``tail`` makes batches vary
    by Student's t with that many degrees of freedom. Without ``same_seeds`` every side has its own.
    """

    size: int = 100
    seeds: int = 1
    batch: float = 0.05
    tail: int | None = None
    seed: float = 0.0
    score: float = 6.0
    seed_points: float = 0.0
    same_seeds: bool = True


@dataclass(frozen=True)
class Side:
    """One configuration: its joules beside those of the others, its points beside theirs."""

    run: Run
    joules: float = 1.0
    points: float = 0.0


@dataclass
class Articles:
    """What all runs of one repetition share."""

    rng: np.random.Generator
    world: World
    joules: np.ndarray = field(init=False)
    points: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.joules = 60 * self.rng.lognormal(0, 0.3, self.world.size)
        self.points = self.rng.normal(30, 8, self.world.size)

    def run(self, side: Side, seed: int) -> Loaded:
        """One training of ``side`` and its generation of every article."""
        rng, world = self.rng, self.world
        batches = np.arange(world.size) // BATCH
        count = int(batches[-1]) + 1
        drawn = rng.standard_normal(count) if world.tail is None else rng.standard_t(world.tail, count)
        level = side.joules * math.exp(rng.normal(0, world.seed))
        joules = self.joules * level * np.exp(world.batch * drawn)[batches] * rng.normal(1, 0.03, world.size)
        points = self.points + side.points + rng.normal(0, world.seed_points)
        points = points + rng.normal(0, world.score, world.size)
        columns = dict.fromkeys(UNMEASURED, np.full(world.size, np.nan)) | {
            "energy_j": joules,
            "energy_error_j": 0.002 * joules,
            "new_tokens": np.full(world.size, 90.0),
            "rouge_lsum": points,
        }
        samples = Samples(
            tuple(f"article-{place}" for place in range(world.size)),
            batches,
            columns,
            (None,) * world.size,
        )
        run = replace(side.run, run_id=f"{side.run.run_id}-{seed}", seed=seed)
        return Loaded(run, "runs.duckdb", "test", samples, None, None, ())


ONE = World()
THREE = World(seeds=3, seed=0.01, seed_points=0.3)
"""Trainings whose joules vary by 1 % (by the length of what they write) and scores by 0.3 points."""
VARIED = World(seeds=3, seed=0.05, seed_points=1.0)
"""Trainings that vary more than anything else does."""
SINGLE = replace(VARIED, seeds=1)
"""The same where each side was trained once: no interval over samples can see it."""
WORSE = 3.0
"""Points by which a model is surely worse, so that a claim of less energy says "worse quality"."""


def compared(rng: np.random.Generator, world: World, sides: Sequence[Side]) -> list[Pair]:
    """The pairs that ``hestctl compare`` makes of one repetition."""
    articles = Articles(rng, world)
    runs = []
    for place, side in enumerate(sides):
        first = 1 if world.same_seeds else 1 + 100 * place
        runs += [articles.run(side, seed) for seed in range(first, first + world.seeds)]
    made, _ = entries(runs)
    proposed = [entry for entry in made if entry.config.role == "proposed"]
    others = [entry for entry in made if entry.config.role in ("baseline", "control")]
    return compare_pairs(proposed, others, "measured", MARGIN, GRANTED, {})


def rate(happens: Callable[[list[Pair]], bool], world: World, sides: Sequence[Side], times: int) -> float:
    """How often it happens in ``times`` worlds, each drawn anew from a seed of its own."""
    found = (compared(np.random.default_rng(20_251_101 + place), world, sides) for place in range(times))
    return sum(map(happens, found)) / times


def any_less_energy(found: list[Pair]) -> bool:
    return any(pair.verdict.startswith("less energy") for pair in found)


def false_claims(world: World, times: int, truth: float = 1.0) -> float:
    """How often one pair is called less energy where joules are ``truth`` of the other's."""
    return rate(any_less_energy, world, (Side(HEST, truth), Side(TABS)), times)


def false_claims_of_eight(world: World, times: int, truth: float = 1.0, lost: float = 0.0) -> float:
    """How often any of eight pairs is, where joules of both budgets are ``truth`` of all others', and their
    points ``lost`` fewer."""
    sides = [Side(run, truth, -lost) if run.method == "hest" else Side(run) for run in FAMILY]
    return rate(any_less_energy, world, sides, times)


def ratio_covered(world: World, times: int) -> float:
    """How often the interval of the ratio of joules holds the true one, 0.8."""

    def covered(found: list[Pair]) -> bool:
        return found[0].ratio.low <= 0.8 <= found[0].ratio.high

    return rate(covered, world, (Side(HEST, 0.8), Side(TABS)), times)


def difference_covered(world: World, times: int) -> float:
    """How often the interval of the difference in points holds the true one, half a point."""

    def covered(found: list[Pair]) -> bool:
        return found[0].quality_difference.low <= 0.5 <= found[0].quality_difference.high

    return rate(covered, world, (Side(HEST, points=0.5), Side(TABS)), times)


def false_equality(world: World, times: int) -> float:
    """How often a model that is worse by the whole margin is called not inferior."""
    sides = Side(HEST, points=-MARGIN), Side(TABS)
    return rate(lambda found: found[0].quality == "not inferior", world, sides, times)


def savings_found(world: World, times: int, saving: float) -> float:
    """How often a saving is shown beyond the interval and repeatability, whatever the quality."""

    def shown(found: list[Pair]) -> bool:
        return (found[0].claim.energy or 0.0) <= ALPHA

    return rate(shown, world, (Side(HEST, 1 - saving), Side(TABS)), times)


def claims_found(world: World, times: int, saving: float) -> float:
    """How often a saving of equally good models is called less energy at equal quality."""

    def called(found: list[Pair]) -> bool:
        return found[0].verdict == "less energy at equal quality"

    return rate(called, world, (Side(HEST, 1 - saving), Side(TABS)), times)


def rows(times: int) -> Iterator[tuple[str, list[float]]]:
    """Every question with its rate at each of ``SIZES``, one seed and three."""

    def over(world: World, question: Callable[[World], float]) -> list[float]:
        return [question(replace(world, size=size)) for size in SIZES]

    for world, told in ((ONE, "1 seed"), (THREE, "3 seeds")):
        alike = replace(world, score=0.5, seed_points=0.0)  # so that quality hides no error about joules
        heavy = replace(world, batch=0.15, tail=3)
        for question, asked, one_world in (
            ("called less energy, nothing saved", lambda one: false_claims(one, times), alike),
            ("called less energy, 2 % saved, as granted", lambda one: false_claims(one, times, EDGE), alike),
            (
                "any of 8 pairs called so, 2 % saved",
                lambda one: false_claims_of_eight(one, times, EDGE),
                alike,
            ),
            (
                "any of 8 pairs called so, 2 % saved, worse quality",
                lambda one: false_claims_of_eight(one, times, EDGE, WORSE),
                alike,
            ),
            ("called not inferior, worse by the margin", lambda one: false_equality(one, times), world),
            ("interval holds the ratio of joules", lambda one: ratio_covered(one, times), world),
            ("the same, heavy-tailed joules", lambda one: ratio_covered(one, times), heavy),
            ("interval holds the difference in points", lambda one: difference_covered(one, times), world),
            ("5 % saved: shown to be fewer joules", lambda one: savings_found(one, times, 0.05), world),
            ("20 % saved: shown to be fewer joules", lambda one: savings_found(one, times, 0.2), world),
            ("20 % saved: less energy at equal quality", lambda one: claims_found(one, times, 0.2), world),
        ):
            yield f"{question} ({told})", over(one_world, asked)
    alike = replace(SINGLE, score=0.5, seed_points=0.0)
    yield (
        "called less energy, nothing saved (1 seed, varied)",
        over(alike, lambda one: false_claims(one, times)),
    )
    for question, asked in (("ratio of joules", ratio_covered), ("difference in points", difference_covered)):
        yield (
            f"interval holds the {question} (3 seeds, varied)",
            over(VARIED, lambda one, asked=asked: asked(one, times)),
        )


def main() -> None:
    times = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    print(f"| % of {times} repetitions | " + " | ".join(f"{size} samples" for size in SIZES) + " |")
    print("|---" * (len(SIZES) + 1) + "|")
    for question, rates in rows(times):
        print(f"| {question} | " + " | ".join(f"{100 * one:.1f}" for one in rates) + " |", flush=True)


if __name__ == "__main__":
    main()
