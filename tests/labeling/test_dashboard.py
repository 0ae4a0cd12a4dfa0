"""The dashboard in a real browser, the page of the API's description, and the metrics."""

import asyncio
import contextlib
import html
import json
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from laif_jax.labeling.client import LabelClient
from laif_jax.records import Comparison, Completion, Prompt
from tests.labeling.browser import CHROMIUM, OPTIONS, browse, needs_browser
from tests.labeling.face_server import TOKEN, served
from tests.labeling.helpers import simulated

HOSTILE = (
    "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">",
    "</p></div><svg onload=\"document.title='owned'\"> <a href=\"javascript:document.title='owned'\">x</a>",
)


def hostile(count: int) -> list[Comparison]:
    items = []
    for number in range(count):
        prompt = Prompt.from_text(f"{HOSTILE[1]} question {number}")
        a, b = (
            Completion(
                prompt_id=prompt.id, generator=name, text=f"{text} {number}", meta={"quality": quality}
            )
            for name, text, quality in zip("ab", HOSTILE, (0.1, 0.9), strict=True)
        )
        items.append(Comparison(prompt=prompt, a=a, b=b))
    return items


@pytest.fixture(scope="module")
def service(tmp_path_factory) -> Iterator[str]:
    """A service that has run a job of hostile texts at prices, with some failures."""
    store = tmp_path_factory.mktemp("face") / "store"
    with served(store, "--budget", "2USD", "--token-env", "") as (url, _), LabelClient(url) as client:
        endpoint = simulated(failure_rate=0.3, max_attempts=12).model_copy(
            update={"prompt_price": 2.0, "completion_price": 8.0, "model": "<b>model</b>"}
        )
        judgements = client.judge(endpoint, "laif_basic", hostile(12))
        assert len(judgements) == 12
        yield url


def dom(url: str, folder: Path, *options: str) -> str:
    """The page after its scripts ran for some seconds."""
    assert CHROMIUM is not None
    command = [CHROMIUM, *OPTIONS, f"--user-data-dir={folder}", "--virtual-time-budget=5000"]
    done = subprocess.run(
        [*command, *options, "--dump-dom", url], capture_output=True, timeout=120, check=True
    )
    return done.stdout.decode()


def words(page: str) -> str:
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", page)).split())


@needs_browser
def test_the_dashboard_shows_the_run_and_executes_nothing_of_it(service: str, tmp_path: Path) -> None:
    page = dom(service + "/", tmp_path)
    shown = words(page)
    for text in (
        "live",
        "12 of 12",
        "laif_basic",
        "server_error",
        "b is better",
        "spent of $2.00",
        "Latest judgements",
    ):
        assert text in shown, text
    assert "<title>Labelling service</title>" in page  # no script of a response ran
    assert "document.title='owned'" in shown  # but it is there to be read
    assert not re.search(r"<img|<svg onload|<b>model|<a href=\"javascript", page)
    assert page.count("<script") == 1
    side = re.search(r'class="side better"><h4>(.)</h4>', page)
    assert side is not None
    assert side.group(1) == "b"


@needs_browser
def test_the_dashboard_needs_nothing_from_elsewhere(service: str, tmp_path: Path) -> None:
    """Chromium can reach this machine alone here, and the page's policy lets it load from the service alone."""
    page = dom(service + "/", tmp_path, "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1")
    assert "12 of 12" in words(page)
    policy = httpx.get(service + "/").headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "http" not in policy
    for path in ("/", "/docs", "/web/page.css", "/web/dashboard.js"):
        text = httpx.get(service + path).text.replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"(src|href)=.?(https?:)?//|url\(|import ", text), path


@needs_browser
async def test_the_dashboard_follows_a_running_job(tmp_path: Path) -> None:
    """One page, never loaded again: it shows a job while it runs, its end, a second job, and a service that is gone."""
    with served(tmp_path / "store", "--token-env", "") as (url, process), LabelClient(url) as client:
        async with browse(tmp_path / "profile") as page:
            await page.open(url + "/")
            await page.shows("no job yet")
            await page.shows("no judgement yet")
            await page.evaluate("window.firstLoad = true")
            slow = simulated(concurrency=2, latency=1.0)
            job = asyncio.create_task(asyncio.to_thread(client.judge, slow, "laif_basic", hostile(10)))
            await page.shows("running · judge")
            await page.shows("2 of 2")  # in flight, of the endpoint's two
            await page.shows("left")  # a pace, and so a time until the end
            await job
            await page.shows("done · judge")
            await page.shows("10 of 10")
            await page.shows("is better, with probability")
            assert await page.evaluate("document.querySelector('#spark path.line') !== null")
            await asyncio.to_thread(client.judge, simulated(), "ab_logprob", hostile(3))
            await page.shows("3 of 3")
            assert await page.evaluate("document.title") == "Labelling service"  # no script of a response ran
            assert page.problems == []
            process.terminate()
            process.wait(60)
            await page.shows("no connection")
            assert "10 of 10" in await page.text()  # what was known stays
            assert await page.evaluate("window.firstLoad")
    assert "Traceback" not in (tmp_path / "store.log").read_text()


