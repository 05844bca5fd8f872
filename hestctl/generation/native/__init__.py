"""hestctl's own generation engine: little beside the arithmetic between two tokens."""

from hestctl.generation.native.generator import ENGINE, NativeGenerator
from hestctl.generation.native.known import unsupported

__all__ = ["ENGINE", "NativeGenerator", "unsupported"]
