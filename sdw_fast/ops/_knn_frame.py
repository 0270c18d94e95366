"""Coordinates that the compiled kernels of knn prune by."""

from __future__ import annotations

import math

import torch

from sdw_fast.ops._knn_search import READ_ROWS, Rows


class Frame:
    """Coordinates fit for pruning: centered, along the principal axes, widest first, scaled by a power of two.

    Any center and any orthonormal axes give right answers; these, from a sample, give fast ones. The scale puts all
    distances below 2^62, so that no square overflows. Coordinates lie on the device of the points.
    """

    def __init__(self, references: Rows, magnitude: float) -> None:
        rows, dims = len(references), references.dims
        sample = references.double(step=max(1, rows // 65536))
        self.center = sample.mean(0)
        self.scale = 2.0 ** (50 - math.frexp(2 * math.sqrt(dims) * max(magnitude, 1e-30))[1])
        self.axes = None
        if rows >= max(1024, 2 * dims):  # else too little to prune to be worth it
            sample = (sample - self.center) * self.scale
            covariance = (sample.T @ sample).cpu()  # a small matrix: LAPACK is quick and repeats its bits
            self.axes = torch.linalg.eigh(covariance).eigenvectors.flip(1) * self.scale

    def coordinates(self, points: torch.Tensor) -> torch.Tensor:
        """(rows, D) float32 of points (rows, D)."""
        center = self.center.to(points.device)
        axes = None if self.axes is None else self.axes.to(points.device)
        result = torch.empty(points.shape, dtype=torch.float32, device=points.device)
        for start in range(0, points.shape[0], READ_ROWS):
            centered = points[start : start + READ_ROWS].to(torch.float64) - center
            result[start : start + READ_ROWS] = centered @ axes if axes is not None else centered * self.scale
        return result
