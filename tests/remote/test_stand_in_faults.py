"""What goes wrong on the Hub on loopback, and who may read there, as huggingface_hub sees it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx2
import pytest
from huggingface_hub import HfApi, HfFileSystem, constants, hf_hub_download
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

from tests.hub.server import TOKEN, Hub, Repo
from tests.hub.wire import DROPPED, HELD, WHOLE, Broken
from tests.remote.published import digest_of, publish_revisions, weights
from tests.remote.questions import ASK, FILE, REPO

FOREVER = 1_000
CLOSED, RESET = Broken(1, "closed"), Broken(1, "reset")


@pytest.mark.parametrize("status", [401, 403, 404, 429, 500, 503])
@pytest.mark.parametrize("stage", ASK)
def test_a_status_at_every_stage(hub: Hub, repo: Repo, api: HfApi, stage: str, status: int) -> None:
    hub.faults[stage] = status, FOREVER
    with pytest.raises(HfHubHTTPError) as caught:
        ASK[stage](api)
    assert caught.value.response.status_code == status
    if status == 429:
        assert caught.value.response.headers["Retry-After"] == "7"
    hub.faults.clear()
    ASK[stage](api)


@pytest.mark.parametrize(
    ("stage", "fault"),
    # an answer without a body breaks off nowhere
    [("head", DROPPED)] + [(stage, fault) for stage in ASK if stage != "head" for fault in (DROPPED, CLOSED, RESET)],
)
def test_a_connection_that_is_cut(hub: Hub, repo: Repo, api: HfApi, stage: str, fault: Any) -> None:
    hub.faults[stage] = fault, FOREVER
    with pytest.raises(httpx2.TransportError):
        ASK[stage](api)
    assert hub.served.total() == (0 if fault == DROPPED or stage not in ("resolve", "fetch") else tries(hub, stage))
    hub.faults.clear()
    ASK[stage](api)


def tries(hub: Hub, stage: str) -> int:
    return sum(hub.stage(line) == stage for line in hub.requests)


def test_a_download_goes_on_where_it_broke_off(
    hub: Hub, repo: Repo, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100_000)  # otherwise it forgets what is less than 10 MB
    size = len(weights(run))
    hub.faults["fetch"] = Broken(500_000, "closed"), 1
    assert Path(hf_hub_download(REPO, FILE, revision="step10")).read_bytes() == weights(run)
    assert [asked for _, asked in hub.ranges] == ["bytes=500000-"]
    assert hub.served[f"{REPO}@step10/{FILE}"] == size

    hub.forget()
    hub.faults["fetch"] = Broken(500_000, "closed"), 1
    hub.then["fetch"] = lambda: hub.faults.update(fetch=(WHOLE, 1))
    assert Path(hf_hub_download(REPO, FILE, revision="step30")).read_bytes() == weights(run, 30)
    assert hub.served[f"{REPO}@step30/{FILE}"] == 500_000 + size, "the range was asked for, and not given"


def test_fewer_bytes_and_more_than_were_asked_for(hub: Hub, repo: Repo, run: Path) -> None:
    """A download is checked against the size that it should have; what fsspec reads by ranges is not."""
    hub.faults["fetch"] = Broken(1_000, "short"), 1
    with pytest.raises(OSError, match="Consistency check failed"):
        hf_hub_download(REPO, FILE, revision="step10")
    files = HfFileSystem(endpoint=hub.url, skip_instance_cache=True)
    hub.faults["fetch"] = Broken(2, "short"), 1
    assert files.cat_file(f"{REPO}@step10/{FILE}", start=0, end=8) == weights(run)[:2]
    hub.faults["fetch"] = WHOLE, 1
    assert hub.served[f"{REPO}@step10/{FILE}"] == 1_002
    # the first bytes of all that came are taken for those that were asked for
    assert files.cat_file(f"{REPO}@step10/{FILE}", start=900_000, end=900_008) == weights(run)[:8]
    assert weights(run)[:8] != weights(run)[900_000:900_008]
    assert hub.served[f"{REPO}@step10/{FILE}"] == 1_002 + len(weights(run))


@pytest.mark.parametrize(("fault", "arrived"), [(HELD, 0), (Broken(300, "stalled"), 300)])
def test_an_answer_that_does_not_come(hub: Hub, repo: Repo, run: Path, fault: Any, arrived: int) -> None:
    """Others are answered meanwhile."""
    hub.faults["fetch"] = fault, 1
    place = hub.storage_url + f"/storage/{digest_of(weights(run))}?X-Signature=Signed&X-File=it"
    with (
        pytest.raises(httpx2.ReadTimeout),
        httpx2.stream("GET", place, timeout=httpx2.Timeout(30, read=0.5), trust_env=False) as answer,
    ):
        list(answer.iter_bytes())
    assert hub.held.is_set()
    assert hub.served["it"] == arrived
    assert httpx2.get(place, trust_env=False).content == weights(run)


def test_a_private_repository(hub: Hub, run: Path) -> None:
    publish_revisions(hub, REPO, run, private=True)
    for ask in ASK.values():
        ask(HfApi(endpoint=hub.url, token=TOKEN))
    nobody, somebody = HfApi(endpoint=hub.url, token=False), HfApi(endpoint=hub.url, token="hf_" + "x" * 34)
    for stage in ("info", "refs", "list", "look"):
        with pytest.raises(HfHubHTTPError, match="Invalid username or password") as caught:
            ASK[stage](nobody)
        assert caught.value.response.status_code == 401
        with pytest.raises(HfHubHTTPError, match="Invalid credentials"):
            ASK[stage](somebody)
    with pytest.raises(RepositoryNotFoundError) as missing:
        HfApi(endpoint=hub.url, token=TOKEN).repo_info("lab/other")
    assert missing.value.response.status_code == 404


def test_a_gated_repository(hub: Hub, repo: Repo, run: Path) -> None:
    """Who is not let in sees the lists, and no file."""
    hub.gated.add(REPO)
    nobody = HfApi(endpoint=hub.url, token=False)
    for stage in ("info", "refs", "list", "look"):
        ASK[stage](nobody)
    assert nobody.model_info(REPO).gated == "manual"
    for token, status in ((False, 401), (TOKEN, 403)):
        with pytest.raises(GatedRepoError) as caught:
            hf_hub_download(REPO, FILE, token=token, revision="step10")
        assert caught.value.response.status_code == status
    assert hub.served.total() == 0
    hub.gated.clear()
    hub.granted.add(REPO)
    with pytest.raises(GatedRepoError):
        hf_hub_download(REPO, FILE, token=False, revision="step10")
    assert Path(hf_hub_download(REPO, FILE, token=TOKEN, revision="step10")).read_bytes() == weights(run)
