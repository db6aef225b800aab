import sys
from types import ModuleType, SimpleNamespace

import pytest

from mmtransfer.config import build_config
from mmtransfer.runs import energy
from mmtransfer.runs.card import _training


class Tracker:
    """In the place of codecarbon's."""

    def __init__(self, **given):
        assert given["save_to_file"] is False

    def start(self):
        self.final_emissions_data = None

    def stop(self):
        self.final_emissions_data = SimpleNamespace(energy_consumed=0.01234567)


class Broken(Tracker):
    def start(self):
        raise OSError("no such counter")


@pytest.mark.parametrize(
    ("tracker", "expected"), [(Tracker, {"energy_kwh": 0.012346}), (Broken, {}), (None, {})]
)
def test_energy_is_in_report_and_card_where_it_is_measured(tracker, expected, monkeypatch, caplog):
    module = ModuleType("codecarbon")
    monkeypatch.setattr(module, "OfflineEmissionsTracker", tracker, raising=False)
    monkeypatch.setitem(sys.modules, "codecarbon", module)
    monkeypatch.setattr(energy, "find_spec", lambda name: tracker)
    with energy.measured() as found:
        assert found == {}
    assert found == expected
    assert ("no such counter" in caplog.text) == (tracker is Broken)
    cost = {"steps": 3, "epochs": 1.0, "train_seconds": 4.0, "device": "cpu", "best_step": 2}
    report = {
        "cost": {**cost, "trained_parameters": 7, **found},
        "versions": {},
        "data": {"train": {"examples": 5}},
        "rehearsal": {"share": 0},
    }
    text = _training(build_config({"task": "sentiment", "source_model": "x"}), report)
    assert ("7 weights trained, 0.0123 kWh by codecarbon. Weight decay" in text) == bool(expected)
