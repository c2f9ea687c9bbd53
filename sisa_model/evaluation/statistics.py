"""What an evaluation finds, as numbers: intervals and the table of them."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

RESAMPLES = 2000
NORMAL_95 = 1.959963984540054  # 97.5 % of a normal distribution lies below it


@dataclass(frozen=True)
class Measurement:
    """One measured number of a task with its 95 % interval."""

    metric: str
    value: float
    low: float
    high: float
    count: int
    """Examples."""
    chance: float | None = None
    """What guessing gives; None: not defined."""
    right: str = ""
    """1 or 0 for each example in order, of a share of right answers: to compare models in pairs."""
    details: dict[str, Any] = field(default_factory=dict)


def wilson(right: int, count: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a share, ``right`` of ``count``: of 0 of 40, 0 to 0.088.

    Raises ValueError for no example or a share outside [0, 1]."""
    if not 0 <= right <= count or count < 1:
        raise ValueError(f"right must be in [0, count] and count at least 1, got {right}, {count}")
    share = right / count
    z2 = NORMAL_95**2 / count
    middle = (share + z2 / 2) / (1 + z2)
    half = math.sqrt(share * (1 - share) * z2 + z2**2 / 4) / (1 + z2)
    low = 0.0 if right == 0 else middle - half
    high = 1.0 if right == count else middle + half
    return low, high


def bootstrap(scores: Any, aggregate: Callable | None = None) -> tuple[float, float]:
    """The 95 % percentile-bootstrap interval of the mean (or ``aggregate``) of ``scores`` [N, ...].

    2,000 resamples of the N examples with replacement, with a fixed seed.
    """
    scores = np.asarray(scores, float)
    rng = np.random.default_rng(0)
    draws = (scores[rng.integers(len(scores), size=len(scores))] for _ in range(RESAMPLES))
    values = [draw.mean() if aggregate is None else aggregate(draw) for draw in draws]
    low, high = np.percentile(values, (2.5, 97.5))
    return float(low), float(high)


def measure(
    metric: str,
    scores: list[Any],
    chance: float | None,
    aggregate: Callable | None = None,
    details: dict[str, Any] | None = None,
) -> Measurement:
    """The measurement of ``scores``, one an example: their mean, or ``aggregate`` of them.

    The interval of a share (scores of 0 and 1, their mean) is Wilson's, any other's a bootstrap."""
    value = float(np.mean(scores) if aggregate is None else aggregate(scores))
    # The harness's own mean adds in Python, 2,000 times over: ours is the same.
    plain = np.ndim(scores) == 1 and np.isclose(value, np.mean(scores), rtol=1e-12)
    share = plain and set(np.ravel(scores)) <= {0, 1}
    right = "".join(str(int(score)) for score in scores) if share else ""
    if share:
        low, high = wilson(right.count("1"), len(right))
    else:
        low, high = bootstrap(scores, None if plain else aggregate)
    return Measurement(metric, value, low, high, len(scores), chance, right, details or {})


def table(found: dict[str, list[Measurement]]) -> str:
    """A line a measurement: task, metric, value, interval, chance, examples."""
    columns = ("task", "metric", "value", "95 % interval", "chance", "examples")
    longest = max(map(len, ("task", *found)))
    layout = f"{{:{longest}}}  {{:15}} {{:>8}} {{:>17}} {{:>8}} {{:>9}}"
    lines = [layout.format(*columns)]
    for task, measurements in found.items():
        for x in measurements:
            scale, unit = (100, " %") if x.right else (1, "")
            value = f"{scale * x.value:.1f}{unit}"
            low_high = f"{scale * x.low:.1f} to {scale * x.high:.1f}{unit}"
            guess = "" if x.chance is None else f"{100 * x.chance:.1f} %"
            lines.append(layout.format(task, x.metric, value, low_high, guess, f"{x.count:,}"))
    return "\n".join(lines)
