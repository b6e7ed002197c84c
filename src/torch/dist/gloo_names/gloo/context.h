// The names of gloo that libtorch's ProcessGroupGloo.hpp mentions. PyTorch's wheel has gloo inside libtorch_cpu.so and not its
// headers; nothing of gloo is called or laid out from here.
#pragma once

#include <chrono>
#include <memory>
#include <string>
#include <vector>

namespace gloo {

struct Context {
  void setTimeout(std::chrono::milliseconds);
};

namespace rendezvous {
struct Store {
  virtual ~Store() = default;
  virtual void set(const std::string&, const std::vector<char>&) = 0;
  virtual std::vector<char> get(const std::string&) = 0;
  virtual void wait(const std::vector<std::string>&) = 0;
  virtual void wait(const std::vector<std::string>&, const std::chrono::milliseconds&) = 0;
};
}  // namespace rendezvous

namespace transport {
struct Device {
  virtual ~Device();
};
struct UnboundBuffer {
  virtual ~UnboundBuffer();
};
}  // namespace transport

}  // namespace gloo
