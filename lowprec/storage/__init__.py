"""Files wherever they lie: paths of this machine and URLs of object stores behind one face."""

from lowprec.storage.copies import existing_copy, local_copy
from lowprec.storage.location import FileState, Location, OpenFile

__all__ = ["FileState", "Location", "OpenFile", "existing_copy", "local_copy"]
