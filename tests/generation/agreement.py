"""What the engines' tests share: methods on a tiny model, plans that bind, and where two engines part.

Two answers agree when they are the same tokens, or when at the first difference the two tokens' logits
tie within rounding: after that nothing can be compared. ``partings`` lists both kinds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from hestctl.budget import Bill, Emax
from hestctl.data.prompts import Encoded
from hestctl.energy.model import Terms
from hestctl.hardening.plan import PLAN_VERSION, Plan
from hestctl.model import backbone as backbones
from hestctl.model import random_weights
from hestctl.model.methods import build_tuner
from hestctl.records import BlockStates
from hestctl.settings import MethodSettings

METHODS = ("base", "lora", "tabs", "bhsp", "hest", "hest-fp16")


@dataclass(frozen=True)
class Parting:
    """The first difference of one row. ``gap``: logits of the token one engine took less the other's."""

    row: int
    step: int
    gap: float
    tie: bool


def partings(reference, rows, theirs, mine, *, rounding=1e-4):
    """First differences between two engines' greedy answers, judged by ``reference.label_scores``."""
    found = []
    for index, (row, a, b) in enumerate(zip(rows, theirs, mine, strict=True)):
        step = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
        if step is None:
            assert a == b, f"row {index}: one answer goes on where the other ends"
            continue
        prefix = replace(row, prompt_ids=(*row.prompt_ids, *a[:step]))
        logits = reference.label_scores([prefix])[0][0]
        gap = float((logits[a[step]] - logits[b[step]]).abs())
        found.append(Parting(index, step, gap, gap <= rounding * float(logits.abs().max())))
    return found


def beam_partings(reference, rows, theirs, mine, *, rounding=1e-5):
    """The same for beams: two answers tie when their mean log-probabilities do."""
    found = []
    for index, (row, a, b) in enumerate(zip(rows, theirs, mine, strict=True)):
        if a == b:
            continue
        answers = [replace(row, answer_ids=tuple(ids)) for ids in (a, b)]
        mean = [reference.answer_nll([answer])[0] / len(answer.answer_ids) for answer in answers]
        gap = abs(mean[0] - mean[1])
        found.append(Parting(index, 0, gap, gap <= rounding * max(1.0, *map(abs, mean))))
    return found


def agree(reference, rows, theirs, mine):
    """Fail where two greedy answers part without a tie."""
    found = partings(reference, rows, theirs, mine)
    assert all(parting.tie for parting in found), found


def family_backbone(family="LlamaForCausalLM", seed=0, **overrides):
    """The tiny model in another architecture, its biases (zero in a random model) drawn as well."""
    _, fields = random_weights.ARCHITECTURES["tiny"]
    config = random_weights.config_from({"architectures": [family], **fields, **overrides}, "tiny")
    made = backbones._random(config, "tiny", seed=seed, device=torch.device("cpu"), dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in made.model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3, generator=generator)
            elif parameter.dim() == 1:
                parameter.normal_(mean=1.0, std=0.1, generator=generator)
    return made


def often_stopping(backbone, ids=range(20, 320, 8)):
    """Make so many tokens stop tokens that answers end at various lengths."""
    backbone.model.generation_config.eos_token_id = list(ids)


def adapted(method, backbone, rows, *, emax_share=0.4, new_tokens=12, beams=1, seed=0):
    """(adapters, plan) of a method with directions that matter; hest's plan affords ``emax_share``."""
    if method == "base":
        return None, None
    tuner = build_tuner(
        MethodSettings(name=method.removesuffix("-fp16")),
        backbone.model,
        layers=backbone.num_layers,
        hidden=backbone.hidden_size,
        states=(0, 2) if method.endswith("-fp16") else (0, 1, 2),
        seed=seed,
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        if method == "lora":
            for name, parameter in tuner.named_parameters().items():
                if "lora_B" in name:
                    parameter.normal_(std=0.1, generator=generator)
            tuner.finish()
            return None, None
        tuner.spectral.scale.normal_(generator=generator)
        if method == "bhsp":
            tuner.spectral.gate.level.normal_(generator=generator)
    if not method.startswith("hest"):
        return tuner.spectral, None
    return tuner.spectral, binding_plan(backbone, tuner.spectral, rows, emax_share, new_tokens, beams)


def binding_plan(backbone, adapters, rows: Sequence[Encoded], share, new_tokens, beams):
    """A plan whose E_max is ``share`` of what all directions would cost on the longest row."""
    layers, _, rank = adapters.shape
    work = (max(len(row.prompt_ids) for row in rows) + new_tokens) * beams
    emax_j = share * work * layers * rank * 1e-6
    return Plan(
        version=PLAN_VERSION,
        run_id="r",
        method="hest",
        scope="adapter",
        envelope="absolute",
        backbone=backbone.name,
        fingerprint=backbone.fingerprint,
        device_name="cpu",
        calibration_id="c",
        table_key="k",
        energy_kind="estimated",
        costs_j=(0.0, 0.4e-6, 1e-6),
        uses_int8=adapters.uses_int8,
        emax_j=emax_j,
        emax_origin="test",
        margin=0.01,
        batch_size=len(rows),
        num_beams=beams,
        max_new_tokens=new_tokens,
        bound=(1, 4096),
        bills=(Bill(1, 1, Terms.zero(), Emax(Terms.zero(), Terms(call_j=emax_j))),),
        blocks=BlockStates.uniform(layers),
        pace=tuple(1.0 + index for index in range(layers)),
        order=tuple(tuple(row) for row in adapters.importance().argsort(dim=1, descending=True).tolist()),
        shift=0.0,
        energies=None,
    )
