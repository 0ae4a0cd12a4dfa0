"""From a YAML file and `key=value` overrides to a checked, frozen `StudyConfig`.

Order of precedence: schema defaults < the YAML file < `scales.<scale>` of the file < overrides. Every mistake is
reported before anything is loaded, as `file: dotted.key: what is wrong (nearest valid name)`.
"""

import difflib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pydantic
import yaml
from etils import epath

from laif_jax.config.schema import ArmSpec, StudyConfig
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


def load_config(path: str | epath.Path, overrides: Iterable[str] = ()) -> StudyConfig:
    """Reads, merges and checks a study's configuration.

    Args:
      path: a YAML file.
      overrides: "dotted.key=value" strings; list items are addressed by index ("arms.0.share=0.2").

    Raises:
      ConfigError: anything that is wrong, all mistakes in one message.
    """
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
    return validate(tree, str(path))


def validate(tree: Mapping[str, Any], where: str) -> StudyConfig:
    """Checks a plain tree of values against the schema, then the names that refer to each other."""
    try:
        config = StudyConfig.model_validate(tree)
    except pydantic.ValidationError as error:
        lines = [_describe(item) for item in error.errors()]
        raise ConfigError("\n".join(f"{where}: {line}" for line in lines)) from error
    try:
        expand_arms(config)
    except pydantic.ValidationError as error:  # the listed arms are valid: one that `matrix` makes is not
        lines = [_describe(item) for item in error.errors()]
        raise ConfigError("\n".join(f"{where}: matrix: {line}" for line in lines)) from error
    problems = list(_dangling_names(config))
    if problems:
        raise ConfigError("\n".join(f"{where}: {line}" for line in problems))
    return config


def dump_config(config: StudyConfig) -> str:
    """The resolved configuration, defaults included, as YAML that `load_config` reads back to an equal value."""
    return yaml.safe_dump(config.resolved(), sort_keys=False, allow_unicode=True)


# ---- messages --------------------------------------------------------------------------------------------------


def _nearest(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return f"; did you mean `{near[0]}`?" if near else ""


def _describe(item: Any) -> str:
    """One pydantic error as `dotted.key: message`."""
    key = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        schema = _schema_at(StudyConfig, item["loc"][:-1])
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


def _strip(annotation: Any) -> Any:
    """Removes `| None` and Annotated."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        annotation = next(a for a in typing.get_args(annotation) if a is not type(None))
    if typing.get_origin(annotation) is typing.Annotated:
        annotation = typing.get_args(annotation)[0]
    return annotation


def _dangling_names(config: StudyConfig) -> Iterable[str]:
    """Names that point to nothing: teachers, critics, endpoints, arms."""

    def check(key: str, name: str, known: Iterable[str], kind: str) -> Iterable[str]:
        known = list(known)
        if name not in known:
            yield f"{key}: there is no {kind} `{name}`; known: {', '.join(known) or 'none'}{_nearest(name, known)}"

    for name, teacher in config.teachers.items():
        if teacher.endpoint:
            yield from check(f"teachers.{name}.endpoint", teacher.endpoint, config.endpoints, "endpoint")
    critics = {f"critics.{name}": critic for name, critic in config.critics.items()}
    for key, critic in {**critics, "evaluation.judge": config.evaluation.judge}.items():
        yield from check(f"{key}.endpoint", critic.endpoint, config.endpoints, "endpoint")
    yield from check("evaluation.reference", config.evaluation.reference, config.teachers, "teacher")
    for index, arm in enumerate(config.arms):
        yield from check(f"arms.{index}.teacher", arm.teacher, config.teachers, "teacher")
        if arm.critic:
            yield from check(f"arms.{index}.critic", arm.critic, config.critics, "critic")
        if arm.optimize == "dpo" and config.dpo is None:
            yield f"arms.{index}.optimize: `dpo` needs the section `dpo`"
    if config.matrix:
        for teacher in config.matrix.teachers:
            yield from check("matrix.teachers", teacher, config.teachers, "teacher")
        for critic in config.matrix.critics:
            yield from check("matrix.critics", critic, config.critics, "critic")
        if config.matrix.critics and config.dpo is None:
            yield "matrix.critics: arms with a critic need the section `dpo`"
    if not expand_arms(config):
        yield "arms: give `arms` or `matrix`; there is nothing to run"
    names = [arm.name for arm in expand_arms(config)]
    for name in {n for n in names if names.count(n) > 1}:
        yield f"arms: the name `{name}` is given twice"
    for index, question in enumerate(config.questions):
        yield from check(f"questions.{index}.laif", question.laif, names, "arm")
        yield from check(f"questions.{index}.sft", question.sft, names, "arm")
    symbols = "symbols" in (config.data.train.kind, config.data.eval.kind)
    if symbols and config.data.symbols is None:
        yield "data.symbols: `kind: symbols` needs the world's settings here"
    if not symbols and config.data.symbols is not None:
        yield "data.symbols: has no effect; no source has `kind: symbols`"
    if config.pretrain is not None and (config.model.source != "scratch" or not symbols):
        yield "pretrain: has an effect only with `model.source: scratch` and a source of `kind: symbols`"
    for key, sampling in (("sampling", config.sampling), ("evaluation.sampling", config.evaluation.sampling)):
        if sampling.samples != 1:
            yield (
                f"{key}.samples: has no effect; the study takes two samples per prompt for `policy_vs_policy`, "
                "and one everywhere else. Remove it"
            )
    if config.dpo is not None and not any(arm.optimize == "dpo" for arm in expand_arms(config)):
        yield "dpo: has no effect; no arm has `optimize: dpo`"


def expand_arms(config: StudyConfig) -> list[ArmSpec]:
    """All arms: those listed, then those of the matrix (SFT on each teacher and share; LAIF from the smallest share).

    Names: "sft-<teacher>-<percent>" and "laif-<teacher>-<critic>-<pairs>".
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
