"""What every back end of the cluster store refuses. Store floor; no I/O."""

from csvfs.errors import BadRequest
from csvfs.store.interface import Delete, Put

KEY_SIZE_MAX = 512  # characters
VALUE_SIZE_MAX = 1 << 20  # bytes
TTL_MS_MAX = 86_400_000  # a day


def check_key(key: str) -> None:
    """Raises BadRequest."""
    if not 0 < len(key) <= KEY_SIZE_MAX or not key.isprintable():
        raise BadRequest(f"store key {key[:64]!r}: 1 to {KEY_SIZE_MAX} printable characters")


def check_changes(changes: list[Put | Delete]) -> None:
    """Raises BadRequest."""
    for change in changes:
        check_key(change.key)
        if isinstance(change, Put) and len(change.value) > VALUE_SIZE_MAX:
            raise BadRequest(f"{change.key}: {len(change.value)} bytes; a value has at most {VALUE_SIZE_MAX}")
    if len({change.key for change in changes}) != len(changes):
        raise BadRequest("a transaction changes a key twice")


def check_ttl(ttl_ms: int) -> None:
    """Raises BadRequest."""
    if not 0 < ttl_ms <= TTL_MS_MAX:
        raise BadRequest(f"a lease of {ttl_ms} ms; it must last between 1 ms and a day")
