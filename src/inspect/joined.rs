//! Networks that take more channels than they give: which parts their sample input has, by the usual counts.

use tch::Device;

use crate::diffusion::card::joined;
use crate::diffusion::{CardOrigin, InputSpec};
use crate::error::Result;
use crate::graph::lower::lower;
use crate::graph::{Graph, Model};
use crate::inspect::axes::sample_size;
use crate::inspect::findings::{Findings, Known};
use crate::inspect::proposal::base;
use crate::inspect::structure;
use crate::inspect::subject::Subject;
use crate::runtime::{self, EngineOptions};
use crate::torch::{ImportOptions, Network};

/// Names and channels of the conditions that are joined behind a sample of so many channels, of `rank` dimensions.
fn usual_parts(given: usize, made: usize, rank: usize) -> Vec<(&'static str, usize)> {
    match (given, made) {
        _ if rank != 3 => vec![("condition", given - made)],
        // Stable Diffusion's inpainting, InstructPix2Pix and the x4 upscaler.
        (9, 4) => vec![("mask", 1), ("masked_image_latents", 4)],
        (8, 4) => vec![("image_latents", 4)],
        (7, 4) => vec![("image", 3)],
        (given, made) => vec![("condition", given - made)],
    }
}

/// Where a file's sample input takes more channels than its output has, and no source of the card says what they are: completes
/// `known` with the parts by the usual counts and names. Then gives the file the parts as inputs of their own, so that what follows
/// sees the network as training would. `may_run`: where the file does not declare the channels of its output, the network is run once
/// to learn them.
///
/// Errors: parts that `known` says and that do not fit the graph.
pub fn join_parts(model: &mut Model, known: &mut Known, may_run: bool) -> Result<()> {
    let concat = vec!["concat".to_owned()];
    let graph = lower(model)?;
    if !known.contains_key(&concat) {
        let Some(found) = propose(&graph, model, known, may_run) else { return Ok(()) };
        for (path, value) in found {
            known.entry(path).or_insert((value, CardOrigin::Graph));
        }
    }
    let Some(card) = structure::read(&graph, known, &model.path).stand_in(false) else { return Ok(()) };
    card.put_parts_into(std::sync::Arc::make_mut(&mut model.proto))
}

/// The output as a run of the network makes it; `None` where it does not run.
fn measured(graph: &Graph, model: &Model, findings: &Findings, output: &InputSpec) -> Option<InputSpec> {
    let (card, _) = base(graph, findings).ok()?;
    let inputs: Vec<InputSpec> = graph.inputs.iter().map(InputSpec::from).collect();
    let network = Network::import(model.clone(), &ImportOptions::default(), Device::Cpu);
    let shape = match network {
        Ok(mut network) => Subject::new(&mut network, &card, &inputs).and_then(|mut s| s.output_shape()),
        // A network that cannot be imported may still run.
        Err(_) => {
            let mut engine = runtime::open(&model.path, &EngineOptions::default()).ok()?;
            Subject::new(&mut engine, &card, &inputs).and_then(|mut s| s.output_shape())
        }
    };
    let shape = shape.inspect_err(|e| tracing::info!("the network was not run for its output's channels: {e}")).ok()?;
    Some(InputSpec { shape: shape.into_iter().map(Some).collect(), ..output.clone() })
}

fn propose(graph: &Graph, model: &Model, known: &Known, may_run: bool) -> Option<Vec<(Vec<String>, toml::Value)>> {
    let findings: Findings = structure::read(graph, known, &model.path);
    let port = |key: &str, among: &[crate::graph::Port]| {
        let name = findings.text(&[key])?;
        among.iter().find(|p| p.name == name).map(InputSpec::from)
    };
    let (sample, mut output) = (port("sample", &graph.inputs)?, port("output", &graph.outputs)?);
    let sizes = |name: &str| graph.inputs.iter().find(|p| p.name == name).and_then(|p| findings.dims_of(p));
    let mut row: Vec<Option<usize>> = sizes(&sample.name)?.into_iter().skip(1).collect();
    // Where the card says the sample's shape, it says how many of the channels are the sample's.
    let shape: Option<Vec<usize>> = known.get(&vec!["shape".to_owned()]).and_then(|(v, _)| v.clone().try_into().ok());
    let shape = shape.filter(|s| s.len() == row.len() && findings.text(&["layout"]).as_deref() != Some("nhwc"));
    let (given, made) = match (&shape, row.first()) {
        (Some(shape), Some(Some(given))) if *given > shape[0] => (*given, shape[0]),
        _ => {
            // (A size that is free on both sides, such as the height, says nothing of the channels.)
            let undeclared = output.shape.len() != sample.shape.len()
                || sample
                    .shape
                    .iter()
                    .zip(&output.shape)
                    .skip(1)
                    .any(|(given, made)| given.is_some() && made.is_none());
            if undeclared && may_run && sample.shape.len() > 2 {
                output = measured(graph, model, &findings, &output)?;
            }
            joined(&sample, &output)?
        }
    };
    let axis = match &shape {
        Some(shape) if row[0] == Some(given) && shape[0] == made => {
            row.iter_mut().zip(shape).skip(1).for_each(|(d, n)| *d = d.or(Some(*n)));
            0
        }
        _ => row.iter().zip(&output.shape[1..]).position(|(a, b)| (*a, *b) == (Some(given), Some(made)))?,
    };
    let spatial: Vec<usize> = (0..row.len()).filter(|k| *k != axis).collect();
    if let (Some(size), [h, w]) = (sample_size(&model.path), spatial.as_slice()) {
        (row[*h], row[*w]) = (row[*h].or(Some(size[0])), row[*w].or(Some(size[1])));
    }
    let row: Vec<i64> = row.into_iter().map(|d| d.map(|n| n as i64)).collect::<Option<_>>()?;
    let part = |channels: usize| {
        let mut shape = row.clone();
        shape[axis] = channels as i64;
        shape
    };
    let nhwc = axis == 2 && row.len() == 3;
    let layout = match axis {
        0 => "channels-first",
        _ if nhwc => "nhwc",
        _ if axis + 1 == row.len() => "channels-last",
        _ => "frames-first",
    };
    let mut own = part(made);
    if nhwc {
        own.rotate_right(1);
    }
    let key = |path: &[&str]| path.iter().map(|s| (*s).to_owned()).collect::<Vec<_>>();
    let mut names = vec![sample.name.clone()];
    let mut found = vec![(key(&["shape"]), own.into()), (key(&["layout"]), layout.into())];
    for (name, channels) in usual_parts(given, made, row.len()) {
        if graph.inputs.iter().any(|p| p.name == name) {
            return None;
        }
        found.push((key(&["conditions", name, "kind"]), "embedding".into()));
        found.push((key(&["conditions", name, "shape"]), part(channels).into()));
        names.push(name.to_owned());
    }
    found.push((key(&["concat"]), names.into()));
    Some(found)
}
