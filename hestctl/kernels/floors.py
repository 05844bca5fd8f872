"""The physical floors of generation: the least time a device's memory and arithmetic allow.

Decode reads every weight and the whole KV cache once a step; prefill is bound by its products.

Shape legend: D hidden size, F intermediate size, L layers, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DevicePeak:
    """Datasheet figures: memory in bytes/s, dense arithmetic in operations/s (a multiply-add is two)."""

    name: str
    bytes_per_s: float
    fp16_per_s: float
    int8_per_s: float


_PEAKS = (
    DevicePeak("H200", 4.8e12, 989e12, 1979e12),
    DevicePeak("H100", 3.35e12, 989e12, 1979e12),
    DevicePeak("A100", 2.0e12, 312e12, 624e12),
)
"""NVIDIA's datasheets, SXM boards (A100: 80 GB); never measured figures."""


def device_peak(device_name: str) -> DevicePeak | None:
    """The datasheet of a device by the name its driver gives; None for one that is not listed.

    PCIe and NVL boards of the same names have other memories: they are not listed.
    """
    if "PCIe" in device_name or "NVL" in device_name:
        return None
    return next((peak for peak in _PEAKS if peak.name in device_name), None)


@dataclass(frozen=True, slots=True)
class DecoderShape:
    """A Llama-, Mistral- or Qwen2-style decoder. ``layer_bytes`` and ``cache_bytes`` are bytes a weight of
    the layers' MatMuls and of the KV cache; the output projection and the embedding stay at two."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    layer_bytes: float = 2.0
    cache_bytes: float = 2.0

    @property
    def layer_weights(self) -> int:
        """Weights of one layer's MatMuls."""
        attention = self.hidden * self.head_size * 2 * (self.heads + self.kv_heads)
        return attention + 3 * self.hidden * self.intermediate

    def decode_bytes(self, rows: int, context: int) -> float:
        """Bytes a decode step reads at least, for ``rows`` sequences of ``context`` tokens."""
        weights = self.layers * self.layer_weights * self.layer_bytes + 2.0 * self.vocabulary * self.hidden
        per_token = 2 * self.layers * self.kv_heads * self.head_size * self.cache_bytes
        return weights + rows * context * per_token

    def prefill_operations(self, rows: int, tokens: int) -> tuple[float, float]:
        """Operations of the layers' MatMuls, and of causal attention, for a prompt of ``tokens``."""
        products = 2.0 * rows * tokens * self.layers * self.layer_weights
        attention = 2.0 * rows * tokens**2 * self.layers * self.heads * self.head_size
        return products, attention


def decode_floor_s(shape: DecoderShape, peak: DevicePeak, rows: int, context: int) -> float:
    """Seconds of a decode step at the datasheet's memory bandwidth (small batches: bytes bind)."""
    return shape.decode_bytes(rows, context) / peak.bytes_per_s


def prefill_floor_s(shape: DecoderShape, peak: DevicePeak, rows: int, tokens: int) -> float:
    """Seconds of a prefill at the datasheet's arithmetic: int8 MatMuls where a weight is one byte, attention
    in fp16. At short prompts, the time to read the weights once."""
    products, attention = shape.prefill_operations(rows, tokens)
    rate = peak.int8_per_s if shape.layer_bytes <= 1 else peak.fp16_per_s
    return max(products / rate + attention / peak.fp16_per_s, decode_floor_s(shape, peak, 0, 0))
