"""Where a volume's coordinator is, as the membership view says: what a Session asks.

Place      mount floor; above cluster/membership.py.
"""

from csvfs.cluster.membership import View
from csvfs.net.link import Address


class VolumeOwner:
    """See session.OwnerView."""

    def __init__(self, view: View, volume: str) -> None:
        self._view = view
        self._volume = volume

    def address(self) -> Address | None:
        """None: the volume has no coordinator now, or its key is malformed."""
        owner = self._view.owners.get(self._volume)
        if owner is None:
            return None
        host, port = owner.get("address"), owner.get("port")
        return (host, port) if isinstance(host, str) and isinstance(port, int) else None

    @property
    def node(self) -> str:
        """Whose process is at `address()`; empty: there is none."""
        return str(self._view.owners.get(self._volume, {}).get("node") or "")

    async def wait_change(self, known: Address | None) -> None:
        """Returns when `address()` is not `known`. Cancel safe."""
        while self.address() == known:
            await self._view.wait_changed()
