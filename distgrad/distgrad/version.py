"""The one place that names the version of distgrad."""

__version__ = "0.1.0"
