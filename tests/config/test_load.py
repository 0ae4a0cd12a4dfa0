"""Configuration: what is accepted, what is refused and in which words."""

import copy
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from laif_jax.config import (
    ConfigError,
    StudyConfig,
    dump_config,
    expand_arms,
    load_config,
    parse_override,
    validate,
)
from laif_jax.config.load import describes

BASE = {
    "name": "t",
    "model": {"source": "scratch", "tokenizer": "symbols", "scratch": {}},
    "data": {
        "train": {"kind": "symbols", "limit": 10},
        "eval": {"kind": "symbols", "limit": 5},
        "symbols": {},
    },
    "endpoints": {"mind": {"provider": "simulated", "simulated": {}}},
    "teachers": {"weak": {"endpoint": "mind"}, "strong": {"endpoint": "mind"}},
    "critics": {"strong": {"endpoint": "mind"}},
    "sft": {"steps": 3},
    "dpo": {"steps": 2},
    "evaluation": {"judge": {"endpoint": "mind"}, "reference": "strong"},
    "arms": [
        {"name": "sft", "teacher": "strong", "share": 1.0},
        {"name": "laif", "teacher": "weak", "share": 0.1, "optimize": "dpo", "critic": "strong"},
    ],
}


@pytest.fixture
def path(tmp_path):
    def write(**changes):
        tree = copy.deepcopy(BASE) | changes
        file = tmp_path / "study.yaml"
        file.write_text(yaml.safe_dump(tree))
        return file

    return write


def test_loads_and_round_trips(path):
    config = load_config(path(), ["sft.optimizer.learning_rate=1e-6", "arms.1.share=0.25", "seed=7"])
    assert config.sft.optimizer.learning_rate == 1e-6
    assert config.arms[1].share == 0.25
    assert validate(yaml.safe_load(dump_config(config)), "again") == config
    assert yaml.safe_load(dump_config(config))["sft"]["optimizer"]["b1"] == 0.9, "defaults are written out"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("sft.optimizer.lerning_rate=1", ["sft.optimizer.lerning_rate", "unknown key", "learning_rate"]),
        ("sft.steps=many", ["sft.steps", "integer", "many"]),
        ("arms.1.teacher=weeak", ["arms.1.teacher", "weeak", "did you mean `weak`"]),
        ("arms.0.critic=strong", ["arms.0", "`critic` has no effect", "optimize: none"]),
        ("dpo.label_smoothing=0.1", ["dpo", "`label_smoothing` has no effect", "conservative and robust"]),
        ("dpo.gamma=0.5", ["`gamma` has no effect", "simpo"]),
        ("sft.optimizer.momentum=0.9", ["`momentum` has no effect", "adamw", "rmsprop"]),
        ("endpoints.mind.base_url=http://x", ["`base_url` has no effect", "simulated"]),
        ("dpo.loss=sigmoyd", ["dpo.loss", "did you mean `sigmoid`"]),
        ("scale=cpu", ["there is no scale `cpu`"]),
        ("evaluation.agreement_limit=5", ["`agreement_limit` has no effect"]),
        ("sft.epochs=2", ["give one of `epochs` and `steps`"]),
        ("sft.micro_batch=3", ["8 is not a multiple of `micro_batch` 3"]),
        ("arms.1.share=1.0", ["leaves no prompts for preferences"]),
        ("sampling={temperature: 0, top_p: 0.5}", ["sampling", "`top_p` has no effect", "greedy"]),
        ("evaluation.reference=nobody", ["evaluation.reference", "nobody"]),
        ("questions=[{laif: laif, sft: stf}]", ["questions.0.sft", "did you mean `sft`"]),
        ("arms=[]", ["nothing to run"]),
        (
            "data.eval={kind: jsonl, path: x.jsonl, split: test}",
            ["data.eval", "`split` has no effect", "`path`"],
        ),
        ("endpoints.mind.prompt_price=3", ["endpoints.mind", "both of `prompt_price`"]),
        ("sampling.samples=4", ["sampling.samples", "has no effect"]),
        ("evaluation.sampling.samples=2", ["evaluation.sampling.samples", "has no effect"]),
        ("matrix={teachers: [weak], shares: [1.5]}", ["matrix", "share", "less than or equal to 1"]),
        ("matrix={teachers: [weak], shares: [1.0], critics: [strong]}", ["matrix", "leaves no prompts"]),
        ("matrix={teachers: [weak], pairs: [policy_vs_teacher]}", ["matrix", "`pairs` has no effect"]),
        (
            "endpoints.mind.simulated={world: planted, errors: habitual}",
            ["endpoints.mind.simulated", "`errors: habitual` has no effect", "symbols"],
        ),
        ("arms.9.share=1", ["list of 2", "0 to 1"]),
        ("name.x=1", ["`name` is a value"]),
    ],
)
def test_mistakes_are_named(path, override, words):
    file = path()
    with pytest.raises(ConfigError) as error:
        load_config(file, [override])
    for word in words:
        assert word in str(error.value)
    assert str(file) in str(error.value) or "override" in str(error.value)


