//! What ONNX Runtime's CUDA and TensorRT providers are asked, recorded (tests/recorded_ort). The networks run on the CPU: that the
//! providers do what they are asked is for a device to show.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use disback::runtime::{self, Dim, EngineOptions, ValueInfo};
use disback::tensor::DType;

use crate::recorded_ort::{self, Record};
use crate::{BINARY, stand_in, support};

/// A student of the digits with a free batch, and one with the batch 4.
fn students() -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        let dir = support::folder("recorded-students");
        let teacher = super::example("digits/teacher.onnx");
        let few = "--device cpu --threads 1 --batch 2 --degrade-steps 1 --updates 1 --set degrade.nodes=1 --set log.samples=0 --quiet";
        support::ok(&dir, &format!("distill {teacher} -o run {few}"));
        std::fs::copy(dir.join("run/student.onnx"), dir.join("free.onnx")).unwrap();
        support::ok(&dir, "export free.onnx -o fixed.onnx --batch 4");
        dir
    })
}

/// A folder with both.
fn folder(name: &str) -> PathBuf {
    let dir = support::folder(name);
    for student in ["free.onnx", "fixed.onnx"] {
        std::fs::copy(students().join(student), dir.join(student)).unwrap();
    }
    dir
}

fn inputs(student: &str) -> Vec<ValueInfo> {
    runtime::open(&students().join(student), &EngineOptions::default()).unwrap().inputs().to_vec()
}

/// Runs `disback` in a folder with the recorded library: exit code, output, errors, and what the library was asked.
fn ask(dir: &Path, args: &str, vars: &[(&str, &str)]) -> (Option<i32>, String, String, Record) {
    let file = dir.join("asked.txt");
    let _ = std::fs::remove_file(&file);
    let mut command = stand_in::under(Path::new(BINARY), &dir.join("report.json"));
    command.env("ORT_DYLIB_PATH", recorded_ort::library()).env("RECORDED_ORT", &file);
    let out = command.args(args.split_whitespace()).envs(vars.iter().copied()).current_dir(dir).output().unwrap();
    let [said, errors] = [out.stdout, out.stderr].map(|t| String::from_utf8_lossy(&t).into_owned());
    assert!(!errors.contains("panicked"), "{args}: {errors}");
    (out.status.code(), said, errors, Record::read(&file))
}

/// [`ask`], which must succeed with nothing that a provider would refuse.
fn asked(dir: &Path, student: &str, args: &str) -> Record {
    let (code, said, errors, record) = ask(dir, args, &[]);
    assert_eq!(code, Some(0), "{args}: {said}{errors}");
    assert_eq!(record.faults(&inputs(student)), [""; 0], "{args}");
    record
}

#[test]
fn providers_know_what_they_are_asked() {
    let dir = &folder("recorded-options");
    support::ok(dir, "sample free.onnx -n 6 --batch 4 --seed 3 -o cpu.npy");
    let want = std::fs::read(dir.join("cpu.npy")).unwrap();
    let sample = "sample free.onnx -n 6 --batch 4 --seed 3 -o out.npy";
    let run = |args: &str| {
        let record = asked(dir, "free.onnx", &format!("{sample} {args}"));
        assert!(std::fs::read(dir.join("out.npy")).unwrap() == want, "{args}");
        record
    };
    let cuda = run("--provider cuda --gpu 1").providers();
    assert_eq!((cuda.len(), cuda[0].0.as_str(), cuda[0].1["device_id"].as_str()), (1, "CUDA", "1"));
    assert_eq!(cuda[0].1["enable_cuda_graph"], "false");

    let all = "--provider tensorrt --gpu 1 --profile 1,3,8 --trt-fp16 --trt-bf16 --cache cache --ep-context cache/context.onnx";
    let [(first, options), (second, cuda)] = run(all).providers().try_into().unwrap();
    assert_eq!((first.as_str(), second.as_str()), ("Tensorrt", "CUDA"), "what TensorRT does not take is CUDA's");
    assert_eq!((options["device_id"].as_str(), cuda["device_id"].as_str()), ("1", "1"));
    for flag in ["fp16_enable", "bf16_enable", "layer_norm_fp32_fallback", "dump_ep_context_model"] {
        assert_eq!(options[&format!("trt_{flag}")], "1", "{flag}");
    }
    assert_eq!(options["trt_profile_max_shapes"], "noise:8x1x8x8,labels:8");
    // Without --profile, by the calls that the command will make.
    let options = &run("--provider tensorrt").providers()[0].1;
    assert_eq!(options["trt_profile_opt_shapes"], "noise:4x1x8x8,labels:4");
    // What has no free dimension needs none.
    let fixed = asked(dir, "fixed.onnx", "sample fixed.onnx -n 4 --batch 4 -o out.npy --provider tensorrt");
    assert!(!fixed.providers()[0].1.keys().any(|k| k.contains("profile")));
}

