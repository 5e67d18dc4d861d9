"""Files: local paths and object store URLs behind one interface."""

from lowprec.storage.copies import local_copy
from lowprec.storage.digests import file_sha256
from lowprec.storage.location import AnyPath, FileState, Location, OpenFile

__all__ = ["AnyPath", "FileState", "Location", "OpenFile", "file_sha256", "local_copy"]
