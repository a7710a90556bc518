"""The log of a node on standard error: lines for a person, or one JSON object a line for a machine."""

from __future__ import annotations

import json
import logging
import os
import sys
import time


class _Pretty(logging.Formatter):
    """`12:00:01 online: blocks 0-5 of bloom`; the level is named only where it is not "info"."""

    def format(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno == logging.INFO else f"{record.levelname.lower()}: "
        text = f"{time.strftime('%H:%M:%S', time.localtime(record.created))} {level}{record.getMessage()}"
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


class _Json(logging.Formatter):
    """One object a line: time (unix seconds), level, logger, message, and the exception where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        entry = {"time": record.created, "level": record.levelname.lower(), "logger": record.name, "message": record.getMessage()}
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry)


def set_up(level: str, form: str) -> None:
    """Send the log of petalnet to standard error; other libraries are heard only where it is serious, with `level` "debug" a bit sooner.

    Their own debug lines would drown ours: one of them writes a dozen for each address that it reads.
    """
    # Read when the hub's library is imported: it has a handler of its own, which would say everything twice.
    os.environ.setdefault("HF_HUB_VERBOSITY", "debug" if level == "debug" else "error")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json() if form == "json" else _Pretty())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO if level == "debug" else logging.WARNING)
    logging.getLogger("petalnet").setLevel(level.upper())
