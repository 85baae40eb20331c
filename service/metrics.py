"""What the service counts, in Prometheus' words. Each app has its own registry: two never mix.

No label has values that clients choose: unknown routes are one value, unknown methods another, and of
collections that clients can make only `MOST_LISTED` are told apart.

Several processes of one service add up: `share` has each write its counts into a folder, and whichever of
them is scraped reads all. What is looked up at the scrape (collections, jobs) is the same for all of them.
"""

import os
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
    values,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

from dml import __version__
from dml.stages import STAGES, Stage
from service.problems import CATALOGUE
from service.watching import View

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
FOLDER_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"

disable_created_metrics()  # a second series for each counter and histogram, which nobody asks for


class Metrics:
    """Counters, histograms and gauges of one app.

    Args:
        threads, queue: how many requests may run, and how many may wait.
        view: what is there now, asked at every scrape.
    """

    def __init__(self, *, threads: int, queue: int, view: Callable[[], View]) -> None:
        self.registry = registry = CollectorRegistry()
        self._threads = threads
        self.requests = Histogram(
            "dml_request_seconds",
            "Time from the head of a request to the end of its answer.",
            ("method", "route", "status"),
            buckets=SECONDS,
            registry=registry,
        )
        self.stages = Histogram(
            "dml_stage_seconds",
            f"Time of a request in one stage: {', '.join(STAGES)}.",
            ("route", "stage"),
            buckets=SECONDS,
            registry=registry,
        )
        self.batches = Histogram(
            "dml_embed_batch_size",
            "Pictures that the encoder took at once.",
            buckets=(1, 2, 4, 8, 16, 32, 64),
            registry=registry,
        )
        self.problems = Counter(
            "dml_problems", "Answers that were problems, by type.", ("type",), registry=registry
        )
        for slug in CATALOGUE:
            self.problems.labels(slug)  # from 0 on: a rate does not see the first of what was not there
        self.received = Counter("dml_received_bytes", "Bytes of request bodies.", registry=registry)
        self.sent = Counter("dml_sent_bytes", "Bytes of answers, without their heads.", registry=registry)
        self.in_flight = self._gauge("dml_requests_in_flight", "Requests that are not answered whole.")
        self.pending = self._gauge("dml_requests_pending", "Requests that run in a thread or wait for one.")
        self.waiting = self._gauge("dml_requests_waiting", "Requests that wait for a thread.")
        self._gauge("dml_threads", "Threads that decode, embed and search.").set(threads)
        self._gauge("dml_queue_limit", "Requests that may wait for a thread.").set(queue)
        self._state = State(view)
        if not is_shared():
            registry.register(self._state)
            ProcessCollector(registry=registry)

    def _gauge(self, name: str, told: str) -> Gauge:
        return Gauge(name, told, registry=self.registry, multiprocess_mode="livesum")

    def count_request(
        self, method: str, route: str, status: str, *, seconds: float, stages: Mapping[Stage, float]
    ) -> None:
        """A request is over.

        Args:
            method: as sent.
            route: the template of its path, no path.
        """
        self.requests.labels(method if method in METHODS else "other", route, status).observe(seconds)
        for stage, part in list(stages.items()):  # a thread that nobody waits for any longer may still add
            self.stages.labels(route, stage).observe(part)

    def set_pending(self, pending: int) -> None:
        """So many calls run in the pool or wait for it."""
        self.pending.set(pending)
        self.waiting.set(max(0, pending - self._threads))

    def render(self) -> bytes:
        """The text that Prometheus scrapes."""
        if not is_shared():
            return generate_latest(self.registry)
        folder = Path(os.environ[FOLDER_VARIABLE])
        processes = living(folder)
        registry = CollectorRegistry()
        MultiProcessCollector(registry, path=str(folder))
        registry.register(self._state)
        registry.register(Processes(processes))
        return generate_latest(registry)


