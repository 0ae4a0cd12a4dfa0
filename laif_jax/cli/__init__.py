"""`laif ...`: thin verbs over stages and studies."""

from laif_jax.cli.main import main

__all__ = ["main"]
