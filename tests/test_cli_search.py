"""`dml search` with filters, groups and examples."""

import json

import pytest
import typer
from typer.testing import CliRunner

from dml.cli.search import search
from dml.collection import open_collection
from dml.collection.build import build_collection
from dml.encoder import Encoder
from dml.errors import FilterInvalid, UnknownItem, UsageError


@pytest.fixture(scope="module")
def shop(tiny_folder, tiny_encoder, tmp_path_factory):
    """A collection of the tiny folder; item n of each class costs n."""
    path = tmp_path_factory.mktemp("search") / "shop"
    build_collection(tiny_folder, path, encoder=Encoder.load(tiny_encoder, runtime="onnx"), kind="flat")
    with open_collection(path) as there:
        for kind in range(6):
            for number in range(8):
                there.update_payload(f"class_{kind}/{number}.jpg", {"price": number})
    return path


@pytest.fixture
def run(shop):
    """run(arguments…) -> what is printed; our own errors are raised as they are."""
    app = typer.Typer()
    app.command()(search)

    def run(*arguments):
        result = CliRunner().invoke(app, [str(shop), *map(str, arguments)])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.stdout

    return run


def found(text):
    return json.loads(text)["hits"]


def test_conditions_are_typed_as_people_type_them(run, tiny_folder):
    picture = tiny_folder / "class_2" / "4.jpg"
    hits = found(run(picture, "--where", "label=class_2", "--where", "price<3", "--json"))
    assert {hit["id"] for hit in hits} == {f"class_2/{n}.jpg" for n in range(3)}
    hits = found(run(picture, "-k", "100", "--where", "label!=class_2", "--json"))
    assert len(hits) == 40
    tree = {"should": [{"key": "price", "match": {"any": [1, 2]}}]}
    both = run(picture, "--filter", json.dumps(tree), "--where", "label=class_0", "--json")
    assert {hit["id"] for hit in found(both)} == {"class_0/1.jpg", "class_0/2.jpg"}
    assert (json.loads(both)["total"], json.loads(both)["total_is_exact"]) == (2, True)
    assert "Nothing was found" in run(picture, "--where", "label=none")


def test_results_are_grouped(run, tiny_folder):
    picture = tiny_folder / "class_2" / "4.jpg"
    hits = found(run(picture, "-k", "3", "--group-by", "label", "--group-size", "2", "--json"))
    assert [hit["group"] for hit in hits[:2]] == ["class_2", "class_2"]
    assert len({hit["group"] for hit in hits}) == 3
    lines = run(picture, "-k", "2", "--group-by", "price").splitlines()
    assert lines[0].split() == ["#", "score", "group", "label", "id"]
    assert lines[1].split() == ["1", "1.0000", "4", "class_2", "class_2/4.jpg"]


def test_examples_stand_in_for_a_picture_or_beside_it(run, tiny_folder, tmp_path):
    hits = found(run("--positive", "class_1/0.jpg", "--positive", "class_1/1.jpg", "--json"))
    assert not {"class_1/0.jpg", "class_1/1.jpg"} & {hit["id"] for hit in hits}
    picture = tiny_folder / "class_2" / "4.jpg"
    away = found(run(picture, "--negative", "class_3/0.jpg", "-k", "100", "--json"))
    assert len(away) == 47
    plain = {hit["id"]: hit["score"] for hit in found(run(picture, "-k", "100", "--json"))}
    assert {hit["id"]: hit["score"] for hit in away}["class_3/1.jpg"] < plain["class_3/1.jpg"]
    run("--positive", "class_1/0.jpg", "-k", "2", "--html", tmp_path / "found.html")
    page = (tmp_path / "found.html").read_text()
    assert page.count("<img") == 2
    assert "Like class_1/0.jpg" in page


def test_what_cannot_be_asked_is_said(run, tiny_folder):
    picture = tiny_folder / "class_2" / "4.jpg"
    with pytest.raises(UsageError, match="--positive"):
        run()
    with pytest.raises(UsageError, match="not valid JSON"):
        run(picture, "--filter", "{must: 1}")
    with pytest.raises(FilterInvalid, match="/must/0"):
        run(picture, "--filter", '{"must": [1]}')
    with pytest.raises(FilterInvalid, match="price<cheap"):
        run(picture, "--where", "price<cheap")
    with pytest.raises(FilterInvalid, match="KEY=VALUE") as malformed:
        run(picture, "--where", "label")
    assert malformed.value.exit_code == 2, "as for JSON that cannot be read"
    with pytest.raises(UsageError, match="--group-size 3 .* give --group-by"):
        run(picture, "--group-size", "3")
    with pytest.raises(UsageError, match="is a folder, and no picture"):
        run(tiny_folder)
    with pytest.raises(UnknownItem, match="nobody"):
        run("--positive", "nobody")
