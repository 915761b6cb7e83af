"""The command line: one thin command in each file. Heavy modules are imported inside the commands."""
