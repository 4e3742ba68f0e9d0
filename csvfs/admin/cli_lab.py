"""`csvfs lab`: a whole cluster on this machine.

Place      admin floor, over lab.py.
"""

import sys
from pathlib import Path
from typing import Any

import click

from csvfs.admin import lab
from csvfs.admin.cli_context import SIZE, json_option
from csvfs.admin.lab_files import DRIVES_MAX, LAB_DIR_DEFAULT, NODES_MAX
from csvfs.admin.lab_processes import ROLES
from csvfs.admin.render import note, print_json, print_table
from csvfs.errors import BadRequest
from csvfs.units import GIB, MIB, format_size

DRIVE_SIZE_MIN = 128 * MIB  # one slab of the default size and what describes it

dir_option = click.option(
    "--dir",
    "directory",
    type=click.Path(path_type=Path, file_okay=False),
    default=LAB_DIR_DEFAULT,
    show_default=True,
    help="Which lab; several may run side by side.",
)


@click.group("lab")
def lab_group() -> None:
    """A whole cluster on this machine, to try things and to break them.

    Each node n1, n2, ... is a network and mount namespace with its own /clusterstorage.
    Needs root and /dev/fuse.
    """


@lab_group.command("up")
@click.option("--nodes", type=click.IntRange(1, NODES_MAX), default=3, show_default=True)
@click.option("--drives", type=click.IntRange(1, DRIVES_MAX), default=3, show_default=True, help="Per node.")
@click.option("--drive-size", type=SIZE, default=4 * GIB, show_default="4G", help="Sparse files.")
@click.option("--store", type=click.Choice(["embedded", "etcd"]), default="embedded", show_default=True)
@click.option("--tls/--no-tls", default=True, show_default=True, help="Between nodes.")
@dir_option
def up_command(nodes: int, drives: int, drive_size: int, store: str, tls: bool, directory: Path) -> None:
    """Start a new lab, or what is not running of one that is there."""
    if drive_size < DRIVE_SIZE_MIN:
        raise BadRequest(
            f"drives of {format_size(drive_size)} are too small: at least {format_size(DRIVE_SIZE_MIN)}"
        )
    lab.lab_up(directory, nodes=nodes, drives=drives, drive_size=drive_size, store=store, tls=tls)
    where = "" if directory == LAB_DIR_DEFAULT else f" --dir {directory}"
    note(f"the lab is up; next: csvfs lab exec{where} n1 -- csvfs volume create Volume1")


@lab_group.command("exec", context_settings={"ignore_unknown_options": True})
@click.argument("node")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@dir_option
def exec_command(node: str, command: tuple[str, ...], directory: Path) -> None:
    """Run COMMAND in NODE's namespaces: csvfs lab exec n1 -- ls /clusterstorage."""
    sys.exit(lab.lab_exec(directory, node, list(command)))


@lab_group.command("kill")
@click.argument("node")
@click.option(
    "--role", type=click.Choice([*ROLES, "all"]), default="all", show_default=True, help="Which process."
)
@dir_option
def kill_command(node: str, role: str, directory: Path) -> None:
    """kill -9 one process of NODE, or all of it, as a power cut would."""
    lab.lab_kill(directory, node, role)


@lab_group.command("start")
@click.argument("node")
@dir_option
def start_command(node: str, directory: Path) -> None:
    """Start NODE again after it was killed."""
    lab.lab_start(directory, node)


@lab_group.command("partition")
@click.argument("node")
@click.argument("other", required=False)
@click.option("--one-way", is_flag=True, help="Only what NODE sends to OTHER vanishes.")
@dir_option
def partition_command(node: str, other: str | None, one_way: bool, directory: Path) -> None:
    """Cut NODE off from all others and from the cluster store, or from OTHER alone."""
    lab.lab_partition(directory, node, other, one_way=one_way)


@lab_group.command("heal")
@dir_option
def heal_command(directory: Path) -> None:
    """End all partitions."""
    lab.lab_heal(directory)


@lab_group.command("status")
@json_option
@dir_option
def status_command(as_json: bool, directory: Path) -> None:
    """Show the lab's nodes and their processes."""
    status = lab.lab_status(directory)
    if as_json:
        print_json(status)
        return
    rows = [
        (node["name"], _state_text(node), node["address"], processes_text(node["processes"]))
        for node in status["nodes"]
    ]
    print_table(("NODE", "STATE", "ADDRESS", "PROCESSES"), rows, empty="this lab has no nodes")


def _state_text(node: dict[str, Any]) -> str:
    return f"{node['state']}, cut from {', '.join(node['cut_from'])}" if node["cut_from"] else str(node["state"])


def processes_text(processes: dict[str, list[int]]) -> str:
    """`coordinator 812, drives 810`: roles and their process ids."""
    return ", ".join(
        f"{role} {' '.join(str(pid) for pid in pids)}" for role, pids in sorted(processes.items())
    )


@lab_group.command("down")
@dir_option
def down_command(directory: Path) -> None:
    """Take the lab away: processes, namespaces, mounts and files."""
    lab.lab_down(directory)
