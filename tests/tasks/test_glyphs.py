"""Stand-ins: the published sets' shapes, the same images always, a task that can be learnt."""

from dataclasses import replace

import torch

from amalgam.tasks import cache, glyphs

SMALL = replace(glyphs._STAND_INS["mnist"], train=300, validation=50)


def test_mnists_stand_in_has_mnists_shape() -> None:
    train, validation = glyphs.load("mnist")
    for (images, labels), count in ((train, 60_000), (validation, 10_000)):
        assert images.shape == (count, 1, 28, 28)
        assert images.dtype == torch.uint8
        assert labels.dtype == torch.int64
        assert (labels.bincount() / count - 0.1).abs().max() < 0.02
        assert (images.min(), images.max()) == (0, 255)
    assert glyphs.load("mnist")[0][0] is train[0]


def test_drawing_depends_on_nothing_else() -> None:
    torch.manual_seed(0)
    first = glyphs._drawn(SMALL)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert cache.checksum(glyphs._drawn(SMALL)) == cache.checksum(first)
    assert torch.equal(torch.get_rng_state(), state)


def test_no_validation_image_was_seen_in_training() -> None:
    made = glyphs._drawn(replace(SMALL, noise=0.0))
    train, validation = made["train-images"], made["validation-images"]
    both = torch.cat([train, validation]).flatten(1)
    assert len(both.unique(dim=0)) == len(both)


def test_every_face_shows_every_character_whole() -> None:
    for face in SMALL.faces:
        ink = glyphs._rendered(face, SMALL.characters)
        assert (ink.amax((1, 2)) > 0.9).all()
        edge = torch.cat([ink[:, [0, -1]].flatten(1), ink[..., [0, -1]].flatten(1)], 1)
        assert edge.max() == 0  # so none was cut
        assert len(ink.flatten(1).unique(dim=0)) == len(SMALL.characters)
