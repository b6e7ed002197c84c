// What is asked of the driver's library: one device, or as many as $STAND_IN_CUDA_DEVICES says; the driver is $STAND_IN_CUDA_DRIVER.
#include <cstdio>
#include <cstdlib>
extern "C" {
int nvmlInit_v2() { return 0; }
int nvmlShutdown() { return 0; }
int nvmlDeviceGetCount_v2(unsigned* n) {
  const char* t = std::getenv("STAND_IN_CUDA_DEVICES");
  *n = t ? std::atoi(t) : 1;
  return 0;
}
int nvmlDeviceGetHandleByIndex_v2(unsigned i, void** device) {
  *device = reinterpret_cast<void*>(static_cast<unsigned long>(i) + 1);
  return 0;
}
int nvmlDeviceGetName(void*, char* name, unsigned length) { return std::snprintf(name, length, "Stand-in device") < 0; }
int nvmlSystemGetDriverVersion(char* version, unsigned length) {
  const char* t = std::getenv("STAND_IN_CUDA_DRIVER");
  return std::snprintf(version, length, "%s", t ? t : "600.00") < 0;
}
}