@needs_browser
async def test_the_dashboard_asks_for_the_token(tmp_path: Path) -> None:
    """It shows nothing without; a wrong one is told; the right one opens it, and stays in this tab alone."""
    enter = (
        "document.getElementById('token').value = {}; document.querySelector('#token-form button').click()"
    )
    with served(tmp_path / "store", env={"LAIF_LABEL_TOKEN": TOKEN}) as (url, _):
        async with browse(tmp_path / "profile") as page:
            await page.open(url + "/")
            await page.until("!document.getElementById('login').hidden")
            assert await page.evaluate("document.getElementById('main').hidden")
            assert str(tmp_path) not in await page.evaluate("document.documentElement.outerHTML")
            await page.evaluate(enter.format("'a-token-that-is-wrong'"))
            await page.shows("does not accept this token")
            assert await page.evaluate("document.getElementById('main').hidden")
            await page.evaluate(enter.format(json.dumps(TOKEN)))
            await page.shows("no job yet")
            assert await page.evaluate("document.getElementById('login').hidden")
            assert await page.evaluate("document.getElementById('token').value") == ""
            assert await page.evaluate("[document.cookie, localStorage.length, location.href]") == [
                "",
                0,
                url + "/",
            ]
            await page.send("Page.reload")
            await page.until("document.readyState === 'complete'")
            await page.shows("no job yet")


@needs_browser
def test_it_can_be_read_on_a_phone(service: str, tmp_path: Path) -> None:
    """Nothing is wider than the window. (Chromium's own windows are at least 500 wide, so a frame is measured.)"""
    page = httpx.get(service + "/").text
    style = httpx.get(service + "/web/page.css").text
    overview = httpx.get(service + "/v1/overview").text.replace("</", "<\\/")
    script = httpx.get(service + "/web/dashboard.js").text
    fake = f"window.fetch = async () => new Response({json.dumps(overview)});".replace("</", "<\\/")
    body = page.partition("<body")[2].partition(">")[2].partition("</body>")[0]
    inner = f"<style>{style}</style><body data-needs-token='no'>{body}<script>{fake}{script}</script></body>"
    quoted = json.dumps(inner).replace("</", "<\\/")
    probe = (
        "<iframe id=f width=360 height=800></iframe><p id=out></p><script>"
        f"f.srcdoc = {quoted};"
        "setTimeout(() => { const d = f.contentDocument; out.textContent = 'width ' + "
        "d.documentElement.scrollWidth + ' cards ' + d.querySelectorAll('.card.job').length; }, 3000);</script>"
    )
    file = tmp_path / "probe.html"
    file.write_text("<!doctype html><meta charset=utf-8>" + probe)
    found = re.search(r"width (\d+) cards (\d+)", dom(file.as_uri(), tmp_path / "profile"))
    assert found is not None
    assert int(found.group(1)) <= 360
    assert int(found.group(2)) == 1


def test_the_description_has_words_and_examples_for_everything(service: str) -> None:
    schema = httpx.get(service + "/openapi.json").json()
    text = json.dumps(schema)
    defined = set(schema["components"]["schemas"])
    assert set(re.findall(r"#/components/schemas/(\w+)", text)) <= defined
    for path, operations in schema["paths"].items():
        for operation in operations.values():
            assert operation["summary"], path
            assert len(operation["description"]) > 30, path
            assert all(p.get("description") for p in operation.get("parameters", [])), path
    page = httpx.get(service + "/docs").text
    for path in schema["paths"]:
        assert html.escape(path) in page
    assert "http://" not in page.replace("http://127.0.0.1", "")
    assert "<script" not in page


def test_the_examples_of_jobs_are_accepted(service: str) -> None:
    from laif_jax.labeling.examples import JOBS
    from laif_jax.labeling.jobs import job_request

    for example in JOBS.values():
        job_request.validate_json(json.dumps(example["value"]))
    with LabelClient(service) as client:
        answer = httpx.post(service + "/v1/jobs", json=JOBS["judge"]["value"])
        assert answer.status_code == 202
        end = time.monotonic() + 30
        while client.status(answer.json()["id"]).state != "done":
            assert time.monotonic() < end
            time.sleep(0.05)


def test_metrics_are_what_happened(service: str) -> None:
    time.sleep(1.5)  # counts of the store are read once a second
    answer = httpx.get(service + "/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            found.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
    with contextlib.closing(LabelClient(service)) as client:
        stats = client.stats()
    model = "<b>model</b> at "
    calls = {
        dict(k)["outcome"]: v for k, v in found["laif_calls_total"].items() if model in dict(k)["endpoint"]
    }
    assert calls["answered"] == 24
    assert calls["server_error"] == stats["failures"]["server_error"] > 0
    seconds = {dict(k)["endpoint"]: v for k, v in found["laif_call_seconds_count"].items()}
    assert next(v for k, v in seconds.items() if model in k) == sum(calls.values())
    assert {dict(k)["state"]: v for k, v in found["laif_requests"].items()} == stats["requests"]
    assert found["laif_spent_dollars"][()] == pytest.approx(stats["budget"]["spent_nanos"] / 1e9)
    assert found["laif_spent_dollars"][()] > 0
    assert found["laif_budget_dollars"][()] == 2.0
    assert set(found["laif_calls_in_flight"].values()) == {0.0}
    assert "laif_calls_waiting" in found
