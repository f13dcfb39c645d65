"""Whether a network is right as often as it says."""

import dataclasses

import numpy as np

BINS = 15  # As in most of the literature since Guo et al.; the error depends on it.


@dataclasses.dataclass(frozen=True)
class Calibration:
    """A network's confidence beside how often it was right, in bins of equal width: bin m of M
    holds the examples with a confidence in (m / M, (m + 1) / M]. Guo et al., "On Calibration of
    Modern Neural Networks", arXiv:1706.04599.

    Attributes:
      count: int64 (bins,), examples in each.
      confidence, accuracy: float64 (bins,), mean confidence and share of right ones; nan where
        there are none.
    """

    count: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray

    @property
    def error(self) -> float:
        """The expected calibration error, Equation 3: the mean over all examples of
        |accuracy - confidence| of their bin; nan without examples."""
        if not self.count.any():
            return float("nan")
        gaps = np.abs(self.accuracy - self.confidence)
        return float(np.nansum(gaps * self.count) / self.count.sum())


def calibrate(probability: np.ndarray, right: np.ndarray, bins: int = BINS) -> Calibration:
    """Sorts examples into bins.

    Args:
      probability: (n,) in [0, 1], of the predicted class. Examples with nan are left out.
      right: bool (n,), whether the prediction was right.
      bins: how many.
    """
    known = ~np.isnan(probability)
    p, hits = probability[known].astype(np.float64), right[known].astype(np.float64)
    inner = np.arange(1, bins) / bins
    which = np.searchsorted(inner, p)  # Of equal ones the lower bin: its upper end belongs to it.
    count = np.bincount(which, minlength=bins)
    with np.errstate(invalid="ignore"):
        confidence = np.bincount(which, p, bins) / count
        accuracy = np.bincount(which, hits, bins) / count
    return Calibration(count, confidence, accuracy)
