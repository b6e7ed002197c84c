// What the C++ files here share: how an exception becomes a message at the border to Rust.

#pragma once

#include <c10/util/Exception.h>

#include <cstring>
#include <exception>

namespace disback {

// nullptr, or what went wrong as a malloc'ed message for `disback_free`. Exceptions never cross the border.
template <class F>
char* guarded(F&& body) {
  try {
    body();
    return nullptr;
  } catch (const c10::Error& e) {
    return strdup(e.what_without_backtrace());
  } catch (const std::exception& e) {
    return strdup(e.what());
  } catch (...) {
    return strdup("unknown C++ exception");
  }
}

}  // namespace disback
