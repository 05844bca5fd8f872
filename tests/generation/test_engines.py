"""Which engine serves a backbone, and the reasons where it is not hestctl's own."""

from __future__ import annotations

import pytest

from hestctl.errors import Exit, HestError
from hestctl.generation.engine import Generator
from hestctl.generation.engines import engine_for
from hestctl.generation.native import NativeGenerator
from hestctl.model.backbone import Backbone
from hestctl.records import FULL, INT8, OFF, BlockStates

MIXED = BlockStates((FULL, OFF), (INT8, FULL))


def test_hestctls_own_engine_serves_a_model_it_knows(backbone: Backbone) -> None:
    for wanted in ("auto", "hestctl"):
        kind = engine_for(backbone, wanted, MIXED)  # type: ignore[arg-type]
        engine = kind.make(backbone, None, None)
        assert isinstance(engine, NativeGenerator)
        assert (engine.blocks, engine.engine) == (MIXED, "hestctl")
        assert engine.notes["blocks"] == "attention 1 full, 1 off; mlp 1 full, 1 int8"
        assert (kind.name, kind.reason) == ("hestctl", None)


def test_the_reference_serves_where_it_is_asked_for(backbone: Backbone) -> None:
    kind = engine_for(backbone, "transformers", BlockStates.uniform(2))
    assert isinstance(kind.make(backbone, None, None), Generator)
    assert (kind.name, kind.reason) == ("transformers", "--engine transformers was asked for")


def test_a_model_it_does_not_know_goes_to_the_reference_with_the_reason(backbone: Backbone) -> None:
    backbone.model.config.hidden_act = "gelu"
    kind = engine_for(backbone, "auto", None)
    assert isinstance(kind.make(backbone, None, None), Generator)
    assert kind.name == "transformers"
    assert kind.reason is not None
    assert "gelu" in kind.reason
    int8, skipping = BlockStates.uniform(2, INT8), BlockStates((FULL, OFF), (FULL, OFF))
    for wanted, blocks, says in (
        ("hestctl", None, "cannot run tiny: the model's activation is gelu"),
        ("auto", int8, "only hestctl's engine saves joules by blocks in int8 or off: the model's activation"),
        ("transformers", int8, "only hestctl's engine saves joules by blocks in int8 or off"),
        ("transformers", skipping, "only hestctl's engine saves joules by blocks in int8 or off"),
    ):
        with pytest.raises(HestError) as refused:
            engine_for(backbone, wanted, blocks)  # type: ignore[arg-type]
        assert refused.value.exit_code == Exit.USAGE
        assert says in refused.value.message
