//! A row of the table: everything measured of one generated set against a reference, averaged over blocks of seeds.

use serde::{Deserialize, Serialize};

use super::collect::{Collected, Wanted, collect};
use super::kernel::Estimator;
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

/// Measures of one class.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ClassRow {
    /// Number of the class.
    pub class: usize,
    /// Number of generated and of reference images of the class.
    pub images: [usize; 2],
    /// Frechet distance within the class.
    pub frechet: f64,
    /// Kernel distance within the class.
    pub kernel: f64,
    /// Precision within the class; absent where one of the sets has 5 images or fewer.
    pub precision: Option<f64>,
    /// Recall within the class; absent where one of the sets has 5 images or fewer.
    pub recall: Option<f64>,
}

/// Measures of one generated set. Where there are several blocks, means over them; what could not be measured is absent.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Row {
    /// Name of the generated set in the table.
    pub name: String,
    /// `student`, `teacher`, `images`, or `values` of what is no image.
    pub kind: String,
    /// Whether the samples were measured by their values: not as images.
    pub by_values: bool,
    /// Frechet distance (Dowson & Landau 1982); the FID where the features are Inception's.
    pub frechet: Option<f64>,
    /// Standard deviation of the Frechet distance over blocks of seeds; absent for one block.
    pub frechet_deviation: Option<f64>,
    /// Lowest Frechet distance of the blocks, as EDM quotes it for three blocks; absent for one block.
    pub frechet_least: Option<f64>,
    /// Kernel distance (Binkowski et al. 2018); the KID where the features are Inception's.
    pub kernel: Option<f64>,
    /// Standard error of the kernel distance: over blocks of seeds, or within the only one.
    pub kernel_standard_error: Option<f64>,
    /// Standard deviation over random subsets, where the kernel distance is their mean.
    pub kernel_deviation: Option<f64>,
    /// Share of the generated images, 0 to 1, within the reference's manifold (Kynkaanniemi et al. 2019): quality.
    pub precision: Option<f64>,
    /// Share of the reference images, 0 to 1, within the generated manifold (Kynkaanniemi et al. 2019): diversity.
    pub recall: Option<f64>,
    /// Density (Naeem et al. 2020), 1 for equal distributions.
    pub density: Option<f64>,
    /// Coverage (Naeem et al. 2020), 0 to 1.
    pub coverage: Option<f64>,
    /// Inception Score (Salimans et al. 2016), 1 or more; absent where the feature network gives no class scores.
    pub inception_score: Option<f64>,
    /// Standard deviation of the Inception Score over ten parts of a block, the mean of all blocks.
    pub inception_score_deviation: Option<f64>,
    /// Sliced Wasserstein distance (Karras et al. 2018) times 1000.
    pub sliced: Option<f64>,
    /// Standard error of `sliced`: over blocks of seeds, or over random directions within the only one.
    pub sliced_standard_error: Option<f64>,
    /// Number of generated images a block, and of reference images.
    pub images: [usize; 2],
    /// Number of blocks of seeds.
    pub blocks: usize,
    /// Number of features an image; absent without a feature network.
    pub features: Option<usize>,
    /// Network evaluations for one image; absent for images that were there already.
    pub nfe: Option<usize>,
    /// Milliseconds to make one image; absent for images that were there already.
    pub ms_per_image: Option<f64>,
    /// Measures class by class; empty where they were not asked for.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub classes: Vec<ClassRow>,
    /// What makes the numbers less reliable, such as too few images.
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
