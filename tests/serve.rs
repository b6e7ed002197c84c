//! `disback serve` under load from a real client: same images as the command line makes, requests batched, wrong ones
//! answered clearly while the service stays up, a stop that answers what was asked.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use disback::{HostTensor, onnx, tensor};

#[path = "serve/protocol.rs"]
mod protocol;
#[path = "serve/several.rs"]
mod several;
#[path = "serve/strangers.rs"]
mod strangers;
#[allow(dead_code, reason = "each test target uses its own part")]
#[path = "../src/runtime/testing.rs"]
mod testing;

struct Server {
    process: Child,
    address: String,
    dir: tempfile::TempDir,
}

impl Server {
    fn start(more: &[&str]) -> Self {
        Self::of(&testing::student("batch"), more)
    }

    fn of(student: &[u8], more: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("student.onnx"), student).unwrap();
        Self::in_folder(dir, &["student.onnx"], more)
    }

    /// Of these students in a folder.
    fn in_folder(dir: tempfile::TempDir, students: &[&str], more: &[&str]) -> Self {
        let mut process = command(dir.path())
            .arg("serve")
            .args(students)
            .args(["--port", "0", "--json", "--engine", "tract", "--max-batch", "16"])
            .args(more)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(process.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        let ready: serde_json::Value = serde_json::from_str(&line).unwrap();
        Self { process, address: ready["listening"].as_str().unwrap().to_owned(), dir }
    }

    fn get(&self, path: &str) -> Answer {
        request(&self.address, "GET", path, &[])
    }

    /// The samples that `disback sample` makes with these options, f32.
    fn expected(&self, args: &[&str]) -> Vec<f32> {
        let out = command(self.dir.path())
            .args(["sample", "student.onnx", "-o", "expected.npy", "--quiet"])
            .args(args)
            .output()
            .unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        disback::io::npy::read(&self.dir.path().join("expected.npy")).unwrap().to_f32()
    }

    /// Tells the process to stop as a service manager would.
    fn tell(&self) {
        let told = Command::new("kill").args(["-TERM", &self.process.id().to_string()]).status().unwrap();
        assert!(told.success());
    }

    /// [`Server::tell`], and its exit code.
    fn stop(mut self) -> Option<i32> {
        self.tell();
        self.process.wait().unwrap().code()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn command(dir: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_disback"));
    command.current_dir(dir);
    command
}

#[derive(Debug)]
struct Answer {
    status: u16,
    head: String,
    body: Vec<u8>,
}

impl Answer {
    fn error(&self) -> String {
        let value: serde_json::Value = serde_json::from_slice(&self.body).unwrap();
        value["error"].as_str().unwrap().to_owned()
    }
    fn values(&self) -> Vec<f32> {
        assert_eq!(self.status, 200, "{}", String::from_utf8_lossy(&self.body));
        disback::io::npy::read_from(self.body.as_slice()).unwrap().to_f32()
    }
}

/// One HTTP/1.1 request on a connection of its own.
fn request(address: &str, method: &str, path: &str, body: &[u8]) -> Answer {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(120))).unwrap();
    let head = format!(
        "{method} {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).unwrap();
    // A server that refuses a large body may close before all of it is sent.
    let _ = stream.write_all(body);
    let mut all = Vec::new();
    let _ = stream.read_to_end(&mut all);
    let end = all.windows(4).position(|w| w == b"\r\n\r\n").expect("a head");
    let head = String::from_utf8_lossy(&all[..end]).into_owned();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    Answer { status, head, body: all[end + 4..].to_vec() }
}

fn close(a: &[f32], b: &[f32]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(x, y)| (x - y).abs() < 1e-6)
}

