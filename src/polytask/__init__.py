"""polytask: one library for the whole life of a multitask model."""

__version__ = "0.1.0"
