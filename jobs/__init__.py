"""The command line: one thin command in a file, which imports what is heavy inside the command."""