#[test]
fn many_callers_get_the_images_of_the_command_line() {
    let server = Server::start(&[]);
    let expected = server.expected(&["-n", "48", "--seed", "7"]);
    std::thread::scope(|scope| {
        for caller in 0..8usize {
            let (server, expected) = (&server, &expected);
            scope.spawn(move || {
                for round in 0..6usize {
                    let index = caller * 6 + round;
                    let got = server.get(&format!("/sample?seed=7&index={index}&n=1&format=npy")).values();
                    assert!(close(&got, &expected[index * 4..index * 4 + 4]), "image {index}");
                }
            });
        }
    });
    let metrics = server.get("/metrics");
    assert!(metrics.head.contains("application/openmetrics-text; version=1.0.0"), "{}", metrics.head);
    let text = String::from_utf8(metrics.body).unwrap();
    let number = |name: &str| -> f64 {
        let line = text.lines().find(|l| l.starts_with(name)).unwrap_or_else(|| panic!("{name}\n{text}"));
        line.rsplit_once(' ').unwrap().1.parse().unwrap()
    };
    assert_eq!(
        (number("disback_requests_total{code=\"200\"}"), number("disback_images_total{model=\"student\"}")),
        (48.0, 48.0)
    );
    assert_eq!(number("disback_batch_images_sum{model=\"student\"}"), 48.0);
    assert!(number("disback_batch_images_count{model=\"student\"}") <= 48.0, "{text}");
    assert_eq!(number("disback_waiting_requests{model=\"student\"}"), 0.0);
    assert_eq!(number("disback_request_duration_seconds_count"), 48.0);
    assert_eq!(
        number("disback_network_duration_seconds_count{model=\"student\"}"),
        number("disback_batch_images_count{model=\"student\"}")
    );
    assert_eq!(server.stop(), Some(0));
}

#[test]
fn every_form_is_answered() {
    let server = Server::start(&[]);
    let health: serde_json::Value = serde_json::from_slice(&server.get("/health").body).unwrap();
    assert_eq!((health["status"].as_str(), health["classes"].as_u64()), (Some("ok"), Some(3)), "{health}");
    let one = server.get("/sample?seed=3&classes=2");
    assert!(one.status == 200 && one.head.contains("image/png") && one.body.starts_with(b"\x89PNG"), "{one:?}");
    assert!(server.get("/sample?n=9").body.starts_with(b"\x89PNG"));
    let got = server.get("/sample?seed=3&n=5&classes=2,0&format=npy").values();
    assert!(close(&got, &server.expected(&["-n", "5", "--seed", "3", "--classes", "2,0"])));
    // Noise of the caller's own: the same as that of the seed, sent.
    let noise = HostTensor::new(&[3, 1, 2, 2], &disback::noise::batch_noise(9, 0, 3, 4)).unwrap();
    let mut body = Vec::new();
    disback::io::npy::write_to(&mut body, &noise).unwrap();
    let got = request(&server.address, "POST", "/sample?classes=1&format=npy", &body).values();
    assert!(close(&got, &server.expected(&["-n", "3", "--seed", "9", "--classes", "1"])));
}

