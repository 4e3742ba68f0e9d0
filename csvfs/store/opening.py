"""From a store URL to an open store: the one place that knows all back ends. Store floor."""

from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from csvfs.errors import BadRequest
from csvfs.store.embedded import EmbeddedStore
from csvfs.store.interface import ClusterStore


def open_store(url: str) -> ClusterStore:
    """The store that `url` names: `embedded:/path/store.db`, optionally with `?gate=/path`.

    Raises   BadRequest: not a URL of a back end we have. Unavailable: it cannot be opened now.
             Corrupt: its file is damaged.
    """
    parts = urlsplit(url)
    if parts.scheme != "embedded":
        raise BadRequest(f"store {url!r}: unknown kind {parts.scheme!r}; there is embedded:/path/store.db")
    options = parse_qs(parts.query)
    unknown = sorted(set(options) - {"gate"})
    if unknown:
        raise BadRequest(f"store {url!r}: unknown option {unknown[0]!r}; there is gate=/path")
    if parts.netloc or not parts.path.startswith("/"):
        raise BadRequest(f"store {url!r}: write an absolute path, embedded:/path/store.db")
    gate = Path(options["gate"][-1]) if "gate" in options else None
    return EmbeddedStore(Path(parts.path), gate=gate)
