"""How many blocks of a kernel one multiprocessor holds: the rule of CUDA's cuda_occupancy.h, for sm_80, 90 and 100."""

from __future__ import annotations

from dataclasses import dataclass

# Bytes of shared memory that one block may have.
SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}
REGISTERS, THREADS, BLOCKS = 65_536, 2_048, 32  # of a multiprocessor
_PARTITIONS = 4  # each with a quarter of the registers; a warp stays in one
_REGISTER_UNIT, _SHARED_UNIT = 256, 128  # a warp's registers and a block's shared memory are given out in these
OF_SYSTEM = 1_024  # bytes of shared memory that each block costs beside its own


@dataclass(frozen=True)
class Use:
    """What a launch takes: threads a block, registers a thread, static and dynamic bytes of shared memory a block."""

    threads: int
    registers: int
    shared_bytes: int


def blocks(use: Use, chip: int) -> int:
    """Resident blocks of one multiprocessor; 0: it cannot be launched.

    A cooperative grid may have as many blocks as that, times the multiprocessors.
    """
    warps = -(-use.threads // 32)
    if use.threads > 1_024 or use.registers > 255 or use.shared_bytes > SHARED_LIMIT[chip]:
        return 0
    a_warp = -(-use.registers * 32 // _REGISTER_UNIT) * _REGISTER_UNIT
    rounded = -(-warps // _PARTITIONS) * _PARTITIONS  # every partition has to hold its share
    if rounded * a_warp > REGISTERS:
        return 0
    by_registers = REGISTERS // _PARTITIONS // a_warp * _PARTITIONS // warps if use.registers else BLOCKS
    shared = -(-(use.shared_bytes + OF_SYSTEM) // _SHARED_UNIT) * _SHARED_UNIT
    by_shared = (SHARED_LIMIT[chip] + OF_SYSTEM) // shared
    return min(by_registers, by_shared, THREADS // 32 // warps, BLOCKS)
