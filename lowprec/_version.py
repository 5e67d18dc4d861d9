"""The version of lowprec, where every part may read it."""

__all__ = ["__version__"]

__version__ = "0.1.0"
