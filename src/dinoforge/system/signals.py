"""Signals that stop a run, and the exit codes that stand for them."""

import signal

_STOPS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
STOP_SIGNALS = [getattr(signal, name) for name in _STOPS if hasattr(signal, name)]
"""What stops a run. Schedulers announce the end of a job by SIGTERM, or by a signal of the user's choice."""
EXIT_SIGNALS = {"SIGHUP": 129, "SIGINT": 130, "SIGUSR1": 138, "SIGUSR2": 140, "SIGTERM": 143}