#[test]
fn wrong_requests_are_answered_and_the_service_stays_up() {
    let server = Server::start(&["--max-body", "1"]);
    let npy = |shape: &[usize]| {
        let mut body = Vec::new();
        let values = vec![0f32; shape.iter().product()];
        disback::io::npy::write_to(&mut body, &HostTensor::new(shape, &values).unwrap()).unwrap();
        body
    };
    let nan = {
        let mut body = Vec::new();
        disback::io::npy::write_to(&mut body, &HostTensor::new(&[1, 1, 2, 2], &[f32::NAN; 4]).unwrap()).unwrap();
        body
    };
    let cases: Vec<(&str, &str, Vec<u8>, u16, &str)> = vec![
        ("GET", "/sample?classes=3", vec![], 400, "class 3: the student has classes 0 to 2"),
        ("GET", "/sample?classes=a", vec![], 400, "expected numbers by commas"),
        ("GET", "/sample?n=0", vec![], 400, "n=0"),
        ("GET", "/sample?n=17", vec![], 413, "at most 16"),
        ("GET", "/sample?n=-1", vec![], 400, "n: invalid digit"),
        ("GET", "/sample?steps=4", vec![], 400, "unknown field `steps`"),
        ("GET", "/sample?format=jpg", vec![], 400, "expected png or npy"),
        ("POST", "/sample", b"hello".to_vec(), 400, "no .npy array of noise"),
        ("POST", "/sample", npy(&[2, 1, 3, 2]), 400, "f32[2, 1, 3, 2], expected f32[n, 1, 2, 2]"),
        ("POST", "/sample?n=3", npy(&[2, 1, 2, 2]), 400, "holds noise for 2 images"),
        ("POST", "/sample", nan, 400, "NaN or infinity"),
        ("POST", "/sample", npy(&[400, 1, 2, 2]), 413, "more than 1024 bytes"),
        ("GET", "/other", vec![], 404, "no such page"),
    ];
    for (method, path, body, status, want) in cases {
        let got = request(&server.address, method, path, &body);
        assert!(got.status == status && got.error().contains(want), "{method} {path}: {} {}", got.status, got.error());
    }
    assert_eq!(server.get("/sample").status, 200);
    // Not HTTP at all.
    let mut stream = TcpStream::connect(&server.address).unwrap();
    stream.write_all(b"\x00\x01\x02 nonsense\r\n\r\n").unwrap();
    drop(stream);
    assert_eq!(server.get("/health").status, 200);
    assert_eq!(server.stop(), Some(0));
}

#[test]
fn a_start_that_cannot_be_is_one_clear_error() {
    let server = Server::start(&[]);
    let port = server.address.rsplit_once(':').unwrap().1;
    let fails = |args: &[&str]| {
        let out = command(server.dir.path()).args(args).output().unwrap();
        (out.status.code().unwrap(), String::from_utf8_lossy(&out.stderr).lines().next().unwrap().to_owned())
    };
    let (code, text) = fails(&["serve", "student.onnx", "--port", port]);
    assert!(code == 1 && text.contains("cannot listen on 127.0.0.1"), "{text}");
    let (code, text) = fails(&["serve", "none.onnx"]);
    assert!(code == 1 && text.contains("none.onnx"), "{text}");
    let (code, text) = fails(&["serve", "student.onnx", "--max-batch", "0"]);
    assert!(code == 2 && text.contains("--max-batch 0"), "{text}");
}

/// `sample = clip(noise / 2 + mean of the rows of text + shift, -1, 1)` on 1x2x2 images: a text of any length and a shift an
/// image.
fn with_rows() -> Vec<u8> {
    use disback::onnx::GraphProto;
    let with = |mut n: onnx::NodeProto, axes: &[i64]| {
        n.attribute.push(disback::graph::edit::ints_attribute("axes", axes));
        n
    };
    let graph = GraphProto {
        node: vec![
            testing::node("Mul", &["noise", "half"], "scaled"),
            with(testing::node("ReduceMean", &["text"], "mean"), &[1, 2]),
            testing::node("Reshape", &["mean", "shape"], "offset"),
            testing::node("Add", &["scaled", "offset"], "moved"),
            testing::node("Cast", &["shift"], "shift_f32"),
            testing::node("Reshape", &["shift_f32", "shape"], "shifts"),
            testing::node("Add", &["moved", "shifts"], "sum"),
            testing::node("Clip", &["sum", "low", "high"], "sample"),
        ]
        .into_iter()
        .map(|mut n| {
            if n.op_type() == "Cast" {
                n.attribute.push(disback::graph::edit::int_attribute("to", 1));
            }
            n
        })
        .collect(),
        initializer: vec![
            testing::initializer("half", &HostTensor::scalar(0.5f32)),
            testing::initializer("shape", &HostTensor::vec(&[-1i64, 1, 1, 1])),
            testing::initializer("low", &HostTensor::scalar(-1f32)),
            testing::initializer("high", &HostTensor::scalar(1f32)),
        ],
        input: vec![
            testing::value("noise", tensor::DType::F32, &["batch", "1", "2", "2"]),
            testing::value("text", tensor::DType::F32, &["batch", "length", "3"]),
            testing::value("shift", tensor::DType::I64, &["batch"]),
        ],
        output: vec![testing::value("sample", tensor::DType::F32, &["batch", "1", "2", "2"])],
        ..Default::default()
    };
    let metadata = [
        ("disback.student.method", "disback"),
        ("disback.shape", "[1, 2, 2]"),
        ("disback.range", "[-1.0, 1.0]"),
        ("disback.conditions.text.kind", "embedding"),
        ("disback.conditions.shift.kind", "embedding"),
    ];
    testing::model(graph, &metadata)
}

