"""The storage daemon: experts in DRAM and in files, behind gRPC. It stores bytes, and knows nothing of torch, training or games."""
