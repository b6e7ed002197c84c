//! `summary.json`: what a run was and what it cost.

use serde_json::{Value, json};
use tch::Device;

use crate::distill::config::NodeCount;
use crate::distill::{Config, RunDir, metrics};
use crate::error::{Error, Result};
use crate::run::divergence;
use crate::run::origin::{StudentOrigin, describe, method, objective_name};
use crate::run::request::Request;
use crate::torch::{Forward, device, shim};

/// Nodes beside the teacher of the run's trajectory.
fn recorded(run: &RunDir) -> Option<usize> {
    let index = crate::files::read_inside(run.path(), "trajectory/trajectory.json", crate::files::JSON).ok()?;
    let nodes = serde_json::from_slice::<Value>(&index).ok()?["nodes"].as_array()?.len();
    nodes.checked_sub(1)
}

/// Most bytes that this process has held in memory.
fn peak_host() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix("VmHWM:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}

/// `summary.json`: what the run was and what it cost. Keys of others (evaluations) stay.
/// Gives how many optimiser steps were skipped. `looking`: seconds that this process spent on samples, measures and losses by level.
pub(super) fn write_summary(
    origin: StudentOrigin,
    request: &Request,
    config: &Config,
    run: &RunDir,
    (device, looking): (Device, f64),
) -> Result<u64> {
    let teacher = &request.teacher;
    let path = run.summary();
    let old = crate::files::read_inside(run.path(), "summary.json", crate::files::JSON)
        .ok()
        .and_then(|b| serde_json::from_slice::<Value>(&b).ok());
    let mut summary = old.filter(Value::is_object).unwrap_or_else(|| json!({}));
    let rows = metrics::read(&run.metrics())?;
    let last = |stage: &str| rows.iter().rev().find(|r| r.stage.name() == stage);
    let seconds = |stage: &str| last(stage).map_or(0.0, |r| r.seconds);
    let skipped = ["degrade", "backtrack"].iter().filter_map(|stage| last(stage)).map(|r| r.skipped).sum::<u64>();
    // (What `auto` has chosen stands in the trajectory.)
    let nodes = match config.degrade.nodes {
        NodeCount::Count(nodes) => Some(nodes),
        NodeCount::Auto => recorded(run),
    };
    summary["run"] = json!({
        "command": request.command,
        // Where it lies from anywhere.
        "teacher": teacher.canonicalize().unwrap_or_else(|_| teacher.clone()),
        "method": method(config),
        "objective": objective_name(config),
        "guidance": config.guidance,
        "guidance_by": config.weaker(),
        "guidance_rescale": config.guidance_rescale,
        "nodes": nodes,
        "generator_updates": config.backtrack.updates,
        "images_degrade": last("degrade").map_or(0, |r| r.images),
        "images_backtrack": last("backtrack").map_or(0, |r| r.images),
        "seconds_degrade": seconds("degrade"),
        "seconds_backtrack": seconds("backtrack"),
        "seconds_looking": looking,
        "skipped_steps": skipped,
        "warnings": divergence::read(run.path()),
        "parameters": origin.teacher.network.params().elements(),
        "teacher_hash": origin.teacher.hash.clone(),
        "student": describe(config),
        "student_parameters": origin.file.map_or(origin.teacher.network.params(), |f| f.network.params()).elements(),
        "student_hash": origin.file.map(|f| f.hash.clone()),
        "device": device::name(device),
        "peak_host_bytes": peak_host(),
        "peak_device_bytes": shim::memory(device)?.map(|m| m.peak),
    });
    let text = serde_json::to_vec_pretty(&summary).map_err(|e| Error::io(e.to_string()))?;
    crate::files::write_atomic(&path, &text)?;
    Ok(skipped)
}
