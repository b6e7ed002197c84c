//! cargo run --release --example consumers -- student.onnx noise.f32 samples.f32: raw f32 noise in, raw f32 images out
//! (the `ort` crate; ORT_DYLIB_PATH says where libonnxruntime is).

use ort::{inputs, session::Session, value::Tensor};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let environment = ort::init_from(std::env::var("ORT_DYLIB_PATH")?)?.build()?;
    let mut student = Session::builder(&environment)?.commit_from_file(&args[0])?;
    let noise: Vec<f32> =
        std::fs::read(&args[1])?.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
    let n = noise.len() / 64;
    let labels: Vec<i64> = (0..n as i64).map(|k| k % 10).collect();
    let noise = Tensor::from_array(([n, 1, 8, 8], noise))?;
    let outputs = student.run(inputs!["noise" => noise, "labels" => Tensor::from_array(([n], labels))?])?;
    let (_, images) = outputs["sample"].try_extract_tensor::<f32>()?;
    Ok(std::fs::write(&args[2], images.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>())?)
}
