"""What a node is told about itself: its configuration file, and the table of options.

Place      ground floor: reads one file, nothing else.
File       TOML at $CSVFS_CONFIG, else /etc/csvfs/node.toml. Unknown names are refused: a misspelt
           option that is silently ignored is an outage at night.
"""

import ipaddress
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from hashlib import blake2b
from pathlib import Path
from typing import Any

from csvfs.errors import AccessDenied, BadRequest, NotFound
from csvfs.fault_domains import PLACE_LEVELS, Place
from csvfs.ids import NodeName

CONFIG_ENVIRONMENT = "CSVFS_CONFIG"
CONFIG_PATH_DEFAULT = Path("/etc/csvfs/node.toml")
CONFIG_SIZE_MAX = 64 * 1024  # bytes; ours have 300

CLAIM_ENTRIES_MAX = 64

# Ports of a node, counted from its port_base.
DRIVE_SERVER_PORT = 1
COORDINATOR_PORT = 2
STORE_PORT = 3  # of the node's etcd member, for clients
STORE_PEER_PORT = 4  # and for other members
JOIN_PORT = 5  # of the join desk, where new nodes get their certificates
PORT_COUNT = 10

TLS_NONE = "none"  # tls_dir: connections between nodes are not encrypted, and who connects is not asked who it is
_ETCD = "etcd:"

# A unix socket's path has at most 107 bytes; ours are `<run_dir>/<role>.sock`.
RUN_DIR_LENGTH_MAX = 80
_NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,30}[A-Za-z0-9])?")


def _option(default: int, unit: str, low: int, high: int, why: str, help: str) -> Any:
    """One row of the table: `why` explains the default, `help` says what the option does."""
    row = {"unit": unit, "low": low, "high": high, "why": why, "help": help}
    return field(default=default, metadata=row)


