"""The way in without a notebook: ``nbdist demo``, ``nbdist version``, ``nbdist doctor``."""

from __future__ import annotations

__all__ = ["main"]

_PACKAGES = ("torch", "numpy", "ipyparallel", "ipykernel", "ipython", "anywidget", "ipywidgets", "cloudpickle", "psutil")
