"""A node's configuration: what is right is read, what is wrong is refused by name."""

from pathlib import Path

import pytest

from csvfs.config import CONFIG_SIZE_MAX, Options, load_config, option_rows, parse_config
from csvfs.errors import BadRequest, NotFound
from csvfs.fault_domains import NOWHERE, Place

MINIMAL = 'node = "n1"\naddress = "10.77.0.1"\nstore = "embedded:/var/lib/csvfs/store.db"\n'
HERE = Path("/etc/csvfs/node.toml")


def test_three_lines_are_enough() -> None:
    config = parse_config(MINIMAL.encode(), HERE)
    assert (config.node, config.place, config.address) == ("n1", NOWHERE, "10.77.0.1")
    assert (config.drive_server_port, config.coordinator_port) == (7001, 7002)
    assert config.cluster_root == Path("/clusterstorage")
    assert config.liveness_path == Path("/run/csvfs/liveness")
    assert config.options == Options()


def test_the_file_may_say_where_the_node_stands() -> None:
    config = parse_config((MINIMAL + 'site = "dc1"\nrack = "r-7"\nchassis = ""\n').encode(), HERE)
    assert config.place == Place("dc1", "r-7")
    for wrong in ('rack = 7', 'rack = "a/b"', 'rack = "-"', 'domain = "r1"'):
        with pytest.raises(BadRequest, match=r"rack|domain"):
            parse_config((MINIMAL + wrong + "\n").encode(), HERE)


def test_the_file_is_found_by_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "node.toml"
    path.write_text(MINIMAL + "port_base = 8000\n[options]\nheartbeat_ms = 250\n")
    monkeypatch.setenv("CSVFS_CONFIG", str(path))
    config = load_config()
    assert (config.path, config.port_base, config.options.heartbeat_ms) == (path, 8000, 250)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('node = "n1"', "address"),
        ("node = 7", "node"),
        ("node =", "not TOML"),
        ("\xff", "not TOML"),
        (MINIMAL.replace("n1", "../n1"), "'../n1'"),
        (MINIMAL.replace("10.77.0.1", "10.77.0.256"), "10.77.0.256"),
        (MINIMAL + "port_base = 70000", "port_base is 70000"),
        (MINIMAL + "port_base = true", "whole number"),
        (MINIMAL + "colour = 3", "'colour'"),
        (MINIMAL + 'run_dir = "run"', "absolute"),
        (MINIMAL + f'run_dir = "/{"x" * 90}"', "run_dir"),
        (MINIMAL + "options = 3", "table"),
        (MINIMAL + "[options]\nhartbeat_ms = 100", "'hartbeat_ms'"),
        (MINIMAL + "[options]\nheartbeat_ms = 1", "between 50 and 10000"),
        (MINIMAL + "[options]\nheartbeat_ms = 2600", "never serves"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line_that_names_it(text: str, named: str) -> None:
    with pytest.raises(BadRequest, match=named) as caught:
        parse_config(text.encode("latin-1"), HERE)
    assert str(HERE) in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_or_huge_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="CSVFS_CONFIG"):
        load_config(tmp_path / "absent.toml")
    (tmp_path / "huge.toml").write_bytes(b"#" * (CONFIG_SIZE_MAX + 1))
    with pytest.raises(BadRequest, match="larger"):
        load_config(tmp_path / "huge.toml")


def test_every_option_explains_itself_and_its_default_lies_in_its_range() -> None:
    for row in option_rows():
        assert row["low"] <= row["default"] <= row["high"], row["name"]
        assert row["unit"] and row["why"] and row["help"]
