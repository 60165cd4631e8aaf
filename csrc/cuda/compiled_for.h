// The compute capability that the kernels of this build were compiled for, as the current device runs them: 80 for PTX
// of 8.0, also where the driver has translated it for a newer chip. Clusters need code for 9.0.
#pragma once

namespace lgd::gpu {

// 0 if the device can run none of them.
int compiled_for();

} // namespace lgd::gpu
