"""`python -m laif_jax.cli` is `laif`."""

import sys

from laif_jax.cli import main

sys.exit(main())
