"""The ops: one kernel each, with a pure-PyTorch twin beside it."""
