//! Several students behind one address.

use serde_json::{Value, json};

use super::*;

/// A server of a student and of another one, which has a condition.
fn two() -> Server {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("student.onnx"), testing::student("batch")).unwrap();
    std::fs::write(dir.path().join("rows.onnx"), with_rows()).unwrap();
    Server::in_folder(dir, &["student.onnx", "second=rows.onnx"], &[])
}

fn value(answer: &Answer) -> Value {
    serde_json::from_slice(&answer.body).unwrap()
}

#[test]
fn each_model_answers_by_its_name() {
    let server = two();
    let expected = server.expected(&["-n", "3", "--seed", "5"]);
    let got = server.get("/sample?model=student&seed=5&n=3&format=npy");
    assert!(close(&got.values(), &expected));
    let one = json!({ "parameters": { "seed": 5, "n": 3 } }).to_string();
    let inferred = request(&server.address, "POST", "/v2/models/student/infer", one.as_bytes());
    let output = &value(&inferred)["outputs"][0]["data"];
    let numbers: Vec<f32> = output.as_array().unwrap().iter().map(|v| v.as_f64().unwrap() as f32).collect();
    assert!(close(&numbers, &expected));
    // The other one wants rows for its condition.
    let missing = server.get("/sample?model=second&format=npy");
    assert!(missing.status == 400 && missing.error().contains("wants rows for its condition"), "{missing:?}");

    for (path, status, says) in [
        ("/sample?format=npy", 400, "several models are served: model=NAME says which, there are `student`, `second`"),
        ("/sample?model=third", 404, "no model `third`: there are `student`, `second`"),
        ("/v2/models/third", 404, "no model `third`"),
        ("/v2/models/second/versions/2", 404, "no version 2 of `second`"),
    ] {
        let answer = server.get(path);
        assert!(answer.status == status && answer.error().contains(says), "{path}: {answer:?}");
    }
    let health = value(&server.get("/health"));
    assert_eq!(health["models"][0]["name"], "student");
    assert_eq!(health["models"][1]["name"], "second");
    assert!(health["shape"].is_null(), "of several models each has a shape of its own: {health}");
    let index = value(&request(&server.address, "POST", "/v2/repository/index", b"{}"));
    assert_eq!(index[1], json!({ "name": "second", "version": "1", "state": "READY" }));
    assert_eq!(value(&server.get("/v2/models/second"))["name"], "second");

    let metrics = String::from_utf8(server.get("/metrics").body).unwrap();
    for line in [
        "disback_images_total{model=\"student\"} 6",
        "disback_images_total{model=\"second\"} 0",
        "# TYPE process_cpu_seconds counter",
        "# TYPE process_resident_memory_bytes gauge",
    ] {
        assert!(metrics.lines().any(|l| l == line), "{line}\n{metrics}");
    }
    let api = value(&server.get("/openapi.json"));
    assert_eq!(
        api["paths"]["/v2/models/{name}/infer"]["post"]["parameters"][0]["schema"]["enum"],
        json!(["student", "second"])
    );
}

#[test]
fn refusals_are_counted_by_their_reason() {
    let server = Server::start(&["--max-body", "1", "--host-name", "only.example"]);
    let long = request(&server.address, "POST", "/sample", &[b' '; 4000]);
    assert_eq!(long.status, 413);
    let mut stream = TcpStream::connect(&server.address).unwrap();
    stream.write_all(b"GET /sample HTTP/1.1\r\nHost: other.example\r\nConnection: close\r\n\r\n").unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    assert!(text.starts_with("HTTP/1.1 421"), "{text}");
    let metrics = String::from_utf8(server.get("/metrics").body).unwrap();
    for reason in ["body_size", "host"] {
        let line = format!("disback_rejected_requests_total{{reason=\"{reason}\"}} 1");
        assert!(metrics.lines().any(|l| l == line), "{line}\n{metrics}");
    }
}

#[test]
fn names_that_clash_or_say_nothing_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("student.onnx"), testing::student("batch")).unwrap();
    for (args, says) in [
        (&["student.onnx", "student.onnx"][..], "two models have the name `student`"),
        (&["student.onnx", "b=student.onnx", "--model-name", "a"], "--model-name names a single student"),
        (&["=student.onnx"], "`` is no name of a model"),
        (&["a=none.onnx"], "none.onnx"),
    ] {
        let out = command(dir.path()).args(["serve", "--port", "0", "--engine", "tract"]).args(args).output().unwrap();
        let text = String::from_utf8_lossy(&out.stderr);
        assert!(!out.status.success() && text.contains(says), "{args:?}: {text}");
    }
}
