"""Statistics of the certified window, stored beside the results."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lowprec.core.errors import ResultsError
from lowprec.evaluation.evaluate import NUM_BLOCKS
from lowprec.monitor.inputs.counts import InputCounts, Inputs, Touched
from lowprec.monitor.judging.units import UnitShare, unit_shares
from lowprec.monitor.observe import WindowObservation
from lowprec.storage import Location
from lowprec.traffic import Schema

__all__ = ["Certified", "CertifiedCounts"]

FILE = "certified.npz"


class CertifiedCounts:
    """The inputs of the certified window while it is read."""

    def __init__(self, schema: Schema) -> None:
        """Nothing yet."""
        self.inputs = Inputs(schema, NUM_BLOCKS)
        self.touched = {feature.name: Touched(feature.num_embeddings) for feature in schema.sparse}

    def add(self, block: int, counts: InputCounts) -> None:
        """Some rows of a time block."""
        self.inputs.add(block, counts)
        for name, ids in counts.sparse.items():
            self.touched[name].add(ids.ids)


@dataclass(frozen=True)
class Certified:
    """What windows are compared with.

    gap_pct, kl_pct: of the plan. calibration_ref: of the reference; None where labels were all alike.
    """

    inputs: Inputs
    touched: dict[str, Touched]
    units: tuple[UnitShare, ...]
    window: str
    num_rows: int
    gap_pct: float
    kl_pct: float
    calibration_ref: float | None

    @classmethod
    def of(
        cls, counts: CertifiedCounts, observation: WindowObservation, precisions: dict[str, str], window: str
    ) -> Certified:
        """What an observation of the certified window says."""
        metrics = observation.exact.metrics(0, confidence=0.95)
        k, h = observation.label_free.totals
        return cls(
            inputs=counts.inputs,
            touched=counts.touched,
            units=tuple(unit_shares(observation, precisions)),
            window=window,
            num_rows=observation.label_free.num_rows,
            gap_pct=metrics.gap_pct,
            kl_pct=float(100 * k / h),
            calibration_ref=metrics.calibration_ref if np.isfinite(metrics.calibration_ref) else None,
        )

    def write(self, folder: Location) -> None:
        """Keep it as a file, whole or not at all; whoever writes it at the same time writes the same."""
        arrays: dict[str, NDArray[Any]] = self.inputs.to_arrays()
        arrays |= {f"touched/{name}": touched.bits for name, touched in self.touched.items()}
        known = {
            "units": [share.to_dict() for share in self.units],
            "window": self.window,
            "num_rows": self.num_rows,
            "gap_pct": self.gap_pct,
            "kl_pct": self.kl_pct,
            "calibration_ref": self.calibration_ref,
        }
        path = folder / FILE
        try:
            with path.whole_file() as partial, partial.open("wb") as file:
                np.savez_compressed(file, known=np.array(json.dumps(known)), **arrays)  # type: ignore[arg-type]
        except OSError as error:
            raise ResultsError(f"{path}: cannot be written: {error.strerror or error}; make room") from None

    @classmethod
    def read(cls, folder: Location, schema: Schema) -> Certified | None:
        """What is kept; None where nothing is. Raises `ResultsError` where it is of other features or damaged."""
        path = folder / FILE
        if path.kind() is None:
            return None
        try:
            with path.open() as opened:
                arrays = dict(np.load(io.BytesIO(opened.read())).items())
            inputs = Inputs(schema, NUM_BLOCKS)
            inputs.fill(arrays)
            touched = {feature.name: Touched(feature.num_embeddings) for feature in schema.sparse}
            for name, found in touched.items():
                found.bits = arrays[f"touched/{name}"].astype(np.uint8)
            known = json.loads(str(arrays["known"]))
        except (OSError, ValueError, KeyError) as error:
            raise ResultsError(
                f"{path}: does not hold the counts of this traffic ({error}); delete it, and it is made again from the "
                "certified window"
            ) from None
        units = tuple(UnitShare.from_dict(share) for share in known.pop("units"))
        return cls(inputs=inputs, touched=touched, units=units, **known)
