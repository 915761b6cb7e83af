"""Run the command line: `python -m saltern` is the same as `saltern`."""

import os
import sys

if sys.path[0] == os.getcwd():  # `python -m` puts the current folder first, and its files would replace packages
    del sys.path[0]

from saltern.jobs.main import main

main()
