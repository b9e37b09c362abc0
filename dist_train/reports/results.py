"""What `evaluate` writes for others to read: which files, and what has to be in them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, NonNegativeFloat, PositiveInt, model_validator

from data_shards.errors import DataError
from data_shards.files import Form, read_json

RESULTS, COUNTS = "results.json", "counts.json"
_Few = Annotated[int, Field(ge=0, lt=2**53)]
_Finite = Annotated[float, Field(allow_inf_nan=False)]


class _Interval(Form):
    value: _Finite
    low: _Finite
    high: _Finite


class _Condition(Form):
    task: str
    gamma: PositiveInt
    temperature: NonNegativeFloat
    drafting: str


class _Row(_Condition):
    drafter: str
    top_p: _Finite
    max_new_tokens: PositiveInt


class _Target(Form):
    path: str
    revision: str | None
    precision: str
    parameters: PositiveInt
    weights: str


class _Results(Form):
    """What comparisons need."""

    target: _Target
    drafters: Annotated[dict[str, dict[str, Any]], Field(min_length=1)]
    prompts: dict[str, Any]
    rows: list[_Row]


class _Figures(_Row):
    block_efficiency: _Interval
    mbsu: _Finite
    accepted_shares: list[_Finite]


class _Comparison(_Condition):
    of: str
    over: str
    runs: Annotated[list[int], Field(min_length=2, max_length=2)]
    difference: _Interval
    verdict: str


class _Rate(Form):
    drafter: str | None
    gamma: int
    batch_size: PositiveInt
    tokens_per_s: _Finite
    speed_up: _Finite


class _Costs(Form):
    drafter: str
    batch_size: PositiveInt
    plain_seconds: _Finite
    draft: _Finite
    draft_by_bytes: _Finite
    draft_by_parameters: _Finite
    verify: list[_Finite]
    break_even: list[_Finite | None]


class _Predicted(Form):
    task: str
    temperature: NonNegativeFloat
    drafting: str
    drafter: str
    batch_size: PositiveInt


class _SpeedUps(_Predicted):
    acceptance: list[_Finite | None]
    speed_up: list[_Finite]
    best_gamma: int


class _Threshold(_Predicted):
    gamma: PositiveInt
    threshold: _Finite
    tokens_per_call: _Finite
    drafts_per_call: _Finite
    speed_up: _Finite


class _Prediction(Form):
    length: PositiveInt
    costs: list[_Costs]
    speed_ups: list[_SpeedUps]
    thresholds: list[_Threshold]


class _Drafter(Form):
    path: str


class _Parting(Form):
    gap: _Finite | None


class _ServedRow(Form):
    task: str
    drafter: str
    gamma: PositiveInt
    temperature: NonNegativeFloat
    concurrency: PositiveInt
    prompts: PositiveInt
    block_efficiency: _Interval
    offline: _Interval
    tokens_per_s: _Finite
    plain_tokens_per_s: _Finite
    speed_up: _Finite
    predicted_speed_up: _Finite
    call: _Finite | None
    equal_to_plain: int | None = None
    plain_equal_to_offline: int | None = None
    differing: list[_Parting] = Field(default=[])


class _Served(Form):
    engine: str
    version: str
    weights: str
    way: str
    rows: list[_ServedRow]
    notes: list[str]


class _Tables(_Results):
    """What tables are made of."""

    drafters: Annotated[dict[str, _Drafter], Field(min_length=1)]  # type: ignore[assignment] # a narrower form
    base: str
    rows: list[_Figures]  # type: ignore[assignment] # likewise
    comparisons: list[_Comparison]
    token_rate: list[_Rate]
    prediction: _Prediction | None = None
    served: list[_Served] = Field(default=[])


class _Cell(_Condition):
    drafter: str
    tokens: Annotated[list[_Few], Field(min_length=1)]
    calls: Annotated[list[_Few], Field(min_length=1)]

    @model_validator(mode="after")
    def _of_the_same_prompts(self) -> _Cell:
        if len(self.tokens) != len(self.calls):
            raise ValueError(f"{len(self.tokens)} counts of tokens and {len(self.calls)} of calls")
        if not sum(self.calls):  # of single prompts there may be none: as servers count, where one token is the answer
            raise ValueError("no calls")
        return self


class _Counts(Form):
    cells: list[_Cell]


def read_results(folder: Path) -> dict[str, Any]:
    """The content of a folder's results.json, for comparisons.

    Raises DataError where it is not there, torn, or of another form.
    """
    return read_json(folder / RESULTS, _Results)


def read_tables(folder: Path) -> dict[str, Any]:
    """The same with all that tables are made of. Raises DataError as `read_results`."""
    return read_json(folder / RESULTS, _Tables)


def read_served(folder: Path) -> list[dict[str, Any]]:
    """What servers made of the same prompts, as far as a folder's results.json tells; nothing where it is of no use."""
    try:
        served: list[dict[str, Any]] = read_tables(folder).get("served", [])
    except DataError:
        return []
    return served


def read_counts(folder: Path) -> list[dict[str, Any]]:
    """Tokens and calls of each prompt, by condition: what comparisons need. Raises DataError as `read_results`."""
    cells: list[dict[str, Any]] = read_json(folder / COUNTS, _Counts)["cells"]
    return cells
