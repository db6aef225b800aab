"""Where a monitor's text goes: sinks, report, alerts, dashboard."""
