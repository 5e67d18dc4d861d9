"""Rows of the monitor's tables, and traffic that is changed by column."""

import pyarrow as pa

from lowprec.results import ResultsStore


def rows(config, table="monitor_windows"):
    """The rows as they were written: repetitions and old versions too."""
    return ResultsStore(config.results.root).dataset(table).to_table().to_pylist()


def with_column(table, name, values):
    """The table with other values in a column."""
    return table.set_column(table.column_names.index(name), name, pa.array(values, table.schema.field(name).type))


def states(outcome):
    """The states of the windows of a run."""
    return [window["state"] for window in outcome.windows]
