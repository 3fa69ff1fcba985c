"""`python -m bench.profiled worker …` is `backstop worker …` with its loop's thread under cProfile.

When it stops, BENCH_PROFILE names the file with the figures: `python -m pstats FILE`.
"""

from __future__ import annotations

import cProfile
import os

from worker.cli import main
from worker.loop import LoopThread

_run = LoopThread._run


def _profiled(self: LoopThread) -> None:
    profile = cProfile.Profile()
    try:
        profile.runcall(_run, self)
    finally:
        profile.dump_stats(os.environ["BENCH_PROFILE"])


if __name__ == "__main__":
    LoopThread._run = _profiled  # type: ignore[method-assign]
    main()
