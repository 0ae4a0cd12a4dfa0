"""`laif doctor`: each finding is made where it should be, and nothing that is broken breaks it."""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib import metadata
from pathlib import Path

import pytest

from laif_jax.cli.main import main
from laif_jax.config import load_config
from laif_jax.studies import doctor, doctor_config, doctor_devices, doctor_machine
from laif_jax.studies.doctor import Finding, Here, Report, isolated

ROOT = Path(__file__).parents[2]
QUICKSTART = str(ROOT / "configs" / "quickstart.yaml")
FLASK = str(
    ROOT / "configs" / "smollm2_flask.yaml"
)  # a real model, trained with AdamW and RMSprop, and files of data
CPU = {"platform": "cpu", "kind": "cpu", "count": 1, "local": 1, "slices": 1, "processes": 1, "process": 0}
TPU = CPU | {
    "platform": "tpu",
    "kind": "TPU v5 lite",
    "count": 16,
    "local": 4,
    "processes": 4,
    "memory_bytes": 16 * 2**30,
}


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


class Canned(Here):
    """A machine whose child process answers as it is told."""

    answer: tuple[int | None, str, str] = (0, "", "")

    def child(self, code):
        return self.answer


def machine(tmp_path: Path, answer=None, **environ: str) -> Canned:
    here = Canned(root=tmp_path, environ=environ)
    here.answer = answer or (0, doctor_devices.MARK + json.dumps(CPU), "")
    return here


def said(found, level: str, words: str) -> Finding:
    """The one finding of that level with those words."""
    matching = [item for item in found[1] if words in item.what + item.do and item.level == level]
    assert len(matching) == 1, found[1]
    return matching[0]


def silent(found) -> bool:
    return not found[1]


# ---- the machine -----------------------------------------------------------------------------------------------


def test_the_versions_of_this_installation_fit():
    assert silent(doctor_machine.versions(Here()))


@pytest.mark.parametrize(
    ("fake", "words"),
    [
        ({"jaxlib": "0.1.0"}, "needs jaxlib"),
        ({"flax": "0.1.0"}, "; 0.1.0 is installed"),
        ({"libtpu": "0.0.1"}, "needs libtpu"),
        ({"jax-cuda13-plugin": "0.1.0"}, "needs jax-cuda13-plugin"),
        ({"grain": None}, "which is not installed"),
    ],
)
def test_versions_that_do_not_fit_are_named(monkeypatch, tmp_path, fake, words):
    true, asked = doctor_machine._version, metadata.requires
    monkeypatch.setattr(doctor_machine, "_version", lambda name: fake[name] if name in fake else true(name))
    monkeypatch.setattr(metadata, "requires", lambda name: asked("flax" if name in fake else name))
    chips(tmp_path, 4)
    pci(tmp_path, "0x10de", "0x030200", 1)
    _, findings = doctor_machine.versions(Here(root=tmp_path))
    assert any(words in item.what and item.level == "fails" and "pip install" in item.do for item in findings)


def test_a_plugin_without_its_chips_is_no_failure(monkeypatch, tmp_path):
    true, asked = doctor_machine._version, metadata.requires
    monkeypatch.setattr(doctor_machine, "_version", lambda name: "0.0.1" if name == "libtpu" else true(name))
    monkeypatch.setattr(metadata, "requires", lambda name: asked("flax" if name == "libtpu" else name))
    said(doctor_machine.versions(Here(root=tmp_path)), "note", "0.0.1 is installed")


def test_a_package_that_cannot_be_imported_is_named_and_the_others_still_tried(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor_machine, "IMPORTED", "json grain optax yaml")
    write(tmp_path / "optax.py", "raise ImportError('optax was built for another Python')")
    write(tmp_path / "grain.py", "import sys; sys.exit(3)")
    here = Here(environ={**os.environ, "PYTHONPATH": str(tmp_path)})
    found = doctor_machine.imports(here)
    said(found, "fails", "`import optax` fails: ImportError: optax was built for another Python")
    said(found, "fails", "`import grain` fails: SystemExit: 3")
    assert len(found[1]) == 2


