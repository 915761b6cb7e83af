"""The parts of webdataset that Saltern uses, for checks on a machine that lacks it and cannot install it."""
