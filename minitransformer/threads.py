"""The one owner of thread counts: how many workers, when BLAS runs alone, and the workers themselves.

BLAS pools and our own workers that spin against each other cost several times the work itself, so only
this file starts threads or limits those of others. Floor 0: it knows nothing of arrays or models.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from contextvars import Context, ContextVar, copy_context
from functools import partial
from importlib import import_module
from itertools import pairwise
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, TypeVar

from minitransformer.errors import ConfigError

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

R = TypeVar("R")

_num_threads: int | None = None  # None: as many as cores, looked up when asked


def available_cores() -> int:
    """Number of cores this process may run on (its affinity, which containers and `taskset` narrow)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def set_num_threads(n: int) -> None:
    """Set for the whole process how many threads training and parallel kernels use.

    More threads than cores are allowed. Raises `ConfigError` unless `n` is an integer of at least 1.
    """
    global _num_threads
    _num_threads = _checked("set_num_threads", n)


def get_num_threads() -> int:
    """The number set by `set_num_threads`, or else the number of available cores."""
    return available_cores() if _num_threads is None else _num_threads


def _checked(op: str, n: int) -> int:
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise ConfigError(
            op,
            f"the number of threads must be an integer of at least 1, got {n!r}",
            f"Pass 1 to {available_cores()} to stay within the cores of this process",
        )
    return n


def blas_libraries() -> list[dict[str, Any]]:
    """What threadpoolctl says of every BLAS that is loaded: version, architecture, threads, file."""
    from threadpoolctl import threadpool_info

    return [library for library in threadpool_info() if library["user_api"] == "blas"]


def numba_pool() -> dict[str, Any]:
    """The threading layers that Numba can load here, its first choice first, the one asked for, and its threads."""
    config: Any = import_module("numba.core.config")
    modules = {"tbb": "tbbpool", "omp": "omppool", "workqueue": "workqueue"}
    layers = []
    for layer in config.THREADING_LAYER_PRIORITY:
        with suppress(ImportError):
            import_module(f"numba.np.ufunc.{modules[layer]}")
            layers.append(layer)
    return {"layers": layers, "asked": config.THREADING_LAYER, "num_threads": config.NUMBA_NUM_THREADS}


# --- one BLAS thread -------------------------------------------------------------------------------------

# Guards the two below. Reentrant, because a signal handler or a finalizer may enter while we hold it.
_blas_lock = threading.RLock()
_blas_users: dict[int, int] = {}  # thread ident -> how many times it is inside
_blas_limits: Any = None  # threadpoolctl's handle, which knows the counts to restore


@contextmanager
def single_threaded_blas() -> Iterator[None]:
    """Run BLAS with one thread in the whole process for as long as anybody is inside.

    The limit is process-wide, so users are counted: the first to enter saves the counts and limits, the
    last to leave restores them. May be nested and entered from several threads at once. Entering first
    searches the loaded libraries (milliseconds), so hold it around a whole training, not around a step.
    One kind of BLAS, OpenBLAS built on OpenMP, can only be limited for the thread that enters.
    """
    thread = threading.get_ident()
    _enter_blas(thread)
    try:
        yield
    finally:
        _leave_blas(thread)


def _enter_blas(thread: int) -> None:
    global _blas_limits
    with _blas_lock:
        if not _blas_users:
            from threadpoolctl import threadpool_limits

            _let_any_thread_control_openblas()
            _blas_limits = threadpool_limits(limits=1, user_api="blas")
        _blas_users[thread] = _blas_users.get(thread, 0) + 1


def _leave_blas(thread: int) -> None:
    with _blas_lock:
        if thread not in _blas_users:
            return  # entered before a fork by a thread that the child does not have
        _blas_users[thread] -= 1
        if not _blas_users[thread]:
            del _blas_users[thread]
        _restore_blas_if_unused()


def _restore_blas_if_unused() -> None:
    global _blas_limits
    if not _blas_users and _blas_limits is not None:
        _let_any_thread_control_openblas()
        _blas_limits.restore_original_limits()
        _let_any_thread_control_openblas()
        _blas_limits = None


def _let_any_thread_control_openblas() -> None:
    """Since 3.8 threadpoolctl obeys the thread that called it first and ignores all others without a word.

    Here the last to leave may be another thread than the first to enter, and the count keeps the order.
    """
    from threadpoolctl import OpenBLASController

    clear = getattr(OpenBLASController, "clear_controlling_thread", None)
    if clear is not None:
        clear(force=True)


def _after_fork_in_child() -> None:
    """Count only the thread that forked: the others do not exist here and will never leave.

    If the forking thread is itself inside, the child continues inside its `with` block, and leaving that
    restores the counts. Otherwise nobody is inside any more, and they are restored at once.
    """
    global _blas_lock
    _blas_lock = threading.RLock()
    me = threading.get_ident()
    for thread in [thread for thread in _blas_users if thread != me]:
        del _blas_users[thread]
    _restore_blas_if_unused()


if hasattr(os, "register_at_fork"):
    # Fork only between two changes of the count, never in the middle of one. The lambdas look the lock up
    # when called, since a child replaces it.
    os.register_at_fork(
        before=lambda: _blas_lock.acquire(),
        after_in_parent=lambda: _blas_lock.release(),
        after_in_child=_after_fork_in_child,
    )


# --- workers ---------------------------------------------------------------------------------------------

_pool_of_this_task: ContextVar[Workers | None] = ContextVar("_pool_of_this_task", default=None)


