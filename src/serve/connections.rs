//! Connections: how many there may be, how long they may take, and how they end.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::ConnectInfo;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::{AbortHandle, JoinSet};
use tokio_io_timeout::TimeoutStream;
use tower_service::Service as _;

/// Time for a request's head, and between two requests of a connection, where the whole request has no less.
pub(super) const HEAD: Duration = Duration::from_secs(10);
/// Time in which a caller must take some of an answer.
const WRITE: Duration = Duration::from_secs(30);
/// Connections beyond the limit that may still ask for health, or hear that there are too many. One more closes the oldest of them.
const CROWD: usize = 64;
/// Size of a request's head at most.
const HEAD_BYTES: usize = 64 * 1024;

/// What serves the connections.
pub(super) struct Pages {
    /// Everything.
    pub all: Router,
    /// Beyond the limit: health, and 503 for the rest.
    pub crowded: Router,
}

/// Takes connections until `stop` ends, then lets those that are there finish within `grace`; `hurry` ends that wait. `head`: time
/// for a request's head. Gives whether all of them finished.
pub(super) async fn run(
    listener: TcpListener,
    pages: Pages,
    limit: usize,
    head: Duration,
    stop: impl Future<Output = ()>,
    grace: Duration,
    hurry: impl Future<Output = ()>,
) -> bool {
    let room = Arc::new(Semaphore::new(limit));
    let mut crowd: VecDeque<AbortHandle> = VecDeque::new();
    let (tell, told) = watch::channel(false);
    let mut tasks = JoinSet::new();
    tokio::pin!(stop);
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(_) = tasks.join_next(), if !tasks.is_empty() => continue,
            () = &mut stop => break,
        };
        let (stream, peer) = match accepted {
            Ok(found) => found,
            Err(e) => {
                // Out of descriptors, or a connection that is gone already.
                tracing::debug!("accept: {e}");
                tokio::time::sleep(Duration::from_millis(20)).await;
                continue;
            }
        };
        match room.clone().try_acquire_owned() {
            Ok(permit) => {
                tasks.spawn(serve(stream, peer, pages.all.clone(), Some(permit), head, told.clone()));
            }
            Err(_) => {
                // Whoever sends half a head and waits gives way to who asks now.
                crowd.retain(|task| !task.is_finished());
                if crowd.len() >= CROWD
                    && let Some(oldest) = crowd.pop_front()
                {
                    oldest.abort();
                }
                crowd.push_back(tasks.spawn(serve(stream, peer, pages.crowded.clone(), None, head / 5, told.clone())));
            }
        }
    }
    drop((listener, pages));
    let _ = tell.send(true);
    let finish = async { while tasks.join_next().await.is_some() {} };
    let ended = tokio::select! {
        () = finish => true,
        () = tokio::time::sleep(grace) => false,
        () = hurry => false,
    };
    tasks.abort_all();
    ended
}

async fn serve(
    stream: TcpStream,
    peer: SocketAddr,
    pages: Router,
    room: Option<OwnedSemaphorePermit>,
    head: Duration,
    mut told: watch::Receiver<bool>,
) {
    let keep = room.is_some();
    let _ = stream.set_nodelay(true);
    let mut stream = TimeoutStream::new(stream);
    stream.set_write_timeout(Some(WRITE));
    let answer = service_fn(move |mut request: hyper::Request<hyper::body::Incoming>| {
        request.extensions_mut().insert(ConnectInfo(peer));
        pages.clone().call(request)
    });
    let mut builder = http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(head).keep_alive(keep);
    builder.max_buf_size(HEAD_BYTES);
    let connection = builder.serve_connection(TokioIo::new(Box::pin(stream)), answer);
    tokio::pin!(connection);
    let result = tokio::select! {
        result = connection.as_mut() => result,
        _ = told.changed() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(e) = result {
        tracing::debug!("{peer}: {e}");
    }
}
