// Vectors of f32 for loops over channels or elements. GCC makes a copy of a CLONES function for each x86-64 level and picks
// one at run time.

#pragma once

#include <cstdint>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif

// Functions that are only called where gemm.h's are there, and the pieces of them.
#if defined(__x86_64__) && defined(__GNUC__)
#define WIDE __attribute__((target("arch=x86-64-v4")))
#else
#define WIDE
#endif
#define ALWAYS inline __attribute__((always_inline))

namespace disback {

constexpr int64_t lanes = 16;
typedef float Vec __attribute__((vector_size(64), aligned(4), may_alias));

}  // namespace disback

#define LOAD(p) (*reinterpret_cast<const ::disback::Vec*>(p))
#define STORE(p, v) (*reinterpret_cast<::disback::Vec*>(p) = (v))
