"""The merging methods, one family a file; importing this package fills the registry `METHODS`."""

from polytask.merge.methods import averages as averages
