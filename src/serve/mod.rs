//! Students behind HTTP: `/sample`, `/health`, `/metrics`, and the Open Inference Protocol (`/v2`). What a team puts behind its balancer,
//! and strangers send anything to.

mod ask;
mod batcher;
mod body;
mod budget;
mod connections;
mod guard;
mod metrics;
mod model;
mod openapi;
mod process;
mod v2;

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes, to_bytes};
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::middleware;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use serde_json::json;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

use crate::error::{Error, Result};
use crate::io::images::{encode_png, quantise};
use crate::io::npy;
use crate::report::grid;
use crate::runtime::student::{Student, StudentInfo};
use crate::tensor::HostTensor;

use ask::{Ask, Most, Wanted};
use batcher::Limits;
use budget::{Budget, Held};
use connections::Pages;
pub use guard::Access;
use metrics::Metrics;
use model::Models;

/// Bodies that are read out of their form at the same time.
const READERS: usize = 2;
/// A body must come at this many bytes a second.
const BODY_RATE: u64 = 32 * 1024;
/// Characters of an error's text at most: names that a caller sent may be long.
const ERROR_CHARS: usize = 500;

/// How to serve.
#[derive(Debug, Clone)]
pub struct ServeOptions {
    /// Address and port to listen on; port 0 lets the system choose a free one.
    pub address: SocketAddr,
    /// Images a call of the network, and a request, at most.
    pub batch: usize,
    /// Requests that may wait; further ones get 503.
    pub queue: usize,
    /// Largest body, bytes.
    pub body: usize,
    /// Bytes that bodies, arrays and answers of all requests in flight may take together; further requests get 503.
    pub memory: u64,
    /// Connections at a time; beyond it only health is answered.
    pub connections: usize,
    /// Time from a request's head to its answer, at most; for the head itself too, where this is less than 10 s.
    pub timeout: Duration,
    /// How long requests are still taken after the signal to stop; `/health` reports the stop meanwhile.
    pub drain: Duration,
    /// How long connections may then take to finish before they are closed.
    pub grace: Duration,
    /// Who may ask.
    pub access: Access,
}

struct Service {
    models: Models,
    options: ServeOptions,
    budget: Budget,
    readers: Semaphore,
    metrics: Arc<Metrics>,
    stopping: AtomicBool,
}

/// Serves until the process is told to stop (SIGINT, SIGTERM): then, at once or after [`ServeOptions::drain`], no connection is
/// taken any more, and what was asked for is answered within [`ServeOptions::grace`]. A second word to stop ends at once. `ready`
/// hears the address in use. `students`: each with the name by which it is asked for.
///
/// Errors: an address that is taken; a student that does not run; two of one name.
pub fn serve(students: Vec<(String, Student)>, options: ServeOptions, ready: impl FnOnce(SocketAddr)) -> Result<()> {
    let metrics = Arc::new(Metrics::default());
    let bytes = usize::try_from(options.memory / 4 / students.len().max(1) as u64).unwrap_or(usize::MAX);
    let limits = Limits { batch: options.batch, queue: options.queue, bytes };
    let (models, threads) = Models::start(students, limits, &metrics)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let ended = runtime.block_on(async move {
        let (address, limit) = (options.address, options.connections);
        let head = connections::HEAD.min(options.timeout);
        let (drain, grace) = (options.drain, options.grace);
        let listener = TcpListener::bind(address).await.map_err(|e| {
            Error::io(format!("cannot listen on {address}: {e}")).hint("choose another with --host and --port")
        })?;
        ready(listener.local_addr()?);
        let service = Arc::new(Service {
            models,
            budget: Budget::new(options.memory),
            readers: Semaphore::new(READERS),
            metrics,
            options,
            stopping: AtomicBool::new(false),
        });
        let pages = pages(&service);
        // The signals in their order: the first asks to stop, the second not to wait.
        let (first, mut heard) = tokio::sync::watch::channel(0);
        tokio::spawn(async move {
            loop {
                stopped().await;
                first.send_modify(|n| *n += 1);
            }
        });
        let mut again = heard.clone();
        let hurry = async move { drop(again.wait_for(|n| *n >= 2).await.map(|_| ())) };
        let stop = async move {
            let _ = heard.wait_for(|n| *n >= 1).await.map(|_| ());
            service.stopping.store(true, Ordering::Relaxed);
            // The service, and with it the network's thread, ends with the last connection.
            drop(service);
            tokio::select! {
                () = tokio::time::sleep(drain) => {}
                _ = heard.wait_for(|n| *n >= 2) => {}
            }
        };
        Ok::<_, Error>(connections::run(listener, pages, limit, head, stop, grace, hurry).await)
    })?;
    runtime.shutdown_background();
    if !ended {
        // Somebody did not finish in time: the network's call for them is not waited for.
        return Ok(());
    }
    // All senders are gone: the networks' threads finish what waits and end.
    threads.into_iter().try_for_each(|t| t.join().map_err(|_| Error::backend("a network's thread panicked")))
}

