"""The series of forecast.py, its folds and what forecasts have to beat."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import statsmodels.api as sm
from statsmodels.tsa.ar_model import AutoReg, ar_select_order


@dataclass(frozen=True)
class Series:
    name: str
    unit: str
    values: np.ndarray
    rises: bool
    period: int  # steps of a cycle
    window: int  # steps that the GRU reads
    horizon: int  # steps that are forecast
    test: int  # steps at the end that are forecast
    fold: int  # steps from fit to fold's end
    stride: int  # steps from origin to origin
    most_lags: int  # of the autoregression


def load() -> list[Series]:
    sunspots = sm.datasets.sunspots.load_pandas().data["SUNACTIVITY"].to_numpy(float)
    co2 = sm.datasets.co2.load_pandas().data["co2"].interpolate().to_numpy(float)
    return [
        Series("sunspots", "sunspot number", sunspots, False, 11, 44, 11, 108, 12, 1, 24),
        Series("CO2", "ppm", co2, True, 52, 104, 52, 12 * 52, 104, 4, 56),
    ]


def folds(series: Series) -> list[tuple[int, list[int]]]:
    """(steps known when the fold's models are fitted, its origins)."""
    end = len(series.values)
    found = []
    for known in range(end - series.test, end, series.fold):
        last = min(known + series.fold, end - series.horizon + 1)
        origins = list(range(known, last, series.stride))
        if origins:
            found.append((known, origins))
    return found


def naive(series: Series, origins: list[int]) -> np.ndarray:
    assert series.horizon <= series.period
    back = [series.values[o - series.period : o - series.period + series.horizon] for o in origins]
    return np.stack(back)


def naive_and_rise(series: Series, origins: list[int]) -> np.ndarray:
    values = series.values
    rises = [values[o - 1] - values[o - 1 - series.period] for o in origins]
    return naive(series, origins) + np.array(rises)[:, None]


def autoregression(series: Series, known: int, origins: list[int]) -> np.ndarray:
    """Coefficients from the steps before `known`; from each origin, on what was seen by then. A
    series that rises is first made one of differences to a cycle ago: a line through all years
    would not bend with it, nor 52 weeks make a year."""
    gap = series.period if series.rises else 0
    values = series.values[gap:] - series.values[:-gap] if gap else series.values
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the index, which has no dates
        lags = ar_select_order(values[: known - gap], series.most_lags, ic="bic").ar_lags or [1]
        params = AutoReg(values[: known - gap], lags).fit().params
        found = []
        for origin in origins:
            seen = AutoReg(values[: origin - gap], lags)
            end = origin - gap + series.horizon - 1
            found.append(seen.predict(params, start=origin - gap, end=end))
    return np.stack(found) + (naive(series, origins) if gap else 0.0)
