// The CPU kernel of local_residual on raw pointers. The mathematics is in lgd_kernels/reference/local_residual.py.
#pragma once

#include "../common/local_residual.h"

namespace lgd {

#define LGD_DECLARE_LOCAL_RESIDUAL                  \
  void local_residual(const LocalResidual<float>&); \
  void local_residual(const LocalResidual<double>&);

#ifndef CPU_CAPABILITY // the glue; the vector code defines one of them, in an inline namespace
namespace DEFAULT {
LGD_DECLARE_LOCAL_RESIDUAL
}
namespace AVX2 {
LGD_DECLARE_LOCAL_RESIDUAL
}
namespace AVX512 {
LGD_DECLARE_LOCAL_RESIDUAL
}
#endif

#undef LGD_DECLARE_LOCAL_RESIDUAL

} // namespace lgd
