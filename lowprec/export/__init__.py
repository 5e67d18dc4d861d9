"""What serving loads: a table as a file of stored rows, a whole model as a folder."""

from lowprec.export.export_run import Exported, export_plan
from lowprec.export.manifest import Manifest, read_manifest
from lowprec.export.module import load
from lowprec.export.tables import StoredTable, write_table
from lowprec.export.throughput import ServingReport, measure_serving
from lowprec.export.torchrec import per_table_weight_dtype, quantized_state_dict

__all__ = [
    "Exported",
    "Manifest",
    "ServingReport",
    "StoredTable",
    "export_plan",
    "load",
    "measure_serving",
    "per_table_weight_dtype",
    "quantized_state_dict",
    "read_manifest",
    "write_table",
]
