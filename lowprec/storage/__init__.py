"""Files wherever they lie: paths of this machine and URLs of object stores behind one face."""

from lowprec.storage.copies import existing_copy, local_copy
from lowprec.storage.location import FileState, Location, OpenFile, Where

__all__ = ["FileState", "Location", "OpenFile", "Where", "existing_copy", "local_copy"]
