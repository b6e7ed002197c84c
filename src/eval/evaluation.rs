//! A row of the table: everything measured of one generated set against a reference, averaged over blocks of seeds.

use serde::{Deserialize, Serialize};

use super::collect::{Collected, Wanted, collect};
use super::source::{Draw, Source};
use super::{FeatureNet, few, frechet, kernel, manifold, sliced};
use crate::error::{Context, Error, Result};
use crate::io::images::describe;

/// What to measure, and of how many images.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Images a block.
    pub images: usize,
    /// Blocks of seeds: block `r` has images `r * images..` of the seed.
    pub blocks: usize,
    pub wanted: Wanted,
}

/// Measures of one class.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ClassRow {
    pub class: usize,
    /// Generated and reference images.
    pub images: [usize; 2],
    pub frechet: f64,
    pub kernel: f64,
    pub precision: Option<f64>,
    pub recall: Option<f64>,
}

/// Measures of one generated set. Where there are several blocks, means over them; what could not be measured is absent.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Row {
    pub name: String,
    /// `student`, `teacher` or `images`.
    pub kind: String,
    pub frechet: Option<f64>,
    /// Standard deviation over blocks of seeds.
    pub frechet_deviation: Option<f64>,
    /// Least over blocks: what EDM and those after it quote (of three).
    pub frechet_least: Option<f64>,
    pub kernel: Option<f64>,
    pub kernel_standard_error: Option<f64>,
    pub precision: Option<f64>,
    pub recall: Option<f64>,
    pub density: Option<f64>,
    pub coverage: Option<f64>,
    pub inception_score: Option<f64>,
    pub inception_score_deviation: Option<f64>,
    /// Sliced Wasserstein distance times 1000.
    pub sliced: Option<f64>,
    pub sliced_standard_error: Option<f64>,
    /// Generated images a block, and reference images.
    pub images: [usize; 2],
    pub blocks: usize,
    pub features: Option<usize>,
    pub nfe: Option<usize>,
    pub ms_per_image: Option<f64>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub classes: Vec<ClassRow>,
    pub warnings: Vec<String>,
}

/// Refuses what cannot be compared before anything is computed.
pub fn check(source: &Source, name: &str, reference: &Collected) -> Result<()> {
    if let (Some(x), Some(y)) = (source.shape(), reference.shape)
        && x != y
    {
        return Err(Error::mismatch(format!(
            "{name} holds images of {}, the reference of {}",
            describe(x),
            describe(y)
        ))
        .hint("bring both to one size and number of channels first, with the same filter"));
    }
    Ok(())
}

/// Collects the reference: its images, or its statistics checked against the network.
pub fn reference(
    source: &mut Source,
    draw: &Draw,
    net: Option<&mut FeatureNet>,
    count: usize,
    wanted: Wanted,
    seen: impl FnMut(usize),
) -> Result<Collected> {
    match source {
        Source::Statistics(statistics) => match net {
            Some(net) => {
                // The number of features is compared as soon as it is known.
                statistics.check_network(&net.fingerprint(), statistics.dims())?;
                Ok(Collected::of_statistics(statistics.clone()))
            }
            None => Err(Error::usage("the reference holds statistics of features").hint("--features NETWORK.onnx")),
        },
        _ => collect(source, draw, net, (0, count), wanted, seen),
    }
}

