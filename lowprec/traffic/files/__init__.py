"""Sources of rows: Parquet files, folders, Delta tables."""

__all__: list[str] = []
