"""Tables in the form that serving loads."""

from lowprec.export.tables import StoredTable, write_table

__all__ = ["StoredTable", "write_table"]
