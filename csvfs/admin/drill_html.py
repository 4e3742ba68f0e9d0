"""The report of drills as one page: figures, and for each case a picture of how long programs waited. Pure.

Place      admin floor, over drill_report.py. The page loads nothing: styles and pictures are in it.
Picture    of the round with the longest pause: time from the fault to the right, how long an operation took upwards on a
           logarithmic scale, a lane for each kind of operation. A bar lasts from asking to answer, so a pause is as long as it
           looks. Of operations closer together than BIN_S only the longest is drawn.
"""

import math
from collections.abc import Iterable
from html import escape

from csvfs.admin.drill import Round
from csvfs.admin.drill_pauses import MEASURED, Point, Timeline
from csvfs.admin.drill_plans import AT_VICTIM, DRILLS
from csvfs.admin.drill_report import (
    GROUPS_SHOWN,
    CaseReport,
    DrillReport,
    counted,
    figure_text,
    goal_text,
    milliseconds_text,
    summary,
    what_went_wrong,
)

WIDTH, LEFT, RIGHT = 960, 48, 14
TOP, LANE_HEIGHT, LANE_GAP, BOTTOM = 46, 80, 26, 14
LATENCY_MS_MIN, LATENCY_MS_MAX = 0.1, 100_000.0
BAR_MS_MIN = 40.0  # shorter operations are dots
TICK_COUNT_MAX = 14

STYLE = """
:root { color-scheme: light dark; --ground: #ffffff; --card: #f6f7f9; --ink: #1c2430; --soft: #5d6b7e; --line: #d9dee6;
  --reads: #2472c8; --writes: #b3590c; --metadata: #6d4bc4; --shared: #5d6b7e; --bad: #c3262f; --good: #1a7f4b; }
@media (prefers-color-scheme: dark) { :root { --ground: #12161c; --card: #1a2028; --ink: #e3e8ef; --soft: #94a1b3;
  --line: #303a47; --reads: #6cb0ff; --writes: #f0a35e; --metadata: #b49cff; --shared: #94a1b3; --bad: #ff6b72;
  --good: #4fcf8e; } }
* { box-sizing: border-box; }
body { margin: 0; padding: 32px 20px 64px; background: var(--ground); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1000px; margin: 0 auto; }
h1 { font-size: 24px; margin: 0 0 4px; } h2 { font-size: 17px; margin: 36px 0 2px; }
p { margin: 4px 0; color: var(--soft); } .verdict { font-weight: 600; } .good { color: var(--good); }
.bad { color: var(--bad); }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; margin: 18px 0;
  font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 6px 10px; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 600; font-size: 13px; }
th:nth-child(-n+2), td:nth-child(-n+2) { text-align: left; }
.wrong { background: var(--card); border-left: 3px solid var(--bad); padding: 10px 14px; color: var(--ink);
  font: 13px/1.5 ui-monospace, monospace; overflow-wrap: anywhere; }
figure { margin: 10px 0 0; background: var(--card); border-radius: 8px; padding: 10px; overflow-x: auto; }
svg { display: block; width: 100%; min-width: 640px; height: auto; font: 11px system-ui, sans-serif; }
svg text { fill: var(--soft); } svg .lane { fill: var(--ink); font-weight: 600; font-size: 12px; }
svg .grid { stroke: var(--line); stroke-width: 1; } svg .base { stroke: var(--soft); stroke-width: 1; }
svg .mark { stroke: var(--bad); stroke-width: 1; stroke-dasharray: 4 3; }
svg .later { stroke: var(--good); } svg .said { fill: var(--bad); font-weight: 600; } svg .said.later { fill: var(--good); stroke: none; }
svg .goal { stroke: var(--ink); stroke-width: 1; stroke-dasharray: 1 4; }
.reads { --series: var(--reads); } .writes { --series: var(--writes); } .metadata { --series: var(--metadata); }
.shared { --series: var(--shared); }
svg .dot { fill: var(--series); } svg .bar { stroke: var(--series); stroke-width: 3; stroke-linecap: round; }
svg .failed { fill: none; stroke: var(--bad); stroke-width: 1.6; }
svg .worst { fill: var(--ink); font-weight: 600; }
"""


