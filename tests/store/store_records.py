"""Records to put into a store, for the tests and for the processes they start."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

from hestctl.records import LayerUse, Run, Sample, StepMetric, Window
from hestctl.runs import Recorder, recording
from hestctl.store.folder import now
from hestctl.store.store import Store

Script = Callable[..., "subprocess.Popen[str]"]


def a_run(run_id: str = "train-1", command: str = "train", **fields: object) -> Run:
    return Run(run_id, command, "started", now(), **fields)  # type: ignore[arg-type]


def a_step(step: int, loss: float = 1.5) -> StepMetric:
    return StepMetric(step=step, split="train", epoch=0.5, loss=loss, task_loss=loss)


def a_sample(position: int, sample_id: str | None = None) -> Sample:
    return Sample(
        sample_id=sample_id or f"s{position}",
        position=position,
        split="test",
        prompt_tokens=400,
        new_tokens=64,
        truncated_tokens=0,
        batch_index=position // 8,
        batch_size=8,
        num_beams=1,
        engine="eager",
        latency_s=0.25,
        energy_kind="estimated",
        energy_method="cpu-time",
        energy_j=1.5,
        energy_valid=False,
        energy_reason="window too short",
    )


def broken_off(store: Store, run: Run, error: BaseException, steps: int = 0) -> None:
    """Record a run that ``error`` ends."""
    with recording(store, run) as recorder:
        for number in range(steps):
            recorder.step(a_step(number))
        raise error


def first_line(process: subprocess.Popen[str]) -> str:
    """What the process says first, once it does."""
    assert process.stdout is not None
    return process.stdout.readline()


def fill(recorder: Recorder, steps: int = 3, samples: int = 4) -> None:
    """Something in every table of the store."""
    for number in range(steps):
        recorder.step(a_step(number))
    for number in range(samples):
        recorder.sample(a_sample(number))
    recorder.window(Window("prefill", "test", 1.0, 2.0, "none", "none", reason="no counter"))
    recorder.layer_use(LayerUse(0, "int8", 12, 0.25))
    recorder.trial({"number": 0, "state": "complete", "value": 2.5, "feasible": True, "params": {"lr": 1e-4}})
    recorder.plan({"scope": "ffn", "emax_j": 2.0, "layers": [1, 2]})
    recorder.calibration(
        {"key": "gpu|fp16", "kind": "measured", "device_name": "A", "full": {"mean_j": 1e-6}}
    )
    recorder.run.settings = {"lr": 1e-4, "path": Path("x")}
