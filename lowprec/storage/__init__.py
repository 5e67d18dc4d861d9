"""Files wherever they lie: paths of this machine and URLs of object stores behind one face."""

from lowprec.storage.copies import local_copy
from lowprec.storage.digests import file_sha256
from lowprec.storage.location import AnyPath, FileState, Location, OpenFile

__all__ = ["AnyPath", "FileState", "Location", "OpenFile", "file_sha256", "local_copy"]
