"""Where a run stands in its data, and data that it does not stand in."""

from pathlib import Path

import pytest

from training.progress import Progress, refuse_other_data

ORIGIN = Path("runs/a/checkpoints/step_00000100")
PROGRESS = Progress(step=100, consumed_samples=800, rows=(600, 90))


def test_a_run_goes_on_in_its_own_data_for_any_number_of_epochs() -> None:
    refuse_other_data(PROGRESS, (600, 90), ORIGIN, own=True)
    refuse_other_data(PROGRESS, (600, 90), ORIGIN, own=False)
    refuse_other_data(Progress(consumed_samples=800), (600, 90), ORIGIN, own=True)


@pytest.mark.parametrize("rows", [(600, 91), (690,), (10**9, 90)])
def test_a_run_does_not_go_on_in_other_data(rows: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"^data\.corpora: .* rows, but {ORIGIN} was trained on 600 \+ 90, "):
        refuse_other_data(PROGRESS, rows, ORIGIN, own=True)


def test_a_run_that_begins_from_anothers_needs_data_that_reach_as_far() -> None:
    refuse_other_data(PROGRESS, (700, 100), ORIGIN, own=False)
    with pytest.raises(ValueError, match=rf"^data\.corpora: 799 rows, but {ORIGIN} has consumed 800 samples of other"):
        refuse_other_data(PROGRESS, (799,), ORIGIN, own=False)
