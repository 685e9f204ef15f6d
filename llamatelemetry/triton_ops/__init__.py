"""A Llama-like forward in Triton: custom ops ``llamatelemetry_triton::*``, no vendor's library.

Importing a module of this folder needs Triton. Kernels run on a GPU, or on the CPU where
TRITON_INTERPRET=1 was set before Triton was imported.
"""
