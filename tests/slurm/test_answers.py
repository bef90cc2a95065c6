"""One job as squeue and sacct of several releases show it; what cannot be read is left out."""

from __future__ import annotations

import json
from typing import Any

import pytest

from slurm.answers import EndedJob, QueuedJob, ended_from_json, ended_from_text, queued_from_json, queued_from_text

QUEUED = QueuedJob("41", "RUNNING", "n[1-2]", "None", "longstride abc")
ENDED = EndedJob("41", "a", "TIMEOUT", "0:15", "n[1-2]", "longstride abc")


def number(value: int) -> dict[str, Any]:
    return {"set": True, "infinite": False, "number": value}


@pytest.mark.parametrize(
    "job",
    [
        {"job_id": 41, "job_state": "RUNNING", "nodes": "n[1-2]", "state_reason": "None", "comment": "longstride abc", "gres_detail": []},
        {"job_id": 41, "job_state": ["RUNNING"], "nodes": "n[1-2]", "state_reason": "None", "comment": "longstride abc"},
        {
            "job_id": number(41),
            "job_state": ["RUNNING", "COMPLETING"],
            "nodes": "",
            "job_resources": {"nodes": {"count": 2, "list": "n[1-2]"}},
            "state_reason": "None",
            "comment": "longstride abc",
        },
    ],
    ids=["22.05", "23.11", "24.05"],
)
def test_squeue_in_json(job: dict[str, Any]) -> None:
    assert queued_from_json(json.dumps({"meta": {}, "errors": [], "jobs": [job]})) == [QUEUED]


@pytest.mark.parametrize(
    "job",
    [
        {
            "state": {"current": "TIMEOUT", "reason": "None"},
            "exit_code": {"status": "SIGNALED", "return_code": 0, "signal": {"signal_id": 15}},
        },
        {
            "state": {"current": ["TIMEOUT"], "reason": "None"},
            "exit_code": {"status": ["SIGNALED"], "return_code": number(0), "signal": {"id": number(15)}},
        },
    ],
    ids=["22.05", "24.05"],
)
def test_sacct_in_json(job: dict[str, Any]) -> None:
    common = {"job_id": 41, "name": "a", "nodes": "n[1-2]", "comment": {"job": "longstride abc", "administrator": "", "system": ""}}
    assert ended_from_json(json.dumps({"jobs": [common | job]})) == [ENDED]


@pytest.mark.parametrize("task", [1, number(1)], ids=["22.05", "24.05"])
def test_tasks_and_repeated_records_in_json(task: Any) -> None:
    """As text shows them: a task by its array, and of a requeued job the last record."""
    state = {"job_state": ["RUNNING"], "nodes": "n[1-2]", "state_reason": "None", "comment": "longstride abc"}
    queued = {"job_id": 43, "array_job_id": 41, "array_task_id": task, **state}
    ended = {**queued, "job_id": 44, "array_task_id": 0, "job_state": ["COMPLETED"]}
    single = {"job_id": 45, "array_job_id": 0, "array_task_id": {"set": False, "number": 0} if isinstance(task, dict) else None, **state}
    assert [job.id for job in queued_from_json(json.dumps({"jobs": [ended, queued, single]}))] == ["41_1", "45"]

    def record(when: int, state: str) -> dict[str, Any]:
        array = {"job_id": 41, "task_id": task}
        return {"job_id": 43, "array": array, "name": "a", "state": {"current": state}, "time": {"submission": when}, "nodes": "n1"}

    shown = [record(5, "NODE_FAIL"), record(9, "TIMEOUT"), record(7, "PREEMPTED")]
    assert ended_from_json(json.dumps({"jobs": shown})) == [EndedJob("41_1", "a", "TIMEOUT", "", "n1", "")]
    assert ended_from_json(json.dumps({"jobs": [*shown, record(9, "PENDING")]})) == []


def test_text() -> None:
    assert queued_from_text("41|RUNNING|n[1-2]|None|longstride abc\n") == [QUEUED]
    assert queued_from_text("42|PENDING||Priority|two\nlines | of | it\n41|RUNNING|n[1-2]|None|longstride abc\n")[1:] == [QUEUED]  # type: ignore[index]
    assert queued_from_text("") == [] and queued_from_text("slurm said something else\n") is None
    assert ended_from_text("41|TIMEOUT|0:15|n[1-2]|a|longstride abc\n") == [ENDED]
    assert ended_from_text("7|CANCELLED by 1000|0:0||a|b|\n") == [EndedJob("7", "a|b", "CANCELLED", "0:0", "", "")]
    assert ended_from_text("7|CANCELLED by 0|0:0|None assigned|a|b\n8|PENDING|0:0|None assigned|a|\n9|REQUEUED|0:0|n1|a|\n") == [
        EndedJob("7", "a", "CANCELLED", "0:0", "", "b")
    ]
    assert ended_from_text("\n") == [] and ended_from_text("{}\n") is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"jobs": {}}',
        '{"jobs": [1, null, {}, {"job_id": 1}, {"job_id": 1, "job_state": []}, {"job_state": "RUNNING"}]}',
        "\x00",
    ],
)
def test_what_cannot_be_read_is_left_out(text: str) -> None:
    assert queued_from_json(text) == [] and ended_from_json(text) == []
