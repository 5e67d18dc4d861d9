"""A plan file, read for a session: beside units and checkpoint, model and bytes have to be those of the session."""

from __future__ import annotations

from lowprec.core.errors import PlanError
from lowprec.plan import PlanFile, read_plan
from lowprec.plan.cost import plan_bytes
from lowprec.session.session import Session
from lowprec.storage import AnyPath

__all__ = ["read_planned"]

# What rows may have been padded to in a plan whose "row_alignment" was edited.
_ALIGNMENTS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def read_planned(session: Session, path: AnyPath, *, any_checkpoint: bool = False) -> PlanFile:
    """The plan file at `path`, checked against a session.

    any_checkpoint: the plan may have been made for another checkpoint of the model, as at the launch gate. Only the
    units are compared then, because a newer checkpoint may have more rows, and its code another place.

    Raises `PlanError` where the plan does not fit the model, was made for another checkpoint, or names another model
    or other bytes than the session's.
    """
    file = read_plan(path, units=session.units, checkpoint_sha256=None if any_checkpoint else session.checkpoint_sha256)
    if file.checkpoint_sha256 != session.checkpoint_sha256:
        return file
    factory = session.config.model.factory
    if file.model != factory:
        raise PlanError(
            f'plan {path}: was made for model "{file.model}", and model.factory is "{factory}"; use the config that '
            'the plan was made with, or, if only the name of the factory changed, correct "model" in the plan'
        )
    # At the plan's own alignment: verify reports where the config has another one, and counts by that.
    size = plan_bytes(session.units, file.plan, file.row_alignment, session.storage.layers)
    if file.size_bytes != size:
        says = (
            f"plan {path}: says {file.size_bytes:,} bytes, and its units take {size:,} at row alignment "
            f"{file.row_alignment}"
        )
        aligned = [
            a for a in _ALIGNMENTS if plan_bytes(session.units, file.plan, a, session.storage.layers) == file.size_bytes
        ]
        if aligned:
            raise PlanError(
                f'{says}, and {file.size_bytes:,} at {aligned[0]}: "row_alignment" was changed by hand; set it to '
                f"{aligned[0]}, or write the plan with --set space.row_alignment={file.row_alignment}"
            )
        layers = ", or space.layers (outliers, arithmetic) changed since" if session.config.space.layers else ""
        raise PlanError(
            f'{says}: its units or "bytes" were changed by hand{layers}; write plans with lowprec plan CONFIG '
            f'--unit UNIT=PRECISION --out FILE, or set "bytes" to {size}'
        )
    return file
