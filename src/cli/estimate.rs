//! `disback estimate`: memory and arithmetic of a run, before it is started or bought.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use clap::Args;
use serde_json::json;
use tch::Device;

use super::Globals;
use super::distill::{DegradeOptions, MethodOptions};
use super::teacher::TeacherArgs;
use crate::distill::estimate::{StageCost, estimate};
use crate::distill::{Config, plan};
use crate::error::{Error, Result};
use crate::inspect;
use crate::run::{self, origin, ranks};
use crate::shown::say;
use crate::torch::device;
use crate::torch::training::Hollow;

/// Estimate memory and arithmetic of a run, for this machine or one that is not at hand.
#[derive(Debug, Args)]
pub struct EstimateArgs {
    #[command(flatten)]
    pub teacher: TeacherArgs,
    /// Configuration file of the run.
    #[arg(short, long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Any key of the configuration, as in memory.activations_mib=8000.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub sets: Vec<String>,
    /// Images a forward pass. [batch]
    #[arg(long)]
    pub batch: Option<usize>,
    #[command(flatten)]
    pub degrade: DegradeOptions,
    #[command(flatten)]
    pub method: MethodOptions,
    /// Processes that share the run: what each of them takes.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub world: usize,
    /// What the device computes of this network's arithmetic in a second, in 10^12 floating-point operations; gives the
    /// time of an iteration.
    #[arg(long, value_name = "TFLOPS")]
    pub tflops: Option<f64>,
}

/// Runs the command.
pub fn run(args: &EstimateArgs, globals: Globals) -> Result<ExitCode> {
    if let Some(rate) = args.tflops
        && !(rate > 0.0 && rate.is_finite())
    {
        return Err(Error::usage(format!("--tflops {rate}: expected a number above 0")));
    }
    if !(1..=1 << 16).contains(&args.world) {
        return Err(Error::usage(format!("--world {}: expected 1 to 65536 processes", args.world)));
    }
    let mut sets: Vec<String> = args.batch.iter().map(|b| format!("batch={b}")).collect();
    sets.extend(args.degrade.sets().into_iter().chain(args.method.sets()));
    sets.extend(args.sets.iter().cloned());
    let config = args.teacher.reading.with_card(Config::resolve(args.config.as_deref(), &sets)?);
    device::set_threads(config.threads);
    // The teacher's weights are looked at, and not held.
    let hollow = Hollow::new(false);
    let teacher = args.teacher.load(&config, Device::Cpu)?;
    let card = Arc::new(teacher.card.card.clone());
    // Multiply-adds of one image; none where a size is free.
    let macs = inspect::cost(&teacher.network, Some(&card), 1).ok().and_then(|c| c.macs_of_one());
    let denoiser = run::denoiser(&teacher, &config)?;
    drop(hollow);
    // A student of its own is tried out.
    let file = origin::load(&config, &teacher, Device::Cpu)?;
    let given = origin::given(file.as_ref(), &denoiser, &config)?;
    let student_macs = match &file {
        Some(file) => inspect::cost(&file.network, file.card(), 1).ok().and_then(|c| c.macs_of_one()),
        None => macs,
    };
    let guide_macs = match run::teacher::weaker(&teacher, &config)? {
        Some(weaker) => inspect::cost(&weaker.network, Some(&weaker.card.card), 1).ok().and_then(|c| c.macs_of_one()),
        None => Some(0),
    };
    ranks::check_split(args.world, &config)?;
    let found = estimate(&denoiser, given.as_ref(), &config, args.world)?;
    // Two operations a multiply-add, the classifier-free half of guidance counted in the passes.
    let flops = |s: &StageCost| {
        let guide = if s.guide_passes > 0.0 { guide_macs? as f64 * s.guide_passes } else { 0.0 };
        let macs = macs? as f64 * s.passes + student_macs? as f64 * s.student_passes + guide;
        Some(2.0 * macs * config.batch as f64)
    };
    let seconds = |s: &StageCost| Some(flops(s)? / (args.tflops? * 1e12));
    let stages = [("degrade", &found.degrade), ("backtrack", &found.backtrack)];
    let (steps, iterations) = (plan::steps(&config), config.backtrack.updates * config.backtrack.ratio);
    if globals.json {
        let mut value = json!({
            "world": found.world, "batch": found.batch, "parameters": found.parameters, "student": origin::describe(&config),
            "student_parameters": found.student_parameters, "guidance_by": config.weaker(),
        });
        for (name, s) in stages {
            value[name] = serde_json::to_value(s).map_err(|e| Error::io(e.to_string()))?;
            value[name]["flops"] = json!(flops(s));
            value[name]["seconds"] = json!(seconds(s));
        }
        (value["degrade"]["iterations"], value["backtrack"]["iterations"]) = (json!(steps), json!(iterations));
        println!("{}", serde_json::to_string_pretty(&value).map_err(|e| Error::io(e.to_string()))?);
        return Ok(ExitCode::SUCCESS);
    }
    let mib = |b: u64| format!("{:.0} MiB", b as f64 / (1 << 20) as f64);
    say!("{} trained parameters, batch {}", found.parameters, found.batch);
    if found.world > 1 {
        let keeps =
            if config.distributed.shares_states() { "a share of the moments and averages" } else { "everything" };
        say!("each of {} processes, which keeps {keeps} (distributed.shard):", found.world);
    }
    if given.is_some() {
        say!("student: {}, {} parameters", origin::describe(&config), found.student_parameters);
    }
    if let (Some(path), Some(weaker)) = (config.weaker(), denoiser.weaker()) {
        say!("guided by {}, {} parameters", path.display(), weaker.params().elements());
    }
    let mut table =
        super::table(["stage", "weights", "gradients", "optimiser", "activations", "in all", "arithmetic", "time"]);
    for (name, s) in stages {
        table.add_row([
            name.to_owned(),
            mib(s.weights),
            mib(s.gradients),
            mib(s.optimizer),
            mib(s.activations),
            mib(s.total),
            flops(s).map_or("?".into(), |f| format!("{:.4} TFLOP an iteration", f / 1e12)),
            seconds(s).map_or("-".into(), |t| format!("{t:.4} s an iteration")),
        ]);
    }
    say!("{table}");
    let auto = config.degrade.nodes.is_auto();
    say!(
        "iterations: {}{steps} in stage 1{}, {iterations} in stage 2",
        if auto { "at most " } else { "" },
        if auto { format!(" (degrade.nodes is `auto`: {})", plan::limit(&config)) } else { String::new() }
    );
    if !config.gan.data.is_empty() {
        say!("without what the discriminator takes");
    }
    say!("tensors alone; a CUDA context and its libraries take about another 500 MiB");
    Ok(ExitCode::SUCCESS)
}
