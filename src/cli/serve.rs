//! `disback serve`: a student behind HTTP.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use serde_json::json;

use super::Globals;
use super::engine::EngineArgs;
use crate::error::{Error, Result};
use crate::runtime::student::Student;
use crate::serve::{ServeOptions, serve};

/// Serve a student over HTTP: GET /sample?seed=1&n=4&classes=3 gives a PNG (format=npy: the array), /health, /metrics.
#[derive(Debug, Args)]
pub struct ServeArgs {
    /// student.onnx.
    student: PathBuf,
    /// Address to listen on. The default takes calls from this machine only.
    #[arg(long, default_value = "127.0.0.1")]
    host: IpAddr,
    /// Port; 0 takes a free one and says which.
    #[arg(long, default_value_t = 8080)]
    port: u16,
    /// Images a call of the network, and a request, at most.
    #[arg(long, default_value_t = 64)]
    max_batch: usize,
    /// Milliseconds that a request waits at most for others to share its call.
    #[arg(long, default_value_t = 5)]
    max_wait: u64,
    /// Requests that may wait; further ones get 503.
    #[arg(long, default_value_t = 256)]
    queue: usize,
    /// Largest body of a request, KiB.
    #[arg(long, default_value_t = 16 * 1024)]
    max_body: usize,
    /// Seconds for which requests are still taken once the server was told to stop, while /health answers 503: long enough for
    /// a balancer to see it.
    #[arg(long, default_value_t = 0)]
    drain: u64,
    #[command(flatten)]
    engine: EngineArgs,
}

/// Runs the command until it is told to stop.
pub fn run(args: &ServeArgs, globals: Globals) -> Result<ExitCode> {
    for (name, value) in [("--max-batch", args.max_batch), ("--queue", args.queue), ("--max-body", args.max_body)] {
        if value == 0 {
            return Err(Error::usage(format!("{name} 0: expected 1 or more")));
        }
    }
    let student = Student::open(&args.student, &args.engine.options(&[args.max_batch])?)?;
    let engine = student.engine_name();
    let options = ServeOptions {
        address: SocketAddr::new(args.host, args.port),
        batch: args.max_batch,
        wait: Duration::from_millis(args.max_wait),
        queue: args.queue,
        body: args.max_body.saturating_mul(1024),
        drain: Duration::from_secs(args.drain),
    };
    serve(student, options, |address| {
        if globals.json {
            println!("{}", json!({ "ok": true, "listening": address.to_string(), "engine": engine }));
        } else if !globals.quiet {
            println!("{engine} on http://{address}/sample (Ctrl-C stops)");
        }
    })?;
    Ok(ExitCode::SUCCESS)
}