def page(report: DrillReport) -> str:
    """The whole page."""
    verdict, kind = summary(report), "good" if report.held else "bad"
    loads = [round_.load for round_ in report.rounds]
    about = f"volume {report.volume}, each drill {counted(report.repeat, 'time')}"
    about += f", {report.files:,} files in the volume" if report.files else ""
    about += f"; load of the machine {_span(loads)}" if loads else ""
    wrong = "".join(f"<div>{escape(line)}</div>" for line in what_went_wrong(report))
    parts = [
        "<h1>csvfs drills</h1>",
        f"<p>{escape(about)}</p>",
        f'<p class="verdict {kind}">{escape(verdict)}</p>',
        f'<div class="wrong">{wrong}</div>' if wrong else "",
        _table(report),
        "<p>Pauses, median / worst of all rounds: the longest time from asking to answer. Shared: a file and a name that"
        " one node changes while another looks at them, so every step needs the coordinator; it has no goal.</p>",
        *(f"<p>Not run: {escape(line)}</p>" for line in report.not_run),
        *(_case(report, case) for case in report.cases()),
    ]
    body = "\n".join(part for part in parts if part)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>csvfs drills</title>\n<style>{STYLE}</style>\n</head>\n<body><main>\n{body}\n</main></body>\n</html>\n"
    )


def _span(values: list[float]) -> str:
    low, high = f"{min(values):.1f}", f"{max(values):.1f}"
    return low if low == high else f"{low} to {high}"


def _table(report: DrillReport) -> str:
    head = ("Drill", "Programs", "Rounds", *(group.capitalize() for group in GROUPS_SHOWN), "Goal")
    rows = []
    for case in report.cases():
        kind = "" if case.within_goal is None else ' class="good"' if case.within_goal else ' class="bad"'
        cells = [case.title, case.where, str(case.rounds), *(figure_text(case.pauses[group]) for group in GROUPS_SHOWN)]
        tags = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        rows.append(f"<tr>{tags}<td{kind}>{escape(goal_text(case) or '-')}</td></tr>")
    heads = "".join(f"<th>{escape(title)}</th>" for title in head)
    return f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _case(report: DrillReport, case: CaseReport) -> str:
    rounds = [round_ for round_ in report.rounds if round_.title == case.title and case.where in round_.timelines]
    worst = max(rounds, key=lambda round_: _longest(round_, case.where))
    where = "on the node itself" if case.where == AT_VICTIM else "on other nodes"
    what = DRILLS[case.drill].what
    figure = picture(worst.timelines[case.where], case.goal_ms)
    return (
        f"<h2>{escape(case.title)}: programs {where}</h2>\n<p>{escape(what)}; here {escape(worst.victim)},"
        f" {_of_how_many(rounds)}</p>\n<figure>{figure}</figure>"
    )


def _of_how_many(rounds: list[Round]) -> str:
    return f"the worst of {len(rounds)} rounds" if len(rounds) > 1 else "one round"


def _longest(round_: Round, where: str) -> float:
    return max(round_.pauses[where][group].longest for group in MEASURED)


# The picture


class _Scale:
    """From seconds and milliseconds to places in the picture."""

    def __init__(self, timeline: Timeline) -> None:
        points = [point for of_group in timeline.points.values() for point in of_group]
        starts = [point.at_s for point in points] + [at_s for at_s, _ in timeline.marks]
        ends = [point.at_s + point.took_ms / 1000 for point in points] + [at_s for at_s, _ in timeline.marks]
        self.first, self.last = min(starts, default=0.0), max(ends, default=1.0)
        self.last = max(self.last, self.first + 1.0)
        slowest = max((point.took_ms for point in points), default=1.0)
        self.decades = math.log10(LATENCY_MS_MIN), math.ceil(math.log10(min(max(slowest, 10.0), LATENCY_MS_MAX)))

    def x(self, at_s: float) -> float:
        return LEFT + (at_s - self.first) / (self.last - self.first) * (WIDTH - LEFT - RIGHT)

    def y(self, took_ms: float, lane_top: float) -> float:
        low, high = self.decades
        share = (math.log10(max(took_ms, LATENCY_MS_MIN)) - low) / (high - low)
        return lane_top + LANE_HEIGHT * (1 - min(share, 1.0))


