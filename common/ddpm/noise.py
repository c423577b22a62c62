"""Noise of which image i has its own, whatever the batch, the processes or the device."""

from collections.abc import Sequence

import numpy as np
import torch


class NoiseStreams:
    """One stream of standard normal noise for each image of `shape` (C, H, W): image i depends on (seed, i) alone, both
    0..2^64 - 1.

    Philox is a counter-based generator keyed by (seed, i), and numpy's is the same on every machine and device.
    """

    def __init__(self, seed: int, indices: Sequence[int], shape: tuple[int, int, int] = (1, 32, 32)):
        # As a list, a key of 2^63 or more would be rounded to float64, and seeds would share their noise.
        keys = (np.array([seed, i], dtype=np.uint64) for i in indices)
        self._streams = [np.random.Generator(np.random.Philox(key=key)) for key in keys]
        self.shape = shape

    def draw(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """The next noise of each image, (N, C, H, W)."""
        noise = np.stack([stream.standard_normal(self.shape, dtype=np.float32) for stream in self._streams])
        return torch.from_numpy(noise).to(device)
