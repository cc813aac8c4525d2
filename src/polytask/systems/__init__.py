"""The 64 systems: one file each, composed of the parts below."""
