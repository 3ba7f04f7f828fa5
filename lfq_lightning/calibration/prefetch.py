"""Read ahead of a consumer in a thread."""

import queue
import threading
from collections.abc import Iterator
from typing import TypeVar

T = TypeVar("T")

_AHEAD = 2


def prefetch(items: Iterator[T]) -> Iterator[T]:
    """Yield `items` while the next ones are being made; what their making raises is raised here."""
    ready: queue.Queue[tuple[str, T | BaseException | None]] = queue.Queue(_AHEAD)
    left = threading.Event()

    def put(kind: str, value: T | BaseException | None) -> None:
        while not left.is_set():
            try:
                ready.put((kind, value), timeout=0.1)
                return
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in items:
                put("item", item)
                if left.is_set():
                    return
            put("end", None)
        except BaseException as error:
            put("error", error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            kind, value = ready.get()
            if kind == "end":
                return
            if kind == "error":
                assert isinstance(value, BaseException)
                raise value
            yield value  # type: ignore[misc]
    finally:
        left.set()
        thread.join()
