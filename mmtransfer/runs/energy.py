"""What a training takes of energy, by codecarbon, where that is installed."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

logger = logging.getLogger(__name__)


@contextmanager
def measured() -> Iterator[dict[str, float]]:
    """A dictionary that has `energy_kwh` of the block once it has ended: of this process's share of
    the processor and memory, and of its GPUs. Empty where nothing measures it.
    """
    found: dict[str, float] = {}
    tracker = None
    if find_spec("codecarbon") is not None:
        logging.getLogger("codecarbon").setLevel(logging.CRITICAL)
        try:
            from codecarbon import OfflineEmissionsTracker

            tracker = OfflineEmissionsTracker(
                country_iso_code="USA",  # for what its mains emit, which is not reported
                tracking_mode="process",
                save_to_file=False,
                allow_multiple_runs=True,
                log_level="critical",
            )
            tracker.start()
        except Exception as error:  # no training fails for it
            tracker = None
            logger.warning("energy is not measured: codecarbon: %s", error)
    try:
        yield found
    finally:
        if tracker is not None:
            tracker.stop()
            found["energy_kwh"] = round(tracker.final_emissions_data.energy_consumed, 6)