fn pages(service: &Arc<Service>) -> Pages {
    let health = Router::new()
        .route("/health", get(health))
        .route("/v2/health/live", get(live))
        .route("/v2/health/ready", get(ready_for_more));
    let all = health
        .clone()
        .route("/sample", get(sample).post(sample))
        .route("/metrics", get(page))
        .route("/openapi.json", get(openapi::page))
        .merge(v2::pages())
        .fallback(unknown)
        .method_not_allowed_fallback(method);
    let finished = |pages: Router<Arc<Service>>| {
        pages.layer(middleware::from_fn_with_state(service.clone(), guard::guard)).with_state(service.clone())
    };
    Pages { all: finished(all), crowded: finished(health.fallback(crowded)) }
}

async fn stopped() {
    #[cfg(unix)]
    {
        use tokio::signal::unix::{SignalKind, signal};
        if let (Ok(mut int), Ok(mut term)) = (signal(SignalKind::interrupt()), signal(SignalKind::terminate())) {
            tokio::select! {
                _ = int.recv() => {}
                _ = term.recv() => {}
            }
            return;
        }
    }
    let _ = tokio::signal::ctrl_c().await;
}

async fn health(State(s): State<Arc<Service>>) -> Response {
    let stopping = s.stopping.load(Ordering::Relaxed);
    let (code, status) = if stopping { (StatusCode::SERVICE_UNAVAILABLE, "stopping") } else { (StatusCode::OK, "ok") };
    let mut body = json!({ "status": status, "version": env!("CARGO_PKG_VERSION"), "max_images": s.options.batch,
        "max_body_bytes": s.options.body });
    let all: Vec<serde_json::Value> = s.models.all().iter().map(|m| m.described()).collect();
    // What one student is stands with the rest; of several each stands for itself.
    if let ([serde_json::Value::Object(one)], Some(whole)) = (&all[..], body.as_object_mut()) {
        whole.extend(one.iter().filter(|(key, _)| *key != "name").map(|(k, v)| (k.clone(), v.clone())));
    }
    body["models"] = all.into();
    answer(code, "application/json", body.to_string().into_bytes().into())
}

/// The process lives, whether or not it takes more.
async fn live() -> StatusCode {
    StatusCode::OK
}

async fn ready_for_more(State(s): State<Arc<Service>>) -> StatusCode {
    if s.stopping.load(Ordering::Relaxed) { StatusCode::SERVICE_UNAVAILABLE } else { StatusCode::OK }
}

async fn page(State(s): State<Arc<Service>>) -> Response {
    match s.metrics.text() {
        Ok(text) => answer(StatusCode::OK, metrics::CONTENT_TYPE, text.into_bytes().into()),
        Err(_) => failure(StatusCode::INTERNAL_SERVER_ERROR, "the metrics cannot be written"),
    }
}

async fn unknown() -> Response {
    failure(
        StatusCode::NOT_FOUND,
        "no such page: there are /sample, /health, /metrics, /openapi.json, /v2/health/live, /v2/health/ready and /v2/models/NAME",
    )
}

async fn method() -> Response {
    failure(
        StatusCode::METHOD_NOT_ALLOWED,
        "this page takes GET, /sample POST too, and /v2/models/NAME/infer only POST",
    )
}

async fn crowded() -> Response {
    busy("connections", "too many connections; try again")
}

/// `reason`: under which the refusal is counted.
fn busy(reason: &'static str, text: &str) -> Response {
    let mut response = rejected(reason, failure(StatusCode::SERVICE_UNAVAILABLE, text));
    response.headers_mut().insert(header::RETRY_AFTER, header::HeaderValue::from_static("1"));
    response
}

/// `GET` draws the noise from the seed; `POST` may bring it, and brings rows for conditions that are no classes: see
/// [`body::Given`].
async fn sample(
    State(s): State<Arc<Service>>,
    headers: HeaderMap,
    query: std::result::Result<Query<Wanted>, QueryRejection>,
    body: Body,
) -> Response {
    let limit = s.options.timeout;
    match tokio::time::timeout(limit, answered(s, headers, query, body)).await {
        Ok(Ok(response) | Err(response)) => response,
        Err(_) => late(limit),
    }
}

/// There was no answer in time.
fn late(limit: Duration) -> Response {
    let text = format!("no answer within {} s", limit.as_secs_f64());
    rejected("timeout", failure(StatusCode::GATEWAY_TIMEOUT, &text))
}

type Answer = std::result::Result<Response, Response>;

