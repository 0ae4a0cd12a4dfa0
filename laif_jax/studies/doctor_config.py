"""What `laif doctor CONFIG` looks at: the configuration on the devices, memory, folders and services that are here."""

import dataclasses
import json
import math
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from laif_jax.studies.doctor import Facts, Finding, Found, Here, gib, isolated
from laif_jax.studies.doctor_machine import writable

# Moments of float32 that an optimiser keeps of each trained parameter (adafactor's are factored: next to nothing).
MOMENTS = {"adamw": 2, "rmsprop": 1, "lion": 1, "adafactor": 0}


def examine(path: str, overrides: Sequence[str], here: Here, machine: dict[str, Facts]) -> dict[str, Found]:
    """Probe by probe, what a configuration will meet here. `machine`: the facts that were found about the machine."""
    loaded: list[Any] = []

    def load() -> Found:
        from laif_jax.config.load import describes, load_config
        from laif_jax.records.errors import LaifError

        try:
            loaded.append(load_config(path, overrides, describes(path)))
        except (LaifError, OSError) as error:
            return {}, [Finding("fails", "config", str(error), "correct the configuration")]
        return {"file": path, "name": loaded[0].name}, []

    found = {"config": isolated("config", load)}
    if not loaded:
        return found
    config, devices = loaded[0], machine.get("devices", {})
    for name, probe in {
        "mesh": lambda: mesh(config, devices),
        "model": lambda: model(config, devices, machine.get("memory", {}), found["mesh"][0]),
        "folders": lambda: folders(config, here),
        "services": lambda: services(config, here),
    }.items():
        found[name] = isolated(name, probe)
    return found


def _training(config: Any) -> dict[str, Any]:
    """The sections that train, by name."""
    from laif_jax.config import TrainSpec

    sections = ((name, getattr(config, name)) for name in type(config).model_fields)
    return {name: section for name, section in sections if isinstance(section, TrainSpec)}


# ---- mesh ------------------------------------------------------------------------------------------------------


def mesh(config: Any, devices: Facts) -> Found:
    """The mesh over the devices that were found, and whether batches divide over it."""
    from jax.sharding import AbstractMesh

    from laif_jax.parallel.mesh import AXES, MeshError, resolve_sizes, row_parts
    from laif_jax.training.rows import undivided

    if "count" not in devices:
        what = "the mesh cannot be checked: JAX found no devices"
        return {}, [Finding("note", "mesh", what)]
    try:
        sizes = resolve_sizes(config.mesh, devices["count"])
    except MeshError as error:
        return {}, [
            Finding(
                "fails", "mesh", str(error), "change `mesh` in the configuration, or the number of devices"
            )
        ]
    axes = dict(zip(AXES, (int(size) for size in sizes)))
    parts = row_parts(AbstractMesh(tuple(axes.values()), tuple(axes)))
    findings = list(_slices(axes, devices))
    findings += [Finding("fails", "mesh", what, do) for what, do in undivided(dict(config), parts)]
    return {"axes": axes}, findings


def _slices(axes: dict[str, int], devices: Facts) -> Iterator[Finding]:
    slices = devices.get("slices", 1)
    if slices > 1 and axes["data"] % slices:
        what = f"the devices are in {slices} slices, and `mesh.data` {axes['data']} is no multiple of that"
        yield Finding("fails", "mesh", what, f"`mesh.data` runs across slices: give it {slices}")
    tensor, local = axes.get("tensor", 1), devices.get("local", 1)
    if tensor > local:
        what = f"`mesh.tensor` {tensor} is larger than the {local} devices of a host: every layer waits for the network"
        yield Finding(
            "slow", "mesh", what, f"keep it at {local} or below where the links between hosts are slower"
        )


# ---- model -----------------------------------------------------------------------------------------------------


def model(config: Any, devices: Facts, memory: Facts, mesh_facts: Facts) -> Found:
    """Whether the model is here, and whether what trains it fits."""
    findings = []
    if devices.get("platform") == "cpu" and config.model.dtype == "bfloat16":
        what = "`model.dtype: bfloat16` on a CPU: most have no fast bfloat16"
        findings.append(Finding("slow", "model", what, "set `model.dtype: float32` here"))
    cfg, problems = _architecture(config)
    findings += problems
    if cfg is None:
        return {"source": config.model.source}, findings
    count, trained = _parameters(cfg)
    facts: Facts = {"source": config.model.source, "parameters": f"{count:,}"}
    findings += _divides(cfg, mesh_facts.get("axes", {}))
    sections = list(_training(config).values())
    if not sections:
        return facts, findings
    moments = [MOMENTS[s.optimizer.name] + (s.optimizer.momentum > 0) for s in sections]
    per_trained = 4 * (2 + max(moments))  # weight, gradient and moments
    frozen = {"float32": 4, "bfloat16": 2}[config.model.dtype]
    state = trained * per_trained + (count - trained) * frozen
    facts["state_bytes"] = state
    return facts, findings + list(_fits(state, count, devices, memory, mesh_facts.get("axes", {})))


