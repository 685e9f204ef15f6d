// Every op of the package, grouped by the room that holds it. Tensor(a!) is written in place.
// clang-format off: one line each
#include "common/stable.h"

STABLE_TORCH_LIBRARY(llamatelemetry, m) {
  // norm: x [..., hidden_size]; q, k [num_tokens, num_heads, head_dim]; cos, sin [positions, rotary_dim]
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
}
