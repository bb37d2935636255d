"""The page of input kinds says what the bundle does."""

from __future__ import annotations

import pytest

import input_kinds


def test_the_page_of_input_kinds_is_what_a_run_gives(tmp_path):
    """Line by line, so that a change shows as the kind whose treatment it changed."""
    written, found = (text.splitlines() for text in (input_kinds.PAGE.read_text(encoding="utf-8"), input_kinds.page(tmp_path)))
    changed = [line for line in found if line not in written]
    assert changed == [], "python tests/input_kinds.py writes the page anew"
    assert found == written


def test_a_profile_is_what_a_colour_management_takes_for_one():
    """Else converting by it would change nothing, and the page would say so."""
    from PIL import Image, ImageCms

    red = Image.new("RGB", (1, 1), (200, 50, 50))
    for name in input_kinds.SPACES:
        profile = ImageCms.ImageCmsProfile(input_kinds.io.BytesIO(input_kinds.icc_profile(name)))
        assert ImageCms.getProfileDescription(profile).strip() == name
        converted = ImageCms.profileToProfile(red, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
        assert converted.getpixel((0, 0))[0] > 210  # the space is wider: its red is a stronger one


@pytest.mark.parametrize("seen", ["laid onto black", "twice as bright"])
def test_what_nobody_has_a_word_for_is_no_row(monkeypatch, seen):
    cat = input_kinds.pictures()["PNG, colours with alpha"]
    black = input_kinds.Image.new("RGB", (48, 32))
    monkeypatch.setattr(
        input_kinds.inference, "decode", lambda data: black if seen.endswith("black") else black.point(lambda _: 255)
    )
    with pytest.raises(AssertionError, match="none of the ways"):
        input_kinds.what_becomes_of_a_picture(cat)
