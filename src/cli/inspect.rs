//! `disback inspect`: what an ONNX file holds and what would become of it.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use clap::Args;
use serde_json::json;

use crate::cli::Globals;
use crate::cli::card_args::CardArgs;
use crate::diffusion::{Denoiser, ResolvedCard};
use crate::distill::gan::taps::{self, Tap};
use crate::error::{Context, Error, Kind, Result};
use crate::files;
use crate::graph::{Model, Port, TrainableChoice};
use crate::inspect::hypothesis::word;
use crate::inspect::subject::Run;
use crate::inspect::{self, How, Inspection, ProbeOptions, Proposal};
use crate::run::teacher;
use crate::runtime::{self, EngineOptions};
use crate::shown::{line, say, tell};
use crate::torch::Network;

/// Show inputs, parameters by role, operators, what is fused or unsupported, the cost, and the teacher card.
#[derive(Debug, Args)]
pub struct InspectArgs {
    /// The ONNX file.
    pub model: PathBuf,
    /// List every parameter and buffer.
    #[arg(long)]
    pub parameters: bool,
    /// Values of the teacher card and sizes of free dimensions, from the command line.
    #[command(flatten)]
    pub card: CardArgs,
    /// Save the card beside the model as <model>.card.toml: what its sources say, completed by the proposal. What is
    /// undecided is left out, as comments to fill in.
    #[arg(long)]
    pub write_card: bool,
    /// Let --write-card replace a card file that is there already.
    #[arg(long, requires = "write_card")]
    pub overwrite: bool,
    /// Probe the network by numbers although its card is complete, and say where the two disagree.
    #[arg(long, conflicts_with = "no_probe")]
    pub probe: bool,
    /// Do not run the network to complete a card that lacks something.
    #[arg(long)]
    pub no_probe: bool,
    /// Time after which the probe tries no further reading of the network.
    #[arg(long, value_name = "SECONDS", default_value_t = 300.0)]
    pub probe_seconds: f64,
    /// Images of the batch that multiply-adds and activations are counted for.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=65536))]
    pub batch: u64,
    /// Which tensors lie at these shares of the network's depth, as gan.taps takes them: 50%,75%,99%. Needs a complete card.
    #[arg(long, value_name = "SHARE,...", value_delimiter = ',')]
    pub taps: Vec<String>,
    /// Never train tensors of these names.
    #[arg(long, value_name = "GLOB")]
    pub freeze: Vec<String>,
    /// Train tensors of these names whatever their role.
    #[arg(long, value_name = "GLOB")]
    pub train: Vec<String>,
    /// Do not fuse decomposed operators.
    #[arg(long, alias = "no-raise")]
    pub no_fuse: bool,
}