class State(Collector):
    """Gauges that are read when asked for, so that they are never out of date."""

    def __init__(self, view: Callable[[], View]) -> None:
        self._view = view

    def collect(self) -> Iterable[Metric]:
        view = self._view()
        yield GaugeMetricFamily("dml_ready", "1 once collections and encoders are loaded.", view.ready)
        build = GaugeMetricFamily("dml_build_info", "What runs here.", labels=["version", "python"])
        build.add_metric([__version__, platform.python_version()], 1)
        yield build
        encoders = GaugeMetricFamily(
            "dml_encoder_info",
            "An encoder that answers here, and what runs it.",
            labels=["model", "decoder", "runtime", "precision"],
        )
        for model, decoder, runtime, precision in view.encoders:
            encoders.add_metric([model[:12], decoder, runtime, precision], 1)
        yield encoders
        jobs = GaugeMetricFamily("dml_jobs", "Jobs of the last 30 days.", labels=["kind", "state"])
        for (kind, state), count in sorted(view.jobs.items()):
            jobs.add_metric([kind, state], count)
        yield jobs
        yield GaugeMetricFamily("dml_collections", "Collections that are served.", view.collections)
        yield from self._collections(view)

    def _collections(self, view: View) -> Iterator[Metric]:
        def family(name: str, told: str, values: Mapping[str, float | bool | None]) -> Metric:
            made = GaugeMetricFamily(f"dml_collection_{name}", told, labels=["collection"])
            for collection, value in values.items():
                if value is not None:
                    made.add_metric([collection], float(value))
            return made

        yield family("up", "1 if the collection answers.", {n: s.up for n, s in view.listed.items()})
        sizes = {name: seen.bytes for name, seen in view.listed.items()}
        yield family("bytes", "What its files take on the disk; looked up every 5 minutes.", sizes)
        known = {name: seen.figures for name, seen in view.listed.items() if seen.figures is not None}
        info = GaugeMetricFamily(
            "dml_collection_info",
            "Index and encoder of a collection.",
            labels=["collection", "index", "model"],
        )
        for name, found in known.items():
            info.add_metric([name, found.index, view.listed[name].model[:12]], 1)
        yield info
        for name, told, attribute in (
            ("items", "Items in a collection.", "count"),
            ("pending_items", "Items that are not in the main index yet; compared one by one.", "pending"),
            ("tombstones", "Removed items that the main index still holds.", "tombstones"),
            ("generation", "The number of the last change; it only grows.", "generation"),
            ("recall_promised", "recall@10 that was promised.", "promised_recall"),
            ("recall_measured", "recall@10 of the main index, as last measured.", "measured_recall"),
            ("promise_kept", "1 if the last measurement kept the promise.", "promise_holds"),
            (
                "index_written_timestamp_seconds",
                "When the main index was last built or merged.",
                "index_written",
            ),
        ):
            yield family(name, told, {n: getattr(found, attribute) for n, found in known.items()})


class Processes(Collector):
    """Memory, processor time and files of several processes, added up, under the usual names.

    Args:
        pids: of the processes.
    """

    LEAST = ("process_start_time_seconds", "process_max_fds")

    def __init__(self, pids: Iterable[int]) -> None:
        self._pids = tuple(pids)

    def collect(self) -> Iterable[Metric]:
        found: dict[str, Metric] = {}
        figures: dict[str, list[float]] = {}
        for pid in self._pids:
            for family in ProcessCollector(pid=lambda pid=pid: pid, registry=None).collect():
                found.setdefault(family.name, family)
                figures.setdefault(family.name, []).extend(s.value for s in family.samples)
        for name, family in found.items():
            value = min(figures[name]) if name in self.LEAST else sum(figures[name])
            kind = CounterMetricFamily if family.type == "counter" else GaugeMetricFamily
            yield kind(name, family.documentation, value=value)


# Several processes


def share(folder: Path) -> None:
    """Count together with the other processes that are given this folder. Call it before an app is made.

    Args:
        folder: empty at the start of the service, on a local disk; removed by whoever made it.
    """
    os.environ[FOLDER_VARIABLE] = str(folder)
    values.ValueClass = values.MultiProcessValue()


def is_shared() -> bool:
    return bool(values.ValueClass._multiprocess)


def living(folder: Path) -> list[int]:
    """The processes that count in a folder and are there; what the others had running is forgotten."""
    pids = {int(path.stem.rpartition("_")[2]) for path in folder.glob("*_*.db")}
    alive = {pid for pid in pids if is_alive(pid)}
    for pid in pids - alive:
        mark_process_dead(pid, str(folder))
    return sorted(alive)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
