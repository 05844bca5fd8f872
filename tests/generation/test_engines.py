"""Which engine serves a backbone, and the reasons where it is not hestctl's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from hestctl.data.prompts import Encoded
from hestctl.errors import Exit, HestError
from hestctl.generation.engine import Generator
from hestctl.generation.engines import engine_for
from hestctl.generation.native import NativeGenerator
from hestctl.model.backbone import Backbone
from hestctl.model.methods import build_tuner
from hestctl.records import FULL, INT8, OFF, BlockStates
from hestctl.settings import MethodSettings
from hestctl.store.store import Store
from hestctl.workflows.engines import in_blocks

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


def test_a_run_s_blocks_run_from_the_codes_in_its_store(
    backbone: Backbone, tmp_path: Path, samples: Callable[..., list[Encoded]]
) -> None:
    store, own = Store(tmp_path / "runs.duckdb"), engine_for(backbone, "auto", None)
    hest, lora = (
        build_tuner(MethodSettings(name=name), backbone.model, layers=2, hidden=64, states=(0, 2), seed=0)
        for name in ("hest", "lora")
    )
    with pytest.raises(HestError, match="it is not there"):
        in_blocks(own, store, backbone, hest, MIXED)
    assert in_blocks(own, store, backbone, lora, MIXED).codes is None, (
        "LoRA, not yet merged, makes other weights"
    )
    lora.discard()
    kind = in_blocks(own, store, backbone, hest, MIXED, write=True)
    assert [path.name for path in store.root.glob("int8-*")] == [f"int8-{backbone.fingerprint[:16]}-float32"]
    assert kind.codes is not None
    assert set(kind.codes) == {(0, "gate_proj"), (0, "up_proj"), (0, "down_proj")}
    out = kind.make(backbone, None, None).generate(samples(1), new_tokens=2, num_beams=1)
    assert out.blocks == MIXED
    assert in_blocks(own, store, backbone, hest, BlockStates.uniform(2)) == own
    with pytest.raises(HestError, match="only hestctl's engine saves joules") as refused:
        in_blocks(engine_for(backbone, "transformers", None), store, backbone, hest, MIXED)
    assert refused.value.exit_code == Exit.USAGE
