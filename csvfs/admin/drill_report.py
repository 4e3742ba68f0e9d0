"""The report of drills: rounds summed up by case, as a table and as JSON. Pure.

Place      admin floor, over drill.py's rounds; drill_html.py draws, cli_drill.py prints.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from csvfs.admin.drill import Round
from csvfs.admin.drill_pauses import MEASURED, Figure, figure_of
from csvfs.admin.drill_plans import DRILLS

COLUMNS = (
    "DRILL", "PROGRAMS", ">N", ">READS", ">WRITES", ">METADATA", ">SHARED", ">GOAL", ">WRONG", ">HEALTHY",
)  # fmt: skip
GROUPS_SHOWN = (*MEASURED, "shared")


@dataclass(slots=True)
class CaseReport:
    """All rounds of one case, as programs in one kind of place saw them."""

    drill: str
    title: str
    where: str  # ELSEWHERE, AT_VICTIM
    rounds: int
    goal_ms: float | None
    pauses: dict[str, Figure] = field(default_factory=dict)  # by group, ms
    gaps: dict[str, Figure] = field(default_factory=dict)
    before: dict[str, Figure] = field(default_factory=dict)
    within_goal: bool | None = None  # None: there is no goal; of the groups that goals are about


@dataclass(slots=True)
class DrillReport:
    """`held`: nothing was lost, nothing un-happened, no program saw an error."""

    volume: str
    files: int
    repeat: int
    rounds: list[Round]
    not_run: list[str] = field(default_factory=list)  # drills that do not apply here, with the reason

    @property
    def held(self) -> bool:
        return all(round_.held for round_ in self.rounds)

    @property
    def violation_count(self) -> int:
        return sum(round_.violation_count for round_ in self.rounds)

    def cases(self) -> list[CaseReport]:
        """By case in the order in which they ran, then by where programs were."""
        by_case: dict[tuple[str, str], list[Round]] = {}
        for round_ in self.rounds:
            for where in round_.pauses:
                by_case.setdefault((round_.title, where), []).append(round_)
        return [_case_report(title, where, rounds) for (title, where), rounds in by_case.items()]

    def to_json(self) -> dict[str, Any]:
        """All but the points of the timelines."""
        rounds = []
        for round_ in self.rounds:
            row = asdict(round_)
            row["marks"] = next((timeline["marks"] for timeline in row.pop("timelines").values()), [])
            rounds.append(row)
        return {
            "held": self.held,
            "volume": self.volume,
            "files": self.files,
            "repeat": self.repeat,
            "load": [min(loads), max(loads)] if (loads := [round_.load for round_ in self.rounds]) else [],
            "cases": [asdict(case) for case in self.cases()],
            "not_run": self.not_run,
            "rounds": rounds,
        }


def _case_report(title: str, where: str, rounds: Sequence[Round]) -> CaseReport:
    goal_ms = DRILLS[rounds[0].drill].goal_ms
    report = CaseReport(rounds[0].drill, title, where, len(rounds), goal_ms)
    for group in GROUPS_SHOWN:
        pauses = [round_.pauses[where][group] for round_ in rounds if group in round_.pauses[where]]
        report.pauses[group] = figure_of([pause.longest for pause in pauses])
        report.gaps[group] = figure_of([pause.gap for pause in pauses])
        report.before[group] = figure_of([pause.before for pause in pauses])
    if goal_ms is not None:
        report.within_goal = all(report.pauses[group].worst <= goal_ms for group in MEASURED)
    return report


def table_rows(report: DrillReport) -> list[tuple[Any, ...]]:
    """For COLUMNS; what belongs to the case as a whole stands in its first row."""
    rows: list[tuple[Any, ...]] = []
    shown: set[str] = set()
    for case in report.cases():
        of_case = [round_ for round_ in report.rounds if round_.title == case.title]
        violations = sum(round_.violation_count for round_ in of_case)
        failed = sum(bool(round_.failure) for round_ in of_case)
        is_first = case.title not in shown
        shown.add(case.title)
        healthy = max(round_.healthy_after_s for round_ in of_case)
        rows.append(
            (
                case.title if is_first else "",
                case.where,
                case.rounds if is_first else "",
                *(figure_text(case.pauses[group]) for group in GROUPS_SHOWN),
                goal_text(case),
                _violations_text(violations, failed) if is_first else "",
                f"{healthy:.1f} s" if is_first else "",
            )
        )
    return rows


def _violations_text(violations: int, failed: int) -> str:
    return f"{violations}" + (f", {failed} unfinished" if failed else "")


def goal_text(case: CaseReport) -> str:
    if case.goal_ms is None:
        return ""
    return f"{milliseconds_text(case.goal_ms)} {'ok' if case.within_goal else 'MISSED'}"


def figure_text(figure: Figure) -> str:
    """Median/worst, in one unit."""
    if figure.worst < 1000:
        return f"{figure.median:.0f}/{figure.worst:.0f} ms"
    return f"{figure.median / 1000:.2f}/{figure.worst / 1000:.2f} s"


def milliseconds_text(value: float) -> str:
    """`7 ms`, `450 ms`, `3.05 s`, `12 s`."""
    if value < 1000:
        return f"{value:.0f} ms"
    seconds = value / 1000
    return f"{seconds:.2f} s" if seconds < 10 and value % 1000 else f"{seconds:.0f} s"


def what_went_wrong(report: DrillReport) -> list[str]:
    """One line for each thing, by round; and where its logs are."""
    lines = []
    for round_ in report.rounds:
        if round_.held:
            continue
        where = f"{round_.title} ({round_.victim})"
        if round_.failure:
            lines.append(f"{where}: {round_.failure}")
        lines += [f"{where}: {violation}" for violation in round_.violations]
        more = round_.violation_count - len(round_.violations)
        lines.append(f"{where}: " + (f"and {more} more; " if more else "") + f"all that was logged is in {round_.logs}")
    return lines


def summary(report: DrillReport) -> str:
    """The last line."""
    operations = sum(round_.operations for round_ in report.rounds)
    acknowledged = sum(round_.acknowledged for round_ in report.rounds)
    fsynced = sum(round_.fsynced for round_ in report.rounds)
    unfinished = sum(bool(round_.failure) for round_ in report.rounds)
    said = (
        f"{counted(len(report.rounds), 'round')}, {operations:,} operations, {acknowledged:,} acknowledged changes"
        f" of which {fsynced:,} behind an fsync: "
    )
    if report.held:
        return said + "nothing lost, nothing un-happened, no error"
    return said + counted(report.violation_count, "violation") + (
        f", {counted(unfinished, 'round')} unfinished" if unfinished else ""
    )


def counted(count: int, what: str) -> str:
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}{'S' if what.isupper() else 's'}"


def round_line(round_: Round) -> str:
    """While drills run: one round."""
    parts = []
    for where, groups in round_.pauses.items():
        figures = ", ".join(f"{group} {milliseconds_text(groups[group].longest)}" for group in MEASURED if group in groups)
        parts.append(f"{where}: {figures}")
    verdict = "holds" if round_.held else round_.failure or counted(round_.violation_count, "VIOLATION")
    if round_.violations:
        verdict += f", the first: {round_.violations[0]} (logs: {round_.logs})"
    return f"  {verdict}; {'; '.join(parts) or 'nothing was measured'}"
