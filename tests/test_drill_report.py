"""What drills measure and how it is told: pauses, figures, the table, the page."""

import json
import xml.dom.minidom
from html.parser import HTMLParser

import pytest
from click.testing import CliRunner

from csvfs.admin.cli import main
from csvfs.admin.drill import Round
from csvfs.admin.drill_history import Operation
from csvfs.admin.drill_html import page, picture
from csvfs.admin.drill_pauses import BIN_S, pauses_of, timeline_of
from csvfs.admin.drill_plans import AT_VICTIM, DRILLS, ELSEWHERE, Case, cases_of, narrowed
from csvfs.admin.drill_report import (
    COLUMNS,
    DrillReport,
    milliseconds_text,
    round_line,
    summary,
    table_rows,
    what_went_wrong,
)
from csvfs.admin.render import plain

MS = 1_000_000
FAULT_MS = 1000


def operation(thread: str, begin_ms: float, end_ms: float | None, error: int = 0, program: str = "other") -> Operation:
    ends = None if end_ms is None else int(end_ms * MS)
    return Operation(program, "other", thread, int(begin_ms), "kind", int(begin_ms * MS), ends, error)


def steady(thread: str, *, until_ms: int, pause: tuple[int, int] | None = None) -> list[Operation]:
    """One operation of 2 ms every 10 ms; `pause`: one lasts from, until."""
    rows, now = [], 0
    while now < until_ms:
        end = pause[1] if pause and pause[0] <= now < pause[1] else now + 2
        rows.append(operation(thread, now, end))
        now = max(end, now + 10)
    return rows


def test_a_pause_is_the_longest_wait_that_was_under_way_at_the_fault_or_began_after_it():
    rows = [*steady("read", until_ms=3000), *steady("append", until_ms=3000, pause=(990, 1440))]
    pauses = pauses_of([operation("write", 100, 300), *rows], FAULT_MS * MS, 3000 * MS)
    assert pauses["reads"].longest == 2 and pauses["reads"].gap == 10
    assert pauses["writes"].longest == 450 and pauses["writes"].gap == 458
    assert pauses["writes"].before == 200  # what was slow before the fault is not blamed on it
    assert pauses["metadata"].answers == 0


def test_an_operation_without_answer_has_waited_until_the_end():
    pauses = pauses_of([operation("names", 1200, None)], FAULT_MS * MS, 9200 * MS)
    assert pauses["metadata"].longest == 8000 and pauses["metadata"].answers == 0


def test_an_error_is_no_answer_the_wait_lasts_until_the_next_success():
    rows = [operation("names", at, at + 1, error=107) for at in range(1200, 2200, 50)]
    pauses = pauses_of([operation("names", 1100, 1101), *rows, operation("names", 2200, 2204)], FAULT_MS * MS, 9000 * MS)
    assert pauses["metadata"].longest == 1004 and pauses["metadata"].gap == 1103 and pauses["metadata"].answers == 2


def test_a_timeline_keeps_the_longest_wait_of_each_moment_and_every_failure():
    fast = [operation("read", 1000 + step / 100, 1001 + step / 100) for step in range(int(BIN_S * 1e5))]
    rows = [*fast, operation("read", 1005, 1700), operation("read", 1010, 1011, error=5)]
    timeline = timeline_of(rows, [(FAULT_MS * MS, "killed"), (2000 * MS, "started")], 3000 * MS)
    assert timeline.marks == [(0.0, "killed"), (1.0, "started")]
    assert [point.failed for point in timeline.points["reads"]][:1] == [True]


def a_round(title: str = "coordinator", *, wait_ms: int = 400, violations: tuple[str, ...] = ()) -> Round:
    rows = [*steady("read", until_ms=3000), *steady("write", until_ms=3000, pause=(1000, 1000 + wait_ms))]
    rows += steady("names", until_ms=3000)
    round_ = Round("coordinator", title, "n2", held=not violations, violations=list(violations))
    round_.violation_count = len(violations)
    round_.pauses = {where: pauses_of(rows, FAULT_MS * MS, 3000 * MS) for where in (ELSEWHERE, AT_VICTIM)}
    marks = [(FAULT_MS * MS, "coordinator of <n2> killed")]
    round_.timelines = {where: timeline_of(rows, marks, 3000 * MS) for where in (ELSEWHERE, AT_VICTIM)}
    round_.operations, round_.acknowledged, round_.fsynced = len(rows), 500, 480
    return round_


def test_the_table_tells_median_and_worst_and_whether_the_goal_is_reached():
    report = DrillReport("V", 0, 3, [a_round(wait_ms=wait) for wait in (300, 400, 1200)])
    first, second = table_rows(report)
    assert len(first) == len(COLUMNS)
    assert first[0] == "coordinator" and second[0] == ""
    assert "0.40/1.20 s" in first and "1 s MISSED" in first
    assert "1 s ok" in table_rows(DrillReport("V", 0, 1, [a_round()]))[0]
    assert report.held and "nothing lost" in summary(report) and what_went_wrong(report) == []


