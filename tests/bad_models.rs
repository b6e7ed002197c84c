//! Files that are not what they should be: one clear error each, exit code 1, nothing left behind, never a panic.
#![cfg(feature = "train")]

mod support;

use std::path::{Path, PathBuf};

use disback::onnx::tensor_proto::DataLocation;
use disback::onnx::{ModelProto, StringStringEntryProto, TensorProto};
use prost::Message;

fn teacher() -> Vec<u8> {
    std::fs::read(support::root().join("examples/digits/teacher.onnx")).unwrap()
}

fn write(dir: &Path, name: &str, bytes: &[u8]) -> PathBuf {
    let path = dir.join(name);
    std::fs::write(&path, bytes).unwrap();
    path
}

/// Edits the digits teacher.
fn edited(dir: &Path, name: &str, edit: impl FnOnce(&mut ModelProto)) -> PathBuf {
    let mut model = ModelProto::decode(teacher().as_slice()).unwrap();
    edit(&mut model);
    write(dir, name, &model.encode_to_vec())
}

fn initializer<'a>(model: &'a mut ModelProto, name: &str) -> &'a mut TensorProto {
    let graph = model.graph.as_mut().unwrap();
    graph.initializer.iter_mut().find(|t| t.name() == name).unwrap()
}

fn external(t: &mut TensorProto, location: &str, length: usize) {
    let entry = |k: &str, v: String| StringStringEntryProto { key: Some(k.into()), value: Some(v) };
    t.raw_data = None;
    t.data_location = Some(DataLocation::External as i32);
    t.external_data = vec![entry("location", location.into()), entry("length", length.to_string())];
}

/// Runs `disback distill MODEL -o OUT` and `disback inspect MODEL`; both must fail alike.
fn refused(model: &Path, words: &[&str]) {
    let out = model.with_extension("run");
    for command in [
        vec!["distill", model.to_str().unwrap(), "-o", out.to_str().unwrap(), "--device", "cpu"],
        vec!["parity", model.to_str().unwrap()],
    ] {
        let done = support::disback().args(&command).output().unwrap();
        let error = String::from_utf8_lossy(&done.stderr);
        assert_eq!(done.status.code(), Some(1), "{command:?}: {error}");
        assert!(!error.contains("panicked"), "{error}");
        for word in words {
            assert!(error.contains(word), "`{word}` is not in: {error}");
        }
        assert!(!out.exists(), "{command:?} left {} behind", out.display());
    }
}

#[test]
fn files_that_are_no_model() {
    let dir = support::folder("bad-files");
    refused(
        &write(&dir, "text.onnx", b"this is not an ONNX model, it is a sentence"),
        &["text.onnx", "not an ONNX model"],
    );
    refused(&write(&dir, "empty.onnx", b""), &["empty.onnx", "empty"]);
    let whole = teacher();
    refused(&write(&dir, "cut.onnx", &whole[..whole.len() / 2]), &["cut.onnx", "cut short"]);
    refused(&dir.join("nowhere.onnx"), &["nowhere.onnx"]);
    refused(&dir, &["folder"]);
}

#[test]
fn external_data_that_is_missing_short_or_elsewhere() {
    let dir = support::folder("bad-external");
    let name = "unet.conv_in.weight";
    let size =
        initializer(&mut ModelProto::decode(teacher().as_slice()).unwrap(), name).raw_data.as_ref().unwrap().len();
    refused(
        &edited(&dir, "missing.onnx", |m| external(initializer(m, name), "weights.bin", size)),
        &["weights.bin", name],
    );
    write(&dir, "short.bin", &vec![0; size - 4]);
    refused(
        &edited(&dir, "short.onnx", |m| external(initializer(m, name), "short.bin", size)),
        &["short.bin", name, "cut short"],
    );
    write(dir.parent().unwrap(), "outside.bin", &vec![0; size]);
    let leaves = "leaves the model's folder";
    refused(
        &edited(&dir, "above.onnx", |m| external(initializer(m, name), "../outside.bin", size)),
        &["../outside.bin", leaves],
    );
    refused(
        &edited(&dir, "absolute.onnx", |m| external(initializer(m, name), "/etc/hostname", size)),
        &["/etc/hostname", leaves],
    );
    #[cfg(unix)]
    {
        let link = dir.join("link.bin");
        std::os::unix::fs::symlink(dir.parent().unwrap().join("outside.bin"), link).unwrap();
        refused(
            &edited(&dir, "link.onnx", |m| external(initializer(m, name), "link.bin", size)),
            &["link.bin", leaves],
        );
    }
}

