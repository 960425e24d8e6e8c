"""Metal compute kernels as PTX, for NVIDIA GPUs: the second back end of the emulator's headers.

>>> ptx = metal_ptx.compile("kernels.metal", constants={0: True}, threads=128)
>>> metal_ptx.ptxas_report(ptx)
"""
