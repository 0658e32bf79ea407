"""What a scan keeps for the next one, damaged: the same pictures, or a line that says what to delete."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from mpa_edge.config import AlignConfig
from mpa_edge.errors import RunError
from mpa_edge.run_folder import RunFolder
from mpa_edge.scan import find_pictures


def found(config: AlignConfig, run: RunFolder) -> list[str]:
    with find_pictures(config, run) as pictures:
        return [sample.sha256 for sample in pictures.samples()]


def test_a_cut_cache_gives_the_same_pictures_or_says_what_to_delete(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for number in range(30):
        Image.new("RGB", (32, 32), (number, 0, 0)).save(tmp_path / "images" / f"{number}.png")
    run = RunFolder(tmp_path / "run")
    images = str(tmp_path / "images")
    config = AlignConfig(images=images, teacher="fake:", student="fake:", task="reference", out=run.path)
    wanted, cache = found(config, run), run.path / ".scan.sqlite"
    whole, told = cache.read_bytes(), list[str]()
    for size in range(0, len(whole), len(whole) // 12):
        cache.write_bytes(whole[:size])
        try:
            assert found(config, run) == wanted
        except RunError as error:
            told.append(str(error))
            cache.unlink()
            assert found(config, run) == wanted
    assert told
    for line in told:
        assert line.startswith(f"{cache} is damaged (")
        assert "Delete it, and type the same command again" in line