/// What `with_rows` makes of noise, the mean of an image's text and its shift.
fn moved(noise: &[f32], by: &[f32]) -> Vec<f32> {
    noise.iter().enumerate().map(|(k, v)| (v * 0.5 + by[k / 4]).clamp(-1.0, 1.0)).collect()
}

fn npz(arrays: &[(&str, &HostTensor)]) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("body.npz");
    disback::io::npy::write_npz(&file, arrays).unwrap();
    std::fs::read(file).unwrap()
}

#[test]
fn rows_for_conditions_come_as_npz_or_json() {
    let server = Server::of(&with_rows(), &[]);
    let health: serde_json::Value = serde_json::from_slice(&server.get("/health").body).unwrap();
    assert_eq!(health["conditions"]["text"], "f32[n, length, 3]", "{health}");
    assert_eq!(health["conditions"]["shift"], "i64[n]", "{health}");
    let post = |query: &str, body: &[u8]| request(&server.address, "POST", &format!("/sample?format=npy{query}"), body);
    // JSON: two images, texts of two words, whole numbers for the shift; the images are those of the seed.
    let text = "{\"text\": [[[0, 0.3, 0.3], [0.6, 0, 0]], [[0.1, 0.1, 0.1], [0.1, 0.1, 0.1]]], \"shift\": [0, -1]}";
    let noise = disback::noise::batch_noise(7, 4, 2, 4);
    let got = post("&seed=7&index=4", text.as_bytes()).values();
    assert!(close(&got, &moved(&noise, &[0.2, -0.9])), "{got:?}");
    // The same rows as arrays, with noise of the caller's own.
    let rows = HostTensor::new(&[2, 1, 3], &[0.2f32, 0.2, 0.2, 0.1, 0.1, 0.1]).unwrap();
    let own = HostTensor::new(&[2, 1, 2, 2], &disback::noise::batch_noise(1, 0, 2, 4)).unwrap();
    let shift = HostTensor::vec(&[0i64, -1]);
    let got = post("", &npz(&[("noise", &own), ("text", &rows), ("shift", &shift)])).values();
    assert!(close(&got, &moved(&own.to_f32(), &[0.2, -0.9])), "{got:?}");
    // One row for all images.
    let one = b" {\"text\": [[[0.5, 0.5, 0.5]]], \"shift\": [0]}";
    assert!(close(&post("&seed=7&index=4&n=2", one).values(), &moved(&noise, &[0.5, 0.5])));
    assert_eq!(post("&seed=7", one).values().len(), 4);
    // Texts of different lengths at once: they cannot share a call, and nobody notices.
    std::thread::scope(|scope| {
        for caller in 0..6usize {
            let post = &post;
            scope.spawn(move || {
                let words = vec!["[0.3, 0.3, 0.3]"; caller % 3 + 1].join(", ");
                let body = format!("{{\"text\": [[{words}]], \"shift\": [0]}}");
                let got = post(&format!("&seed=7&index={caller}"), body.as_bytes()).values();
                let noise = disback::noise::batch_noise(7, caller as u64, 1, 4);
                assert!(close(&got, &moved(&noise, &[0.3])), "{caller}: {got:?}");
            });
        }
    });
    assert_eq!(server.stop(), Some(0));
}

