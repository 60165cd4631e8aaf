// What tests ask of cuda_on_host.h itself.

#include "cuda_on_host.h"

#include <utility>

#include "misuse.cuh"

extern "C" {

// Run the threads of a block in reverse from now on, or in order.
void run_in_reverse(bool reverse) {
  cuda_on_host::reversed = reverse;
}

// What went wrong since the last call; valid until the next.
const char* take_failure() {
  static std::string last;
  last = std::exchange(cuda_on_host::failure, "");
  return last.c_str();
}

// How many kernels were started since the last call.
int take_launches() {
  return std::exchange(cuda_on_host::launches, 0);
}

int run_misused(int which, float* result) {
  return misuse::run(which, result);
}

} // extern "C"
