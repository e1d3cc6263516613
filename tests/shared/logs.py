"""What was logged."""

import logging


def warned(caplog) -> list[str]:
    """What was said beyond how a run goes."""
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
