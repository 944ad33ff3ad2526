"""The CUDA side of the runners: a small layer over the driver, the crop kernel, and the frame that ties them together.

| module | what |
|---|---|
| `device` | what the runners ask of a GPU |
| `driver`, `graph`, `compiler` | the GPU: who may use it, what it holds, the order of tear-down; CUDA graphs; NVRTC |
| `binding`, `pycuda_binding`, `cuda_python_binding` | the calls of CUDA beneath, by one package or the other |
| `kernels.cu`, `kernels`, `windows` | the kernel that cuts windows, its launch, and what it is told |
| `memory`, `staging` | arrays in buffers, tensors of targets, and the one upload of a frame |
| `engine` | what runs a graph, as the runner sees it |
| `targets`, `search`, `runner` | the tensors of targets; a search; `CudaRunner`, which joins them |

pycuda is used where it is installed. It has neither CUDA graphs nor the run-time compiler, so those are cuda-python's,
on pycuda's stream and context by their handles; where there is no pycuda, which has to be compiled, cuda-python does
everything. All work is in the device's primary context, which PyTorch, CuPy and ``pycuda.autoprimaryctx`` use as well:
they can share a process and its pointers.
"""
