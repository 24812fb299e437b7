"""Plot the curve of a calibration with matplotlib (the extra "plot")."""

from __future__ import annotations

from pathlib import Path

from llmcache.errors import ConfigError
from llmcache.near.calibration.calibrate import Calibration


def curve(calibration: Calibration, path: Path) -> None:
    """Plot drift and its bound against the share of hits, with the budget and the chosen threshold, to an image file.

    ConfigError when matplotlib is missing or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("--plot needs matplotlib; install llmcache[plot], or omit --plot") from None
    hits = [point[1] for point in calibration.curve]
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="share of documents reused", ylabel="mean drift of all results")
    axes.plot(hits, [point[2] for point in calibration.curve], label="measured on held-out documents")
    axes.plot(hits, [point[3] for point in calibration.curve], linestyle="--", label="upper bound")
    axes.axhline(calibration.budget, color="black", linewidth=0.8, label=f"budget {calibration.budget:g}")
    if calibration.threshold is not None:
        axes.axvline(calibration.hits, color="grey", linewidth=0.8, label=f"chosen: {calibration.hits:.1%}")
    axes.legend()
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be written: {error}; give another path or image format") from None
