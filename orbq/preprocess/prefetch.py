"""Run an iterator ahead of its consumer in a background thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
_POLL = 0.1  # seconds between two looks at whether the consumer is gone


class _End:
    """Marks the end of the iterator, with the exception that ended it, if one did."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


def prefetch(iterable: Iterable[T], size: int = 2) -> Iterator[T]:
    """The items of ``iterable`` in order, up to ``size`` of them computed ahead in a thread.

    An exception of the iterable is raised here, after the items before it. When the consumer stops
    early (``close``, an exception, or the generator is dropped), the thread ends and the iterable
    is closed.
    """
    items: queue.Queue[T | _End] = queue.Queue(maxsize=max(size, 1))
    stop = threading.Event()
    thread = threading.Thread(target=_run, args=(iterable, items, stop), daemon=True)
    thread.start()
    try:
        while not isinstance(item := items.get(), _End):
            yield item
        if item.error is not None:
            raise item.error
    finally:
        stop.set()
        thread.join()


def _run(iterable: Iterable[T], items: queue.Queue[T | _End], stop: threading.Event) -> None:
    iterator = iter(iterable)
    error: BaseException | None = None
    try:
        for item in iterator:
            if not _put(items, item, stop):
                break
    except BaseException as raised:  # handed to the consumer, whatever it is
        error = raised
    finally:
        if hasattr(iterator, "close"):
            iterator.close()
    _put(items, _End(error), stop)


def _put(items: queue.Queue[T | _End], item: T | _End, stop: threading.Event) -> bool:
    """Put ``item`` unless the consumer stops first; whether it was put."""
    while not stop.is_set():
        try:
            items.put(item, timeout=_POLL)
            return True
        except queue.Full:
            continue
    return False
