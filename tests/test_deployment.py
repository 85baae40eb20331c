"""What lies in docker/ fits the service: options and metrics that exist, ports, limits, versions.

With DML_TEST_DOCKER=1 the whole stack is brought up and tried, by docker/try.py; that needs docker and the
images.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import ColourEncoder, colour_collection, running

from dml.cli.main import LazyGroup
from service.app import create_app
from service.engine import Engine
from service.problems import CATALOGUE
from service.settings import MEBIBYTE, Settings

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).parent.parent
DOCKER = ROOT / "docker"
PLACED = {
    "SERVER_NAME": "localhost",
    "POD_IP": "10.0.0.7",
    "PROXY_NETWORK": "10.0.0.0/8",
    "COLLECTION": "pictures",
}


def documents(*parts: str) -> list[dict[str, Any]]:
    return [found for found in yaml.safe_load_all(DOCKER.joinpath(*parts).read_text()) if found]


def check_command(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """`dml …` would take these arguments; raises what it would refuse them with."""
    monkeypatch.setattr(sys, "argv", ["dml", *arguments])
    command: Any = LazyGroup(name="dml")
    context = command.make_context("dml", [arguments[0], "--help"], resilient_parsing=True)
    for depth, word in enumerate(arguments, start=1):
        command = command.get_command(context, word)
        assert command is not None, f"there is no dml {' '.join(arguments[:depth])}"
        rest = arguments[depth:]
        if not hasattr(command, "get_command"):
            command.make_context(word, rest, parent=context)
            return
        context = command.make_context(word, [*rest[:1], "--help"], parent=context, resilient_parsing=True)


# Compose


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return documents("compose.yaml")[0]


def test_the_compose_file_fits_its_schema() -> None:
    if importable("check_jsonschema"):
        command = [sys.executable, "-m", "check_jsonschema"]
    elif found := shutil.which("check-jsonschema"):
        command = [found]
    else:
        pytest.skip("check-jsonschema is not installed")
    schema = ["--builtin-schema", "vendor.compose-spec", str(DOCKER / "compose.yaml")]
    done = subprocess.run([*command, *schema], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def importable(name: str) -> bool:
    from importlib.util import find_spec

    return find_spec(name) is not None


def test_containers_get_no_more_than_they_need(compose) -> None:
    for name, service in compose["services"].items():
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert not {"privileged", "network_mode", "pid", "cap_add"} & service.keys(), name
        assert "docker.sock" not in str(service), name
        assert service.get("read_only") or name == "milvus", name
        assert "mem_limit" in service or name.startswith("train"), name
    published = {name: s["ports"] for name, s in compose["services"].items() if "ports" in s}
    assert published == {
        "proxy": ["${BIND:-127.0.0.1}:${PORT:-8443}:8443"],
        "prometheus": ["127.0.0.1:${PROMETHEUS_PORT:-9090}:9090"],
    }
    assert compose["networks"]["inside"]["internal"] is True
    for name in ("service", "service-gpu", "service-milvus", "index", "milvus"):
        assert compose["services"][name]["networks"] == ["inside"], f"{name} asks nobody outside"


def test_the_job_that_builds_has_ended_before_a_service_opens_the_collection(compose) -> None:
    for ending in ("", "-gpu", "-milvus"):
        service, job = (compose["services"][name + ending] for name in ("service", "index"))
        assert service["depends_on"][f"index{ending}"] == {"condition": "service_completed_successfully"}
        assert job["restart"] == "no"
        assert "--if-missing" in job["command"]
        assert [v for v in service["volumes"] if ":/data" in v] == [
            v for v in job["volumes"] if ":/data" in v
        ]


def test_without_keys_the_service_of_compose_is_open_to_its_own_machine_only(compose, monkeypatch) -> None:
    [script] = compose["services"]["service"]["command"]
    lines = (
        script.replace("$$", "$").replace("exec dml", "printf '%s\\n'").replace("$(hostname -i)", "10.0.0.2")
    )
    for bind, is_open in (("127.0.0.1", True), ("[::1]", True), ("0.0.0.0", False), ("192.168.1.5", False)):
        values = {"BIND": bind, "SERVER_NAME": "localhost", "SUBNET": "172.30.86.0/24"}
        done = subprocess.run(
            ["/bin/sh", "-c", lines], env=os.environ | values, capture_output=True, text=True, check=True
        )
        arguments = done.stdout.splitlines()
        check_command(arguments, monkeypatch)
        assert ("--insecure" in arguments) == is_open, bind


def test_a_command_that_there_is_not_is_found_out(monkeypatch) -> None:
    for wrong in (
        ["serve", "--dataa", "x"],
        ["index", "bild", "x"],
        ["index", "build"],
        ["keys", "ad", "x"],
    ):
        with pytest.raises(Exception, match=r"(?i)no such option|missing|there is no dml"):
            check_command(wrong, monkeypatch)


def test_the_commands_of_compose_exist(compose, monkeypatch) -> None:
    for name, service in compose["services"].items():
        if name.startswith("index"):
            words = [re.sub(r"\$\{[A-Z_]+:-([^}]*)\}", r"\1", word) for word in service["command"]]
            check_command(words, monkeypatch)


def test_the_documented_commands_exist(monkeypatch) -> None:
    page = (ROOT / "docs" / "deployment.md").read_text().replace("\\\n", " ")
    compose = r"docker compose run [^\n]*?(?:dml|index-milvus)"
    plain = r"(?:sudo -u dml )?(?:env \S+ )?/opt/dml/bin/dml"
    given = rf"^ *(?:{compose}|{plain}) +([a-z][^\n]*)$"
    found = [shlex.split(line.partition("  #")[0]) for line in re.findall(given, page, flags=re.MULTILINE)]
    assert len(found) >= 10
    for arguments in found:
        check_command(arguments, monkeypatch)


# Images


def test_the_images_have_the_versions_that_are_tested() -> None:
    tested = pins(ROOT / "requirements.txt")
    for name in ("serve", "milvus", "gpu"):
        of_image = pins(DOCKER / f"requirements-{name}.txt")
        only_here = (
            {pin for pin in of_image if pin.startswith(("faiss-gpu==", "nvidia-"))}
            if name == "gpu"
            else set()
        )
        assert of_image - tested - only_here == set(), "make lock renews all of them"
    assert not {pin for pin in pins(DOCKER / "requirements-serve.txt") if pin.startswith(("torch", "nvidia"))}


def pins(path: Path) -> set[str]:
    return set(re.findall(r"^([A-Za-z0-9._-]+==[^ \\]+)", path.read_text(), flags=re.MULTILINE))


@pytest.mark.parametrize(
    "name", ["Dockerfile", "proxy/Dockerfile", "prometheus/Dockerfile", "milvus/Dockerfile"]
)
def test_images_start_from_a_base_that_can_be_chosen_and_run_without_rights(name) -> None:
    text = (DOCKER / name).read_text()
    [base] = re.findall(r"^ARG BASE=(\S+)$", text, flags=re.MULTILINE)
    assert re.fullmatch(r"[a-z]+:\S*\d\S*", base), f"{base} names no version"
    stages = dict(re.findall(r"^FROM (\S+)(?: AS \S+)?$", text, flags=re.MULTILINE) and of_stages(text))
    final = [stage for stage, (_, lines) in stages.items() if stage in FINAL.get(name, {""})]
    for stage in final:
        assert user_of(stages, stage) not in (None, "root", "0"), f"{name}: {stage} runs as root"


FINAL = {"Dockerfile": {"serve", "serve-gpu", "serve-milvus", "train"}}


def of_stages(text: str) -> Iterator[tuple[str, tuple[str, list[str]]]]:
    """stage -> (what it starts from, its lines)."""
    for block in re.split(r"^(?=FROM )", text, flags=re.MULTILINE)[1:]:
        first, *lines = block.splitlines()
        words = first.split()
        yield (words[3] if len(words) > 3 else ""), (words[1], lines)


def user_of(stages: dict[str, tuple[str, list[str]]], stage: str) -> str | None:
    base, lines = stages[stage]
    users = [line.split()[1] for line in lines if line.startswith("USER ")]
    return users[-1] if users else user_of(stages, base) if base in stages else None


# The proxy


def test_the_proxy_s_limits_fit_those_of_the_service() -> None:
    template = (DOCKER / "proxy" / "nginx.conf.template").read_text()
    script = (DOCKER / "proxy" / "start.sh").read_text()
    assert set(re.findall(r"@([A-Z]+)@", template)) == set(re.findall(r"@([A-Z]+)@", script))
    assert subprocess.run(["/bin/sh", "-n", DOCKER / "proxy" / "start.sh"]).returncode == 0
    settings = Settings()
    assert int(re.findall(r"\$\{BODY:-(\d+)m\}", script)[0]) * MEBIBYTE == settings.max_body_bytes
    assert int(re.findall(r"proxy_read_timeout (\d+)s", template)[0]) > settings.deadline_seconds
    assert int(re.findall(r"client_header_timeout (\d+)s", template)[0]) <= settings.header_seconds


def test_the_proxy_refuses_in_the_words_of_the_service() -> None:
    template = (DOCKER / "proxy" / "nginx.conf.template").read_text()
    answers = re.findall(r"return (\d+) '(\{.*\})\\n'", template)
    assert len(answers) == 4
    for status, body in answers:
        problem = json.loads(body)
        kind = CATALOGUE[problem["type"].removeprefix("/problems/")]
        assert (kind.status, problem["status"]) == (int(status), int(status))


# Metrics: alerts and the dashboard


@pytest.fixture(scope="module")
def metrics(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """Every series that the service gives out, with the labels that it has been seen with."""
    engine = Engine(
        {"colours": colour_collection(tmp_path_factory.mktemp("c") / "colours")}, [ColourEncoder()]
    )
    with running(create_app(engine)) as address:
        httpx.post(
            f"{address}/v1/collections/colours/search", json={"query": {"id": "red/0"}}
        ).raise_for_status()
        text = httpx.get(f"{address}/metrics").text
    engine.close()
    names: dict[str, set[str]] = {}
    for name, kind in re.findall(r"^# TYPE (\S+) (\S+)$", text, flags=re.MULTILINE):
        for ending in ("_bucket", "_count", "_sum") if kind == "histogram" else ("",):
            names[name + ending] = set()
    for name, labels in re.findall(r"^([a-z_]+)(?:\{(.*)\})? \S+$", text, flags=re.MULTILINE):
        names[name] |= set(re.findall(r'([a-z]+)="', labels))
    assert names["dml_request_seconds_bucket"] == {"method", "route", "status", "le"}
    return names


def check_query(query: str, metrics: dict[str, set[str]]) -> None:
    """The query names series and labels that there are; up and dml_proxy_up come from elsewhere."""
    used = set(re.findall(r"\b(?:dml|process)_[a-z_]+\b|\bup\b", query))
    assert used, f"{query} asks for nothing of the service"
    assert used - metrics.keys() <= {"up", "dml_proxy_up"}, f"{query}: there is no {used - metrics.keys()}"
    for name, matchers in re.findall(r"\b(dml_[a-z_]+)\{([^}]*(?:\{[^}]*\}[^}]*)*)\}", query):
        labels = set(re.findall(r"\b([a-z]+)\s*(?:=~|!~|!=|=)", matchers)) - {"instance", "job"}
        known = metrics.get(name, set())
        assert labels <= known or not known, f"{query}: {name} has no {labels - known}"
    for types in re.findall(r'\btype=~?"([^"]*)"', query):
        assert set(types.split("|")) <= CATALOGUE.keys(), f"{query}: a type that there is not"


def alerts() -> list[dict[str, Any]]:
    [rules] = documents("prometheus", "alerts.yml")
    return [rule for group in rules["groups"] for rule in group["rules"]]


@pytest.mark.parametrize("rule", alerts(), ids=lambda rule: rule["alert"])
def test_alerts_ask_for_what_the_service_tells(rule, metrics) -> None:
    check_query(rule["expr"], metrics)
    assert rule["labels"]["severity"] in ("critical", "warning")
    assert rule["annotations"].keys() == {"summary", "todo"}


def test_prometheus_asks_where_something_answers(compose) -> None:
    [settings] = documents("prometheus", "prometheus.yml")
    assert settings["rule_files"] == ["alerts.yml"]
    jobs = {job["job_name"]: job for job in settings["scrape_configs"]}
    names = jobs["dml"]["dns_sd_configs"][0]["names"]
    targets = [t for job in jobs.values() for c in job["static_configs"] for t in c["targets"]]
    assert set(names) <= compose["services"].keys()
    for target in targets:
        host, _, port = target.partition(":")
        assert host in compose["services"] or target == "localhost:9090"
        assert {"service": "8000", "proxy": "8081", "localhost": "9090"}[host] == port
    assert {rule["alert"] for rule in alerts()} >= {
        "ServiceDown",
        "SlowSearch",
        "ServerErrors",
        "QueueFilling",
    }
    assert {rule["alert"] for rule in alerts()} >= {"RecallPromiseBroken", "DiskRefuses"}


def test_promtool_finds_the_alerts_as_they_are_meant() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed")
    for arguments in (["check", "config", "prometheus.yml"], ["test", "rules", "alerts_test.yml"]):
        done = subprocess.run(
            [promtool, *arguments], cwd=DOCKER / "prometheus", capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_dashboard_shows_what_the_service_tells(metrics) -> None:
    board = json.loads((DOCKER / "grafana" / "dml.json").read_text())
    panels = [panel for panel in board["panels"] if panel["type"] != "row"]
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    variables = {variable["name"] for variable in board["templating"]["list"]}
    cells: set[tuple[int, int]] = set()
    for panel in panels:
        for target in panel["targets"]:
            check_query(target["expr"], metrics)
            assert set(re.findall(r"\$(\w+)", target["expr"])) <= variables
        place = panel["gridPos"]
        covered = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not covered & cells, f"{panel['title']} lies over another"
        assert max(x for x, _ in covered) < 24
        cells |= covered


# Kubernetes


@pytest.fixture(scope="module")
def cluster() -> dict[tuple[str, str], dict[str, Any]]:
    """(kind, name) -> manifest, of all that the kustomization names."""
    [kustomization] = documents("kubernetes", "kustomization.yaml")
    others = {path.name for path in (DOCKER / "kubernetes").glob("*.yaml")} - {"kustomization.yaml"}
    assert set(kustomization["resources"]) == others
    found = [one for name in sorted(others) for one in documents("kubernetes", name)]
    assert all(one["metadata"].get("namespace", "dml") == "dml" for one in found)
    manifests = {(one["kind"], one["metadata"]["name"]): one for one in found}
    assert len(manifests) == len(found)
    return manifests


def pods(cluster) -> Iterator[tuple[str, dict[str, Any]]]:
    yield "Deployment", cluster["Deployment", "dml"]["spec"]["template"]
    yield "CronJob", cluster["CronJob", "dml-backup"]["spec"]["jobTemplate"]["spec"]["template"]


def containers(pod: dict[str, Any]) -> list[dict[str, Any]]:
    return [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]


def test_a_collection_has_one_writer(cluster) -> None:
    deployment = cluster["Deployment", "dml"]["spec"]
    assert (deployment["replicas"], deployment["strategy"]) == (1, {"type": "Recreate"})
    assert deployment["template"]["spec"]["terminationGracePeriodSeconds"] > 20


def test_pods_run_without_rights(cluster) -> None:
    for kind, pod in pods(cluster):
        spec = pod["spec"]
        assert spec["automountServiceAccountToken"] is False, kind
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] == spec["securityContext"]["fsGroup"] == 10001
        assert "--uid 10001" in (DOCKER / "Dockerfile").read_text()
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in containers(pod):
            context = container["securityContext"]
            assert context["readOnlyRootFilesystem"] is True
            assert context["allowPrivilegeEscalation"] is False
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"]["limits"]["memory"]
            assert container["resources"]["requests"].keys() == {"cpu", "memory"}


def test_pods_mount_what_there_is_and_know_what_they_name(cluster) -> None:
    settings = cluster["ConfigMap", "dml"]["data"]
    for kind, pod in pods(cluster):
        volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
        for volume in volumes.values():
            if "persistentVolumeClaim" in volume:
                assert ("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]) in cluster
        for container in containers(pod):
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes.keys(), kind
            named = set(re.findall(r"\$\(([A-Z_]+)\)", " ".join(container["args"])))
            assert named <= settings.keys() | {variable["name"] for variable in container.get("env", [])}


def test_the_commands_of_the_pods_exist(cluster, monkeypatch) -> None:
    for _, pod in pods(cluster):
        for container in containers(pod):
            arguments = [re.sub(r"\$\((\w+)\)", lambda m: PLACED[m[1]], a) for a in container["args"]]
            if container["name"] == "first-key":
                arguments = shlex.split(arguments[0].partition("|| dml ")[2])
            check_command(arguments, monkeypatch)
    [serve] = cluster["Deployment", "dml"]["spec"]["template"]["spec"]["containers"]
    assert "--insecure" not in serve["args"]
    assert "--open-metrics" not in serve["args"], "the Ingress leads to everything"


def test_ports_probes_and_names_fit(cluster) -> None:
    pod = cluster["Deployment", "dml"]["spec"]["template"]
    [container] = pod["spec"]["containers"]
    [port] = container["ports"]
    assert f"--port={port['containerPort']}" in container["args"]
    routes = {route.path for route in create_app(Engine({})).routes if hasattr(route, "path")}
    assert {"/livez", "/readyz", "/metrics"} <= routes | every_route()
    for probe, path in (
        ("startupProbe", "/readyz"),
        ("readinessProbe", "/readyz"),
        ("livenessProbe", "/livez"),
    ):
        assert container[probe]["httpGet"] == {"path": path, "port": port["name"]}
    assert "--allow-host=$(POD_IP)" in container["args"], "probes call the pod by its address"
    labels = pod["metadata"]["labels"]
    assert cluster["Service", "dml"]["spec"]["selector"] == labels
    assert cluster["Deployment", "dml"]["spec"]["selector"]["matchLabels"] == labels
    [service_port] = cluster["Service", "dml"]["spec"]["ports"]
    assert service_port["targetPort"] == port["name"]
    ingress = cluster["Ingress", "dml"]["spec"]
    [rule] = ingress["rules"]
    assert rule["host"] == cluster["ConfigMap", "dml"]["data"]["SERVER_NAME"] == ingress["tls"][0]["hosts"][0]
    backend = rule["http"]["paths"][0]["backend"]["service"]
    assert backend == {"name": "dml", "port": {"name": service_port["name"]}}
    policy = cluster["NetworkPolicy", "dml"]["spec"]
    assert policy["podSelector"]["matchLabels"] == labels
    assert policy["ingress"][0]["ports"] == [{"protocol": "TCP", "port": port["containerPort"]}]
    assert policy["egress"] == []


def every_route() -> set[str]:
    from service.routes import ROUTERS

    return {route.path for router in ROUTERS for route in router.routes}


# systemd


def test_the_unit_starts_what_there_is(monkeypatch) -> None:
    unit = (DOCKER / "systemd" / "dml.service").read_text()
    [command] = re.findall(r"^ExecStart=/opt/dml/bin/dml (.*)$", unit, flags=re.MULTILINE)
    check_command(shlex.split(command), monkeypatch)
    for line in (
        "NoNewPrivileges=yes",
        "ProtectSystem=strict",
        "CapabilityBoundingSet=",
        "IPAddressDeny=any",
    ):
        assert line in unit.splitlines()
    assert "/var/lib/dml/state" in unit
    assert "StateDirectory=dml dml/state dml/collections" in unit


# All of it, for real


@pytest.mark.timeout(1800)
@pytest.mark.skipif(
    os.environ.get("DML_TEST_DOCKER") != "1",
    reason="DML_TEST_DOCKER=1 brings the containers up; their images have to be there",
)
def test_the_stack_holds_what_is_promised(tmp_path, tiny_folder, tiny_encoder) -> None:
    pictures = os.environ.get("DML_TEST_PICTURES", str(tiny_folder))
    other = tmp_path / "other"
    made = ["encoder", "create", "--trunk", "tiny", "--weights", "none", "--image-size", "64", "--seed", "5"]
    subprocess.run([sys.executable, "-m", "dml.cli.main", *made, "--out", str(other)], check=True)
    command = [sys.executable, str(DOCKER / "try.py"), pictures, str(tiny_encoder), str(other)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