/// IoBinding: inputs in the shapes of the call, outputs on the provider's device.
#[test]
fn bound_calls_name_their_device_and_shapes() {
    let dir = &folder("recorded-bound");
    let record = asked(dir, "free.onnx", "bench free.onnx --batch 2,3 --seconds 0.01 --provider tensorrt --gpu 1");
    let options = &record.providers()[0].1;
    assert_eq!(options["trt_profile_opt_shapes"], "noise:3x1x8x8,labels:3");
    let bound = |r: &Record, name: &str| -> Vec<String> {
        r.all("bound").iter().filter(|l| l[0] == name).map(|l| l[1].to_owned()).collect()
    };
    for (input, shapes) in [("noise", ["2x1x8x8", "3x1x8x8"]), ("labels", ["2", "3"])] {
        assert!(shapes.iter().all(|s| bound(&record, input).iter().any(|b| b == s)), "{:?}", bound(&record, input));
    }
    let places = record.all("output");
    assert!(!places.is_empty() && places.iter().all(|l| l[..] == ["sample", "Cuda:1"]), "{places:?}");
    // Recorded as a CUDA graph: inputs are copied to the device once, and outputs stay there until they are asked for.
    for (provider, option, on) in [("cuda", "enable_cuda_graph", "true"), ("tensorrt", "trt_cuda_graph_enable", "1")] {
        let args = format!("sample fixed.onnx -n 4 --batch 4 -o out.npy --provider {provider} --gpu 1 --cuda-graph");
        let record = asked(dir, "fixed.onnx", &args);
        assert_eq!(record.providers()[0].1[option], on);
        assert_eq!(bound(&record, "noise"), ["4x1x8x8"], "{provider}: bound once");
        let outputs = record.all("output");
        assert!(outputs.iter().any(|l| l[..] == ["sample", "Cuda:1"]), "{provider}: {outputs:?}");
    }
}

/// Engines are for one device, driver, library and student, and their folder is where the provider was told that it is.
#[test]
fn engines_are_kept_for_what_they_were_built_for() {
    let dir = &folder("recorded-engines");
    let sample = "sample free.onnx -n 2 --batch 2 -o out.npy --provider tensorrt";
    asked(dir, "free.onnx", &format!("{sample} --cache engines"));
    asked(dir, "free.onnx", &format!("{sample} --cache engines"));
    let list = dir.join("engines/disback-cache.json");
    let read = || serde_json::from_slice::<serde_json::Value>(&std::fs::read(&list).unwrap()).unwrap();
    // (There is no /proc/driver/nvidia here: the driver's library says it.)
    assert_eq!((&read()["stamp"]["device"], &read()["stamp"]["driver"]), (&"Stand-in device".into(), &"600.00".into()));
    assert_eq!(read()["files"].as_object().unwrap().len(), 1);
    let refused = |args: &str, vars: &[(&str, &str)], says: &str| {
        let (code, _, errors, record) = ask(dir, &format!("{sample} {args}"), vars);
        assert!(code == Some(1) || code == Some(2), "{code:?} {errors}");
        assert!(errors.contains(says), "{errors}");
        assert_eq!(record.all("session").len(), 0, "refused before a session is made");
    };
    refused("--cache engines", &[("STAND_IN_CUDA_DRIVER", "610.10")], "another driver (600.00, this is 610.10)");
    refused("--cache engines", &[("STAND_IN_CUDA_DEVICES", "0")], "another device (Stand-in device, this is none)");
    // A model that carries its engine has the cache beside it, by a relative path.
    refused("--cache engines --ep-context elsewhere/context.onnx", &[], "--cache");
    let both = format!("{sample} --cache both/engines --ep-context {}", dir.join("both/context.onnx").display());
    let record = asked(dir, "free.onnx", &both);
    assert_eq!(record.providers()[0].1["trt_engine_cache_path"], "engines");
    let list = std::fs::read_to_string(dir.join("both/engines/disback-cache.json")).unwrap();
    assert!(list.contains(".engine\""), "the engine is not where it was looked for: {list}");
    let engine = dir.join("engines/TensorrtExecutionProvider_TRTKernel_graph_0_sm90.engine");
    std::fs::write(engine, "an engin").unwrap();
    refused("--cache engines", &[], "is corrupt");
}

