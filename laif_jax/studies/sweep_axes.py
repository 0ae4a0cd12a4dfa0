"""`laif sweep`: from `key=[...]` to the points of a sweep, each a checked configuration."""

import dataclasses
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from laif_jax.config import StudyConfig, load_config
from laif_jax.config.load import ConfigError, describes, parse_override, takes_list
from laif_jax.records import content_id

# One folder and one labelling service are of the whole sweep.
FIXED = ("name", "out", "scale", "labeling", "seeds")
# Last parts of keys whose values shape the compiled program. Other numbers are its arguments, or never reach it.
STATIC = (
    *("batch_size", "micro_batch", "max_length", "max_prompt_length", "packing", "max_new_tokens", "samples"),
    *("members", "reduction", "loss", "b1", "b2", "eps", "decay", "momentum"),
)


@dataclasses.dataclass(frozen=True)
class Axis:
    """A key and the values that it takes, as plain YAML."""

    key: str
    values: tuple[Any, ...]

    @property
    def recompiles(self) -> bool:
        """Whether its values are compiled in: shapes, architecture, optimiser, kind of loss."""
        parts = self.key.split(".")
        named = len(parts) > 1 and parts[-2] == "optimizer" and parts[-1] == "name"
        return parts[0] in ("model", "mesh") or named or parts[-1] in STATIC


@dataclasses.dataclass(frozen=True)
class Point:
    """One setting of all axes.

    Attributes:
      values: by key. config: the study's, resolved.
    """

    values: Mapping[str, Any]
    config: StudyConfig

    @property
    def setting(self) -> dict[str, Any]:
        """The values without the seed: points of one setting are its replicates."""
        return {key: value for key, value in self.values.items() if key != "seed"}

    @property
    def label(self) -> str:
        return label_of(self.values)

    @property
    def folder(self) -> str:
        """A name for its results that every file system takes."""
        name = re.sub(r"[^\w.=,+-]+", "_", self.label.replace(", ", ","))
        return name if len(name) <= 80 else f"{name[:60]}-{content_id(self.label)[:12]}"


def label_of(values: Mapping[str, Any]) -> str:
    """ "dpo.beta=0.1, seed=2"; "as configured" if there is nothing to tell."""
    return ", ".join(f"{key}={_text(value)}" for key, value in values.items()) or "as configured"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def read_axes(config_path: str, arguments: Sequence[str]) -> tuple[list[Axis], list[str]]:
    """The axes among the arguments, and the overrides that all points share.

    An axis is a list for a key that does not itself take one; for one that does, a list of lists.

    Raises:
      ConfigError: there is no axis, an axis is empty, given twice, or of a key that a sweep holds fixed.
    """
    if (kind := describes(config_path)) is not StudyConfig:
        raise ConfigError(
            f"{config_path}: `laif sweep` runs the points of a study (`laif run`), and this file is a {kind.__name__}"
        )
    lists = [text for text in arguments if _is_axis(text)]
    shared = [text for text in arguments if text not in lists]
    axes: list[Axis] = []
    for text in lists:
        path, values = parse_override(text)
        key = ".".join(path)
        if path[0] in FIXED:
            why = "give the values of `seed`" if path[0] == "seeds" else "give it one value"
            raise ConfigError(f"axis `{key}`: the whole sweep shares it; {why}")
        if not values:
            raise ConfigError(f"axis `{key}`: it has no values")
        if key in [axis.key for axis in axes]:
            raise ConfigError(f"axis `{key}`: it is given twice")
        axes.append(Axis(key, _unique(values)))
    if not axes:
        raise ConfigError("give at least one axis, for example seed=[0,1,2,3]; for one setting, `laif run`")
    return axes, shared


def _is_axis(text: str) -> bool:
    """Whether `key=[...]` gives several values: a list for a key that takes none, a list of lists for one that does."""
    path, value = parse_override(text)
    if not isinstance(value, list):
        return False
    return not takes_list(StudyConfig, path) or (bool(value) and all(isinstance(v, list) for v in value))


def _unique(values: Sequence[Any]) -> tuple[Any, ...]:
    """The values in their order, each once."""
    return tuple({json.dumps(value, sort_keys=True): value for value in values}.values())


def make_points(
    config_path: str, axes: Sequence[Axis], shared: Sequence[str], *, paired: bool = False
) -> list[Point]:
    """All combinations of the axes' values; `paired`: the first values together, then the second, ...

    Raises:
      ConfigError: paired axes of different lengths; or what is wrong with a value, with the axis it is of.
    """
    lengths = {axis.key: len(axis.values) for axis in axes}
    if paired and len(set(lengths.values())) > 1:
        shown = ", ".join(f"{key} has {count}" for key, count in lengths.items())
        raise ConfigError(f"--zip pairs the values of all axes, which must be equally many: {shown}")
    rows = zip(*[axis.values for axis in axes]) if paired else itertools.product(*[a.values for a in axes])
    points = []
    for row in rows:
        values = {axis.key: value for axis, value in zip(axes, row, strict=True)}
        overrides = [f"{key}={json.dumps(value)}" for key, value in values.items()]
        try:
            config = load_config(config_path, [*shared, *overrides])
        except ConfigError as error:
            raise ConfigError(f"point `{label_of(values)}`: {error}") from error
        points.append(Point(values, config))
    return points