def test_an_import_that_kills_python_or_hangs_is_a_finding(tmp_path):
    said(
        doctor_machine.imports(machine(tmp_path, (-11, "", "Segmentation fault"))),
        "fails",
        "killed Python (exit code -11)",
    )
    said(doctor_machine.imports(machine(tmp_path, (None, "", ""))), "slow", "took more than")


def pci(root: Path, vendor: str, kind: str, count: int) -> None:
    for index in range(count):
        write(root / f"sys/bus/pci/devices/{vendor}{kind}{index}/vendor", vendor)
        write(root / f"sys/bus/pci/devices/{vendor}{kind}{index}/class", kind)


def chips(root: Path, count: int) -> None:
    pci(root, "0x1ae0", "0x120000", count)
    for index in range(count):
        write(root / f"dev/accel{index}", "")


def test_chips_that_jax_does_not_use(tmp_path):
    chips(tmp_path, 4)
    found = doctor_machine.devices(machine(tmp_path))
    assert '".[tpu]"' in said(found, "slow", "4 TPU chips are not used").do
    found = doctor_machine.devices(machine(tmp_path, JAX_PLATFORMS="cpu"))
    assert "unset it" in said(found, "slow", "4 TPU chips are not used").do
    used = (0, doctor_devices.MARK + json.dumps(TPU), "")
    assert silent(doctor_machine.devices(machine(tmp_path, used, JAX_PLATFORMS="tpu,cpu")))


def test_gpus_are_counted_without_their_bridges(tmp_path):
    pci(tmp_path, "0x10de", "0x030200", 8)
    pci(tmp_path, "0x10de", "0x068000", 6)  # NVSwitch
    found = doctor_machine.devices(machine(tmp_path))
    assert '".[cuda]"' in said(found, "slow", "8 NVIDIA GPUs are not used").do


def test_a_google_machine_without_chips_has_none(tmp_path):
    pci(tmp_path, "0x1ae0", "0x020000", 1)  # its network card
    assert doctor_machine._hardware(machine(tmp_path))["TPU chips"] == 0


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ((None, "", ""), "no device within"),
        (
            (1, "", "Traceback\nRuntimeError: The TPU is already in use by process with pid 12"),
            "another process holds the chips",
        ),
        ((1, "", "laif_jax.DistributedError: nobody answered at host:1"), "start this on every host"),
        ((-11, "", ""), "it said nothing"),
    ],
)
def test_devices_that_cannot_be_used(tmp_path, answer, words):
    said(doctor_machine.devices(machine(tmp_path, answer)), "fails", words)


def test_memory_is_the_containers_where_that_is_less(tmp_path):
    write(tmp_path / "proc/meminfo", "MemTotal: 16777216 kB\nMemAvailable: 8388608 kB\n")
    facts, findings = doctor_machine.memory(machine(tmp_path))
    assert (facts["host_bytes"], facts["free_bytes"], findings) == (16 * 2**30, 8 * 2**30, [])
    write(tmp_path / "sys/fs/cgroup/memory.max", str(4 * 2**30))
    write(tmp_path / "sys/fs/cgroup/memory.current", str(3 * 2**30))
    found = doctor_machine.memory(machine(tmp_path))
    assert found[0]["host_bytes"] == 4 * 2**30
    said(found, "slow", "only 1.0 GiB of the host's memory are free")


def test_a_cache_that_cannot_be_written(tmp_path):
    file = write(tmp_path / "file", "")
    said(doctor_machine.disk(machine(tmp_path, LAIF_CACHE=str(file / "cache"))), "slow", "set LAIF_CACHE")
    before = sorted(tmp_path.rglob("*"))
    assert silent(doctor_machine.disk(machine(tmp_path, LAIF_CACHE=str(tmp_path / "not" / "yet"))))
    assert sorted(tmp_path.rglob("*")) == before, "it left something behind"


def test_a_full_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor_machine, "writable", lambda folder: (2**20, ""))
    found = doctor_machine.disk(machine(tmp_path, HOME=str(tmp_path)))
    said(found, "slow", "1.0 MiB are free at " + str(tmp_path / ".cache" / "laif_jax"))


