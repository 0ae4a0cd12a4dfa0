"""From a YAML file and `key=value` overrides to a checked, frozen `StudyConfig`.

Order of precedence: schema defaults < the YAML file < `scales.<scale>` of the file < overrides. Every mistake is
reported before anything is loaded, as `file: dotted.key: what is wrong (nearest valid name)`.
"""

import difflib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import pydantic
import yaml
from etils import epath

from laif_jax.config.endpoints import EndpointList, EndpointSpec
from laif_jax.config.label import LabelConfig
from laif_jax.config.schema import (
    ArmSpec,
    CompileConfig,
    CriticSpec,
    PpoConfig,
    RewardConfig,
    RunConfig,
    StudyConfig,
)
from laif_jax.records.errors import LaifError


class ConfigError(LaifError, ValueError):
    """A configuration that cannot be used; the message names the file, the dotted key and the nearest valid name."""


class _UniqueKeyLoader(yaml.SafeLoader):
    """Refuses a key that is given twice in one mapping (plain YAML silently keeps the last), and reads 1e-6 as a
    number (YAML 1.1 wants 1.0e-6 and would give a string)."""


def _construct_mapping(loader: yaml.SafeLoader, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
    seen = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if key in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key `{key}` is given twice", key_node.start_mark
            )
        seen.add(key)
    return yaml.SafeLoader.construct_mapping(loader, node, deep)


def _construct_number(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> Any:
    value = loader.construct_scalar(node)
    try:
        return float(value) if "e" in value.lower() and value[:1] in "+-.0123456789" else value
    except ValueError:
        return value


_UniqueKeyLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _construct_mapping)
_UniqueKeyLoader.add_constructor("tag:yaml.org,2002:str", _construct_number)


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_UniqueKeyLoader)  # a subclass of SafeLoader
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not valid YAML: {error}") from error


# ---- overrides -------------------------------------------------------------------------------------------------


def parse_override(text: str) -> tuple[list[str], Any]:
    """`"a.b=3"` -> (["a", "b"], 3). The value is read as YAML, so lists and numbers work.

    Raises:
      ConfigError: there is no "=" or the key is empty.
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip() or any(not part for part in key.split(".")):
        raise ConfigError(
            f"override `{text}`: write it as key=value, for example sft.optimizer.learning_rate=1e-5"
        )
    return key.strip().split("."), _parse_yaml(value, f"override `{text}`")


def _set_path(tree: dict[str, Any], path: Sequence[str], value: Any, where: str) -> None:
    node: Any = tree
    for depth, part in enumerate(path[:-1]):
        if isinstance(node, list):
            node = node[_list_index(node, part, path[:depth], where)]
            continue
        if node.get(part) is None:
            node[part] = {}
        node = node[part]
        if not isinstance(node, dict | list):
            raise ConfigError(f"{where}: `{'.'.join(path[: depth + 1])}` is a value, not a group of keys")
    if isinstance(node, list):
        node[_list_index(node, path[-1], path[:-1], where)] = value
    else:
        node[path[-1]] = value


def _list_index(items: list[Any], part: str, path: Sequence[str], where: str) -> int:
    if part.isdigit() and int(part) < len(items):
        return int(part)
    raise ConfigError(
        f"{where}: `{'.'.join(path)}` is a list of {len(items)}: use an index from 0 to {len(items) - 1}"
    )


def _merge(base: dict[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    """Deep merge; `extra` wins. Lists are replaced whole."""
    merged = dict(base)
    for key, value in extra.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, Mapping) else value
    return merged


# ---- loading ---------------------------------------------------------------------------------------------------


Config = TypeVar("Config", bound=RunConfig)
Model = TypeVar("Model", bound=pydantic.BaseModel)


@typing.overload
def load_config(path: str | epath.Path, overrides: Iterable[str] = ()) -> StudyConfig: ...
@typing.overload
def load_config(path: str | epath.Path, overrides: Iterable[str], schema: type[Config]) -> Config: ...
def load_config(
    path: str | epath.Path, overrides: Iterable[str] = (), schema: type[RunConfig] = StudyConfig
) -> RunConfig:
    """Reads, merges and checks a configuration file.

    Args:
      path: a YAML file.
      overrides: "dotted.key=value" strings; list items are addressed by index ("arms.0.share=0.2").
      schema: what the file describes: a study, or one run of `laif reward` or `laif ppo`.

    Raises:
      ConfigError: anything that is wrong, all mistakes in one message.
    """
    return validate(_resolve(path, overrides), str(path), schema)


def load_label_config(path: str | epath.Path, overrides: Iterable[str] = ()) -> LabelConfig:
    """The same for a file of `laif label run`."""
    return _model(LabelConfig, _resolve(path, overrides), str(path))


def load_endpoints(path: str | epath.Path) -> dict[str, EndpointSpec]:
    """The section `endpoints` of a YAML file, a study's for example; its other sections are not looked at."""
    tree = _resolve(path, ())
    found = {"endpoints": tree["endpoints"]} if "endpoints" in tree else {}
    return _model(EndpointList, found, str(path)).endpoints


