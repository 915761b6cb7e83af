"""Run the command line: `python -m saltern` is the same as `saltern`."""

from saltern.jobs.main import main

main()