#[test]
fn wrong_rows_are_answered_and_the_service_stays_up() {
    let server = Server::of(&with_rows(), &["--max-body", "2"]);
    let floats = |shape: &[usize]| HostTensor::new(shape, &vec![0f32; shape.iter().product()]).unwrap();
    let shift = HostTensor::vec(&[0i64, 0]);
    let nan = HostTensor::new(&[1, 1, 3], &[f32::NAN; 3]).unwrap();
    let zeros = npz_compressed();
    let cases: Vec<(Vec<u8>, u16, &str)> = vec![
        (vec![], 400, "wants rows for its condition `text`, f32[n, length, 3]"),
        (b"{\"text\": [[[1, 2, 3]]]}".to_vec(), 400, "wants rows for its condition `shift`, i64[n]"),
        (b"{\"words\": [1]}".to_vec(), 400, "no array `words` is taken, only `noise` and `text`, `shift`"),
        (b"{\"text\": [[[1, 2]]], \"shift\": [0]}".to_vec(), 400, "`text` is i64[1, 1, 2], expected f32[n, length, 3]"),
        (b"{\"text\": [[[1, 2, 3], [1]]], \"shift\": [0]}".to_vec(), 400, "rows of 3 and of 1 elements"),
        (b"{\"text\": [[[1, 2, 3]]], \"shift\": [0.5]}".to_vec(), 400, "`shift` holds fractions"),
        (b"{\"text\": \"a cat\"}".to_vec(), 400, "expected numbers in nested arrays"),
        (b"{\"text\": [[[1, 2, 3]]], \"text\": [[[1, 2, 3]]]}".to_vec(), 400, "`text` is given twice"),
        (b"{\"text\": [[[1, 2".to_vec(), 400, "no JSON object of arrays"),
        (npz(&[("text", &floats(&[3, 1, 3])), ("shift", &shift)]), 400, "`shift` has rows for 2 images, `text` for 3"),
        (npz(&[("text", &nan), ("shift", &shift)]), 400, "`text` holds NaN or infinity"),
        (npz(&[("text", &floats(&[17, 1, 3]))]), 413, "17 images in one request"),
        (b"PK\x03\x04 no archive".to_vec(), 400, "not a zip archive"),
        (zeros, 400, "more than 2048 bytes once unpacked"),
        (npz(&[("text", &floats(&[1, 400, 3]))]), 413, "more than 2048 bytes"),
    ];
    for (body, status, want) in cases {
        let got = request(&server.address, "POST", "/sample", &body);
        assert!(got.status == status && got.error().contains(want), "{want}: {} {}", got.status, got.error());
    }
    let fine = b"{\"text\": [[[1, 2, 3]]], \"shift\": [0]}";
    assert_eq!(request(&server.address, "POST", "/sample", fine).status, 200);
    assert_eq!(server.stop(), Some(0));
}

/// An archive of a hundred bytes that unpacks to a hundred thousand.
fn npz_compressed() -> Vec<u8> {
    use std::io::Write;
    let mut array = Vec::new();
    disback::io::npy::write_to(&mut array, &HostTensor::new(&[1, 10_000, 3], &vec![0f32; 30_000]).unwrap()).unwrap();
    let mut archive = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    let options = zip::write::FileOptions::default().compression_method(zip::CompressionMethod::Deflated);
    archive.start_file("text.npy", options).unwrap();
    archive.write_all(&array).unwrap();
    archive.finish().unwrap().into_inner()
}

#[test]
fn a_server_told_to_stop_lets_its_balancer_know_first() {
    let server = Server::start(&["--drain", "600"]);
    assert_eq!(server.get("/health").status, 200);
    server.tell();
    let began = std::time::Instant::now();
    let said = loop {
        let health = server.get("/health");
        if health.status != 200 {
            break health;
        }
        assert!(began.elapsed() < Duration::from_secs(20), "still healthy");
        std::thread::sleep(Duration::from_millis(20));
    };
    assert!(said.status == 503 && String::from_utf8_lossy(&said.body).contains("stopping"), "{said:?}");
    assert_eq!(server.get("/sample?n=2").status, 200);
    // The second time it does not wait.
    assert_eq!(server.stop(), Some(0));
}