def labels_pairs(path: str | epath.Path) -> bool:
    """Whether a file is one of `laif label run`, by the section `endpoint` that only those have."""
    path = epath.Path(path)
    tree = _parse_yaml(path.read_text(), str(path)) if path.exists() else None
    return isinstance(tree, dict) and "endpoint" in tree


def _resolve(path: str | epath.Path, overrides: Iterable[str]) -> dict[str, Any]:
    """A file's tree, merged with its scale and the overrides."""
    path = epath.Path(path)
    if not path.exists():
        near = difflib.get_close_matches(
            path.name, [p.name for p in path.parent.glob("*.yaml")], n=1, cutoff=0.4
        )
        hint = f" Did you mean {path.parent / near[0]}?" if near else ""
        raise ConfigError(f"{path}: no such file.{hint}")
    tree = _parse_yaml(path.read_text(), str(path))
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: a mapping of keys is expected, found {type(tree).__name__}")

    parsed = [parse_override(text) for text in overrides]
    asked = next((value for key, value in reversed(parsed) if key == ["scale"]), None)
    scale = asked or tree.get("scale", "default")
    scales = tree.pop("scales", None) or {}
    # A saved, resolved configuration names its scale but has no `scales`: they are merged into it already.
    if scale != "default" and (scales or asked):
        if scale not in scales:
            known = ", ".join(["default", *scales])
            raise ConfigError(
                f"{path}: scale: there is no scale `{scale}`; known: {known}{_nearest(str(scale), scales)}"
            )
        tree = _merge(tree, scales[scale] or {})
    for key, value in parsed:
        _set_path(tree, key, value, f"override `{'.'.join(key)}`")
    return tree


def describes(path: str | epath.Path) -> type[RunConfig]:
    """Which schema a file is of, by the section that only its kind has: `pairs` of `laif reward`, `rewards` of
    `laif ppo`; without any section of a study, shapes for `laif compile`; else a study. A file that cannot be read is
    a study's, whose loading says what is wrong."""
    path = epath.Path(path)
    tree = _parse_yaml(path.read_text(), str(path)) if path.exists() else None
    keys = set(tree) if isinstance(tree, dict) else set()
    if "pairs" in keys:
        return RewardConfig
    if "rewards" in keys:
        return PpoConfig
    studies = {"data", "teachers", "evaluation", "arms", "matrix", "pretrain"}
    return CompileConfig if "model" in keys and not keys & studies else StudyConfig


