// sample student.onnx noise.f32 samples.f32: raw f32 noise in, raw f32 images out (OpenVINO's C++ API).
#include <fstream>
#include <iterator>
#include <openvino/openvino.hpp>

int main(int, char** argv) {
    std::ifstream in(argv[2], std::ios::binary);
    std::vector<char> bytes{std::istreambuf_iterator<char>(in), {}};
    const size_t n = bytes.size() / sizeof(float) / 64;
    auto student = ov::Core().compile_model(argv[1], "CPU", ov::hint::inference_precision(ov::element::f32)).create_infer_request();
    student.set_tensor("noise", ov::Tensor(ov::element::f32, {n, 1, 8, 8}, bytes.data()));
    std::vector<int64_t> labels(n);
    for (size_t k = 0; k < n; ++k) labels[k] = k % 10;
    student.set_tensor("labels", ov::Tensor(ov::element::i64, {n}, labels.data()));
    student.infer();
    const ov::Tensor sample = student.get_tensor("sample");
    std::ofstream(argv[3], std::ios::binary).write(static_cast<const char*>(sample.data()), sample.get_byte_size());
}
