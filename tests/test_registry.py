"""Names become classes, and wrong names become hints."""

from collections import OrderedDict

import pytest

from dml import errors
from dml.errors import ConfigError, DmlError, MissingExtra
from dml.registry import resolve

TABLE = {"ordered": "collections:OrderedDict", "plain": dict}


def test_a_known_name_becomes_its_class_whether_given_as_path_or_as_class() -> None:
    assert resolve("mapping", "ordered", TABLE) is OrderedDict
    assert resolve("mapping", "plain", TABLE) is dict


def test_an_import_path_of_the_user_works_like_a_name() -> None:
    assert resolve("mapping", "collections:Counter", TABLE).__name__ == "Counter"


def test_a_misspelt_name_gets_the_nearest_known_one_and_all_others() -> None:
    with pytest.raises(ConfigError) as caught:
        resolve("mapping", "orderd", TABLE)
    assert 'Unknown mapping "orderd". Did you mean "ordered"? Known: ordered, plain.' in str(caught.value)


def test_an_import_path_that_leads_nowhere_says_where_it_ends() -> None:
    with pytest.raises(ConfigError, match='no module "no_such_package.losses"'):
        resolve("loss", "no_such_package.losses:Mine", TABLE)
    with pytest.raises(ConfigError, match='has no "Countr".*Did you mean "collections:Counter"'):
        resolve("loss", "collections:Countr", TABLE)


def tree() -> list[type[DmlError]]:
    found, todo = [], [DmlError]
    while todo:
        here = todo.pop()
        found.append(here)
        todo += here.__subclasses__()
    return found


def test_the_picture_at_the_top_of_errors_names_every_error() -> None:
    own = {e.__name__ for e in tree() if e.__module__ == "dml.errors"}
    assert own <= set(errors.__doc__.split())
    assert {e.exit_code for e in tree()} <= {1, 2, 3, 4}


def test_a_missing_engine_names_the_command_that_installs_it() -> None:
    assert 'pip install "dml[cpu]"' in str(MissingExtra("faiss", "cpu"))
