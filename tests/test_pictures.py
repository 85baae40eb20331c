"""The page of methods: its pictures are what the code draws, its examples run, no part of ours is missing."""

import re
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
torch = pytest.importorskip("torch")

from dml.losses import LOSSES
from dml.training import AUGMENTERS, CLEANERS, MEMORIES, REGULARIZERS
from eval.pictures import (
    PICTURES,
    PLACE,
    attentions,
    draw,
    main,
    memory_step,
    optimised,
)

PAGE = (PLACE.parent / "methods.md").read_text(encoding="utf-8")
# Everything else comes out of a descent, whose last digits differ from one processor to another.
WITHOUT_DESCENT = [name for name in PICTURES if name not in ("contrastive-bayesian", "channel-correlation")]
NUMBER = re.compile(r"-?\d+\.?\d*")


def published(name: str) -> str:
    return (PLACE / f"method-{name}.svg").read_text(encoding="utf-8")


def words(svg: str) -> list[str]:
    return re.findall(r"<text [^>]*>([^<]*)</text>", svg)


def bare(svg: str) -> str:
    """Without numbers, and without the names that are digests of what is drawn."""
    return NUMBER.sub("0", re.sub(r'(id="|href="#|url\(#)[^")]*', r"\1", svg))


# -------- the pictures


@pytest.mark.parametrize("name", WITHOUT_DESCENT)
def test_a_published_picture_is_what_the_code_draws(name: str) -> None:
    old, new = published(name), draw(name)
    renew = "draw it again: python -m eval.pictures"
    assert words(old) == words(new), renew
    assert bare(old) == bare(new), renew
    ends = re.compile(r'(?:id="|href="#|url\(#)[^")]*')
    before, after = ([float(n) for n in NUMBER.findall(ends.sub("", svg))] for svg in (old, new))
    assert after == pytest.approx(before, abs=0.05), renew  # pixels


@pytest.mark.parametrize("name", [name for name in PICTURES if name not in WITHOUT_DESCENT])
def test_a_published_picture_of_a_descent_has_the_words_that_the_code_writes(name: str) -> None:
    assert words(published(name)) == words(draw(name)), "draw it again: python -m eval.pictures"


def test_drawing_twice_gives_the_same_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in (tmp_path / "first", tmp_path / "second"):
        folder.mkdir()
        main(["cross-batch", "triplet", "--out", str(folder)])
    names = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert names == ["method-cross-batch.svg", "method-triplet.svg"]
    for name in names:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    assert len(capsys.readouterr().out.splitlines()) == 4


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_says_what_it_shows_asks_nobody_and_carries_no_date(name: str) -> None:
    svg = published(name)
    assert re.search(r"<title>[^<]{20,}</title>", svg)
    assert set(re.findall(r"https?://[^\s\"']+", svg)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert "date" not in svg
    assert "<metadata" not in svg


# -------- what they show


def test_the_variance_constraint_makes_negatives_alike() -> None:
    before, without = optimised(variance_weight=0)
    _, constrained = optimised(variance_weight=1)
    assert constrained.negative.std() < 0.3 * without.negative.std() < before.negative.std()
    assert constrained.negative.mean() > without.negative.mean()  # its price
    assert without.positive.mean() > before.positive.mean()


def test_channel_correlation_makes_the_attentions_of_a_class_alike_and_those_of_two_differ() -> None:
    before, after = attentions()
    assert after.intra < before.intra
    assert after.inter > 2 * before.inter


def test_every_candidate_of_a_step_is_one_thing_and_older_selves_are_excluded() -> None:
    step = memory_step()
    batch, synthetic, remembered = (part.sum().item() for part in step.excluded.split(step.parts, dim=1))
    assert (batch, synthetic, remembered) == (8, 8, 3)
    assert ((step.positive.int() + step.negative.int() + step.excluded.int()) == 1).all()


# -------- the page


def test_the_page_and_the_folder_name_the_same_pictures() -> None:
    named = set(re.findall(r"\(pictures/method-([\w-]+)\.svg\)", PAGE))
    lying = {path.stem.removeprefix("method-") for path in PLACE.glob("method-*.svg")}
    assert named == lying == set(PICTURES)


OURS = [name for name, path in LOSSES.items() if path.startswith("dml.")]


@pytest.mark.parametrize("name", [*OURS, *CLEANERS, *AUGMENTERS, *MEMORIES, *REGULARIZERS])
def test_every_loss_and_stage_of_ours_has_a_section_with_all_that_a_reader_needs(name: str) -> None:
    [(title, place)] = re.findall(
        rf"^\| \[([^\]]+)\]\(#([\w-]+)\) \| [^|]*\b{name}\b", PAGE, flags=re.MULTILINE
    )
    sections = {
        anchor(head): text for head, text in re.findall(r"^## (.+)\n((?:(?!^## ).*\n)+)", PAGE, re.MULTILINE)
    }
    assert place in sections, f"{title} points to no section"
    for part in ("Idea", "When", "Settings", "Settings that worked", "Pitfalls", "Status"):
        assert f"**{part}.**" in sections[place], f"{title} says nothing of: {part}"
    assert "```\n" in sections[place], f"{title} has no formula"


def anchor(heading: str) -> str:
    """The name of a heading in links, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_the_examples_of_the_page_run() -> None:
    torch.manual_seed(0)
    blocks = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    assert len(blocks) >= 2
    for block in blocks:
        exec(compile(block, "docs/methods.md", "exec"), {})
