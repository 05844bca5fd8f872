"""The figures of a search: its trials in their order, what mattered, and joules against quality."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import plotnine

from hestctl.compare.frames import NoDataError
from hestctl.compare.look import Drawn, Figure, check_theme, look, whole, write
from hestctl.compare.search import COLUMNS, find_search, trials
from hestctl.compare.style import BASE_SIZE, DPI, INKS, TRIALS, Theme, joule_unit
from hestctl.records import Run

p9: Any = plotnine  # typed only in part: under strict mypy its own functions count as untyped
REACHED, BELOW, FAILED = TRIALS


def draw_search(
    connection: duckdb.DuckDBPyConnection,
    run_id: str,
    out_dir: Path,
    *,
    theme: Theme = "light",
    formats: Sequence[str] = ("png",),
    dpi: int = DPI,
) -> Drawn:
    """Write ``{run_id}_history.png``, ``_importance`` and ``_front`` of one search, as far as it has got.

    The returned list has ``reasons``: the topics that drew nothing, and why. Raises HestError (usage) where
    the stores have no such search.
    """
    run, rows = find_search(connection, run_id), trials(connection, run_id)
    painter = _Painter(run, pd.DataFrame(rows, columns=list(COLUMNS)), check_theme(theme))
    return write(painter.topics(), out_dir, formats=formats, dpi=dpi)


def front(frame: pd.DataFrame) -> pd.DataFrame:
    """The trials that reached the baseline and that none beats in both joules and score, by joules."""
    ordered = frame[frame["feasible"] & frame["energy_j"].notna()].sort_values(
        ["energy_j", "score"], ascending=[True, False]
    )
    highest = ordered["score"].cummax().shift(fill_value=float("-inf"))
    return ordered[ordered["score"] > highest]


class _Painter:
    """Builds the figures of one search in one theme."""

    def __init__(self, run: Run, frame: pd.DataFrame, theme: Theme) -> None:
        self.run = run
        self.ink = INKS[theme]
        goal = run.summary.get("search", {})
        self.floor: float | None = goal.get("floor_points")
        self.quality = f"{goal.get('quality', 'score')}, points"
        self.kind = str(goal.get("joules", "predicted"))
        self.frame = frame.astype({"score": float, "energy_j": float, "feasible": bool})
        became = [
            _became(state, reached) for state, reached in zip(frame["state"], frame["feasible"], strict=True)
        ]
        self.frame["became"] = pd.Categorical(became, list(TRIALS))
        known = self.frame["energy_j"].dropna()
        self.factor, unit = joule_unit(float(known.max())) if len(known) else (1.0, "joules")
        self.frame["joules"] = self.frame["energy_j"] * self.factor
        self.joules = f"{unit} per sample, {self.kind}"

    def topics(self) -> list[tuple[str, Callable[[], Figure]]]:
        """File name without suffix, and what draws it."""
        painters = {"history": self.history, "importance": self.importance, "front": self.front}
        return [(f"{self.run.run_id}_{name}", paint) for name, paint in painters.items()]

    def history(self) -> Figure:
        """Score, and joules where they are what is sought, trial by trial, with the best so far."""
        done = self._done()
        sought = {"joules": self.joules} if self.floor is not None else {}
        panels = {**sought, "score": self.quality}
        points, best = [], []
        for column, panel in panels.items():
            values = done.assign(panel=panel, y=done[column])
            # A failed trial has no value: it stands at the far end from the best.
            low, high = float(values["y"].min()), float(values["y"].max())
            pad = 0.08 * (high - low or abs(low) or 1.0)
            lost = self.frame[self.frame["became"] == FAILED]
            points += [values, lost.assign(panel=panel, y=high + pad if column == "joules" else low - pad)]
            if self.floor is None or column == "joules":
                best.append(self._best_so_far(values, rising=column == "score"))
        order = list(panels.values())
        frame, line = _together(points, order), _together(best, order)
        frame["trial"], line["trial"] = frame["number"] + 1, line["number"] + 1
        plot = p9.ggplot(frame, p9.aes("trial", "y"))
        says = []
        if self.floor is not None:
            level = pd.DataFrame({"panel": pd.Categorical([self.quality], order), "floor": [self.floor]})
            plot += p9.geom_hline(
                p9.aes(yintercept="floor"), data=level, linetype="dashed", color=self.ink.muted
            )
            says.append("dashed: the baseline's score")
        if len(line) > 1:
            plot += p9.geom_step(data=line, color=self.ink.muted, size=0.7)
            says.insert(0, "line: best so far")
        if FAILED in set(frame["became"]):
            says.append("a failed trial has no value")
        plot += p9.geom_point(p9.aes(color="became", shape="became", fill="became"), size=2.2, stroke=0.6)
        plot += p9.facet_wrap("panel", ncol=1, scales="free_y")
        plot += p9.scale_x_continuous(breaks=whole)
        plot += p9.labs(x="trial", y="")
        plot += self._look("Trials of the search", "; ".join(says))
        plot += self._scales(frame)
        return Figure(plot, 1.9 + 1.5 * len(panels))

    def importance(self) -> Figure:
        """The share that each setting has in how good a trial was, by PED-ANOVA."""
        self._done()
        names = {"joules": "for low joules", "score": f"for high {self.quality.partition(',')[0]}"}
        found = self.run.summary.get("importance", {})
        rows = [
            (names[target], setting, 100 * share)
            for target in names
            for setting, share in found.get(target, {}).items()
        ]
        if not rows:
            raise NoDataError("too few trials, all alike, or a search that has not ended")
        frame = pd.DataFrame(rows, columns=["target", "setting", "share"])
        totals = frame.groupby("setting")["share"].sum().sort_values()
        frame["setting"] = pd.Categorical(frame["setting"], list(totals.index))
        frame["target"] = pd.Categorical(
            frame["target"], [n for n in names.values() if n in set(frame["target"])]
        )
        frame["text"] = [f"{share:.0f}" for share in frame["share"]]
        panels = frame["target"].nunique()
        plot = (
            p9.ggplot(frame, p9.aes("setting", "share"))
            + p9.geom_col(width=0.66, fill=TRIALS[REACHED].colour)
            + p9.geom_text(
                p9.aes(label="text"), ha="left", nudge_y=1.5, size=BASE_SIZE - 2, color=self.ink.text
            )
            + p9.coord_flip()
            + p9.facet_wrap("target", ncol=1)
            + p9.scale_y_continuous(expand=(0, 0, 0.1, 0))
            + p9.labs(x="", y="share of importance, %")
            + self._look("What mattered", "PED-ANOVA: which settings the best quarter of trials differ in")
        )
        return Figure(plot, 1.2 + panels * (0.35 + 0.24 * len(totals)))

    def front(self) -> Figure:
        """Quality against joules of every trial, the baseline's score, and the front above it."""
        done = self._done()
        done = done[done["joules"].notna()]
        if done.empty:
            raise NoDataError("the trials have no joules")
        edge = front(done)
        plot = p9.ggplot(done, p9.aes("joules", "score"))
        says = [f"joules {self.kind}"]
        if self.floor is not None:
            plot += p9.geom_hline(yintercept=self.floor, linetype="dashed", color=self.ink.muted)
            says.append("dashed: the baseline's score")
        if len(edge) > 1:
            plot += p9.geom_step(data=edge, color=TRIALS[REACHED].colour, size=0.6, alpha=0.6)
            says.append("line: the front")
        plot += p9.geom_point(p9.aes(color="became", shape="became", fill="became"), size=2.4, stroke=0.5)
        chosen = done[done["number"] == self.run.summary.get("best_trial", -1)]
        if len(chosen):
            plot += p9.geom_point(
                data=chosen, shape="o", size=5.5, fill="none", color=self.ink.text, stroke=0.7
            )
            says.append("ring: the trial that was trained again")
        plot += p9.labs(x=self.joules, y=self.quality)
        plot += self._look("Quality against joules, trial by trial", "; ".join(says))
        plot += self._scales(done)
        return Figure(plot, 3.9)

    def _best_so_far(self, values: pd.DataFrame, *, rising: bool) -> pd.DataFrame:
        """The best ``y`` among trials that reached the baseline, from the first of them to the last trial."""
        reached = values[values["became"] == REACHED]
        so_far = reached.assign(y=reached["y"].cummax() if rising else reached["y"].cummin())
        return pd.concat([so_far, so_far.tail(1).assign(number=self.frame["number"].max())])

    def _done(self) -> pd.DataFrame:
        done = self.frame[self.frame["state"] == "complete"]
        if done.empty:
            raise NoDataError("no trial was completed")
        return done

    def _scales(self, frame: pd.DataFrame) -> list[Any]:
        """Colours and shapes, and a legend of what is there, unless all is of one kind."""
        present = [name for name in TRIALS if name in set(frame["became"])]
        words = {
            name: name if self.floor is not None else name.replace(REACHED, "completed") for name in present
        }
        keep = {"limits": present, "labels": list(words.values())}
        scales = [
            p9.scale_color_manual({name: TRIALS[name].colour for name in present}, **keep),
            p9.scale_fill_manual({name: TRIALS[name].colour for name in present}, **keep),
            p9.scale_shape_manual({name: TRIALS[name].shape for name in present}, **keep),
        ]
        return scales if len(present) > 1 else [*scales, p9.theme(legend_position="none")]

    def _look(self, title: str, says: str) -> list[Any]:
        run = self.run
        backbone = (run.backbone or "").rsplit("/", 1)[-1]
        setting = f"{run.method}, {len(self.frame)} trials; {backbone} on {run.dataset}, validation split"
        if run.weights == "random":
            setting += "; random weights: scores say nothing"
        return look(self.ink, title, (setting, says))


def _became(state: str, reached: bool) -> str:
    if state != "complete":
        return FAILED
    return REACHED if reached else BELOW


def _together(parts: Sequence[pd.DataFrame], panels: Sequence[str]) -> pd.DataFrame:
    """One frame of all parts that have rows, its panels in their order."""
    frame = pd.concat([part for part in parts if len(part)] or list(parts), ignore_index=True)
    frame["panel"] = pd.Categorical(frame["panel"], list(panels))
    return frame
