//! `disback serve`: students behind HTTP.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use serde_json::json;

use super::Globals;
use super::engine::EngineArgs;
use crate::error::{Context, Error, Result};
use crate::memory;
use crate::runtime::student::Student;
use crate::serve::{Access, ServeOptions, serve};
use crate::shown::say;

/// Serve students over HTTP: GET /sample?seed=1&n=4&classes=3 gives a PNG (format=npy: the array), /health, /metrics, and the
/// Open Inference Protocol: POST /v2/models/NAME/infer.
#[derive(Debug, Args)]
pub struct ServeArgs {
    /// student.onnx, or several; NAME=FILE gives one another name than the file's. Of several, /sample wants model=NAME.
    #[arg(required = true, num_args = 1.., value_name = "[NAME=]FILE")]
    students: Vec<String>,
    /// Name of a single model (/v2/models/NAME/infer) [default: the file's name without its ending].
    #[arg(long, value_name = "NAME")]
    model_name: Option<String>,
    /// Address to listen on. The default takes calls from this machine only.
    #[arg(long, default_value = "127.0.0.1")]
    host: IpAddr,
    /// Port; 0 takes a free one and says which.
    #[arg(long, default_value_t = 8080)]
    port: u16,
    /// Images a call of the network, and a request, at most.
    #[arg(long, default_value_t = 64)]
    max_batch: usize,
    /// Requests that may wait; further ones get 503. What waits while the network is busy shares its next call.
    #[arg(long, default_value_t = 256)]
    queue: usize,
    /// MiB that the bodies, arrays and answers of all requests may take together; further ones get 503. Without it, a quarter of
    /// what is free, the memory limit of the control group counted.
    #[arg(long, value_name = "MIB")]
    max_memory: Option<u64>,
    /// Connections at a time; beyond it only health is answered. Without it, as many as open files allow, at most 1024.
    #[arg(long)]
    max_connections: Option<usize>,
    /// Seconds from a request's head to its answer, at most; the head itself must come within 10 s, or this where it is less.
    #[arg(long, default_value_t = 60.0)]
    timeout: f64,
    /// Largest body of a request, KiB.
    #[arg(long, default_value_t = 16 * 1024)]
    max_body: usize,
    /// Seconds for which requests are still taken once the server was told to stop, while /health answers 503: long enough for
    /// a balancer to see it.
    #[arg(long, default_value_t = 0)]
    drain: u64,
    /// Seconds that connections may then take to finish before they are closed.
    #[arg(long, default_value_t = 10)]
    grace: u64,
    /// A name by which callers reach this server (the Host of their requests), beside its address; may be repeated. On a loopback
    /// address other names are refused.
    #[arg(long, value_name = "NAME")]
    host_name: Vec<String>,
    /// Origin whose web pages may ask, such as https://example.org. Without it, pages of other sites are refused.
    #[arg(long, value_name = "ORIGIN")]
    cors: Option<String>,
    /// File with the token that callers must send as `Authorization: Bearer TOKEN` for everything but health: a regular one of at
    /// most 64 KiB.
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// Write a line a request to standard error: time, caller, method, page, status, milliseconds.
    #[arg(long)]
    access_log: bool,
    #[command(flatten)]
    engine: EngineArgs,
}

/// Most bytes of the file with the token.
const TOKEN: u64 = 64 << 10;

/// The token in a file: its first line.
fn token(path: &Path) -> Result<String> {
    let text = crate::files::read_text(path, TOKEN).with_context(|| path.display().to_string())?;
    let token = text.lines().next().unwrap_or("").trim();
    if token.is_empty() {
        return Err(Error::usage(format!(
            "{}: the file's first line is empty, so that there is no token",
            path.display()
        )));
    }
    Ok(token.to_owned())
}

/// The name and the file of a student, as the command line says them.
fn named(text: &str) -> (String, PathBuf) {
    let stem = |path: &Path| path.file_stem().map(|s| s.to_string_lossy().into_owned()).unwrap_or_default();
    match text.split_once('=') {
        // (A file may have the sign in its name.)
        Some((name, file)) if !Path::new(text).exists() && !name.contains(['/', '\\']) => {
            (name.to_owned(), file.into())
        }
        _ => (stem(Path::new(text)), text.into()),
    }
}

/// A quarter of the memory that is free.
fn free_quarter() -> u64 {
    memory::free().map_or(1 << 30, |free| free.bytes / 4)
}

/// Connections that leave descriptors for the rest of the process.
fn connections() -> usize {
    let text = std::fs::read_to_string("/proc/self/limits").unwrap_or_default();
    let line = text.lines().find_map(|l| l.strip_prefix("Max open files"));
    let files = line.and_then(|l| l.split_whitespace().next()?.parse::<usize>().ok()).unwrap_or(1024);
    (files / 2).clamp(1, 1024)
}

/// Runs the command until it is told to stop.
pub fn run(args: &ServeArgs, globals: Globals) -> Result<ExitCode> {
    for (name, value) in [
        ("--max-batch", args.max_batch),
        ("--queue", args.queue),
        ("--max-body", args.max_body),
        ("--max-connections", args.max_connections.unwrap_or(1)),
    ] {
        if value == 0 {
            return Err(Error::usage(format!("{name} 0: expected 1 or more")));
        }
    }
    let mut files: Vec<(String, PathBuf)> = args.students.iter().map(|text| named(text)).collect();
    match (&args.model_name, &mut files[..]) {
        (Some(name), [(one, _)]) => one.clone_from(name),
        (Some(_), _) => {
            return Err(Error::usage("--model-name names a single student")
                .hint("of several, each has its file's name, or that of NAME=FILE"));
        }
        (None, _) => {}
    }
    let engine = args.engine.options(&[args.max_batch])?;
    let open = |(name, path): (String, PathBuf)| Ok((name, Student::open(&path, &engine)?));
    let students = files.into_iter().map(open).collect::<Result<Vec<_>>>()?;
    let engines: Vec<(String, String)> = students.iter().map(|(n, s)| (n.clone(), s.engine_name())).collect();
    let options = ServeOptions {
        address: SocketAddr::new(args.host, args.port),
        batch: args.max_batch,
        queue: args.queue,
        body: args.max_body.saturating_mul(1024),
        memory: args.max_memory.map_or_else(free_quarter, |mib| mib.saturating_mul(1 << 20)),
        connections: args.max_connections.unwrap_or_else(connections),
        timeout: Duration::try_from_secs_f64(args.timeout)
            .ok()
            .filter(|time| !time.is_zero())
            .ok_or_else(|| Error::usage(format!("--timeout {}: expected seconds above 0", args.timeout)))?,
        drain: Duration::from_secs(args.drain),
        grace: Duration::from_secs(args.grace),
        access: Access {
            hosts: args.host_name.clone(),
            cors: args.cors.clone(),
            token: args.token_file.as_deref().map(token).transpose()?,
            log: args.access_log,
        },
    };
    serve(students, options, |address| {
        if globals.json {
            let models: Vec<_> = engines.iter().map(|(n, e)| json!({ "name": n, "engine": e })).collect();
            let engine = &engines[0].1;
            println!("{}", json!({ "ok": true, "listening": address.to_string(), "engine": engine, "models": models }));
        } else if !globals.quiet {
            for (name, engine) in &engines {
                let which = if engines.len() > 1 { format!("?model={name}") } else { String::new() };
                say!("{engine} on http://{address}/sample{which}");
            }
            say!("Ctrl-C stops");
        }
    })?;
    Ok(ExitCode::SUCCESS)
}
