"""The commands that make the runs of a comparison again, from the settings the runs recorded."""

from __future__ import annotations

import json
import shlex
import tomllib
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import groupby
from typing import Any, Final

from hestctl.compare.names import file_name
from hestctl.errors import HestError
from hestctl.records import Run
from hestctl.settings import flatten, from_document, of_profile, profile_names

FLAGS: Final[Mapping[str, str]] = {
    "method.name": "--method",
    "budget.emax_ratio": "--emax-ratio",
    "budget.emax_j": "--emax",
    "method.scope": "--scope",
    "method.precision": "--precision",
    "budget.dual": "--dual",
    "method.controller": "--controller",
    "backbone.name": "--backbone",
    "backbone.weights": "--weights",
    "backbone.dtype": "--dtype",
    "backbone.precision": "--backbone-precision",
    "data.source": "--data",
}
"""Keys whose flag of `train` says more than ``--set``; all other keys go by that."""

_OF_CALIBRATION: Final = ("backbone.", "data.", "generation.", "energy.", "method.scope", "method.rank")
"""What `calibrate` goes by; the flags that it has are fewer than those of `train`."""
_CALIBRATION_FLAGS: Final = ("backbone.name", "backbone.weights", "backbone.dtype", "data.source")
_ALWAYS: Final = ("method.name", "budget.emax_ratio")
"""Said even where the profile says the same: they are what a reader looks for."""
_UNREAD: Final = "its settings are not those of this version"
_LEFT_OUT: Final = ("db", "budget.reference", "train.seed", "search.", "profile.")
"""The store and the seed are said apart, a reference is another run's id and made anew as well, and what a
search found is among the other settings."""


def train_commands(runs: Sequence[Run], db: str) -> list[str]:
    """The trainings in the order in which they were begun, those that repeat by seed as a loop.

    The order matters: a budget as a ratio refers to the latest tabs run. A run whose settings this version
    does not read has a comment in its place. ``db`` is a file's name.
    """
    ordered = sorted(runs, key=lambda one: (one.created_at, one.run_id))
    steps = [
        (command(run, "train", db) or f"# {' '.join(run.run_id.split())}: {_UNREAD}", run.seed)
        for run in ordered
    ]
    rounds = [
        (seed, [line for line, _ in of_seed]) for seed, of_seed in groupby(steps, key=lambda step: step[1])
    ]
    found: list[str] = []
    if len(rounds) < len(steps):
        for lines, alike in groupby(rounds, key=lambda one: one[1]):
            found += _looped(lines, [seed for seed, _ in alike])
    else:
        for line, repeated in groupby(steps, key=lambda step: step[0]):
            found += _looped([line], [seed for _, seed in repeated])
    return found


def shared_options(lines: Sequence[str], name: str = "train") -> tuple[str, list[str]] | None:
    """A shell function of ``name`` with the options that all trainings share, and the lines that call it.

    None where fewer than two lines are trainings. Every word after ``hestctl train`` belongs to a pair of a
    flag and its value.
    """
    options = [_options(line) for line in lines]
    trained = [pairs for pairs in options if pairs]
    if len(trained) < 2:
        return None
    shared = [pair for pair in trained[0] if all(pair in pairs for pairs in trained)]
    told = " ".join(word for pair in shared for word in pair)
    calls = []
    for line, pairs in zip(lines, options, strict=True):
        own = " ".join(word for pair in pairs if pair not in shared for word in pair)
        indent = line[: len(line) - len(line.lstrip())]
        calls.append(f"{indent}{name} {own}".rstrip() if pairs else line)
    return f'{name}() {{ hestctl train {told} "$@"; }}', calls


def _options(line: str) -> list[tuple[str, str]]:
    """Flags of a training with their values, as they are typed; empty for another line."""
    words = shlex.split(line, comments=True)
    if words[:2] != ["hestctl", "train"]:
        return []
    typed = [word if word == "$seed" else shlex.quote(word) for word in words[2:]]
    return [
        (flag, '"$seed"' if value == "$seed" else value)
        for flag, value in zip(typed[::2], typed[1::2], strict=True)
    ]


def _looped(lines: Sequence[str], seeds: Sequence[int | None]) -> list[str]:
    known = [str(seed) for seed in seeds if seed is not None]
    if len(known) < 2:
        seed = f" --seed {known[0]}" if known else ""
        return [line if line.startswith("#") else f"{line}{seed}" for line in lines]
    body = [f"  {line}" if line.startswith("#") else f'  {line} --seed "$seed"' for line in lines]
    return [f"for seed in {' '.join(known)}; do", *body, "done"]


def command(run: Run, name: str, db: str) -> str | None:
    """``hestctl NAME`` with the settings of ``run`` but its seed; None where they cannot be read."""
    try:
        wanted = dict(flatten(from_document(run.settings).model_dump(mode="json")))
    except (HestError, KeyError, TypeError):
        return None
    offers = [(profile, _changes(profile, wanted, name)) for profile in profile_names()]
    known = [(profile, changes) for profile, changes in offers if changes is not None]
    if not known:
        return None
    # The nearest profile makes the shortest command; the first by name where several are as near.
    profile, changes = min(known, key=lambda offer: len(offer[1]))
    words = ["hestctl", name, "--db", db, "--profile", profile]
    for key, value in changes.items():
        flag = FLAGS.get(key)
        if flag is not None and (name == "train" or key in _CALIBRATION_FLAGS):
            words += [flag, file_name(str(value))]
        else:
            words += ["--set", f"{key}={_toml(value)}"]
    return shlex.join(words)


def _changes(profile: str, wanted: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    """What to say beyond the profile; None where that takes back a value, which no flag can."""
    given = _profile(profile)
    changed = {
        key: value
        for key, value in wanted.items()
        if not key.startswith(_LEFT_OUT)
        and (name == "train" or key.startswith(_OF_CALIBRATION))
        and (value != given[key] or key in _ALWAYS)
    }
    if wanted["budget.emax_j"] is not None:
        # A budget in joules excludes one as a ratio by itself.
        changed.pop("budget.emax_ratio", None)
    if name == "train" and changed.get("method.name") != "hest":
        # Budgets bind hest alone: its flags are refused elsewhere, and nothing reads the keys.
        changed = {key: value for key, value in changed.items() if not key.startswith("budget.emax")}
    return None if any(value is None for value in changed.values()) else changed


@cache
def _profile(name: str) -> Mapping[str, Any]:
    return dict(flatten(of_profile(name).model_dump(mode="json")))


def _toml(value: object) -> str:
    """A value as ``--set`` reads it: TOML, or plain text where that is no TOML."""
    if isinstance(value, str):
        text = file_name(value)
        try:
            tomllib.loads(f"value = {text}")
        except tomllib.TOMLDecodeError:
            return text
        return json.dumps(text)
    return json.dumps(value)
