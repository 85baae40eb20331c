"""Lines of the log: one for each request, whoever writes it, that nobody but the service can begin.

As JSON, or plain for people. What clients send (paths, names, what proxies say of them) reaches the log, so
in plain lines whatever would begin a line, steer a terminal or look like a field is written otherwise. JSON
does that by itself.
"""

import logging
import sys
from typing import Any, TextIO

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

from service.settings import Settings

FIRST = ("timestamp", "level", "event")
OURS = ("dml", "service")


class Bridge(logging.StreamHandler):
    """What is written through `logging`, by dml itself and by libraries, in the same shape."""


def configure_logs(settings: Settings, stream: TextIO | None = None) -> None:
    """Log lines to stderr, in the format and from the level on that the settings say.

    "auto" is plain on a terminal and JSON elsewhere. Of libraries only what is a warning or worse is shown,
    unless the level is "debug".
    """
    target: TextIO = stream or sys.stderr
    level = logging.getLevelNamesMapping()[settings.log_level.upper()]
    plain = settings.log_format == "plain" or (settings.log_format == "auto" and target.isatty())
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    console = structlog.dev.ConsoleRenderer(
        colors=target.isatty(), exception_formatter=structlog.dev.plain_traceback
    )
    last: list[Processor] = [
        structlog.processors.format_exc_info,
        *([tame, console] if plain else [in_order, structlog.processors.JSONRenderer()]),
    ]
    structlog.configure(
        processors=[*shared, *last],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(target),
        cache_logger_on_first_use=False,
    )
    bridge = Bridge(target)
    bridge.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last],
            foreign_pre_chain=[*shared, structlog.stdlib.add_logger_name],
        )
    )
    root = logging.getLogger()
    for former in [handler for handler in root.handlers if isinstance(handler, Bridge)]:
        root.removeHandler(former)
    root.addHandler(bridge)
    for name in OURS:
        logging.getLogger(name).setLevel(level)
    for name in ("uvicorn", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [], True
        logger.setLevel(level if settings.log_level == "debug" else max(level, logging.WARNING))


def in_order(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    """When, how bad and what, then the rest as it was given."""
    return {**{name: event[name] for name in FIRST if name in event}, **event}


class Verbatim:
    """A text that is written as it is: renderers write anything but a `str` as its repr."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


def tame(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    """Texts that stay on their line, and in their field; tracebacks on lines that look like no other."""
    tamed: dict[str, Any] = {}
    for name, value in event.items():
        if name == "exception":
            tamed[name] = "\n".join(f"    | {printable(line)}" for line in str(value).splitlines())
        elif name in FIRST:
            tamed[name] = printable(str(value))
        else:
            tamed[name] = Verbatim(shown(value))
    return tamed


def shown(value: Any) -> str:
    """A value of a field: in quotes where it would not be seen where it ends."""
    text = printable(str(value))
    if text and not any(c in ' "=' for c in text):
        return text
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def printable(text: str) -> str:
    """What does not print (controls, line breaks, marks of direction) as Python writes it: \\n, \\x1b."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
