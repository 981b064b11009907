"""The contract between the storage daemon and its trainers: messages, records, checksums, initial values, errors. No torch.

Read `v1/expert.proto` first: its comments are the specification.
"""
