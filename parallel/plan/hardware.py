"""Machines, as the planner takes them. Peaks are the vendors'; rates are what large operations are assumed to reach.

Nothing here was measured by this project on a GPU, except where docs/scaling.md says so.
"""

from dataclasses import dataclass, replace

GB = 1e9


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One kind of GPU and what connects it.

    Attributes:
        name: as the command line has it.
        memory: bytes of the device that a process may use.
        peak: dense bf16 FLOP/s of the data sheet, which MFU is a share of.
        products, wide_products: FLOP/s that matrix products of bf16 and of fp32 operands reach.
        bandwidth: bytes a second of device memory that passes over large tensors reach.
        near: bytes a second that each GPU sends to others of its machine in a large collective.
        far: the same to other machines.
        machine: GPUs of one machine.
        latency: seconds of a collective besides its bytes, in a machine and between machines.
        launch: seconds of the host for one eager operation; the device waits where its work is shorter.
    """

    name: str
    memory: float
    peak: float
    products: float
    wide_products: float
    bandwidth: float
    near: float
    far: float
    machine: int = 8
    latency: tuple[float, float] = (20e-6, 40e-6)
    launch: float = 6e-6


# 989 TFLOP/s, 80 GB at 3.35 TB/s, NVLink 450 GB/s each way, one 400 Gbit/s port a GPU.
H100 = Hardware(
    name="H100",
    memory=78 * GB,
    peak=989e12,
    products=650e12,
    wide_products=50e12,
    bandwidth=2.9e12,
    near=360 * GB,
    far=42 * GB,
)

HARDWARE: dict[str, Hardware] = {
    kind.name: kind
    for kind in (
        H100,
        replace(H100, name="H200", memory=138 * GB, bandwidth=4.1e12),  # the same chip with 141 GB at 4.8 TB/s
        # 312 TFLOP/s, 80 GB at 2.0 TB/s, NVLink 300 GB/s each way, one 200 Gbit/s port a GPU.
        Hardware(
            name="A100",
            memory=78 * GB,
            peak=312e12,
            products=230e12,
            wide_products=17e12,
            bandwidth=1.75e12,
            near=230 * GB,
            far=21 * GB,
        ),
        # One core of a server, gloo between processes of one machine: to hold estimates against runs anywhere.
        Hardware(
            name="CPU",
            memory=16 * GB,
            peak=60e9,
            products=40e9,
            wide_products=40e9,
            bandwidth=8e9,
            near=1 * GB,
            far=1 * GB,
            machine=64,
            latency=(1.3e-3, 1.3e-3),
            launch=10e-6,
        ),
    )
}


def hardware_named(name: str, memory_gb: float | None = None) -> Hardware:
    """The machine of that name, with another size of its memory where one is given.

    Raises:
        ValueError: it is not tabled, or the memory is not positive.
    """
    if name.upper() not in HARDWARE:
        raise ValueError(f"--hardware: {name!r}; must be one of {', '.join(HARDWARE)}; choose the nearest")
    found = HARDWARE[name.upper()]
    if memory_gb is None:
        return found
    if not memory_gb > 0:
        raise ValueError(f"--gpu-memory: {memory_gb}; must be positive; give the GB of one GPU, for example 80")
    return replace(found, memory=memory_gb * GB)


def nearest(device_name: str) -> Hardware:
    """The machine whose name is part of a device's as torch gives it; the H100 where none is."""
    return next((kind for kind in HARDWARE.values() if kind.name in device_name), H100)
