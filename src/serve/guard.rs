//! What a request must be before it is looked at: meant for this server, from a page that may ask, by a caller who may. And what
//! is written down of each.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use axum::body::Body;
use axum::extract::{ConnectInfo, State};
use axum::http::{HeaderValue, Method, Request, StatusCode, Version, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use super::{Rejected, Service, failure, rejected};

/// Who may ask.
#[derive(Debug, Clone, Default)]
pub struct Access {
    /// Names that a request's Host may have, beside the address; empty: any, where the server listens beyond this machine.
    pub hosts: Vec<String>,
    /// Origin of web pages that may ask, such as `https://example.org`.
    pub cors: Option<String>,
    /// What `Authorization: Bearer` must hold for everything but health.
    pub token: Option<String>,
    /// Whether each request is written to standard error.
    pub log: bool,
}

/// Pages that balancers ask for, whoever they are.
pub(super) fn is_health(path: &str) -> bool {
    matches!(path, "/health" | "/v2/health/live" | "/v2/health/ready")
}

/// Refuses what may not be asked, counts and writes down what was.
pub(super) async fn guard(
    State(s): State<Arc<Service>>,
    ConnectInfo(peer): ConnectInfo<SocketAddr>,
    request: Request<Body>,
    next: Next,
) -> Response {
    let began = Instant::now();
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let access = &s.options.access;
    let mut response = match refuse(access, s.options.address, &request) {
        Some(refused) => refused,
        None if method == Method::OPTIONS && access.cors.is_some() => StatusCode::NO_CONTENT.into_response(),
        None => next.run(request).await,
    };
    if let Some(origin) = access.cors.as_ref().and_then(|o| HeaderValue::from_str(o).ok()) {
        let headers = response.headers_mut();
        headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin);
        headers.insert(header::VARY, HeaderValue::from_static("Origin"));
        headers.insert(header::ACCESS_CONTROL_ALLOW_METHODS, HeaderValue::from_static("GET, POST"));
        headers.insert(header::ACCESS_CONTROL_ALLOW_HEADERS, HeaderValue::from_static("Authorization, Content-Type"));
    }
    let (status, seconds) = (response.status().as_u16(), began.elapsed().as_secs_f64());
    if path == "/sample" || super::v2::makes_samples(&path) || status >= 400 {
        s.metrics.answered(status, seconds);
    }
    if let Some(Rejected(reason)) = response.extensions().get() {
        s.metrics.rejected(reason);
    }
    if access.log {
        let shown: String = path.chars().take(200).flat_map(char::escape_default).collect();
        eprintln!("{} {peer} {method} {shown} {status} {:.1} ms", now(), seconds * 1e3);
    }
    response
}

/// The time as RFC 3339, UTC.
fn now() -> String {
    use tracing_subscriber::fmt::format::Writer;
    use tracing_subscriber::fmt::time::{FormatTime, SystemTime};
    let mut text = String::new();
    let _ = SystemTime.format_time(&mut Writer::new(&mut text));
    text
}

fn refuse<B>(access: &Access, address: SocketAddr, request: &Request<B>) -> Option<Response> {
    let (path, headers) = (request.uri().path(), request.headers());
    let text = |name: header::HeaderName| headers.get(name).and_then(|v| v.to_str().ok());
    // RFC 9112, 3.2: one Host, which HTTP/1.1 must have; a whole address in the request's first line goes before it.
    let whole = request.uri().authority().map(|a| a.as_str());
    let mut hosts = headers.get_all(header::HOST).iter();
    let host = match (hosts.next(), hosts.next()) {
        (_, Some(_)) => return Some(failure(StatusCode::BAD_REQUEST, "the request has more than one Host")),
        (None, None) if whole.is_none() && request.version() >= Version::HTTP_11 => {
            return Some(failure(StatusCode::BAD_REQUEST, "the request has no Host, which HTTP/1.1 wants"));
        }
        // (What is no text is nobody's name.)
        (given, None) => whole.or(given.map(|v| v.to_str().unwrap_or_default())),
    };
    if host.is_some_and(|host| !host_fits(access, address, host)) {
        let text = "the request's Host is not this server's: --host-name NAME lets a name through";
        return Some(rejected("host", failure(StatusCode::MISDIRECTED_REQUEST, text)));
    }
    // (Browsers say so of requests that another site's page makes; others do not send it.)
    let cross = headers.get("sec-fetch-site").is_some_and(|v| v == "cross-site");
    if cross && (access.cors.is_none() || access.cors.as_deref() != text(header::ORIGIN)) {
        let text = "another site's page asks: --cors ORIGIN lets one through";
        return Some(rejected("origin", failure(StatusCode::FORBIDDEN, text)));
    }
    let token = access.token.as_deref().filter(|_| !is_health(path))?;
    let given = text(header::AUTHORIZATION).and_then(|v| v.strip_prefix("Bearer ")).unwrap_or("");
    if same(token.as_bytes(), given.trim().as_bytes()) {
        return None;
    }
    let text = "this server wants its token: Authorization: Bearer TOKEN";
    let mut refused = rejected("token", failure(StatusCode::UNAUTHORIZED, text));
    refused.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    Some(refused)
}