@dataclass(slots=True, frozen=True)
class Options:
    """The `[options]` of the file, all whole numbers. A change takes effect when the node is restarted."""

    node_lease_ms: int = _option(
        3000, "ms", 500, 60_000,
        "six heartbeats: a busy machine misses two or three now and then; failover has 5 s in all",
        "a node that has not renewed its lease for this long is counted as gone",
    )  # fmt: skip
    heartbeat_ms: int = _option(
        500, "ms", 50, 10_000,
        "a sixth of the lease",
        "how often a node renews its lease",
    )  # fmt: skip
    margin_ms: int = _option(
        500, "ms", 50, 10_000,
        "covers a process that is scheduled late between looking at the liveness page and answering",
        "a node stops serving this long before the others may count it as gone",
    )  # fmt: skip
    write_timeout_ms: int = _option(
        5000, "ms", 500, 120_000,
        "longer than the longest pause of a healthy disk; a dead connection is seen sooner",
        "a drive that has not answered a write for this long drops out of the slab's in-sync set",
    )  # fmt: skip
    connect_timeout_ms: int = _option(
        1000, "ms", 50, 60_000,
        "a connection inside a rack takes less than a millisecond, one lost SYN a second",
        "how long connecting to another process may take",
    )  # fmt: skip
    recall_timeout_ms: int = _option(
        5000, "ms", 500, 300_000,
        "enough to flush a full page cache of one file to healthy drives",
        "a mount that has not given back a recalled lease for this long is evicted",
    )  # fmt: skip
    reclaim_timeout_ms: int = _option(
        2000, "ms", 100, 60_000,
        "mounts reconnect within 100 ms of a takeover",
        "how long a new coordinator waits for mounts to reclaim their leases",
    )  # fmt: skip
    attribute_report_ms: int = _option(
        5000, "ms", 100, 600_000,
        "times may lag a crash by this much, as with lazytime of local file systems",
        "how often a mount reports the times of files it is writing",
    )  # fmt: skip
    drive_retire_ms: int = _option(
        900_000, "ms", 100, 604_800_000,
        "longer than a reboot; what a node missed meanwhile is copied faster than all it holds",
        "a drive that has been away for this long is counted as lost: its copies are made on others",
    )  # fmt: skip
    repair_speed: int = _option(
        3, "level", 1, 5,
        "programs may get half as slow again while copies are made",
        "how repair weighs against programs: 1 very low to 5 very high; see csvfs job speed",
    )  # fmt: skip
    io_timeout_ms: int = _option(
        60_000, "ms", 1000, 3_600_000,
        "longer than a failover and a reboot; guests' disks time out after 30 to 180 s",
        "reads and writes that cannot be done for this long fail with EIO",
    )  # fmt: skip
    hang_ms: int = _option(
        10_000, "ms", 1000, 600_000,
        "longer than the longest pause of a healthy disk, shorter than the patience of guests",
        "a drive that has not answered for this long is given up; a process that it holds up is replaced",
    )  # fmt: skip
    frozen_ms: int = _option(
        1500, "ms", 500, 600_000,
        "leaves the next process of a mount 2.5 s to be heard before the leases of the one that stood still may pass on",
        "a process of csvfs that has been stopped (SIGSTOP, a debugger) for this long is killed and replaced",
    )  # fmt: skip
    slow_drive_ms: int = _option(
        50, "ms", 1, 60_000,
        "ten times what a loaded hard disk takes; flash that takes so long is broken",
        "a drive is slow when it takes longer than this and 10 times as long as its peers",
    )  # fmt: skip
    slow_drive_after_s: int = _option(
        30, "s", 1, 3600,
        "longer than garbage collection of a flash drive, or error recovery of a disk",
        "a drive that is slow for this long is read around and given no new slabs",
    )  # fmt: skip
    slow_drive_retire_s: int = _option(
        300, "s", 0, 86_400,
        "a drive that has not recovered by then most often never does",
        "a drive that is slow for this long is retired (0: never)",
    )  # fmt: skip
    drive_claim_after_s: int = _option(
        10, "s", 1, 3600,
        "longer than partitioning a disk takes once it has appeared",
        "a disk must have been blank for this long, at two looks, before it is claimed by itself",
    )  # fmt: skip
    restart_backoff_max_ms: int = _option(
        5000, "ms", 0, 600_000,
        "a process that dies at once costs 5 starts a minute, not a core",
        "the longest wait before a process that keeps dying is started again",
    )  # fmt: skip
    stop_timeout_ms: int = _option(
        10_000, "ms", 100, 600_000,
        "enough to flush what the mounts hold",
        "how long a process gets to end in order before it is killed",
    )  # fmt: skip
    log_size_max_kib: int = _option(
        8192, "KiB", 64, 1_048_576,
        "weeks of an ordinary node",
        "a process's log is rolled over when it grows larger",
    )  # fmt: skip


def option_rows() -> list[dict[str, Any]]:
    """The table as rows of name, default, unit, low, high, why, help: for the manual and `--help`."""
    return [{"name": row.name, "default": row.default, **row.metadata} for row in fields(Options)]


@dataclass(slots=True, frozen=True)
class NodeConfig:
    """One node's configuration, verified."""

    node: NodeName
    address: str  # IP at which the other nodes reach this one
    port_base: int
    store: str  # URL, see store/opening.py
    run_dir: Path  # sockets, logs, the liveness page
    cluster_root: Path
    place: Place  # of a node that has none in the cluster store yet; later csvfs domain set
    claim: tuple[str, ...]  # paths and patterns of what may become a drive by itself
    options: Options
    path: Path  # of the file it was read from
    witness: bool = False  # runs a member of the cluster store and nothing else
    tls_dir: Path | None = None  # has ca.crt, node.crt, node.key; None: connections between nodes are not encrypted

    @property
    def drive_server_port(self) -> int:
        return self.port_base + DRIVE_SERVER_PORT

    @property
    def coordinator_port(self) -> int:
        return self.port_base + COORDINATOR_PORT

    @property
    def join_port(self) -> int:
        return self.port_base + JOIN_PORT

    @property
    def drive_server_socket(self) -> Path:
        return self.run_dir / "drives.sock"

    @property
    def coordinator_socket(self) -> Path:
        return self.run_dir / "coordinator.sock"

    def mount_socket(self, volume: str) -> Path:
        """Where the mount of a volume on this node says what it waits for. Its name is short whatever the volume's."""
        return self.run_dir / f"mount-{blake2b(volume.encode(), digest_size=6).hexdigest()}.sock"

    @property
    def liveness_path(self) -> Path:
        return self.run_dir / "liveness"

    @property
    def log_dir(self) -> Path:
        return self.run_dir / "logs"


