"""launch/labeling: the unit, the container and the compose file start the service that there is, with its keys kept."""

import importlib.metadata as metadata
import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import yaml

from tests.launch.pod import ROOT

FOLDER = ROOT / "launch" / "labeling"


def unit() -> list[tuple[str, str, str]]:
    """(section, key, value) of every line."""
    section, found = "", []
    for line in (FOLDER / "laif-labels.service").read_text().splitlines():
        if line.startswith("["):
            section = line.strip("[]")
        elif line and not line.startswith("#"):
            key, _, value = line.partition("=")
            found.append((section, key, value))
    return found


def value(key: str) -> str:
    (found,) = [value for _, name, value in unit() if name == key]
    return found


def settings() -> dict[str, str]:
    lines = (FOLDER / "labels.env.example").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def starts(arguments: list[str], folder) -> str:
    """What `python -m laif_jax.labeling ARGUMENTS` says at its start on a free port of this machine."""
    ready = folder / "ready"
    process = subprocess.Popen(
        [sys.executable, "-m", "laif_jax.labeling", *arguments, "--ready-file", str(ready)],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        while line and "labelling service at" not in line:
            line = process.stderr.readline()
        return line
    finally:
        process.terminate()
        assert process.wait(timeout=60) == 0


@pytest.fixture
def token(tmp_path):
    path = tmp_path / "token"
    path.write_text("0123456789abcdef0123456789abcdef\n")
    path.chmod(0o600)
    return path


def test_the_unit_starts_the_service(tmp_path, token):
    command = value("ExecStart")
    assert command.startswith("/opt/laif/.venv/bin/python -m laif_jax.labeling ")
    told = settings() | {"LAIF_LABELS_PORT": "0", "LAIF_LABELS_STORE": str(tmp_path / "store")}
    filled = re.sub(r"\$\{(\w+)\}", lambda match: told[match[1]], command).replace(
        "/etc/laif/token", str(token)
    )
    arguments = shlex.split(filled)[3:]
    assert "labelling service at http://0.0.0.0:" in json.loads(starts(arguments, tmp_path))["message"]


def test_the_unit_waits_for_paid_answers_and_gives_little_away():
    assert ("Service", "KillSignal", "SIGTERM") in unit()
    assert int(value("TimeoutStopSec")) >= 120
    assert value("User") != "root"
    assert value("UMask") == "0077"
    assert "ProtectSystem=strict" in (FOLDER / "laif-labels.service").read_text()
    keys = [text for _, key, text in unit() if key == "EnvironmentFile"]
    assert keys == ["/etc/laif/labels.env", "-/etc/laif/keys.env"]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not here")
def test_systemd_reads_the_unit(tmp_path):
    text = (FOLDER / "laif-labels.service").read_text().replace("/opt/laif/.venv/bin/python", sys.executable)
    path = tmp_path / "laif-labels.service"
    path.write_text(text)
    done = subprocess.run(["systemd-analyze", "verify", str(path)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    path.write_text(text.replace("RestartSec=5", "RestartSec=soon"))
    done = subprocess.run(["systemd-analyze", "verify", str(path)], capture_output=True, text=True)
    assert "Failed to parse" in done.stderr, "it would have said so"


def container() -> str:
    return (FOLDER / "Containerfile").read_text()


def test_the_container_starts_the_service(tmp_path, token):
    lines = [line for line in container().splitlines() if line.startswith(("ENTRYPOINT", "CMD"))]
    entry, arguments = (json.loads(line.split(" ", 1)[1]) for line in lines)
    assert entry == ["python", "-m", "laif_jax.labeling"]
    places = {"/store": str(tmp_path / "store"), "/run/secrets/token": str(token), "8080": "0"}
    assert "labelling service at" in starts([places.get(word, word) for word in arguments], tmp_path)


def closure(names: list[str]) -> set[str]:
    """The distributions that are installed with these (and their extras)."""
    from packaging.requirements import Requirement

    found: set[str] = set()
    left = [Requirement(name) for name in names]
    while left:
        needs = left.pop()
        key = f"{needs.name.lower().replace('_', '-')}[{','.join(sorted(needs.extras))}]"
        if key in found:
            continue
        found.add(key)
        try:
            requires = metadata.requires(needs.name) or []
        except metadata.PackageNotFoundError:  # for another system
            continue
        for line in map(Requirement, requires):
            if line.marker is None or any(line.marker.evaluate({"extra": e}) for e in ("", *needs.extras)):
                left.append(line)
    return {key.partition("[")[0] for key in found}


BLOCK = """
import importlib, importlib.abc, json, pkgutil, sys
class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name in BLOCKED:
            raise ImportError(name + ' is not in the container')
BLOCKED = set(json.loads(sys.argv[1]))
sys.meta_path.insert(0, Finder())
import laif_jax.labeling.__main__, laif_jax.labeling.service, laif_jax.labeling.worker
for package in ('providers', 'wires'):
    folder = importlib.import_module('laif_jax.labeling.' + package)
    for module in pkgutil.iter_modules(folder.__path__):
        importlib.import_module(folder.__name__ + '.' + module.name)
import anthropic, google.genai, openai, psycopg
"""


def test_the_container_has_every_package_that_the_service_imports():
    block = re.search(r"uv pip install -c \S+ \\\n(.*?)\nCOPY", container(), re.S)
    assert block
    there = closure(shlex.split(block[1].replace("\\\n", " ")))
    assert {"sqlalchemy", "fastapi", "psycopg-binary"} <= there
    assert not {"jax", "flax", "transformers"} & there, "the service holds no JAX"
    others = {
        module
        for module, distributions in metadata.packages_distributions().items()
        if not {name.lower().replace("_", "-") for name in distributions} & (there | {"laif-jax"})
    }
    assert {"jax", "transformers"} <= others
    code = [sys.executable, "-c", BLOCK, json.dumps(sorted(others - {"laif_jax"}))]
    done = subprocess.run(code, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_the_compose_file_joins_service_and_database():
    compose = yaml.safe_load((FOLDER / "compose.yaml").read_text())
    labels, database = compose["services"]["labels"], compose["services"]["database"]
    assert (ROOT / "launch" / "labeling" / labels["build"]["context"]).resolve() == ROOT
    assert (ROOT / labels["build"]["dockerfile"]).is_file()
    store = next(word for word in labels["command"] if word.startswith("--store=")).partition("=")[2]
    assert store == "postgresql://laif@database:5432/laif"
    assert database["environment"]["POSTGRES_USER"] == "laif"
    assert database["environment"]["POSTGRES_DB"] == "laif"
    assert set(labels["secrets"]) | set(database["secrets"]) == set(compose["secrets"])
    assert labels["environment"]["PGPASSFILE"] == "/run/secrets/pgpass"
    ignored = (FOLDER / ".gitignore").read_text().split()
    for secret in compose["secrets"].values():
        assert secret["file"].removeprefix("./") in ignored


def test_secrets_are_made_once_and_for_one_reader(tmp_path):
    shutil.copy(FOLDER / "keys.env.example", tmp_path)
    command = ["bash", str(FOLDER / "secrets.sh"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == (0 if os.geteuid() == 0 else 1)
    names = ("token", "pgpass", "postgres_password", "keys.env")
    assert all((tmp_path / name).stat().st_mode & 0o777 == 0o600 for name in names)
    first = {name: (tmp_path / name).read_text() for name in names}
    assert first["pgpass"] == f"database:5432:laif:laif:{first['postgres_password']}"
    assert first["token"].strip() not in done.stdout + done.stderr
    subprocess.run(command, capture_output=True)
    assert {name: (tmp_path / name).read_text() for name in names} == first


def test_the_installation_shows_what_it_does():
    out = subprocess.run(
        ["bash", FOLDER / "install.sh", "--dry-run"], capture_output=True, text=True, check=True
    ).stdout
    lines = out.splitlines()
    assert lines[-1].split() == ["systemctl", "restart", "laif-labels"]
    assert "  > /etc/laif/token, owner laif, mode 600, unless it is there" in lines
    assert any(line.endswith(f"-r {ROOT}/requirements/py312.txt ") for line in lines)