/// A page of another site that calls this machine by a name of its own (DNS rebinding) has that name as Host.
fn host_fits(access: &Access, address: SocketAddr, host: &str) -> bool {
    if access.hosts.is_empty() && !address.ip().is_loopback() {
        return true;
    }
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.chars().all(|c| c.is_ascii_digit()) && !name.is_empty() => name,
        _ => host,
    };
    let name = name.trim_start_matches('[').trim_end_matches(']');
    let own = name.parse::<std::net::IpAddr>().is_ok_and(|ip| ip == address.ip() || ip.is_loopback());
    own || name.eq_ignore_ascii_case("localhost") || access.hosts.iter().any(|h| h.eq_ignore_ascii_case(name))
}

/// Equality whose time does not say where two texts differ.
fn same(a: &[u8], b: &[u8]) -> bool {
    a.len() == b.len() && a.iter().zip(b).fold(0u8, |d, (x, y)| d | (x ^ y)) == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(target: &str, version: Version, list: &[(&str, &str)]) -> Request<()> {
        let begun = Request::builder().uri(target).version(version);
        list.iter().fold(begun, |r, (k, v)| r.header(*k, *v)).body(()).unwrap()
    }

    #[test]
    fn hosts_sites_and_tokens_are_checked() {
        let here: SocketAddr = "127.0.0.1:8080".parse().unwrap();
        let far: SocketAddr = "0.0.0.0:8080".parse().unwrap();
        let open = Access::default();
        let named = Access { hosts: vec!["box.example".into()], ..Access::default() };
        let code = |a: &Access, at, list: &[(&'static str, &str)]| {
            // (HTTP/1.0 needs no Host: what is tried is the rest.)
            refuse(a, at, &asked("/sample", Version::HTTP_10, list)).map_or(200, |r| r.status().as_u16())
        };
        let target = |target: &str, version, list: &[(&str, &str)]| {
            refuse(&open, here, &asked(target, version, list)).map_or(200, |r| r.status().as_u16())
        };
        for (to, list, want) in [
            ("/sample", &[] as &[(&str, &str)], 400),
            ("/sample", &[("host", "localhost")], 200),
            ("/sample", &[("host", "localhost"), ("host", "localhost")], 400),
            // As a proxy is asked: the address in the first line is the one that counts.
            ("http://localhost:8080/sample", &[], 200),
            ("http://localhost:8080/sample", &[("host", "evil.example")], 200),
            ("http://evil.example/sample", &[("host", "localhost")], 421),
            ("http://localhost@evil.example/sample", &[("host", "localhost")], 421),
            ("*", &[("host", "localhost")], 200),
        ] {
            assert_eq!(target(to, Version::HTTP_11, list), want, "{to} {list:?}");
        }
        assert_eq!(target("/sample", Version::HTTP_10, &[]), 200);
        for (access, at, host, want) in [
            (&open, here, "127.0.0.1:8080", 200),
            (&open, here, "localhost", 200),
            (&open, here, "[::1]:8080", 200),
            (&open, here, "evil.example:8080", 421),
            (&open, far, "anything.example", 200),
            (&named, here, "Box.example:1", 200),
            (&named, far, "anything.example", 421),
        ] {
            assert_eq!(code(access, at, &[("host", host)]), want, "{host}");
        }
        let cross = [("sec-fetch-site", "cross-site"), ("origin", "https://a.example")];
        assert_eq!(code(&open, here, &cross), 403);
        let cors = |origin: &str| Access { cors: Some(origin.into()), ..Access::default() };
        assert_eq!(
            (code(&cors("https://a.example"), here, &cross), code(&cors("https://b.example"), here, &cross)),
            (200, 403)
        );
        assert_eq!(code(&open, here, &[("sec-fetch-site", "same-origin")]), 200);
        let secret = Access { token: Some("s3cret".into()), ..Access::default() };
        for (given, want) in [("Bearer s3cret", 200), ("Bearer s3creT", 401), ("s3cret", 401), ("", 401)] {
            assert_eq!(code(&secret, here, &[("authorization", given)]), want, "{given}");
        }
        assert!(refuse(&secret, here, &asked("/health", Version::HTTP_10, &[])).is_none());
    }
}
