"""What vLLM computes as one matrix, and by what name it then looks for a rule."""

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def fused_parts(names: list[str]) -> dict[str, list[str]]:
    """Return full name of a fused layer → the layers among `names` that are its parts."""
    found: dict[str, list[str]] = {}
    for name in names:
        prefix, _, last = name.rpartition(".")
        for fused, parts in FUSED.items():
            if last in parts:
                found.setdefault(f"{prefix}.{fused}", []).append(name)
    order = [part for parts in FUSED.values() for part in parts]
    return {
        fused: sorted(parts, key=lambda name: order.index(name.rpartition(".")[2])) for fused, parts in found.items()
    }
