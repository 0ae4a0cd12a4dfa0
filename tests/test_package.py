"""Rules that hold for the whole package: what is imported where, docstrings, file sizes, shipped configurations."""

import ast
import importlib
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import laif_jax
from laif_jax.config import PpoConfig, RewardConfig, StudyConfig, dump_config, load_config

ROOT = Path(laif_jax.__file__).parent
MODULES = sorted(m.name for m in pkgutil.walk_packages([str(ROOT)], "laif_jax."))
WITHOUT_JAX = (
    "laif_jax.labeling",
    "laif_jax.records",
    "laif_jax.config",
    "laif_jax.worlds",
    "laif_jax.evaluation",
)
FILES = sorted(ROOT.rglob("*.py"))
CONFIGS = sorted((ROOT.parent / "configs").glob("*.yaml"))


def test_the_list_of_modules_is_whole():
    assert len(MODULES) > 80
    assert {name.split(".")[1] for name in MODULES} >= {"models", "training", "labeling", "studies", "cli"}


def imported(modules: list[str], watched: list[str]) -> list[str]:
    """Which of `watched` are loaded once a fresh interpreter has imported `modules`."""
    code = f"import importlib, sys\nfor m in {modules!r}: importlib.import_module(m)\n"
    code += f"print([m for m in {watched!r} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return ast.literal_eval(done.stdout.splitlines()[-1])


def main_modules(modules: list[str]) -> list[str]:
    return [name for name in modules if not name.endswith("__main__")]


def test_torch_is_never_imported():
    assert imported(main_modules(MODULES), ["torch", "flax.nnx", "xllamacpp", "wandb", "tensorflow"]) == []


def test_what_stands_apart_from_jax_does_not_import_it():
    modules = main_modules([name for name in MODULES if name.startswith(WITHOUT_JAX)])
    assert len(modules) > 30
    assert imported(modules, ["jax", "jaxlib", "flax", "optax", "orbax", "torch"]) == []


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_file_imports_nnx_or_torch_or_is_too_long(file):
    text = file.read_text()
    assert len(text.splitlines()) <= 500, "split this file"
    for node in ast.walk(ast.parse(text)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: absolute imports only"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            assert not f"{name}.".startswith(("torch.", "flax.nnx.")), f"line {node.lineno}: {name}"


def public(module):
    """The functions and classes that a module defines and does not hide, and the methods of its classes."""
    for name, value in vars(module).items():
        if name.startswith("_") or getattr(value, "__module__", None) != module.__name__:
            continue
        if inspect.isclass(value) or inspect.isfunction(value):
            yield name, value


@pytest.mark.parametrize("name", main_modules(MODULES))
def test_every_public_function_and_class_is_described(name):
    module = importlib.import_module(name)
    if not hasattr(module, "__path__") or vars(module).get("__all__"):
        assert module.__doc__, f"{name} has no docstring"
    missing = [
        f"{name}.{item}"
        for item, value in public(module)
        if not inspect.getdoc(value) or value.__doc__ is None
    ]
    assert missing == []


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_shipped_configurations_load_and_round_trip(path, tmp_path):
    tree = yaml.safe_load(path.read_text())
    schema = RewardConfig if "pairs" in tree else PpoConfig if "rewards" in tree else StudyConfig
    for scale in ["default", *(tree.get("scales") or {})]:
        config = load_config(path, [f"scale={scale}"], schema)
        saved = tmp_path / "config.yaml"
        saved.write_text(dump_config(config))
        assert load_config(saved, [], schema) == config
    assert len(CONFIGS) >= 2
