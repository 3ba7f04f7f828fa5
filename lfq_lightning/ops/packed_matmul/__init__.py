"""y = x Ŵᵀ for a weight that stays packed: dequantised in tiles, or by a kernel that reads the integers."""
