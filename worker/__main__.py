"""`python -m worker` is `backstop`."""

from worker.cli import main

main()
