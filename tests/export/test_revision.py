"""Which commit of a hub model a bundle was made of."""

from __future__ import annotations

from pathlib import Path

from mpa_edge.export.merged import _revision


def test_a_hub_models_commit_is_the_name_of_its_folder_in_the_cache(tmp_path: Path) -> None:
    folder = tmp_path / "models--me--model" / "snapshots" / "0123abcd"
    folder.mkdir(parents=True)
    assert _revision(folder) == "0123abcd"
    (tmp_path / "link").symlink_to(folder)
    assert _revision(tmp_path / "link") == "0123abcd"
    assert _revision(tmp_path) is None
