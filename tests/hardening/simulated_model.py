"""An energy model whose joules are known: what calibration would have found on a board like this."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hestctl.energy.model import Terms
from hestctl.energy.protocol import Unavailable
from hestctl.records import BLOCKS, FULL, INT8, OFF, BlockStates


def random_terms(generator, scale=1.0):
    """Coefficients of zero and more, some of them zero."""
    size = scale * np.array([1.0, 0.01, 1e-6, 0.05, 1e-5])
    values = size * generator.uniform(0, 1, 5) * (generator.uniform(size=5) > 0.2)
    return Terms(*values.tolist())


def total(terms, prompt, new):
    """The definition, written out once more."""
    steps = max(0, new - 1)
    looks = sum(prompt + step for step in range(1, steps + 1))
    prefill = terms.call_j + prompt * terms.token_j + prompt * prompt * terms.token2_j
    return prefill + steps * terms.step_j + looks * terms.context_j


@dataclass
class SimulatedModel:
    """``int8`` is the share of a full block's joules; larger batches cost less than in proportion."""

    layers: int
    sizes: tuple[int, ...] = (1, 4)
    beams: int = 1
    int8: tuple[float, float] = (0.5, 0.5)
    error: float = 0.01
    rest = Terms(call_j=0.5, token_j=2e-3, step_j=0.05)
    attention = Terms(call_j=0.1, token_j=1e-3, token2_j=1e-7, step_j=0.02, context_j=1e-5)
    mlp = Terms(call_j=0.2, token_j=3e-3, step_j=0.04)
    adapter = Terms(token_j=2e-5, step_j=1e-3)

    def _scale(self, batch_size):
        return batch_size**0.7

    def component(self, batch_size, num_beams, block, state):
        if (batch_size, num_beams) not in {(size, self.beams) for size in self.sizes}:
            return Unavailable(f"batch {batch_size} x {num_beams} was not calibrated")
        share = {OFF: 0.0, INT8: self.int8[block], FULL: 1.0}[state]
        return (self.attention, self.mlp)[block].times(share * self._scale(batch_size))

    def generation(self, batch_size, num_beams, gate, blocks):
        if (batch_size, num_beams) not in {(size, self.beams) for size in self.sizes}:
            return Unavailable(f"batch {batch_size} x {num_beams} was not calibrated")
        states = blocks or BlockStates.uniform(self.layers)
        terms = self.rest.times(self._scale(batch_size))
        for layer in range(self.layers):
            for block in range(len(BLOCKS)):
                terms = terms.plus(self.component(batch_size, num_beams, block, states.state(layer, block)))
        return terms if gate is None else terms.plus(self.adapter.times(batch_size * num_beams))

    def fit_error(self, batch_size, num_beams):
        return self.error

    def padded(self, batch_size, num_beams):
        fit = [size for size in self.sizes if size >= batch_size and num_beams == self.beams]
        return min(fit) if fit else Unavailable(f"no batch of {batch_size} x {num_beams} was calibrated")