def test_settings_that_slow_a_run(tmp_path, monkeypatch):
    environ = {"JAX_DISABLE_JIT": "1", "JAX_ENABLE_X64": "True", "JAX_DEBUG_NANS": "0"}
    found = doctor_machine.settings(machine(tmp_path, **environ, XLA_PYTHON_CLIENT_ALLOCATOR="platform"))
    said(found, "slow", "JAX_DISABLE_JIT=1")
    said(found, "slow", "JAX_ENABLE_X64=True")
    said(found, "slow", "XLA_PYTHON_CLIENT_ALLOCATOR=platform")
    assert len(found[1]) == 3
    monkeypatch.setattr(doctor_machine, "_open_files", lambda: 256)
    said(doctor_machine.settings(machine(tmp_path)), "slow", "256 files")


def test_huge_pages_matter_where_there_are_chips(tmp_path):
    write(tmp_path / "sys/kernel/mm/transparent_hugepage/enabled", "always [madvise] never")
    assert silent(doctor_machine.settings(machine(tmp_path)))
    chips(tmp_path, 4)
    said(doctor_machine.settings(machine(tmp_path)), "slow", "transparent huge pages are off")


# ---- a configuration -------------------------------------------------------------------------------------------


def config(*overrides: str):
    return load_config(QUICKSTART, list(overrides))


def test_a_mistake_in_the_configuration_is_a_finding():
    found = doctor_config.examine(QUICKSTART, ["sft.epoch=3"], Here(), {})
    assert list(found) == ["config"]
    said(found["config"], "fails", "epochs")
    said(doctor_config.examine("missing.yaml", [], Here(), {})["config"], "fails", "missing.yaml")


def test_a_mesh_that_does_not_fit_the_devices():
    said(doctor_config.mesh(config("mesh.fsdp=3"), TPU), "fails", "16 are here")
    assert said(doctor_config.mesh(config(), {}), "note", "JAX found no devices")


def test_batches_that_do_not_divide_are_refused():
    found = doctor_config.mesh(
        config("sft.batch_size=24", "dpo.batch_size=32", "pretrain.batch_size=48"), TPU
    )
    assert found[0]["axes"]["fsdp"] == 16
    said(found, "fails", "`sft.batch_size` 24 gives 24 rows over 16 parts of the mesh, 8 of 32 padding")
    assert len(found[1]) == 1
    found = doctor_config.mesh(config("dpo.micro_batch=8"), TPU)
    said(found, "fails", "`dpo.micro_batch` 8")


def test_slices_and_hosts_want_their_axes():
    said(doctor_config.mesh(config(), TPU | {"slices": 2}), "fails", "in 2 slices")
    assert "slices" not in str(doctor_config.mesh(config("mesh.data=2"), TPU | {"slices": 2})[1])
    said(doctor_config.mesh(config("mesh.tensor=8"), TPU), "slow", "larger than the 4 devices of a host")


LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
}
LLAMA |= {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000}
LLAMA |= {
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
}


@pytest.fixture
def llama(tmp_path) -> str:
    write(tmp_path / "llama" / "config.json", json.dumps(LLAMA))
    return str(tmp_path / "llama")


def real_model(source: str, *overrides: str):
    return load_config(FLASK, [f"model.source={source}", *overrides])


def test_what_trains_a_model_must_fit(llama):
    parameters = 5_933_109_248  # with grouped queries: 2*V*D + 32*(2*D*D + 2*D*1024 + 3*D*11008 + 2*D) + D
    axes = {"axes": {"data": 1, "fsdp": 16, "expert": 1, "tensor": 1}}
    facts, findings = doctor_config.model(real_model(llama), TPU, {}, axes)
    assert facts["parameters"] == f"{parameters:,}"
    assert facts["state_bytes"] == 16 * parameters
    assert not findings, "5.5 GiB of 16"
    axes["axes"] |= {"fsdp": 8}
    narrow = TPU | {"memory_bytes": 15 * 2**30}
    said(
        doctor_config.model(real_model(llama), narrow, {}, axes),
        "note",
        "take 11.1 GiB of a device's 15.0 GiB",
    )
    axes["axes"] |= {"fsdp": 4, "data": 4}
    said(
        doctor_config.model(real_model(llama), TPU, {}, axes),
        "fails",
        "22.1 GiB per device (over 4); a device has 16.0 GiB",
    )
    lora = real_model(llama, "model.lora.rank=8")
    facts, findings = doctor_config.model(lora, TPU, {}, axes)
    assert not findings, "adapters are small"
    assert facts["state_bytes"] < 2.1 * parameters


