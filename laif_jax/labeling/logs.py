"""Logs of the service and its workers: plain lines or JSON lines, on standard error, without keys in either."""

import json
import logging
import sys
import threading
from datetime import UTC, datetime
from types import TracebackType
from typing import Literal

from laif_jax.labeling.keys import RedactingFilter, redact

Format = Literal["text", "json"]
_NOISY = ("httpx", "httpcore", "openai", "anthropic", "google_genai", "urllib3", "asyncio")
_PLAIN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}


class JsonFormatter(logging.Formatter):
    """One JSON object per line: `time` (UTC), `level`, `logger`, `message`, whatever a record was given as `extra`, and
    `exception`."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        extra = {name: value for name, value in vars(record).items() if name not in _PLAIN}
        line |= {
            n: v if isinstance(v, int | float) else redact(str(v), shapes=True) for n, v in extra.items()
        }
        if record.exc_info and not record.exc_text:
            record.exc_text = self.formatException(record.exc_info)
        if record.exc_text:
            line["exception"] = record.exc_text
        return json.dumps(line, ensure_ascii=False)


def set_up(form: Format = "text", level: int = logging.INFO) -> None:
    """Sends the log to standard error, in place of whatever was set up before. Every line passes the filter of keys."""
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(RedactingFilter())
    text = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler.setFormatter(JsonFormatter() if form == "json" else text)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    # What would be printed past the log goes through it: tracebacks quote what an endpoint said, too.
    logging.captureWarnings(True)
    sys.excepthook = _crashed
    threading.excepthook = lambda args: _crashed(args.exc_type, args.exc_value, args.exc_traceback)
    for name in _NOISY:  # some log every address, and at DEBUG whole requests
        logging.getLogger(name).setLevel(logging.WARNING)


def _crashed(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt | SystemExit) or error is None:
        return
    logging.getLogger(__name__).critical("an error that nobody handled", exc_info=(kind, error, trace))
