"""What the hardware gives at most: published peaks by the device's name, and products and copies that are measured."""

from __future__ import annotations

import torch
from measure import Bench, Figure

PEAKS = {  # name of the device contains -> dense bf16 operations per second and bytes per second, as the vendor publishes them
    "B200": (2250e12, 8.0e12),
    "GH200": (989e12, 4.0e12),
    "H200": (989e12, 4.8e12),
    "H100 PCIe": (756e12, 2.0e12),
    "H100 NVL": (835e12, 3.9e12),
    "H100": (989e12, 3.35e12),
    "A100-SXM4-80GB": (312e12, 2.04e12),
    "A100 80GB": (312e12, 1.94e12),
    "A100": (312e12, 1.555e12),
    "L40S": (362e12, 0.864e12),
    "L4": (121e12, 0.3e12),
    "A10": (125e12, 0.6e12),
    "RTX 4090": (165e12, 1.008e12),
    "RTX 3090": (71e12, 0.936e12),
}
PRODUCT, COPY, UPLOAD = "matrix product, bf16", "copy on the device", "copy from pinned memory"


def published(device: str) -> dict[str, float]:
    """Return the published peaks of a device, "bf16" and "bandwidth"; nothing for an unknown device."""
    found = next((peaks for name, peaks in PEAKS.items() if name in device), None)
    return {} if found is None else {"bf16": found[0], "bandwidth": found[1]}


def add_lines(bench: Bench) -> None:
    side, count = (256, 2**16) if bench.tiny else (8192, 2**28)

    def product() -> Figure:
        left, right = (torch.randn(side, side, device=bench.device, dtype=torch.bfloat16) for _ in range(2))
        rate = 2 * side**3 / bench.seconds(lambda: left @ right, most=1)
        return Figure(rate / 1e12, "TFLOP/s", rate, note=f"{side} x {side}, random numbers")

    def copy() -> Figure:
        numbers, other = (torch.empty(count, dtype=torch.int32, device=bench.device) for _ in range(2))
        rate = 2 * numbers.nbytes / bench.seconds(lambda: other.copy_(numbers), most=1)
        return Figure(rate / 1e9, "GB/s", rate, "bandwidth", "read and written")

    def upload() -> Figure:
        numbers = torch.zeros(count // 4, dtype=torch.int32, pin_memory=bench.device.type == "cuda")
        other = torch.empty(count // 4, dtype=torch.int32, device=bench.device)
        rate = numbers.nbytes / bench.seconds(lambda: other.copy_(numbers, non_blocking=True), most=1)
        return Figure(rate / 1e9, "GB/s")

    bench.add(PRODUCT, product)
    bench.add(COPY, copy)
    bench.add(UPLOAD, upload)
