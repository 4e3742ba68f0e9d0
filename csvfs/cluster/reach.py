"""Who reaches whom: when a node counts as isolated. Pure.

Place      cluster floor; admin/reach_watch.py makes the reports, admin/node_life.py shows what follows from them.
Reports    Each node tries the drive servers of all others, and says under `reach/<node>` which it does not reach (for
           UNREACHED_AFTER_S, though the store has their keys), and which still answer though their lease has ended.
Isolated   A node is isolated when
             a) its lease holds (it reaches the store), and more than half of the other nodes that are up and report say
                that they do not reach its drive server; or
             b) its lease has ended (it does not reach the store), and some node that is up still reaches its drive server.
           That is a word for people and changes nothing by itself: writers drop the copies they cannot reach, and a node
           without a lease has stopped serving.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

UNREACHED_AFTER_S = 10.0


@dataclass(slots=True, frozen=True)
class Report:
    """What one node says of the others."""

    unreached: frozenset[str] = frozenset()
    lingering: frozenset[str] = frozenset()  # they answer, and have no lease


def why_isolated(node: str, alive: Collection[str], reports: Mapping[str, Report]) -> str:
    """Why `node` is isolated, in a few words; empty: it is not. Reports of nodes that are not up do not count."""
    others = {name: report for name, report in reports.items() if name != node and name in alive}
    if node in alive:
        blind = sorted(name for name, report in others.items() if node in report.unreached)
        if 2 * len(blind) > len(others):
            return f"reaches the cluster store, but is not reached by {', '.join(blind)}"
        return ""
    seeing = sorted(name for name, report in others.items() if node in report.lingering)
    return f"does not reach the cluster store, but answers {', '.join(seeing)}" if seeing else ""
