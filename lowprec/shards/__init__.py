"""Tables, wherever their rows live."""

from lowprec.shards.table import TableShard, hot_tables

__all__ = ["TableShard", "hot_tables"]
