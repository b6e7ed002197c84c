// Vectors of f32 for loops over channels or elements. GCC makes a copy of a CLONES function for each x86-64 level and picks
// one at run time.

#pragma once

#include <cstdint>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif

// Functions that are only called at gemm.h's levels avx512 and avx2, and the pieces of them.
#if defined(__x86_64__) && defined(__GNUC__)
#define WIDE __attribute__((target("arch=x86-64-v4")))
#define NARROW __attribute__((target("avx2,fma")))
#else
#define WIDE
#define NARROW
#endif
#define ALWAYS inline __attribute__((always_inline))

namespace disback {

constexpr int64_t lanes = 16;
typedef float Vec __attribute__((vector_size(64), aligned(4), may_alias));

namespace wide {
using disback::lanes;
using disback::Vec;
}  // namespace wide

namespace narrow {
constexpr int64_t lanes = 8;
typedef float Vec __attribute__((vector_size(32), aligned(4), may_alias));
}  // namespace narrow

}  // namespace disback

// Of the vectors whose name is `Vec` where they stand.
#define LOAD(p) (*reinterpret_cast<const Vec*>(p))
#define STORE(p, v) (*reinterpret_cast<Vec*>(p) = (v))
