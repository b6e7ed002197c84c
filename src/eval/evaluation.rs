//! A row of the table: everything measured of one generated set against a reference, averaged over blocks of seeds.

use super::collect::{Collected, Wanted, collect};
use super::kernel::Estimator;
pub use super::row::{ClassRow, EvaluationRow};
use super::source::{Draw, Source};
use super::tally::Tally;
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
    /// What to gather for the measures beyond the Frechet distance.
    pub wanted: Wanted,
    /// Pairs of the kernel distance.
    pub kernel: Estimator,
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
) -> Result<(EvaluationRow, Collected)> {
    check(source, name, reference)?;
    let blocks = plan.blocks.max(1);
    if let Some(len) = source.len().filter(|len| *len < blocks * plan.images) {
        return Err(Error::usage(format!(
            "{name} holds {len} images: too few for {blocks} block(s) of {}",
            plan.images
        )));
    }
    let mut row = EvaluationRow {
        name: name.to_string(),
        kind: source.kind().to_string(),
        images: [plan.images, reference.count],
        blocks,
        ..EvaluationRow::default()
    };
    let mut kept = None;
    let mut tally = Tally::default();
    for block in 0..blocks {
        let span = (block * plan.images, plan.images);
        let set = collect(source, draw, net.as_deref_mut(), span, plan.wanted, &mut seen)
            .with_context(|| name.to_string())?;
        if let (Some(a), Some(b)) = (&set.statistics, &reference.statistics) {
            let network = a.network.as_deref().unwrap_or_default();
            b.check_network(network, a.dims()).context("the reference")?;
            tally.frechet(a, b)?;
            row.features = Some(a.dims());
        }
        if let (Some(a), Some(b)) = (&set.rows, &reference.rows) {
            tally.rows(a, b, plan.kernel)?;
        }
        if let (Some(a), Some(b)) = (&set.patches, &reference.patches) {
            let s = sliced::distance(a, b).with_context(|| format!("{name} against the reference"))?;
            tally.sliced(s.mean, s.standard_error);
        }
        if let Some(s) = &set.inception {
            tally.score(s);
        }
        tally.time(set.ms_per_image);
        kept.get_or_insert(set);
    }
    let first = kept.ok_or_else(|| Error::usage("no images to look at"))?;
    let used = tally.covers.first().map(|c| c.used);
    tally.fill(&mut row);
    row.nfe = first.nfe;
    row.warnings.extend(first.notes.iter().map(|n| format!("{name}: {n}")));
    row.warnings.extend(reference.notes.iter().map(|n| format!("the reference: {n}")));
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
    if let (Some(c), Some(r)) = (used, &reference.rows)
        && (c[0] < plan.images || r.len() < reference.count)
    {
        row.warnings
            .push(format!("kernel distance, precision, recall, density and coverage use {} and {} images", c[0], c[1]));
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
            let kernel = kernel::distance(&x, &y, Estimator::Full)?.mean;
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
