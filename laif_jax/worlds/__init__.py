"""Synthetic worlds: prompts, answers and their quality, all known by program. No JAX here."""
