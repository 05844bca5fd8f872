"""How numbers read in the terminal; a joule never stands without its kind."""

from __future__ import annotations


def number(value: float | None, digits: int) -> str:
    """A figure, or "not measured"."""
    return "not measured" if value is None else f"{value:,.{digits}f}"


def joules(value: float | None, kind: str) -> str:
    """Joules with the word that says how they were had: measured, estimated or predicted."""
    return "not measured" if value is None else f"{value:,.4g} J ({kind})"


def seconds(value: float | None) -> str:
    """Seconds in three digits, or "not measured"."""
    return "not measured" if value is None else f"{value:.3g} s"