def picture(timeline: Timeline, goal_ms: float | None) -> str:
    """One round as SVG; `goal_ms`: a line at it."""
    groups = [group for group in GROUPS_SHOWN if timeline.points.get(group)]
    scale = _Scale(timeline)
    bottom = TOP + len(groups) * (LANE_HEIGHT + LANE_GAP)
    parts = [*_time_axis(scale, bottom)]
    for index, group in enumerate(groups):
        top = TOP + index * (LANE_HEIGHT + LANE_GAP)
        parts += _lane(scale, group, top, goal_ms if group in MEASURED else None)
        parts += _points(scale, timeline.points[group], top, group)
    parts += _marks(scale, timeline.marks, bottom)
    label = "How long operations took, from before the fault until all was healthy again"
    return (
        f'<svg viewBox="0 0 {WIDTH} {bottom + BOTTOM}" role="img" aria-label="{label}">' + "".join(parts) + "</svg>"
    )


def _time_axis(scale: _Scale, bottom: float) -> Iterable[str]:
    span = scale.last - scale.first
    step = next((step for step in (0.5, 1, 2, 5, 10, 20, 30, 60) if span / step <= TICK_COUNT_MAX), 120.0)
    tick = math.ceil(scale.first / step)
    while tick * step <= scale.last:
        x = scale.x(tick * step)
        yield f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{bottom - LANE_GAP}"/>'
        yield f'<text x="{x:.1f}" y="{bottom - LANE_GAP + 16}" text-anchor="middle">{tick * step:g} s</text>'
        tick += 1


def _lane(scale: _Scale, group: str, top: float, goal_ms: float | None) -> Iterable[str]:
    low, high = scale.decades
    yield f'<text class="lane" x="{LEFT}" y="{top - 4}">{group}</text>'
    for decade in range(round(low), round(high) + 1):
        y = scale.y(10.0**decade, top)
        kind = "base" if decade == round(low) else "grid"
        yield f'<line class="{kind}" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        if decade % 2 == 0:
            yield f'<text x="{LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{_tick_text(10.0**decade)}</text>'
    if goal_ms is not None and goal_ms <= 10.0**high:
        y = scale.y(goal_ms, top)
        yield f'<line class="goal" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'


def _tick_text(value_ms: float) -> str:
    return f"{value_ms / 1000:g} s" if value_ms >= 1000 else f"{value_ms:g} ms"


def _points(scale: _Scale, points: list[Point], top: float, group: str) -> Iterable[str]:
    yield f'<g class="{group}">'
    for point in points:
        x, y = scale.x(point.at_s), scale.y(point.took_ms, top)
        if point.failed:
            yield f'<path class="failed" d="M{x - 3:.1f} {y - 3:.1f}l6 6m0 -6l-6 6"/>'
        elif point.took_ms >= BAR_MS_MIN:
            end = scale.x(point.at_s + point.took_ms / 1000)
            yield f'<line class="bar" x1="{x:.1f}" x2="{max(end, x + 0.1):.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
        else:
            yield f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="1.4"/>'
    yield "</g>"
    after = [point for point in points if point.at_s + point.took_ms / 1000 >= 0]
    if after:
        worst = max(after, key=lambda point: point.took_ms)
        x, y = scale.x(worst.at_s + worst.took_ms / 1000), scale.y(worst.took_ms, top)
        is_right = x > WIDTH - 120
        anchor, x = ("end", scale.x(worst.at_s) - 6) if is_right else ("start", x + 6)
        text = milliseconds_text(worst.took_ms)
        yield f'<text class="worst" x="{x:.1f}" y="{y + 4:.1f}" text-anchor="{anchor}">{text}</text>'


def _marks(scale: _Scale, marks: list[tuple[float, str]], bottom: float) -> Iterable[str]:
    for index, (at_s, what) in enumerate(marks):
        x, later = scale.x(at_s), "" if index == 0 else " later"
        anchor, dx = ("end", -4) if x > WIDTH - 220 else ("start", 4)
        y = 12 + 12 * (index % 2)
        yield f'<line class="mark{later}" x1="{x:.1f}" x2="{x:.1f}" y1="{y - 8}" y2="{bottom - LANE_GAP}"/>'
        yield f'<text class="said{later}" x="{x + dx:.1f}" y="{y}" text-anchor="{anchor}">{escape(what)}</text>'
