"""The ground floor: errors, units, settings, overrides, console, devices, seeds, files."""