def config_path() -> Path:
    return Path(os.environ.get(CONFIG_ENVIRONMENT) or CONFIG_PATH_DEFAULT)


def load_config(path: Path | None = None) -> NodeConfig:
    """Read and verify the configuration at `path`, by default that of this process (`config_path`).

    Raises   NotFound, AccessDenied: the file cannot be read. BadRequest: it says something impossible.
    """
    path = config_path() if path is None else path
    try:
        with path.open("rb") as file:
            text = file.read(CONFIG_SIZE_MAX + 1)
    except PermissionError:
        raise AccessDenied(f"{path} may not be read by this user; run as root") from None
    except OSError as error:
        reason = error.strerror or str(error)
        raise NotFound(f"{path}: {reason}; set ${CONFIG_ENVIRONMENT} to this node's file") from None
    if len(text) > CONFIG_SIZE_MAX:
        raise BadRequest(f"{path} is larger than {CONFIG_SIZE_MAX} bytes; that is no node configuration")
    return parse_config(text, path)


def parse_config(text: bytes, path: Path) -> NodeConfig:
    """The configuration that `text` says; `path` is for messages. Raises BadRequest."""
    try:
        table = tomllib.loads(text.decode())
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise BadRequest(f"{path} is not TOML: {error}") from None
    allowed = {
        "node", "address", "port_base", "store", "run_dir", "cluster_root", "witness", "tls_dir", "drives", "options",
        *PLACE_LEVELS,
    }  # fmt: skip
    _refuse_unknown(table, allowed, path)
    node = _text(table, "node", path)
    check_name(node, f"{path}: node")
    run_dir = _absolute(table, "run_dir", path, "/run/csvfs")
    if len(os.fsencode(run_dir)) > RUN_DIR_LENGTH_MAX:
        raise BadRequest(
            f"{path}: run_dir is longer than {RUN_DIR_LENGTH_MAX} bytes; sockets need a short one"
        )
    return NodeConfig(
        node=NodeName(node),
        address=_address(_text(table, "address", path), path),
        port_base=_number(table, "port_base", 7000, 1, 65_535 - PORT_COUNT, path),
        store=_text(table, "store", path),
        run_dir=run_dir,
        cluster_root=_absolute(table, "cluster_root", path, "/clusterstorage"),
        place=parse_place({name: table[name] for name in PLACE_LEVELS if name in table}, str(path)),
        claim=_claim(table.get("drives", {}), path),
        options=_options(table.get("options", {}), path),
        path=path.absolute(),
        witness=_switch(table, "witness", path),
        tls_dir=_tls_dir(table, path),
    )


def check_name(name: str, what: str) -> None:
    """Raises BadRequest unless `name` can be a node's, a volume's or a rack's: it becomes a file name and a key."""
    if _NAME.fullmatch(name) is None:
        raise BadRequest(f"{what} {name!r}: use 1 to 32 letters, digits, '-', '_', '.', ends alphanumeric")


def parse_place(table: Any, what: str) -> Place:
    """What a table of names says of a node's place. BadRequest: `what` says something else."""
    if not isinstance(table, dict):
        raise BadRequest(f"{what} is no table of {', '.join(PLACE_LEVELS)}")
    for level, name in table.items():
        if level not in PLACE_LEVELS:
            raise BadRequest(f"{what}: unknown name {level!r}; known are {', '.join(PLACE_LEVELS)}")
        if not isinstance(name, str):
            raise BadRequest(f'{what}: {level} is not text; write {level} = "..."')
        if name:
            check_name(name, f"{what}: {level}")
    return Place(**table)