def _architecture(config: Any) -> tuple[Any, list[Finding]]:
    """(the model's configuration where it can be read without a download, else None; what is wrong with its source)."""
    from laif_jax.models import fetch
    from laif_jax.models.config import from_hf
    from laif_jax.models.model import load_config
    from laif_jax.records.errors import LaifError

    source, lora = config.model.source, config.model.lora
    if source == "scratch" or source.endswith(".gguf"):
        missing = source != "scratch" and not Path(source).is_file()
        wrong = Finding("fails", "model", f"there is no file {source}", "correct `model.source`")
        return None, [wrong] if missing else []
    folder = _folder(source)
    if folder is None and (source in fetch.KNOWN or fetch.is_hub_id(source)):
        do = "the network must be there, and HF_TOKEN for a gated model"
        do = f"laif fetch {source}" if source in fetch.KNOWN else do
        absent = Finding("note", "model", f"{source} is not on this machine; a run will download it", do)
        published = _published(source)
        return (from_hf(published, lora=lora) if published else None), [absent]
    if folder is None:
        return None, [Finding("fails", "model", f"there is no folder {source}", "correct `model.source`")]
    try:
        return dataclasses.replace(load_config(folder), lora=lora), []
    except LaifError as error:
        return None, [Finding("fails", "model", str(error), "choose a model of a supported family")]


def _published(source: str) -> Any:
    """`config.json` of a model that `laif compile` knows by its Hub id, or None."""
    import yaml

    import laif_jax.aot

    table = Path(laif_jax.aot.__file__).with_name("models.yaml")
    return yaml.safe_load(table.read_text()).get(source)


def _folder(source: str) -> str | None:
    """The local or gs:// folder of a model, or the Hub's cached copy of it."""
    from etils import epath
    from huggingface_hub import try_to_load_from_cache

    from laif_jax.models import fetch

    if epath.Path(source).is_dir():
        return source
    if source in fetch.KNOWN and (fetch.cache_dir() / source / "config.json").is_file():
        return str(fetch.cache_dir() / source)
    cached = try_to_load_from_cache(source, "config.json") if fetch.is_hub_id(source) else None
    return str(Path(cached).parent) if isinstance(cached, str) else None


def _parameters(cfg: Any) -> tuple[int, int]:
    """(all, trained) parameters."""
    import jax

    from laif_jax.models.specs import ParamSpec, param_specs

    leaves = jax.tree_util.tree_flatten_with_path(
        param_specs(cfg), is_leaf=lambda x: isinstance(x, ParamSpec)
    )[0]
    sizes = [(math.prod(spec.shape), "lora_" in jax.tree_util.keystr(path)) for path, spec in leaves]
    adapters = sum(size for size, adapter in sizes if adapter)
    count = sum(size for size, _ in sizes)
    return count, adapters or count


def _divides(cfg: Any, axes: dict[str, int]) -> Iterator[Finding]:
    tensor = axes.get("tensor", 1)
    if cfg.num_heads % tensor:
        what = f"{cfg.num_heads} attention heads do not divide over `mesh.tensor` {tensor}: they are split less well"
        yield Finding("slow", "model", what, f"choose a `mesh.tensor` that divides {cfg.num_heads}")
    elif cfg.num_kv_heads % tensor:
        what = f"{cfg.num_kv_heads} key-value heads do not divide over `mesh.tensor` {tensor}: they are split less well"
        yield Finding("note", "model", what)


def _fits(state: int, count: int, devices: Facts, memory: Facts, axes: dict[str, int]) -> Iterator[Finding]:
    """Weights, gradients and moments alone; activations come on top."""
    parts = math.prod(size for name, size in axes.items() if name != "data")
    each, room = state / parts, devices.get("memory_bytes")
    named = "weights, gradients and optimiser state"
    exact = "`laif compile` says what a step needs in all"
    if devices.get("platform") == "cpu":
        here, room = axes.get("data", 1) * state, memory.get("free_bytes")
        if room and here > room:
            what = f"{named} need {gib(here)}; {gib(room)} of this machine's memory are free"
            yield Finding(
                "fails", "model", what, "take a smaller model or `model.lora`, or run on an accelerator"
            )
        if count > 5e8:
            what = f"{count / 1e9:.1f}e9 parameters on a CPU: minutes per step"
            yield Finding("slow", "model", what, "use an accelerator, or a smaller model")
    elif room and each > room:
        what = f"{named} need {gib(each)} per device (over {parts}); a device has {gib(room)}"
        yield Finding(
            "fails", "model", what, "use more devices on `mesh.fsdp`, `model.lora`, or another optimiser"
        )
    elif room and each > 0.7 * room:
        what = f"{named} take {gib(each)} of a device's {gib(room)}: little room for activations"
        yield Finding("note", "model", what, exact)