#[test]
fn external_data_beside_the_model_is_the_same_model() {
    let dir = support::folder("good-external");
    let name = "unet.conv_in.weight";
    let model = edited(&dir, "external.onnx", |m| {
        let t = initializer(m, name);
        let bytes = t.raw_data.clone().unwrap();
        std::fs::write(dir.join("weights.bin"), &bytes).unwrap();
        external(t, "weights.bin", bytes.len());
    });
    let done = support::disback().args(["parity", model.to_str().unwrap(), "--json"]).output().unwrap();
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
}

#[test]
fn graphs_that_break_the_rules() {
    let dir = support::folder("bad-graphs");
    // Every node that cannot be imported is named, not only the first.
    let path = edited(&dir, "unknown.onnx", |m| {
        let nodes = &mut m.graph.as_mut().unwrap().node;
        let convs: Vec<usize> = (0..nodes.len()).filter(|&i| nodes[i].op_type() == "Conv").take(2).collect();
        for (k, i) in convs.into_iter().enumerate() {
            nodes[i].op_type = Some("Frobnicate".into());
            nodes[i].name = Some(format!("odd_{k}"));
        }
    });
    refused(&path, &["2 nodes", "Frobnicate", "odd_0", "odd_1", "help:"]);
    let path = edited(&dir, "twice.onnx", |m| {
        let graph = m.graph.as_mut().unwrap();
        let again = graph.node[0].output[0].clone();
        graph.node[1].output[0] = again;
    });
    refused(&path, &["defined twice"]);
    let path = edited(&dir, "unmade.onnx", |m| m.graph.as_mut().unwrap().node[3].input[0] = "from_nowhere".into());
    refused(&path, &["from_nowhere", "never made"]);
    let path = edited(&dir, "cycle.onnx", |m| {
        let nodes = &mut m.graph.as_mut().unwrap().node;
        let last = nodes.last().unwrap().output[0].clone();
        nodes[0].input[0] = last;
    });
    refused(&path, &["cycle"]);
    let path = edited(&dir, "huge.onnx", |m| initializer(m, "unet.conv_in.weight").dims = vec![1 << 60, 1 << 60]);
    refused(&path, &["unet.conv_in.weight", "larger than memory"]);
    let path = edited(&dir, "bytes.onnx", |m| initializer(m, "unet.conv_in.weight").dims = vec![3, 3]);
    refused(&path, &["unet.conv_in.weight", "bytes of data"]);
    let path = edited(&dir, "nan.onnx", |m| {
        let t = initializer(m, "unet.conv_in.weight");
        let mut bytes = t.raw_data.clone().unwrap().to_vec();
        bytes[..4].copy_from_slice(&f32::NAN.to_le_bytes());
        t.raw_data = Some(bytes.into());
    });
    refused(&path, &["unet.conv_in.weight", "NaN"]);
    let path = edited(&dir, "kind.onnx", |m| {
        let nodes = &mut m.graph.as_mut().unwrap().node;
        let conv = nodes.iter_mut().find(|n| n.op_type() == "Conv").unwrap();
        let group = conv.attribute.iter_mut().find(|a| a.name() == "group").unwrap();
        (group.r#type, group.i, group.f) = (Some(1), None, Some(1.0));
    });
    refused(&path, &["group", "float", "integer"]);
}

/// `Reshape(x, Cast(MatMul(sigma, weight)))`: the shape depends on what is trained.
#[test]
fn a_shape_that_cannot_be_resolved() {
    use disback::graph::edit::{int_attribute, node, value_info};
    use disback::graph::{Model, tensors};
    use disback::onnx::{GraphProto, OperatorSetIdProto};
    use disback::tensor::{DType, HostTensor};
    use disback::torch::Network;

    let mut cast = node("Cast", &["sizes"], "shape");
    cast.attribute.push(int_attribute("to", 7));
    let mut reshape = node("Reshape", &["x", "shape"], "denoised");
    reshape.name = Some("turn".into());
    let weight = HostTensor::new(&[2, 2], &[1f32, 2.0, 3.0, 4.0]).unwrap();
    let graph = GraphProto {
        name: Some("g".into()),
        input: vec![value_info("x", DType::F32, &[Err("n")]), value_info("sigma", DType::F32, &[Ok(2)])],
        initializer: vec![tensors::to_proto("weight", &weight)],
        node: vec![node("MatMul", &["sigma", "weight"], "sizes"), cast, reshape],
        output: vec![value_info("denoised", DType::F32, &[Err("a"), Err("b")])],
        ..GraphProto::default()
    };
    let model = ModelProto {
        ir_version: Some(8),
        opset_import: vec![OperatorSetIdProto { domain: None, version: Some(18) }],
        graph: Some(graph),
        ..ModelProto::default()
    };
    let error =
        Network::import(Model::from_proto(model), &Default::default(), tch::Device::Cpu).unwrap_err().to_string();
    for word in ["Reshape node `turn`", "depends on the data", "parameter `weight`", "help:"] {
        assert!(error.contains(word), "`{word}` is not in: {error}");
    }
}

#[test]
fn what_a_terminal_would_obey_is_escaped() {
    let dir = tempfile::tempdir().unwrap();
    let path = edited(dir.path(), "m.onnx", |m| {
        m.producer_name = Some("\x1b]0;owned\x07\nparameters: none".into());
        let graph = m.graph.as_mut().unwrap();
        graph.node[0].name = Some("a\x1b[2J\r\u{9b}31m\n  help: forged`\nerror: forged".into());
        graph.node[0].op_type = Some("Evil\x1b[8m".into());
    });
    for command in ["inspect", "parity"] {
        let done = support::disback().arg(command).arg(&path).output().unwrap();
        let all = [done.stdout, done.stderr].concat();
        let text = String::from_utf8_lossy(&all);
        assert!(text.contains("Evil\\u{1b}[8m"), "{command}: {text}");
        assert!(!text.contains(['\x1b', '\x07', '\r', '\u{9b}']), "{command}: {text:?}");
        assert!(!text.contains("\nparameters: none"), "{command}: {text}");
        // A name looks like no line of ours.
        let forged =
            |l: &str| l.trim_start().starts_with("error: forged") || l.trim_start().starts_with("help: forged");
        assert!(!text.lines().any(forged), "{command}: {text}");
    }
}

#[cfg(unix)]
#[test]
fn pipes_and_devices_are_no_models() {
    let dir = tempfile::tempdir().unwrap();
    let fifo = dir.path().join("m.onnx");
    let name = std::ffi::CString::new(fifo.to_str().unwrap()).unwrap();
    // SAFETY: a C string that lives as long as the call.
    assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
    for command in ["inspect", "sample", "parity"] {
        for path in [fifo.as_path(), Path::new("/dev/zero")] {
            let mut call = support::disback();
            call.arg(command).arg(path);
            if command == "sample" {
                call.arg("-o").arg(dir.path().join("out.png"));
            }
            let done = call.output().unwrap();
            let error = String::from_utf8_lossy(&done.stderr);
            assert_eq!(done.status.code(), Some(1), "{command}: {error}");
            assert!(error.contains("regular file") || error.contains("no such file"), "{command}: {error}");
        }
    }
}
