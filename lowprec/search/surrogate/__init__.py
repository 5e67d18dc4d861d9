"""The quadratic model of the gap, its fronts and their bounds."""

__all__: list[str] = []