# ---- folders ---------------------------------------------------------------------------------------------------


def folders(config: Any, here: Here) -> Found:
    """Where the run is written, and what it reads."""
    from etils import epath

    free, problem = probe_folder(config.out)
    facts: Facts = {"out": config.out, "out_free_bytes": free}
    findings = []
    if problem:
        findings.append(
            Finding(
                "fails",
                "folders",
                f"`out` {config.out} cannot be written: {problem}",
                _bucket_advice(config.out),
            )
        )
    elif free is not None and free < 5 * 2**30:
        what = f"only {gib(free)} are free at {config.out}: a checkpoint holds 12 bytes per trained parameter"
        findings.append(Finding("slow", "folders", what, "set `out` to another disk"))
    for key, text in _inputs(config):
        if not epath.Path(text).exists():
            findings.append(
                Finding(
                    "fails", "folders", f"`{key}`: there is no {text}", "correct it, or bring the data here"
                )
            )
    return facts, findings


def probe_folder(folder: str) -> tuple[int | None, str]:
    """(free bytes where that is known, what is wrong or "") of a local or gs:// folder. Leaves nothing behind."""
    if "://" not in folder:
        return writable(Path(folder).expanduser().absolute())
    from etils import epath

    path = epath.Path(folder) / f".laif-doctor-{uuid.uuid4().hex}"
    try:
        path.write_text("x")
        path.unlink()
    except Exception as error:  # noqa: BLE001 (each store has its own; all mean that it cannot be written)
        return None, f"{type(error).__name__}: {(str(error).splitlines() or ['no message'])[0][:300]}"
    return None, ""


def _bucket_advice(folder: str) -> str:
    if not folder.startswith("gs://"):
        return "set `out` to a folder that can be written"
    bucket = urllib.parse.urlsplit(folder).netloc
    return (
        f'is the package there (pip install -e ".[gcp]"), does gs://{bucket} exist, and may this account write to it? '
        f"gcloud storage buckets add-iam-policy-binding gs://{bucket} --member=serviceAccount:EMAIL "
        "--role=roles/storage.objectUser"
    )


def _inputs(config: Any) -> Iterator[tuple[str, str]]:
    """(key, path) of the files that the run reads."""
    for key, holder in (("data", getattr(config, "data", None)), ("pairs", getattr(config, "pairs", None))):
        if holder is None:
            continue
        sources = {"train": holder.train, "eval": getattr(holder, "eval", None)} | dict(
            getattr(holder, "tests", {})
        )
        for name, source in sources.items():
            if source is not None and source.kind in ("jsonl", "parquet", "arrayrecord"):
                absolute = "://" in source.path or Path(source.path).is_absolute() or not holder.root
                yield f"{key}.{name}.path", source.path if absolute else f"{holder.root}/{source.path}"
    for name, reward in getattr(config, "rewards", {}).items():
        if reward.model is not None:
            yield f"rewards.{name}.model", reward.model


# ---- services --------------------------------------------------------------------------------------------------


def services(config: Any, here: Here) -> Found:
    """Keys of endpoints, and the labelling service."""
    findings = []
    for name, endpoint in config.endpoints.items():
        variable, file = endpoint.api_key_env, endpoint.api_key_file
        if variable and not here.environ.get(variable) and not config.labeling.url:
            what = f"the key of endpoint `{name}` is to be in {variable}, which is not set"
            findings.append(
                Finding("fails", "services", what, f"export {variable}=..., or remove the endpoint")
            )
        if file and not Path(file).expanduser().is_file():
            what = f"the key of endpoint `{name}` is to be in {file}, which is not there"
            findings.append(Finding("fails", "services", what, "write it, with mode 600"))
        if endpoint.gguf and not Path(endpoint.gguf).expanduser().is_file() and "/" in endpoint.gguf:
            findings.append(
                Finding(
                    "fails", "services", f"endpoint `{name}`: there is no file {endpoint.gguf}", "correct it"
                )
            )
    url, token = config.labeling.url, config.labeling.token_env
    if url is None:
        return {}, findings
    if token and not here.environ.get(token):
        what = f"the token of the labelling service is to be in {token}, which is not set"
        findings.append(Finding("fails", "services", what, f"export {token}=..."))
    problem = _health(url)
    if problem:
        what = f"the labelling service at {url} does not answer: {problem}"
        findings.append(
            Finding(
                "fails", "services", what, "start it (laif serve labels), and open its port to this machine"
            )
        )
    return {"labelling": url}, findings


def _health(url: str) -> str:
    """What is wrong with a labelling service, or ""."""
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/health", timeout=5) as answer:
            json.load(answer)
    except (urllib.error.URLError, OSError, ValueError) as error:
        return str(getattr(error, "reason", error))
    return ""
