//! `disback inspect` without libtorch: what an ONNX file holds. What could be trained, fused or is unsupported only the full
//! build can say.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use serde_json::json;

use super::Globals;
use super::card_args::CardArgs;
use crate::diffusion::CardSource;
use crate::error::Result;
use crate::graph::{Model, TrainableChoice, lower, roles};
use crate::runtime::student::StudentInfo;
use crate::shown::{line, say};

/// Show inputs, outputs, operators, parameters by role, the cards of teachers and students.
#[derive(Debug, Args)]
pub struct InspectArgs {
    /// The ONNX file.
    pub model: PathBuf,
    /// What the command line says about the card.
    #[command(flatten)]
    pub card: CardArgs,
}

/// Runs the command.
pub fn run(args: &InspectArgs, globals: Globals) -> Result<ExitCode> {
    let model = Model::load(&args.model)?;
    let mut graph = lower::lower(&model)?;
    let mut operators: BTreeMap<String, usize> = BTreeMap::new();
    for n in &graph.nodes {
        *operators.entry(n.op.clone()).or_insert(0) += 1;
    }
    let declared = roles::Declared::of(&model)?;
    let provenance = roles::untangle(&mut graph, declared.parameters.as_deref());
    let choice = TrainableChoice { declared: declared.parameters, ..TrainableChoice::default() };
    let found = roles::classify(&graph, &choice, &provenance)?;
    let mut by_role: BTreeMap<String, (usize, usize)> = BTreeMap::new();
    for p in &found.parameters {
        let entry = by_role.entry(p.role.to_string()).or_default();
        entry.0 += 1;
        entry.1 += p.shape.iter().product::<usize>();
    }
    let (inputs, outputs): (Vec<_>, Vec<_>) = (
        graph.inputs.iter().map(|p| (p.name.clone(), p.describe())).collect(),
        graph.outputs.iter().map(|p| (p.name.clone(), p.describe())).collect(),
    );
    let student = StudentInfo::from_model(&model.proto).ok();
    let source = CardSource::new().model(&args.model).proto(&model.proto).overrides(args.card.overrides());
    let card = if student.is_some() { None } else { Some(source.resolve()) };
    if globals.json {
        let card = match &card {
            Some(Ok(c)) => json!(c.card),
            Some(Err(e)) => json!({ "error": e.to_string() }),
            None => json!(null),
        };
        let out = json!({ "ok": true, "model": args.model, "opset": graph.opsets, "inputs": inputs, "outputs": outputs,
            "operators": operators, "parameters_by_role": by_role, "tied": declared.tied, "card": card,
            "student": student.map(|s| s.metadata) });
        println!("{out}");
        return Ok(ExitCode::SUCCESS);
    }
    say!("{}", args.model.display());
    for (what, ports) in [("input", &inputs), ("output", &outputs)] {
        for (name, text) in ports {
            say!("  {what:<10}  {:<14} {}", line(&name), line(&text));
        }
    }
    say!("\nparameters: {} tensors", found.parameters.len());
    for (role, (tensors, elements)) in &by_role {
        say!("  {role:<14} {tensors:>5}  {elements:>14}");
    }
    for group in &declared.tied {
        say!("  tied: {}", line(&group.join(" = ")));
    }
    let list: Vec<String> = operators.iter().map(|(o, n)| format!("{o} {n}")).collect();
    say!("\noperators: {}", line(&list.join(", ")));
    match (&student, &card) {
        (Some(s), _) => {
            say!("\nstudent");
            for (key, value) in &s.metadata {
                say!("  {key:<28} = {value}");
            }
        }
        (None, Some(Ok(c))) => {
            say!("\nteacher card");
            for (key, value, origin) in c.rows()? {
                say!("  {key:<28} = {value:<22} ({origin})");
            }
        }
        (None, Some(Err(e))) => say!("\n{e}"),
        (None, None) => {}
    }
    Ok(ExitCode::SUCCESS)
}