#[allow(clippy::result_large_err, reason = "one a request, and the error is its answer")]
async fn answered(
    s: Arc<Service>,
    headers: HeaderMap,
    query: std::result::Result<Query<Wanted>, QueryRejection>,
    body: Body,
) -> Answer {
    let plain = |e: QueryRejection| e.body_text().replacen("Failed to deserialize query string", "the query", 1);
    let Query(wanted) = query.map_err(|e| failure(StatusCode::BAD_REQUEST, &plain(e)))?;
    let model = s.models.chosen(wanted.model.as_deref())?;
    let (body, held) = received(&s, &headers, body).await?;
    let full = || busy("memory", "too much is in flight; try again");
    let held = held.resize(&s.budget, ask::bytes_to_read(&body, s.options.body)).ok_or_else(full)?;
    let ended = |_| failure(StatusCode::SERVICE_UNAVAILABLE, "the server ends");
    // Off the threads that answer health; a few at a time.
    let permit = s.readers.acquire().await.map_err(|_| busy("stopping", "the server ends"))?;
    let of = model.clone();
    let most = Most { images: s.options.batch, body: s.options.body };
    let read = move || ask::read(&of.info, most, &headers, &wanted, &body);
    let ask = tokio::task::spawn_blocking(read).await.map_err(ended)??;
    drop(permit);
    let held = held.resize(&s.budget, ask.bytes(&model.info)).ok_or_else(full)?;
    let Ask { inputs, count, npy } = ask;
    let samples = model.sample(inputs, count).await?;
    let made = tokio::task::spawn_blocking(move || write(&samples, &model.info, npy)).await.map_err(ended)?;
    let (kind, bytes) = made.map_err(|e| failure(StatusCode::INTERNAL_SERVER_ERROR, &e.to_string()))?;
    Ok(answer(StatusCode::OK, kind, held.keep(bytes)))
}

/// For the fuzz target of requests: what one of this query, Accept header and body asks for (images, bytes that it holds), or the status
/// of the answer. `most`: bytes of a body, images of a request.
#[cfg(fuzzing)]
pub fn read_request(
    info: &StudentInfo,
    most: (usize, usize),
    query: &str,
    accept: &str,
    body: &Bytes,
) -> std::result::Result<(usize, u64), u16> {
    let bad = StatusCode::BAD_REQUEST.as_u16();
    let uri = format!("/sample?{query}").parse().map_err(|_| bad)?;
    let Query(wanted) = Query::<Wanted>::try_from_uri(&uri).map_err(|_| bad)?;
    let mut headers = HeaderMap::new();
    headers.insert(header::ACCEPT, accept.parse().map_err(|_| bad)?);
    let most = Most { images: most.1, body: most.0 };
    let ask = ask::read(info, most, &headers, &wanted, body).map_err(|answer| answer.status().as_u16())?;
    Ok((ask.count, ask.bytes(info)))
}

/// The body, where it is not too long, comes in time and has room, with the bytes that it holds.
async fn received(s: &Service, headers: &HeaderMap, body: Body) -> std::result::Result<(Bytes, Held), Response> {
    let limit = s.options.body;
    let too_long = || {
        let text = format!("the body has more than {limit} bytes");
        rejected("body_size", failure(StatusCode::PAYLOAD_TOO_LARGE, &text))
    };
    let length = headers.get(header::CONTENT_LENGTH).and_then(|v| v.to_str().ok()?.parse::<u64>().ok());
    // (One that does not say its length may be as long as any.)
    let unknown = headers.contains_key(header::TRANSFER_ENCODING).then_some(limit as u64);
    let length = length.or(unknown).unwrap_or(0);
    if length > limit as u64 {
        return Err(too_long());
    }
    let held = s.budget.take(length).ok_or_else(|| busy("memory", "too much is in flight; try again"))?;
    let time = connections::HEAD + Duration::from_secs(length / BODY_RATE);
    match tokio::time::timeout(time, to_bytes(body, limit)).await {
        Ok(Ok(bytes)) => Ok((bytes, held)),
        Ok(Err(_)) if unknown.is_some() => Err(too_long()),
        Ok(Err(_)) => Err(failure(StatusCode::BAD_REQUEST, "the body ended before its Content-Length")),
        Err(_) => {
            let text = format!("the body did not come within {} s", time.as_secs());
            Err(rejected("slow_body", failure(StatusCode::REQUEST_TIMEOUT, &text)))
        }
    }
}

/// Content type and body of an answer.
fn write(samples: &HostTensor, info: &StudentInfo, as_npy: bool) -> Result<(&'static str, Vec<u8>)> {
    if as_npy {
        let mut out = Vec::new();
        npy::write_to(&mut out, samples)?;
        return Ok(("application/x-npy", out));
    }
    let png = match (samples.shape().first(), info.range, info.image_shape()) {
        (Some(1), Some(range), Some(shape)) if matches!(shape[0], 1 | 3) => {
            let bytes: Vec<u8> = samples.to_f64().iter().map(|&x| quantise(x, range)).collect();
            encode_png(&bytes, shape)?
        }
        _ => grid::png(samples, info.range, None)?,
    };
    Ok(("image/png", png))
}

fn answer(status: StatusCode, kind: &'static str, body: Bytes) -> Response {
    (status, [(header::CONTENT_TYPE, kind)], body).into_response()
}

/// Why a request was refused that another time, or from another caller, would have been answered.
#[derive(Debug, Clone, Copy)]
struct Rejected(&'static str);

/// Has a refusal counted under this reason.
fn rejected(reason: &'static str, mut response: Response) -> Response {
    response.extensions_mut().insert(Rejected(reason));
    response
}

fn failure(status: StatusCode, text: &str) -> Response {
    let text = match text.char_indices().nth(ERROR_CHARS) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text.to_owned(),
    };
    answer(status, "application/json", json!({ "error": text }).to_string().into_bytes().into())
}
