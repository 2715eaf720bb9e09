"""Losses as pure functions: one value per example, no reduction, nothing of the project inside."""

from jaxpref.losses.language_modeling import nll
from jaxpref.losses.preference import DPOOutput, dpo

__all__ = ["DPOOutput", "dpo", "nll"]
