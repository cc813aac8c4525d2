"""The merging methods, one family a file; importing this package fills the registry `METHODS`."""

from polytask.merge.methods import averages as averages
from polytask.merge.methods import breadcrumbs as breadcrumbs
from polytask.merge.methods import drop as drop
from polytask.merge.methods import informed as informed
from polytask.merge.methods import pcb as pcb
from polytask.merge.methods import spherical as spherical
from polytask.merge.methods import ties as ties
