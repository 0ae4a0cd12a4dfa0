"""`laif ...`: thin verbs over stages and studies."""

try:
    from laif_jax.cli.main import main
except ImportError as error:  # a package is missing or broken: `laif doctor` can still say which
    from laif_jax.cli.doctor import without_the_rest

    main = without_the_rest(error)

__all__ = ["main"]