/// ONNX Runtime gives to the CPU what a provider does not take, and goes on where one cannot be made ready: neither in silence.
#[test]
fn nothing_falls_back_in_silence() {
    let dir = &folder("recorded-fallback");
    let sample = "sample free.onnx -n 2 --batch 2 -o refused.npy";
    for provider in ["cuda", "tensorrt"] {
        let says = format!("would run on cpu instead of {provider}");
        let host = [("RECORDED_ORT_HOST", "Conv,FusedConv")];
        let (code, _, errors, _) = ask(dir, &format!("{sample} --provider {provider}"), &host);
        assert!(code == Some(1) && errors.contains(&says) && errors.contains("--strict=false"), "{code:?} {errors}");
        let (code, _, errors, _) = ask(dir, &format!("{sample} --provider {provider} --strict=false"), &host);
        assert_eq!(code, Some(0), "{errors}");
        std::fs::remove_file(dir.join("refused.npy")).unwrap();
        let missing = [("RECORDED_ORT_MISSING", "libcublasLt.so.13")];
        let (code, _, errors, record) = ask(dir, &format!("{sample} --provider {provider} --strict=false"), &missing);
        assert!(code == Some(1) && errors.contains("built for CUDA 13"), "{code:?} {errors}");
        assert!(record.all("session").is_empty() && !dir.join("refused.npy").exists(), "it went on without {provider}");
    }
}

/// The checks above find what they look for.
#[test]
fn wrong_requests_are_found() {
    let free = |n: &str| Dim::Symbol(n.into());
    let input = |name: &str, shape: Vec<Dim>| ValueInfo { name: name.into(), dtype: DType::F32, shape };
    let inputs = [input("x", vec![free("n"), Dim::Fixed(3)]), input("y", vec![free("n"), free("m")])];
    let tensorrt = |more: &[&str]| {
        let mut text = "provider\tTensorrtExecutionProvider\n".to_owned();
        let full = ["min_shapes\tx:1x3,y:1x2", "opt_shapes\tx:2x3,y:2x2", "max_shapes\tx:4x3,y:4x5"];
        for option in full.map(|f| format!("trt_profile_{f}")).iter().map(String::as_str).chain(more.iter().copied()) {
            text += &format!("option\tTensorrtExecutionProvider\t{option}\n");
        }
        text
    };
    assert_eq!(Record::of(&tensorrt(&["trt_fp16_enable\t1"])).faults(&inputs), [""; 0]);
    let found = |text: &str, says: &str| {
        let faults = Record::of(text).faults(&inputs);
        assert!(faults.iter().any(|f| f.contains(says)), "{says}: {faults:?}");
    };
    found(&tensorrt(&["trt_fp16_enabled\t1"]), "Tensorrt knows no option trt_fp16_enabled");
    found(&tensorrt(&["trt_fp16_enable\tyes"]), "expected flag");
    found(&tensorrt(&["trt_profile_opt_shapes\tx:2x3"]), "no profile has input y");
    found(&tensorrt(&["trt_profile_min_shapes\tx:1x3,y:1"]), "y has 2 dimensions");
    found(&tensorrt(&["trt_profile_opt_shapes\tx:2x3,y:2x9"]), "dimension 1 of y");
    found(&tensorrt(&["trt_profile_max_shapes\tx:4x2,y:4x5"]), "dimension 1 of x");
    found(&tensorrt(&["trt_profile_max_shapes\tx:4x3;y:4x5"]), "no profile has input x");
    found(&tensorrt(&["trt_profile_max_shapes\tx=4x3,y=4x5"]), "expected shapes");
    found(&format!("{}fed\ty\t4x6\n", tensorrt(&[])), "outside of its profile");
    let cuda = "provider\tCUDAExecutionProvider\noption\tCUDAExecutionProvider\tcuda_graph_enable\t1\n";
    found(cuda, "CUDA knows no option cuda_graph_enable");
}