class Workers:
    """A pool of `num_threads` threads for the sharded training step.

    Results come in index order, at most `num_threads + 1` tasks are running, finished or in the caller's
    hands at any time, and every task sees the context variables of the caller (`contextvars`), so that
    grad mode, backend and random scope reach it. What tasks compute must not depend on the thread.

        with single_threaded_blas(), Workers(get_num_threads()) as workers:
            for gradients in workers.run(shards):
                total += gradients

    With one thread, tasks run on the caller's thread, one each time a result is asked for. So they do
    when a task of this pool calls `run` again: waiting there for a free worker could wait for ever.
    After a fork the child starts threads of its own. Raises `ConfigError` for a bad `num_threads`.
    """

    def __init__(self, num_threads: int) -> None:
        self.num_threads = _checked("Workers", num_threads)
        self._executor: ThreadPoolExecutor | None = None
        self._owner = 0  # the process whose threads the executor has
        self._closed = False

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Wait for the tasks handed out already, and end all threads; `run` is refused from now on."""
        self._closed = True
        if self._executor is not None:
            self._executor.shutdown(wait=True)
        self._executor = None

    def run(self, tasks: Iterable[Callable[[], R]]) -> Iterator[R]:
        """Yield the result of every task, in the order of `tasks`, as soon as its turn has come.

        The context variables are those at this call; each task gets a copy. Tasks begin when the first
        result is asked for. A result counts against the bound until the next is asked for, so a loop that
        adds up arrays holds one a thread and one more. If a task raises, that exception is raised in
        place of its result; then, as when the caller stops early or is interrupted, no further task
        starts, the running ones are awaited, and the pool can be used again. `ConfigError` once closed.
        """
        self._refuse_if_closed()
        nested = _pool_of_this_task.get() is self
        context = copy_context()
        context.run(_pool_of_this_task.set, self)
        if nested or self.num_threads == 1:
            return self._run_inline(tasks, context)
        return self._run_in_threads(tasks, context)

    def _run_inline(self, tasks: Iterable[Callable[[], R]], context: Context) -> Iterator[R]:
        for task in tasks:
            self._refuse_if_closed()
            yield context.copy().run(task)

    def _run_in_threads(self, tasks: Iterable[Callable[[], R]], context: Context) -> Iterator[R]:
        from concurrent.futures import wait

        waiting = iter(tasks)
        window: deque[Future[R]] = deque()
        try:
            while True:
                while len(window) <= self.num_threads and (task := next(waiting, None)) is not None:
                    window.append(self._threads().submit(context.copy().run, task))
                if not window:
                    return
                wait([window[0]])  # while it is still in the window, so that an interrupt finds it there
                # Popped in the expression: no name here keeps the result alive in the caller's hands.
                yield window.popleft().result()
        finally:
            wait([future for future in window if not future.cancel()])

    def _threads(self) -> ThreadPoolExecutor:
        self._refuse_if_closed()
        if self._executor is None or self._owner != os.getpid():
            from concurrent.futures import ThreadPoolExecutor

            self._executor = ThreadPoolExecutor(self.num_threads, "minitransformer-worker")
            self._owner = os.getpid()
        return self._executor

    def _refuse_if_closed(self) -> None:
        if self._closed:
            raise ConfigError("Workers", "the pool is closed", "Use it inside its `with` block")


# --- one call on several threads -------------------------------------------------------------------------


class _Helper:
    """A thread that makes one call at a time and sleeps in between: handing it one takes some microseconds.

    That is a tenth of what an executor takes, and as long as a small kernel runs.
    """

    def __init__(self) -> None:
        self._given: SimpleQueue[Callable[[], object]] = SimpleQueue()
        self._free = _free_helpers
        self._done = threading.Lock()
        self._done.acquire()
        self._error: BaseException | None = None
        threading.Thread(target=self._work, name="minitransformer-kernel", daemon=True).start()

    def _work(self) -> None:
        while True:
            call = self._given.get()
            try:
                call()
            except BaseException as error:  # noqa: BLE001 - it is raised where the helper was called
                self._error = error
            del call
            self._done.release()

    def begin(self, call: Callable[[], object]) -> None:
        self._given.put(call)

    def end(self) -> BaseException | None:
        """Wait for the call; what it raised, if anything. Then the helper is free for others."""
        self._done.acquire()
        error, self._error = self._error, None
        self._free.append(self)
        return error


_free_helpers: deque[_Helper] = deque()


def _forget_helpers() -> None:
    """A child of a fork has none of its parent's threads."""
    global _free_helpers
    _free_helpers = deque()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_helpers)


def split(count: int, function: Callable[[int, int], object]) -> None:
    """Call function(first, last) for slices that together are 0 to `count`, on as many threads as there may be.

    For kernels, which release the interpreter's lock; the slices must write to places of their own, so that
    their number changes no bit. A task of `Workers` has no threads beside its own and calls it once. What a
    slice raises is raised here, after all have ended.
    """
    slices = 1 if _pool_of_this_task.get() is not None else min(get_num_threads(), count)
    if slices <= 1:
        function(0, count)
        return
    edges = [count * i // slices for i in range(slices + 1)]
    helpers = []
    try:
        for first, last in pairwise(edges[1:]):
            helpers.append(_free_helper())
            helpers[-1].begin(partial(function, first, last))
        function(0, edges[1])
    finally:  # they write into arrays that the caller is about to read, or to give up
        errors = [helper.end() for helper in helpers]
    for error in errors:
        if error is not None:
            raise error


def _free_helper() -> _Helper:
    try:
        return _free_helpers.pop()
    except IndexError:
        return _Helper()
