"""`python run.py SEED COUNT`: that many fuzzed calls in a process of their own, which may crash or hang."""

from __future__ import annotations

import faulthandler
import sys

from calls import Case, cases, little_memory, verdict
from hypothesis import HealthCheck, given, seed, settings

LONGEST = 60  # seconds for one call


def main(number: int, count: int) -> None:
    done = 0

    @seed(number)
    @settings(max_examples=count, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(cases())
    def run(case: Case) -> None:
        nonlocal done
        faulthandler.dump_traceback_later(LONGEST, exit=True)
        complaint = verdict(case)
        faulthandler.cancel_dump_traceback_later()
        done += 1
        assert complaint is None, f"{case}: {complaint}"

    with little_memory():
        run()
    print(f"{done} calls, seed {number}")


if __name__ == "__main__":
    faulthandler.enable()
    main(int(sys.argv[1]), int(sys.argv[2]))
