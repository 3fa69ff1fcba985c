"""How processes speak: one event a line, on stderr. Ids, counts and short codes only: never a prompt, key or provider's words."""

from __future__ import annotations

import logging
import sys
import traceback

import structlog

from worker.settings import Settings


def configure(settings: Settings) -> None:
    """Structured lines: coloured on a terminal, JSON elsewhere, or as `BACKSTOP_LOG_FORMAT` says."""
    terminal = settings.log_format == "console" or (settings.log_format == "auto" and sys.stderr.isatty())
    level = logging.getLevelNamesMapping()[settings.log_level.upper()]
    shared: list[structlog.typing.Processor] = [
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="%H:%M:%S" if terminal else "iso", utc=not terminal),
    ]
    structlog.configure(
        processors=[
            *shared,
            structlog.stdlib.PositionalArgumentsFormatter(),
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    renderer = structlog.dev.ConsoleRenderer() if terminal else structlog.processors.JSONRenderer()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.format_exc_info,
                renderer,
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for chatty in ("kombu", "celery.redirected", "celery.worker.strategy", "celery.app.trace", "httpx", "alembic"):
        logging.getLogger(chatty).setLevel(max(level, logging.WARNING))


def origin(error: BaseException) -> str:
    """Where it was raised, innermost last, as `file:line function`. Not its message: that may quote a prompt or a key."""
    frames = traceback.extract_tb(error.__traceback__)[-3:]
    return " > ".join(f"{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno} {frame.name}" for frame in frames)
