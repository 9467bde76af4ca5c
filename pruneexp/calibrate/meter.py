"""What calibration spends."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Meter:
    """What calibration spent, in plain passes of all decoder layers over the calibration windows."""

    forward: float = 0.0
    backward: float = 0.0