def _claim(table: Any, path: Path) -> tuple[str, ...]:
    """`claim` of the table [drives]: absolute paths, which may be patterns."""
    if not isinstance(table, dict):
        raise BadRequest(f"{path}: drives must be a table, [drives]")
    _refuse_unknown(table, {"claim"}, path)
    entries = table.get("claim", [])
    if not isinstance(entries, list) or len(entries) > CLAIM_ENTRIES_MAX:
        raise BadRequest(f"{path}: claim must be a list of at most {CLAIM_ENTRIES_MAX} paths")
    for entry in entries:
        if not isinstance(entry, str) or not entry.startswith("/") or "**" in entry:
            raise BadRequest(f"{path}: claim names {entry!r}; use absolute paths, in which * matches within a folder")
    return tuple(entries)


def _options(table: Any, path: Path) -> Options:
    if not isinstance(table, dict):
        raise BadRequest(f"{path}: options must be a table, [options]")
    rows = {row.name: row for row in fields(Options)}
    _refuse_unknown(table, set(rows), path)
    values: dict[str, int] = {}
    for name, row in rows.items():
        assert row.default is not MISSING
        values[name] = _number(table, name, row.default, row.metadata["low"], row.metadata["high"], path)
    options = Options(**values)
    if options.heartbeat_ms + options.margin_ms >= options.node_lease_ms:
        raise BadRequest(
            f"{path}: heartbeat_ms {options.heartbeat_ms} + margin_ms {options.margin_ms} must stay below"
            f" node_lease_ms {options.node_lease_ms}, or the node never serves"
        )
    return options


def _refuse_unknown(table: Mapping[str, Any], allowed: set[str], path: Path) -> None:
    for name in table:
        if name not in allowed:
            raise BadRequest(f"{path}: unknown name {name!r}; known are {', '.join(sorted(allowed))}")


def _text(table: Mapping[str, Any], name: str, path: Path, default: str | None = None) -> str:
    value = table.get(name, default)
    if not isinstance(value, str) or not value:
        raise BadRequest(f'{path}: {name} is missing or not text; write {name} = "..."')
    return value


def _absolute(table: Mapping[str, Any], name: str, path: Path, default: str) -> Path:
    value = Path(_text(table, name, path, default))
    if not value.is_absolute():
        raise BadRequest(f"{path}: {name} {str(value)!r} must be an absolute path")
    return value


def _tls_dir(table: Mapping[str, Any], path: Path) -> Path | None:
    """Where the node's certificates lie: beside those of an etcd, unless said otherwise. None: "none" was said, or the
    cluster store is a file, which all nodes being on one machine have."""
    store = _text(table, "store", path)
    beside_etcd = store.removeprefix(_ETCD) if store.startswith(_ETCD) else TLS_NONE
    said = _text(table, "tls_dir", path, beside_etcd)
    return None if said == TLS_NONE else _absolute(table, "tls_dir", path, beside_etcd)


def _number(table: Mapping[str, Any], name: str, default: int, low: int, high: int, path: Path) -> int:
    value = table.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int):
        raise BadRequest(f"{path}: {name} must be a whole number, not {value!r}")
    if not low <= value <= high:
        raise BadRequest(f"{path}: {name} is {value}; it must lie between {low} and {high}")
    return value


def _switch(table: Mapping[str, Any], name: str, path: Path) -> bool:
    value = table.get(name, False)
    if not isinstance(value, bool):
        raise BadRequest(f"{path}: {name} is {value!r}; write {name} = true, or leave it out")
    return value


def _address(value: str, path: Path) -> str:
    try:
        return str(ipaddress.ip_address(value))
    except ValueError:
        raise BadRequest(f"{path}: address {value!r} is not an IP address") from None
