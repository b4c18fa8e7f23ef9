import pytest

from eval.quantity import compact, duration


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((0, "0"), (7, "7"), (512, "512"), (999.4, "999"), (999.9, "1k"), (1432576, "1.43M"), (2.5e9, "2.5B")),
        *((3e12, "3T"), (8.48e15, "8.48e15"), (0.25, "0.25"), (4e-4, "4e-4"), (1.234e-5, "1.23e-5"), (-1500, "-1.5k")),
        *((float("nan"), "nan"), (float("inf"), "inf")),
    ],
)
def test_compact(value: float, text: str) -> None:
    assert compact(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0 s"), (59.6, "1 min"), (61, "1 min 1 s"), (3725, "1 h 2 min"), (86_400, "1 d"), (180_000, "2 d 2 h")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
