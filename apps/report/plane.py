"""Principal components of hidden states in two dimensions: one plane per layer, in which both sides are drawn.

The plane is fitted on the unguarded states of all settings. States behind the guard are put into that same plane: each side in
a plane of its own would not show what the guard moved.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Plane:
    """Projection of points of width `d` to the plane.

    Attributes:
        mean: `[d]` float64, the origin.
        axes: `[2, d]` float64, orthonormal: the directions of most variance.
        explained: share of the variance along each of them.
    """

    mean: np.ndarray
    axes: np.ndarray
    explained: tuple[float, float]

    def place(self, states: np.ndarray) -> np.ndarray:
        """`[n, 2]` float64 of states `[n, d]`."""
        return (states.astype(np.float64) - self.mean) @ self.axes.T


def fit_plane(states: np.ndarray, harmful: np.ndarray) -> Plane:
    """PCA in float64.

    Args:
        states: `[n, d]`, n and d at least 2.
        harmful: `[n]` bool. The sign of a principal axis is arbitrary: each is turned so that harmful prompts have the higher
            mean, and a page does not flip from run to run.
    """
    from sklearn.decomposition import PCA

    wide = states.astype(np.float64)
    fitted: Any = PCA(n_components=2, svd_solver="full")
    with np.errstate(invalid="ignore"):  # equal states have no variance to share: 0 / 0
        fitted.fit(wide)
    axes, shares = np.asarray(fitted.components_), np.nan_to_num(fitted.explained_variance_ratio_)
    apart = (wide[harmful].mean(axis=0) - wide[~harmful].mean(axis=0)) @ axes.T
    axes = axes * np.where(apart < 0, -1.0, 1.0)[:, None]
    return Plane(fitted.mean_, axes, (float(shares[0]), float(shares[1])))
