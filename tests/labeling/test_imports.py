"""What an import costs: the command line and the workers start with what they need, and no more."""

import json
import subprocess
import sys

import pytest

import laif_jax.labeling

HEAVY = {
    "aiohttp",
    "anthropic",
    "fastapi",
    "google.genai",
    "httpx",
    "jax",
    "numpy",
    "openai",
    "pandas",
    "pyarrow",
}
HEAVY |= {"psycopg", "pydantic", "sqlalchemy", "uvicorn"}


def loaded(module: str) -> set[str]:
    """The heavy packages that a fresh interpreter has after `import module`."""
    code = f"import json, sys, {module}; print(json.dumps(list(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    return HEAVY & set(json.loads(done.stdout))


@pytest.mark.parametrize(
    ("module", "needed"),
    [
        ("laif_jax.labeling", set()),
        ("laif_jax.labeling.process", {"pydantic"}),
        ("laif_jax.labeling.client", {"httpx", "pydantic", "sqlalchemy"}),
        ("laif_jax.labeling.worker", {"pydantic", "sqlalchemy"}),
        ("laif_jax.labeling.service", {"fastapi", "httpx", "pydantic", "sqlalchemy", "uvicorn"}),
        ("laif_jax.cli", {"pydantic"}),
    ],
)
def test_a_module_imports_what_it_needs(module: str, needed: set[str]) -> None:
    assert loaded(module) <= needed


def test_every_name_of_the_package_is_there() -> None:
    for name in laif_jax.labeling.__all__:
        value = getattr(laif_jax.labeling, name)
        assert value.__name__ == name
        assert value.__module__.startswith("laif_jax.labeling.")
    assert set(laif_jax.labeling.__all__) <= set(dir(laif_jax.labeling))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        laif_jax.labeling.nothing  # noqa: B018 - the look-up is what is tested
