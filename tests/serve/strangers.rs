//! What strangers send, and how the server ends: half-sent requests, crowds, long bodies, other sites' pages.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use disback::tensor::HostTensor;

use super::{Server, close, moved, request, with_rows};

/// Head of a request for `address`, without the empty line that ends it.
fn head(method: &str, path: &str, address: &str, more: &str) -> String {
    format!("{method} {path} HTTP/1.1\r\nHost: {address}\r\n{more}")
}

/// What a connection has to say until it is closed.
fn rest(mut stream: &TcpStream) -> String {
    stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let mut all = Vec::new();
    let _ = stream.read_to_end(&mut all);
    String::from_utf8_lossy(&all).into_owned()
}

fn send(stream: &mut TcpStream, text: &[u8]) {
    stream.write_all(text).unwrap();
    stream.flush().unwrap();
}

/// A connection that has sent this and is being read by the server.
fn connected(server: &Server, text: &str) -> TcpStream {
    let mut stream = TcpStream::connect(&server.address).unwrap();
    send(&mut stream, text.as_bytes());
    // Connections are taken in their order: this one is, once a later one was answered.
    assert_eq!(server.get("/v2/health/live").status, 200);
    stream
}

#[test]
fn a_stop_answers_what_was_asked() {
    let server = Server::start(&["--grace", "60"]);
    let mut body = Vec::new();
    let noise = HostTensor::new(&[1, 1, 2, 2], &[0.5f32; 4]).unwrap();
    disback::io::npy::write_to(&mut body, &noise).unwrap();
    let more = format!("Connection: close\r\nContent-Length: {}\r\n\r\n", body.len());
    let mut asked = connected(&server, &head("POST", "/sample?classes=1&format=npy", &server.address, &more));
    server.tell();
    std::thread::sleep(Duration::from_millis(300));
    assert!(TcpStream::connect(&server.address).is_err(), "a server that stops takes no connection");
    send(&mut asked, &body);
    assert!(rest(&asked).starts_with("HTTP/1.1 200"));
    let mut server = server;
    assert_eq!(server.process.wait().unwrap().code(), Some(0));
}

#[test]
fn stopping_ends_whatever_is_half_sent() {
    let halves = |address: &str| {
        [head("GET", "/sample", address, ""), head("POST", "/sample", address, "Content-Length: 900\r\n\r\nab")]
    };
    for (grace, twice) in [("1", false), ("600", true)] {
        let server = Server::start(&["--grace", grace]);
        let held = halves(&server.address).map(|half| connected(&server, &half));
        if twice {
            server.tell();
            std::thread::sleep(Duration::from_millis(200));
        }
        assert_eq!(server.stop(), Some(0), "--grace {grace}");
        drop(held);
    }
}

#[test]
fn slow_heads_are_cut_off_and_health_is_answered_in_a_crowd() {
    let server = Server::start(&["--max-connections", "2"]);
    let slow = [(); 2].map(|()| TcpStream::connect(&server.address).unwrap());
    for mut stream in &slow {
        stream.write_all(b"GET /sample HT").unwrap();
    }
    let began = std::time::Instant::now();
    assert_eq!(server.get("/health").status, 200);
    let refused = server.get("/sample");
    assert!(refused.status == 503 && refused.error().contains("too many connections"), "{refused:?}");
    assert!(refused.head.to_lowercase().contains("retry-after: 1"), "{}", refused.head);
    // More than may wait beside them: who asks now gets his answer.
    let crowd: Vec<TcpStream> = (0..90).map(|_| TcpStream::connect(&server.address).unwrap()).collect();
    for mut stream in &crowd {
        stream.write_all(b"GET /sample HT").unwrap();
    }
    assert_eq!(server.get("/health").status, 200);
    drop(crowd);
    // Their time is up after 10 s, and there is room again.
    slow.iter().for_each(|stream| drop(rest(stream)));
    assert!(began.elapsed() >= Duration::from_secs(8));
    let ends = std::time::Instant::now() + Duration::from_secs(20);
    while server.get("/sample").status != 200 {
        assert!(std::time::Instant::now() < ends, "no room");
    }
    assert_eq!(server.stop(), Some(0));
}

#[test]
fn memory_is_bounded_by_bytes() {
    let server = Server::of(&with_rows(), &["--max-memory", "1", "--max-body", "2048"]);
    // One long text for 16 images: in memory once, and in calls of a quarter of the budget.
    let words = vec!["[3,0,0]"; 9000].join(",");
    let body = format!("{{\"text\": [[{words}]], \"shift\": [0]}}");
    let got = request(&server.address, "POST", "/sample?format=npy&n=16&seed=2", body.as_bytes()).values();
    assert!(close(&got, &moved(&disback::noise::batch_noise(2, 0, 16, 4), &[1.0; 16])), "{got:?}");
    // A body that has no room beside this one.
    let more = "Content-Length: 800000\r\n\r\n";
    let holding = connected(&server, &head("POST", "/sample", &server.address, more));
    let refused = request(&server.address, "POST", "/sample?n=16", body.as_bytes());
    assert!(refused.status == 503 && refused.error().contains("too much is in flight"), "{refused:?}");
    drop(holding);
    let ends = std::time::Instant::now() + Duration::from_secs(20);
    while request(&server.address, "POST", "/sample?n=16", body.as_bytes()).status != 200 {
        assert!(std::time::Instant::now() < ends, "the bytes of a caller that has gone are not given back");
    }
    assert_eq!(server.stop(), Some(0));
}

