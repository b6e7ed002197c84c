//! The Open Inference Protocol, byte by byte. (tests/python/test_inference_protocol.py has Triton's own client.)

use serde_json::{Value, json};

use super::*;

/// A request with a head of JSON and tensors behind it.
fn binary(address: &str, path: &str, head: &Value, after: &[u8]) -> Answer {
    let head = head.to_string();
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let lines = format!(
        "POST {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\nInference-Header-Content-Length: {}\r\n\
         Content-Length: {}\r\n\r\n",
        head.len(),
        head.len() + after.len()
    );
    stream.write_all(&[lines.as_bytes(), head.as_bytes(), after].concat()).unwrap();
    let mut all = Vec::new();
    stream.read_to_end(&mut all).unwrap();
    let end = all.windows(4).position(|w| w == b"\r\n\r\n").expect("a head");
    let head = String::from_utf8_lossy(&all[..end]).into_owned();
    Answer { status: head.split(' ').nth(1).unwrap().parse().unwrap(), head, body: all[end + 4..].to_vec() }
}

fn parsed(answer: &Answer) -> Value {
    serde_json::from_slice(&answer.body).unwrap_or_else(|e| panic!("{e}: {}", String::from_utf8_lossy(&answer.body)))
}

fn numbers(output: &Value) -> Vec<f32> {
    output["data"].as_array().unwrap().iter().map(|v| v.as_f64().unwrap() as f32).collect()
}

#[test]
fn the_model_says_what_it_takes() {
    let server = Server::start(&["--model-name", "digits"]);
    assert_eq!(parsed(&server.get("/v2"))["extensions"], json!(["binary_tensor_data"]));
    for path in ["/v2/models/digits", "/v2/models/digits/versions/1"] {
        let found = parsed(&server.get(path));
        assert_eq!(found["inputs"][0], json!({ "name": "noise", "datatype": "FP32", "shape": [-1, 1, 2, 2] }));
        assert_eq!(found["inputs"][1], json!({ "name": "labels", "datatype": "INT64", "shape": [-1] }));
        assert_eq!(found["outputs"], json!([{ "name": "sample", "datatype": "FP32", "shape": [-1, 1, 2, 2] }]));
        assert_eq!(server.get(&format!("{path}/ready")).status, 200);
    }
    for path in ["/v2/models/other", "/v2/models/digits/versions/2/ready"] {
        let got = server.get(path);
        assert!(got.status == 404 && got.error().contains("`digits`"), "{}", got.error());
    }
}

#[test]
fn tensors_come_and_go_as_json_and_as_bytes() {
    let server = Server::start(&[]);
    let path = "/v2/models/student/infer";
    let expected = server.expected(&["-n", "3", "--seed", "9", "--classes", "1,2,0"]);
    let noise = disback::noise::batch_noise(9, 0, 3, 4);
    let labels = json!({ "name": "labels", "shape": [3], "datatype": "INT64", "data": [1, 2, 0] });
    // All of it JSON, the data nested or flat.
    let rows: Vec<Value> = noise.chunks(4).map(|c| json!([[[c[0], c[1]], [c[2], c[3]]]])).collect();
    for data in [json!(rows), json!(noise)] {
        let body = json!({ "id": "7", "inputs": [{ "name": "noise", "shape": [3, 1, 2, 2], "datatype": "FP32", "data": data }, labels] });
        let got = request(&server.address, "POST", path, body.to_string().as_bytes());
        let found = parsed(&got);
        assert_eq!(
            (&found["id"], &found["model_version"], &found["outputs"][0]["shape"]),
            (&json!("7"), &json!("1"), &json!([3, 1, 2, 2]))
        );
        assert!(close(&numbers(&found["outputs"][0]), &expected));
    }
    // Bytes both ways.
    let bytes: Vec<u8> = noise.iter().flat_map(|v| v.to_le_bytes()).collect();
    let head = json!({ "parameters": { "binary_data_output": true }, "inputs": [labels,
        { "name": "noise", "shape": [3, 1, 2, 2], "datatype": "FP32", "parameters": { "binary_data_size": bytes.len() } }] });
    let got = binary(&server.address, path, &head, &bytes);
    let length = got
        .head
        .lines()
        .find_map(|l| l.to_ascii_lowercase().strip_prefix("inference-header-content-length: ").map(str::to_owned));
    let length: usize = length.unwrap().parse().unwrap();
    let found: Value = serde_json::from_slice(&got.body[..length]).unwrap();
    assert_eq!(found["outputs"][0]["parameters"]["binary_data_size"], 48);
    let values: Vec<f32> = got.body[length..].chunks(4).map(|c| f32::from_le_bytes(c.try_into().unwrap())).collect();
    assert!(close(&values, &expected));
    // What is left out is drawn from the seed, as `disback sample` does.
    let body = json!({ "parameters": { "seed": 9, "index": 1, "n": 4 } });
    let found = parsed(&request(&server.address, "POST", path, body.to_string().as_bytes()));
    assert!(close(&numbers(&found["outputs"][0]), &server.expected(&["-n", "5", "--seed", "9"])[4..]));
    let text = String::from_utf8(server.get("/metrics").body).unwrap();
    assert!(
        text.contains("disback_requests_total{code=\"200\"} 4")
            && text.contains("disback_images_total{model=\"student\"} 13"),
        "{text}"
    );
}

