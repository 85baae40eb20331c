"""Recipes: every key is checked, every default is in one place, every message says what to do."""

from pathlib import Path

import pytest
import tomli_w

from dml.config import Part, Recipe, load_recipe, parse_recipe, recipe_names, recipe_tree
from dml.errors import ConfigError


@pytest.mark.parametrize("name", recipe_names())
def test_every_bundled_recipe_is_valid_and_says_what_it_is(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.loss.name
    folder = Path(__file__).parent.parent / "dml" / "recipes"
    assert (folder / f"{name}.toml").read_text().startswith("# ")


def test_an_empty_recipe_is_the_defaults() -> None:
    assert parse_recipe({}, "nothing") == Recipe()


def test_the_effective_recipe_reads_back_as_itself(tmp_path: Path) -> None:
    recipe = load_recipe("cbml_iaa_ccloss", {"train.epochs": "7", "data.source": '"2024"'})
    path = tmp_path / "recipe.toml"
    path.write_text(tomli_w.dumps(recipe_tree(recipe)))
    assert load_recipe(path) == recipe


def test_overrides_are_read_as_toml_and_else_as_text() -> None:
    recipe = load_recipe(
        "multi_similarity",
        {
            "train.epochs": "3",
            "train.learning_rate": "1e-4",
            "model.trunk": "resnet18",
            "loss.args.beta": "40",
        },
    )
    assert recipe.train.epochs == 3
    assert recipe.train.learning_rate == pytest.approx(1e-4)
    assert recipe.model.trunk == "resnet18"
    assert recipe.loss == Part("multi_similarity", {"beta": 40})


def test_an_unknown_key_is_refused_with_the_nearest_known_one() -> None:
    with pytest.raises(ConfigError, match=r'train\.epoch: unknown key\. Did you mean "epochs"'):
        parse_recipe({"train": {"epoch": 3}}, "x.toml")
    with pytest.raises(ConfigError, match=r'los: unknown key\. Did you mean "loss"'):
        parse_recipe({"los": {"name": "triplet"}}, "x.toml")


def test_every_problem_is_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_recipe({"train": {"epochs": "many"}, "model": {"dimension": 3}}, "x.toml")
    assert "train.epochs" in str(caught.value)
    assert "model.dimension" in str(caught.value)
    assert "x.toml" in str(caught.value)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"train": {"classes_per_batch": 1}}, "no pairs to compare"),
        ({"train": {"epochs": 0}}, "epochs must be at least 1, got 0"),
        ({"train": {"seed": -1}}, "seed must be at least 0, got -1"),
        ({"train": {"steps_per_epoch": -1}}, "steps_per_epoch must be at least 0"),
        ({"train": {"weight_decay": float("nan")}}, "weight_decay must be at least 0, got nan"),
        ({"train": {"momentum": 2}}, "momentum must be between 0 and 1"),
        ({"data": {"workers": -1}}, "workers must be at least 0"),
        ({"data": {"validation_share": 1.0}}, "between 0 and 1"),
        ({"data": {"validation_share": 0.6, "test_share": 0.5}}, "leave nothing to train on"),
        ({"model": {"pretrained": True, "weights": "a.safetensors"}}, "either pretrained"),
        ({"model": {"dim": 1}}, "dim must be at least 2"),
        ({"regularizers": {"channel_correlation": {"weight": 0.1}}}, "set model.attention"),
    ],
)
def test_values_that_do_not_fit_together_are_refused_with_the_reason(tree: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_recipe(tree, "x.toml")


def test_a_recipe_that_is_not_there_is_named_with_its_neighbours(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match='Did you mean "cbml"'):
        load_recipe("cmbl")
    with pytest.raises(ConfigError, match="There is no recipe file"):
        load_recipe(tmp_path / "mine.toml")


def test_a_file_that_is_not_toml_is_refused_with_the_place(tmp_path: Path) -> None:
    path = tmp_path / "broken.toml"
    path.write_text("[train\nepochs = 3")
    with pytest.raises(ConfigError, match="is not valid TOML.*line 1"):
        load_recipe(path)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"loss.nme": "3", "model.dim": "64"},
            r"^--set loss.nme=3 does not go with the recipe triplet:\n  loss.nme",
        ),
        ({"train.epochs": "0"}, r"^--set train.epochs=0 does .*\n  train: epochs must be at least 1"),
        ({"regularizers.channel_correlation.weight": "1"}, r"^What --set says .*\n  the regulariser"),
    ],
)
def test_what_an_override_breaks_is_blamed_on_it(overrides: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe("triplet", overrides)


def test_what_was_wrong_before_is_blamed_on_the_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('[loss]\nname = "triplet"\nmargn = 1\n')
    with pytest.raises(ConfigError, match=r"mine.toml is not a valid recipe:\n  loss.margn"):
        load_recipe(path, {"train.epochs": "3"})


def test_an_override_through_a_value_is_refused() -> None:
    with pytest.raises(ConfigError, match='"loss" is a value|"name" is a value'):
        load_recipe("triplet", {"loss.name.more": "1"})


def test_a_folder_called_like_a_recipe_does_not_hide_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cbml").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_recipe("cbml").loss.name == "contrastive_bayesian"