@typing.overload
def validate(tree: Mapping[str, Any], where: str) -> StudyConfig: ...
@typing.overload
def validate(tree: Mapping[str, Any], where: str, schema: type[Config]) -> Config: ...
def validate(tree: Mapping[str, Any], where: str, schema: type[RunConfig] = StudyConfig) -> RunConfig:
    """Checks a plain tree of values against the schema, then the names that refer to each other."""
    config = _model(schema, tree, where)
    if isinstance(config, StudyConfig):
        try:
            expand_arms(config)
        except pydantic.ValidationError as error:  # the listed arms are valid: one that `matrix` makes is not
            lines = [_describe(item, ArmSpec) for item in error.errors()]
            raise ConfigError("\n".join(f"{where}: matrix: {line}" for line in lines)) from error
    problems = list(_problems(config))
    if problems:
        raise ConfigError("\n".join(f"{where}: {line}" for line in problems))
    return config


def _model(schema: type[Model], tree: Mapping[str, Any], where: str) -> Model:
    try:
        return schema.model_validate(tree)
    except pydantic.ValidationError as error:
        lines = [_describe(item, schema) for item in error.errors()]
        raise ConfigError("\n".join(f"{where}: {line}" for line in lines)) from error


def dump_config(config: RunConfig) -> str:
    """The resolved configuration, defaults included, as YAML that `load_config` reads back to an equal value."""
    return yaml.safe_dump(config.resolved(), sort_keys=False, allow_unicode=True)


# ---- messages --------------------------------------------------------------------------------------------------


