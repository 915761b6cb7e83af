"""Files and object stores: whole files or none."""
