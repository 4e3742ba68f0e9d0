"""The floor check finds what it is there to find, and nothing in this checkout."""

import importlib.util
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

import pytest

TOP = Path(__file__).resolve().parent.parent


def load_check_floors() -> ModuleType:
    loader = SourceFileLoader("check_floors", str(TOP / "tools" / "check_floors"))
    spec = importlib.util.spec_from_loader("check_floors", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


check_floors = load_check_floors()


def make_house(top: Path, **sources: str) -> Path:
    """A checkout with one file per keyword: `csvfs__net__link="import os"`."""
    for name, source in sources.items():
        path = top.joinpath(*name.split("__")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return top


def test_this_checkout_stands_on_its_floors() -> None:
    found, _, count = check_floors.check_tree(TOP)
    assert found == []
    assert count > 10


@pytest.mark.parametrize(
    ("module", "source", "reason"),
    [
        ("csvfs__net__link", "from csvfs.block.bus import Bus", "above it"),
        ("csvfs__net__link", "def late():\n    import csvfs.volume.layout", "above it"),
        ("csvfs__net__link", "from ..block import bus", "above it"),
        ("csvfs__net__link", "from csvfs import mount", "above it"),
        ("csvfs__net__link", "import importlib\nimportlib.import_module('csvfs.admin.cli')", "above it"),
        ("csvfs__net__link", "from csvfs.store.interface import Item", "beside it"),
        ("csvfs__block__bus", "from csvfs.cluster import membership", "beside it"),
        ("csvfs__cluster__liveness", "from csvfs.cluster.election import decide", "above it"),
        ("csvfs__mount__process", "from csvfs.admin.lab import lab_up", "above it"),
        ("csvfs__admin__node_run", "import coordinator.host", "on the wire only"),
        ("coordinator__host", "from csvfs.mount.process import main", "beside it"),
        ("csvfs__wire__frames", "import trio", "does no I/O"),
        ("csvfs__errors", "from csvfs.wire.frames import Frame", "above it"),
        ("csvfs__cellar__wine", "import os", "has no floor"),
        ("csvfs__net__link", "from csvfs.cellar import wine", "has no floor"),
        ("csvfs__net__link", "def (", "does not parse"),
    ],
)
def test_an_import_that_does_not_point_down_is_found(
    tmp_path: Path, module: str, source: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    house = make_house(tmp_path, **{module: source})
    assert check_floors.main([str(house)]) == 1
    assert reason in capsys.readouterr().err


def test_imports_that_point_down_or_stay_in_their_room_pass(tmp_path: Path) -> None:
    house = make_house(
        tmp_path,
        csvfs__units="from csvfs.errors import BadRequest",
        csvfs__net__link="import trio\nfrom csvfs.net.engine import Engine\nfrom csvfs.wire import frames",
        csvfs__block__bus="from . import drive\nfrom csvfs.cluster.liveness import Liveness\nfrom csvfs.net.link import Link",
        coordinator__host="from coordinator.metadata import Metadata\nfrom csvfs.volume.layout import Layout",
        csvfs__admin__cli="from csvfs.mount import channel\nimport click",
    )
    assert check_floors.main([str(house)]) == 0


def test_great_length_is_a_warning_and_no_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long_function = "def f():\n" + "    pass\n" * 80
    house = make_house(tmp_path, csvfs__net__link=long_function + "x = 1\n" * 600)
    assert check_floors.main([str(house)]) == 0
    warnings = capsys.readouterr().err
    assert "f has 81 lines" in warnings
    assert "681 lines" in warnings


def test_an_empty_folder_is_a_usage_error_and_no_success(tmp_path: Path) -> None:
    assert check_floors.main([str(tmp_path)]) == 2
    assert check_floors.main(["a", "b"]) == 2
