"""The machine and its processes: durable files, memory, launchers, signals, versions."""