fn mean(values: &[f64]) -> Option<f64> {
    (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
}

fn deviation(values: &[f64]) -> Option<f64> {
    let m = mean(values)?;
    let n = values.len();
    (n > 1).then(|| (values.iter().map(|v| (v - m) * (v - m)).sum::<f64>() / (n - 1) as f64).sqrt())
}

/// Standard error of a mean of several values that each have one, or of their spread where that is known.
fn error_of_mean(values: &[f64], errors: &[f64]) -> Option<f64> {
    match deviation(values) {
        Some(spread) => Some(spread / (values.len() as f64).sqrt()),
        None => mean(errors),
    }
}

/// Measures a source against the reference. `seen` is told how many more images are done. The first block is also given
/// back: its features serve for neighbours.
pub fn measure(
    name: &str,
    source: &mut Source,
    draw: &Draw,
    mut net: Option<&mut FeatureNet>,
    reference: &Collected,
    plan: &Plan,
    mut seen: impl FnMut(usize),
) -> Result<(Row, Collected)> {
    check(source, name, reference)?;
    let blocks = plan.blocks.max(1);
    if let Some(len) = source.len().filter(|len| *len < blocks * plan.images) {
        return Err(Error::usage(format!(
            "{name} holds {len} images: too few for {blocks} block(s) of {}",
            plan.images
        )));
    }
    let mut row = Row {
        name: name.to_string(),
        kind: source.kind().to_string(),
        images: [plan.images, reference.count],
        blocks,
        ..Row::default()
    };
    let mut kept = None;
    let (mut distances, mut kernels, mut kernel_errors) = (Vec::new(), Vec::new(), Vec::new());
    let (mut covers, mut slices, mut slice_errors) = (Vec::new(), Vec::new(), Vec::new());
    let (mut scores, mut score_spread, mut ms) = (Vec::new(), Vec::new(), Vec::new());
    for block in 0..blocks {
        let span = (block * plan.images, plan.images);
        let set = collect(source, draw, net.as_deref_mut(), span, plan.wanted, &mut seen)
            .with_context(|| name.to_string())?;
        if let (Some(a), Some(b)) = (&set.statistics, &reference.statistics) {
            let network = a.network.as_deref().unwrap_or_default();
            b.check_network(network, a.dims()).context("the reference")?;
            distances.push(frechet::distance(a, b)?);
            row.features = Some(a.dims());
        }
        if let (Some(a), Some(b)) = (&set.rows, &reference.rows) {
            let k = kernel::distance(a, b)?;
            kernels.push(k.mean);
            kernel_errors.push(k.standard_error);
            if a.len().min(b.len()) > manifold::DENSITY_NEIGHBOUR {
                covers.push(manifold::measure(a, b)?);
            }
        }
        if let (Some(a), Some(b)) = (&set.patches, &reference.patches) {
            let s = sliced::distance(a, b).with_context(|| format!("{name} against the reference"))?;
            slices.push(s.mean);
            slice_errors.push(s.standard_error);
        }
        if let Some(s) = &set.inception {
            scores.push(s.mean);
            score_spread.push(s.deviation);
        }
        ms.extend(set.ms_per_image);
        kept.get_or_insert(set);
    }
    let first = kept.ok_or_else(|| Error::usage("no images to look at"))?;
    row.frechet = mean(&distances);
    row.frechet_deviation = deviation(&distances);
    row.frechet_least = distances.iter().copied().reduce(f64::min).filter(|_| blocks > 1);
    row.kernel = mean(&kernels);
    row.kernel_standard_error = error_of_mean(&kernels, &kernel_errors);
    let over = |f: fn(&manifold::Manifold) -> f64| mean(&covers.iter().map(f).collect::<Vec<_>>());
    row.precision = over(|m| m.precision);
    row.recall = over(|m| m.recall);
    row.density = over(|m| m.density);
    row.coverage = over(|m| m.coverage);
    row.sliced = mean(&slices);
    row.sliced_standard_error = error_of_mean(&slices, &slice_errors);
    row.inception_score = mean(&scores);
    row.inception_score_deviation = mean(&score_spread);
    row.ms_per_image = mean(&ms);
    row.nfe = first.nfe;
    if let Some(d) = row.features {
        row.warnings.extend(few("generated", plan.images, d));
        if reference.count > 0 {
            row.warnings.extend(few("reference", reference.count, d));
        }
        if reference.statistics.as_ref().is_some_and(|s| s.network.is_none()) {
            let text = "the reference statistics do not say which feature network made them: the figure means nothing unless it \
                        was this one, with this preprocessing";
            row.warnings.push(text.to_string());
        }
    }
    if let (Some(c), Some(r)) = (covers.first(), &reference.rows)
        && (c.used[0] < plan.images || r.len() < reference.count)
    {
        row.warnings.push(format!(
            "kernel distance, precision, recall, density and coverage use {} and {} images",
            c.used[0], c.used[1]
        ));
    }
    if let (Some(a), Some(b)) = (&first.classes, &reference.classes) {
        row.classes = by_class(a, b)?;
        let least = row.classes.iter().flat_map(|c| c.images).min().unwrap_or(0);
        if row.features.is_some_and(|d| least <= d) {
            row.warnings.push(format!(
                "class by class there are as few as {least} images for {} features: these Frechet distances are biased upwards; \
                 the kernel distances are not",
                row.features.unwrap_or(0)
            ));
        }
    }
    Ok((row, first))
}

/// Measures of the classes that both sets have at least two images of.
fn by_class(a: &super::collect::ByClass, b: &super::collect::ByClass) -> Result<Vec<ClassRow>> {
    let mut out = Vec::new();
    for class in a.present() {
        let images = [a.count(class), b.count(class)];
        if images.iter().any(|n| *n < 2) {
            continue;
        }
        let run = || -> Result<ClassRow> {
            let (x, y) = (a.matrix(class)?, b.matrix(class)?);
            let frechet = frechet::distance(&super::Statistics::of(&x)?, &super::Statistics::of(&y)?)?;
            let kernel = kernel::distance(&x, &y)?.mean;
            let enough = images.iter().all(|n| *n > manifold::DENSITY_NEIGHBOUR);
            let cover = if enough { Some(manifold::measure(&x, &y)?) } else { None };
            let (precision, recall) = (cover.map(|c| c.precision), cover.map(|c| c.recall));
            Ok(ClassRow { class, images, frechet, kernel, precision, recall })
        };
        out.push(run().with_context(|| format!("class {class}"))?);
    }
    match out.is_empty() {
        true => Err(Error::mismatch("the two sets have no class in common with at least two images in each")),
        false => Ok(out),
    }
}