#[test]
fn what_may_not_be_asked_is_refused_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let token = dir.path().join("token");
    std::fs::write(&token, "s3cret\n").unwrap();
    let server = Server::start(&["--max-body", "1", "--token-file", token.to_str().unwrap(), "--access-log"]);
    let ask = |method: &str, path: &str, host: &str, more: &str, body: &str| {
        let mut stream = TcpStream::connect(&server.address).unwrap();
        let text = format!("{}{more}Connection: close\r\n\r\n{body}", head(method, path, host, ""));
        send(&mut stream, text.as_bytes());
        rest(&stream)
    };
    let (host, bearer) = (server.address.as_str(), "Authorization: Bearer s3cret\r\n");
    let with = |more: &str| format!("{bearer}{more}");
    let key = format!("{{\"{}\": [1]}}", "k".repeat(900));
    let length = |body: &str| with(&format!("Content-Length: {}\r\n", body.len()));
    let chunked = format!("800\r\n{}\r\n0\r\n\r\n", "x".repeat(0x800));
    for (method, path, host, more, body, status, words) in [
        ("GET", "/sample", host, bearer.to_owned(), "", 200, "PNG"),
        ("GET", "/sample", host, String::new(), "", 401, "wants its token"),
        ("GET", "/health", host, String::new(), "", 200, "\"ok\""),
        ("GET", "/sample", "evil.example", with(""), "", 421, "--host-name"),
        ("GET", "/sample", host, with("Sec-Fetch-Site: cross-site\r\n"), "", 403, "--cors"),
        // Before any of the body has come.
        ("POST", "/sample", host, with("Content-Length: 5000000000\r\n"), "", 413, "more than 1024 bytes"),
        ("POST", "/sample", host, with("Transfer-Encoding: chunked\r\n"), &chunked, 413, "more than 1024 bytes"),
        ("PUT", "/sample", host, bearer.to_owned(), "", 405, "this page takes GET"),
        ("GET", "/sample?index=18446744073709551615&n=2", host, bearer.to_owned(), "", 400, "2^64 images"),
        ("POST", "/sample", host, length(&key), &key, 400, "kkk..."),
    ] {
        let got = ask(method, path, host, &more, body);
        assert!(
            got.starts_with(&format!("HTTP/1.1 {status} ")) && got.contains(words),
            "{method} {path} {more}: {got}"
        );
        assert!(status == 200 || (got.contains("application/json") && got.len() < 1200), "{got}");
    }
    let metrics = ask("GET", "/metrics", host, bearer, "");
    for line in ["{code=\"401\"} 1", "{code=\"421\"} 1", "{code=\"405\"} 1", "{code=\"413\"} 2", "{code=\"200\"} 1"] {
        assert!(metrics.contains(&format!("disback_requests_total{line}")), "{line}\n{metrics}");
    }
    assert_eq!(server.stop(), Some(0));
}

/// RFC 9112: an address in the first line goes before the Host, which HTTP/1.1 must have; and a head that does not end is not waited
/// for longer than a whole request.
#[test]
fn first_lines_of_every_form_and_short_time_outs() {
    let server = Server::start(&["--timeout", "1"]);
    let host = server.address.as_str();
    let raw = |first: &str, more: &str| {
        let mut stream = TcpStream::connect(host).unwrap();
        send(&mut stream, format!("{first}\r\n{more}Connection: close\r\n\r\n").as_bytes());
        rest(&stream)
    };
    let own = format!("Host: {host}\r\n");
    for (first, more, status, words) in [
        (format!("GET http://{host}/sample?format=npy HTTP/1.1"), String::new(), 200, "NUMPY"),
        (format!("GET http://{host}/health HTTP/1.1"), "Host: evil.example\r\n".into(), 200, "\"ok\""),
        ("GET http://evil.example/sample HTTP/1.1".into(), own.clone(), 421, "--host-name"),
        (format!("GET http://{host} HTTP/1.1"), own.clone(), 404, "no such page"),
        ("GET /sample HTTP/1.1".into(), String::new(), 400, "no Host"),
        ("GET /sample HTTP/1.1".into(), own.repeat(2), 400, "more than one Host"),
        ("GET /health HTTP/1.0".into(), String::new(), 200, "\"ok\""),
        ("OPTIONS * HTTP/1.1".into(), own.clone(), 404, "no such page"),
        (format!("CONNECT {host} HTTP/1.1"), own.clone(), 404, "no such page"),
    ] {
        let got = raw(&first, &more);
        let code = got.split(' ').nth(1).unwrap_or_default().to_owned();
        assert!(code == status.to_string() && got.contains(words), "{first} {more}: {got}");
    }
    let began = std::time::Instant::now();
    let slow = connected(&server, "GET /sample HT");
    assert!(rest(&slow).is_empty() || began.elapsed() >= Duration::from_secs(1));
    assert!(began.elapsed() < Duration::from_secs(6), "{:?}", began.elapsed());
    // The token's file is a regular one, and short.
    let long = server.dir.path().join("long");
    std::fs::write(&long, "t".repeat((64 << 10) + 1)).unwrap();
    for (file, says) in [("/dev/zero", "expected a regular file"), ("long", "at most 65536 bytes")] {
        let mut asked = super::command(server.dir.path());
        let out = asked.args(["serve", "student.onnx", "--port", "0", "--token-file", file]).output().unwrap();
        let text = String::from_utf8_lossy(&out.stderr).into_owned();
        assert!(!out.status.success() && text.contains(says) && text.contains(file), "{text}");
    }
    assert_eq!(server.stop(), Some(0));
}
