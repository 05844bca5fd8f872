"""Which engine serves a backbone, and the reasons where it is not hestctl's own."""

from __future__ import annotations

import pytest

from hestctl.errors import Exit, HestError
from hestctl.generation.engine import Generator
from hestctl.generation.engines import engine_for
from hestctl.generation.native import NativeGenerator
from hestctl.model.backbone import Backbone


def test_hestctls_own_engine_serves_a_model_it_knows(backbone: Backbone) -> None:
    for wanted in ("auto", "hestctl"):
        kind = engine_for(backbone, wanted, "int8")  # type: ignore[arg-type]
        engine = kind.make(backbone, None, None)
        assert isinstance(engine, NativeGenerator)
        assert (engine.precision, engine.engine) == ("int8", "hestctl")
        assert (kind.name, kind.reason) == ("hestctl", None)


def test_the_reference_serves_where_it_is_asked_for(backbone: Backbone) -> None:
    kind = engine_for(backbone, "transformers", "full")
    assert isinstance(kind.make(backbone, None, None), Generator)
    assert (kind.name, kind.reason) == ("transformers", "--engine transformers was asked for")


def test_a_model_it_does_not_know_goes_to_the_reference_with_the_reason(backbone: Backbone) -> None:
    backbone.model.config.hidden_act = "gelu"
    kind = engine_for(backbone, "auto", "full")
    assert isinstance(kind.make(backbone, None, None), Generator)
    assert kind.name == "transformers"
    assert kind.reason is not None
    assert "gelu" in kind.reason
    for wanted, precision, says in (
        ("hestctl", "full", "cannot run tiny: the model's activation is gelu"),
        ("auto", "int8", "only hestctl's engine runs a backbone in int8: the model's activation is gelu"),
        ("transformers", "int8", "only hestctl's engine runs a backbone in int8"),
    ):
        with pytest.raises(HestError) as refused:
            engine_for(backbone, wanted, precision)  # type: ignore[arg-type]
        assert refused.value.exit_code == Exit.USAGE
        assert says in refused.value.message
