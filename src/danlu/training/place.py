"""What launchers tell a process of its place among others, in torchrun's names; without torch, since every command looks."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping

# torchrun and `accelerate launch` use the names on the left; Intel MPI and MPICH, Open MPI and MVAPICH those on the right.
NAMES = {
    "RANK": ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK"),
    "WORLD_SIZE": ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"),
    "LOCAL_RANK": ("MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK"),
    "LOCAL_WORLD_SIZE": ("MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE"),
}
PORT = "29500"  # accelerate's, where none is named


def adopt(environment: MutableMapping[str, str]) -> None:
    """Adds torchrun's names for MPI's, where a place to meet is named, as `accelerate launch --mpirun_hostfile` does."""
    if "WORLD_SIZE" in environment or "MASTER_ADDR" not in environment:
        return
    found = {own: environment[name] for own, names in NAMES.items() for name in names if name in environment}
    if {"RANK", "WORLD_SIZE"} <= found.keys():
        environment.setdefault("MASTER_PORT", PORT)
        environment.update(found)


def wanted_more(environment: Mapping[str, str]) -> bool:
    """Whether accelerate was asked for several processes and started this one alone, as it does on a CPU."""
    return {"ACCELERATE_USE_CPU", "MASTER_ADDR"} <= environment.keys() and "WORLD_SIZE" not in environment
