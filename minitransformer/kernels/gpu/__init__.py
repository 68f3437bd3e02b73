"""What all kernels in numba.cuda share: how one is built and launched, arrays on a device, and a device in Python.

`cuda.py` of a family holds its kernels. The array decides where they run: CuPy's on the GPU, those of the simulator in
`simulator.py`, thread by thread in Python, with every access to memory checked.
"""
