"""The memory of this process (Linux): what is resident now, and the most that it was."""


def resident() -> float:
    """GB in memory now; the peak starts again from here."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return _status("VmRSS")


def peak() -> float:
    """GB at most since `resident` was last called."""
    return _status("VmHWM")


def _status(field: str) -> float:
    with open("/proc/self/status") as file:
        return int(next(line for line in file if line.startswith(field)).split()[1]) / 2**20
