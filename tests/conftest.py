"""Shared pieces: the tiny random Llama of the product, and small encoded samples."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch

if not torch.cuda.is_available():
    # Our Triton kernels then run in its interpreter. It looks once, at import, and transformers imports it.
    os.environ["TRITON_INTERPRET"] = "1"

from hestctl.data.prompts import Encoded
from hestctl.model.backbone import Backbone, tiny_backbone

torch.set_num_threads(1)


@pytest.fixture
def backbone() -> Backbone:
    """A fresh tiny Llama: LoRA changes a backbone in place, so it is never shared."""
    return tiny_backbone()


@pytest.fixture
def samples() -> Callable[..., list[Encoded]]:
    """``samples(count, prompt=.., answer=..)``: encoded rows of seeded random tokens, ragged lengths."""

    def make(count: int, *, prompt: int = 24, answer: int = 8, seed: int = 0) -> list[Encoded]:
        generator = torch.Generator().manual_seed(seed)

        def tokens(length: int) -> tuple[int, ...]:
            return tuple(torch.randint(10, 200, (length,), generator=generator).tolist())

        return [
            Encoded(
                sample_id=f"s{index}",
                prompt_ids=tokens(prompt + index % 5),
                answer_ids=tokens(answer + index % 3),
                truncated_tokens=0,
                reference="a reference",
                label=None,
            )
            for index in range(count)
        ]

    return make
