"""Settings with their origins, for ``--dry-run`` and ``env --settings``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hestctl.cli import out

if TYPE_CHECKING:
    from hestctl.settings import Resolved, Settings
    from hestctl.workflows.preview import Preview


def show_settings(resolved: Resolved, settings: Settings, *, json: bool, seen: Preview | None = None) -> None:
    """Print every key with its value and origin, the memory estimate, and where results would go.

    ``seen`` adds the data and the reference that a training would take.
    """
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
                **({} if seen is None else _preview_document(seen)),
            }
        )
        return
    rows = [(key, _told(value), origins[key]) for key, value in flat.items()]
    out.table("settings", ("key", "value", "origin"), rows, left=3)
    if estimate is not None:
        out.text(f"backbone: {estimate[0]:,} parameters, {_size(estimate[1])} of weights in memory")
    out.text(f"store: {settings.db.absolute()}; run folders: {root}")
    if seen is not None:
        _show_preview(seen)


def _preview_document(seen: Preview) -> dict[str, object]:
    return {
        "dataset": seen.dataset,
        "samples": None if seen.samples is None else dict(seen.samples),
        "reference_run_id": None if seen.reference is None else seen.reference.run_id,
        "emax_origin": seen.emax,
    }


def _show_preview(seen: Preview) -> None:
    if seen.samples is None:
        out.text(f"data: {seen.dataset}, not looked at: that may be a download")
    else:
        counts = ", ".join(f"{count:,} {split}" for split, count in seen.samples.items())
        out.text(f"data: {seen.dataset}, {counts}")
    if seen.emax is not None:
        out.text(f"E_max: {seen.emax}")


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:,.1f} GiB" if size_bytes >= 2**30 else f"{size_bytes / 2**20:,.1f} MiB"


def _told(value: object) -> str:
    return "-" if value is None else str(value)