#[test]
fn wrong_tensors_are_answered_in_words() {
    let server = Server::start(&["--max-body", "1"]);
    let path = "/v2/models/student/infer";
    let noise =
        |shape: Value, data: Value| json!({ "name": "noise", "shape": shape, "datatype": "FP32", "data": data });
    let labels = |data: Value| json!({ "name": "labels", "shape": [1], "datatype": "INT64", "data": data });
    let one = noise(json!([1, 1, 2, 2]), json!([0, 0, 0, 0]));
    for (body, says) in [
        (
            json!({ "inputs": [noise(json!([1, 1, 2, 3]), json!([0, 0, 0, 0, 0, 0]))] }),
            "f32[1, 1, 2, 3], expected f32[n, 1, 2, 2]",
        ),
        (json!({ "inputs": [one, labels(json!([3]))] }), "class 3, the student has 0 to 2"),
        (json!({ "inputs": [one, labels(json!([-1]))] }), "class -1"),
        (json!({ "inputs": [one, one] }), "given twice"),
        (
            json!({ "inputs": [{ "name": "x", "shape": [1], "datatype": "FP32", "data": [0] }] }),
            "no input `x`: there are `noise`, `labels`",
        ),
        (json!({ "inputs": [{ "name": "labels", "shape": [1], "datatype": "FP32", "data": [0] }] }), "expected INT64"),
        (json!({ "inputs": [one], "outputs": [{ "name": "image" }] }), "no output `image`"),
        (json!({ "parameters": { "n": 17 } }), "17 samples in one request: expected 1 to 16"),
        (json!({ "parameters": { "n": 0 } }), "0 samples"),
        (json!({ "parameters": { "seed": "a" } }), "parameter seed"),
        (json!([]), "no inference request"),
    ] {
        let got = request(&server.address, "POST", path, body.to_string().as_bytes());
        assert!(got.status == 400 && got.error().contains(says), "{body}: {} {}", got.status, got.error());
    }
    assert_eq!(request(&server.address, "POST", path, &[b' '; 2000]).status, 413);
    assert_eq!(request(&server.address, "GET", path, &[]).status, 405);
    assert_eq!(binary(&server.address, path, &json!({}), &[0; 4]).status, 400);
    // It is still there.
    assert_eq!(request(&server.address, "POST", path, b"{}").status, 200);
}

#[test]
fn it_lives_while_it_drains() {
    let server = Server::start(&["--drain", "5"]);
    assert_eq!((server.get("/v2/health/live").status, server.get("/v2/models/student/ready").status), (200, 200));
    server.tell();
    let end = std::time::Instant::now() + Duration::from_secs(4);
    while server.get("/v2/health/ready").status == 200 {
        assert!(std::time::Instant::now() < end, "ready although it was told to stop");
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!((server.get("/v2/health/live").status, server.get("/v2/models/student/ready").status), (200, 503));
    // What is asked meanwhile is answered.
    assert_eq!(request(&server.address, "POST", "/v2/models/student/infer", b"{}").status, 200);
}
