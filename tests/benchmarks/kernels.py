"""Row-wise quantizers: ours against FBGEMM's on the same rows, one thread. Prints one JSON object as its last line.

`minmax_int8`, `minmax_int4` and `minmax_int2` are the worst ratio of rows/s (ours / FBGEMM's) over dims 32 to 128;
`grid` holds the medians by dim in million rows/s.
"""

import json
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from lowprec import ops
from lowprec.plan import Precision

DIMS, ROWS, REPEATS = (16, 32, 64, 128), 200_000, 7
PRECISIONS = (Precision.INT8, Precision.INT4, Precision.INT2)


def million_rows_per_s(work: Callable[[], object]) -> float:
    seconds = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return ROWS / statistics.median(seconds) / 1e6


def main() -> None:
    import fbgemm_gpu  # noqa: F401  (registers the operators)

    torch.set_num_threads(1)
    fbgemm = torch.ops.fbgemm.FloatToFusedNBitRowwiseQuantizedSBHalf
    grid: dict[str, dict[str, dict[str, float]]] = {}
    for dim in DIMS:
        rows = torch.randn(ROWS, dim, generator=torch.Generator().manual_seed(dim))
        for precision in PRECISIONS:
            out = ops.quantize(rows.numpy(), precision)
            theirs = fbgemm(rows, precision.bits).numpy()
            # FBGEMM's quantizer puts scale and bias last, its serving layout has them first.
            assert np.array_equal(out, np.roll(theirs, 4, axis=1)), f"{precision} dim {dim}: other bytes than FBGEMM's"
            ours = million_rows_per_s(lambda p=precision, r=rows, o=out: ops.quantize(r.numpy(), p, out=o))
            other = million_rows_per_s(lambda b=precision.bits, r=rows: fbgemm(r, b))
            cell = {"ours": round(ours, 2), "fbgemm": round(other, 2), "ratio": round(ours / other, 3)}
            grid.setdefault(str(precision), {})[str(dim)] = cell
            print(precision, dim, cell, flush=True)
    worst = {f"minmax_{p}": min(grid[str(p)][str(d)]["ratio"] for d in DIMS if d >= 32) for p in PRECISIONS}
    print(json.dumps({**worst, "threads": 1, "num_rows": ROWS, "repeats": REPEATS, "grid": grid}))


if __name__ == "__main__":
    main()
