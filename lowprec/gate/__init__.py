"""The launch gate: is a plan, or a new snapshot with it, good enough to go out?"""

from lowprec.gate.verify import Verification, verify_plan

__all__ = ["Verification", "verify_plan"]
