"""Paths of volumes: what lies below a volume that is not mounted is not taken for what lies in it."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from csvfs.admin.volume_paths import find_in_volume
from csvfs.errors import BadRequest, NotFound


async def test_a_file_below_a_volume_that_is_not_mounted_or_elsewhere_is_refused(tmp_path: Path) -> None:
    config = SimpleNamespace(cluster_root=tmp_path)
    (tmp_path / "Volume1").mkdir()
    (tmp_path / "Volume1/file").touch()
    for text, error, why in (
        (f"{tmp_path}/Volume1/file", NotFound, "is not mounted"),
        (f"{tmp_path}/Volume1/none", NotFound, "No such file"),
        ("/etc/passwd", BadRequest, "is not below"),
        ("relative", BadRequest, "is not below"),
    ):
        with pytest.raises(error, match=why):
            await find_in_volume(config, text)  # type: ignore[arg-type]
