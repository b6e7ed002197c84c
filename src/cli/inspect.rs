//! `disback inspect`: what an ONNX file holds and what would become of it.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use serde_json::json;

use crate::cli::Globals;
use crate::diffusion::ResolvedCard;
use crate::error::{Error, Result};
use crate::files;
use crate::graph::{Model, TrainableChoice};
use crate::inspect::{self, Inspection};
use crate::teacher;

/// Show inputs, parameters by role, operators, what is raised or unsupported, the cost, and the teacher card.
#[derive(Debug, Args)]
pub struct InspectArgs {
    /// The ONNX file.
    pub model: PathBuf,
    /// List every parameter and buffer.
    #[arg(long)]
    pub parameters: bool,
    /// A value of the teacher card, over what the file says.
    #[arg(long = "card", value_name = "KEY=VALUE")]
    pub card: Vec<String>,
    /// Save the card, as resolved from all sources, beside the model as <model>.card.toml.
    #[arg(long)]
    pub write_card: bool,
    /// Never train tensors of these names.
    #[arg(long, value_name = "GLOB")]
    pub freeze: Vec<String>,
    /// Train tensors of these names whatever their role.
    #[arg(long, value_name = "GLOB")]
    pub train: Vec<String>,
    /// Do not raise decomposed operators.
    #[arg(long)]
    pub no_raise: bool,
}

/// Runs the command.
pub fn run(args: &InspectArgs, globals: Globals) -> Result<ExitCode> {
    let model = Model::load(&args.model)?;
    let card = teacher::card(&model, &args.card);
    let choice =
        TrainableChoice { freeze: args.freeze.clone(), train: args.train.clone(), ..TrainableChoice::default() };
    let mut found = inspect::inspect(&model, card.as_ref().ok().map(|c| &c.card), &choice, !args.no_raise)?;
    if !args.parameters {
        found.parameter_list.clear();
    }
    if globals.json {
        let mut value = serde_json::to_value(&found).map_err(|e| Error::io(e.to_string()))?;
        value["card"] = match &card {
            Ok(c) => serde_json::to_value(&c.card).map_err(|e| Error::io(e.to_string()))?,
            Err(e) => json!({ "error": e.to_string() }),
        };
        println!("{}", serde_json::to_string_pretty(&value).map_err(|e| Error::io(e.to_string()))?);
    } else {
        show(args, &found, &card)?;
    }
    if args.write_card {
        let card = card?;
        let path = args.model.with_extension("card.toml");
        files::write_atomic(&path, card.card.to_toml()?.as_bytes())?;
        if !globals.quiet {
            eprintln!("card written to {}", path.display());
        }
    }
    Ok(if found.unsupported.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn show(args: &InspectArgs, i: &Inspection, card: &Result<ResolvedCard>) -> Result<()> {
    let opsets: Vec<_> = i.opset.iter().map(|(d, v)| format!("{d} {v}")).collect();
    println!("{}", args.model.display());
    println!("  written by  {} (IR {}, opset {})", i.producer, i.ir_version, opsets.join(", "));
    for s in &i.inputs {
        println!("  input       {:<14} {}", s.name, s.text);
    }
    for s in &i.outputs {
        println!("  output      {:<14} {}", s.name, s.text);
    }
    println!("\nparameters: {} tensors, {} elements", i.parameters.count, thousands(i.parameters.elements as u64));
    for (role, c) in &i.parameters_by_role {
        println!("  {role:<14} {:>5}  {:>14}", c.count, thousands(c.elements as u64));
    }
    for p in &i.parameter_list {
        println!("    {:<14} {:<5} {:?}  {}", p.role, p.dtype, p.shape, p.name);
    }
    if !i.buffers.is_empty() {
        println!("buffers (not trained): {}", i.buffers.len());
        let shown = if args.parameters { usize::MAX } else { 8 };
        for b in i.buffers.iter().take(shown) {
            println!("    {:<5} {:?}  {}: {}", b.dtype, b.shape, b.name, b.role);
        }
        if i.buffers.len() > shown {
            println!("    ... (--parameters lists all)");
        }
    }
    let operators: Vec<_> = i.operators.iter().map(|(o, n)| format!("{o} {n}")).collect();
    println!("\noperators: {}", operators.join(", "));
    if !i.raised.is_empty() {
        let raised: Vec<_> = i.raised.iter().map(|(o, n)| format!("{o} {n}")).collect();
        println!("raised to native calls: {}", raised.join(", "));
    }
    for m in &i.near_misses {
        println!("  nearly {} at `{}`: {}", m.pattern, m.node, m.reason);
    }
    if let Some(c) = &i.cost {
        println!(
            "cost of one image: {} multiply-adds forward, {:.2} MiB of activations",
            thousands(c.macs),
            c.activation_bytes as f64 / (1 << 20) as f64
        );
    }
    if !i.unsupported.is_empty() {
        println!("\nnot supported: {} nodes", i.unsupported.len());
        for u in &i.unsupported {
            println!("  {} (opset {}) `{}`: {}", u.operator, u.opset, u.node, u.reason);
            if let Some(w) = &u.way_out {
                println!("    help: {w}");
            }
        }
    }
    match card {
        Ok(c) => {
            println!("\nteacher card");
            for (key, value, origin) in c.rows()? {
                println!("  {key:<28} = {value:<22} ({origin})");
            }
        }
        Err(e) => println!("\nno teacher card: {e}"),
    }
    Ok(())
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
