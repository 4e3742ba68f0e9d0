"""A machine becomes a node: what is there is kept, what is half there is said, and nothing is overwritten."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from csvfs.admin import cluster_create, cluster_join, node_setup
from csvfs.admin.cli import main
from csvfs.admin.cluster_ca import make_authority
from csvfs.admin.cluster_create import plan_create
from csvfs.admin.join_token import Token, format_token
from csvfs.admin.node_setup import (
    UNIT_NAME,
    Wish,
    install_unit,
    new_directory,
    plan_node,
    put_in_place,
    write_config,
)
from csvfs.errors import BadRequest, Conflict, Exists
from csvfs.store.etcd_http import Endpoint
from csvfs.store.etcd_place import EtcdPlace

WISH = Wish("n1", "10.0.0.1")
TOKEN = format_token(Token((Endpoint("10.0.0.9", 7005),), bytes(32), bytes(8), bytes(32)))


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with nothing on it: its configuration and its state have their places below here."""
    monkeypatch.setenv("CSVFS_CONFIG", str(tmp_path / "etc/node.toml"))
    monkeypatch.setattr(node_setup, "STATE_DIRECTORY", tmp_path / "state")
    monkeypatch.setattr(node_setup, "SYSTEMD_RUNS", tmp_path / "no-systemd")
    for module in (cluster_create, cluster_join):
        monkeypatch.setattr(module, "etcd_program", lambda: "/usr/bin/etcd")
    return tmp_path


def test_a_machine_without_configuration_gets_one_that_says_what_was_wished_for(machine: Path) -> None:
    plan = plan_node(Wish("n1", "10.0.0.1", 7100, is_witness=True))
    write_config(plan)
    found = plan_node(Wish("n1", is_witness=True))
    assert not found.text  # it is there
    config = found.config
    assert (config.node, config.address, config.port_base, config.witness) == ("n1", "10.0.0.1", 7100, True)
    assert found.place.directory == machine / "state/etcd"
    with pytest.raises(Conflict, match="appeared meanwhile"):
        write_config(plan)


@pytest.mark.parametrize(
    ("wish", "says"),
    [
        (Wish("n2"), "says node = 'n1', not 'n2'"),
        (Wish(address="10.0.0.2"), "says address = '10.0.0.1', not '10.0.0.2'"),
        (Wish(port_base=8000), "says port_base = 7000, not 8000"),
        (Wish(is_witness=True), "witness = false"),
    ],
)
def test_a_configuration_that_says_something_else_is_kept_and_named(machine: Path, wish: Wish, says: str) -> None:
    write_config(plan_node(WISH))
    with pytest.raises(Conflict, match=says):
        plan_node(wish)


def test_names_addresses_and_ports_that_cannot_be_are_refused(machine: Path) -> None:
    for wish in (Wish("../n", "10.0.0.1"), Wish("n1", "here"), Wish("n1", "10.0.0.1", 65_530)):
        with pytest.raises(BadRequest):
            plan_node(wish)


def test_a_dry_run_says_what_would_be_made_and_makes_nothing(machine: Path) -> None:
    for argv in (["create", "Tower"], ["join", TOKEN]):
        result = CliRunner().invoke(main, ["cluster", *argv, "--node", "n1", "--address", "10.0.0.1", "--dry-run"])
        assert result.exit_code == 0, result.output
        assert str(machine / "state/etcd") in result.stdout and "node n1 at 10.0.0.1" in result.stdout
    assert list(machine.iterdir()) == []


def test_the_embedded_store_is_for_one_machine_and_stays_as_it_was(machine: Path) -> None:
    (machine / "etc").mkdir()
    (machine / "etc/node.toml").write_text(f'node = "n1"\naddress = "127.0.0.1"\nstore = "embedded:{machine}/store.db"\n')
    for argv in (["create", "Tower", "--store", "etcd"], ["join", TOKEN]):
        result = CliRunner().invoke(main, ["cluster", *argv])
        assert result.exit_code == 1 and "serves nodes on one machine" in result.stderr
    result = CliRunner().invoke(main, ["cluster", "create", "Tower"])
    assert result.exit_code == 0 and "next: csvfs pool create" in result.stdout
    result = CliRunner().invoke(main, ["cluster", "token"])
    assert result.exit_code == 1 and "single machine" in result.stderr


def test_a_directory_of_another_cluster_is_left_alone(machine: Path) -> None:
    place = EtcdPlace(machine / "state/etcd")
    place.directory.mkdir(parents=True)
    (place.directory / "node.crt").write_text("of another cluster")
    with pytest.raises(Conflict, match="is not what cluster create makes"):
        plan_create("Tower", WISH)
    with pytest.raises(Exists, match="this machine is in a cluster"):
        cluster_join.plan_join(TOKEN, WISH)
    assert (place.directory / "node.crt").read_text() == "of another cluster"


def test_a_directory_gets_its_name_when_it_is_whole_and_never_in_place_of_another(tmp_path: Path) -> None:
    place = EtcdPlace(tmp_path / "etcd")
    staged = new_directory(tmp_path / "etcd.new")
    assert staged.directory.stat().st_mode & 0o777 == 0o700
    staged.ca_path.write_text(make_authority("Tower")[0])
    put_in_place(staged, place)
    assert place.has_tls and not staged.directory.exists()
    with pytest.raises(Conflict, match="holds something else already"):
        put_in_place(new_directory(staged.directory), place)
    (staged.directory / "half").touch()
    assert not list(new_directory(staged.directory).directory.iterdir())  # a half-made one is begun anew


def test_the_unit_starts_this_checkout_and_one_that_is_there_is_kept(tmp_path: Path) -> None:
    checkout = Path(node_setup.__file__).parents[2]
    assert install_unit(tmp_path)
    text = (tmp_path / UNIT_NAME).read_text()
    assert f"ExecStart={checkout}/.venv/bin/csvfs node run\n" in text and "/opt/csvfs" not in text
    (tmp_path / UNIT_NAME).write_text("an administrator's own")
    assert not install_unit(tmp_path)
    assert (tmp_path / UNIT_NAME).read_text() == "an administrator's own"
