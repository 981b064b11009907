"""The contract between the storage daemon and its trainers: messages, records, checksums, initial values, errors, and shared rules.

Both sides import it, and it imports neither torch nor either of them. Read `v1/expert.proto` first: the comments of the .proto files are
the specification.
"""
