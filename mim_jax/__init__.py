"""Masked image modelling in JAX: 27 methods on one trainer."""

__version__ = '0.1.0'
