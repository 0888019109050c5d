"""The ``mudsc:`` section of a mergekit configuration."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator


class MudscSection(BaseModel):
    """How the models of a mergekit configuration are matched before they are merged. All keys are optional."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    balance: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description="Share of weight space in the similarity; 0.5 with calibration text, else 1."
    )
    calibration: str | None = Field(None, description="A text file; both models of a pair read it, chunk by chunk.")
    chunks: Annotated[int, Field(ge=1)] = Field(64, description="How many chunks of the text are read.")
    chunk_tokens: Annotated[int, Field(ge=2)] = Field(128, description="Tokens in a chunk.")
    seed: int = Field(0, description="Of the order in which spaces are visited.")
    max_sweeps: Annotated[int, Field(ge=0)] = Field(100, description="Limit of the sweeps over all spaces.")
    spaces: list[str] | None = Field(
        None, description="Patterns of the names of spaces to match, such as '*.mlp'; the others keep their order."
    )
    leave: list[str] = Field([], description="Models that are merged as they are, without matching.")
    passthrough: bool = Field(False, description="Match the models of a passthrough merge too.")

    @model_validator(mode="after")
    def _agree(self) -> MudscSection:
        if self.calibration is None and self.balance is not None and self.balance < 1:
            raise ValueError(f"balance {self.balance:g} compares activations too, which needs calibration: a text file")
        if self.calibration is not None and self.balance == 1:
            raise ValueError("balance 1 compares weights alone, and calibration text is for comparing activations")
        return self

    @property
    def used_balance(self) -> float:
        """The balance asked for, or the one that fits what is there."""
        if self.balance is not None:
            return self.balance
        return 1.0 if self.calibration is None else 0.5
