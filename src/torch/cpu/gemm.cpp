// The loops around the kernels of gemm.h, and which of them the processor gets.

#include "gemm_kernel.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

namespace disback {
namespace {

Level found() {
#if defined(__x86_64__) && defined(__GNUC__)
  // libtorch's own variable limits us too, so that one setting compares like with like.
  const char* asked = std::getenv("ATEN_CPU_CAPABILITY");
  const auto is = [&](const char* name) { return asked != nullptr && std::strcmp(asked, name) == 0; };
  if (is("default") || !__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return Level::none;
  const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                    __builtin_cpu_supports("avx512cd");
  return wide && !is("avx2") ? Level::avx512 : Level::avx2;
#else
  return Level::none;
#endif
}

const Kernel& kernel() { return level() == Level::avx512 ? avx512_kernel : avx2_kernel; }

constexpr int64_t most_copied = 168 * 384;

}  // namespace

Level level() {
  static const Level once = found();
  return once;
}

int64_t unit() { return kernel().unit; }

void pack(const Matrix& b, int64_t k, int64_t n, int64_t from, int64_t to, float* packed) {
  const Kernel& with = kernel();
  for (int64_t p = from; p < to; ++p) {
    with.pack(b, b.data + p * panel * b.column, k, std::min(panel, n - p * panel), packed + p * k * panel);
  }
}

void multiply(const Matrix& a, int64_t from, int64_t to, const float* packed, int64_t k, int64_t n, const float* bias,
              bool more, float* c, int64_t stride) {
  const Kernel& with = kernel();
  // Rows whose distance is a multiple of 2 KiB fall on the same lines of the first cache: they are copied, a group at a time.
  const bool aliased = a.column == 1 && a.row % 512 == 0 && n > 2 * panel;
  alignas(64) static thread_local float copy[most_copied];
  for (int64_t k0 = 0; k0 < k; k0 += with.steps) {
    const int64_t k1 = std::min(k0 + with.steps, k);
    for (int64_t r0 = from; r0 < to; r0 += with.group) {
      const int64_t r1 = std::min(r0 + with.group, to);
      Matrix rows{a.data + r0 * a.row + k0 * a.column, a.row, a.column};
      if (aliased) {
        for (int64_t i = 0; i < r1 - r0; ++i) std::copy_n(rows.data + i * a.row, k1 - k0, copy + i * with.steps);
        rows = {copy, with.steps, 1};
      }
      for (int64_t j = 0; j < n; j += panel) {
        Tile t{nullptr, rows.row, rows.column, packed + j * k + k0 * panel, k1 - k0, bias ? bias + j : nullptr, more || k0 > 0,
               nullptr, stride, std::min(panel, n - j)};
        for (int64_t i = r0; i < r1; i += with.unit) {
          t.a = rows.data + (i - r0) * rows.row;
          t.c = c + i * stride + j;
          with.run(t, std::min(with.unit, r1 - i));
        }
      }
    }
  }
}

}  // namespace disback
