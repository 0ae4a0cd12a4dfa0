"""Configuration: schemas and loading. No JAX here."""
