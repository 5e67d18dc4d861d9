"""Tables, in this process or sharded among workers."""

from lowprec.shards.table import TableShard, hot_bytes, hot_tables
from lowprec.shards.tables import LocalTables, Tables

__all__ = ["LocalTables", "TableShard", "Tables", "hot_bytes", "hot_tables"]
