"""Refusals: connections that were closed because of who came or what was sent, counted by reason.

Place      net floor. One `Refusals` per engine, so per process.
Limits     one line in the log per host and LOG_INTERVAL_S, of at most HOSTS_MAX hosts in that time: who knocks all the
           time fills no log. The counters miss nothing.
"""

import logging
import time
from enum import StrEnum

from csvfs.errors import Unavailable

log = logging.getLogger(__name__)

LOG_INTERVAL_S = 60.0
HOSTS_MAX = 256


class Reason(StrEnum):
    """Why; the values are the keys of the call `status` (PROTOCOL.md)."""

    NOT_TLS = "not_tls"  # bytes that are no TLS 1.3
    NO_CERTIFICATE = "no_certificate"
    FOREIGN = "foreign_certificate"  # not of this cluster's CA, or not valid now
    REVOKED = "revoked_certificate"  # of a node that was evicted
    WRONG_NODE = "wrong_node"  # the certificate is of another node than the one it says it is
    WRONG_USER = "wrong_user"  # of a unix socket: neither root nor the user of this process
    SLOW = "handshake_too_slow"
    LONG = "handshake_too_long"
    CROWDED = "handshakes_too_many"
    BROKEN_OFF = "handshake_broken_off"  # by the other side
    MALFORMED = "malformed"  # bytes that are no frame, or not at that place


class Refused(Unavailable):
    """Somebody is not who they should be. `reason`: for the counters; it does not go over a wire."""

    def __init__(self, reason: Reason, text: str) -> None:
        super().__init__(text)
        self.reason = reason


class Refusals:
    """`counts`: since the process started, of the reasons that occurred."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self._logged: dict[str, float] = {}  # host -> when its last line was written, CLOCK_MONOTONIC

    def note(self, reason: Reason, host: str, text: str) -> None:
        """`host`: without the port, which every attempt has its own of."""
        count = self.counts[reason.value] = self.counts.get(reason.value, 0) + 1
        if self._may_log(host, time.monotonic()):
            log.warning("refused %s (%s, %d so far): %s", host, reason.value.replace("_", " "), count, text)

    def _may_log(self, host: str, now_s: float) -> bool:
        if now_s - self._logged.get(host, -LOG_INTERVAL_S) < LOG_INTERVAL_S:
            return False
        if len(self._logged) >= HOSTS_MAX:
            self._logged = {host: at for host, at in self._logged.items() if now_s - at < LOG_INTERVAL_S}
        if len(self._logged) >= HOSTS_MAX:
            return False
        self._logged[host] = now_s
        return True