def test_a_published_model_is_known_before_it_is_downloaded():
    axes = {"axes": {"data": 1, "fsdp": 4, "expert": 1, "tensor": 1}}
    found = doctor_config.model(real_model("meta-llama/Llama-2-7b-hf"), TPU, {}, axes)
    assert found[0]["parameters"] == "6,738,415,616"
    said(found, "note", "a run will download it")
    said(found, "fails", "25.1 GiB per device (over 4); a device has 16.0 GiB")


def test_a_large_model_on_a_cpu(llama):
    found = doctor_config.model(
        real_model(llama), CPU, {"free_bytes": 8 * 2**30}, {"axes": {"data": 1, "fsdp": 1}}
    )
    said(found, "fails", "need 88.4 GiB; 8.0 GiB of this machine's memory are free")
    said(found, "slow", "minutes per step")
    said(found, "slow", "no fast bfloat16")


def test_heads_that_do_not_divide(llama):
    axes = {"axes": {"data": 1, "fsdp": 16, "expert": 1, "tensor": 12}}
    said(doctor_config.model(real_model(llama), TPU, {}, axes), "slow", "32 attention heads")
    axes["axes"] |= {"tensor": 16}
    said(doctor_config.model(real_model(llama), TPU, {}, axes), "note", "8 key-value heads")


@pytest.mark.parametrize(
    ("source", "level", "words"),
    [
        ("somebody/a-model-that-is-not-cached", "note", "a run will download it"),
        ("no-such-folder", "fails", "there is no folder no-such-folder"),
        ("missing.gguf", "fails", "there is no file missing.gguf"),
    ],
)
def test_a_model_that_is_not_here(source, level, words):
    said(doctor_config.model(real_model(source), TPU, {}, {}), level, words)


def test_a_family_that_is_not_supported(tmp_path):
    write(
        tmp_path / "m" / "config.json", json.dumps(LLAMA | {"architectures": ["X"], "model_type": "mamba9"})
    )
    said(doctor_config.model(real_model(str(tmp_path / "m")), TPU, {}, {}), "fails", "mamba9")


def test_folders_that_cannot_be_written_or_read(tmp_path):
    file = write(tmp_path / "file", "")
    said(doctor_config.folders(config(f"out={file}/runs"), Here()), "fails", "cannot be written")
    data = [f"out={tmp_path}", f"data.root={tmp_path}", f"data.eval.path={file}"]
    found = doctor_config.folders(load_config(FLASK, data), Here())
    said(found, "fails", f"`data.train.path`: there is no {tmp_path}/teachers/train.jsonl.gz")
    assert len(found[1]) == 1


def test_a_bucket_that_cannot_be_written(monkeypatch):
    class Refusing:
        def __truediv__(self, name):
            return self

        def write_text(self, text):
            raise PermissionError("403 laif-worker does not have storage.objects.create access\nmore")

        def exists(self):
            return True

    bucket = config("out=gs://my-bucket/runs")
    monkeypatch.setattr("etils.epath.Path", lambda path: Refusing())
    finding = said(doctor_config.folders(bucket, Here()), "fails", "storage.objects.create")
    assert "gs://my-bucket --member=serviceAccount:EMAIL" in finding.do
    assert "more" not in finding.what


def test_a_bucket_that_can_be_written_is_left_as_it_was(monkeypatch):
    store: dict[str, str] = {}

    class Bucket:
        def __init__(self, path):
            self.path = str(path)

        def __truediv__(self, name):
            return Bucket(f"{self.path}/{name}")

        def write_text(self, text):
            store[self.path] = text

        def unlink(self):
            del store[self.path]

    monkeypatch.setattr("etils.epath.Path", Bucket)
    assert doctor_config.probe_folder("gs://my-bucket/runs") == (None, "")
    assert store == {}


