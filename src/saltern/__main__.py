"""`python -m saltern`: the same command line as `saltern`."""

from saltern.jobs.main import main

main()
