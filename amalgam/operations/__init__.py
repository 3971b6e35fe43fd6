"""The fused operations: schema, fake, reference and autograd in one file each.

:mod:`amalgam.ops` holds the functions that users call.
"""
