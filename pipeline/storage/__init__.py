"""Files on local disks and in object stores, written completely or not at all."""
