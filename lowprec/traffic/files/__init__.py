"""Where rows come from: Parquet files, folders of them, Delta tables."""

__all__: list[str] = []
