"""Stand-ins: the published sets' shapes, the same images always, glyphs that are whole."""

from dataclasses import replace
from pathlib import Path

import matplotlib
import pytest
import torch

from amalgam.tasks import cache, glyphs
from amalgam.tasks.published import PUBLISHED

SMALL = {name: replace(of, train=300, validation=50) for name, of in glyphs._STAND_INS.items()}


def test_mnists_stand_in_has_mnists_shape() -> None:
    train, validation = glyphs.load("mnist")
    for (images, labels), count in ((train, 60_000), (validation, 10_000)):
        assert images.shape == (count, 1, 28, 28)
        assert images.dtype == torch.uint8
        assert labels.dtype == torch.int64
        assert (labels.bincount() / count - 0.1).abs().max() < 0.02
        assert (images.min(), images.max()) == (0, 255)
    assert glyphs.load("mnist")[0][0] is train[0]


@pytest.mark.skipif(matplotlib.__version__ != "3.11.2", reason="its fonts' edges are of 3.11.2")
def test_the_checksum_is_the_documented_one() -> None:
    parts = zip(("train", "validation"), glyphs.load("mnist"), strict=True)
    kept = {}
    for part, (images, labels) in parts:
        kept |= {f"{part}-images": images, f"{part}-labels": labels.to(torch.uint8)}
    documentation = Path(__file__).parents[2] / "docs" / "tasks.md"
    assert f"| `{cache.checksum(kept)}` |" in documentation.read_text(encoding="utf-8")


def test_each_published_set_has_a_stand_in_of_its_shape() -> None:
    assert glyphs._STAND_INS.keys() == PUBLISHED.keys()
    for name, of in PUBLISHED.items():
        stand_in = glyphs._STAND_INS[name]
        assert (stand_in.train, stand_in.validation) == of.counts
        assert len(set(stand_in.characters)) == len(stand_in.characters) == of.classes
        made = glyphs._drawn(SMALL[name])
        assert made["train-images"].shape == (300, *of.shape)
        assert made["validation-images"].shape == (50, *of.shape)
        assert made["train-images"].dtype == torch.uint8
        assert made["train-images"].float().std() > 20
        assert made["train-labels"].max() < of.classes


def test_letters_of_two_sets_differ() -> None:
    assert not set(SMALL["fmnist"].characters) & set(SMALL["kmnist"].characters)


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_drawing_depends_on_nothing_else(name: str) -> None:
    torch.manual_seed(0)
    first = glyphs._drawn(SMALL[name])
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert cache.checksum(glyphs._drawn(SMALL[name])) == cache.checksum(first)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ["mnist", "svhn"])
def test_no_validation_image_was_seen_in_training(name: str) -> None:
    made = glyphs._drawn(replace(SMALL[name], noise=0.0))
    both = torch.cat([made["train-images"], made["validation-images"]]).flatten(1)
    assert len(both.unique(dim=0)) == len(both)


@pytest.mark.parametrize("name", SMALL)
def test_every_face_shows_every_character_whole(name: str) -> None:
    of = SMALL[name]
    for face in of.faces:
        ink = glyphs._rendered(face, of.characters)
        assert (ink.amax((1, 2)) > 0.5).all()
        edge = torch.cat([ink[:, [0, -1]].flatten(1), ink[..., [0, -1]].flatten(1)], 1)
        assert edge.max() == 0  # so none was cut
        assert len(ink.flatten(1).unique(dim=0)) == len(of.characters)


def test_a_change_of_the_drawing_is_another_file(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("AMALGAM_CACHE", str(tmp_path))
    for of in (SMALL["mnist"], replace(SMALL["mnist"], noise=0.1)):
        monkeypatch.setitem(glyphs._STAND_INS, "mnist", of)
        (images, _), _ = glyphs.load("mnist")
        assert torch.equal(images, glyphs._drawn(of)["train-images"])
    assert len(list(tmp_path.iterdir())) == 2
