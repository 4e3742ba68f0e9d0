"""From a store URL to an open store: the one place that knows all back ends. Store floor."""

from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from csvfs.errors import BadRequest
from csvfs.store.embedded import EmbeddedStore
from csvfs.store.etcd import EtcdStore
from csvfs.store.etcd_place import EtcdPlace
from csvfs.store.interface import ClusterStore

KINDS = "embedded:/path/store.db and etcd:/directory"


def open_store(url: str) -> ClusterStore:
    """The store that `url` names: `embedded:/path/store.db`, optionally with `?gate=/path`, or `etcd:/directory`
    with the files of etcd_place.py.

    Raises   BadRequest: not a URL of a back end we have. Unavailable: it cannot be opened now.
             Corrupt: its file is damaged.
    """
    parts = urlsplit(url)
    if parts.scheme == "etcd":
        return EtcdStore(etcd_place(url))
    if parts.scheme != "embedded":
        raise BadRequest(f"store {url!r}: unknown kind {parts.scheme!r}; there are {KINDS}")
    options = parse_qs(parts.query)
    unknown = sorted(set(options) - {"gate"})
    if unknown:
        raise BadRequest(f"store {url!r}: unknown option {unknown[0]!r}; there is gate=/path")
    if parts.netloc or not parts.path.startswith("/"):
        raise BadRequest(f"store {url!r}: write an absolute path, embedded:/path/store.db")
    gate = Path(options["gate"][-1]) if "gate" in options else None
    return EmbeddedStore(Path(parts.path), gate=gate)


def is_etcd(url: str) -> bool:
    return urlsplit(url).scheme == "etcd"


def etcd_place(url: str) -> EtcdPlace:
    """The directory that an etcd URL names. Raises BadRequest: the store is of another kind, or none."""
    parts = urlsplit(url)
    if parts.scheme != "etcd":
        raise BadRequest(f"store {url!r} is no etcd; for a cluster of several machines write etcd:/var/lib/csvfs/etcd")
    if parts.netloc or parts.query or not parts.path.startswith("/"):
        raise BadRequest(f"store {url!r}: write an absolute path and nothing behind it, etcd:/var/lib/csvfs/etcd")
    return EtcdPlace(Path(parts.path))
