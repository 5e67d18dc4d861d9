"""Why a unit changes the logits: its rows, its channels, differences from what was certified, forms that do not fit."""

__all__: list[str] = []
