"""Several processes: one of them asks, and one of them uploads."""

from __future__ import annotations

from pathlib import Path

from tests.hub.state import TOKEN, Hub
from tests.ranks.launch import Job, run_jobs


def test_one_process_of_a_job_uploads(hub: Hub, run: Path, tmp_path: Path) -> None:
    words = ("ema", run, "--push-to-hub")
    jobs = tmp_path / "jobs"
    jobs.mkdir()
    refused, done = run_jobs(jobs, 2, Job((*words, "nobody/x")), Job((*words, "ada/x")))
    assert refused.status == [1, 1]
    assert "there is no user and no organization nobody" in refused.err[0]
    assert refused.err[1] == ""
    assert done.first_out.splitlines()[-1] == f"url      {hub.url}/ada/x"
    assert hub.requests.count("GET /api/whoami-v2") == 3, "once in vain, then before and after the averaging"
    assert len(hub.repos["ada/x"].commits) == 2
    assert not any(TOKEN in text for ran in (refused, done) for text in (*ran.out, *ran.err))
