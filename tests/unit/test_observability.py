"""The files of `observability/`, in the programs that they are for."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from actors.circuit_breaker.policy import Verdict
from actors.ref import InlineRef
from forebay.metrics import FAMILIES, Meter, prompt_cache
from tests.support.prometheus_server import HERE, PrometheusServer, prometheus_server, promtool

DASHBOARD = json.loads((HERE / "grafana-dashboard.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
EXPRESSIONS = [target["expr"] for panel in PANELS for target in panel["targets"]]


def filled(expression: str) -> str:
    """An expression as Grafana sends it: with all models and tenants, at a usual resolution."""
    for name, value in {"$__rate_interval": "10s", "$model": ".*", "$tenant": ".*"}.items():
        expression = expression.replace(name, value)
    assert "$" not in expression
    return expression


def busy_meter() -> Meter:
    """A meter that has counted something in every family."""
    ref = InlineRef("cache", object())
    meter = Meter(lambda: [ref])
    meter.add(prompt_cache(lambda: {"cached_tokens": 9, "written_tokens": 4, "saved_usd": 0.5}))
    meter.add(lambda: {("forebay_lane_calls", "openai/x", "relay"): (7,)})
    meter.add(lambda: {("forebay_validation_findings", "json", "error"): (3,)})
    ref.sent["lookup"] += 1
    count_more(meter)
    return meter


def count_more(meter: Meter) -> None:
    for status in ("ok", "429", "502"):
        meter.request("chat", "m", "acme", status, 0.2, 0.19)
    for verdict in Verdict:
        meter.provider_call("openai/x", verdict.value)
    for outcome in ("hit", "miss", "joined"):
        meter.cache(outcome)
    meter.first_token(0.1)
    meter.usage(10, 20, 1_500_000)
    meter.coalesced(2)
    meter.limited("acme", "tokens_per_minute")
    meter.queued(0.3)


def told(meter: Meter) -> bytes:
    meter.breaker("openai/x", 2)
    meter.unsettled(1)
    meter.stored({"entries": 5, "bytes": 1000, "evicted": 2})
    return meter.render()


@pytest.fixture(scope="module")
def scraped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrometheusServer]:
    """A Prometheus that has scraped a meter, which counts on, a few times."""
    meter = busy_meter()

    class Metrics(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            count_more(meter)
            text = told(meter)
            self.send_response(200 if self.path == "/metrics" else 404)
            self.send_header("content-type", "text/plain; version=0.0.4; charset=utf-8")
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
            pass

    target = ThreadingHTTPServer(("127.0.0.1", 0), Metrics)
    threading.Thread(target=target.serve_forever, args=(0.02,), daemon=True).start()
    directory = tmp_path_factory.mktemp("prometheus")
    with prometheus_server(directory, f"127.0.0.1:{target.server_port}") as server:
        server.wait_for("count_over_time(up[1m]) >= 4")
        yield server
    target.shutdown()
    target.server_close()


def test_the_text_of_the_metrics_has_no_fault() -> None:
    promtool("check", "metrics", given=told(busy_meter()))


def test_the_configuration_and_the_alerts_are_valid() -> None:
    assert "SUCCESS: 8 rules found" in promtool("check", "rules", str(HERE / "alerts.yml"))
    promtool("check", "config", str(HERE / "prometheus.yml"))


def test_every_alert_fires_when_it_should_and_only_then() -> None:
    assert "SUCCESS" in promtool("test", "rules", str(HERE / "alerts_test.yml"))
    tried = set(re.findall(r"alertname: (\w+)", (HERE / "alerts_test.yml").read_text()))
    assert tried == set(re.findall(r"alert: (\w+)", (HERE / "alerts.yml").read_text()))


def test_prometheus_takes_every_sample(scraped: PrometheusServer) -> None:
    (target,) = scraped.get("targets")["activeTargets"]
    assert (target["health"], target["lastError"]) == ("up", "")
    names = set(scraped.get("label/__name__/values"))
    for family in FAMILIES:
        kind = "_bucket" if family.bounds else "_total" if family.kind == "counter" else ""
        assert family.name + kind in names
    assert scraped.query("forebay_breaker_state") == {
        (("__name__", "forebay_breaker_state"), ("deployment", "openai/x")): 2.0
    }
    ratio = 'sum(forebay_requests_total{status="ok"}) / sum(forebay_requests_total)'
    assert scraped.query(ratio) == {(): pytest.approx(1 / 3)}


def test_prometheus_has_taken_the_alerts(scraped: PrometheusServer) -> None:
    scraped.wait_for('ALERTS{alertname="ForebayBreakerOpen"}')
    (group,) = scraped.get("rules")["groups"]
    assert {rule["name"]: rule["lastError"] for rule in group["rules"] if "lastError" in rule} == {}
    assert len(group["rules"]) == 8


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_every_panel_of_the_dashboard_shows_something(
    scraped: PrometheusServer, expression: str
) -> None:
    assert scraped.query(filled(expression))


def test_the_dashboard_shows_every_family() -> None:
    shown = set(re.findall(r"forebay_\w+?(?=_total|_bucket|\b)", " ".join(EXPRESSIONS)))
    assert {family.name for family in FAMILIES} <= shown


def test_the_dashboard_is_one_that_grafana_can_place() -> None:
    """Grafana itself is in no registry; these are what it needs to import a dashboard."""
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    assert DASHBOARD["schemaVersion"] >= 36
    names = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(DASHBOARD["panels"]))) - {"__rate_interval"}
    assert used == names
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells
    for panel in PANELS:
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert panel["title"]
        assert panel["targets"]
