"""Every choice of every group composes and builds, and the config files and the classes name the same keys."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.types import RunMode
from omegaconf import OmegaConf

from pruneexp.cli.build import build, located
from pruneexp.cli.compose import SECTIONS, compose, compose_raw, composed, open_hydra
from pruneexp.cli.sweep_jobs import JobComposer, job_overrides
from pruneexp.conf_files import (
    YamlLoader,
    choices,
    conf_folder,
    first_comment,
    key_comments,
    sweep_files,
    typed_keys,
    typed_value,
)
from pruneexp.types import ConfigError
from tests.cases import each
from tests.composing import PARTNERS, composer, job_configs, mandatory

GROUPS = [path.name for path in sorted(conf_folder().iterdir()) if path.is_dir()]
FILES = [*sorted(conf_folder().rglob("*.yaml")), *sweep_files().values()]
OPTIONS = [(group, option) for group in GROUPS for option in choices(conf_folder() / group)]
RECIPES = {
    "magnitude": ("magnitude", "one_shot", "ul_um", "none"),
    "wanda_sp": ("wanda_sp", "one_shot", "ul_um", "none"),
    "flap": ("flap", "one_shot", "al_am", "bias"),
    "flap_official": ("flap_official", "flap_official", "al_am_official", "flap_official"),
    "llm_pruner": ("taylor", "one_shot", "llm_pruner", "none"),
    "mini_llm": ("mini_llm", "one_shot", "uniform", "none"),
    "shortgpt": ("block_influence", "one_shot", "blocks", "none"),
    "sleb": ("loss_drop", "one_shot", "greedy", "none"),
    "policy_gradient": ("wanda_sp", "one_shot", "policy_gradient", "none"),
    "llm_bip": ("llm_bip", "one_shot", "uniform", "none"),
    "ifso": ("ifso", "one_shot", "ranking", "none"),
    "blockpruner": ("loss_drop", "one_shot", "blockpruner", "none"),
    "2ssp": ("activation_norm", "one_shot", "two_stage", "none"),
    "cfsp": ("cfsp", "one_shot", "cfsp", "none"),
    "slimllm": ("slimllm", "one_shot", "slimllm", "linear_regression"),
    "best": ("obs", "one_shot", "evolutionary", "least_squares"),
}


def overrides(group: str, option: str) -> list[str]:
    choice = f"{group}=[{option}]" if group == "evaluator" else f"{group}={option}"
    partner = [PARTNERS[option]] if option in PARTNERS else []
    return [choice, *partner, *mandatory(group, option, 1)]


def targets(node: Any, key: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    if isinstance(node, Mapping):
        if "_target_" in node:
            yield key, node
        for name, value in node.items():
            yield from targets(value, f"{key}.{name}".lstrip("."))


@pytest.mark.slow
@each("group, option", OPTIONS)
def test_every_option_builds_and_names_the_fields_of_its_class(group: str, option: str) -> None:
    job = composer().job(overrides(group, option))
    build(job)
    for key, node in targets(job.config):
        parameters = inspect.signature(located(node["_target_"], key)).parameters
        assert set(node) - {"_target_"} == set(parameters), key
        defaults = [name for name, each in parameters.items() if each.default is not inspect.Parameter.empty]
        assert not defaults, f"{key}: defaults live in conf/, not in Python"


@each("group, option", OPTIONS)
def test_every_option_says_what_it_is(group: str, option: str) -> None:
    assert first_comment(conf_folder() / group / f"{option}.yaml")


@each("path", FILES)
def test_hydra_sees_the_package_header(path: Path) -> None:
    # Hydra reads headers up to the first other line, and silently ignores one below it.
    lines = path.read_text().splitlines()
    assert not [line for line in lines[1:] if line.startswith("# @package")]


@each("path", FILES)
def test_config_files_are_read_as_hydra_reads_them(path: Path) -> None:
    expected = OmegaConf.to_container(OmegaConf.load(path))
    actual = yaml.load(path.read_text(), YamlLoader) or {}
    assert actual == expected and repr(actual) == repr(expected)  # 1 is no 1.0


def test_what_was_typed_is_read_without_hydras_signs() -> None:
    typed = ["recipe=flap", "+run.name=a=b", "++dataset.seed=1", "~tracker", "dataset.seed=2", "dataset@x=c4"]
    assert typed_keys(typed) == {"recipe", "run.name", "dataset.seed", "tracker", "dataset@x"}
    assert [typed_value(typed, key) for key in ("run.name", "dataset.seed", "dataset")] == ["a=b", "2", None]


def test_the_default_config_is_the_main_job() -> None:
    composed = compose([])
    assert set(composed.config) == {*SECTIONS, "asked"}
    assert composed.job["recipe"] == "flap" and composed.job["sweep"] is None and composed.job["overrides"] == []
    assert set(composed.config["evaluator"]) == {"perplexity", "size", "latency"}
    assert composed.config["sparsity"]["ratio"] == 0.2
    experiment = build(composed)
    assert experiment.run.prove == "process" and experiment.run.dir is None and experiment.seed == 0


@each("recipe", RECIPES)
def test_a_recipe_selects(recipe: str) -> None:
    chosen = composer().job([f"recipe={recipe}"]).job["choices"]
    assert tuple(chosen[group] for group in ("criterion", "sparsity", "search", "compensator")) == RECIPES[recipe]


@each("path", sorted((conf_folder() / "recipe").glob("*.yaml")))
def test_a_recipe_only_selects_and_names_no_model_and_no_data(path: Path) -> None:
    content = yaml.safe_load(path.read_text())
    assert set(content) == {"defaults"}
    groups = [key.removeprefix("override /") for entry in content["defaults"] for key in entry]
    assert not {"model", "dataset"} & set(groups)


@pytest.mark.slow
@each("recipe, choice", itertools.product(RECIPES, ["search=global", "criterion=magnitude"]))
def test_what_is_typed_wins_over_a_recipe_in_any_order(recipe: str, choice: str) -> None:
    first, second = composer().job([f"recipe={recipe}", choice]), composer().job([choice, f"recipe={recipe}"])
    assert first.config == second.config
    group, _, option = choice.partition("=")
    selected = dict(zip(("criterion", "sparsity", "search", "compensator"), RECIPES[recipe], strict=True))
    assert first.job["choices"].items() >= {**selected, group: option}.items()


@each("name", sweep_files())
def test_every_sweep_says_how_to_run_it(name: str) -> None:
    assert f"+sweep={name}" in first_comment(sweep_files()[name])


def test_comments_of_nested_keys_are_found(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text('# what\na: 1  # one\nb:\n  a: "x # y"\n  c: null  # three\nd:\n  c: 2\n')
    assert key_comments(path)["a"] == "one"
    assert key_comments(path)["b.c"] == "three"
    assert key_comments(path)["d.c"] == ""


def test_a_missing_choice_is_answered() -> None:
    with pytest.raises(ConfigError, match=r"^search is missing: expected one of al_am, "):
        build(compose(["~search"]))


TYPED = [
    ["sparsity.ratio=0.1,0.2", "criterion=flap,magnitude", "recipe=flap", "seed=0,1"],
    ["recipe=flap,best", "sparsity.ratio=range(0.1,0.5,0.2)", "run.name='a, ${seed} $b'"],
    ["search=uniform,global", "search.granularity=[heads],[channels]", "search.min_units=1,2"],
    ["criterion.metric=WIFV,IFV", "+model.note=x", "~dataset.seed", "dataset.samples=4,8"],
    ["run.name=${hydra:job.override_dirname}", "sparsity.ratio=0.1,0.3"],
    ["run={dir: null, name: a, overwrite: false, save: true, prove: off, dry: false}", "run.name=b,c"],
    ["hydra.job.name=a", "dataset.seed=${seed}", "seed=1,2", "sweep.dir=here"],
]


@pytest.mark.slow
@each("typed", TYPED)
def test_jobs_are_composed_as_hydra_composes_them(typed: list[str]) -> None:
    hydra = open_hydra()
    config = compose_raw(hydra, ["hydra.mode=MULTIRUN", *typed], RunMode.MULTIRUN)
    jobs = list(job_configs(hydra, config))
    expected = [composed(hydra.config_loader.load_sweep_config(config, o)) for o in job_overrides(hydra, config)]
    assert len(jobs) > 1 and jobs == expected


@pytest.mark.slow
def test_a_job_with_a_mistake_is_told_as_a_single_run_would_be() -> None:
    hydra = open_hydra()
    config = compose_raw(hydra, ["hydra.mode=MULTIRUN", "seed=0,1"], RunMode.MULTIRUN)
    jobs = JobComposer(hydra, config)
    jobs.job(["seed=0", "sparsity.ratio=0.2"])
    for mistake in ("sparsity.ration=0.2", "sparsity=one_shit", "dataset.=1"):
        with pytest.raises(ConfigError) as alone:
            compose(["seed=0", mistake])
        with pytest.raises(ConfigError) as as_job:
            jobs.job(["seed=0", mistake])
        assert str(as_job.value) == str(alone.value)