def _nearest(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f"; did you mean `{near[0]}`?" if near else ""


def _describe(item: Any, root: type[pydantic.BaseModel]) -> str:
    """One pydantic error as `dotted.key: message`."""
    key = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        schema = _schema_at(root, item["loc"][:-1])
        fields = list(schema.model_fields) if schema else []
        hint = _nearest(str(item["loc"][-1]), fields)
        return f"{key}: unknown key{hint or '; valid here: ' + ', '.join(fields)}"
    if item["type"] == "missing":
        return f"{key}: this key is required"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "value_error":
        return f"{key}: {message}" if key else message
    hint = ""
    if item["type"] == "literal_error":
        hint = _nearest(
            str(item["input"]),
            str(item["ctx"]["expected"]).replace("'", "").replace(" or ", ", ").split(", "),
        )
    return f"{key}: {message} (found {item['input']!r}){hint}"


def _schema_at(schema: type[pydantic.BaseModel], path: Sequence[Any]) -> type[pydantic.BaseModel] | None:
    """The model class found by following `path` through annotations (optional, dict and tuple items included)."""
    current: Any = schema
    for part in path:
        if isinstance(current, type) and issubclass(current, pydantic.BaseModel):
            if part not in current.model_fields:
                return None
            current = _strip(current.model_fields[part].annotation)
        else:  # a container: step to the type of its items
            arguments = [a for a in typing.get_args(current) if a is not Ellipsis]
            current = _strip(arguments[-1]) if arguments else None
    return current if isinstance(current, type) and issubclass(current, pydantic.BaseModel) else None


def takes_list(schema: type[pydantic.BaseModel], path: Sequence[str]) -> bool:
    """Whether the value of a dotted key is itself a list. False for a key that is not there."""
    parent = _schema_at(schema, path[:-1])
    if parent is None or path[-1] not in parent.model_fields:
        return False
    return typing.get_origin(_strip(parent.model_fields[path[-1]].annotation)) in (tuple, list)


def _strip(annotation: Any) -> Any:
    """Removes `| None` and Annotated."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        annotation = next(a for a in typing.get_args(annotation) if a is not type(None))
    if typing.get_origin(annotation) is typing.Annotated:
        annotation = typing.get_args(annotation)[0]
    return annotation


def _known(key: str, name: str, known: Iterable[str], kind: str) -> Iterable[str]:
    """A name that points to nothing."""
    known = list(known)
    if name not in known:
        yield f"{key}: there is no {kind} `{name}`; known: {', '.join(known) or 'none'}{_nearest(name, known)}"


def _problems(config: RunConfig) -> Iterable[str]:
    """What no single section can see: names that point to nothing, sections that are missing or have no effect."""
    for name, critic in config.critics.items():
        yield from _voices(f"critics.{name}", critic, config.endpoints)
    if isinstance(config, StudyConfig):
        yield from _study_problems(config)
        yield from _arm_problems(config)
    elif not isinstance(config, CompileConfig) and config.model.source == "scratch":
        yield "model.source: a run of its own starts from existing weights: give a folder, a .gguf file or a name"
    if isinstance(config, PpoConfig):
        for name, source in config.rewards.items():
            if source.critic is not None:
                yield from _known(f"rewards.{name}.critic", source.critic, config.critics, "critic")
        if config.ppo.sweep is not None:
            yield "ppo.sweep: has an effect in a study only; run `laif ppo` once per setting"
    if isinstance(config, PpoConfig | StudyConfig):
        yield from _symbols_problems(config)


def _voices(key: str, critic: CriticSpec, endpoints: Iterable[str]) -> Iterable[str]:
    """The endpoints of all critics that are asked for one label."""
    yield from _known(f"{key}.endpoint", critic.endpoint, endpoints, "endpoint")
    for number, voice in enumerate(critic.ensemble):
        yield from _known(f"{key}.ensemble.{number}.endpoint", voice.endpoint, endpoints, "endpoint")
    if critic.strong:
        yield from _known(f"{key}.strong.endpoint", critic.strong.endpoint, endpoints, "endpoint")


def _symbols_problems(config: "PpoConfig | StudyConfig") -> Iterable[str]:
    symbols = "symbols" in (config.data.train.kind, config.data.eval.kind)
    if symbols and config.data.symbols is None:
        yield "data.symbols: `kind: symbols` needs the world's settings here"
    if not symbols and config.data.symbols is not None:
        yield "data.symbols: has no effect; no source has `kind: symbols`"


def _study_problems(config: StudyConfig) -> Iterable[str]:
    for name, teacher in config.teachers.items():
        if teacher.endpoint:
            yield from _known(f"teachers.{name}.endpoint", teacher.endpoint, config.endpoints, "endpoint")
    yield from _voices("evaluation.judge", config.evaluation.judge, config.endpoints)
    yield from _known("evaluation.reference", config.evaluation.reference, config.teachers, "teacher")
    names = [arm.name for arm in expand_arms(config)]
    for index, question in enumerate(config.questions):
        yield from _known(f"questions.{index}.laif", question.laif, names, "arm")
        yield from _known(f"questions.{index}.sft", question.sft, names, "arm")
    symbols = "symbols" in (config.data.train.kind, config.data.eval.kind)
    if config.pretrain is not None and (config.model.source != "scratch" or not symbols):
        yield "pretrain: has an effect only with `model.source: scratch` and a source of `kind: symbols`"
    for key, sampling in (("sampling", config.sampling), ("evaluation.sampling", config.evaluation.sampling)):
        if sampling.samples != 1:
            yield (
                f"{key}.samples: has no effect; the study takes two samples per prompt for `policy_vs_policy`, "
                "and one everywhere else. Remove it"
            )


# What each way of learning reads, beside what all arms read.
SECTIONS: Mapping[str, tuple[str, ...]] = {
    "none": (),
    "dpo": ("dpo",),
    "ppo": ("reward", "ppo"),
    "iterated_dpo": ("dpo", "iterate"),
    "iterated_ppo": ("reward", "ppo", "iterate"),
    "best_of_n": ("reward", "best_of_n"),
    "rejection_sampling": ("reward", "rejection_sampling"),
}


def arm_sections(arm: ArmSpec) -> tuple[str, ...]:
    """The optional sections of a study that an arm reads."""
    if arm.optimize == "ppo" and arm.reward == "critic":
        return ("ppo",)
    return SECTIONS[arm.optimize]


def _arm_problems(config: StudyConfig) -> Iterable[str]:
    for index, arm in enumerate(config.arms):
        yield from _known(f"arms.{index}.teacher", arm.teacher, config.teachers, "teacher")
        if arm.critic:
            yield from _known(f"arms.{index}.critic", arm.critic, config.critics, "critic")
        for section in arm_sections(arm):
            if getattr(config, section) is None:
                yield f"arms.{index}.optimize: `{arm.optimize}` needs the section `{section}`"
    if config.matrix:
        for teacher in config.matrix.teachers:
            yield from _known("matrix.teachers", teacher, config.teachers, "teacher")
        for critic in config.matrix.critics:
            yield from _known("matrix.critics", critic, config.critics, "critic")
        if config.matrix.critics:
            needed = {section: name for name in config.matrix.optimize for section in SECTIONS[name]}
            for section, name in needed.items():
                if getattr(config, section) is None:
                    yield f"matrix.critics: arms with `optimize: {name}` need the section `{section}`"
    arms = expand_arms(config)
    if not arms:
        yield "arms: give `arms` or `matrix`; there is nothing to run"
    names = [arm.name for arm in arms]
    for name in {n for n in names if names.count(n) > 1}:
        yield f"arms: the name `{name}` is given twice"
    used = {section for arm in arms for section in arm_sections(arm)}
    for section in ("dpo", "reward", "ppo", "best_of_n", "rejection_sampling", "iterate"):
        if getattr(config, section) is not None and section not in used:
            users = [name for name, sections in SECTIONS.items() if section in sections]
            yield f"{section}: has no effect; no arm has `optimize: {'` or `'.join(users)}`"
    yield from _iterate_problems(config, arms)
    direct = any(arm.optimize == "ppo" and arm.reward == "critic" for arm in arms)
    values = config.ppo is not None and config.ppo.learns_values and config.ppo.value == "separate"
    if direct and values and config.ppo and config.ppo.value_init == "reward":
        yield "ppo.value_init: an arm with `reward: critic` has no reward model to start from; use `policy`"


def _iterate_problems(config: StudyConfig, arms: Sequence[ArmSpec]) -> Iterable[str]:
    """A budget that does not divide over the rounds."""
    spec = config.iterate
    if spec is None:
        return
    used = {section for arm in arms if arm.optimize.startswith("iterated") for section in arm_sections(arm)}
    budgets = (
        ("dpo.steps", config.dpo.steps if config.dpo and "dpo" in used else None),
        ("ppo.iterations", config.ppo.iterations if config.ppo and "ppo" in used else None),
    )
    for key, count in budgets:
        if count is not None and count < spec.rounds:
            yield f"{key}: {count} do not divide over {spec.rounds} `iterate.rounds`; the rounds share them"


def expand_arms(config: StudyConfig) -> list[ArmSpec]:
    """All arms: those listed, then those of the matrix (SFT on each teacher and share; LAIF from the smallest share).

    Names: "sft-<teacher>-<percent>" and "laif-<teacher>-<critic>-<pairs>-<optimize>", the last two where there are
    several.
    """
    arms = list(config.arms)
    if config.matrix:
        matrix = config.matrix
        for teacher in matrix.teachers:
            for share in sorted(matrix.shares):
                arms.append(
                    ArmSpec(name=f"sft-{teacher}-{share:.0%}".replace("%", ""), teacher=teacher, share=share)
                )
        for teacher in matrix.teachers:
            for critic in matrix.critics:
                for pairs in matrix.pairs:
                    for optimize in matrix.optimize:
                        suffix = "" if len(matrix.pairs) == 1 else "-" + pairs.split("_vs_")[1]
                        suffix += "" if len(matrix.optimize) == 1 else "-" + optimize
                        arms.append(
                            ArmSpec(
                                name=f"laif-{teacher}-{critic}{suffix}",
                                teacher=teacher,
                                share=min(matrix.shares),
                                optimize=optimize,
                                critic=critic,
                                pairs=pairs,
                            )
                        )
    return arms
