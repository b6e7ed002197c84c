use super::testing::{features, student};
use super::*;

fn options(engine: EngineKind) -> EngineOptions {
    EngineOptions { engine, ..EngineOptions::default() }
}

/// Both engines of this build that can run here.
fn engines() -> Vec<EngineKind> {
    let mut all = vec![];
    #[cfg(feature = "ort")]
    if ort::library().is_ok() {
        all.push(EngineKind::Ort);
    }
    #[cfg(feature = "tract")]
    all.push(EngineKind::Tract);
    all
}

fn batch(n: usize) -> (HostTensor, HostTensor, Vec<f32>) {
    let noise = crate::noise::batch_noise(1, 0, n, 4);
    let labels: Vec<i64> = (0..n as i64).map(|k| k % 3).collect();
    let want = noise.iter().enumerate().map(|(k, x)| {
        let shift = [-0.5f32, 0.0, 0.5][labels[k / 4] as usize];
        (x * 0.5 + shift).clamp(-1.0, 1.0)
    });
    let want = want.collect();
    (HostTensor::new(&[n, 1, 2, 2], &noise).unwrap(), HostTensor::vec(&labels), want)
}

#[test]
fn both_engines_compute_the_graph_for_any_batch() {
    assert!(!engines().is_empty());
    for kind in engines() {
        let mut engine = open_bytes(&student("batch"), None, &options(kind)).unwrap();
        assert_eq!(engine.inputs()[0].to_string(), "noise f32[batch, 1, 2, 2]");
        assert_eq!(engine.outputs()[0].name, "sample");
        for n in [1, 3, 5] {
            let (noise, labels, want) = batch(n);
            let out = engine.run(&[("labels", &labels), ("noise", &noise)]).unwrap();
            assert_eq!(out[0].1.shape(), [n, 1, 2, 2], "{}", engine.name());
            for (got, want) in out[0].1.to_f32().iter().zip(&want) {
                assert!((got - want).abs() < 1e-6, "{}: {got} {want}", engine.name());
            }
        }
    }
}

#[test]
fn batches_are_split_and_joined() {
    let (noise, labels, want) = batch(7);
    for kind in engines() {
        for dim in ["batch", "4"] {
            let mut engine = open_bytes(&student(dim), None, &options(kind)).unwrap();
            for size in [1, 3, 7, 100] {
                let out = run_batched(engine.as_mut(), &[("noise", &noise), ("labels", &labels)], size).unwrap();
                assert_eq!(out[0].1.shape(), [7, 1, 2, 2]);
                for (got, want) in out[0].1.to_f32().iter().zip(&want) {
                    assert!((got - want).abs() < 1e-6, "{} batch {dim} pieces of {size}", engine.name());
                }
            }
        }
    }
}

#[test]
fn wrong_inputs_are_named() {
    let (noise, labels, _) = batch(2);
    for kind in engines() {
        let mut engine = open_bytes(&student("batch"), None, &options(kind)).unwrap();
        let mut error = |inputs: &[(&str, &HostTensor)]| engine.run(inputs).unwrap_err().to_string();
        assert!(error(&[("noise", &noise)]).contains("input `labels` is missing"));
        assert!(error(&[("noise", &noise), ("labels", &labels), ("x", &noise)]).contains("no input `x`"));
        let wrong = labels.cast(DType::I32);
        assert!(error(&[("noise", &noise), ("labels", &wrong)]).contains("labels i64[batch], given i32[2]"));
        let wrong = noise.reshaped(&[2, 1, 4, 1]).unwrap();
        assert!(error(&[("noise", &wrong), ("labels", &labels)]).contains("given f32[2, 1, 4, 1]"));
    }
}

#[test]
fn what_is_not_a_model_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let whole = features(&[1.0; 8]);
    for kind in engines() {
        for (name, bytes) in [("text.onnx", &b"hello world"[..]), ("cut.onnx", &whole[..whole.len() / 2])] {
            let path = dir.path().join(name);
            std::fs::write(&path, bytes).unwrap();
            let error = open(&path, &options(kind)).err().unwrap().to_string();
            assert!(error.contains(name), "{error}");
        }
        let error = open(Path::new("/nowhere/m.onnx"), &options(kind)).err().unwrap().to_string();
        assert!(error.contains("no such file"), "{error}");
    }
}

#[cfg(feature = "ort")]
#[test]
fn an_absent_provider_is_an_error() {
    if ort::library().is_err() {
        return;
    }
    let options = EngineOptions { provider: "no-such".into(), ..EngineOptions::default() };
    let error = open_bytes(&student("batch"), None, &options).err().unwrap();
    assert_eq!(error.exit_code(), 2);
    assert!(error.to_string().contains("no provider `no-such`; it has: "), "{error}");
}

#[cfg(feature = "tract")]
#[test]
fn tracts_version_is_the_one_built_in() {
    let manifest = include_str!("../../Cargo.toml");
    assert!(manifest.contains(&format!("tract-onnx = {{ version = \"={}\"", tract::VERSION)));
}

#[cfg(unix)]
#[test]
fn pipes_in_place_of_files_are_refused_by_every_engine() {
    use crate::onnx::{GraphProto, ModelProto, StringStringEntryProto, TensorProto};
    use prost::Message;
    let dir = tempfile::tempdir().unwrap();
    let fifo = dir.path().join("weights");
    let name = std::ffi::CString::new(fifo.to_str().unwrap()).unwrap();
    // SAFETY: a C string that lives as long as the call.
    assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
    let location = StringStringEntryProto { key: Some("location".into()), value: Some("weights".into()) };
    let tensor = TensorProto {
        name: Some("w".into()),
        dims: vec![1],
        data_type: Some(1),
        data_location: Some(1),
        external_data: vec![location],
        ..Default::default()
    };
    let model = ModelProto {
        graph: Some(GraphProto { initializer: vec![tensor], ..Default::default() }),
        ..Default::default()
    };
    let path = dir.path().join("m.onnx");
    std::fs::write(&path, model.encode_to_vec()).unwrap();
    for kind in engines() {
        for path in [&path, &fifo] {
            let e = open(path, &options(kind)).map(|_| ()).unwrap_err().to_string();
            assert!(e.contains("weights") && (e.contains("a pipe") || e.contains("no such file")), "{e}");
        }
    }
}
