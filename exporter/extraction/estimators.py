"""Named estimators: from hidden states of harmful and of harmless prompts to a direction.

| name       | row 1 of the SSD                                                   | also a readout |
|------------|--------------------------------------------------------------------|----------------|
| `svd`      | first right singular vector of the pairs' differences (the paper)  | no             |
| `mean`     | difference of the two means                                        | yes            |
| `lda`      | normal of linear discriminant analysis with shrinkage              | yes            |
| `logistic` | normal of a logistic regression                                    | yes            |

A readout is what the gate of `restore` reads; it is fitted on labelled states, while an SSD comes from pairs. Whatever
row 1 is, the further rows are what an SVD finds in the differences once the rows before are taken out of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ...graphs.errors import GuardError
from ...graphs.spec import MAX_RANK

# states [n, d] float64, harmful [n] bool -> [d], any length, + towards harmful
Readout = Callable[[np.ndarray, np.ndarray], np.ndarray]

# A row of what is left that weighs less than this share of the differences is rounding, and points anywhere.
_NOTHING_LEFT = 1e-6


def mean_difference(states: np.ndarray, harmful: np.ndarray) -> np.ndarray:
    return states[harmful].mean(axis=0) - states[~harmful].mean(axis=0)


def discriminant(states: np.ndarray, harmful: np.ndarray) -> np.ndarray:
    """LDA. Shrinkage, because there may be more dimensions than prompts; equal priors, because answers have many tokens."""
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis  # here: scikit-learn is slow to import

    model: Any = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto", priors=[0.5, 0.5])
    return model.fit(states, harmful).coef_[0]


def logistic(states: np.ndarray, harmful: np.ndarray) -> np.ndarray:
    """Logistic regression with an L2 penalty, both classes weighing the same, on states of root mean square 1."""
    from sklearn.linear_model import LogisticRegression

    scale = float(np.sqrt((states**2).mean())) or 1.0
    model: Any = LogisticRegression(class_weight="balanced", max_iter=2000)
    return model.fit(states / scale, harmful).coef_[0]


READOUTS: Mapping[str, Readout] = {"lda": discriminant, "logistic": logistic, "mean": mean_difference}
ESTIMATORS: tuple[str, ...] = ("svd", *READOUTS)
DEFAULT_ESTIMATOR, DEFAULT_READOUT = "svd", "lda"


def fit_readout(name: str, states: np.ndarray, harmful: np.ndarray) -> np.ndarray:
    """Unit readout `[d]` float64.

    Raises:
        GuardError: the two kinds of states do not differ.
    """
    return _unit(READOUTS[name](states.astype(np.float64), harmful))


def estimate(name: str, harmful: np.ndarray, harmless: np.ndarray, rank: int) -> np.ndarray:
    """Estimate a direction from the states of anchor pairs.

    Args:
        name: a key of `ESTIMATORS`.
        harmful, harmless: states `[pairs, d]`; row `i` of both is one pair.
        rank: number of rows.

    Returns:
        Orthonormal rows `[m, d]` float64, oriented so that `+` means harmful. `m` is `rank`, or fewer if the differences of
        the pairs span fewer dimensions.

    Raises:
        GuardError: the pairs' states do not differ.
    """
    difference = harmful.astype(np.float64) - harmless.astype(np.float64)
    if not np.abs(difference).max() > 0:
        raise GuardError("the anchors' hidden states do not differ; are harmful and harmless prompts the same?")
    count = min(rank, MAX_RANK, len(difference))
    if name == "svd":
        rows = _singular_rows(difference, count, np.linalg.norm(difference))
    else:
        labels = np.arange(2 * len(difference)) < len(difference)
        first = fit_readout(name, np.concatenate([harmful, harmless]), labels)[None]
        left = difference - (difference @ first.T) * first
        rows = np.concatenate([first, _singular_rows(left, count - 1, np.linalg.norm(difference))])
    return rows * np.where((difference @ rows.T).mean(axis=0) < 0, -1.0, 1.0)[:, None]


def require_known(what: str, name: str, table: tuple[str, ...]) -> None:
    """Raises `GuardError` for a name that is not in the table."""
    if name not in table:
        raise GuardError(f"{what} {name!r} is unknown; choose one of {', '.join(table)}")


def _singular_rows(difference: np.ndarray, rank: int, whole: np.floating) -> np.ndarray:
    """At most `rank` rows, those that are more than rounding beside differences of size `whole`."""
    _, singular, rows = np.linalg.svd(difference, full_matrices=False)
    return rows[: min(rank, int((singular > _NOTHING_LEFT * whole).sum()))]


def _unit(direction: np.ndarray) -> np.ndarray:
    length = float(np.linalg.norm(direction))
    if not length > 0:
        raise GuardError("the prompts' hidden states do not differ; are harmful and harmless prompts the same?")
    return direction / length
