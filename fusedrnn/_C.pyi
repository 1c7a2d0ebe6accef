"""The compiled extension. Importing it registers the operators ``torch.ops.fusedrnn.*``."""

def cpu_isas() -> list[str]:
    """Instruction sets that are compiled in and that this machine can run, the best one last."""

def get_cpu_isa() -> str:
    """The instruction set in use."""

def set_cpu_isa(name: str) -> None:
    """Use the instruction set ``name`` from now on; ValueError unless ``cpu_isas()`` lists it."""

def empty_cache() -> None:
    """Give the memory that is kept for the next calls back to the system."""

unit_alignment: int
"""Hidden units of saved tensors are rounded up to a multiple of this."""

def build_info() -> dict[str, str]:
    """How the extension was built: compiler, versions, switches."""