def test_all_mistakes_at_once(path):
    with pytest.raises(ConfigError) as error:
        load_config(path(), ["sft.stepz=1", "dpo.batch_size=-1"])
    assert "sft.stepz" in str(error.value)
    assert "dpo.batch_size" in str(error.value)


def test_missing_file_names_the_nearest(path):
    file = path()
    with pytest.raises(ConfigError, match=r"study\.yaml"):
        load_config(file.with_name("studdy.yaml"))


def test_a_key_given_twice_is_refused(tmp_path):
    file = tmp_path / "twice.yaml"
    file.write_text("name: a\nname: b\n")
    with pytest.raises(ConfigError, match="given twice"):
        load_config(file)


def test_scales_merge_below_overrides(path):
    file = path(scales={"cpu": {"sft": {"steps": 1}, "dpo": {"steps": 1}}})
    assert load_config(file).sft.steps == 3
    assert load_config(file, ["scale=cpu"]).sft.steps == 1
    config = load_config(file, ["scale=cpu", "sft.steps=9"])
    assert (config.sft.steps, config.dpo.steps, config.scale) == (9, 1, "cpu")
    saved = file.with_name("resolved.yaml")
    saved.write_text(dump_config(config))
    assert load_config(saved) == config, "a saved configuration is not scaled a second time"
    with pytest.raises(ConfigError, match="did you mean `cpu`"):
        load_config(file, ["scale=cpuu"])


def test_an_unused_section_is_refused(path):
    with pytest.raises(ConfigError, match="dpo: has no effect"):
        load_config(path(arms=[BASE["arms"][0]]))


def test_matrix_expands_to_named_arms(path):
    matrix = {"teachers": ["weak", "strong"], "critics": ["strong"], "shares": [1.0, 0.1]}
    config = load_config(path(arms=[], matrix=matrix))
    arms = {arm.name: arm for arm in expand_arms(config)}
    assert list(arms) == [
        "sft-weak-10",
        "sft-weak-100",
        "sft-strong-10",
        "sft-strong-100",
        "laif-weak-strong",
        "laif-strong-strong",
    ]
    assert arms["laif-weak-strong"].share == 0.1


@pytest.mark.parametrize("url", ["http://me:geheim@host/v1", "https://host/v1?key=geheim"])
def test_an_address_with_a_secret_in_it_is_refused_before_it_is_written_anywhere(path, url):
    endpoints = {**BASE["endpoints"], "remote": {"provider": "openai", "base_url": url}}
    with pytest.raises(ConfigError, match="api_key_env") as error:
        load_config(path(endpoints=endpoints))
    assert "geheim" not in str(error.value)


def test_a_matrix_without_teachers_is_nothing_to_run(path):
    with pytest.raises(ConfigError, match="nothing to run"):
        load_config(path(arms=[], dpo=None, matrix={"teachers": []}))


def test_configs_are_frozen(path):
    config = load_config(path())
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3  # type: ignore[misc]