/// Runs the command.
pub fn run(args: &InspectArgs, globals: Globals) -> Result<ExitCode> {
    let side = args.model.with_extension("card.toml");
    if args.write_card && side.exists() && !args.overwrite {
        return Err(Error::usage(format!("{} is there already", side.display()))
            .hint("--overwrite replaces it; --card key=value changes a value for one command"));
    }
    if !(args.probe_seconds >= 0.0) {
        return Err(Error::usage(format!("--probe-seconds {}: expected 0 or more", args.probe_seconds)));
    }
    let mut model = Model::load(&args.model)?;
    let source = teacher::card_source(&model, &args.card.overrides());
    let card = source.resolve();
    if let Ok(card) = &card {
        teacher::settle(&mut model, card).with_context(|| args.model.display().to_string())?;
    }
    // A fault in what is there is no lack: it is shown as the card's error, and nothing is proposed over it.
    let mut known = match source.known() {
        Ok(known) => known,
        // What was said here and now is to be corrected here and now.
        Err(e) if !args.card.overrides().is_empty() => return Err(e),
        Err(_) => Default::default(),
    };
    if card.is_err() {
        inspect::join_parts(&mut model, &mut known, !args.no_probe)?;
    }
    let choice =
        TrainableChoice { freeze: args.freeze.clone(), train: args.train.clone(), ..TrainableChoice::default() };
    let (mut found, mut network, graph) = inspect::inspect(&model, &choice, !args.no_fuse)?;
    if !args.parameters {
        found.parameter_list.clear();
    }
    let taps = taps_of(args, network.as_ref(), &card)?;
    let probing = args.probe || (card.is_err() && !args.no_probe);
    let structure = inspect::propose(&model, &graph, &known, None).stand_in(&graph);
    let shown = card.as_ref().ok().map(|c| &c.card).or(structure.as_ref());
    if let Some(net) = &network {
        // Without numbers for all dimensions there is no cost.
        found.cost = inspect::cost(net, shown, args.batch as usize).unwrap_or_default();
    }
    let options = ProbeOptions {
        seconds: args.probe_seconds,
        macs: found.cost.macs_of_one(),
        verify: args.probe && card.is_ok(),
    };
    // A network that cannot be imported may still run.
    let mut engine = match network {
        None if probing => runtime::open(&args.model, &EngineOptions::default()).ok(),
        _ => None,
    };
    let run: Option<&mut dyn Run> = match (&mut network, &mut engine) {
        _ if !probing => None,
        (Some(n), _) => Some(n),
        (None, Some(e)) => Some(e),
        (None, None) => None,
    };
    let proposal = inspect::propose(&model, &graph, &known, run.map(|r| (r, options)));
    if globals.json {
        let mut value = to_json(&found)?;
        value["card"] = match &card {
            Ok(c) => to_json(&c.card)?,
            Err(e) => json!({ "error": e.to_string() }),
        };
        value["proposed_card"] = to_json(&proposal.findings.table())?;
        value["proposal"] = to_json(&proposal.shown())?;
        if !taps.is_empty() {
            value["taps"] = taps.iter().map(|t| json!({ "said": t.said, "tensor": t.name })).collect();
        }
        println!("{}", serde_json::to_string_pretty(&value).map_err(|e| Error::io(e.to_string()))?);
    } else {
        show(args, &found, &card, &proposal)?;
        if !taps.is_empty() {
            say!("\ntaps (gan.taps)");
        }
        taps.iter().for_each(|tap| say!("  {}", line(&tap.to_string())));
    }
    if args.write_card {
        let (text, open) = match (&card, proposal.card()) {
            (Ok(card), _) => (card.written().to_toml()?, Vec::new()),
            (Err(_), Ok(_)) => (proposal.findings.to_toml(), Vec::new()),
            (Err(e), Err(_)) if proposal.findings.open().is_empty() => {
                return Err(Error::of_text(Kind::Usage, &e.to_string())).context("no card to write");
            }
            (Err(_), Err(_)) => (proposal.findings.to_toml(), proposal.findings.open()),
        };
        files::write_atomic(&side, text.as_bytes())?;
        if !globals.quiet {
            tell!("card written to {}", side.display());
            if !open.is_empty() {
                tell!("it leaves out what is undecided: {}; fill that in", open.join(", "));
            }
        }
    }
    Ok(if found.unsupported.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The tensors of `--taps`.
fn taps_of(args: &InspectArgs, network: Option<&Network>, card: &Result<ResolvedCard>) -> Result<Vec<Tap>> {
    if args.taps.is_empty() {
        return Ok(Vec::new());
    }
    let (Some(network), Ok(resolved)) = (network, card) else {
        return Err(Error::usage("--taps needs a network that can be imported, with a complete card")
            .hint("`disback inspect` without it says what is missing"));
    };
    let specs = |ports: &[Port]| ports.iter().map(teacher::spec).collect::<Vec<_>>();
    let inputs = specs(&network.fed_inputs());
    resolved.card.check_against(&inputs, &specs(network.outputs()))?;
    let denoiser = Denoiser::new(Box::new(network.alias()), Arc::new(resolved.card.clone()), &inputs)?;
    taps::resolve(&args.taps, &denoiser)
}

fn to_json<T: serde::Serialize>(value: &T) -> Result<serde_json::Value> {
    serde_json::to_value(value).map_err(|e| Error::io(e.to_string()))
}

fn show(args: &InspectArgs, i: &Inspection, card: &Result<ResolvedCard>, proposal: &Proposal) -> Result<()> {
    let opsets: Vec<_> = i.opset.iter().map(|(d, v)| format!("{d} {v}")).collect();
    say!("{}", args.model.display());
    say!("  written by  {} (IR {}, opset {})", line(&i.producer), i.ir_version, line(&opsets.join(", ")));
    for s in &i.inputs {
        say!("  input       {:<14} {}", line(&s.name), line(&s.text));
    }
    for s in &i.outputs {
        say!("  output      {:<14} {}", line(&s.name), line(&s.text));
    }
    let origin = if i.parameters_declared { " (the framework's list)" } else { "" };
    let elements = thousands(i.parameters.elements as u64);
    say!("\nparameters: {} tensors, {elements} elements{origin}", i.parameters.count);
    for (role, c) in &i.parameters_by_role {
        say!("  {role:<14} {:>5}  {:>14}", c.count, thousands(c.elements as u64));
    }
    if i.parameters_by_group.len() > 1 {
        for (group, c) in &i.parameters_by_group {
            say!("  {group:<14} {:>5}  {:>14}", c.count, thousands(c.elements as u64));
        }
    }
    for group in &i.tied {
        say!("  tied: {}", line(&group.join(" = ")));
    }
    for p in &i.parameter_list {
        say!("    {:<14} {:<5} {:?}  {}", p.role, p.dtype, p.shape, line(&p.name));
    }
    if !i.buffers.is_empty() {
        say!("buffers (not trained): {}", i.buffers.len());
        let shown = if args.parameters { usize::MAX } else { 8 };
        for b in i.buffers.iter().take(shown) {
            say!("    {:<5} {:?}  {}: {}", b.dtype, b.shape, line(&b.name), b.role);
        }
        if i.buffers.len() > shown {
            say!("    ... (--parameters lists all)");
        }
    }
    let operators: Vec<_> = i.operators.iter().map(|(o, n)| format!("{o} {n}")).collect();
    say!("\noperators: {}", line(&operators.join(", ")));
    if !i.fused.is_empty() {
        let fused: Vec<_> = i.fused.iter().map(|(o, n)| format!("{o} {n}")).collect();
        say!("fused: {}", fused.join(", "));
    }
    for m in &i.near_misses {
        say!("  nearly {} at `{}`: {}", m.pattern, line(&m.node), m.reason);
    }
    if let (Some(batch), Some(macs), Some(bytes)) = (i.cost.batch, i.cost.macs, i.cost.activation_bytes) {
        say!(
            "cost of {}: {} multiply-adds forward, {:.2} MiB of activations",
            if batch == 1 { "one image".to_owned() } else { format!("a batch of {batch}") },
            thousands(macs),
            bytes as f64 / (1 << 20) as f64
        );
    }
    if let Some(q) = &i.quantised {
        say!("warning: {q}");
    }
    for u in &i.unguarded_divisions {
        say!("warning: {u}");
    }
    if !i.batch_statistics.is_empty() {
        const SHOWN: usize = 8;
        let names: Vec<&str> = i.batch_statistics.iter().take(SHOWN).map(String::as_str).collect();
        let more = match i.batch_statistics.len().saturating_sub(SHOWN) {
            0 => String::new(),
            n => format!(" and {n} more"),
        };
        let listed = format!("{}{more}", line(&names.join(", ")));
        say!(
            "warning: BatchNormalization in training mode takes the statistics of the batch, so that a sample depends on its \
             neighbours: {listed}; `disback distill` will refuse the network. Export it for inference (in PyTorch: model.eval() and \
             TrainingMode.EVAL); --allow-batch-mixing takes it as it is"
        );
    }
    if !i.unsupported.is_empty() {
        say!("\nnot supported: {} nodes", i.unsupported.len());
        for u in &i.unsupported {
            say!("  {} (opset {}) `{}`: {}", line(&u.operator), u.opset, line(&u.node), line(&u.reason));
            if let Some(w) = &u.way_out {
                say!("    help: {w}");
            }
        }
    }
    match card {
        Ok(c) => {
            say!("\nteacher card");
            for (key, value, origin) in c.rows()? {
                say!("  {key:<28} = {:<22} ({origin})", shortened(&value.to_string()));
            }
        }
        Err(e) => say!("\n{e}"),
    }
    if card.is_err() {
        say!("\nproposed card (--write-card saves it for you to check)");
        for f in proposal.findings.iter() {
            let value = f.value.as_ref().map_or("?".to_owned(), toml::Value::to_string);
            say!("  {:<28} = {value:<22} ({}: {})", f.key, f.how, f.evidence);
        }
        let open = proposal.findings.open();
        if !open.is_empty() {
            say!("  undecided: {}; give them with --card key=value", open.join(", "));
        }
    }
    if let Some(p) = &proposal.probe {
        say!(
            "\nprobe: {} readings of the network on {} samples, {:.1} s; nats of error left on the table:",
            p.tried,
            p.evaluations,
            p.seconds
        );
        for r in &p.readings {
            let sigma_data = r.sigma_data.map(|s| format!("sigma_data {s:.3}"));
            let more = [r.betas, r.direction].into_iter().flatten().map(str::to_owned).chain(sigma_data);
            let more = more.collect::<Vec<_>>().join(", ");
            let schedule = if more.is_empty() { r.schedule.to_owned() } else { format!("{} ({more})", r.schedule) };
            let (prediction, unit) = (word(&r.prediction), word(&r.time_unit));
            say!("  {:>8.3}  {prediction:<9} {unit:<11} {schedule}", r.score);
        }
        if card.is_ok() && p.measured.is_empty() {
            say!("  the numbers neither confirm the card nor contradict it: no reading fits, or several do");
        } else if card.is_ok() && p.contradicted.is_empty() {
            say!("  the numbers agree with the card");
        }
        for key in &p.contradicted {
            let given = proposal.findings.iter().find(|f| f.key == *key && f.how == How::Given);
            let given = given.and_then(|f| f.value.as_ref()).map(toml::Value::to_string).unwrap_or_default();
            say!("  warning: the card says {key} = {given}, the numbers say {}", p.measured[key]);
        }
    } else if let Some(e) = &proposal.failed {
        say!("\nprobe: {e}");
    }
    Ok(())
}

/// A value of the card for one line: long lists by their beginning and their length.
fn shortened(value: &str) -> String {
    const MOST: usize = 120;
    if value.len() <= MOST || !value.starts_with('[') {
        return value.to_owned();
    }
    let begin: Vec<&str> = value.trim_start_matches('[').split(", ").take(4).collect();
    format!("[{}, ... {} numbers]", begin.join(", "), value.matches(", ").count() + 1)
}

/// `1 234 567`.
fn thousands(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::new();
    for (i, c) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(' ');
        }
        out.push(c);
    }
    out
}
