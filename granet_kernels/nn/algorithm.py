"""The choice between the sparse and the dense way to compute a layer, as an attribute of the layer."""

from __future__ import annotations

from torch import Tensor

from granet_kernels.choices import Algorithm, last_choice
from granet_kernels.ops.checks import check_algorithm


class HasAlgorithm:
    """A layer that can be told how it is computed, and tells it."""

    _algorithm: Algorithm = "auto"

    @property
    def algorithm(self) -> Algorithm:
        """How it is computed: "sparse", "dense", or "auto": what the backend expects to be faster."""
        return self._algorithm

    @algorithm.setter
    def algorithm(self, algorithm: Algorithm) -> None:
        check_algorithm(algorithm)
        self._algorithm = algorithm

    def _shown_algorithm(self, mask: Tensor) -> list[str]:
        """For ``repr``: what was asked for, or what the backend last chose for this packed mask."""
        if self.algorithm != "auto":
            return [f"algorithm={self.algorithm}"]
        chosen = last_choice(mask)
        return [] if chosen is None else [f"algorithm=auto: {chosen}"]
