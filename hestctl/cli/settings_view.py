"""Settings with their origins, for ``--dry-run`` and ``env --settings``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hestctl.cli import out

if TYPE_CHECKING:
    from hestctl.settings import Resolved, Settings


def show_settings(resolved: Resolved, settings: Settings, *, json: bool) -> None:
    """Print every key with its value and origin, the memory estimate, and where results would go."""
    from hestctl.model.backbone import parameter_estimate
    from hestctl.settings import flatten
    from hestctl.store.store import Store

    flat = dict(flatten(settings.model_dump(mode="json")))
    asked = dict(flatten(resolved.settings.model_dump(mode="json")))
    origins = {
        key: resolved.origins[key] if value == asked[key] else "--trial" for key, value in flat.items()
    }
    estimate = parameter_estimate(settings.backbone)
    root = Store(settings.db).root.absolute()
    if json:
        out.document(
            {
                "settings": {k: {"value": v, "origin": origins[k]} for k, v in flat.items()},
                "backbone_parameters": None if estimate is None else estimate[0],
                "backbone_bytes": None if estimate is None else estimate[1],
                "store": str(settings.db.absolute()),
                "run_folders": str(root),
            }
        )
        return
    rows = [(key, _told(value), origins[key]) for key, value in flat.items()]
    out.table("settings", ("key", "value", "origin"), rows, left=3)
    if estimate is not None:
        out.text(f"backbone: {estimate[0]:,} parameters, {_size(estimate[1])} of weights in memory")
    out.text(f"store: {settings.db.absolute()}; run folders: {root}")


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:,.1f} GiB" if size_bytes >= 2**30 else f"{size_bytes / 2**20:,.1f} MiB"


def _told(value: object) -> str:
    return "-" if value is None else str(value)
