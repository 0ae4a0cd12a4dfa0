"""What docs/how-to/tpu_pod.md and gpu_cluster.md tell a reader to type exists, and their prices are the data file's."""

import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import yaml

from tests.launch.pod import ROOT, Cloud, no_account, real_gcloud

PAGES = [ROOT / "docs" / "how-to" / name for name in ("tpu_pod.md", "gpu_cluster.md")]


PRICES = ROOT / "laif_jax" / "aot" / "chips.yaml"


def commands(start: str) -> list[list[str]]:
    """Words of every command in a code block that begins so, without what stands behind `;`, `&&` or `#`."""
    found = []
    for page in PAGES:
        for line in page.read_text().splitlines():
            if line.startswith("    "):
                for part in re.split(r" ; | && |; ", line.strip().partition(" #")[0]):
                    if part.strip().startswith(start + " "):
                        found.append(shlex.split(part))
    return found


def test_the_pages_have_commands():
    for start, least in (("gcloud", 15), ("launch/tpu_pod.sh", 12), ("python launch/gke/job.py", 4)):
        assert len(commands(start)) >= least, start


@pytest.mark.slow
@pytest.mark.skipif(real_gcloud() is None, reason="no Google Cloud SDK here")
def test_gcloud_knows_the_commands(tmp_path):
    given = [command for command in commands("gcloud") if command[1] not in ("auth", "config")]
    with ThreadPoolExecutor(2) as pool:
        for command, (code, err) in zip(given, pool.map(lambda c: no_account(c[1:], tmp_path), given)):
            assert code == 1, (command, err)
            assert "active account" in err, (command, err)


def test_the_launcher_takes_its_commands(tmp_path):
    cloud = Cloud(tmp_path)
    shutil.copy(ROOT / "launch" / "pod.env.example", cloud.checkout / "launch" / "pod.env")
    secrets = cloud.home / "pod.secrets"
    secrets.write_text("LAIF_LABEL_TOKEN=x\n")
    secrets.chmod(0o600)
    unset = {f"LAIF_POD_{name}": "" for name in ("PROJECT", "ZONE", "NAME", "TYPE")}
    for _, verb, *rest in commands("launch/tpu_pod.sh"):
        rest = [str(secrets) if word == "~/pod.secrets" else word for word in rest if word != "..."]
        if rest[-1:] == ["--"]:
            rest.append("true")
        out = cloud.run(verb, "--dry-run", *rest, **unset).stdout
        assert "--project=my-project" in out
    assert cloud.calls == []


def test_the_other_launchers_take_their_commands():
    for words in commands("python launch/gke/job.py"):
        cut = words.index("--") if "--" in words else len(words)
        command = [sys.executable, *words[1:cut], "--dry-run", *words[cut:]]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, (words, done.stderr)
    for words in commands("uv run launch/vertex.py"):
        cut = words.index("--") if "--" in words else len(words)
        arguments = words[2:cut]
        if "submit" in arguments:
            command = [sys.executable, *arguments, "--dry-run", *words[cut:]]
            done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
            assert done.returncode == 0, (words, done.stderr)
        else:
            code = "import sys; sys.path.insert(0, 'launch'); import vertex; vertex.parser().parse_args(sys.argv[1:])"
            done = subprocess.run(
                [sys.executable, "-c", code, *arguments[1:]], capture_output=True, text=True, cwd=ROOT
            )
            assert done.returncode == 0, (words, done.stderr)


def test_laif_takes_its_commands():
    from laif_jax.cli.main import _parser

    inner = [
        words[words.index("laif") + 1 :]
        for start in ("launch/tpu_pod.sh", "sbatch")
        for words in commands(start)
        if "laif" in words
    ]
    inner += [
        words[words.index("--") + 1 :]
        for start in ("python", "uv run")
        for words in commands(start)
        if "--" in words
    ]
    inner += [words[1:] for words in commands("laif")]
    assert len(inner) >= 8
    for words in inner:
        options = _parser().parse_args(words)
        assert (ROOT / options.config).is_file(), words


def test_every_file_that_is_named_is_there():
    text = "".join(page.read_text() for page in PAGES)
    named = set(re.findall(r"(?:tests/)?(?:launch|configs|laif_jax)/[\w./-]*\w", text))
    made = {"launch/pod.env"}  # by the reader
    assert [name for name in sorted(named - made) if not (ROOT / name).exists()] == []


def test_the_prices_are_the_data_files():
    table = yaml.safe_load(PRICES.read_text())
    text = PAGES[0].read_text()
    assert f"dated {table['date']}" in text
    rows = re.findall(r"^\| `(v\w+)-(\d+)`.*?\| (\d+) \| (\d+) \| ([\d.]+) \|$", text, re.M)
    assert len(rows) == 5
    for kind, number, chips, hosts, price in rows:
        chip = {"v5litepod": "v5e"}.get(kind, kind)
        assert int(chips) == int(number) // (2 if chip in ("v4", "v5p") else 1)
        assert int(hosts) == int(chips) // 4
        assert float(price) == pytest.approx(int(chips) * table["chips"][chip]["price"])
        assert f"{chip} {table['chips'][chip]['price']:.2f}" in text
