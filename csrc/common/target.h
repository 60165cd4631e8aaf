// What code for both host and device is marked with, and the namespace that keeps the copies for different instruction
// sets apart.
#pragma once

#ifdef __CUDACC__
#define LGD_HOST_DEVICE __host__ __device__ __forceinline__
#define LGD_TARGET cuda
#else
#define LGD_HOST_DEVICE inline
#define LGD_TARGET CPU_CAPABILITY
#endif
