"""Tables, wherever their rows live."""

from lowprec.shards.table import TableShard

__all__ = ["TableShard"]