def test_what_went_wrong_is_said_with_the_place_of_the_logs():
    bad = a_round(violations=("lost: other/b1: verify saw 1, but 2 had been acknowledged before",))
    bad.logs, bad.violation_count = "/tmp/kept", 7
    report = DrillReport("V", 0, 2, [a_round(), bad])
    lines = what_went_wrong(report)
    assert not report.held and "7 violations" in summary(report)
    assert "coordinator (n2): lost: other/b1" in lines[0] and "6 more" in lines[1] and "/tmp/kept" in lines[1]
    assert "7 VIOLATIONS, the first: lost: other/b1: verify saw 1" in round_line(bad)  # at once, not after all rounds


def test_the_json_has_all_figures_and_can_be_read_again():
    report = DrillReport("V", 100, 2, [a_round(), a_round(violations=("error: x",))])
    told = json.loads(json.dumps(plain(report.to_json())))
    assert told["held"] is False and told["files"] == 100
    assert [case["where"] for case in told["cases"]] == [ELSEWHERE, AT_VICTIM]
    assert told["cases"][0]["pauses"]["writes"] == {"median": 400.0, "worst": 400.0}
    assert told["rounds"][1]["violations"] == ["error: x"] and told["rounds"][0]["marks"][0][0] == 0.0


class Tags(HTMLParser):
    """That every tag is closed, in order, and nothing is loaded from anywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.svgs = 0

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert not {"src", "href"} & {name for name, _ in attributes}
        self.svgs += tag == "svg"
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_escapes_what_it_is_told():
    bad = a_round("store <leader>", violations=("lost: <b>&",))
    tags = Tags()
    text = page(DrillReport("V", 0, 1, [a_round(), bad]))
    tags.feed(text)
    assert tags.open == [] and tags.svgs == 4
    assert "<b>" not in text and "&lt;b&gt;&amp;" in text and "coordinator of &lt;n2&gt; killed" in text
    xml.dom.minidom.parseString(picture(bad.timelines[ELSEWHERE], 1000.0))


def test_a_picture_of_nothing_is_still_one():
    xml.dom.minidom.parseString(picture(timeline_of([], [(0, "killed")], 0), None))


@pytest.mark.parametrize(("value", "text"), [(0.4, "0 ms"), (999, "999 ms"), (1000, "1 s"), (3051, "3.05 s"), (12_400, "12 s")])
def test_times_are_told_in_the_unit_that_suits_them(value: float, text: str):
    assert milliseconds_text(value) == text


def test_the_victims_are_the_coordinator_and_others_in_turn_and_programs_run_elsewhere():
    nodes = ("n1", "n2", "n3")

    def victims(name: str, turns: int, *, has_etcd: bool = True) -> list[str]:
        cases = [make for turn in range(turns) for make in cases_of(DRILLS[name], nodes, lambda: "n2", turn, has_etcd=has_etcd)]
        assert all(case.victim not in case.others for case in (make() for make in cases))
        return [make().victim for make in cases]

    assert victims("coordinator", 2) == ["n2", "n2"]
    assert victims("node", 4) == ["n2", "n1", "n2", "n3"]
    assert victims("drive", 3) == victims("rolling", 1) == ["n1", "n2", "n3"]
    frozen = [make().name for make in cases_of(DRILLS["freeze"], nodes, lambda: "n2", 0, has_etcd=True)]
    assert frozen == ["drives", "coordinator", "mount", "node", "store", "everything"]


def test_freeze_takes_one_kind_and_how_long_and_no_other_drill_does():
    nodes = ("n1", "n2", "n3")

    def case(kind: str) -> Case:
        drill = narrowed(DRILLS["freeze"], kind, 4.0)
        (make,) = cases_of(drill, nodes, lambda: "n2", 0, has_etcd=True)
        return make()

    assert case("coordinator") == Case("freeze", "coordinator", "n2", ("n1", "n3"), True, 4.0)
    # Where all of a node stands still nobody keeps the kernel from showing what it has cached.
    assert case("mount").at_victim and case("node").at_victim
    assert case("everything").victim == "n2" and not case("everything").at_victim
    assert narrowed(DRILLS["freeze"], "store", None).needs_etcd and not narrowed(DRILLS["freeze"], None, None).needs_etcd
    for options in (["node", "mount"], ["all", "--seconds", "3"]):
        result = CliRunner().invoke(main, ["drill", *options, "--dir", "/var/tmp/no-lab-here"])
        assert result.exit_code == 1 and "belong to drill freeze" in result.output


def test_a_drill_where_there_is_no_lab_says_so():
    result = CliRunner().invoke(main, ["drill", "node", "--dir", "/var/tmp/no-lab-here"])
    assert result.exit_code == 1 and "there is no lab" in result.output
