"""Tables, wherever their rows live."""

from lowprec.shards.table import TableShard, hot_bytes, hot_tables
from lowprec.shards.tables import LocalTables, Tables

__all__ = ["LocalTables", "TableShard", "Tables", "hot_bytes", "hot_tables"]