@given(
    st.lists(st.from_regex(r"[a-z_]{1,8}", fullmatch=True), min_size=1, max_size=4),
    st.integers() | st.booleans(),
)
def test_overrides_parse_as_yaml(parts, value):
    assert parse_override(f"{'.'.join(parts)}={value}") == (parts, value)


def test_every_default_is_valid():
    """The schema's own defaults, written out and read back, are accepted: no default is an option without effect."""
    config = StudyConfig.model_validate(BASE)
    assert StudyConfig.model_validate(config.resolved()) == config


# ---- arms beyond DPO -------------------------------------------------------------------------------------------

LAIF = {"teacher": "weak", "share": 0.1, "critic": "strong"}
ROUNDS = {"arms": [{"name": "rounds", "optimize": "iterated_dpo", **LAIF}], "iterate": {"rounds": 3}}


@pytest.mark.parametrize(
    ("changes", "override", "words"),
    [
        (
            {},
            "arms.1.optimize=ppo",
            ["arms.1.optimize", "needs the section `reward`", "needs the section `ppo`"],
        ),
        ({}, "arms.1.optimize=best_of_n", ["needs the section `best_of_n`"]),
        ({}, "arms.1.optimize=iterated_dop", ["arms.1.optimize", "did you mean `iterated_dpo`"]),
        ({}, "iterate={rounds: 2}", ["iterate: has no effect", "`optimize: iterated_dpo` or `iterated_ppo`"]),
        ({}, "best_of_n={n: 4}", ["best_of_n: has no effect"]),
        ({}, "arms.1.reward=critic", ["`reward` has no effect", "`optimize: ppo`"]),
        (ROUNDS, "dpo.steps=2", ["dpo.steps", "2 do not divide over 3"]),
        (ROUNDS, "iterate={labels: human, max_cost: 3}", ["iterate", "`max_cost` has no effect"]),
    ],
)
def test_mistakes_about_arms_are_named(path, changes, override, words):
    steps = {"dpo": {"steps": 3}} if changes else {}
    with pytest.raises(ConfigError) as error:
        load_config(path(**steps, **changes), [override])
    for word in words:
        assert word in str(error.value)


def test_ratings_as_the_reward_need_no_reward_model(path):
    arms = [{"name": "ppo", "optimize": "ppo", "reward": "critic", **LAIF}]
    config = load_config(path(arms=arms, dpo=None, ppo={"value_init": "policy"}))
    assert config.reward is None
    with pytest.raises(ConfigError, match=r"ppo\.value_init.*no reward model to start from"):
        load_config(path(arms=arms, dpo=None, ppo={}))


def test_a_matrix_has_an_arm_for_each_way_to_learn(path):
    matrix = {
        "teachers": ["weak"],
        "shares": [0.1],
        "critics": ["strong"],
        "optimize": ["dpo", "iterated_dpo"],
    }
    config = load_config(path(arms=[], matrix=matrix, iterate={"rounds": 2}))
    assert [arm.name for arm in expand_arms(config)] == [
        "sft-weak-10",
        "laif-weak-strong-dpo",
        "laif-weak-strong-iterated_dpo",
    ]


@pytest.mark.parametrize(
    ("text", "schema"),
    [
        ("pairs: {}", "RewardConfig"),
        ("rewards: {}", "PpoConfig"),
        ("arms: []", "StudyConfig"),
        ("[]", "StudyConfig"),
    ],
)
def test_what_a_file_describes_is_told_by_its_sections(tmp_path, text, schema):
    file = tmp_path / "x.yaml"
    file.write_text(text)
    assert describes(file).__name__ == schema
    assert describes(tmp_path / "none.yaml").__name__ == "StudyConfig"


@pytest.mark.parametrize("name", ["quickstart_rl.yaml", "paper/appendix_ppo.yaml"])
def test_the_shipped_configurations_of_reinforcement_learning_are_valid(name):
    file = Path(__file__).parents[2] / "configs" / name
    scales = yaml.safe_load(file.read_text()).get("scales", {})
    for scale in ["default", *scales]:
        config = load_config(file, [f"scale={scale}"])
        assert {arm.optimize for arm in expand_arms(config)} > {"none"}
