"""Measurements on a GPU: what it gives (probe.cu), and what torch.nn makes of it (cudnn_table)."""
