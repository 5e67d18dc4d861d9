"""lowprec finds the cheapest numeric precision for every embedding table of a recommendation model, and proves it."""

from typing import Any

from lowprec._version import __version__

__all__ = ["__version__", "load", "query"]


def query(sql: str, root: str = "runs") -> Any:
    """The answer of a SQL query over the results under `root`, as a pandas DataFrame; see `lowprec.results.query`."""
    from lowprec.results import query as run_query

    return run_query(sql, root)


def load(folder: str, *, verify: bool = True, in_memory: bool = False) -> Any:
    """The `torch.nn.Module` of a folder that `lowprec export` wrote; see `lowprec.export.load`."""
    from lowprec.export import load as load_module

    return load_module(folder, verify=verify, in_memory=in_memory)
