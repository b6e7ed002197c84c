//! `disback parity`: does the imported network compute what ONNX Runtime computes?

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use tch::Device;

use crate::cli::Globals;
use crate::cli::card_args::CardArgs;
use crate::error::{Context, Error, Result};
use crate::graph::Model;
use crate::io::npy;
use crate::parity::{self, OutputError, Parity, Tolerance};
use crate::run::teacher;
use crate::shown::say;
use crate::torch::{ImportOptions, Network};

/// Run the same inputs through libtorch and ONNX Runtime; exit code 1 where they disagree. What a converter stored beside the
/// model (<model>.sample.npz: inputs and the framework's own outputs) is compared too.
#[derive(Debug, Args)]
pub struct ParityArgs {
    /// The ONNX file.
    pub model: PathBuf,
    /// Inputs; names are the graph's input names. Without it they are random, by the graph's signature and the card.
    #[arg(long, value_name = "NPZ")]
    pub inputs: Option<PathBuf>,
    /// Outputs to compare with beside ONNX Runtime's, e.g. those of the framework; names are the graph's output names.
    #[arg(long, value_name = "NPZ", requires = "inputs")]
    pub expected: Option<PathBuf>,
    /// Rows of random inputs.
    #[arg(long, default_value_t = 2)]
    pub batch: usize,
    /// Values of the teacher card and sizes of free dimensions, from the command line.
    #[command(flatten)]
    pub card: CardArgs,
    /// Seed of random inputs.
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Absolute tolerance, times the output's standard deviation where that is above 1.
    #[arg(long, default_value_t = 1e-5)]
    pub atol: f64,
    /// Relative tolerance.
    #[arg(long, default_value_t = 1e-3)]
    pub rtol: f64,
    /// Do not fuse decomposed operators.
    #[arg(long, alias = "no-raise")]
    pub no_fuse: bool,
    /// Where libtorch runs: cpu, cuda, cuda:1. On another device than the CPU, values and gradients of both are compared too.
    #[arg(long, default_value = "cpu")]
    pub device: String,
}

/// Runs the command.
pub fn run(args: &ParityArgs, globals: Globals) -> Result<ExitCode> {
    let device: Device = crate::torch::device::parse(&args.device)?;
    let mut model = Model::load(&args.model)?;
    // A network need not be a teacher to be compared: without a card inputs are plain noise.
    let source = teacher::card_source(&model, &args.card.overrides());
    let (card, lacking) = match source.resolve() {
        Ok(card) => (Some(card), None),
        Err(e) if !args.card.card.is_empty() => return Err(e),
        // A card that lacks something says more about a missing size than the size's name does.
        Err(e) => (None, Some(e).filter(|_| source.known().is_ok_and(|known| !known.is_empty()))),
    };
    let dims = dimensions(&args.card.dims)?;
    if let Some(card) = &card {
        teacher::settle(&mut model, card).with_context(|| args.model.display().to_string())?;
    }
    let options = ImportOptions { fuse: !args.no_fuse, ..ImportOptions::default() };
    let net = Network::import(model.clone(), &options, device)?;
    let inputs = match &args.inputs {
        Some(path) => npy::read_npz(path)?,
        None => {
            let made =
                parity::random_inputs(net.inputs(), card.as_ref().map(|c| &c.card), args.batch, &dims, args.seed);
            made.map_err(|e| lacking.unwrap_or(e).context(args.model.display().to_string()))?
        }
    };
    let expected = args.expected.as_ref().map(|p| npy::read_npz(p)).transpose()?;
    let tolerance = Tolerance { atol: args.atol, rtol: args.rtol };
    let mut result = parity::check(&net, &inputs, expected.as_deref(), tolerance)?;
    let mut source = "--expected".to_owned();
    if args.inputs.is_none()
        && let Some(stored) = parity::stored(&args.model, net.inputs(), net.outputs())?
    {
        source = stored.path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        result = result.with_stored(parity::check(&net, &stored.inputs, Some(&stored.outputs), tolerance)?);
    }
    if device != Device::Cpu {
        let both = parity::devices::check(&model, &options, &inputs, device, tolerance)?;
        result.ok &= both.ok;
        result.devices = Some(both);
    }
    if globals.json {
        println!("{}", serde_json::to_string_pretty(&result).map_err(|e| Error::io(e.to_string()))?);
    } else {
        show(&result, &source);
    }
    Ok(if result.ok { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn dimensions(list: &[String]) -> Result<BTreeMap<String, usize>> {
    list.iter()
        .map(|d| {
            let parsed = d.split_once('=').and_then(|(k, v)| Some((k.to_owned(), v.parse().ok()?)));
            parsed.ok_or_else(|| Error::usage(format!("--dim {d}: expected NAME=NUMBER")))
        })
        .collect()
}

fn show(result: &Parity, source: &str) {
    let mut table = comfy_table::Table::new();
    table.load_preset(comfy_table::presets::NOTHING);
    table.set_header(["output", "against", "max abs", "of its std", ""]);
    let verdict = |o: &OutputError| match (o.ok, o.nan) {
        (true, 0.0) => "agrees".to_owned(),
        (true, nan) => format!("agrees, {:.0} % are NaN on both sides", 100.0 * nan),
        (false, 1.0) => "NaN on both sides: nothing to compare (give --inputs FILE.npz)".to_owned(),
        (false, _) => "DIFFERS".to_owned(),
    };
    for o in &result.outputs {
        table.add_row([
            &o.name,
            &result.engine,
            &format!("{:.2e}", o.max_abs),
            &format!("{:.2e}", o.max_rel),
            &verdict(o),
        ]);
    }
    for o in result.expected.iter().flatten() {
        table.add_row([&o.name, source, &format!("{:.2e}", o.max_abs), &format!("{:.2e}", o.max_rel), &verdict(o)]);
    }
    say!("{table}");
    if let Some(d) = &result.devices {
        say!(
            "\n{} against the CPU: outputs {:.2e} of their std, gradients {:.2e} (worst `{}` {:.2e}), {}",
            d.device,
            d.output_max_rel,
            d.gradient_rel_l2,
            d.worst_parameter,
            d.worst_gradient_rel_l2,
            if d.ok { "agrees" } else { "DIFFERS" }
        );
    }
    for u in &result.unguarded_divisions {
        say!("warning: {u}");
    }
    if let Some(d) = &result.first_divergence {
        say!("\nfirst value that differs: `{}`, made by {} (max abs {:.2e})", d.value, d.node, d.max_abs);
        say!("  libtorch     mean {:>12.5}  std {:>12.5}", d.libtorch[0], d.libtorch[1]);
        say!("  ONNX Runtime mean {:>12.5}  std {:>12.5}", d.onnxruntime[0], d.onnxruntime[1]);
    }
}
