"""What the service counts, in Prometheus' words. Each app has its own registry: two never mix."""

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Metrics:
    """Counters and histograms of one app.

    Args:
        sizes: collection -> items, asked at every scrape.
        pending: requests that run or wait, asked at every scrape.
    """

    def __init__(self, *, sizes: Callable[[], dict[str, int]], pending: Callable[[], int]) -> None:
        self.registry = CollectorRegistry()
        self.requests = Histogram(
            "dml_request_seconds",
            "Time from the request line to the end of the answer.",
            ("method", "route", "status"),
            buckets=SECONDS,
            registry=self.registry,
        )
        self.stages = Histogram(
            "dml_search_stage_seconds",
            "Time of one stage of a search: embed (decode, prepare, encoder), search (index and catalogue).",
            ("stage",),
            buckets=SECONDS,
            registry=self.registry,
        )
        self.batches = Histogram(
            "dml_embed_batch_size",
            "Pictures that the encoder took at once.",
            buckets=(1, 2, 4, 8, 16, 32, 64),
            registry=self.registry,
        )
        self.problems = Counter(
            "dml_problems", "Answers that were problems, by type.", ("type",), registry=self.registry
        )
        self.registry.register(_State(sizes, pending))

    def render(self) -> bytes:
        """The text that Prometheus scrapes."""
        return generate_latest(self.registry)


class _State(Collector):
    """Gauges that are read when asked for, so that they are never out of date."""

    def __init__(self, sizes: Callable[[], dict[str, int]], pending: Callable[[], int]) -> None:
        self._sizes, self._pending = sizes, pending

    def collect(self) -> Iterable[Metric]:
        items = GaugeMetricFamily("dml_collection_items", "Items in a collection.", labels=["collection"])
        for name, size in self._sizes().items():
            items.add_metric([name], size)
        yield items
        yield GaugeMetricFamily(
            "dml_requests_pending", "Requests that run or wait for a thread.", self._pending()
        )
