"""A time limit for code that may never end, such as a chat template."""

import contextlib
import ctypes
import signal
import threading
from collections.abc import Iterator


class TooLong(Exception):
    """The time is up."""


@contextlib.contextmanager
def time_limit(seconds: float, what: str) -> Iterator[None]:
    """Raise TooLong in the block's Python code once it has taken `seconds` of real time.

    In the main thread by a timer's signal, elsewhere by an exception set from another thread.
    """
    message = f"{what} took more than {seconds:g} s"

    def ring(*_: object) -> None:
        raise TooLong(message)

    if threading.current_thread() is threading.main_thread():
        before = signal.signal(signal.SIGALRM, ring)
        rest, _ = signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, rest)
            signal.signal(signal.SIGALRM, before)
        return
    thread, set_error = threading.get_ident(), ctypes.pythonapi.PyThreadState_SetAsyncExc
    timer = threading.Timer(seconds, lambda: set_error(ctypes.c_ulong(thread), ctypes.py_object(TooLong)))
    timer.daemon = True
    timer.start()
    try:
        yield
    except TooLong:
        raise TooLong(message) from None
    finally:
        timer.cancel()
