// A recorded ONNX Runtime: the real library, which in addition says that it has the CUDA and TensorRT providers. What they are asked is
// written to $RECORDED_ORT, one line a call with its words by tabs; the network itself runs on the CPU. Each call's place in the
// table of functions comes from the types of `ort-sys`, by -D (tests/support/recorded_ort.rs).
//
//   $RECORDED_ORT_HOST     operators, by commas, that the providers do not take
//   $RECORDED_ORT_MISSING  a library without which no provider can be made ready
#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <vector>

namespace {

using Status = void*;
using Values = std::map<std::string, std::string>;

struct Provider {
  const char* name;
  Values values;
};

struct Base {
  const void* (*api)(uint32_t);
  const char* (*version)();
};

const Base* real_base;
// The real library's functions, and those that are handed out.
void* const* functions;
void* table[FUNCTIONS];
std::mutex guard;
// What was appended to session options; the first provider of a session; the place that memory was asked for.
std::map<const void*, std::vector<Provider>> appended;
std::map<const void*, const char*> first;
std::map<const void*, std::string> places;
thread_local const char* shown = nullptr;

template <typename... Arguments>
Status real(int at, Arguments... arguments) {
  return reinterpret_cast<Status (*)(Arguments...)>(functions[at])(arguments...);
}

void say(const std::vector<std::string>& words) {
  const char* path = std::getenv("RECORDED_ORT");
  if (!path) return;
  std::string line;
  for (const auto& w : words) line += (line.empty() ? "" : "\t") + w;
  std::lock_guard<std::mutex> held(guard);
  if (FILE* f = std::fopen(path, "a")) {
    std::fprintf(f, "%s\n", line.c_str());
    std::fclose(f);
  }
}

Status failed(const std::string& text) { return real(AT_CreateStatus, 1, text.c_str()); }

const char* const NAMES[] = {"TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"};

Status available(char*** list, int* count) {
  *count = 3;
  *list = static_cast<char**>(std::malloc(3 * sizeof(char*)));
  for (int k = 0; k < 3; ++k) (*list)[k] = strdup(NAMES[k]);
  return nullptr;
}

Status release_available(char** list, int count) {
  for (int k = 0; k < count; ++k) std::free(list[k]);
  std::free(list);
  return nullptr;
}

Status create_cuda(void** out) { return *out = new Provider{NAMES[1], {}}, nullptr; }
Status create_tensorrt(void** out) { return *out = new Provider{NAMES[0], {}}, nullptr; }
void release_provider(Provider* p) { delete p; }

Status update(Provider* p, const char* const* keys, const char* const* values, size_t count) {
  for (size_t k = 0; k < count; ++k) p->values[keys[k]] = values[k];
  return nullptr;
}

Status append(void* options, const Provider* p) {
  say({"provider", p->name});
  for (const auto& [key, value] : p->values) say({"option", p->name, key, value});
  if (const char* library = std::getenv("RECORDED_ORT_MISSING")) {
    return failed("Failed to load library libonnxruntime_providers.so with error: " + std::string(library) +
                  ": cannot open shared object file: No such file or directory");
  }
  std::lock_guard<std::mutex> held(guard);
  appended[options].push_back(*p);
  return nullptr;
}

Status clone(const void* from, void** out) {
  Status s = real(AT_CloneSessionOptions, from, out);
  std::lock_guard<std::mutex> held(guard);
  if (!s && appended.count(from)) appended[*out] = appended[from];
  return s;
}

void release_options(void* options) {
  {
    std::lock_guard<std::mutex> held(guard);
    appended.erase(options);
  }
  real(AT_ReleaseSessionOptions, options);
}

void write(const std::string& path, const char* text) {
  say({"wrote", path});
  if (FILE* f = std::fopen(path.c_str(), "w")) {
    std::fputs(text, f);
    std::fclose(f);
  }
}

// What TensorRT leaves: an engine in its cache, and a model that carries it. With the latter the cache lies beside it: an absolute
// path of the cache is told off, and a relative one is taken from the model's folder.
void leave(Values& v) {
  std::string folder = v["trt_engine_cache_path"];
  if (v["trt_dump_ep_context_model"] == "1") {
    const std::string file = v["trt_ep_context_file_path"];
    if (v["trt_engine_cache_enable"] == "1" && folder[0] == '/') say({"error", "an absolute trt_engine_cache_path"});
    if (folder[0] != '/') folder = file.substr(0, file.find_last_of('/') + 1) + folder;
    write(file, "a model with its engine");
  }
  if (v["trt_engine_cache_enable"] == "1") write(folder + "/TensorrtExecutionProvider_TRTKernel_graph_0_sm90.engine", "an engine");
}

void opened(const void* options, void* session) {
  std::vector<Provider> all;
  {
    std::lock_guard<std::mutex> held(guard);
    all = appended[options];
    first[session] = all.empty() ? nullptr : all[0].name;
  }
  if (!all.empty()) say({"session", all[0].name});
  if (!all.empty() && all[0].name == NAMES[0]) leave(all[0].values);
}

Status open_file(const void* env, const void* path, const void* options, void** out) {
  Status s = real(AT_CreateSession, env, path, options, out);
  if (!s) opened(options, *out);
  return s;
}

Status open_bytes(const void* env, const void* data, size_t length, const void* options, void** out) {
  Status s = real(AT_CreateSessionFromArray, env, data, length, options, out);
  if (!s) opened(options, *out);
  return s;
}

// A device's memory is the CPU's here.
Status memory(const char* name, int allocator, int id, int kind, void** out) {
  const bool device = !std::strcmp(name, "Cuda");
  Status s = real(AT_CreateMemoryInfo, device ? "Cpu" : name, allocator, device ? 0 : id, kind, out);
  std::lock_guard<std::mutex> held(guard);
  if (!s) places[*out] = std::string(name) + ":" + std::to_string(id);
  return s;
}

std::string shape(const void* value) {
  void* info = nullptr;
  if (real(AT_GetTensorTypeAndShape, value, &info)) return "?";
  size_t count = 0;
  real(AT_GetDimensionsCount, info, &count);
  std::vector<int64_t> sizes(count);
  real(AT_GetDimensions, info, sizes.data(), count);
  real(AT_ReleaseTensorTypeAndShapeInfo, info);
  std::string text;
  for (auto n : sizes) text += (text.empty() ? "" : "x") + std::to_string(n);
  return text;
}

Status bind_input(void* binding, const char* name, const void* value) {
  say({"bound", name, shape(value)});
  return real(AT_BindInput, binding, name, value);
}

Status bind_output(void* binding, const char* name, const void* place) {
  std::string where;
  {
    std::lock_guard<std::mutex> held(guard);
    where = places[place];
  }
  say({"output", name, where});
  return real(AT_BindOutputToDevice, binding, name, place);
}

Status run(void* session, const void* options, const char* const* names, const void* const* values, size_t count,
           const char* const* outputs, size_t output_count, void** made) {
  for (size_t k = 0; k < count; ++k) say({"fed", names[k], shape(values[k])});
  return real(AT_Run, session, options, names, values, count, outputs, output_count, made);
}

Status assignment(const void* session, const void* parts, size_t* count) {
  {
    std::lock_guard<std::mutex> held(guard);
    shown = first[session];
  }
  return real(AT_Session_GetEpGraphAssignmentInfo, session, parts, count);
}

// Everything is the session's first provider's, but for $RECORDED_ORT_HOST.
Status assigned_to(const void* part, const char** out) {
  Status s = real(AT_EpAssignedSubgraph_GetEpName, part, out);
  const char* list = std::getenv("RECORDED_ORT_HOST");
  const std::string host = "," + std::string(list ? list : "") + ",";
  const void* const* nodes = nullptr;
  size_t count = 0;
  if (s || !shown) return s;
  if ((s = real(AT_EpAssignedSubgraph_GetNodes, part, &nodes, &count))) return s;
  for (size_t k = 0; k < count; ++k) {
    const char* type = nullptr;
    if ((s = real(AT_EpAssignedNode_GetOperatorType, nodes[k], &type))) return s;
    if (host.find("," + std::string(type) + ",") != std::string::npos) return nullptr;
  }
  *out = shown;
  return nullptr;
}

void put(int at, void* function) { table[at] = function; }

const void* api(uint32_t version) {
  if (functions) return table;
  functions = static_cast<void* const*>(real_base->api(version));
  if (!functions) return nullptr;
  std::memcpy(table, functions, sizeof table);
#define PUT(name, function) put(AT_##name, reinterpret_cast<void*>(&function))
  PUT(GetAvailableProviders, available);
  PUT(ReleaseAvailableProviders, release_available);
  PUT(CreateCUDAProviderOptions, create_cuda);
  PUT(UpdateCUDAProviderOptions, update);
  PUT(ReleaseCUDAProviderOptions, release_provider);
  PUT(SessionOptionsAppendExecutionProvider_CUDA_V2, append);
  PUT(CreateTensorRTProviderOptions, create_tensorrt);
  PUT(UpdateTensorRTProviderOptions, update);
  PUT(ReleaseTensorRTProviderOptions, release_provider);
  PUT(SessionOptionsAppendExecutionProvider_TensorRT_V2, append);
  PUT(CloneSessionOptions, clone);
  PUT(ReleaseSessionOptions, release_options);
  PUT(CreateSession, open_file);
  PUT(CreateSessionFromArray, open_bytes);
  PUT(CreateMemoryInfo, memory);
  PUT(BindInput, bind_input);
  PUT(BindOutputToDevice, bind_output);
  PUT(Run, run);
  PUT(Session_GetEpGraphAssignmentInfo, assignment);
  PUT(EpAssignedSubgraph_GetEpName, assigned_to);
  return table;
}

const char* version() { return real_base->version(); }

}  // namespace

extern "C" const Base* OrtGetApiBase() {
  static const Base base{api, version};
  if (!real_base) {
    void* library = dlopen(REAL, RTLD_NOW | RTLD_LOCAL);
    void* symbol = library ? dlsym(library, "OrtGetApiBase") : nullptr;
    if (!symbol) {
      std::fprintf(stderr, "recorded_ort: %s\n", dlerror());
      std::abort();
    }
    real_base = reinterpret_cast<const Base* (*)()>(symbol)();
  }
  return &base;
}
