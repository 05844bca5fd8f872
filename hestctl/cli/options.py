"""The options that several commands share, and how flags become settings."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hestctl.errors import Exit, HestError

if TYPE_CHECKING:
    from hestctl.settings import Resolved

ProfileOption = Annotated[
    str, typer.Option("--profile", help="Settings to start from: a shipped name, or a TOML file.")
]
DbOption = Annotated[
    Path | None, typer.Option("--db", help=r"The store; run folders stand beside it. \[default: runs.duckdb]")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any settings key, such as train.epochs=1. Repeatable."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, units in its keys.")]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Look at settings, data and reference, and stop.")
]
BackboneOption = Annotated[
    str | None, typer.Option("--backbone", help="Hub id, local folder, or smollm2-135m.")
]
WeightsOption = Annotated[
    str | None, typer.Option("--weights", help="pretrained, or random for energy and latency alone.")
]
DeviceOption = Annotated[str | None, typer.Option("--device", help="auto, cpu or cuda.")]
EngineOption = Annotated[
    str | None, typer.Option("--engine", help=r"hestctl, transformers, or auto. \[default: auto]")
]
BackbonePrecisionOption = Annotated[
    str | None,
    typer.Option("--backbone-precision", help="full, or int8 for all layers' MatMuls in generation."),
]
DtypeOption = Annotated[str | None, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")]
DataOption = Annotated[
    str | None,
    typer.Option("--data", help="embedded, cnn_dailymail, lra-text, lra-listops, or a file or folder."),
]
MeterOption = Annotated[
    str | None, typer.Option("--meter", help="auto, nvml, rapl, estimate, none, or replay:FILE.")
]
RunOption = Annotated[
    str | None,
    typer.Option(
        "--run",
        metavar="RUN",
        help="A part of a run's id that no other has (`hestctl runs list`), or latest.",
    ),
]
EmaxRatioOption = Annotated[
    float | None,
    typer.Option("--emax-ratio", help=r"Budget per sample as a ratio of what TABS spends. \[default: 0.6]"),
]
EmaxOption = Annotated[float | None, typer.Option("--emax", help="Budget per sample in joules, outright.")]
ReferenceOption = Annotated[
    str | None,
    typer.Option(
        "--reference",
        metavar="RUN",
        help="The tabs run that --emax-ratio refers to: a part of its id, or latest.",
    ),
]


def resolve(profile: str, sets: list[str] | None, **flags: Any) -> Resolved:
    """Settings from the profile, the environment and the flags.

    Flag names are dotted keys with ``__`` for the dot; ``--set`` comes after them. Raises HestError.
    """
    from hestctl.settings import load

    values = {name.replace("__", "."): value for name, value in flags.items()}
    names = {key: _TYPED.get(key) or "--" + key.split(".")[-1].replace("_", "-") for key in values}
    assigned = assignments(sets)
    return load(profile, values | assigned, names | dict.fromkeys(assigned, "--set"))


def counts(flag: str, text: str | None) -> tuple[int, ...]:
    """``1,4`` as numbers; empty where the flag was not given. Raises HestError (usage)."""
    if text is None:
        return ()
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise HestError(f"{flag} takes whole numbers of at least 1, not {text!r}", f"{flag} 1,4", Exit.USAGE)
    return found


_TYPED = {
    "method.name": "--method",
    "budget.emax_j": "--emax",
    "backbone.name": "--backbone",
    "backbone.precision": "--backbone-precision",
    "data.source": "--data",
    "train.learning_rate": "--lr",
    "train.gate_learning_rate": "--gate-lr",
    "train.max_energy_j": "--max-train-joules",
    "profile.batch_sizes": "--batch-size",
    "energy.batch_sizes": "--batch-size",
}
"""Flags that are not called like their key."""


def assignments(sets: list[str] | None) -> dict[str, Any]:
    """``KEY=VALUE`` texts as a mapping; values are TOML where they parse as such, else text."""
    import tomllib

    out: dict[str, Any] = {}
    for pair in sets or []:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise HestError(f"--set takes KEY=VALUE, not {pair!r}", "--set train.epochs=1", Exit.USAGE)
        try:
            out[key.strip()] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            out[key.strip()] = value
    return out
