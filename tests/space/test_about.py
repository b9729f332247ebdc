"""The page about the model: the card's words, without its header and without what would be loaded from elsewhere."""

from __future__ import annotations

from pathlib import Path

from modeling_m3ret.space.about import NOTICE, about


def test_a_card_is_shown_without_its_header_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    card = (
        "---\nlicense: mit\n---\n# Model\n\nmAP .5 ![a curve](https://example.org/a.png) ![b][1]\n\n"
        "<img\nsrc='https://example.org/b.png'> end\n\n[1]: https://example.org/c.png\n"
    )
    (tmp_path / "README.md").write_text(card, encoding="utf-8")
    shown = about(str(tmp_path))
    assert shown.startswith(NOTICE + "# Model\n\nmAP .5 [a curve](")
    assert "license" not in shown
    assert "![" not in shown
    assert "<img" not in shown
    assert " end" in shown


def test_a_checkpoint_without_a_card_says_so(tmp_path: Path) -> None:
    assert about(str(tmp_path)) == NOTICE + "The checkpoint comes without a card."