def test_keys_and_services_that_are_not_there(tmp_path):
    endpoint = "endpoints.paid={provider: openai, base_url: 'https://api.openai.com/v1', model: m, "
    found = doctor_config.services(config(endpoint + "api_key_env: NO_SUCH_KEY}"), machine(tmp_path))
    said(found, "fails", "`paid` is to be in NO_SUCH_KEY, which is not set")
    assert silent(
        doctor_config.services(
            config(endpoint + "api_key_env: NO_SUCH_KEY}"), machine(tmp_path, NO_SUCH_KEY="x")
        )
    )
    said(
        doctor_config.services(config(endpoint + "api_key_file: /no/key}"), Here()),
        "fails",
        "/no/key, which is not there",
    )
    closed = config("labeling.url='http://127.0.0.1:9'", "labeling.token_env=NO_SUCH_TOKEN")
    found = doctor_config.services(closed, machine(tmp_path))
    said(found, "fails", "the labelling service at http://127.0.0.1:9 does not answer")
    said(found, "fails", "NO_SUCH_TOKEN, which is not set")


def test_a_service_that_answers_is_no_finding():
    class Answering(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path == "/health" else 404)
            self.end_headers()
            self.wfile.write(b'{"status": "ok"}')

        def log_message(self, *_):
            """Quiet."""

    server = HTTPServer(("127.0.0.1", 0), Answering)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}"
        assert silent(doctor_config.services(config(f"labeling.url='{url}'"), Here()))
    finally:
        server.shutdown()
        server.server_close()


# ---- the whole -------------------------------------------------------------------------------------------------


def test_a_probe_that_fails_is_a_finding():
    def broken():
        raise ModuleNotFoundError("No module named 'packaging'\nmore")

    finding = said(isolated("versions", broken), "fails", "the check of versions could not be made")
    assert "ModuleNotFoundError: No module named 'packaging'" in finding.what
    assert "more" not in finding.what


def test_the_report_sorts_and_counts():
    findings = [Finding("fails", "disk", "It is full.", "Free some."), Finding("note", "model", "It is new.")]
    report = Report({"memory": {"host_bytes": 3 * 2**30, "free_bytes": None}}, findings)
    assert not report.ok
    assert report.text().splitlines() == [
        "memory:   host 3.0 GiB",
        "",
        "Will fail here:",
        "  - It is full.",
        "    -> Free some.",
        "",
        "Good to know:",
        "  - It is new.",
        "",
        "Something here will fail; see above.",
    ]
    assert Report({}, findings[1:]).ok


def test_the_command_says_what_is_here_and_ends_with_0_or_1(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("LAIF_CACHE", str(tmp_path))
    assert main(["doctor", QUICKSTART, f"out={tmp_path}", "mesh.fsdp=8", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] is True
    assert told["devices"]["count"] == 8
    assert told["mesh"]["axes"]["fsdp"] == 8
    assert told["versions"]["jax"] == metadata.version("jax")
    assert {finding["level"] for finding in told["findings"]} <= {"slow", "note"}
    assert any("8 devices are simulated" in finding["what"] for finding in told["findings"])
    monkeypatch.setattr(doctor, "isolated", lambda name, probe: ({}, [Finding("fails", name, "No.")]))
    assert main(["doctor"]) == 1
    assert "Something here will fail" in capsys.readouterr().out


def test_it_runs_where_laif_does_not(tmp_path):
    write(
        tmp_path / "broken" / "pydantic" / "__init__.py", "raise ImportError('pydantic_core does not match')"
    )
    write(tmp_path / "broken" / "optax.py", "raise ImportError('half an optax')")
    environment = {
        **os.environ,
        "PYTHONPATH": str(tmp_path / "broken"),
        "LAIF_CACHE": str(tmp_path / "cache"),
    }

    def laif(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "laif_jax.cli", *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)

    done = laif("run", QUICKSTART)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "laif: the installation is broken (pydantic_core does not match). `laif doctor` says what is missing\n"
    )
    done = laif("doctor", QUICKSTART, "--json")
    assert done.returncode == 1, done.stderr
    told = json.loads(done.stdout)
    whats = " ".join(finding["what"] for finding in told["findings"])
    assert "`import pydantic` fails" in whats
    assert "`import optax` fails: ImportError: half an optax" in whats
    assert "the check of config could not be made" in whats
    assert told["devices"]["count"] == 8, "JAX itself is whole"
