//! `disback serve` beside a plain server of FastAPI, uvicorn and onnxruntime with the same student on the same machine: 1, 8 and 32
//! clients that each keep one connection busy, one image a request, in turn.
//!
//! ```console
//! $ cargo bench --bench serve [-- STUDENT.onnx]
//! ```
//!
//! The peer's environment and a student of the digits, where none is given, are made in `target/serve-bench`.
//! `DISBACK_BENCH_SECONDS` (2): of a cell in a round; `DISBACK_BENCH_ROUNDS` (3).

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const CLIENTS: [usize; 3] = [1, 8, 32];
const PINS: [&str; 4] = ["fastapi==0.165.0", "uvicorn[standard]==0.54.0", "onnxruntime==1.32.0", "numpy==2.4.6"];

/// A server that ends with this value.
struct Server {
    process: Child,
    address: String,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// What the clients of one cell saw.
#[derive(Default)]
struct Seen {
    milliseconds: Vec<f64>,
    seconds: f64,
}

fn number(name: &str, usual: f64) -> f64 {
    std::env::var(name)
        .ok()
        .map_or(usual, |text| text.parse().unwrap_or_else(|_| panic!("{name}={text}: expected a number")))
}

fn run(command: &mut Command) {
    let status = command.status().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    assert!(status.success(), "{command:?}: {status}");
}

/// A student of the digits after a few steps: what it draws plays no part.
fn student(folder: &Path) -> PathBuf {
    let run_folder = folder.join("run");
    let student = run_folder.join("student.onnx");
    if !student.is_file() {
        let _ = std::fs::remove_dir_all(&run_folder);
        let teacher = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/digits/teacher.onnx");
        let few = "--device cpu --batch 4 --nodes 1 --degrade-steps 2 --updates 4 --set log.samples=2 --set log.sample_steps=2 --quiet";
        run(Command::new(env!("CARGO_BIN_EXE_disback"))
            .arg("distill")
            .args([&teacher, Path::new("-o"), &run_folder])
            .args(few.split(' ')));
    }
    student
}

/// The Python of the peer's own environment.
fn python(folder: &Path) -> PathBuf {
    let environment = folder.join("venv");
    let python = environment.join("bin/python");
    // (Written last: an environment that was begun is made anew.)
    let (pins, made) = (PINS.join("\n"), environment.join("pins"));
    if std::fs::read_to_string(&made).ok().as_deref() != Some(pins.as_str()) {
        let _ = std::fs::remove_dir_all(&environment);
        run(Command::new("python3").args(["-m", "venv"]).arg(&environment));
        run(Command::new(&python).args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check"]).args(PINS));
        std::fs::write(&made, pins).expect("the environment's folder is writable");
    }
    python
}

fn ours(student: &Path) -> Server {
    let mut process = Command::new(env!("CARGO_BIN_EXE_disback"))
        .arg("serve")
        .arg(student)
        .args(["--port", "0", "--json", "--engine", "ort"])
        .stdout(Stdio::piped())
        .spawn()
        .expect("disback starts");
    let mut line = String::new();
    BufReader::new(process.stdout.as_mut().expect("a pipe")).read_line(&mut line).expect("a line");
    let ready: serde_json::Value = serde_json::from_str(&line).unwrap_or_else(|e| panic!("{e}: {line}"));
    Server { address: ready["listening"].as_str().expect("an address").to_owned(), process }
}

fn peer(folder: &Path, student: &Path) -> Server {
    let free = TcpListener::bind("127.0.0.1:0").and_then(|l| l.local_addr()).expect("a free port");
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/serve/peer.py");
    let mut command = Command::new(python(folder));
    let process = command.arg(script).arg(student).arg(free.port().to_string()).spawn().expect("the peer starts");
    let server = Server { process, address: free.to_string() };
    let end = Instant::now() + Duration::from_secs(60);
    while TcpStream::connect(&server.address).is_err() {
        assert!(Instant::now() < end, "the peer does not listen");
        std::thread::sleep(Duration::from_millis(100));
    }
    server
}

/// One request on a connection that stays open: the bytes of its answer.
fn ask(stream: &mut TcpStream, reader: &mut BufReader<TcpStream>, request: &str) -> Vec<u8> {
    stream.write_all(request.as_bytes()).expect("the server takes requests");
    let (mut line, mut length, mut first) = (String::new(), 0, String::new());
    loop {
        line.clear();
        reader.read_line(&mut line).expect("an answer");
        let text = line.trim_end();
        if text.is_empty() {
            break;
        }
        if first.is_empty() {
            first = text.to_owned();
        }
        if let Some(("content-length", value)) = text.to_ascii_lowercase().split_once(':') {
            length = value.trim().parse().expect("a length");
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).expect("a body");
    assert!(first.contains(" 200 ") && body.starts_with(b"\x93NUMPY"), "{first}: {}", String::from_utf8_lossy(&body));
    body
}

/// Clients that ask for so many seconds, each as soon as it has its answer.
fn load(address: &str, clients: usize, seconds: f64) -> Seen {
    let began = Instant::now();
    let end = began + Duration::from_secs_f64(seconds);
    let client = |k: usize| {
        let mut stream = TcpStream::connect(address).expect("a connection");
        stream.set_nodelay(true).expect("a socket");
        let mut reader = BufReader::new(stream.try_clone().expect("a socket"));
        let (mut taken, mut seed) = (Vec::new(), k * 1_000_000);
        while Instant::now() < end {
            let request = format!("GET /sample?seed={seed}&n=1&format=npy HTTP/1.1\r\nHost: {address}\r\n\r\n");
            let asked = Instant::now();
            ask(&mut stream, &mut reader, &request);
            taken.push(asked.elapsed().as_secs_f64() * 1e3);
            seed += 1;
        }
        taken
    };
    let milliseconds = std::thread::scope(|scope| {
        let all: Vec<_> = (0..clients).map(|k| scope.spawn(move || client(k))).collect();
        all.into_iter().flat_map(|one| one.join().expect("a client that ends")).collect()
    });
    Seen { milliseconds, seconds: began.elapsed().as_secs_f64() }
}

impl Seen {
    fn add(&mut self, other: Self) {
        self.milliseconds.extend(other.milliseconds);
        self.seconds += other.seconds;
    }

    /// Requests a second, and the times that half and 99 of 100 answers stay below, ms.
    fn figures(&mut self) -> [f64; 3] {
        self.milliseconds.sort_by(f64::total_cmp);
        let at = |share: f64| self.milliseconds[((self.milliseconds.len() - 1) as f64 * share).round() as usize];
        [self.milliseconds.len() as f64 / self.seconds, at(0.5), at(0.99)]
    }
}

fn main() {
    let (seconds, rounds) = (number("DISBACK_BENCH_SECONDS", 2.0), number("DISBACK_BENCH_ROUNDS", 3.0) as usize);
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/serve-bench");
    std::fs::create_dir_all(&folder).expect("the target folder is writable");
    // (Cargo says `--bench` too.)
    let given = std::env::args().skip(1).find(|a| !a.starts_with("--"));
    let student = given.map_or_else(|| student(&folder), PathBuf::from);
    let servers = [ours(&student), peer(&folder, &student)];
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let busy = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    println!("{}, {cores} cores, load {}; peer: {}", student.display(), busy.trim(), PINS.join(" "));
    servers.iter().for_each(|server| drop(load(&server.address, 4, 0.5)));
    println!(
        "| clients | ours: requests a second, p50, p99 ms | FastAPI: requests a second, p50, p99 ms | requests, times | p99, share |"
    );
    println!("|---|---|---|---|---|");
    for clients in CLIENTS {
        let mut seen = [Seen::default(), Seen::default()];
        for _ in 0..rounds.max(1) {
            // In turn, so that both see the same machine.
            for (server, seen) in servers.iter().zip(&mut seen) {
                seen.add(load(&server.address, clients, seconds));
            }
        }
        let [[rate, half, most], [rate_peer, half_peer, most_peer]] = seen.map(|mut s| s.figures());
        println!(
            "| {clients} | {rate:.0}, {half:.2}, {most:.2} | {rate_peer:.0}, {half_peer:.2}, {most_peer:.2} | {:.2} | {:.2} |",
            rate / rate_peer,
            most / most_peer
        );
    }
}
